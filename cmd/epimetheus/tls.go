package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// TLSConfig is for gRPC between processes: each has a certificate, which it shows to
// whoever it calls, and to whoever calls it.
type TLSConfig struct {
	CertFile   string `yaml:"cert_file,omitempty" doc:"PEM file with this process's certificate, for gRPC between sidecars, ingesters and gateways: shown by it both as a server and as a client, so it has to be good for both. It is read again for each connection. With it, 'key_file' and 'ca_file', all that connects must have one too; the same in all processes. Empty: no TLS."`
	KeyFile    string `yaml:"key_file,omitempty" doc:"PEM file with its key."`
	CAFile     string `yaml:"ca_file,omitempty" doc:"PEM file with the certificates of those that sign certificates of clients and servers. Read at the start."`
	ServerName string `yaml:"server_name,omitempty" doc:"Name that certificates of servers are for. Empty: the address that they are called at, which for ingesters and gateways is the one they advertise, an IP address most often."`
	// GatewaySANs is what exporter-toolkit calls client_allowed_sans, for services that read.
	GatewaySANs []string `yaml:"gateway_sans,omitempty" doc:"Names in the certificates of gateways (subject alternative names: DNS names, URIs such as SPIFFE ids, IP or e-mail addresses). Who calls an ingester or a gateway to read samples must show a certificate with one of them; any other certificate of the CA is good for sending samples alone. The same in all ingesters and gateways. Empty: every certificate is good for all."`
	// TenantCertificateField is Thanos's --receive.tenant-certificate-field, and has its values.
	TenantCertificateField string `yaml:"tenant_certificate_field,omitempty" doc:"Field of the subject of a sidecar's certificate that names its tenant: 'commonName', 'organization' or 'organizationalUnit'. Ingesters then refuse samples that are sent as another tenant. Of a field with several values each is good. Empty: a certificate is good for sending as any tenant."`
}

func (c *TLSConfig) on() bool { return c.CertFile != "" }

func (c *TLSConfig) validate(bad func(string, ...any)) {
	files := 0
	for _, f := range []string{c.CertFile, c.KeyFile, c.CAFile} {
		if f != "" {
			files++
		}
	}
	if files != 0 && files != 3 {
		bad("grpc_tls: set all of cert_file, key_file and ca_file, or none")
	}
	if files == 0 && len(c.GatewaySANs) > 0 {
		bad("grpc_tls.gateway_sans: there is no TLS without cert_file, key_file and ca_file")
	}
	if files == 0 && c.TenantCertificateField != "" {
		bad("grpc_tls.tenant_certificate_field: there is no TLS without cert_file, key_file and ca_file")
	}
	if f := c.TenantCertificateField; f != "" && !slices.Contains([]string{commonName, organization, organizationalUnit}, f) {
		bad("grpc_tls.tenant_certificate_field: %q is none of %s, %s and %s", f, commonName, organization, organizationalUnit)
	}
	if files == 0 && c.ServerName != "" {
		bad("grpc_tls.server_name: there is no TLS without cert_file, key_file and ca_file")
	}
}

// credentials gives those of a server and of a client. An error names the file.
func (c *TLSConfig) credentials() (server, client credentials.TransportCredentials, _ error) {
	if !c.on() {
		return insecure.NewCredentials(), insecure.NewCredentials(), nil
	}
	text, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, nil, fmt.Errorf("grpc_tls.ca_file: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, nil, fmt.Errorf("grpc_tls.ca_file: %s has no certificate in PEM", c.CAFile)
	}
	// Certificates are renewed while a process runs.
	load := func() (*tls.Certificate, error) {
		cert, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		return &cert, err
	}
	if _, err := load(); err != nil {
		return nil, nil, fmt.Errorf("grpc_tls.cert_file, key_file: %w", err)
	}
	return credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return load() },
		}), credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: c.ServerName,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() },
		}), nil
}

// interceptors refuse calls that a certificate isn't good for.
func (c *TLSConfig) interceptors() []grpc.ServerOption {
	if len(c.GatewaySANs) == 0 && c.TenantCertificateField == "" {
		return nil
	}
	return []grpc.ServerOption{
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			if err := c.admit(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return handle(ctx, req)
		}),
		grpc.StreamInterceptor(func(s any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
			if err := c.admit(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			return handle(s, &helloStream{stream, c})
		}),
	}
}

// admit says whether the caller may call a method: what isn't for sidecars is for gateways.
func (c *TLSConfig) admit(ctx context.Context, method string) error {
	if len(c.GatewaySANs) == 0 || strings.HasPrefix(method, "/"+shippb.Ship_ServiceDesc.ServiceName+"/") {
		return nil
	}
	var names []string
	if cert := certificateOf(ctx); cert != nil {
		names = sans(cert)
	}
	if slices.ContainsFunc(names, func(n string) bool { return slices.Contains(c.GatewaySANs, n) }) {
		return nil
	}
	return status.Errorf(codes.PermissionDenied, "the certificate has the names %q, none of which is in grpc_tls.gateway_sans: it isn't good for %s", names, method)
}

// Values of TLSConfig.TenantCertificateField.
const (
	commonName         = "commonName"
	organization       = "organization"
	organizationalUnit = "organizationalUnit"
)

// helloStream is the stream of a caller; that of a sidecar has to begin with a tenant that its
// certificate names.
type helloStream struct {
	grpc.ServerStream
	config *TLSConfig
}

// RecvMsg implements grpc.ServerStream.
func (s *helloStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	if to, ok := m.(*shippb.ToIngester); ok && to.GetHello() != nil {
		return s.config.admitTenant(s.Context(), to.GetHello().GetTenant())
	}
	return nil
}

// admitTenant says whether the caller may send as a tenant.
func (c *TLSConfig) admitTenant(ctx context.Context, tenant string) error {
	if c.TenantCertificateField == "" {
		return nil
	}
	var names []string
	if cert := certificateOf(ctx); cert != nil {
		switch c.TenantCertificateField {
		case commonName:
			names = []string{cert.Subject.CommonName}
		case organization:
			names = cert.Subject.Organization
		case organizationalUnit:
			names = cert.Subject.OrganizationalUnit
		}
	}
	if slices.Contains(names, tenant) {
		return nil
	}
	return status.Errorf(codes.PermissionDenied, "the certificate is that of the tenants %q (grpc_tls.tenant_certificate_field is %s): it isn't good for sending as %q",
		names, c.TenantCertificateField, tenant)
}

// certificateOf is that of the caller; nil: it has shown none.
func certificateOf(ctx context.Context) *x509.Certificate {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok && len(info.State.PeerCertificates) > 0 {
			return info.State.PeerCertificates[0]
		}
	}
	return nil
}

// sans are the subject alternative names of a certificate.
func sans(cert *x509.Certificate) []string {
	names := slices.Concat(cert.DNSNames, cert.EmailAddresses)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	for _, u := range cert.URIs {
		names = append(names, u.String())
	}
	return names
}
