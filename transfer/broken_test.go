package transfer

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDamaged imports blocks that are cut off, or have bytes that are others, at any
// place: what can't be read is a fault or a failure that names the block, never a panic.
func TestDamaged(t *testing.T) {
	dir := writeBlocks(t, false, [2]int64{t0, t0 + 2*hour})
	block := folders(t, dir)[0]
	r := rand.New(rand.NewPCG(1, 1))
	n := 60
	if testing.Short() {
		n = 12
	}
	for i := range n {
		for _, file := range []string{"index", "chunks/000001", "tombstones"} {
			bad := filepath.Join(t.TempDir(), filepath.Base(block))
			if err := os.CopyFS(bad, os.DirFS(block)); err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(bad, file)
			raw, err := os.ReadFile(name)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			what := ""
			switch at := r.IntN(len(raw)); i % 4 {
			case 0:
				what, raw = fmt.Sprintf("cut off at %d of %d", at, len(raw)), raw[:at]
			case 1:
				what = fmt.Sprintf("a bit at %d of %d", at, len(raw))
				raw[at] ^= 1 << r.IntN(8)
			case 2:
				what = fmt.Sprintf("zeros from %d on of %d", at, len(raw))
				clear(raw[at:])
			default:
				what = fmt.Sprintf("noise at %d of %d", at, len(raw))
				for k := at; k < min(len(raw), at+64); k++ {
					raw[k] = byte(r.IntN(256))
				}
			}
			if err := os.WriteFile(name, raw, 0o600); err != nil {
				t.Fatal(err)
			}
			w := localWorld(t)
			res, events := imports(t, w.options(t, Directory(filepath.Dir(bad))))
			if res.OK() && i%4 == 0 && file == "index" {
				t.Errorf("%s %s: imported", file, what)
			}
			for _, e := range events {
				if e.Err != nil && !strings.Contains(e.Err.Error(), filepath.Base(block)) {
					t.Errorf("%s %s: %v", file, what, e.Err)
				}
			}
		}
	}
}
