package main

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/common/version"

	"github.com/epimetheus-tsdb/epimetheus/sidecar"
)

func addSidecar(app *kingpin.Application, commands map[string]command) {
	cmd := app.Command("sidecar", "Tail the WAL of the Prometheus beside and ship its samples.")
	wf := addWebFlags(cmd, ":9013")
	var promDir, promURL, promFile, tenant, replicaLabel string
	var gateways []string
	cmd.Flag("prometheus.data-dir", "Data directory of Prometheus (its --storage.tsdb.path or --storage.agent.path); it is only read.").StringVar(&promDir)
	cmd.Flag("prometheus.url", "URL of Prometheus: its external labels and the metadata of metrics are read there.").StringVar(&promURL)
	cmd.Flag("prometheus.config-file", "Configuration file of Prometheus, for its external labels, where there is no URL.").StringVar(&promFile)
	cmd.Flag("gateway.url", "URL of a gateway. Repeat for more.").StringsVar(&gateways)
	cmd.Flag("tenant", "Tenant that the samples are of.").StringVar(&tenant)
	cmd.Flag("ha.replica-label", "External label that tells this Prometheus from others with the same targets, such as replica. It isn't sent, and of these Prometheis one is chosen at a time.").StringVar(&replicaLabel)
	commands[cmd.FullCommand()] = func(g *global) error {
		p, err := newProcess("sidecar", g, wf)
		if err != nil {
			return err
		}
		c := &p.config.Sidecar
		for _, o := range []struct {
			flag string
			to   *string
		}{
			{promDir, &c.PrometheusDirectory},
			{promURL, &c.PrometheusURL},
			{promFile, &c.PrometheusConfigFile},
			{tenant, &c.Tenant},
			{replicaLabel, &c.HA.ReplicaLabel},
		} {
			if o.flag != "" {
				*o.to = o.flag
			}
		}
		if len(gateways) > 0 {
			c.Gateways = gateways
		}
		if c.PrometheusDirectory == "" {
			return errors.New("--prometheus.data-dir is required: the directory that Prometheus has as --storage.tsdb.path")
		}
		if len(c.Gateways) == 0 {
			return errors.New("--gateway.url is required: for example http://gateway:9009")
		}
		s, err := sidecar.New(sidecar.Options{
			PrometheusDir: c.PrometheusDirectory, DataDir: p.flags.dataDir, Tenant: c.Tenant, Gateways: c.Gateways,
			PrometheusURL: c.PrometheusURL, PrometheusConfigFile: c.PrometheusConfigFile,
			RelabelConfigs: c.RelabelConfigs, Shards: c.Shards, Replicas: c.ReplicationFactor, KeepBytes: int64(c.KeepWALBytes),
			ReplicaLabel: c.HA.ReplicaLabel, Lease: time.Duration(c.HA.Lease),
			BackfillAge: c.Backfill.age(), BackfillSamplesPerSecond: int64(c.Backfill.SamplesPerSecond),
			DialOptions: p.dialOptions(), Version: "epimetheus " + version.Version,
		}, p.logger, p.reg)
		if err != nil {
			return err
		}
		p.addRun("sidecar", s.Run, nil)
		p.ready = append(p.ready, check{"sidecar", s.Ready})
		p.health = append(p.health, s.Health().Conditions)
		p.status = append(p.status, section{"Sidecar", sidecarTable(s)})
		return p.run()
	}
}

func sidecarTable(s *sidecar.Sidecar) func(*http.Request) [][]string {
	return func(*http.Request) [][]string {
		st := s.Status()
		rows := [][]string{
			{"", ""},
			{"source", st.Source},
			{"tenant", st.Tenant},
			{"Prometheus", st.PrometheusDir},
			{"external labels", st.ExternalLabels.String() + st.LabelsError},
			{"position", fmt.Sprint(st.Position)},
			{"checkpoint", fmt.Sprint(st.Checkpoint)},
			{"not read yet", fmt.Sprintf("%d bytes", st.LagBytes)},
			{"newest sample", st.NewestSample.UTC().Format(time.RFC3339)},
			{"series", strconv.Itoa(st.Series)},
			{"ranges open", strconv.Itoa(st.OpenRanges)},
			{"ranges to send again", strconv.Itoa(st.QueuedRanges)},
			{"copies of what isn't durable", fmt.Sprintf("%d of %d", st.Copies, st.Replicas)},
			{"ring", st.Ring + st.RingError},
			{"deleted WAL kept", fmt.Sprintf("%d bytes", st.KeptBytes)},
		}
		if r := st.Replica; r != nil {
			what := "another is chosen"
			if r.Chosen {
				what = "chosen"
			}
			rows = append(rows, []string{"replica", r.Name + ": " + what + " at the newest sample. " + r.Error})
		}
		if st.HeldSince != nil {
			rows = append(rows, []string{"samples wait", "since " + st.HeldSince.UTC().Format(time.RFC3339) + ": it isn't known which replica is chosen"})
		}
		if g := st.Gap; g != nil {
			rows = append(rows, []string{"gap", fmt.Sprintf("%s, since %s: blocks are read until Prometheus has compacted all up to %s",
				g.Reason, g.Since.UTC().Format(time.RFC3339), g.Newest.UTC().Format(time.RFC3339))})
		}
		var left, read uint64
		for _, f := range st.Fills {
			left += f.Samples
			read += f.Read
		}
		if n := len(st.Fills); n > 0 {
			rows = append(rows, []string{"blocks to send", fmt.Sprintf("%d with %d samples, %d of them read", n, left, read)})
		}
		for _, f := range st.Fills {
			rows = append(rows, []string{"block " + f.Block, fmt.Sprintf("%s to %s, %s: %d of %d samples read",
				f.MinTime.UTC().Format(time.RFC3339), f.MaxTime.UTC().Format(time.RFC3339), f.Reason, f.Read, f.Samples)})
		}
		for _, o := range st.Sessions {
			rows = append(rows, []string{"session with " + o.Owner, fmt.Sprintf("%s: sent %d, received %d, durable %d, connected %v, detached %v",
				o.Address, o.Sent, o.Received, o.Durable, o.Connected, o.Detached)})
		}
		return rows
	}
}
