package plan

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

func TestExcerpt(t *testing.T) {
	whole := strings.Repeat("x", excerptBytes)
	require.Equal(t, whole, Excerpt(whole))
	require.Equal(t, whole+"… (1 more bytes)", Excerpt(whole+"y"))
	for n := 1; n < 8; n++ {
		text := Excerpt(strings.Repeat("x", excerptBytes-n) + strings.Repeat("𝛑", 1000))
		require.True(t, utf8.ValidString(text), n)
		kept := excerptBytes - n + n/4*4
		require.Equal(t, strings.Repeat("x", excerptBytes-n)+strings.Repeat("𝛑", n/4), text[:kept])
		require.True(t, strings.HasPrefix(text[kept:], "… ("), text[kept:])
	}
	// What isn't UTF-8 is bounded too.
	require.Less(t, len(Excerpt(strings.Repeat("\x80", 1<<20))), excerptBytes+100)
}
