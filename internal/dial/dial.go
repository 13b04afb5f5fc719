// Package dial keeps gRPC connections to the members of a list that changes: one for each
// address, made when it is first wanted, and closed when its member has gone.
package dial

import (
	"errors"
	"log/slog"
	"sync"

	"google.golang.org/grpc"
)

// ErrClosed is what Conns give after Close.
var ErrClosed = errors.New("connections are closed")

// Conns are connections by address. They are safe for concurrent use.
type Conns struct {
	options []grpc.DialOption
	logger  *slog.Logger

	mu  sync.Mutex
	all map[string]*grpc.ClientConn // nil once closed
}

// New uses the options for each connection: transport security goes there. Close it after
// use.
func New(logger *slog.Logger, options ...grpc.DialOption) *Conns {
	return &Conns{options: options, logger: logger, all: map[string]*grpc.ClientConn{}}
}

// To gives the connection to an address, and closes those to others that listed doesn't
// have any more: calls on these end. It doesn't wait for the connection to be there.
func (c *Conns) To(address string, listed func(address string) bool) (*grpc.ClientConn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.all == nil {
		return nil, ErrClosed
	}
	for a, conn := range c.all {
		if a == address || listed(a) {
			continue
		}
		if err := conn.Close(); err != nil {
			c.logger.Warn("connection not closed", "addr", a, "err", err)
		}
		delete(c.all, a)
	}
	conn := c.all[address]
	if conn == nil {
		var err error
		if conn, err = grpc.NewClient(address, c.options...); err != nil {
			return nil, err
		}
		c.all[address] = conn
	}
	return conn, nil
}

// Close closes the connections.
func (c *Conns) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, conn := range c.all {
		errs = append(errs, conn.Close())
	}
	c.all = nil
	return errors.Join(errs...)
}
