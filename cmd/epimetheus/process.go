package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/hashicorp/go-sockaddr"
	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	versioncollector "github.com/prometheus/client_golang/prometheus/collectors/version"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/promslog"
	"github.com/prometheus/common/route"
	"github.com/prometheus/common/version"
	"github.com/prometheus/exporter-toolkit/web"
	"github.com/prometheus/exporter-toolkit/web/kingpinflag"
	"google.golang.org/grpc/credentials"

	"github.com/epimetheus-tsdb/epimetheus/internal/health"
)

// webFlags are the flags of a role that serves HTTP: all roles.
type webFlags struct {
	web        *web.FlagConfig
	dataDir    string
	dataDirSet bool // by the user
}

func addWebFlags(cmd *kingpin.CmdClause, address string) *webFlags {
	f := &webFlags{web: kingpinflag.AddFlags(cmd, address)}
	cmd.Flag("data.dir", "Directory for what the process keeps on disk.").Default("data").IsSetByUser(&f.dataDirSet).StringVar(&f.dataDir)
	return f
}

// process is one running role, or all: what is common to them. Actors are
// stopped in the order in which they were added, each before the next.
type process struct {
	role    string
	config  Config
	flags   *webFlags
	logger  *slog.Logger
	reg     *prometheus.Registry
	mux     *http.ServeMux
	group   run.Group
	ready   []check
	status  []section
	health  []func() []health.Condition
	started time.Time

	settings settings

	// Of gRPC between processes.
	asServer, asClient credentials.TransportCredentials
}

// check is a part of readiness.
type check struct {
	name string
	fn   func() error
}

// stopTimeout bounds what an actor takes to stop, beside a flush.
const stopTimeout = 10 * time.Second

func newProcess(role string, g *global, f *webFlags) (*process, error) {
	c, err := loadConfig(g.configFile)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(f.dataDir, 0o755); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	if f.dataDir, err = filepath.Abs(f.dataDir); err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	p := &process{
		role: role, config: c, flags: f, logger: promslog.New(&g.log), reg: prometheus.NewRegistry(),
		mux: http.NewServeMux(), started: time.Now(),
	}
	if p.asServer, p.asClient, err = c.GRPCTLS.credentials(); err != nil {
		return nil, err
	}
	p.reg.MustRegister(
		versioncollector.NewCollector("epimetheus"),
		collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(collectors.MetricsGC, collectors.MetricsMemory)),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	// What a Prometheus has too is served by its router, which redirects: from /-/ready/, say.
	also := route.New()
	also.Get("/metrics", promhttp.HandlerFor(p.reg, promhttp.HandlerOpts{Registry: p.reg}).ServeHTTP)
	for _, method := range []func(string, http.HandlerFunc){also.Get, also.Head} {
		method("/-/healthy", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, "epimetheus %s is healthy\n", p.role)
		})
		method("/-/ready", p.serveReady)
	}
	for _, path := range []string{"/metrics", "/metrics/", "/-/"} {
		p.mux.Handle(path, also)
	}
	p.mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	p.mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	p.mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	p.mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	p.mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	p.mux.HandleFunc("GET /{$}", p.serveStatus)
	p.mux.HandleFunc("GET /health", p.serveHealth)
	p.mux.HandleFunc("GET /status", p.serveStatusText)
	p.addSignals()
	p.addCollect()
	if err := p.addReload(g.configFile); err != nil {
		return nil, err
	}
	return p, nil
}

// serveReady says 200 only if the process can really serve.
func (p *process) serveReady(w http.ResponseWriter, _ *http.Request) {
	if err := p.isReady(); err != nil {
		http.Error(w, fmt.Sprintf("epimetheus %s is not ready: %v", p.role, err), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintf(w, "epimetheus %s is ready\n", p.role)
}

func (p *process) isReady() error {
	var errs []error
	for _, c := range p.ready {
		if err := c.fn(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.name, err))
		}
	}
	return errors.Join(errs...)
}

// errSignal ends the group as it should.
var errSignal = errors.New("signal")

// addSignals makes SIGINT and SIGTERM end the process.
func (p *process) addSignals() {
	ctx, cancel := context.WithCancel(context.Background())
	p.group.Add(func() error {
		c := make(chan os.Signal, 1)
		signal.Notify(c, os.Interrupt, syscall.SIGTERM)
		defer signal.Stop(c)
		select {
		case s := <-c:
			p.logger.Info("stopping", "signal", s.String())
			return errSignal
		case <-ctx.Done():
			return nil
		}
	}, func(error) { cancel() })
}

// addRun adds a component. Its stop ends it and waits; the next actor is stopped
// after that. before, if not nil, comes first.
func (p *process) addRun(name string, fn func(context.Context) error, before func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	p.group.Add(func() error {
		defer close(done)
		if err := fn(ctx); err != nil {
			if ctx.Err() != nil { // another ended the group, and is what it tells of
				p.logger.Error("not all could be done at the end", "component", name, "err", err)
			}
			return fmt.Errorf("%s: %w", name, err)
		}
		if ctx.Err() == nil {
			return fmt.Errorf("%s ended by itself", name)
		}
		return nil
	}, func(error) {
		if before != nil {
			select {
			case <-done: // it is what ended first
			default:
				before()
			}
		}
		cancel()
		<-done
	})
}

// run serves HTTP beside the actors added so far until one of them ends.
func (p *process) run() error {
	if err := p.addWeb(); err != nil {
		return err
	}
	p.logger.Info("started", "role", p.role, "version", version.Version, "data_dir", p.flags.dataDir)
	err := p.group.Run()
	if errors.Is(err, errSignal) {
		p.logger.Info("stopped")
		return nil
	}
	return err
}

func (p *process) addWeb() error {
	server := &http.Server{
		Handler: p.mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 5 * time.Minute,
		ErrorLog: slog.NewLogLogger(p.logger.Handler(), slog.LevelDebug),
	}
	var ls []net.Listener
	for _, a := range *p.flags.web.WebListenAddresses {
		l, err := listen("web.listen-address", a)
		if err != nil {
			return err
		}
		ls = append(ls, l)
	}
	base, cancelBase := context.WithCancel(context.Background()) // requests that wait end with it
	server.BaseContext = func(net.Listener) context.Context { return base }
	p.group.Add(func() error {
		err := web.ServeMultiple(ls, server, p.flags.web, p.logger)
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		return fmt.Errorf("web server: %w", err)
	}, func(error) {
		ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
		defer cancel()
		cancelBase()
		if err := server.Shutdown(ctx); err != nil {
			p.logger.Warn("web server not stopped in time, connections are cut", "err", err)
			_ = server.Close()
		}
	})
	return nil
}

// listen says which flag to change where the address can't be had.
func listen(flag, address string) (net.Listener, error) {
	l, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", address)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%s is in use: stop what listens there, or choose another address with --%s", address, flag)
	}
	if err != nil {
		return nil, fmt.Errorf("--%s: %w", flag, err)
	}
	return l, nil
}

// reachable is the address that others reach a listener by: advertise if given,
// else the listener's, with a private address of this host for a wildcard.
func reachable(advertise string, l net.Addr) (string, error) {
	if advertise != "" {
		return advertise, nil
	}
	host, port, err := net.SplitHostPort(l.String())
	if err != nil {
		return "", err
	}
	if ip := net.ParseIP(host); ip != nil && !ip.IsUnspecified() {
		return l.String(), nil
	}
	ip, err := sockaddr.GetPrivateIP()
	if err != nil || ip == "" {
		ip = "127.0.0.1"
	}
	return net.JoinHostPort(ip, port), nil
}

// revision of the source, as the toolchain noted it.
func revision() string {
	if version.Revision != "" {
		return version.Revision
	}
	if b, ok := debug.ReadBuildInfo(); ok {
		for _, s := range b.Settings {
			if s.Key == "vcs.revision" {
				return s.Value
			}
		}
	}
	return "unknown"
}
