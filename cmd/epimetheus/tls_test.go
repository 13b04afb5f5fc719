package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker/workpb"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// With grpc_tls a server takes calls from those with a certificate of its CA alone, and
// clients call no other servers; a certificate that is renewed is shown from then on.
func TestTLS(t *testing.T) {
	cert, key := testenv.SelfSigned(t, t.TempDir())
	otherCert, otherKey := testenv.SelfSigned(t, t.TempDir())
	ours := TLSConfig{CertFile: cert, KeyFile: key, CAFile: cert}
	role := func(c TLSConfig) *process {
		p := &process{config: Config{GRPCTLS: c}}
		var err error
		if p.asServer, p.asClient, err = c.credentials(); err != nil {
			t.Fatal(err)
		}
		return p
	}
	serve := func(c TLSConfig) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := role(c).newGRPCServer()
		worker.NewServer(func(context.Context, *plan.Task) ([]byte, error) { return []byte("x"), nil },
			slog.New(slog.DiscardHandler), prometheus.NewRegistry()).Register(s)
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = s.Serve(l) // ends with Stop
		}()
		t.Cleanup(func() {
			s.Stop()
			<-done
		})
		return l.Addr().String()
	}
	call := func(address string, o ...grpc.DialOption) error {
		c, err := grpc.NewClient(address, o...)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err = workpb.NewWorkClient(c).Run(ctx, &workpb.RunRequest{Version: plan.Version, Span: 1})
		return err
	}
	with := grpc.WithTransportCredentials
	address := serve(ours)
	if err := call(address, role(ours).dialOptions()...); err != nil {
		t.Fatal(err)
	}
	named := ours
	named.ServerName = "another"
	pool := x509.NewCertPool()
	text, err := os.ReadFile(cert)
	if err != nil || !pool.AppendCertsFromPEM(text) {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what    string
		address string
		dial    []grpc.DialOption
	}{
		{"no TLS", address, []grpc.DialOption{with(insecure.NewCredentials())}},
		{"no certificate", address, []grpc.DialOption{with(credentials.NewTLS(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}))}},
		{"a certificate of nobody we know", address, role(TLSConfig{CertFile: otherCert, KeyFile: otherKey, CAFile: cert}).dialOptions()},
		{"a server of nobody we know", serve(TLSConfig{CertFile: otherCert, KeyFile: otherKey, CAFile: cert}), role(ours).dialOptions()},
		{"a server without TLS", serve(TLSConfig{}), role(ours).dialOptions()},
		{"a server with another name", address, role(named).dialOptions()},
	} {
		if err := call(c.address, c.dial...); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v, want unavailable", c.what, err)
		}
	}
	// What signs certificates stays, the certificate changes.
	ca := t.TempDir() + "/ca.pem"
	if err := os.WriteFile(ca, text, 0o600); err != nil {
		t.Fatal(err)
	}
	keeps := TLSConfig{CertFile: cert, KeyFile: key, CAFile: ca}
	client := role(keeps)
	for from, to := range map[string]string{otherCert: cert, otherKey: key} {
		text, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := call(address, client.dialOptions()...); status.Code(err) != codes.Unavailable {
		t.Errorf("a certificate that was replaced: %v, want unavailable", err)
	}
}

func TestTLSFiles(t *testing.T) {
	cert, key := testenv.SelfSigned(t, t.TempDir())
	for _, c := range []TLSConfig{
		{CertFile: "absent", KeyFile: key, CAFile: cert},
		{CertFile: cert, KeyFile: key, CAFile: "absent"},
		{CertFile: cert, KeyFile: key, CAFile: key},
		{CertFile: cert, KeyFile: cert, CAFile: cert},
	} {
		if _, _, err := c.credentials(); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}
