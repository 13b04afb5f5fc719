package main

import (
	"context"
	"errors"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/test/bufconn"
)

// TestOutOfReach: an ingester or a gateway that was out of reach for long is asked again within
// seconds when it isn't any more.
func TestOutOfReach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := bufconn.Listen(64 << 10)
		server := grpc.NewServer()
		grpc_health_v1.RegisterHealthServer(server, health.NewServer())
		served := make(chan error, 1)
		go func() { served <- server.Serve(l) }()
		back := time.Now().Add(10 * time.Minute)
		p := &process{asClient: insecure.NewCredentials()}
		conn, err := grpc.NewClient("passthrough:x", append(p.dialOptions(), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			if time.Now().Before(back) {
				return nil, errors.New("no route to host")
			}
			return l.DialContext(ctx)
		}))...)
		if err != nil {
			t.Fatal(err)
		}
		for { // somebody asks all the time
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			_, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
			cancel()
			if err == nil {
				break
			}
			if time.Since(back) > 10*time.Second {
				t.Errorf("%s after it can be reached: %v", time.Since(back), err)
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		conn.Close()
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}
