package main

import (
	"fmt"
	"html/template"
	"io"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/prometheus/common/version"
	"go.yaml.in/yaml/v2"

	"github.com/epimetheus-tsdb/epimetheus/internal/health"
)

// section is a part of the status page: a table, the first row of which is the
// head. It is made anew for each request.
type section struct {
	title string
	rows  func(*http.Request) [][]string
}

//nolint:gochecknoglobals // parsed once, never changed
var statusPage = template.Must(template.New("status").Parse(`<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Epimetheus {{.Role}}</title>
<style>
body{font:15px/1.4 system-ui,sans-serif;margin:2em;color:#222}
table{border-collapse:collapse;margin-bottom:1.5em}
td,th{border-bottom:1px solid #ddd;padding:.25em .8em .25em 0;text-align:left}
pre{background:#f6f6f6;padding:1em;overflow:auto}
.bad{color:#a00}
</style></head><body>
<h1>Epimetheus {{.Role}}</h1>
<p>Version {{.Version}}, up since {{.Started}}.
{{if .NotReady}}<strong class="bad">Not ready: {{.NotReady}}</strong>{{else}}Ready.{{end}}
<a href="/health">health</a> · <a href="/metrics">metrics</a> · <a href="/debug/pprof/">profiles</a></p>
{{range .Conditions}}<p class="bad">Since {{.Since.UTC.Format "2006-01-02T15:04:05Z"}}: {{.What}}</p>
{{end}}{{range .Sections}}<h2>{{.Title}}</h2><table>
{{range $i, $r := .Rows}}<tr>{{range $r}}{{if eq $i 0}}<th>{{.}}</th>{{else}}<td>{{.}}</td>{{end}}{{end}}</tr>
{{end}}</table>{{end}}
<h2>Configuration</h2><pre>{{.Config}}</pre>
</body></html>
`))

func (p *process) serveStatus(w http.ResponseWriter, r *http.Request) {
	type table struct {
		Title string
		Rows  [][]string
	}
	data := struct {
		Role, Version, Started, NotReady, Config string
		Sections                                 []table
		Conditions                               []health.Condition
	}{Role: p.role, Version: version.Version, Started: p.started.UTC().Format(time.RFC3339)}
	if err := p.isReady(); err != nil {
		data.NotReady = err.Error()
	}
	data.Conditions = p.conditions()
	// No secrets: credentials aren't in the file.
	c, err := yaml.Marshal(p.config)
	if err != nil {
		c = []byte(err.Error())
	}
	data.Config = strings.TrimSpace(string(c))
	for _, s := range p.status {
		data.Sections = append(data.Sections, table{s.title, s.rows(r)})
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	if err := statusPage.Execute(w, data); err != nil {
		p.logger.Debug("status page not written", "err", err)
	}
}

// conditions is what is wrong at present, the longest-standing first.
func (p *process) conditions() []health.Condition {
	var out []health.Condition
	for _, conditions := range p.health {
		out = append(out, conditions()...)
	}
	slices.SortStableFunc(out, func(a, b health.Condition) int { return a.Since.Compare(b.Since) })
	return out
}

// serveHealth says in words what is degraded, and since when. It is for people:
// the status is 200 all the same.
func (p *process) serveHealth(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	p.writeHealth(w)
}

func (p *process) writeHealth(w io.Writer) {
	if err := p.isReady(); err != nil {
		fmt.Fprintf(w, "not ready: %v\n", err)
	}
	cs := p.conditions()
	if len(cs) == 0 {
		fmt.Fprintf(w, "nothing is degraded\n")
	}
	for _, c := range cs {
		fmt.Fprintf(w, "since %s (%s): %s\n", c.Since.UTC().Format(time.RFC3339), time.Since(c.Since).Round(time.Second), c.What)
	}
}

// serveStatusText is the status page as text, for 'tool status'.
func (p *process) serveStatusText(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintf(w, "epimetheus %s %s, up since %s\n", p.role, version.Version, p.started.UTC().Format(time.RFC3339))
	p.writeHealth(w)
	for _, s := range p.status {
		fmt.Fprintf(w, "\n%s\n", s.title)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, row := range s.rows(r) {
			fmt.Fprintf(t, "  %s\n", strings.Join(row, "\t"))
		}
		_ = t.Flush() // the reader has gone
	}
}
