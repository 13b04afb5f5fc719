//go:build !linux

package testenv

import "syscall"

func processAttr() *syscall.SysProcAttr { return nil }
