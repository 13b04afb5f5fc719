package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awsmiddleware "github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/epimetheus-tsdb/epimetheus/history/awsclient"
)

// S3Options say where a bucket is. Credentials come from the AWS SDK's own chain.
type S3Options struct {
	Bucket    string
	Prefix    string // before every key, with its slash if it is to be a folder; may be empty
	Endpoint  string // URL; empty for AWS itself
	Region    string // empty: from the AWS configuration; with an endpoint, us-east-1 if that has none either
	PathStyle bool   // the bucket in the path instead of the host name

	// AccessKey and SecretKey, when set, go before the credentials chain.
	AccessKey, SecretKey string

	// HTTPClient replaces the SDK's client where a test needs its own
	// certificates or faults.
	HTTPClient *http.Client

	// PartBytes is the size of the parts that a larger object is uploaded in
	// (default 64 MiB, at least 5 MiB for AWS).
	PartBytes int64

	// Timeout is how long a request may take before its bytes are counted
	// (default 30 s). A transfer has one more second for each MiB.
	Timeout time.Duration
}

const (
	defaultPartBytes = 64 << 20
	defaultTimeout   = 30 * time.Second

	// slowestBytesPerSecond is below any transfer that is worth waiting for.
	slowestBytesPerSecond = 1 << 20
	maxTransferSeconds    = 3600

	partsInFlight = 2 // of one upload
	maxAttempts   = 5
	// readAttempts are those of a GET whose body broke off, which the SDK does not repeat.
	readAttempts = 3
	maxBackoff   = 3 * time.Second
	maxParts     = 10000 // S3's own limit
)

// Validate reports the first option that can't be.
func (o S3Options) Validate() error {
	switch {
	case o.Bucket == "":
		return errors.New("s3: a bucket is needed")
	case strings.HasPrefix(o.Prefix, "/"):
		return fmt.Errorf("s3: prefix %q starts with a slash", o.Prefix)
	case (o.AccessKey == "") != (o.SecretKey == ""):
		return errors.New("s3: access key and secret key are given together or not at all")
	case o.PartBytes < 0 || o.Timeout < 0:
		return errors.New("s3: part size and time-out can't be negative")
	}
	return nil
}

// S3 is a Store in a bucket of S3 or of a server that speaks its protocol.
// Uploads carry checksums that the server verifies.
type S3 struct {
	client  *s3.Client
	o       S3Options
	metrics *metrics
}

// NewS3 makes the client; it sends nothing to the bucket. See Check.
func NewS3(ctx context.Context, o S3Options, reg prometheus.Registerer) (*S3, error) {
	if err := o.Validate(); err != nil {
		return nil, err
	}
	if o.PartBytes == 0 {
		o.PartBytes = defaultPartBytes
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	cfg, err := awsclient.Load(ctx, awsclient.Options{
		Endpoint: o.Endpoint, Region: o.Region, AccessKey: o.AccessKey, SecretKey: o.SecretKey,
		HTTPClient: o.HTTPClient, HeaderTimeout: o.Timeout, MaxConnections: 64,
		Retry: func(r *retry.StandardOptions) { r.MaxAttempts, r.MaxBackoff = maxAttempts, maxBackoff },
	})
	if err != nil {
		return nil, fmt.Errorf("s3: %w", err)
	}
	m := newMetrics(reg)
	client := s3.NewFromConfig(cfg, func(c *s3.Options) {
		c.UsePathStyle = o.PathStyle
		// Ranged reads carry no checksum of the range; pages have their own.
		c.DisableLogOutputChecksumValidationSkipped = true
		c.APIOptions = append(c.APIOptions, m.countAttempts)
	})
	return &S3{client: client, o: o, metrics: m}, nil
}

// countAttempts puts a counter below the SDK's retries.
func (m *metrics) countAttempts(stack *middleware.Stack) error {
	ops := map[string]string{
		"GetObject": opGet, "HeadObject": opHead, "HeadBucket": opHead, "PutObject": opPut, "DeleteObject": opDelete,
		"ListObjectsV2": opList, "CreateMultipartUpload": opMultipartCreate, "UploadPart": opMultipartPart,
		"CompleteMultipartUpload": opMultipartFinish, "AbortMultipartUpload": opMultipartAbort,
	}
	return stack.Finalize.Insert(middleware.FinalizeMiddlewareFunc("epimetheusCount",
		func(ctx context.Context, in middleware.FinalizeInput, next middleware.FinalizeHandler) (middleware.FinalizeOutput, middleware.Metadata, error) {
			start := time.Now()
			out, meta, err := next.HandleFinalize(ctx, in)
			m.observe(ops[awsmiddleware.GetOperationName(ctx)], start, s3Error(err))
			return out, meta, err
		}), "Retry", middleware.After)
}

// head sends a HEAD once more if it was forbidden. Its answer has no body, so that
// the SDK doesn't see whether the reason is that the clock of this machine is wrong;
// but it has taken the right time from the answer, and signs by that from then on.
func head[O any](send func() (*O, error)) (*O, error) {
	out, err := send()
	if resp, ok := errors.AsType[*awshttp.ResponseError](err); ok && resp.HTTPStatusCode() == http.StatusForbidden {
		return send()
	}
	return out, err
}

// Check reports whether the bucket can be reached with these credentials.
func (s *S3) Check(ctx context.Context) error {
	ctx, cancel := s.deadline(ctx, 0)
	defer cancel()
	_, err := head(func() (*s3.HeadBucketOutput, error) {
		return s.client.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &s.o.Bucket},
			func(o *s3.Options) { o.RetryMaxAttempts = 2 }) // who starts a process wants to know
	})
	if err = s3Error(err); err == nil {
		return nil
	}
	at := "AWS"
	if s.o.Endpoint != "" {
		at = s.o.Endpoint
	}
	if errors.Is(err, ErrNotExist) {
		return fmt.Errorf("bucket %q does not exist at %s: create it, or name another", s.o.Bucket, at)
	}
	return fmt.Errorf("bucket %q at %s can't be reached: check endpoint, region and credentials: %w", s.o.Bucket, at, err)
}

func (s *S3) deadline(ctx context.Context, transfer int64) (context.Context, context.CancelFunc) {
	seconds := min(transfer/slowestBytesPerSecond, maxTransferSeconds)
	return context.WithTimeout(ctx, s.o.Timeout+time.Duration(seconds)*time.Second)
}

func (s *S3) key(key string) (*string, error) {
	if err := ValidKey(key); err != nil {
		return nil, err
	}
	return aws.String(s.o.Prefix + key), nil
}

// Put implements Store. An object above the part size goes up in parts.
func (s *S3) Put(ctx context.Context, key string, r io.ReaderAt, size int64) error {
	k, err := s.key(key)
	if err != nil {
		return err
	}
	if err := checkSource(r, size); err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	if size > s.o.PartBytes {
		err = s.putParts(ctx, k, r, size)
	} else {
		ctx, cancel := s.deadline(ctx, size)
		defer cancel()
		_, err = s.client.PutObject(ctx, &s3.PutObjectInput{
			Bucket: &s.o.Bucket, Key: k, Body: io.NewSectionReader(r, 0, size), ContentLength: &size,
			ChecksumAlgorithm: types.ChecksumAlgorithmCrc32c,
		})
	}
	if err != nil {
		return fmt.Errorf("put %s: %w", key, s3Error(err))
	}
	s.metrics.writtenBytes.Add(float64(size))
	return nil
}

// checkSource finds a source that ends early before the SDK does, which would
// take that for a broken connection and try again and again.
func checkSource(r io.ReaderAt, size int64) error {
	if size <= 0 {
		return nil
	}
	if n, err := r.ReadAt(make([]byte, 1), size-1); n != 1 {
		return fmt.Errorf("the source has less than %d bytes: %w", size, err)
	}
	return nil
}

func (s *S3) putParts(ctx context.Context, key *string, r io.ReaderAt, size int64) error {
	part := max(s.o.PartBytes, (size+maxParts-1)/maxParts)
	createCtx, cancel := s.deadline(ctx, 0)
	defer cancel()
	up, err := s.client.CreateMultipartUpload(createCtx, &s3.CreateMultipartUploadInput{
		Bucket: &s.o.Bucket, Key: key, ChecksumAlgorithm: types.ChecksumAlgorithmCrc32c,
	})
	if err != nil {
		return err
	}
	done := make([]types.CompletedPart, (size+part-1)/part)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(partsInFlight)
	for i := range done {
		g.Go(func() error {
			off := int64(i) * part
			n := min(part, size-off)
			ctx, cancel := s.deadline(gctx, n)
			defer cancel()
			number := int32(i + 1) //nolint:gosec // at most maxParts
			out, err := s.client.UploadPart(ctx, &s3.UploadPartInput{
				Bucket: &s.o.Bucket, Key: key, UploadId: up.UploadId, PartNumber: &number,
				Body: io.NewSectionReader(r, off, n), ContentLength: &n,
				ChecksumAlgorithm: types.ChecksumAlgorithmCrc32c,
			})
			if err != nil {
				return fmt.Errorf("part %d of %d: %w", number, len(done), err)
			}
			done[i] = types.CompletedPart{ETag: out.ETag, PartNumber: &number, ChecksumCRC32C: out.ChecksumCRC32C}
			return nil
		})
	}
	err = g.Wait()
	if err == nil {
		finishCtx, cancel := s.deadline(ctx, size) // the server may copy the parts together
		defer cancel()
		_, err = s.client.CompleteMultipartUpload(finishCtx, &s3.CompleteMultipartUploadInput{
			Bucket: &s.o.Bucket, Key: key, UploadId: up.UploadId,
			MultipartUpload: &types.CompletedMultipartUpload{Parts: done},
		})
	}
	if err == nil {
		return nil
	}
	// Parts of an upload that is not finished are paid for and not listed.
	abortCtx, cancel := s.deadline(context.WithoutCancel(ctx), 0)
	defer cancel()
	_, abortErr := s.client.AbortMultipartUpload(abortCtx, &s3.AbortMultipartUploadInput{
		Bucket: &s.o.Bucket, Key: key, UploadId: up.UploadId,
	})
	if abortErr != nil && !errors.Is(s3Error(abortErr), ErrNotExist) {
		return fmt.Errorf("%w (and abort of the upload: %w)", err, abortErr)
	}
	return err
}

// GetRange implements Store.
func (s *S3) GetRange(ctx context.Context, key string, off, n int64) ([]byte, error) {
	k, err := s.key(key)
	if err != nil {
		return nil, err
	}
	if err := checkRange(key, off, n); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, nil // HTTP has no empty range
	}
	for attempt := 1; ; attempt++ {
		b, again, err := s.getRange(ctx, k, off, n)
		if err == nil {
			s.metrics.readBytes.Add(float64(n))
			return b, nil
		}
		if !again || attempt == readAttempts || ctx.Err() != nil {
			return nil, fmt.Errorf("get %s, %d bytes at %d: %w", key, n, off, err)
		}
	}
}

var errBroken = errors.New("the connection broke off")

// getRange says also whether another attempt may succeed.
func (s *S3) getRange(ctx context.Context, key *string, off, n int64) (b []byte, again bool, err error) {
	ctx, cancel := s.deadline(ctx, n)
	defer cancel()
	out, err := s.client.GetObject(ctx, &s3.GetObjectInput{
		Bucket: &s.o.Bucket, Key: key, Range: aws.String(fmt.Sprintf("bytes=%d-%d", off, off+n-1)),
	})
	if err != nil {
		return nil, false, s3Error(err)
	}
	defer out.Body.Close()
	// The server's word on the length goes before ours: n may come from a
	// damaged row, and memory is taken for what is really there.
	if out.ContentLength == nil || *out.ContentLength < n {
		return nil, false, fmt.Errorf("the object ends before: %w", io.ErrUnexpectedEOF)
	}
	if *out.ContentLength > n {
		return nil, false, fmt.Errorf("the server ignores ranges: it sends %d bytes", *out.ContentLength)
	}
	b = make([]byte, n)
	if _, err := io.ReadFull(out.Body, b); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errBroken // the other error is about the object
		}
		return nil, true, fmt.Errorf("body: %w", err)
	}
	return b, false, nil
}

// Size implements Store.
func (s *S3) Size(ctx context.Context, key string) (int64, error) {
	k, err := s.key(key)
	if err != nil {
		return 0, err
	}
	ctx, cancel := s.deadline(ctx, 0)
	defer cancel()
	out, err := head(func() (*s3.HeadObjectOutput, error) {
		return s.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &s.o.Bucket, Key: k})
	})
	if err != nil {
		return 0, fmt.Errorf("size of %s: %w", key, s3Error(err))
	}
	return aws.ToInt64(out.ContentLength), nil
}

// Delete implements Store.
func (s *S3) Delete(ctx context.Context, key string) error {
	k, err := s.key(key)
	if err != nil {
		return err
	}
	ctx, cancel := s.deadline(ctx, 0)
	defer cancel()
	_, err = s.client.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: &s.o.Bucket, Key: k})
	if err := s3Error(err); err != nil && !errors.Is(err, ErrNotExist) {
		return fmt.Errorf("delete %s: %w", key, err)
	}
	return nil
}

// List implements Store.
func (s *S3) List(ctx context.Context, prefix string, fn func(Info) error) error {
	pages := s3.NewListObjectsV2Paginator(s.client, &s3.ListObjectsV2Input{Bucket: &s.o.Bucket, Prefix: aws.String(s.o.Prefix + prefix)})
	for pages.HasMorePages() {
		page, err := s.listPage(ctx, pages)
		if err != nil {
			return fmt.Errorf("list %s: %w", prefix, s3Error(err))
		}
		for _, o := range page.Contents {
			key := strings.TrimPrefix(aws.ToString(o.Key), s.o.Prefix)
			if ValidKey(key) != nil {
				continue // not ours
			}
			if err := fn(Info{Key: key, Size: aws.ToInt64(o.Size), Modified: aws.ToTime(o.LastModified)}); err != nil {
				return fmt.Errorf("list %s: %w", prefix, err)
			}
		}
	}
	return nil
}

func (s *S3) listPage(ctx context.Context, pages *s3.ListObjectsV2Paginator) (*s3.ListObjectsV2Output, error) {
	ctx, cancel := s.deadline(ctx, 0)
	defer cancel()
	return pages.NextPage(ctx)
}

// s3Error makes the SDK's errors ours where callers decide by them.
func s3Error(err error) error {
	if err == nil {
		return nil
	}
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		switch api.ErrorCode() {
		case "NoSuchKey", "NotFound", "NoSuchUpload":
			return fmt.Errorf("%w (%s)", ErrNotExist, api.ErrorCode())
		case "InvalidRange":
			return fmt.Errorf("the object ends before: %w", io.ErrUnexpectedEOF)
		}
	}
	var resp *awshttp.ResponseError
	if errors.As(err, &resp) && resp.HTTPStatusCode() == http.StatusRequestedRangeNotSatisfiable {
		return fmt.Errorf("the object ends before: %w", io.ErrUnexpectedEOF)
	}
	return err
}
