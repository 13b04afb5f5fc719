package ingest

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/epimetheus-tsdb/epimetheus/ingest/head"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// Bounds on the refusals that a session keeps.
const (
	maxRefused = 256
	maxReasons = 16  // of a batch: more than there are
	maxExample = 256 // bytes of the text of a series
)

// refusals are what was refused of a batch, as the protocol has it.
func refusals(seq uint64, refused map[head.Reason]head.Refusal) []*shippb.Refused {
	var out []*shippb.Refused
	for _, reason := range slices.Sorted(maps.Keys(refused)) {
		r := refused[reason]
		out = append(out, &shippb.Refused{Seq: seq, Reason: string(reason), Samples: uint64(r.Samples), Example: example(r.Example)})
	}
	return out
}

// example is the text of a series, or of a long one the beginning of its name.
func example(ls labels.Labels) string {
	if ls.ByteSize() <= maxExample {
		return ls.String()
	}
	name := ls.Get(model.MetricNameLabel)
	return strings.ToValidUTF8(name[:min(len(name), maxExample)], "") + "…"
}

// untold are refusals of a session that its source may not have heard of. It has
// once it has been told that the batch is received: that comes with them, or later.
type untold struct {
	list   []*shippb.Refused // ascending in Seq, at most maxRefused
	said   int               // of list, on the present stream
	unsure uint64            // some of batches up to this one are forgotten, heard of or not
}

// add keeps refusals of the newest batch.
func (u *untold) add(rs []*shippb.Refused) {
	u.list = append(u.list, rs...)
	n := len(u.list) - maxRefused
	if n <= 0 {
		return
	}
	u.unsure = u.list[n-1].Seq
	u.said = max(0, u.said-n)
	u.list = slices.Delete(u.list, 0, n)
}

// room says whether refusals of another batch can be added without forgetting what
// was not said yet on the present stream.
func (u *untold) room() bool { return len(u.list)-u.said <= maxRefused-maxReasons }

// say gives what was not said yet on the present stream, and takes it for said.
func (u *untold) say() []*shippb.Refused {
	out := slices.Clone(u.list[u.said:])
	u.said = len(u.list)
	return out
}

// resume prepares for a stream whose source has been told that batches up to
// received are received. It is false if what was refused behind them isn't known.
func (u *untold) resume(received uint64) bool {
	if received < u.unsure {
		return false
	}
	u.list = slices.DeleteFunc(u.list, func(r *shippb.Refused) bool { return r.Seq <= received })
	u.said = 0
	return true
}

// before bounds what a welcome says as received or durable: less than the first
// batch of which something was refused, since a welcome tells no refusals.
func (u *untold) before(seq uint64) uint64 {
	if len(u.list) > 0 {
		return min(seq, u.list[0].Seq-1)
	}
	return seq
}

// awaitRoom waits until the source has been told of refusals, where many are untold.
func (s *session) awaitRoom(ctx context.Context) error {
	end := time.Now().Add(silenceLimit)
	for {
		s.mu.Lock()
		room := s.untold.room()
		s.mu.Unlock()
		if room {
			return nil
		}
		if time.Now().After(end) {
			return status.Errorf(codes.DeadlineExceeded, "acknowledgements have not been read for %s", silenceLimit)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(ackEvery):
		}
	}
}
