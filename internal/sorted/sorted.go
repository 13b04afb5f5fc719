// Package sorted puts sorted lists of names together.
package sorted

import "slices"

// Union gives what is in any of the lists, each of which ascends strictly, as one that does. It
// may be one of them: the caller changes it only if it may change all of them.
func Union(lists ...[]string) []string {
	lists = slices.DeleteFunc(lists, func(l []string) bool { return len(l) == 0 })
	for len(lists) > 1 { // neighbours first: each name is moved as often as the logarithm of their number
		half := lists[:0]
		for i := 0; i < len(lists); i += 2 {
			if i+1 == len(lists) {
				half = append(half, lists[i])
				continue
			}
			half = append(half, union(lists[i], lists[i+1]))
		}
		lists = half
	}
	if len(lists) == 0 {
		return nil
	}
	return lists[0]
}

// union gives one of the two if it has all that the other has.
func union(a, b []string) []string {
	if len(a) < len(b) {
		a, b = b, a
	}
	i, j := 0, 0
	for i < len(a) && j < len(b) && a[i] <= b[j] {
		if a[i] == b[j] {
			j++
		}
		i++
	}
	if j == len(b) {
		return a
	}
	out := append(make([]string, 0, len(a)+len(b)-j), a[:i]...)
	for i < len(a) && j < len(b) {
		switch {
		case a[i] < b[j]:
			out, i = append(out, a[i]), i+1
		case a[i] > b[j]:
			out, j = append(out, b[j]), j+1
		default:
			out, i, j = append(out, a[i]), i+1, j+1
		}
	}
	return append(append(out, a[i:]...), b[j:]...)
}
