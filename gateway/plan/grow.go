package plan

import (
	"regexp/syntax"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
)

// need is what the engine takes beside points of samples, whatever it reads: for the steps of
// subqueries, and for labels that functions make longer. It tells of neither before it has
// taken the memory: a subquery of 100 days at a millisecond takes 130 GiB, and of a thousand series
// with labels of some bytes a few of label_replace() with "$1$1$1$1" in each other make 16 GiB.
type need struct {
	steps  float64           // bytes
	labels map[string]growth // that functions make
}

// maxLabels is the longest set of labels that there can be, in bytes: of a longer one the engine
// makes an error.
const maxLabels = 1 << 24

// growth bounds how long a label value is: so many times a value of the series, and so many
// bytes more.
type growth struct{ factor, bytes float64 }

func (g growth) max(o growth) growth {
	return growth{max(g.factor, o.factor), max(g.bytes, o.bytes)}
}

// once is what is needed whatever series there are, in bytes.
func (n *need) once() int64 {
	const most = 1 << 60 // sums of some are far from an overflow
	return int64(min(n.steps, most))
}

// each is what is needed for a series, in bytes.
func (n *need) each(ls labels.Labels) int64 {
	if len(n.labels) == 0 {
		return 0
	}
	longest := 0
	ls.Range(func(l labels.Label) { longest = max(longest, len(l.Value)) })
	all := 0.0
	for _, g := range n.labels {
		all += g.factor*float64(longest) + g.bytes
	}
	return int64(min(all, maxLabels))
}

// needOf looks at an expression that is evaluated at the steps of a grid.
func needOf(e parser.Expr, g Grid, noStep func(rangeMillis int64) int64) *need {
	n := &need{labels: map[string]growth{}}
	n.labelsOf(e)
	n.stepsOf(e, float64(g.End-g.Start), noStep)
	return n
}

// stepsOf counts the steps of subqueries of an expression that is evaluated over so many ms.
func (n *need) stepsOf(e parser.Node, span float64, noStep func(int64) int64) {
	if s, ok := e.(*parser.StepInvariantExpr); ok {
		span = 0
		e = s.Expr
	}
	if s, ok := e.(*parser.SubqueryExpr); ok {
		step := s.Step.Milliseconds()
		if step <= 0 {
			step = noStep(s.Range.Milliseconds())
		}
		span += float64(s.Range / time.Millisecond)
		const counts = 2 * 8 // of samples, at each step
		perStep := float64(counts)
		if len(parser.ExtractSelectors(s.Expr)) == 0 {
			// Of one series: no selector is there to tell of it. While they become more, they are
			// copied.
			perStep += 2 * pointBytes
		}
		n.steps += perStep * span / float64(max(step, 1))
	}
	for c := range parser.ChildrenIter(e) {
		n.stepsOf(c, span, noStep)
	}
}

// labelsOf gives how long labels may be that aren't as they are stored.
func (n *need) labelsOf(e parser.Node) map[string]growth {
	of := func(m map[string]growth, label string) growth {
		if g, ok := m[label]; ok {
			return g
		}
		return growth{factor: 1}
	}
	call, _ := e.(*parser.Call)
	if call == nil || call.Func.Name != "label_replace" && call.Func.Name != "label_join" {
		var out map[string]growth
		for c := range parser.ChildrenIter(e) {
			m := n.labelsOf(c)
			if out == nil {
				out = m
				continue
			}
			for label, g := range m {
				out[label] = of(out, label).max(g)
			}
		}
		return out
	}
	m := n.labelsOf(call.Args[0])
	if m == nil {
		m = map[string]growth{}
	}
	var made growth
	dst := text(call.Args[1])
	if call.Func.Name == "label_replace" && len(call.Args) == 5 {
		replacement := text(call.Args[2])
		k, src := float64(repeats(replacement, text(call.Args[4]))), of(m, text(call.Args[3]))
		made = growth{k * src.factor, k*src.bytes + float64(len(replacement))}
	} else if call.Func.Name == "label_join" && len(call.Args) > 2 {
		for _, a := range call.Args[3:] {
			src := of(m, text(a))
			made.factor += src.factor
			made.bytes += src.bytes + float64(len(text(call.Args[2])))
		}
	}
	n.labels[dst] = n.labels[dst].max(made)
	m[dst] = of(m, dst).max(made)
	return m
}

// text is that of a string literal.
func text(e parser.Expr) string {
	for {
		switch x := e.(type) {
		case *parser.ParenExpr:
			e = x.Expr
		case *parser.StepInvariantExpr:
			e = x.Expr
		case *parser.StringLiteral:
			return x.Val
		default:
			return ""
		}
	}
}

// repeats is how many times a character of a text may be in what a replacement, as of
// regexp.Expand, makes of it: groups beside each other have different ones.
func repeats(replacement, pattern string) int {
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return 0
	}
	names := map[string]int{}
	for i, name := range re.CapNames() {
		if i > 0 && name != "" {
			names[name] = i
		}
	}
	used := map[int]int{} // groups
	for rest := replacement; ; {
		_, after, ok := strings.Cut(rest, "$")
		if !ok {
			break
		}
		if strings.HasPrefix(after, "$") {
			rest = after[1:]
			continue
		}
		name := strings.TrimPrefix(after, "{")
		end := strings.IndexFunc(name, func(r rune) bool { return r < 0x80 && !isWord(byte(r)) })
		if end < 0 {
			end = len(name)
		}
		name, rest = name[:end], name[end:]
		i, err := strconv.Atoi(name)
		if err != nil {
			i, ok = names[name]
		}
		if ok {
			used[i]++
		}
	}
	return used[0] + nested(re, used)
}

func isWord(c byte) bool {
	return c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// nested is the most that groups in each other are used, together.
func nested(re *syntax.Regexp, used map[int]int) int {
	most := 0
	for _, sub := range re.Sub {
		most = max(most, nested(sub, used))
	}
	if re.Op == syntax.OpCapture {
		most += used[re.Cap]
	}
	return most
}
