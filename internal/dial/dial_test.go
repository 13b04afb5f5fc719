package dial_test

import (
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/epimetheus-tsdb/epimetheus/internal/dial"
)

// There is one connection for each address, for as long as the address is listed.
func TestConns(t *testing.T) {
	c := dial.New(slog.New(slog.DiscardHandler), grpc.WithTransportCredentials(insecure.NewCredentials()))
	list := map[string]bool{"a:1": true, "b:1": true}
	to := func(address string) *grpc.ClientConn {
		t.Helper()
		conn, err := c.To(address, func(a string) bool { return list[a] })
		require.NoError(t, err)
		return conn
	}
	a, b := to("a:1"), to("b:1")
	require.Same(t, a, to("a:1"))
	delete(list, "a:1")
	require.Same(t, b, to("b:1"))
	require.Equal(t, connectivity.Shutdown, a.GetState())
	require.NotEqual(t, connectivity.Shutdown, b.GetState())
	gone := to("a:1") // asked for all the same
	require.NotSame(t, a, gone)
	require.Same(t, gone, to("a:1"))
	require.NoError(t, c.Close())
	require.Equal(t, connectivity.Shutdown, b.GetState())
	_, err := c.To("b:1", func(string) bool { return true })
	require.ErrorIs(t, err, dial.ErrClosed)
}
