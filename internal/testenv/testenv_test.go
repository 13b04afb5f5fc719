package testenv

import (
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestServersStartAndStop(t *testing.T) {
	for _, s := range []struct {
		name  string
		start func(testing.TB) *Process
	}{
		{"s3", func(t testing.TB) *Process { return S3(t).Process }},
		{"s3 with tls", func(t testing.TB) *Process { return S3TLS(t).Process }},
		{"dynamodb", func(t testing.TB) *Process { return DynamoDB(t).Process }},
		{"prometheus", func(t testing.TB) *Process { return Prometheus(t, "", "").Process }},
	} {
		t.Run(s.name, func(t *testing.T) {
			p := s.start(t)
			select {
			case <-p.Done():
				t.Fatalf("ended by itself:\n%s", p.Output())
			default:
			}
			p.Kill()
			p = p.Restart(t)
			if _, err := p.Stop(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestRoot(t *testing.T) {
	if _, err := os.Stat(filepath.Join(Root(t), "LICENSE")); err != nil {
		t.Fatal(err)
	}
}
