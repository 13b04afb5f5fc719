package codec

import (
	"encoding/binary"
)

// A column of timestamps is a varint, the first of them; a uvarint, the step of
// the grid; a byte of flags; and then, as the flags say, the stretches into
// which gaps cut the grid, and how far timestamps lie off it.
const (
	timesStretches = 1 // a uvarint count and, but for the last, a uvarint length and a uvarint shift of the grid each
	timesSparse    = 2 // a uvarint count, a column of distances between exceptions, a column of how far they lie off
	timesDense     = 4 // a column of how far each timestamp lies off
)

// AppendTimes appends an encoding of timestamps in strictly ascending order to
// dst.
func (e *Encoder) AppendTimes(dst []byte, t []int64) []byte {
	if len(t) == 0 {
		return dst
	}
	step := commonStep(t)
	dst = binary.AppendVarint(dst, t[0])
	dst = binary.AppendUvarint(dst, uint64(step))
	var stretches []byte
	count, from := 1, 0
	res := append(e.residuals[:0], 0)
	off := 0
	grid := t[0]
	for i := 1; i < len(t); i++ {
		grid += step
		r := t[i] - grid
		// A new stretch: after a gap, or where the phase has shifted for good.
		if r > step/2 || r > 0 && i+3 < len(t) && steady(t[i:i+4], step) {
			if count == 1<<10 {
				// Not a grid.
				return e.appendIrregular(dst, t, step)
			}
			stretches = binary.AppendUvarint(stretches, uint64(i-from))
			stretches = binary.AppendUvarint(stretches, uint64(r))
			count, from, grid, r = count+1, i, t[i], 0
		}
		if r != 0 {
			off++
		}
		res = append(res, r)
	}
	e.residuals = res
	if 8*count > len(t)+16 {
		return e.appendIrregular(dst, t, step)
	}
	flags := byte(0)
	if count > 1 {
		flags |= timesStretches
	}
	switch {
	case off > len(t)/4:
		flags |= timesDense
	case off > 0:
		flags |= timesSparse
	}
	dst = append(dst, flags)
	if count > 1 {
		dst = binary.AppendUvarint(dst, uint64(count))
		dst = append(dst, stretches...)
	}
	switch {
	case flags&timesDense != 0:
		dst = e.AppendInts(dst, res)
	case flags&timesSparse != 0:
		var gaps, by []int64
		next := 0
		for i, r := range res {
			if r != 0 {
				gaps, by = append(gaps, int64(i-next)), append(by, r)
				next = i + 1
			}
		}
		dst = binary.AppendUvarint(dst, uint64(off))
		dst = e.appendPlain(dst, gaps, unknown)
		dst = e.appendPlain(dst, by, unknown)
	}
	return dst
}

// appendIrregular goes on after the step for timestamps that lie on no grid.
func (e *Encoder) appendIrregular(dst []byte, t []int64, step int64) []byte {
	res := e.residuals[:0]
	for i := range t {
		res = append(res, t[i]-(t[0]+int64(i)*step))
	}
	e.residuals = res
	return e.AppendInts(append(dst, timesDense), res)
}

func steady(t []int64, step int64) bool {
	for i := 1; i < len(t); i++ {
		if t[i]-t[i-1] != step {
			return false
		}
	}
	return true
}

// commonStep is the distance that most neighbours have, found by majority vote,
// or else a typical one.
func commonStep(t []int64) int64 {
	var step int64
	votes := 0
	for i := 1; i < len(t); i++ {
		d := t[i] - t[i-1]
		switch {
		case d == step:
			votes++
		case votes == 0:
			step, votes = d, 1
		default:
			votes--
		}
	}
	if votes == 0 && len(t) > 1 {
		step = t[len(t)/2] - t[len(t)/2-1]
	}
	if step < 0 || step > 1<<50 { // the distance overflows or is no use
		return 0
	}
	return step
}

// Times appends n timestamps, at most MaxLen, to dst and returns the bytes
// behind them. They may be in any order if the bytes are not of AppendTimes.
func (d *Decoder) Times(dst []int64, b []byte, n int) (out []int64, rest []byte, err error) {
	out, t, err := grow(dst, n)
	if err != nil || n == 0 {
		return out, b, err
	}
	first, k := binary.Varint(b)
	if k <= 0 {
		return dst, nil, ErrCorrupt
	}
	b = b[k:]
	ustep, k := binary.Uvarint(b)
	if k <= 0 || len(b) <= k {
		return dst, nil, ErrCorrupt
	}
	step, flags := int64(ustep), b[k]
	b = b[k+1:]
	if flags&^(timesStretches|timesSparse|timesDense) != 0 || flags&timesSparse != 0 && flags&timesDense != 0 {
		return dst, nil, ErrCorrupt
	}
	fill := t
	if flags&timesStretches != 0 {
		count, k := binary.Uvarint(b)
		if k <= 0 || count < 1 || count > uint64(n) {
			return dst, nil, ErrCorrupt
		}
		b = b[k:]
		for range count - 1 {
			length, k := binary.Uvarint(b)
			if k <= 0 || length < 1 || length >= uint64(len(fill)) {
				return dst, nil, ErrCorrupt
			}
			shift, k2 := binary.Uvarint(b[k:])
			if k2 <= 0 {
				return dst, nil, ErrCorrupt
			}
			b = b[k+k2:]
			first = grid(fill[:length], first, step) + int64(shift)
			fill = fill[length:]
		}
	}
	grid(fill, first, step)
	switch {
	case flags&timesDense != 0:
		if d.ints64, fill, err = grow(d.ints64[:0], n); err != nil {
			return dst, nil, err
		}
		if b, err = d.ints(fill, b, levelAny); err != nil {
			return dst, nil, err
		}
		for i, r := range fill {
			t[i] += r
		}
	case flags&timesSparse != 0:
		if b, err = d.sparse(t, b); err != nil {
			return dst, nil, err
		}
	}
	return out, b, nil
}

// grid fills t and returns what would come next.
func grid(t []int64, first, step int64) int64 {
	for len(t) >= 4 {
		o := (*[4]int64)(t)
		o[0] = first
		o[1] = first + step
		o[2] = first + 2*step
		o[3] = first + 3*step
		first += 4 * step
		t = t[4:]
	}
	for i := range t {
		t[i] = first
		first += step
	}
	return first
}

func (d *Decoder) sparse(t []int64, b []byte) (rest []byte, err error) {
	count, k := binary.Uvarint(b)
	if k <= 0 || count > uint64(len(t)) {
		return nil, ErrCorrupt
	}
	var gaps, by []int64
	if d.values, by, err = grow(d.values[:0], int(count)); err != nil {
		return nil, err
	}
	if d.lens, gaps, err = grow(d.lens[:0], int(count)); err != nil {
		return nil, err
	}
	if b, err = d.ints(gaps, b[k:], levelPlain); err != nil {
		return nil, err
	}
	if b, err = d.ints(by, b, levelPlain); err != nil {
		return nil, err
	}
	for i, gap := range gaps {
		if uint64(gap) >= uint64(len(t)) {
			return nil, ErrCorrupt
		}
		t[gap] += by[i]
		t = t[gap+1:]
	}
	return b, nil
}
