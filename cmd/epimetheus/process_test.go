package main

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"

	"github.com/prometheus/common/promslog"
	"github.com/prometheus/exporter-toolkit/web"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
)

// TestRedirects: paths with a slash too many lead to where they lead in Prometheus, with their parameters.
func TestRedirects(t *testing.T) {
	file, address := "", []string{"127.0.0.1:0"}
	p, err := newProcess("all", &global{log: promslog.Config{Writer: t.Output()}},
		&webFlags{web: &web.FlagConfig{WebListenAddresses: &address, WebConfigFile: &file}, dataDir: filepath.Join(t.TempDir(), "data")})
	if err != nil {
		t.Fatal(err)
	}
	st, err := p.openStores(false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(st.close)
	if _, err := p.addGateway(st, &ring.Live{}, nil, nil, false); err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct {
		method, path string
		status       int
		location     string
	}{
		{http.MethodGet, "/federate/?match[]=up&x=%zz", http.StatusMovedPermanently, "/federate?match[]=up&x=%zz"},
		{http.MethodPost, "/federate/", http.StatusNotFound, ""},
		{http.MethodPost, "/federate", http.StatusMethodNotAllowed, ""},
		{http.MethodGet, "/-/healthy/?a=b", http.StatusMovedPermanently, "/-/healthy?a=b"},
		{http.MethodHead, "/-/healthy/", http.StatusTemporaryRedirect, "/-/healthy"},
		{http.MethodPost, "/-/healthy/", http.StatusNotFound, ""},
		{http.MethodPost, "/-/healthy", http.StatusMethodNotAllowed, ""},
		{http.MethodHead, "/-/healthy", http.StatusOK, ""},
		{http.MethodGet, "/-/ready/", http.StatusMovedPermanently, "/-/ready"},
		{http.MethodGet, "/metrics/", http.StatusMovedPermanently, "/metrics"},
		{http.MethodGet, "/metrics", http.StatusOK, ""},
		{http.MethodGet, "/-/nothing", http.StatusNotFound, ""},
		// Prometheus's own: without the prefix.
		{http.MethodGet, "/api/v1/query/?query=up", http.StatusMovedPermanently, "/query?query=up"},
		{http.MethodPost, "/api/v1/query/?query=up", http.StatusTemporaryRedirect, "/query?query=up"},
	} {
		w := httptest.NewRecorder()
		p.mux.ServeHTTP(w, httptest.NewRequest(r.method, r.path, nil))
		if got := w.Header().Get("Location"); w.Code != r.status || got != r.location {
			t.Errorf("%s %s: %d to %q, want %d to %q", r.method, r.path, w.Code, got, r.status, r.location)
		}
	}
}
