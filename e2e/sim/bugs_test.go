package sim

import (
	"github.com/epimetheus-tsdb/epimetheus/ingest"
	"github.com/epimetheus-tsdb/epimetheus/ingest/ship/shippb"
)

// bug is a mistake that is put back into the write path. A nil bug is none.
type bug struct{}

func (b *bug) publish(_ *node, next ingest.Publish) ingest.Publish { return next }

func (b *bug) ack(*node, *session, *shippb.Ack) {}

func (b *bug) prepare(*world) {}

// wait until what the bug has started has ended.
func (b *bug) wait() {}
