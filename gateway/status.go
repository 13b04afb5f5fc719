package gateway

import (
	"os"
	"runtime"
	"runtime/debug"
	"time"

	v1 "github.com/prometheus/prometheus/web/api/v1"
)

// runtimeInfo is status/runtimeinfo.
func (a *API) runtimeInfo() (v1.RuntimeInfo, error) {
	host, err := os.Hostname()
	if err != nil {
		host = ""
	}
	cwd, err := os.Getwd()
	if err != nil {
		cwd = ""
	}
	return v1.RuntimeInfo{
		StartTime: a.birth, CWD: cwd, Hostname: host, ServerTime: time.Now().UTC(),
		ReloadConfigSuccess: true, LastConfigTime: a.birth,
		GoroutineCount: runtime.NumGoroutine(), GOMAXPROCS: runtime.GOMAXPROCS(0), GOMEMLIMIT: debug.SetMemoryLimit(-1),
		GOGC: os.Getenv("GOGC"), GODEBUG: os.Getenv("GODEBUG"), StorageRetention: "forever",
	}, nil
}
