// Package account keeps account of what each query reads and holds in memory, and
// ends those that go beyond what they may.
//
// The gateway opens an Account for a request and puts it into the context. Whoever
// reads for the request finds it there and notes what it reads, before it takes the
// memory. All methods work on a nil *Account, for reads that nobody keeps account
// of.
package account

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/promql"

	"github.com/epimetheus-tsdb/epimetheus/history"
)

// Limits of one query. 0 is no limit.
type Limits struct {
	Series  int64         // that it reads
	Samples int64         // likewise
	Range   time.Duration // between its first and its last sample
	Read    int64         // bytes of the object store and of heads that it reads
	Bytes   int64         // of the answer, about
}

// ErrLimit is what the errors of queries wrap that went beyond a limit.
var ErrLimit = errors.New("beyond a limit of the gateway")

type limitError struct{ text string }

func (e *limitError) Error() string { return e.text }
func (*limitError) Unwrap() error   { return ErrLimit }

func (a *Account) beyond(what, limit string, value any) error {
	a.ended.Store(true)
	return &limitError{fmt.Sprintf("the query %s (limit gateway.limits.%s is %v): ask for fewer series or less time, or raise the limit", what, limit, value)}
}

// Account is what one request reads. It is safe for concurrent use.
type Account struct {
	tenant string
	limits Limits
	memory *Memory
	cancel context.CancelCauseFunc

	series, samples, held, headBytes atomic.Int64
	read                             atomic.Int64 // bytes, or about to be
	kept, here, near                 atomic.Int64 // parts
	over                             atomic.Bool  // ended for memory
	ended                            atomic.Bool  // for any limit

	mu      sync.Mutex
	stats   []*history.Stats
	workers map[string]struct{} // other gateways, by id
	there   Cost                // what they have read
}

type key struct{}

// From gives the account of a context, or nil.
func From(ctx context.Context) *Account {
	a, _ := ctx.Value(key{}).(*Account)
	return a
}

// Ended says whether the query went beyond a limit, so that it fails.
func (a *Account) Ended() bool { return a != nil && a.ended.Load() }

// AddSeries notes series and their samples that are about to be read. It gives an
// error that wraps ErrLimit if they are too many.
func (a *Account) AddSeries(series, samples int64) error {
	if a == nil {
		return nil
	}
	if n, limit := a.series.Add(series), a.limits.Series; limit > 0 && n > limit {
		return a.beyond(fmt.Sprintf("reads %d series and more", n), "query_series", limit)
	}
	if n, limit := a.samples.Add(samples), a.limits.Samples; limit > 0 && n > limit {
		return a.beyond(fmt.Sprintf("reads %d samples and more", n), "query_samples", limit)
	}
	return nil
}

// Series are those that were noted so far.
func (a *Account) Series() int64 {
	if a == nil {
		return 0
	}
	return a.series.Load()
}

// Expect notes, before samples are read, that AddSeries will have been told of so many series
// in all, and of so many samples more than so far, at the least. Where that is beyond a limit it
// ends the query, as Read does.
func (a *Account) Expect(series, samples int64) {
	if a == nil {
		return
	}
	if limit := a.limits.Series; limit > 0 && series > limit {
		a.cancel(a.beyond(fmt.Sprintf("would read %d series and more, as estimated before", series), "query_series", limit))
	}
	if n, limit := a.samples.Load()+samples, a.limits.Samples; limit > 0 && n > limit {
		a.cancel(a.beyond(fmt.Sprintf("would read %d samples and more, as estimated before", n), "query_samples", limit))
	}
}

// Excess is a limit that a query would go beyond.
type Excess struct {
	Limit string `json:"limit"` // as in the configuration
	Value any    `json:"value"` // what the query would need, about
	Max   any    `json:"max"`
}

// Exceeds says beyond which limits a query would go that needs samples of mint to maxt, in ms, and
// about so many series and samples.
func (a *Account) Exceeds(mint, maxt, series, samples int64) []Excess {
	out := []Excess{}
	if a == nil {
		return out
	}
	if d, most := between(mint, maxt), a.limits.Range; most > 0 && d > most {
		out = append(out, Excess{"gateway.limits.query_range", d.String(), most.String()})
	}
	for _, c := range []struct {
		limit       string
		value, most int64
	}{{"query_series", series, a.limits.Series}, {"query_samples", samples, a.limits.Samples}} {
		if c.most > 0 && c.value > c.most {
			out = append(out, Excess{"gateway.limits." + c.limit, c.value, c.most})
		}
	}
	return out
}

// WithTimeout gives a context that ends after the longest time that a request may take,
// with an error as its cause that wraps a promql.ErrQueryTimeout and names the limit.
func WithTimeout(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, &timeoutError{d})
}

type timeoutError struct{ limit time.Duration }

func (e *timeoutError) Error() string {
	return fmt.Sprintf("the request took longer than it may (limit gateway.query_timeout is %s): ask for fewer series or less time, or raise the limit", e.limit)
}

func (*timeoutError) Unwrap() error { return promql.ErrQueryTimeout("reading of samples") }

// CheckRange gives an error that wraps ErrLimit if a query needs samples of more time,
// mint to maxt in ms, than it may.
func (a *Account) CheckRange(mint, maxt int64) error {
	if a == nil || a.limits.Range == 0 {
		return nil
	}
	d := between(mint, maxt)
	if d <= a.limits.Range {
		return nil
	}
	return a.beyond(fmt.Sprintf("reads samples of %s", d), "query_range", a.limits.Range)
}

// between is the time from mint to maxt, in ms, or the longest Duration if that is
// too short.
func between(mint, maxt int64) time.Duration {
	const most = math.MaxInt64 / int64(time.Millisecond)
	switch d := maxt - mint; {
	case mint > maxt:
		return 0
	case 0 <= d && d <= most:
		return time.Duration(d) * time.Millisecond
	}
	return math.MaxInt64
}

// CheckAnswer gives an error that wraps ErrLimit if an answer has too many bytes.
func (a *Account) CheckAnswer(bytes int64) error {
	if a == nil || a.limits.Bytes == 0 || bytes <= a.limits.Bytes {
		return nil
	}
	return a.beyond(fmt.Sprintf("has an answer of about %d bytes", bytes), "answer_bytes", a.limits.Bytes)
}

// Hold notes bytes that the query holds from now on, or no longer holds if negative.
// It may end this query or another.
func (a *Account) Hold(bytes int64) {
	if a == nil || bytes == 0 {
		return
	}
	a.held.Add(bytes)
	a.memory.add(bytes)
}

// Read notes bytes that are about to be read of the object store, or that ingesters have
// sent; negative, that these were fewer. Beyond the limit it ends the query: its context, with
// an error that wraps ErrLimit as its cause.
func (a *Account) Read(bytes int64) {
	if a == nil {
		return
	}
	if n, limit := a.read.Add(bytes), a.limits.Read; limit > 0 && n > limit && bytes > 0 {
		a.cancel(a.beyond(fmt.Sprintf("reads %d bytes and more", n), "query_bytes", limit))
	}
}

// AddHeadBytes notes bytes of samples that ingesters have sent.
func (a *Account) AddHeadBytes(bytes int64) {
	if a != nil {
		a.headBytes.Add(bytes)
	}
}

// AddHistory notes what is read from a snapshot of history.
func (a *Account) AddHistory(s *history.Stats) {
	if a == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stats = append(a.stats, s)
}

// AddParts notes parts of the query: those whose result was in memory, and those computed
// here.
func (a *Account) AddParts(kept, here int) {
	if a == nil {
		return
	}
	a.kept.Add(int64(kept))
	a.here.Add(int64(here))
}

// AddMemcachedParts notes parts whose result memcached had.
func (a *Account) AddMemcachedParts(n int) {
	if a != nil {
		a.near.Add(int64(n))
	}
}

// Left is what may still be read within the limits on samples and on bytes, of each 1 at the
// least. Other limits aren't in it.
func (a *Account) Left() (l Limits) {
	if a == nil {
		return l
	}
	if a.limits.Samples > 0 {
		l.Samples = max(1, a.limits.Samples-a.samples.Load())
	}
	if a.limits.Read > 0 {
		l.Read = max(1, a.limits.Read-a.read.Load())
	}
	return l
}

// AddWorker notes what another gateway has read for the query, by its own account: all but
// series, of which several may have read the same. As with Read, what is beyond a limit ends
// the query. Counts must not be negative.
func (a *Account) AddWorker(id string, c Cost) {
	if a == nil {
		return
	}
	a.mu.Lock()
	if a.workers == nil {
		a.workers = map[string]struct{}{}
	}
	a.workers[id] = struct{}{}
	t := &a.there
	t.Windows += c.Windows
	t.ObjectGets += c.ObjectGets
	t.ObjectBytes += c.ObjectBytes
	t.Pages += c.Pages
	t.PagesCached += c.PagesCached
	t.PagesMemcached += c.PagesMemcached
	t.PartsKept += c.PartsKept
	t.PartsElsewhere += c.PartsHere
	a.mu.Unlock()
	a.Read(c.ObjectBytes)
	if err := a.AddSeries(0, c.Samples); err != nil {
		a.cancel(err)
	}
}

// Cost is what a query has read, here and at other gateways.
type Cost struct {
	Series         int64 `json:"series"`
	Samples        int64 `json:"samples"`
	Windows        int64 `json:"windows"`        // summaries of windows, read in place of samples
	HeadBytes      int64 `json:"headBytes"`      // of samples, from ingesters
	Blocks         int64 `json:"blocks"`         // that were visible
	IndexQueries   int64 `json:"indexQueries"`   // lists of rows read from the index
	IndexCached    int64 `json:"indexCached"`    // lists of rows that were at hand
	ObjectGets     int64 `json:"objectGets"`     // requests to the object store
	ObjectBytes    int64 `json:"objectBytes"`    // bytes that these read
	Pages          int64 `json:"pages"`          // pages of blocks used
	PagesCached    int64 `json:"pagesCached"`    // of them in memory
	PagesMemcached int64 `json:"pagesMemcached"` // of them in memcached
	PartsKept      int64 `json:"partsKept"`      // parts of long queries: result in memory, here or at another gateway
	PartsMemcached int64 `json:"partsMemcached"` // result in memcached
	PartsHere      int64 `json:"partsHere"`      // computed by this gateway
	PartsElsewhere int64 `json:"partsElsewhere"` // computed by others
	Workers        int64 `json:"workers"`        // other gateways that had a share in it
}

// Cost so far.
func (a *Account) Cost() Cost {
	if a == nil {
		return Cost{}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.there
	c.Series, c.Samples, c.HeadBytes = a.series.Load(), a.samples.Load(), a.headBytes.Load()
	c.PartsKept += a.kept.Load()
	c.PartsHere, c.PartsMemcached = a.here.Load(), a.near.Load()
	c.Workers = int64(len(a.workers))
	for _, s := range a.stats {
		c.Windows += s.Windows.Load()
		c.Blocks += s.Blocks.Load()
		c.IndexQueries += s.IndexQueries.Load()
		c.IndexCached += s.IndexCached.Load()
		c.ObjectGets += s.ObjectGets.Load()
		c.ObjectBytes += s.ObjectBytes.Load()
		c.Pages += s.Pages.Load()
		c.PagesCached += s.PagesCached.Load()
		c.PagesMemcached += s.PagesMemcached.Load()
	}
	return c
}

// Memory is what the queries of a gateway hold together.
type Memory struct {
	max    int64
	ended  prometheus.Counter
	used   atomic.Int64
	mu     sync.Mutex
	active map[*Account]struct{}
}

// NewMemory bounds what all queries hold together, in bytes; 0 is no bound.
func NewMemory(max int64, reg prometheus.Registerer) *Memory {
	m := &Memory{
		max: max, active: map[*Account]struct{}{},
		ended: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_gateway_queries_ended_for_memory_total",
			Help: "Queries that were ended since all queries together held too much memory, their tenant the most, and they the most of its.",
		}),
	}
	reg.MustRegister(m.ended, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "epimetheus_gateway_query_memory_bytes", Help: "Memory that running queries hold: samples of heads, pages and results, about.",
	}, func() float64 { return float64(m.used.Load()) }), prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "epimetheus_gateway_query_memory_max_bytes", Help: "Memory that queries may hold together.",
	}, func() float64 { return float64(max) }))
	return m
}

// Open opens the account of a request of a tenant. The context that it gives is cancelled,
// with an error that wraps ErrLimit as its cause, if the request has to end for lack of
// memory. Call done at the end of the request.
func (m *Memory) Open(ctx context.Context, tenant string, l Limits) (_ context.Context, a *Account, done func()) {
	a = &Account{tenant: tenant, limits: l, memory: m}
	ctx, a.cancel = context.WithCancelCause(ctx)
	m.mu.Lock()
	m.active[a] = struct{}{}
	m.mu.Unlock()
	return context.WithValue(ctx, key{}, a), a, func() {
		a.cancel(nil)
		m.mu.Lock()
		delete(m.active, a)
		m.mu.Unlock()
		m.used.Add(-a.held.Swap(0))
	}
}

func (m *Memory) add(bytes int64) {
	if used := m.used.Add(bytes); bytes < 0 || m.max == 0 || used <= m.max {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// Those that were ended already give theirs back soon. Of the tenant that holds most the
	// heaviest ends: many small queries of one cost another none of its own.
	used, of := int64(0), map[string]int64{}
	for a := range m.active {
		if !a.over.Load() {
			held := a.held.Load()
			used += held
			of[a.tenant] += held
		}
	}
	if used <= m.max {
		return
	}
	var heaviest *Account
	for a := range m.active {
		if a.over.Load() {
			continue
		}
		if heaviest == nil || cmp.Or(cmp.Compare(of[a.tenant], of[heaviest.tenant]), cmp.Compare(a.held.Load(), heaviest.held.Load())) > 0 {
			heaviest = a
		}
	}
	if heaviest == nil {
		return
	}
	m.ended.Inc()
	held := heaviest.held.Load()
	heaviest.over.Store(true)
	heaviest.ended.Store(true)
	heaviest.cancel(&limitError{fmt.Sprintf(
		"the query held %d bytes of memory, the most of its tenant's, which held %d, when queries together held more than gateway.query_memory_bytes (%d): ask for fewer series or less time",
		held, of[heaviest.tenant], m.max)})
}
