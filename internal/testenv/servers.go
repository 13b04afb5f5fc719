package testenv

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// S3Server is a running S3 server with one bucket.
type S3Server struct {
	*Process
	Endpoint  string // URL
	Region    string
	Bucket    string
	AccessKey string
	SecretKey string
	CAFile    string // PEM file with the certificate to trust; empty without TLS
	Dir       string // the bucket's objects are files below this folder
}

// Env is the environment with which a program that uses the AWS SDK's own
// credential chain reaches the server.
func (s *S3Server) Env() []string {
	env := []string{
		"AWS_ACCESS_KEY_ID=" + s.AccessKey, "AWS_SECRET_ACCESS_KEY=" + s.SecretKey,
		"AWS_REGION=" + s.Region, "AWS_EC2_METADATA_DISABLED=true",
	}
	if s.CAFile != "" {
		// The SDK prefers its own variable, which the machine may have set.
		env = append(env, "SSL_CERT_FILE="+s.CAFile, "AWS_CA_BUNDLE="+s.CAFile)
	}
	return env
}

// S3 starts an S3 server that speaks http.
func S3(t testing.TB) *S3Server {
	t.Helper()
	return startS3(t, false)
}

// S3TLS starts an S3 server that speaks https with a self-signed certificate.
func S3TLS(t testing.TB) *S3Server {
	t.Helper()
	return startS3(t, true)
}

func startS3(t testing.TB, tls bool) *S3Server {
	t.Helper()
	dir, addr := t.TempDir(), FreeAddr(t)
	s := &S3Server{
		Endpoint: "http://" + addr, Region: "us-east-1", Bucket: "history",
		AccessKey: "testkey", SecretKey: "testsecret",
	}
	// In the posix back end of versitygw a bucket is a folder.
	s.Dir = filepath.Join(dir, "objects", s.Bucket)
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"-q", "--keep-alive", "--port", addr, "--access", s.AccessKey, "--secret", s.SecretKey, "--region", s.Region}
	if tls {
		cert, key := SelfSigned(t, dir)
		s.Endpoint, s.CAFile = "https://"+addr, cert
		args = append(args, "--cert", cert, "--key", key)
	}
	args = append(args, "posix", filepath.Dir(s.Dir))
	s.Process = Start(t, Command{Path: Tool(t, "bin/versitygw"), Args: args, Dir: dir, Ready: Listening(addr)})
	return s
}

// DynamoDBServer is a running DynamoDB server without tables.
type DynamoDBServer struct {
	*Process
	Endpoint  string // URL
	Region    string
	AccessKey string
	SecretKey string
}

// surviveAborts keeps dynalite from ending when a client dies in the middle of a
// request, which tests do to clients.
const surviveAborts = `data:text/javascript,process.on("uncaughtException",e=>{console.error(e);if(e.code!=="ECONNRESET")process.exit(1)})`

// DynamoDB starts a DynamoDB server that keeps its tables in memory.
func DynamoDB(t testing.TB) *DynamoDBServer {
	t.Helper()
	return startDynamoDB(t)
}

// DynamoDBOn starts a DynamoDB server that keeps its tables in a folder.
func DynamoDBOn(t testing.TB, dir string) *DynamoDBServer {
	t.Helper()
	return startDynamoDB(t, "--path", dir)
}

func startDynamoDB(t testing.TB, args ...string) *DynamoDBServer {
	t.Helper()
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatal("node is absent, the DynamoDB server of the tests needs it: apt-get install -y nodejs npm")
	}
	addr := FreeAddr(t)
	args = append([]string{
		"--import", surviveAborts,
		Tool(t, "dynalite/node_modules/dynalite/cli.js"), "--host", "127.0.0.1", "--port", port(addr),
		"--createTableMs", "10", "--deleteTableMs", "10", "--updateTableMs", "10",
	}, args...)
	s := &DynamoDBServer{Endpoint: "http://" + addr, Region: "us-east-1", AccessKey: "testkey", SecretKey: "testsecret"}
	s.Process = Start(t, Command{Path: node, Args: args, Ready: Listening(addr)})
	return s
}

// Memcached starts a memcached, with additional arguments, and returns its address.
func Memcached(t testing.TB, args ...string) (addr string, p *Process) {
	t.Helper()
	path, err := exec.LookPath("memcached")
	if err != nil {
		t.Fatal("memcached is absent: apt-get install -y memcached")
	}
	addr = FreeAddr(t)
	return addr, Start(t, Command{
		Path: path, Args: append([]string{"-u", "nobody", "-l", "127.0.0.1", "-p", port(addr), "-m", "64"}, args...), Ready: Listening(addr),
	})
}

// PrometheusServer is a running Prometheus.
type PrometheusServer struct {
	*Process
	URL  string
	Addr string
	Dir  string // its data directory
}

// Prometheus starts a Prometheus on the data directory dir (a temporary one if
// empty) with the given configuration file's text and additional arguments.
func Prometheus(t testing.TB, dir, config string, args ...string) *PrometheusServer {
	t.Helper()
	tmp := t.TempDir()
	if dir == "" {
		dir = filepath.Join(tmp, "data")
	}
	file := filepath.Join(tmp, "prometheus.yml")
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	addr := FreeAddr(t)
	s := &PrometheusServer{URL: "http://" + addr, Addr: addr, Dir: dir}
	args = append([]string{
		"--config.file=" + file, "--storage.tsdb.path=" + dir, "--web.listen-address=" + addr, "--web.enable-lifecycle",
	}, args...)
	s.Process = Start(t, Command{Path: Tool(t, "bin/prometheus"), Args: args, Dir: tmp, Ready: Answering(s.URL + "/-/ready")})
	return s
}

// SelfSigned writes a certificate for 127.0.0.1, good for servers and clients, and its
// key into dir, which has to be there.
func SelfSigned(t testing.TB, dir string) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: "epimetheus test", Organization: []string{"team-a", "team-b"}},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "EC PRIVATE KEY", keyDER)
}
