//go:build unix

package sidecar

import (
	"os"
	"syscall"
)

// inode returns the inode number of a file, 0 if it has none to be had.
func inode(path string) uint64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return 0
}
