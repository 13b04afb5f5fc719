package chunkfmt

import (
	"errors"
	"fmt"

	"github.com/epimetheus-tsdb/epimetheus/chunkfmt/codec"
)

var (
	// ErrCorrupt says that bytes are not what this package wrote: a checksum
	// does not match, a count or length passes its bound, or a field has a
	// value that the format does not allow.
	ErrCorrupt = codec.ErrCorrupt

	// ErrVersion says that bytes were written by a later, unknown version of
	// the format.
	ErrVersion = errors.New("unknown block format version")

	// ErrOrder says that a Writer was given a series or sample out of order.
	ErrOrder = errors.New("out of order")

	// ErrInvalid says that a Writer was given a series that the format can't
	// hold: columns of unequal length, a histogram whose spans and buckets do
	// not fit each other, an empty label name.
	ErrInvalid = errors.New("invalid series")
)

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}
