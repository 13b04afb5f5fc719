package gateway

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	jsoniter "github.com/json-iterator/go"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/util/annotations"
	v1 "github.com/prometheus/prometheus/web/api/v1"
)

func respond(w http.ResponseWriter, data any, warnings annotations.Annotations) {
	texts, _ := warnings.AsStrings("", 10, 10)
	write(w, http.StatusOK, v1.Response{Status: "success", Data: data, Warnings: texts})
}

func respondError(w http.ResponseWriter, code int, kind string, err error) {
	write(w, code, v1.Response{Status: "error", ErrorType: kind, Error: err.Error()})
}

func write(w http.ResponseWriter, code int, r v1.Response) {
	b, err := json.Marshal(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(b) // the client has gone: nobody to tell
}

// streaming is a codec of Prometheus's API that encodes while the answer is sent,
// so that no answer is in memory as a whole and once more as text. A codec must
// return bytes, and only then a handler writes: what it writes is a ticket, in
// the place of which the responseWriter puts the answer.
type streaming struct {
	v1.JSONCodec

	mu      sync.Mutex
	waiting map[string]*v1.Response // by ticket
}

// Encode implements v1.Codec.
func (s *streaming) Encode(r *v1.Response) ([]byte, error) {
	ticket := rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting[ticket] = r
	return []byte(ticket), nil
}

// take gives the answer of a ticket, or nil.
func (s *streaming) take(p []byte) *v1.Response {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.waiting[string(p)]
	delete(s.waiting, string(p))
	return r
}

// pieceBytes is how much of an answer is encoded before it is sent.
const pieceBytes = 64 << 10

// encode writes an answer, byte for byte as v1.JSONCodec encodes it.
func encode(w io.Writer, r *v1.Response) error {
	api := jsoniter.ConfigCompatibleWithStandardLibrary
	s := api.BorrowStream(w)
	defer api.ReturnStream(s)
	raw := func(text string) { s.WriteRaw(text) }
	list := func(n int, one func(i int)) {
		raw("[")
		for i := range n {
			if i > 0 {
				raw(",")
			}
			one(i)
			if s.Buffered() >= pieceBytes && s.Flush() != nil {
				return // the client has gone, and the rest would stay in memory
			}
		}
		raw("]")
	}
	head := func() { raw(`{"status":"` + string(r.Status) + `","data":`) }
	switch data := r.Data.(type) {
	case *v1.QueryData:
		head()
		raw(`{"resultType":`)
		s.WriteVal(data.ResultType)
		raw(`,"result":`)
		switch result := data.Result.(type) {
		case promql.Matrix:
			var times *timeTexts
			if len(result) > 1 {
				times = &timeTexts{}
			}
			list(len(result), func(i int) {
				if len(result[i].Histograms) > 0 {
					s.WriteVal(result[i])
					return
				}
				raw(`{"metric":`)
				writeLabels(s, result[i].Metric)
				if ps := result[i].Floats; len(ps) > 0 {
					raw(`,"values":[`)
					s.SetBuffer(appendFloats(s.Buffer(), ps, times))
					raw("]")
				}
				raw("}")
			})
		case promql.Vector:
			list(len(result), func(i int) {
				if result[i].H != nil {
					s.WriteVal(result[i])
					return
				}
				raw(`{"metric":`)
				writeLabels(s, result[i].Metric)
				raw(`,"value":[`)
				b := append(appendTime(s.Buffer(), result[i].T), `,"`...)
				s.SetBuffer(append(appendFloat(b, result[i].F), `"]}`...))
			})
		default:
			s.WriteVal(result)
		}
		if data.Stats != nil {
			raw(`,"stats":`)
			s.WriteVal(data.Stats)
		}
		if data.Cost != nil {
			raw(`,"cost":`)
			s.WriteVal(data.Cost)
		}
		raw("}")
	case []labels.Labels:
		head()
		list(len(data), func(i int) { writeLabels(s, data[i]) })
	case []string:
		head()
		list(len(data), func(i int) { s.WriteStringWithHTMLEscaped(data[i]) })
	default:
		s.WriteVal(r)
		return s.Flush()
	}
	if len(r.Warnings) > 0 {
		raw(`,"warnings":`)
		s.WriteVal(r.Warnings)
	}
	if len(r.Infos) > 0 {
		raw(`,"infos":`)
		s.WriteVal(r.Infos)
	}
	raw("}")
	return s.Flush()
}

// writeLabels writes labels as v1.JSONCodec does.
func writeLabels(s *jsoniter.Stream, ls labels.Labels) {
	s.WriteRaw("{")
	first := true
	ls.Range(func(l labels.Label) {
		if !first {
			s.WriteRaw(",")
		}
		first = false
		s.WriteString(l.Name)
		s.WriteRaw(":")
		s.WriteString(l.Value)
	})
	s.WriteRaw("}")
}

// timeTexts are texts of times that points of a matrix have: nearly all of its series have the same.
type timeTexts struct {
	times []int64 // ms, ascending
	text  []byte  // of all, one after the other
	ends  []int   // in text
}

// append appends the text of the k-th time, which is t, and notes it if it is the next one.
func (x *timeTexts) append(b []byte, k int, t int64) []byte {
	switch {
	case k == len(x.times):
		n := len(b)
		b = appendTime(b, t)
		x.times, x.text, x.ends = append(x.times, t), append(x.text, b[n:]...), append(x.ends, len(x.text)+len(b)-n)
		return b
	case x.times[k] != t:
		return appendTime(b, t)
	case k == 0:
		return append(b, x.text[:x.ends[0]]...)
	}
	return append(b, x.text[x.ends[k-1]:x.ends[k]]...)
}

// appendFloats appends points, one or more, as v1.JSONCodec encodes them. times are those of series before; nil:
// nobody will need them again.
func appendFloats(b []byte, ps []promql.FPoint, times *timeTexts) []byte {
	k := 0
	if times != nil {
		k, _ = slices.BinarySearch(times.times, ps[0].T)
	}
	from, to := 0, 0 // where the last value is in b
	for i := range ps {
		p := &ps[i]
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, '[')
		if times == nil {
			b = appendTime(b, p.T)
		} else {
			for k < len(times.times) && times.times[k] < p.T {
				k++
			}
			b = times.append(b, k, p.T)
		}
		b = append(b, `,"`...)
		n := len(b)
		if i > 0 && math.Float64bits(p.F) == math.Float64bits(ps[i-1].F) {
			b = append(b, b[from:to]...)
		} else {
			b = appendFloat(b, p.F)
		}
		from, to = n, len(b)
		b = append(b, `"]`...)
	}
	return b
}

// appendTime appends a time in ms as jsonutil.MarshalTimestamp writes it.
func appendTime(b []byte, t int64) []byte {
	if t < 0 {
		b, t = append(b, '-'), -t
	}
	b = strconv.AppendInt(b, t/1000, 10)
	if ms := t % 1000; ms != 0 {
		b = append(b, '.', byte('0'+ms/100), byte('0'+ms/10%10), byte('0'+ms%10))
	}
	return b
}

// maxWhole bounds whole numbers of which a float tells each from the next.
const maxWhole = 1 << 53

// appendFloat appends a value as jsonutil.MarshalFloat writes it.
func appendFloat(b []byte, v float64) []byte {
	if i := int64(v); float64(i) == v && i != 0 && -maxWhole < i && i < maxWhole {
		return strconv.AppendInt(b, i, 10) // the same text, in less time
	}
	format := byte('f')
	if abs := math.Abs(v); abs != 0 && (abs < 1e-6 || abs >= 1e21) {
		format = 'e'
	}
	return strconv.AppendFloat(b, v, format, -1, 64)
}

// encoder compresses.
type encoder interface {
	io.WriteCloser
	Flush() error
}

// encodings makes encoders, by their names in HTTP.
type encodings struct{ gzip, deflate, zstd sync.Pool }

// encodingOf is the first of those we have that the client names, as Prometheus
// chooses; "" is none.
func encodingOf(r *http.Request) string {
	for name := range strings.SplitSeq(r.Header.Get("Accept-Encoding"), ",") {
		switch name = strings.TrimSpace(name); name {
		case "gzip", "deflate", "zstd":
			return name
		}
	}
	return ""
}

// fastLevel takes a third less CPU than the default for the text of points, and up to a tenth more bytes: it is a large part
// of what an answer takes, and Grafana asks for gzip.
const fastLevel = 3

// open gives an encoder, and what to call after it is closed.
func (e *encodings) open(name string, w io.Writer) (encoder, func()) {
	switch name {
	case "gzip":
		z, ok := e.gzip.Get().(*gzip.Writer)
		if !ok {
			z, _ = gzip.NewWriterLevel(w, fastLevel) // which is valid
		}
		z.Reset(w)
		return z, func() { e.gzip.Put(z) }
	case "deflate":
		z, ok := e.deflate.Get().(*zlib.Writer)
		if !ok {
			z, _ = zlib.NewWriterLevel(w, fastLevel)
		}
		z.Reset(w)
		return z, func() { e.deflate.Put(z) }
	default:
		z, ok := e.zstd.Get().(*zstd.Encoder)
		if !ok {
			var err error
			// One that works in the goroutine that writes, and asks little memory of
			// the client.
			if z, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20), zstd.WithEncoderLevel(zstd.SpeedFastest)); err != nil {
				panic(err) // these options are valid
			}
		}
		z.Reset(w)
		return z, func() { e.zstd.Put(z) }
	}
}

// responseWriter compresses what handlers mark as compressible, which Prometheus's
// do by the header Vary, and puts answers in the place of their tickets.
type responseWriter struct {
	http.ResponseWriter
	answers   *streaming
	encodings *encodings
	encoding  string // that the client takes

	warnings annotations.Annotations // beside those that the handler knows of
	timeout  time.Duration           // of a write: the client takes something meanwhile, or has gone
	until    time.Time               // nothing is written later; zero: there is no such time
	ended    func() error            // why the request has ended, so that an answer that is begun is broken off; nil: it can't

	started bool
	begun   atomic.Bool // an answer that is no error
	broken  bool        // it can't be finished
	encoder encoder     // nil: as it is
	put     func()
}

// warn adds warnings to an answer that isn't begun.
func (w *responseWriter) warn(ws annotations.Annotations) { w.warnings.Merge(ws) }

// Unwrap is for http.ResponseController.
func (w *responseWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader implements http.ResponseWriter.
func (w *responseWriter) WriteHeader(code int) {
	if w.started {
		w.broken = w.broken || code >= http.StatusBadRequest // a handler has an error after it has begun its answer
		return
	}
	w.started = true
	if code >= http.StatusBadRequest {
		w.until, w.ended = time.Time{}, nil // it says that the time is over, or why the request has ended
	} else {
		w.begun.Store(true)
	}
	h := w.Header()
	if w.encoding != "" && slices.Contains(h.Values("Vary"), "Accept-Encoding") {
		h.Set("Content-Encoding", w.encoding)
		h.Del("Content-Length")
		if code != http.StatusNoContent {
			w.encoder, w.put = w.encodings.open(w.encoding, w.patient())
		}
	}
	w.ResponseWriter.WriteHeader(code)
}

// Write implements http.ResponseWriter.
func (w *responseWriter) Write(p []byte) (int, error) {
	if !w.started {
		w.WriteHeader(http.StatusOK)
	}
	out := io.Writer(w.patient())
	if w.encoder != nil {
		out = w.encoder
	}
	if r := w.answers.take(p); r != nil {
		if len(w.warnings) > 0 {
			texts, _ := w.warnings.AsStrings("", 10, 10)
			r.Warnings = append(r.Warnings, texts...)
		}
		if err := encode(out, r); err != nil {
			w.broken = true
			return 0, err
		}
		return len(p), nil
	}
	if w.broken {
		return 0, errBroken
	}
	n, err := out.Write(p)
	w.broken = err != nil
	return n, err
}

// errBroken is for a handler that goes on with an answer that can't be finished.
var errBroken = errors.New("the answer is broken off")

// cut ends a write that waits for the client, once the request has ended.
func (w *responseWriter) cut() {
	if w.begun.Load() { // else there is an error to be told
		_ = http.NewResponseController(w.ResponseWriter).SetWriteDeadline(time.Unix(1, 0)) // it can't: it has none
	}
}

// Flush implements http.Flusher.
func (w *responseWriter) Flush() {
	if !w.started {
		w.WriteHeader(http.StatusOK)
	}
	if w.encoder != nil && w.encoder.Flush() != nil {
		return // the client has gone
	}
	c := http.NewResponseController(w.ResponseWriter)
	_ = w.patient().within(c, func() { _ = c.Flush() }) // it can't: nothing is lost
}

// close ends the answer. One that is broken doesn't end as if it were whole: the connection does.
func (w *responseWriter) close() {
	if w.broken {
		panic(http.ErrAbortHandler)
	}
	if w.encoder == nil {
		return
	}
	if w.encoder.Close() != nil {
		panic(http.ErrAbortHandler)
	}
	w.put()
}

// writeTimeout is how long a client may take for one piece of an answer, of pieceBytes or
// somewhat more. However long the answer, it may go on; but a client that takes nothing
// any more doesn't keep its tenant's place.
const writeTimeout = time.Minute

// patient is a response of which each piece has its own deadline: some handlers write all
// they have at once.
type patient struct {
	http.ResponseWriter
	timeout time.Duration
	until   time.Time    // as in responseWriter
	ended   func() error // likewise
}

func (w *responseWriter) patient() patient {
	return patient{w.ResponseWriter, w.timeout, w.until, w.ended}
}

func (p patient) Write(b []byte) (n int, err error) {
	c := http.NewResponseController(p.ResponseWriter)
	for {
		var k int
		ended := p.within(c, func() { k, err = p.ResponseWriter.Write(b[n:min(len(b), n+pieceBytes)]) })
		if n += k; ended != nil || err != nil || n == len(b) {
			return n, cmp.Or(ended, err)
		}
	}
}

// within writes with a deadline that doesn't outlast it: over HTTP/2 the answer ends when one
// passes, though nothing is being written, and the connection may serve other requests. It
// gives why the request has ended.
func (p patient) within(c *http.ResponseController, write func()) error {
	deadline := time.Now().Add(p.timeout)
	if !p.until.IsZero() && p.until.Before(deadline) {
		deadline = p.until
	}
	_ = c.SetWriteDeadline(deadline) // it can't: it has none
	if p.ended != nil {              // now: what comes later brings the deadline forward
		if err := p.ended(); err != nil {
			return err
		}
	}
	if !time.Now().Before(deadline) {
		return os.ErrDeadlineExceeded // the write may go to a buffer
	}
	write()
	_ = c.SetWriteDeadline(time.Time{})
	return nil
}
