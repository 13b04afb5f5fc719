package historytest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
)

// ProxyFault is what a proxy in front of a store does to one request.
type ProxyFault int

// Faults of DynamoDBProxy and S3Proxy.
const (
	ProxyPass        ProxyFault = iota
	ProxyThrottle               // DynamoDB: ProvisionedThroughputExceededException; S3: 503 SlowDown
	ProxyUnprocessed            // forwards half of a BatchWriteItem and puts the rest back; S3: as ProxyPass
	ProxyErrorBefore            // answers 500 and forwards nothing
	ProxyUnavailable            // answers 503 and forwards nothing
	ProxyErrorAfter             // forwards, then answers 500
	ProxyCutBefore              // cuts the connection and forwards nothing
	ProxyCutAfter               // forwards, then cuts the connection
	ProxyHangAfter              // forwards, then is silent until the client gives up
)

// DynamoDBProxy is a server in front of a DynamoDB server that throttles, puts
// items back and fails as decide says, as DynamoDB does and its stand-ins don't.
// decide gets the operation's name, such as "PutItem", and may block. The
// result is the proxy's URL.
func DynamoDBProxy(t testing.TB, target string, decide func(op string) ProxyFault) string {
	t.Helper()
	return startProxy(t, dynamoDBProxy(target, decide))
}

func dynamoDBProxy(target string, decide func(op string) ProxyFault) *storeProxy {
	fail := func(kind, message string) []byte {
		return fmt.Appendf(nil, `{"__type":"com.amazonaws.dynamodb.v20120810#%s","message":%q}`, kind, message)
	}
	return &storeProxy{
		target: target, decide: decide, answer: answerDynamoDB,
		op: func(r *http.Request) string {
			_, op, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
			return op
		},
		throttled:      http.StatusBadRequest,
		throttledBody:  fail("ProvisionedThroughputExceededException", "The level of configured provisioned throughput for the table was exceeded"),
		internalBody:   fail("InternalServerError", "internal error"),
		unavailability: fail("ServiceUnavailable", "service unavailable"),
	}
}

// DynamoDBHolding is a proxy like DynamoDBProxy that throttles writes of rows with
// the hash keys for which held is true, as DynamoDB does where one key gets too many:
// in a batch these are put back, and the others written.
func DynamoDBHolding(t testing.TB, target string, held func(hash string) bool) string {
	t.Helper()
	p := dynamoDBProxy(target, func(string) ProxyFault { return ProxyPass })
	p.held = held
	return startProxy(t, p)
}

// S3Proxy is DynamoDBProxy for an S3 server that speaks http. The operations are
// named as in S3's API: "PutObject", "UploadPart", "GetObject", ….
func S3Proxy(t testing.TB, target string, decide func(op string) ProxyFault) string {
	t.Helper()
	fail := func(kind, message string) []byte {
		return fmt.Appendf(nil, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>%s</Message></Error>`, kind, message)
	}
	return startProxy(t, &storeProxy{
		target: target, decide: decide, answer: answerS3, op: s3Operation,
		throttled:      http.StatusServiceUnavailable,
		throttledBody:  fail("SlowDown", "Reduce your request rate."),
		internalBody:   fail("InternalError", "We encountered an internal error. Please try again."),
		unavailability: fail("ServiceUnavailable", "Service is unable to handle request."),
	})
}

func s3Operation(r *http.Request) string {
	q := r.URL.Query()
	object := strings.Contains(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case r.Method == http.MethodPut && q.Has("uploadId"):
		return "UploadPart"
	case r.Method == http.MethodPost && q.Has("uploads"):
		return "CreateMultipartUpload"
	case r.Method == http.MethodPost && q.Has("uploadId"):
		return "CompleteMultipartUpload"
	case r.Method == http.MethodDelete && q.Has("uploadId"):
		return "AbortMultipartUpload"
	case r.Method == http.MethodPost && q.Has("delete"):
		return "DeleteObjects"
	case r.Method == http.MethodGet && q.Has("list-type"):
		return "ListObjectsV2"
	case !object:
		return r.Method + "Bucket"
	}
	return map[string]string{
		http.MethodPut: "PutObject", http.MethodGet: "GetObject", http.MethodHead: "HeadObject", http.MethodDelete: "DeleteObject",
	}[r.Method]
}

// storeProxy forwards requests to a store, or does worse.
type storeProxy struct {
	t         testing.TB
	target    string
	decide    func(op string) ProxyFault
	op        func(*http.Request) string
	held      func(hash string) bool // nil: none
	answer    func(w http.ResponseWriter, status int, body []byte)
	transport http.Transport
	ended     chan struct{} // closed when the test ends

	throttled                                   int // status
	throttledBody, internalBody, unavailability []byte
}

func startProxy(t testing.TB, p *storeProxy) string {
	t.Helper()
	p.t, p.ended = t, make(chan struct{})
	s := httptest.NewServer(p)
	t.Cleanup(func() {
		close(p.ended)
		s.Close()
		p.transport.CloseIdleConnections()
	})
	return s.URL
}

// ServeHTTP implements http.Handler.
func (p *storeProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client has gone
	}
	op := p.op(r)
	fault := p.decide(op)
	switch fault {
	case ProxyThrottle:
		p.answer(w, p.throttled, p.throttledBody)
		return
	case ProxyErrorBefore:
		p.answer(w, http.StatusInternalServerError, p.internalBody)
		return
	case ProxyUnavailable:
		p.answer(w, http.StatusServiceUnavailable, p.unavailability)
		return
	case ProxyCutBefore:
		p.cut(w)
		return
	}
	var putBack map[string][]json.RawMessage
	if fault == ProxyUnprocessed && op == "BatchWriteItem" {
		if body, putBack, err = splitBatch(body, func(i, n int, _ json.RawMessage) bool { return i >= (n+1)/2 }); err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
	}
	if p.held != nil {
		if body, putBack, err = p.hold(op, body); err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		if body == nil {
			p.answer(w, p.throttled, p.throttledBody)
			return
		}
	}
	status, header, b, err := p.forward(r, body)
	if err != nil { // as from a store that dies: no answer
		p.cut(w)
		return
	}
	switch {
	case fault == ProxyErrorAfter:
		p.answer(w, http.StatusInternalServerError, p.internalBody)
		return
	case fault == ProxyCutAfter:
		p.cut(w)
		return
	case fault == ProxyHangAfter:
		select {
		case <-r.Context().Done():
		case <-p.ended:
		}
		return
	case putBack != nil && status == http.StatusOK:
		var out map[string]json.RawMessage
		if err := json.Unmarshal(b, &out); err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		out["UnprocessedItems"], _ = json.Marshal(putBack) // of RawMessages: can't fail
		b, _ = json.Marshal(out)
	}
	for k, v := range header {
		if k != "X-Amz-Crc32" {
			w.Header()[k] = v
		}
	}
	if r.Method == http.MethodHead {
		w.WriteHeader(status)
		return
	}
	p.answer(w, status, b)
}

func (p *storeProxy) forward(r *http.Request, body []byte) (int, http.Header, []byte, error) {
	req, err := http.NewRequestWithContext(r.Context(), r.Method, p.target+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return 0, nil, nil, err
	}
	req.Header = r.Header.Clone()
	req.Host = r.Host                                    // it is signed
	if req.Header.Get("Accept-Encoding") != "identity" { // S3's clients sign that
		req.Header.Del("Accept-Encoding") // the checksum is over what we see
	}
	resp, err := p.transport.RoundTrip(req)
	if err != nil {
		return 0, nil, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header, answer, err
}

func (p *storeProxy) cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err == nil {
		err = conn.Close()
	}
	if err != nil {
		p.t.Logf("proxy: cut: %v", err)
	}
}

// answerS3 writes an answer of S3.
func answerS3(w http.ResponseWriter, status int, b []byte) {
	if w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "application/xml")
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	_, _ = w.Write(b) // an error is the client's
}

// answerDynamoDB writes an answer with the checksum that the AWS SDK verifies.
func answerDynamoDB(w http.ResponseWriter, status int, b []byte) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.0")
	w.Header().Set("X-Amz-Crc32", strconv.FormatUint(uint64(crc32.ChecksumIEEE(b)), 10))
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	_, _ = w.Write(b) // an error is the client's
}

// hold takes out of a write what is held. There is no body left if that is all.
func (p *storeProxy) hold(op string, body []byte) (rest []byte, back map[string][]json.RawMessage, err error) {
	type item struct{ H struct{ S string } }
	switch op {
	case "PutItem":
		var in struct{ Item item }
		if err := json.Unmarshal(body, &in); err != nil || p.held(in.Item.H.S) {
			return nil, nil, err
		}
	case "BatchWriteItem":
		kept := 0
		body, back, err = splitBatch(body, func(_, _ int, write json.RawMessage) bool {
			var in struct{ PutRequest struct{ Item item } }
			if json.Unmarshal(write, &in) == nil && p.held(in.PutRequest.Item.H.S) {
				return true
			}
			kept++
			return false
		})
		if kept == 0 {
			return nil, nil, err
		}
	}
	return body, back, err
}

// splitBatch takes writes out of the body of a BatchWriteItem. out is asked for each
// of a table's writes: the i-th of n.
func splitBatch(body []byte, out func(i, n int, write json.RawMessage) bool) ([]byte, map[string][]json.RawMessage, error) {
	var in map[string]json.RawMessage
	var items map[string][]json.RawMessage
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, nil, err
	}
	if err := json.Unmarshal(in["RequestItems"], &items); err != nil {
		return nil, nil, fmt.Errorf("RequestItems: %w", err)
	}
	back := map[string][]json.RawMessage{}
	for table, writes := range items {
		var keep []json.RawMessage
		for i, w := range writes {
			if out(i, len(writes), w) {
				back[table] = append(back[table], w)
			} else {
				keep = append(keep, w)
			}
		}
		items[table] = keep
	}
	var err error
	if in["RequestItems"], err = json.Marshal(items); err != nil {
		return nil, nil, err
	}
	body, err = json.Marshal(in)
	return body, back, err
}
