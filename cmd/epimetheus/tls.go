package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

// TLSConfig is for gRPC between processes: each has a certificate, which it shows to
// whoever it calls, and to whoever calls it.
type TLSConfig struct {
	CertFile   string `yaml:"cert_file,omitempty" doc:"PEM file with this process's certificate, for gRPC between sidecars, ingesters and gateways: shown by it both as a server and as a client, so it has to be good for both. It is read again for each connection. With it, 'key_file' and 'ca_file', all that connects must have one too; the same in all processes. Empty: no TLS."`
	KeyFile    string `yaml:"key_file,omitempty" doc:"PEM file with its key."`
	CAFile     string `yaml:"ca_file,omitempty" doc:"PEM file with the certificates of those that sign certificates of clients and servers. Read at the start."`
	ServerName string `yaml:"server_name,omitempty" doc:"Name that certificates of servers are for. Empty: the address that they are called at, which for ingesters and gateways is the one they advertise, an IP address most often."`
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
