package backfill

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/epimetheus-tsdb/epimetheus/sidecar/tail"
)

// WBLSegments returns the first and the last segment of the out-of-order log, -1
// and -1 if there are none, and whether there is nothing in them. Prometheus makes
// the log when it accepts out-of-order samples for the first time, begins a segment
// with each out-of-order compaction, and removes those before it when the blocks
// are there.
func WBLSegments(dir *tail.Dir) (first, last int, empty bool, err error) {
	dir = dir.OutOfOrder()
	first, last, err = dir.Segments()
	if err != nil {
		return -1, -1, false, fmt.Errorf("out-of-order log: %w", err)
	}
	if last < 0 {
		return -1, -1, true, nil
	}
	size, err := dir.Size(tail.Position{Segment: first})
	if err != nil {
		return -1, -1, false, fmt.Errorf("out-of-order log: %w", err)
	}
	return first, last, size == 0, nil
}

// ReadWBL gives fn the records of the out-of-order log that are there now: samples,
// histograms and float histograms that Prometheus accepted late, with the refs of
// the WAL, oldest record first. A batch is valid until fn returns; its positions
// are those of the out-of-order log. A log that isn't there has no records. A torn
// record at the end, which Prometheus may be writing, is left for the next time;
// segments that go meanwhile are in blocks, and passed over.
//
// What the log holds was in the WAL too, and before: Prometheus logs a sample there
// first, and finds out later that it is out of order.
func ReadWBL(ctx context.Context, dir *tail.Dir, logger *slog.Logger, metrics *tail.Metrics, fn func(*tail.Batch) error) error {
	dir = dir.OutOfOrder()
	first, last, err := dir.Segments()
	if err != nil {
		return fmt.Errorf("out-of-order log: %w", err)
	}
	if last < 0 {
		return nil
	}
	files, err := tail.NewFiles(dir, "", 0, logger, metrics)
	if err != nil {
		return fmt.Errorf("out-of-order log: %w", err)
	}
	defer files.Close()
	t := tail.New(files, tail.Position{Segment: first}, logger.With("log", "wbl"), metrics)
	// A tail believes in a corruption only when it has read it several times, and
	// says io.EOF meanwhile.
	for eofs := 0; eofs < 4; {
		if err := ctx.Err(); err != nil {
			return err
		}
		b, err := t.Next()
		var jump *tail.BreakError
		switch {
		case errors.As(err, &jump) && !jump.Moved():
			continue // a record that it can't read
		case errors.Is(err, io.EOF), errors.Is(err, os.ErrNotExist), jump != nil:
			eofs++
			continue
		case err != nil:
			return fmt.Errorf("out-of-order log: %w", err)
		case b.From.Epoch > 0 || b.From.Segment > last:
			return nil // written since
		}
		eofs = 0
		if len(b.Samples) == 0 && len(b.Histograms) == 0 && len(b.FloatHistograms) == 0 {
			continue
		}
		if err := fn(b); err != nil {
			return err
		}
	}
	return nil
}
