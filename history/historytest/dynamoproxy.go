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

// ProxyFault is what DynamoDBProxy does to one request.
type ProxyFault int

// Faults of DynamoDBProxy.
const (
	ProxyPass        ProxyFault = iota
	ProxyThrottle               // answers ProvisionedThroughputExceededException
	ProxyUnprocessed            // forwards half of a BatchWriteItem and puts the rest back
	ProxyErrorBefore            // answers 500 and forwards nothing
	ProxyErrorAfter             // forwards, then answers 500
	ProxyCutAfter               // forwards, then cuts the connection
)

// DynamoDBProxy is a server in front of a DynamoDB server that throttles, puts
// items back and fails as decide says, as DynamoDB does and its stand-ins don't.
// decide gets the operation's name, such as "PutItem", and may block. The
// result is the proxy's URL.
func DynamoDBProxy(t testing.TB, target string, decide func(op string) ProxyFault) string {
	t.Helper()
	transport := &http.Transport{}
	forward := func(r *http.Request, body []byte) (int, http.Header, []byte, error) {
		req, err := http.NewRequestWithContext(r.Context(), r.Method, target+r.URL.Path, bytes.NewReader(body))
		if err != nil {
			return 0, nil, nil, err
		}
		req.Header = r.Header.Clone()
		req.Header.Del("Accept-Encoding") // the checksum is over what we see
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return 0, nil, nil, err
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		return resp.StatusCode, resp.Header, answer, err
	}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // the client has gone
		}
		_, op, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
		fault := decide(op)
		switch fault {
		case ProxyThrottle:
			answer(w, http.StatusBadRequest, []byte(`{"__type":"com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException","message":"The level of configured provisioned throughput for the table was exceeded"}`))
			return
		case ProxyErrorBefore:
			answer(w, http.StatusInternalServerError, []byte(`{"__type":"com.amazonaws.dynamodb.v20120810#InternalServerError","message":"internal error"}`))
			return
		}
		var putBack map[string][]json.RawMessage
		if fault == ProxyUnprocessed && op == "BatchWriteItem" {
			if body, putBack, err = splitBatch(body); err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
		}
		status, header, b, err := forward(r, body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		switch {
		case fault == ProxyErrorAfter:
			answer(w, http.StatusInternalServerError, []byte(`{"__type":"com.amazonaws.dynamodb.v20120810#InternalServerError","message":"internal error"}`))
			return
		case fault == ProxyCutAfter:
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				err = conn.Close()
			}
			if err != nil {
				t.Errorf("proxy: cut: %v", err)
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
			if k != "Content-Length" && k != "X-Amz-Crc32" {
				w.Header()[k] = v
			}
		}
		answer(w, status, b)
	}))
	t.Cleanup(func() {
		s.Close()
		transport.CloseIdleConnections()
	})
	return s.URL
}

// answer writes an answer with the checksum that the AWS SDK verifies.
func answer(w http.ResponseWriter, status int, b []byte) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.0")
	w.Header().Set("X-Amz-Crc32", strconv.FormatUint(uint64(crc32.ChecksumIEEE(b)), 10))
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	_, _ = w.Write(b) // an error is the client's
}

// splitBatch takes half of the writes out of the body of a BatchWriteItem; one
// write at least is forwarded.
func splitBatch(body []byte) ([]byte, map[string][]json.RawMessage, error) {
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
		keep := (len(writes) + 1) / 2
		if keep < len(writes) {
			back[table] = writes[keep:]
		}
		items[table] = writes[:keep]
	}
	var err error
	if in["RequestItems"], err = json.Marshal(items); err != nil {
		return nil, nil, err
	}
	body, err = json.Marshal(in)
	return body, back, err
}
