package fetch

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/model/labels"
)

// Names keeps the labels of series that ingesters speak of by references, so that
// they cross the wire once. It is safe for concurrent use.
type Names struct {
	max  int64 // bytes
	asks prometheus.Counter

	mu     sync.RWMutex
	bytes  int64
	scopes map[scope]*named
	swept  time.Time // when unused scopes were last looked for
}

// scope is where references mean something.
type scope struct {
	start, tenant string
	generation    uint64
}

const (
	pageRefs = 32
	// maxRef bounds what an ingester that is out of its mind can cost: more series of
	// one tenant don't fit into the memory of an ingester.
	maxRef = 1 << 26
)

// named are the labels of a scope, by ref. Empty ones aren't known.
type named struct {
	pages []*[pageRefs]labels.Labels
	bytes int64
	used  atomic.Int64 // ns since the epoch
}

// NewNames keeps so many bytes of labels at most.
func NewNames(maxBytes int64, reg prometheus.Registerer) *Names {
	n := &Names{
		max: maxBytes, scopes: map[scope]*named{},
		asks: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "epimetheus_gateway_head_labels_fetched_total",
			Help: "Series whose labels ingesters were asked for: each once, until it is in another generation.",
		}),
	}
	reg.MustRegister(n.asks, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "epimetheus_gateway_head_labels_bytes", Help: "Memory of the labels of series in heads that are kept.",
	}, func() float64 {
		n.mu.RLock()
		defer n.mu.RUnlock()
		return float64(n.bytes)
	}))
	return n
}

// get gives series their labels, and says which are not known.
func (n *Names) get(at scope, l *list) (unknown []int) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	x := n.scopes[at]
	if x != nil {
		x.used.Store(time.Now().UnixNano())
	}
	for i, ref := range l.refs {
		if x != nil && int(ref/pageRefs) < len(x.pages) {
			if page := x.pages[ref/pageRefs]; page != nil && !page[ref%pageRefs].IsEmpty() {
				l.series[i].Labels = page[ref%pageRefs]
				continue
			}
		}
		unknown = append(unknown, i)
	}
	return unknown
}

const (
	pageBytes  = 16 * pageRefs
	scopeBytes = 512
	// unusedFor is after what time labels go that nobody has asked for: their generation
	// has mostly gone.
	unusedFor = 30 * time.Minute
)

// put keeps the labels of some series of a list.
func (n *Names) put(at scope, l *list, which []int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asks.Add(float64(len(which)))
	x := n.scopes[at]
	if x == nil {
		x = &named{bytes: scopeBytes}
		n.bytes += scopeBytes
		n.scopes[at] = x
	}
	x.used.Store(time.Now().UnixNano())
	for _, i := range which {
		ref, ls := l.refs[i], l.series[i].Labels
		if ref >= maxRef {
			continue
		}
		for int(ref/pageRefs) >= len(x.pages) {
			x.pages = append(x.pages, nil)
		}
		page := x.pages[ref/pageRefs]
		if page == nil {
			page = new([pageRefs]labels.Labels)
			x.pages[ref/pageRefs] = page
			n.grow(x, pageBytes)
		}
		if page[ref%pageRefs].IsEmpty() {
			n.grow(x, int64(ls.ByteSize())) //nolint:gosec // bytes in memory
		}
		page[ref%pageRefs] = ls
	}
	n.evict()
}

func (n *Names) grow(x *named, bytes int64) {
	x.bytes += bytes
	n.bytes += bytes
}

// evict drops what nobody has used for long, and what is used least recently while
// there is too much.
func (n *Names) evict() {
	if now := time.Now(); now.Sub(n.swept) > time.Minute {
		n.swept = now
		for at, x := range n.scopes {
			if x.used.Load() < now.Add(-unusedFor).UnixNano() {
				n.drop(at, x)
			}
		}
	}
	for n.bytes > n.max {
		var oldest scope
		var x *named
		for at, y := range n.scopes {
			if x == nil || y.used.Load() < x.used.Load() {
				oldest, x = at, y
			}
		}
		if x == nil {
			return
		}
		n.drop(oldest, x)
	}
}

func (n *Names) drop(at scope, x *named) {
	n.bytes -= x.bytes
	delete(n.scopes, at)
}
