package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/gateway/plan"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker"
	"github.com/epimetheus-tsdb/epimetheus/gateway/worker/workpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
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
		worker.NewServer(func(context.Context, *plan.Task) ([]byte, account.Cost, error) {
			return []byte("x"), account.Cost{}, nil
		},
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

// dialed is a connection to a server with such TLS; stop ends both.
func dialed(t *testing.T, config TLSConfig, register func(s *grpc.Server)) (conn *grpc.ClientConn, stop func()) {
	t.Helper()
	p := &process{config: Config{GRPCTLS: config}}
	var err error
	if p.asServer, p.asClient, err = p.config.GRPCTLS.credentials(); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := p.newGRPCServer()
	register(s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l) // ends with Stop
	}()
	if conn, err = grpc.NewClient(l.Addr().String(), p.dialOptions()...); err != nil {
		t.Fatal(err)
	}
	return conn, func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		s.Stop()
		<-done
	}
}

// With grpc_tls.gateway_sans a certificate without such a name is good for sending alone.
func TestGatewaySANs(t *testing.T) {
	cert, key := testenv.SelfSigned(t, t.TempDir()) // for 127.0.0.1
	for _, c := range []struct {
		sans []string
		want codes.Code // of what reads; what is admitted is unimplemented here
	}{
		{nil, codes.Unimplemented},
		{[]string{"gateway", "127.0.0.1"}, codes.Unimplemented},
		{[]string{"gateway", "127.0.0.2", "spiffe://example.org/gateway"}, codes.PermissionDenied},
	} {
		conn, stop := dialed(t, TLSConfig{CertFile: cert, KeyFile: key, CAFile: cert, GatewaySANs: c.sans}, func(s *grpc.Server) {
			workpb.RegisterWorkServer(s, workpb.UnimplementedWorkServer{})
			fetchpb.RegisterFetchServer(s, fetchpb.UnimplementedFetchServer{})
			shippb.RegisterShipServer(s, shippb.UnimplementedShipServer{})
		})
		check := func(what string, want codes.Code, err error) {
			t.Helper()
			if status.Code(err) != want {
				t.Errorf("%v, %s: %v, want %s", c.sans, what, err, want)
			}
		}
		_, err := workpb.NewWorkClient(conn).Run(t.Context(), &workpb.RunRequest{})
		check("work", c.want, err)
		_, err = fetchpb.NewFetchClient(conn).Stats(t.Context(), &fetchpb.StatsRequest{})
		check("fetch", c.want, err)
		read, err := fetchpb.NewFetchClient(conn).Read(t.Context(), &fetchpb.ReadRequest{})
		if err == nil {
			_, err = read.Recv()
		}
		check("fetch, as a stream", c.want, err)
		stream, err := shippb.NewShipClient(conn).Stream(t.Context())
		if err == nil {
			_, err = stream.Recv()
		}
		check("ship", codes.Unimplemented, err)
		stop()
	}
}

// received is an ingester that takes every hello.
type received struct{ shippb.UnimplementedShipServer }

func (received) Stream(s shippb.Ship_StreamServer) error {
	if _, err := s.Recv(); err != nil {
		return err
	}
	return status.Error(codes.Aborted, "taken")
}

// With grpc_tls.tenant_certificate_field a certificate is good for sending as the tenants that
// it names.
func TestTenantOfCertificate(t *testing.T) {
	cert, key := testenv.SelfSigned(t, t.TempDir())
	for _, c := range []struct {
		field, tenant string
		want          codes.Code
	}{
		{"", "team-c", codes.Aborted},
		{commonName, "epimetheus test", codes.Aborted},
		{commonName, "team-a", codes.PermissionDenied},
		{organization, "team-a", codes.Aborted},
		{organization, "team-b", codes.Aborted},
		{organization, "team-c", codes.PermissionDenied},
		{organization, "", codes.PermissionDenied},
		{organizationalUnit, "team-a", codes.PermissionDenied}, // it has none
	} {
		conn, stop := dialed(t, TLSConfig{CertFile: cert, KeyFile: key, CAFile: cert, TenantCertificateField: c.field}, func(s *grpc.Server) {
			shippb.RegisterShipServer(s, received{})
		})
		stream, err := shippb.NewShipClient(conn).Stream(t.Context())
		if err == nil {
			err = stream.Send(&shippb.ToIngester{Message: &shippb.ToIngester_Hello{Hello: &shippb.Hello{Tenant: c.tenant}}})
		}
		if err == nil {
			_, err = stream.Recv()
		}
		if status.Code(err) != c.want {
			t.Errorf("%s, %q: %v, want %s", c.field, c.tenant, err, c.want)
		}
		stop()
	}
}

// Each kind of name counts.
func TestSANs(t *testing.T) {
	u, err := url.Parse("spiffe://example.org/gateway")
	if err != nil {
		t.Fatal(err)
	}
	got := sans(&x509.Certificate{
		DNSNames: []string{"gateway.example.org"}, EmailAddresses: []string{"a@example.org"}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1), net.IPv6loopback}, URIs: []*url.URL{u},
	})
	want := []string{"gateway.example.org", "a@example.org", "10.0.0.1", "::1", "spiffe://example.org/gateway"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
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
