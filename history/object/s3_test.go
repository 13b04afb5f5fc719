package object_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// TestBrokenAnswer: a connection that breaks says nothing about the object. Compaction
// leaves blocks alone for good that end before they should.
func TestBrokenAnswer(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		if _, err := fmt.Fprint(conn, "HTTP/1.1 206 Partial Content\r\nContent-Length: 100\r\n\r\nhalf of it"); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	s, err := object.NewS3(t.Context(), object.S3Options{
		Bucket: "b", Endpoint: server.URL, Region: "us-east-1", PathStyle: true, AccessKey: "a", SecretKey: "b",
	}, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetRange(t.Context(), "k", 0, 100); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("the error speaks of the object: %v", err)
	}
}
