package sim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"testing/synctest"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"

	"github.com/epimetheus-tsdb/epimetheus/sidecar"
)

// sidecarProcess is one process of a sidecar.
type sidecarProcess struct {
	*sidecar.Sidecar
	place  string // in the network
	reg    *prometheus.Registry
	dir    string
	cancel context.CancelFunc
	ended  chan struct{}
}

// startSidecar starts one beside a source, on a data directory.
func (w *world) startSidecar(s *source, dir string) error {
	s.starts++
	p := &sidecarProcess{place: fmt.Sprintf("sidecar-of-%s-%d", s.id, s.starts), dir: dir, ended: make(chan struct{})}
	o := w.sidecar
	o.PrometheusDir, o.DataDir, o.Tenant = s.dir, dir, s.tenant
	o.Gateways = []string{"http://" + gateway}
	o.HTTPClient = &http.Client{Transport: ringEndpoint{w, p.place}}
	o.DialOptions = []grpc.DialOption{grpc.WithContextDialer(w.net.dialer(p.place))}
	var err error
	p.reg = prometheus.NewRegistry()
	if p.Sidecar, err = sidecar.New(o, w.logger.With("source", s.id), p.reg); err != nil {
		return fmt.Errorf("%s: %w", p.place, err)
	}
	var ctx context.Context
	ctx, p.cancel = context.WithCancel(context.Background())
	go func() {
		defer close(p.ended)
		if err := p.Run(ctx); err != nil && ctx.Err() == nil {
			w.fail(fmt.Errorf("%s ended: %w", p.place, err))
		}
	}()
	s.sidecar = p
	w.sidecars = append(w.sidecars, p)
	return nil
}

// dropped says what the process did not send, by reason.
func (p *sidecarProcess) dropped() string {
	var out []string
	families, err := p.reg.Gather()
	if err != nil {
		return err.Error()
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if v := m.GetCounter().GetValue(); v > 0 && (f.GetName() == "epimetheus_sidecar_dropped_samples_total" || f.GetName() == "epimetheus_sidecar_lost_ranges_total") {
				out = append(out, fmt.Sprintf("%s %v: %v", f.GetName(), m.GetLabel(), v))
			}
		}
	}
	return fmt.Sprintf("%s: %v", p.place, out)
}

// killSidecar ends the sidecar of a source as kill -9 does, and returns the data
// directory as it was at that moment. The process itself goes on for a moment,
// without network and on files that nobody reads.
func (w *world) killSidecar(s *source) (dir string, err error) {
	p := s.sidecar
	s.sidecar = nil
	synctest.Wait() // nobody is in the midst of writing a file
	dir = fmt.Sprintf("%s-%d", filepath.Join(w.dir, "data-of-"+s.id), s.starts)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	for _, name := range []string{"checkpoint.json", "dictionary"} {
		b, err := os.ReadFile(filepath.Join(p.dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o600)
		}
		if err != nil {
			return "", err
		}
	}
	w.net.end(p.place)
	p.cancel()
	return dir, nil
}

// tearDictionary leaves only n of a thousand parts of the dictionary, as when the
// machine lost its power.
func tearDictionary(dir string, n int64) error {
	path := filepath.Join(dir, "dictionary")
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Truncate(path, info.Size()*n/1000)
}
