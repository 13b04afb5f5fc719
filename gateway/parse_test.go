package gateway

import (
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"
)

// TestBounded: what would end a process, for lack of stack or memory, is refused before it is parsed.
func TestBounded(t *testing.T) {
	p := boundedParser{parser.NewParser(parser.Options{})}
	many := func(s string, n int) string { return strings.Repeat(s, n) }
	balanced := "up"
	for range 13 {
		balanced = "(" + balanced + "+" + balanced + ")"
	}
	const depth, parts, patterns = "is nested some", "operators and brackets", "regular expressions are too large"
	for _, c := range []struct{ text, want string }{
		{many("(", 1900) + "1" + many(")", 1900), ""},
		{many("(", 2100) + "1" + many(")", 2100), depth},
		{many("(", 2100), depth},
		{many("-", 2100) + "up", depth},
		{many("abs(", 2100) + "up" + many(")", 2100), depth},
		{"up" + many("+up", 2100), depth},
		{"up" + many(" oR up", 2100), depth},
		{"up" + many(" unless up", 2100), depth},
		{"up" + many(" # and or (\n", 2100), ""},
		{"up" + many(" ==up", 1900), ""},
		{"up" + many("[5m:1m]", 2100), depth},
		{"(up" + many("+(up+up)", 2100) + ")", depth},
		{many("max(", 1000) + "1" + many("+1", 1100) + many(")", 1000), depth},
		{`label_join(up, "a", ","` + many(`, "b"`, 5000) + ")", ""},
		{`{a="(((((((((", b='\'((((', c=` + "`((\\`" + `}`, ""},
		{`{a="` + many("(", 3000) + `"}`, ""},
		{balanced, ""}, // 8,192 selectors
		{"(" + balanced + "+" + balanced + ")", parts},
		{`{a=~"(?:` + many("ab", 500) + `){1000}"}`, patterns},
		{`{a=~"(?:` + many("ab", 500) + `)\x7b1000}"}`, patterns},
		{`{a=~"(?:` + many("ab", 100) + `){1000}"} + {a!~"(?:` + many("ab", 100) + `){1000}"} or {a!~"(?:` + many("ab", 100) + `){1000}"}`, patterns},
		{`label_replace(up, "a", "$1", "b", '(` + many("ab", 500) + `){1000}')`, patterns},
		{`{a=~"` + many(`\\pL`, 2000) + `"}`, patterns},
		{`{a=~"` + many(`host-1|`, 200_000) + `x"}`, ""},
		{`{a=~"` + many(`10\\.0\\.0\\.1:9100|`, 20_000) + `x"}`, ""},
		{`{a=~"` + many(`10\\.0\\.0\\.1:9100|`, 40_000) + `x"}`, patterns},
	} {
		_, err := p.ParseExpr(c.text)
		got := ""
		if err != nil {
			got = err.Error()
		}
		if c.want == "" && err != nil || !strings.Contains(got, c.want) {
			t.Errorf("%.80s: %.200s, want %q", c.text, got, c.want)
		}
	}
	selectors := make([]string, maxSelectors+1)
	for i := range selectors {
		selectors[i] = `{a=~"x{100}"}`
	}
	if _, err := p.ParseMetricSelectors(selectors); err == nil || !strings.Contains(err.Error(), "1001 selectors, the limit is 1000") {
		t.Error(err)
	}
	if _, err := p.ParseMetricSelectors(selectors[1:]); err != nil {
		t.Error(err)
	}
	for i := range selectors {
		selectors[i] = `{a=~"x{1000}"}`
	}
	if _, err := p.ParseMetricSelectors(selectors[1:]); err == nil || !strings.Contains(err.Error(), patterns) {
		t.Error(err)
	}
}

// FuzzBounded: the bound on depth is one, for whatever can be parsed.
func FuzzBounded(f *testing.F) {
	for _, text := range []string{
		`sum by (job) (rate(x{a="b",c=~"d|e"}[5m] offset -1m)) / on(job) group_left() -(up) @ 5 > bool 1 or vector(1)`,
		`max_over_time((up + -up)[5m:1m])[1h:]`, "up # x ( \n or up", `label_replace(up, 'a', "\"", "b", ` + "`\\`" + `)`, "1 ^ -2 ^ 3 atan2 4 != 5 unless 6 =",
	} {
		f.Add(text)
	}
	p := parser.NewParser(parser.Options{EnableExperimentalFunctions: true, EnableUnquotedUTF8Names: true, EnableBinopFillModifiers: true})
	f.Fuzz(func(t *testing.T, text string) {
		s := scanner{text: text}
		s.scan()
		e, err := p.ParseExpr(text)
		if err != nil {
			return
		}
		depth := 0
		parser.Inspect(e, func(_ parser.Node, path []parser.Node) error {
			depth = max(depth, len(path))
			return nil
		})
		// A node of the tree is an operator, a bracket, or is of a selector or a number.
		if depth > 2*s.depth+4 {
			t.Errorf("%q: %d deep, bounded by %d", text, depth, s.depth)
		}
	})
}
