package testenv

import "syscall"

// processAttr lets the kernel end a server whose test process was killed.
func processAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
