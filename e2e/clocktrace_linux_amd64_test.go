package e2e

import (
	endian "encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"
	"unsafe"
)

// A program is run with a wall clock of its own, as it is: under ptrace, by a
// process of the test's binary. The program's threads stop at clock_gettime of the
// wall clock, and nowhere else, by a seccomp filter; the tracer answers in place
// of the kernel. So that Go asks the kernel at all it doesn't get to know of the
// vDSO: its entry in the auxiliary vector is taken out before the program begins.
const (
	canFakeClock = true

	prSetNoNewPrivs   = 38
	prSetSeccomp      = 22
	seccompModeFilter = 2
	retAllow          = 0x7fff0000
	retTrace          = 0x7ff00000
	auditArch         = 0xc000003e // x86-64

	optExitKill     = 1 << 20
	optTraceSeccomp = 1 << 7
	eventSeccomp    = 7

	atNull, atIgnore, atVDSO = 0, 1, 33
)

// traceClock runs a program to its end, and returns its exit code. The offset of its
// wall clock, in ns, is what the 8 bytes of a file say.
func traceClock(file string, args []string) int {
	code, err := runTraced(file, args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "trace clock:", err)
		return 125
	}
	return code
}

func runTraced(file string, args []string) (int, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	offset, err := syscall.Mmap(int(f.Fd()), 0, 8, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("map %s: %w", file, err)
	}
	// All of it must be one thread's: the tracer is a thread. Its own wall clock
	// can't be asked once it has the filter.
	runtime.LockOSThread()
	began := time.Now()
	if err := filterClock(); err != nil {
		return 0, err
	}
	p, err := os.StartProcess(args[0], args, &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}, Sys: &syscall.SysProcAttr{Ptrace: true, Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return 0, err
	}
	leader := p.Pid
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, killTraced)
	go func() {
		for s := range signals { // until the process ends
			if s == killTraced {
				s = syscall.SIGKILL
			}
			_ = syscall.Kill(leader, s.(syscall.Signal))
		}
	}()

	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", leader), os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer mem.Close()
	var st syscall.WaitStatus
	if _, err := syscall.Wait4(leader, &st, syscall.WALL, nil); err != nil || !st.Stopped() {
		return 0, fmt.Errorf("%s didn't stop at its start: %v, %w", args[0], st, err)
	}
	if err := syscall.PtraceSetOptions(leader, optExitKill|optTraceSeccomp|syscall.PTRACE_O_TRACECLONE); err != nil {
		return 0, fmt.Errorf("ptrace options: %w", err)
	}
	if err := hideVDSO(leader, mem); err != nil {
		return 0, err
	}
	if err := syscall.PtraceCont(leader, 0); err != nil {
		return 0, err
	}
	known := map[int]bool{leader: true}
	for {
		pid, err := syscall.Wait4(-1, &st, syscall.WALL, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("wait: %w", err)
		}
		if pid == leader && st.Exited() {
			return st.ExitStatus(), nil
		}
		if pid == leader && st.Signaled() {
			return 128 + int(st.Signal()), nil
		}
		if !st.Stopped() {
			delete(known, pid)
			continue
		}
		sig := 0
		switch {
		case st.StopSignal() == syscall.SIGTRAP && int(st)>>16 == eventSeccomp:
			now := began.Add(time.Since(began)).UnixNano() + int64(endian.LittleEndian.Uint64(offset))
			if err := answerClock(pid, mem, now); err != nil && !errors.Is(err, syscall.ESRCH) {
				return 0, fmt.Errorf("answer: %w", err)
			}
		case st.StopSignal() == syscall.SIGTRAP: // a thread was begun
		case st.StopSignal() == syscall.SIGSTOP && !known[pid]:
			known[pid] = true // it begins
		default:
			sig = int(st.StopSignal())
		}
		if err := syscall.PtraceCont(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return 0, fmt.Errorf("continue: %w", err)
		}
	}
}

// filterClock makes clock_gettime(CLOCK_REALTIME) of what this thread begins a stop.
func filterClock() error {
	ld := func(at uint32) syscall.SockFilter {
		return syscall.SockFilter{Code: syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS, K: at}
	}
	unless := func(v uint32, skip uint8) syscall.SockFilter {
		return syscall.SockFilter{Code: syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K, K: v, Jf: skip}
	}
	ret := func(v uint32) syscall.SockFilter {
		return syscall.SockFilter{Code: syscall.BPF_RET | syscall.BPF_K, K: v}
	}
	prog := []syscall.SockFilter{
		ld(4), unless(auditArch, 5), // architecture
		ld(0), unless(syscall.SYS_CLOCK_GETTIME, 3),
		ld(16), unless(0, 1), // the first argument
		ret(retTrace),
		ret(retAllow),
	}
	fprog := syscall.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, prSetNoNewPrivs, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("no new privileges: %w", errno)
	}
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, prSetSeccomp, seccompModeFilter, uintptr(unsafe.Pointer(&fprog)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("seccomp filter: %w", errno)
	}
	runtime.KeepAlive(prog)
	return nil
}

// hideVDSO takes the vDSO out of the auxiliary vector of a program that is about to
// begin. On its stack are argc, arguments, 0, environment, 0, and the vector.
func hideVDSO(pid int, mem *os.File) error {
	var regs syscall.PtraceRegs
	if err := syscall.PtraceGetRegs(pid, &regs); err != nil {
		return fmt.Errorf("registers: %w", err)
	}
	at := int64(regs.Rsp)
	word := func() (uint64, error) {
		var b [8]byte
		if _, err := mem.ReadAt(b[:], at); err != nil {
			return 0, fmt.Errorf("stack: %w", err)
		}
		at += 8
		return endian.LittleEndian.Uint64(b[:]), nil
	}
	if _, err := word(); err != nil {
		return err
	}
	for zeros := 0; zeros < 2; {
		w, err := word()
		if err != nil {
			return err
		}
		if w == 0 {
			zeros++
		}
	}
	for {
		key, err := word()
		if err != nil {
			return err
		}
		switch key {
		case atNull:
			return errors.New("no vDSO in the auxiliary vector")
		case atVDSO:
			var b [8]byte
			endian.LittleEndian.PutUint64(b[:], atIgnore)
			_, err := mem.WriteAt(b[:], at-8)
			return err
		}
		at += 8
	}
}

// answerClock gives a thread that is about to ask the kernel for the time an answer
// in its place.
func answerClock(pid int, mem *os.File, ns int64) error {
	var regs syscall.PtraceRegs
	if err := syscall.PtraceGetRegs(pid, &regs); err != nil {
		return err
	}
	var b [16]byte
	endian.LittleEndian.PutUint64(b[:], uint64(ns/1e9))
	endian.LittleEndian.PutUint64(b[8:], uint64(ns%1e9))
	if _, err := mem.WriteAt(b[:], int64(regs.Rsi)); err != nil {
		return err
	}
	regs.Orig_rax, regs.Rax = ^uint64(0), 0 // no call at all
	return syscall.PtraceSetRegs(pid, &regs)
}
