package index

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb"
	"github.com/aws/aws-sdk-go-v2/service/dynamodb/types"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/history/awsclient"
)

// DynamoDBOptions say where a table is. Credentials come from the AWS SDK's own chain.
type DynamoDBOptions struct {
	Table    string
	Endpoint string // URL; empty for AWS itself
	Region   string // empty: from the AWS configuration; with an endpoint, us-east-1 if that has none either

	// AccessKey and SecretKey, when set, go before the credentials chain.
	AccessKey, SecretKey string

	// HTTPClient replaces the SDK's client where a test needs its own.
	HTTPClient *http.Client

	// Timeout is how long one request may take, with all its repetitions
	// (default 30 s).
	Timeout time.Duration
}

// Attributes of a row in the table.
const (
	attrHash  = "h" // string, hash key
	attrRange = "r" // binary, range key
	attrValue = "v" // binary
)

const (
	defaultTimeout  = 30 * time.Second
	attemptTimeout  = 10 * time.Second // until the headers of an answer
	maxAttempts     = 12
	firstBackoff    = 25 * time.Millisecond
	maxBackoff      = 4 * time.Second
	batchRows       = 25 // DynamoDB's limit of a batch
	batchesInFlight = 8  // of one call

	// maxBatchBytes stays below DynamoDB's 16 MiB, for base64 makes a third more.
	maxBatchBytes = 8 << 20
)

// Validate reports the first option that can't be.
func (o DynamoDBOptions) Validate() error {
	switch {
	case o.Table == "":
		return errors.New("dynamodb: a table is needed")
	case (o.AccessKey == "") != (o.SecretKey == ""):
		return errors.New("dynamodb: access key and secret key are given together or not at all")
	case o.Timeout < 0:
		return errors.New("dynamodb: the time-out can't be negative")
	}
	return nil
}

// DynamoDB is a Store in one table. It uses conditional writes only, no
// transactions. Throttled requests and rows that a batch put back are repeated
// with jittered back-off until the time-out.
type DynamoDB struct {
	client  *dynamodb.Client
	o       DynamoDBOptions
	metrics *metrics
}

// NewDynamoDB makes the client; it sends nothing. See Check.
func NewDynamoDB(ctx context.Context, o DynamoDBOptions, reg prometheus.Registerer) (*DynamoDB, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	cfg, err := awsclient.Load(ctx, awsclient.Options{
		Endpoint: o.Endpoint, Region: o.Region, AccessKey: o.AccessKey, SecretKey: o.SecretKey,
		HTTPClient: o.HTTPClient, HeaderTimeout: min(attemptTimeout, o.Timeout), MaxConnections: 32,
		Retry: func(r *retry.StandardOptions) {
			r.MaxAttempts = maxAttempts
			r.Backoff = retry.BackoffDelayerFunc(func(attempt int, _ error) (time.Duration, error) { return backoff(attempt), nil })
		},
	})
	if err != nil {
		return nil, fmt.Errorf("dynamodb: %w", err)
	}
	m := newMetrics(reg)
	client := dynamodb.NewFromConfig(cfg, func(c *dynamodb.Options) {
		c.APIOptions = append(c.APIOptions, m.countAttempts)
	})
	return &DynamoDB{client: client, o: o, metrics: m}, nil
}

// backoff is the wait after so many attempts: at random up to a bound that doubles.
func backoff(attempt int) time.Duration {
	bound := min(maxBackoff, firstBackoff<<min(attempt, 16))
	return time.Duration(rand.Int64N(int64(bound))) //nolint:gosec // no secret
}

// opKey carries which of our calls an attempt belongs to.
type opKey struct{}

// countAttempts puts a counter below the SDK's retries.
func (m *metrics) countAttempts(stack *middleware.Stack) error {
	return stack.Finalize.Insert(middleware.FinalizeMiddlewareFunc("epimetheusCount",
		func(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
			start := time.Now()
			out, meta, err := next.HandleFinalize(ctx, in)
			op, ok := ctx.Value(opKey{}).(string)
			if !ok {
				op = awsmiddleware.GetOperationName(ctx)
			}
			outcome := "ok"
			switch {
			case isConditionFailed(err):
				outcome = "conflict"
			case isThrottle(err):
				outcome = "throttled"
			case err != nil:
				outcome = "error"
			}
			m.observe(op, start, outcome)
			return out, meta, err
		}), "Retry", middleware.After)
}

func isConditionFailed(err error) bool {
	var e *types.ConditionalCheckFailedException
	return errors.As(err, &e)
}

func isThrottle(err error) bool {
	var api smithy.APIError
	if !errors.As(err, &api) {
		return false
	}
	_, ok := retry.DefaultThrottleErrorCodes[api.ErrorCode()]
	return ok
}

func (d *DynamoDB) charge(kind string, c *types.ConsumedCapacity) {
	if c != nil {
		d.metrics.units.WithLabelValues(kind).Add(aws.ToFloat64(c.CapacityUnits))
	}
}

// call gives a request its deadline and name.
func (d *DynamoDB) call(ctx context.Context, op string) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithValue(ctx, opKey{}, op), d.o.Timeout)
}

func (d *DynamoDB) error(op string, err error) error {
	if _, missing := errors.AsType[*types.ResourceNotFoundException](err); missing {
		return fmt.Errorf("index %s: dynamodb table %q: %w; create it with `epimetheus tool create-table`", op, d.o.Table, ErrNoTable)
	}
	return fmt.Errorf("index %s: dynamodb table %q: %w", op, d.o.Table, err)
}

// Check reports whether the table can be reached and has the right keys.
func (d *DynamoDB) Check(ctx context.Context) error {
	ctx, cancel := d.call(ctx, opDescribe)
	defer cancel()
	out, err := d.client.DescribeTable(ctx, &dynamodb.DescribeTableInput{TableName: &d.o.Table},
		func(o *dynamodb.Options) { o.RetryMaxAttempts = 2 }) // who starts a process wants to know
	if err != nil {
		return d.error(opDescribe, err)
	}
	keys := map[string]types.KeyType{}
	for _, k := range out.Table.KeySchema {
		keys[aws.ToString(k.AttributeName)] = k.KeyType
	}
	kinds := map[string]types.ScalarAttributeType{}
	for _, a := range out.Table.AttributeDefinitions {
		kinds[aws.ToString(a.AttributeName)] = a.AttributeType
	}
	if !maps.Equal(keys, map[string]types.KeyType{attrHash: types.KeyTypeHash, attrRange: types.KeyTypeRange}) ||
		kinds[attrHash] != types.ScalarAttributeTypeS || kinds[attrRange] != types.ScalarAttributeTypeB {
		return fmt.Errorf("dynamodb table %q is not ours: its keys are not %s (string, hash) and %s (binary, range); name another", d.o.Table, attrHash, attrRange)
	}
	return nil
}

// CreateTable makes the table, billed per request, and waits until it can be
// used. If the table is there already, it is checked.
func (d *DynamoDB) CreateTable(ctx context.Context) error {
	callCtx, cancel := d.call(ctx, opCreateTable)
	defer cancel()
	_, err := d.client.CreateTable(callCtx, &dynamodb.CreateTableInput{
		TableName:   &d.o.Table,
		BillingMode: types.BillingModePayPerRequest,
		AttributeDefinitions: []types.AttributeDefinition{
			{AttributeName: aws.String(attrHash), AttributeType: types.ScalarAttributeTypeS},
			{AttributeName: aws.String(attrRange), AttributeType: types.ScalarAttributeTypeB},
		},
		KeySchema: []types.KeySchemaElement{
			{AttributeName: aws.String(attrHash), KeyType: types.KeyTypeHash},
			{AttributeName: aws.String(attrRange), KeyType: types.KeyTypeRange},
		},
	})
	var there *types.ResourceInUseException
	if err != nil && !errors.As(err, &there) {
		return d.error(opCreateTable, err)
	}
	wait := dynamodb.NewTableExistsWaiter(d.client, func(o *dynamodb.TableExistsWaiterOptions) {
		o.MinDelay, o.MaxDelay = 200*time.Millisecond, 5*time.Second
	})
	const creation = 5 * time.Minute
	if err := wait.Wait(context.WithValue(ctx, opKey{}, opDescribe), &dynamodb.DescribeTableInput{TableName: &d.o.Table}, creation); err != nil {
		return d.error(opCreateTable, err)
	}
	return d.Check(ctx)
}

func attributes(k Key) map[string]types.AttributeValue {
	return map[string]types.AttributeValue{
		attrHash:  &types.AttributeValueMemberS{Value: k.Hash},
		attrRange: &types.AttributeValueMemberB{Value: k.Range},
	}
}

// Put implements Store.
func (d *DynamoDB) Put(ctx context.Context, items []Item) error {
	// DynamoDB refuses a batch that names a row twice; the last one counts.
	writes, sizes := make([]types.WriteRequest, 0, len(items)), make([]int, 0, len(items))
	seen := make(map[string]int, len(items))
	for _, it := range items {
		if err := it.validate(); err != nil {
			return err
		}
		attrs := attributes(it.Key)
		attrs[attrValue] = &types.AttributeValueMemberB{Value: it.Value}
		w := types.WriteRequest{PutRequest: &types.PutRequest{Item: attrs}}
		id := string(boltKey(it.Hash, it.Range))
		if at, ok := seen[id]; ok {
			writes[at], sizes[at] = w, len(it.Value)
			continue
		}
		seen[id] = len(writes)
		writes, sizes = append(writes, w), append(sizes, len(it.Value))
	}
	return d.write(ctx, opPut, writes, sizes)
}

// Delete implements Store.
func (d *DynamoDB) Delete(ctx context.Context, keys []Key) error {
	writes := make([]types.WriteRequest, 0, len(keys))
	seen := make(map[string]bool, len(keys))
	for _, k := range keys {
		if err := k.validate(); err != nil {
			return err
		}
		id := string(boltKey(k.Hash, k.Range))
		if !seen[id] {
			writes = append(writes, types.WriteRequest{DeleteRequest: &types.DeleteRequest{Key: attributes(k)}})
		}
		seen[id] = true
	}
	return d.write(ctx, opDelete, writes, make([]int, len(writes)))
}

// write sends writes in batches, several at a time. One that fails doesn't keep the
// others from being written, but from then on they have only as long as a request
// may take: when all fail, the caller is to hear of it soon.
func (d *DynamoDB) write(ctx context.Context, op string, writes []types.WriteRequest, sizes []int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	var left []Key
	var first error
	failed := func(batch []types.WriteRequest, err error) {
		mu.Lock()
		defer mu.Unlock()
		if first == nil {
			first = err
			time.AfterFunc(d.o.Timeout, func() { cancel(err) })
		}
		for _, w := range batch {
			left = append(left, keyOf(w))
		}
	}
	var g errgroup.Group
	g.SetLimit(batchesInFlight)
	for len(writes) > 0 {
		n, size := 0, 0
		for n < len(writes) && n < batchRows && (n == 0 || size+sizes[n] <= maxBatchBytes) {
			size += sizes[n]
			n++
		}
		batch := writes[:n:n]
		writes, sizes = writes[n:], sizes[n:]
		g.Go(func() error {
			if rest, err := d.writeBatch(ctx, op, batch); err != nil {
				failed(rest, err)
			}
			return nil
		})
	}
	_ = g.Wait() // it has none
	if first != nil {
		return &PartialError{Left: left, Err: first}
	}
	return nil
}

func keyOf(w types.WriteRequest) Key {
	attrs := map[string]types.AttributeValue{}
	if w.PutRequest != nil {
		attrs = w.PutRequest.Item
	} else if w.DeleteRequest != nil {
		attrs = w.DeleteRequest.Key
	}
	var k Key
	if h, ok := attrs[attrHash].(*types.AttributeValueMemberS); ok {
		k.Hash = h.Value
	}
	if r, ok := attrs[attrRange].(*types.AttributeValueMemberB); ok {
		k.Range = r.Value
	}
	return k
}

// writeBatch gives, with an error, what may not be written.
func (d *DynamoDB) writeBatch(ctx context.Context, op string, batch []types.WriteRequest) ([]types.WriteRequest, error) {
	ctx, cancel := d.call(ctx, op)
	defer cancel()
	total, putBack := len(batch), false
	failed := func(err error) error {
		if putBack && ctx.Err() != nil {
			err = fmt.Errorf("%d of %d rows still put back for lack of capacity: %w", len(batch), total, err)
		}
		return d.error(op, err)
	}
	for attempt := 0; ; attempt++ {
		out, err := d.client.BatchWriteItem(ctx, &dynamodb.BatchWriteItemInput{
			RequestItems:           map[string][]types.WriteRequest{d.o.Table: batch},
			ReturnConsumedCapacity: types.ReturnConsumedCapacityTotal,
		})
		if err != nil {
			return batch, failed(err)
		}
		for i := range out.ConsumedCapacity {
			d.charge("write", &out.ConsumedCapacity[i])
		}
		left := out.UnprocessedItems[d.o.Table]
		if len(left) < len(batch) {
			attempt = 0 // it goes on
		}
		batch = left
		if len(batch) == 0 {
			d.metrics.rows.WithLabelValues(op).Add(float64(total))
			return nil, nil
		}
		putBack = true
		d.metrics.unprocessed.Add(float64(len(batch)))
		if err := sleep(ctx, backoff(attempt)); err != nil {
			return batch, failed(err)
		}
	}
}

// PutIf implements Store.
func (d *DynamoDB) PutIf(ctx context.Context, item Item, old []byte) ([]byte, error) {
	if err := item.validate(); err != nil {
		return nil, err
	}
	callCtx, cancel := d.call(ctx, opPutIf)
	defer cancel()
	in := &dynamodb.PutItemInput{
		TableName: &d.o.Table, Item: attributes(item.Key), ReturnConsumedCapacity: types.ReturnConsumedCapacityTotal,
	}
	in.Item[attrValue] = &types.AttributeValueMemberB{Value: item.Value}
	if old == nil {
		in.ConditionExpression = aws.String("attribute_not_exists(" + attrHash + ")")
	} else {
		in.ConditionExpression = aws.String(attrValue + " = :old")
		in.ExpressionAttributeValues = map[string]types.AttributeValue{":old": &types.AttributeValueMemberB{Value: old}}
	}
	out, err := d.client.PutItem(callCtx, in)
	if err == nil {
		d.charge("write", out.ConsumedCapacity)
		d.metrics.rows.WithLabelValues(opPutIf).Inc()
		return item.Value, nil
	}
	if !isConditionFailed(err) {
		return nil, d.error(opPutIf, err)
	}
	// Perhaps it was our own write that an earlier attempt made before its
	// answer was lost: what the row holds decides.
	rows, err := d.Query(ctx, Query{Hash: item.Hash, From: item.Range, To: item.Range, Consistent: true})
	if err != nil {
		return nil, err
	}
	var current []byte
	if len(rows) > 0 {
		current = rows[0].Value
	}
	if current != nil && bytes.Equal(current, item.Value) {
		return current, nil
	}
	return current, fmt.Errorf("row %x of %s: %w", item.Range, item.Hash, ErrConflict)
}

// Query implements Store.
func (d *DynamoDB) Query(ctx context.Context, q Query) ([]Item, error) {
	if err := q.validate(); err != nil {
		return nil, err
	}
	if q.From != nil && q.To != nil && bytes.Compare(q.From, q.To) > 0 {
		return nil, nil // DynamoDB takes it for an error
	}
	in := &dynamodb.QueryInput{
		TableName: &d.o.Table, ConsistentRead: &q.Consistent, ReturnConsumedCapacity: types.ReturnConsumedCapacityTotal,
		ExpressionAttributeNames:  map[string]string{"#h": attrHash},
		ExpressionAttributeValues: map[string]types.AttributeValue{":h": &types.AttributeValueMemberS{Value: q.Hash}},
	}
	cond := "#h = :h"
	bound := func(name string, b []byte) {
		in.ExpressionAttributeNames["#r"] = attrRange
		in.ExpressionAttributeValues[name] = &types.AttributeValueMemberB{Value: b}
	}
	// An empty bound is none: DynamoDB knows no empty key.
	switch from, to := len(q.From) > 0, q.To != nil; {
	case from && to:
		cond += " AND #r BETWEEN :from AND :to"
		bound(":from", q.From)
		bound(":to", q.To)
	case from:
		cond += " AND #r >= :from"
		bound(":from", q.From)
	case to && len(q.To) == 0:
		return nil, nil
	case to:
		cond += " AND #r <= :to"
		bound(":to", q.To)
	}
	in.KeyConditionExpression = &cond

	var items []Item
	for {
		if q.Limit > 0 {
			in.Limit = aws.Int32(int32(min(q.Limit-len(items), 1<<20))) //nolint:gosec // bounded
		}
		out, err := d.queryPage(ctx, in)
		if err != nil {
			return nil, d.error(opQuery, err)
		}
		d.charge("read", out.ConsumedCapacity)
		items = slices.Grow(items, len(out.Items))
		for _, attrs := range out.Items {
			it, err := item(attrs)
			if err != nil {
				return nil, d.error(opQuery, err)
			}
			items = append(items, it)
		}
		if len(out.LastEvaluatedKey) == 0 || (q.Limit > 0 && len(items) >= q.Limit) {
			d.metrics.rows.WithLabelValues(opQuery).Add(float64(len(items)))
			return items, nil
		}
		in.ExclusiveStartKey = out.LastEvaluatedKey
	}
}

func (d *DynamoDB) queryPage(ctx context.Context, in *dynamodb.QueryInput) (*dynamodb.QueryOutput, error) {
	ctx, cancel := d.call(ctx, opQuery)
	defer cancel()
	return d.client.Query(ctx, in)
}

func item(attrs map[string]types.AttributeValue) (Item, error) {
	h, ok1 := attrs[attrHash].(*types.AttributeValueMemberS)
	r, ok2 := attrs[attrRange].(*types.AttributeValueMemberB)
	v, ok3 := attrs[attrValue].(*types.AttributeValueMemberB)
	if !ok1 || !ok2 || !ok3 {
		return Item{}, errors.New("a row has not the attributes that ours have")
	}
	return Item{Key: Key{Hash: h.Value, Range: r.Value}, Value: v.Value}, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
