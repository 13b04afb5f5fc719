package historytest

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// S3Options are those with which a server that testenv started is reached.
func S3Options(t testing.TB, s *testenv.S3Server) object.S3Options {
	t.Helper()
	o := object.S3Options{
		Bucket: s.Bucket, Endpoint: s.Endpoint, Region: s.Region, PathStyle: true,
		AccessKey: s.AccessKey, SecretKey: s.SecretKey,
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	if s.CAFile != "" {
		pem, err := os.ReadFile(s.CAFile)
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(pem)
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	o.HTTPClient = &http.Client{Transport: transport}
	t.Cleanup(transport.CloseIdleConnections)
	return o
}

// S3 opens a store in a bucket of a server that is started for the test.
func S3(t testing.TB, reg prometheus.Registerer) *object.S3 {
	t.Helper()
	s, err := object.NewS3(t.Context(), S3Options(t, testenv.S3(t)), reg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Files opens a store in a temporary folder.
func Files(t testing.TB, reg prometheus.Registerer) *object.Files {
	t.Helper()
	s, err := object.NewFiles(filepath.Join(t.TempDir(), "objects"), reg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// DynamoDBOptions are those with which a server at endpoint is reached.
func DynamoDBOptions(t testing.TB, endpoint string) index.DynamoDBOptions {
	t.Helper()
	transport := &http.Transport{MaxIdleConnsPerHost: 32}
	t.Cleanup(transport.CloseIdleConnections)
	return index.DynamoDBOptions{
		Table: "epimetheus", Endpoint: endpoint, Region: "us-east-1", AccessKey: "testkey", SecretKey: "testsecret",
		HTTPClient: &http.Client{Transport: transport},
	}
}

// DynamoDB opens a store in a new table of a server that is started for the test.
func DynamoDB(t testing.TB, reg prometheus.Registerer) *index.DynamoDB {
	t.Helper()
	s, err := index.NewDynamoDB(t.Context(), DynamoDBOptions(t, testenv.DynamoDB(t).Endpoint), reg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.CreateTable(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// Bolt opens a store in a temporary file.
func Bolt(t testing.TB, reg prometheus.Registerer) *index.Bolt {
	t.Helper()
	s, err := index.NewBolt(filepath.Join(t.TempDir(), "index.db"), reg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}
