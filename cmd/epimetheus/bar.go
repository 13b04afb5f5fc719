package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"strings"
)

// bar draws on a terminal how far something is, and nothing elsewhere.
type bar struct {
	w        io.Writer
	terminal bool
	drawn    bool
}

func newBar(f *os.File) *bar {
	fi, err := f.Stat()
	return &bar{w: f, terminal: err == nil && fi.Mode()&os.ModeCharDevice != 0}
}

// draw shows a share, 0 to 1, and a text.
func (b *bar) draw(done float64, text string) {
	if !b.terminal {
		return
	}
	const width = 40
	n := int(math.Round(done * width))
	fmt.Fprintf(b.w, "\r[%s%s] %3.0f %%  %s\x1b[K", strings.Repeat("#", n), strings.Repeat(".", width-n), 100*done, text)
	b.drawn = true
}

// clear removes it, so that a line can be printed.
func (b *bar) clear() {
	if b.drawn {
		fmt.Fprint(b.w, "\r\x1b[K")
		b.drawn = false
	}
}

// end leaves it as it is.
func (b *bar) end() {
	if b.drawn {
		fmt.Fprintln(b.w)
		b.drawn = false
	}
}
