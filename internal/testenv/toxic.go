package testenv

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// Toxin is what a Toxic does to what passes.
type Toxin int32

// Toxins.
const (
	Pure    Toxin = iota
	Hang          // answers nothing, but keeps connections
	Garbage       // answers each request with what no server says
	Damage        // changes letters in the answers
	Cut           // closes connections
)

// Toxic is a server in front of another that speaks TCP.
type Toxic struct {
	Addr     string
	Requests atomic.Int64 // pieces of requests that have come

	toxin  atomic.Int32
	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

// Set says what it does from now on. Cut cuts at once.
func (x *Toxic) Set(what Toxin) {
	x.toxin.Store(int32(what))
	if what == Cut {
		x.cut()
	}
}

func (x *Toxic) cut() {
	x.mu.Lock()
	defer x.mu.Unlock()
	for c := range x.conns {
		_ = c.Close()
	}
}

// StartToxic starts one in front of target.
func StartToxic(t testing.TB, target string) *Toxic {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	x := &Toxic{Addr: l.Addr().String(), conns: map[net.Conn]struct{}{}}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		x.mu.Lock()
		x.closed = true
		x.mu.Unlock()
		x.cut()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			if Toxin(x.toxin.Load()) == Cut {
				_ = client.Close()
				continue
			}
			server, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", target)
			if err != nil {
				_ = client.Close()
				continue
			}
			x.mu.Lock()
			x.conns[client], x.conns[server] = struct{}{}, struct{}{}
			closed := x.closed
			x.mu.Unlock()
			if closed {
				x.cut()
			}
			wg.Go(func() { x.pass(client, server, true) })
			wg.Go(func() { x.pass(server, client, false) })
		}
	})
	return x
}

// pass copies from one connection to the other until either ends.
func (x *Toxic) pass(from, to net.Conn, request bool) {
	defer func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		for _, c := range []net.Conn{from, to} {
			_ = c.Close()
			delete(x.conns, c)
		}
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if request && n > 0 {
			x.Requests.Add(1)
		}
		b := buf[:n]
		switch Toxin(x.toxin.Load()) {
		case Hang:
			b = nil
		case Garbage:
			if request {
				b = nil
				_, _ = io.WriteString(from, "VALUE of nothing\r\n\x00\xff GARBAGE\r\nVALUE k 0 4294967295\r\n") // the client may be gone
			}
		case Damage:
			if !request {
				b = bytes.ReplaceAll(b, []byte("a"), []byte("b"))
			}
		}
		if len(b) > 0 {
			if _, werr := to.Write(b); werr != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
