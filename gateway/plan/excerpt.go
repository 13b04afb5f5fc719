package plan

import (
	"fmt"
	"unicode/utf8"
)

// excerptBytes is how much of a text of a request goes to logs.
const excerptBytes = 2 << 10

// Excerpt is a text of a request, such as a query, as logs have it: a long one is cut, between
// characters, and says how many bytes are left out. Requests may have megabytes.
func Excerpt(text string) string {
	if len(text) <= excerptBytes {
		return text
	}
	end := excerptBytes
	for end > excerptBytes-utf8.UTFMax && !utf8.RuneStart(text[end]) {
		end--
	}
	return fmt.Sprintf("%s… (%d more bytes)", text[:end], len(text)-end)
}
