package gateway

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"regexp/syntax"
	"strings"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/prompb"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/storage/remote"
	"github.com/prometheus/prometheus/util/strutil"
)

// Bounds on what a query says, whatever it reads. Prometheus has none: there a query that is
// nested a hundred thousand times ends the process, for lack of stack, and a pattern of a
// kilobyte, such as (?:…){1000}, takes 40 MiB.
const (
	maxDepth     = 2000    // of expressions in each other; the engine's time goes with its square
	maxParts     = 20_000  // operators and brackets
	maxSelectors = 1000    // match[] of a request
	maxPatterns  = 1 << 19 // instructions of all regular expressions, of 40 bytes each
)

// boundedParser is a parser.Parser of texts within the bounds.
type boundedParser struct{ parser.Parser }

// ParseExpr implements parser.Parser.
func (p boundedParser) ParseExpr(input string) (parser.Expr, error) {
	if err := bounded(input); err != nil {
		return nil, err
	}
	return p.Parser.ParseExpr(input)
}

// ParseMetricSelector implements parser.Parser.
func (p boundedParser) ParseMetricSelector(input string) ([]*labels.Matcher, error) {
	if err := bounded(input); err != nil {
		return nil, err
	}
	return p.Parser.ParseMetricSelector(input)
}

// ParseMetricSelectors implements parser.Parser.
func (p boundedParser) ParseMetricSelectors(inputs []string) ([][]*labels.Matcher, error) {
	if len(inputs) > maxSelectors {
		return nil, fmt.Errorf("%d selectors, the limit is %d", len(inputs), maxSelectors)
	}
	if err := bounded(inputs...); err != nil {
		return nil, err
	}
	return p.Parser.ParseMetricSelectors(inputs)
}

// boundedRead is bounded for a remote read: the request, with its body read once.
func boundedRead(r *http.Request) (*http.Request, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	again := func() *http.Request {
		out := *r
		out.Body = io.NopCloser(bytes.NewReader(body))
		return &out
	}
	req, err := remote.DecodeReadRequest(again())
	if err != nil {
		return again(), nil //nolint:nilerr // the handler says so
	}
	patterns := 0
	for _, q := range req.Queries {
		for _, m := range q.Matchers {
			if m.Type == prompb.LabelMatcher_RE || m.Type == prompb.LabelMatcher_NRE {
				patterns += patternSize(m.Value)
			}
		}
	}
	return again(), boundedPatterns(patterns)
}

func boundedPatterns(n int) error {
	if n <= maxPatterns {
		return nil
	}
	return fmt.Errorf("regular expressions are too large: some %d instructions, the limit is %d", n, maxPatterns)
}

// bounded says how texts go beyond the bounds, if they do. What isn't PromQL is for the
// parser to find.
func bounded(texts ...string) error {
	patterns := 0
	for _, text := range texts {
		s := scanner{text: text}
		s.scan()
		patterns += s.patterns
		switch {
		case s.depth > maxDepth:
			return fmt.Errorf("the query is nested some %d times, the limit is %d: operators in a row count, too", s.depth, maxDepth)
		case s.parts > maxParts:
			return fmt.Errorf("the query has some %d operators and brackets, the limit is %d", s.parts, maxParts)
		case patterns > maxPatterns:
			return boundedPatterns(patterns)
		}
	}
	return nil
}

// group is what stands between two brackets.
type group struct {
	operators int // since the last comma, each of which may be nested in the next one
	inner     int // depth of the deepest group since then
	depth     int // the deepest so far
}

func (g *group) next() {
	g.depth = max(g.depth, g.operators+g.inner)
	g.operators, g.inner = 0, 0
}

// scanner finds in one pass how deep the tree of a query may be at the most, and how large its
// regular expressions are.
type scanner struct {
	text   string
	groups []group // those that are open

	depth, parts, patterns int
}

func (s *scanner) scan() {
	s.groups = []group{{}}
	for i := 0; i < len(s.text); {
		top := &s.groups[len(s.groups)-1]
		c := s.text[i]
		begin := i
		i++
		switch c {
		case '#':
			for i < len(s.text) && s.text[i] != '\n' {
				i++
			}
		case '"', '\'', '`':
			for i < len(s.text) && s.text[i] != c {
				if s.text[i] == '\\' && c != '`' {
					i++
				}
				i++
			}
			i = min(i+1, len(s.text))
			s.string(s.text[begin:i])
		case '(', '[', '{':
			s.parts++
			if c == '[' {
				top.operators++ // of what stands before
			}
			s.groups = append(s.groups, group{})
		case ')', ']', '}':
			if len(s.groups) > 1 {
				s.close()
			}
		case ',':
			top.next()
		case '=':
			if begin == 0 || !strings.ContainsRune("=!<>", rune(s.text[begin-1])) {
				s.operator()
			}
		case '+', '-', '*', '/', '%', '^', '<', '>', '!':
			s.operator()
		default:
			if !isWord(c) {
				break
			}
			for i < len(s.text) && isWord(s.text[i]) {
				i++
			}
			switch strings.ToLower(s.text[begin:i]) {
			case "and", "or", "unless", "atan2":
				s.operator()
			}
		}
	}
	for len(s.groups) > 1 {
		s.close()
	}
	s.groups[0].next()
	s.depth = s.groups[0].depth
}

func (s *scanner) operator() {
	s.parts++
	s.groups[len(s.groups)-1].operators++
}

func (s *scanner) close() {
	n := len(s.groups) - 1
	s.groups[n].next()
	inner := s.groups[n].depth + 1
	s.groups = s.groups[:n]
	s.groups[n-1].inner = max(s.groups[n-1].inner, inner)
}

func isWord(c byte) bool {
	return c == '_' || c == ':' || c >= 0x80 || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// string counts a string, quoted, which is a regular expression in many places.
func (s *scanner) string(quoted string) {
	text, err := strutil.Unquote(quoted)
	if err == nil {
		s.patterns += patternSize(text)
	}
}

// patternSize is about how many instructions a regular expression is compiled to. What is but
// literals, between bars, is not compiled.
func patternSize(text string) int {
	switch {
	case !strings.ContainsAny(text, `\.+*?()[]{}^$`):
		return 0
	case !strings.ContainsAny(text, `{[`) && !strings.Contains(text, `\p`) && !strings.Contains(text, `\P`):
		return len(text) // nothing is repeated, and no class is large
	}
	re, err := syntax.Parse(text, syntax.Perl|syntax.DotNL)
	if err != nil {
		return 0
	}
	return instructions(re)
}

func instructions(re *syntax.Regexp) int {
	n := 1
	switch re.Op {
	case syntax.OpLiteral, syntax.OpCharClass:
		n = len(re.Rune)
	}
	for _, sub := range re.Sub {
		n += instructions(sub)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(1, re.Min, re.Max)
	}
	return n
}
