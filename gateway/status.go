package gateway

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"time"

	v1 "github.com/prometheus/prometheus/web/api/v1"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
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

// tsdbStatus is status/tsdb over the heads of all ingesters.
func (a *API) tsdbStatus(w http.ResponseWriter, r *http.Request) {
	const maxLimit = 10000 // Prometheus's
	limit := 10
	if s := r.FormValue("limit"); s != "" {
		var err error
		if limit, err = strconv.Atoi(s); err != nil || limit < 1 {
			respondError(w, http.StatusBadRequest, "bad_data", errors.New("limit must be a positive number"))
			return
		}
		if limit > maxLimit {
			respondError(w, http.StatusBadRequest, "bad_data", fmt.Errorf("limit must not exceed %d", maxLimit))
			return
		}
	}
	// Ask for more than wanted: the greatest overall need not be among the
	// greatest of each.
	all, warnings, err := a.storage.stats(r.Context(), 10*limit)
	if err != nil {
		respondError(w, http.StatusInternalServerError, "internal", err)
		return
	}
	status := v1.TSDBStatus{}
	hs := &status.HeadStats
	byMetric, byLabel, size, byPair := map[string]uint64{}, map[string]uint64{}, map[string]uint64{}, map[string]uint64{}
	add := func(to map[string]uint64, cs []*fetchpb.Count) {
		for _, c := range cs {
			to[c.Name] += c.Value
		}
	}
	for _, s := range all {
		if s.Series == 0 {
			continue
		}
		if hs.NumSeries == 0 {
			hs.MinTime, hs.MaxTime = s.Mint, s.Maxt
		}
		hs.MinTime, hs.MaxTime = min(hs.MinTime, s.Mint), max(hs.MaxTime, s.Maxt)
		hs.NumSeries += s.Series
		hs.ChunkCount += int64(s.Chunks)
		hs.NumLabelPairs += int(s.LabelPairs)
		add(byMetric, s.SeriesByMetric)
		add(size, s.BytesByLabel)
		add(byPair, s.SeriesByPair)
		for _, c := range s.ValuesByLabel { // mostly the same values everywhere
			byLabel[c.Name] = max(byLabel[c.Name], c.Value)
		}
	}
	status.SeriesCountByMetricName = greatest(byMetric, limit)
	status.LabelValueCountByLabelName = greatest(byLabel, limit)
	status.MemoryInBytesByLabelName = greatest(size, limit)
	status.SeriesCountByLabelValuePair = greatest(byPair, limit)
	respond(w, status, warnings)
}

func greatest(m map[string]uint64, limit int) []v1.TSDBStat {
	out := make([]v1.TSDBStat, 0, len(m))
	for _, name := range slices.Sorted(maps.Keys(m)) {
		out = append(out, v1.TSDBStat{Name: name, Value: m[name]})
	}
	slices.SortStableFunc(out, func(a, b v1.TSDBStat) int {
		switch {
		case a.Value > b.Value:
			return -1
		case a.Value < b.Value:
			return 1
		}
		return 0
	})
	return out[:min(len(out), limit)]
}
