package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/ingest/ring"
	"github.com/epimetheus-tsdb/epimetheus/internal/testenv"
)

// TestNetworkFails: connections from sidecar and gateways to ingesters, and the
// gossip between all, are cut, stand still, are slow and lossy.
func TestNetworkFails(t *testing.T) {
	t.Parallel()
	s := startShape(t, testenv.S3(t), testenv.DynamoDBOn(t, t.TempDir()), shape{links: true})
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	heal := func() {
		t.Helper()
		for i, m := range s.ingesters {
			m.grpc.set(trouble{})
			m.gossip.set(trouble{})
			ringState(t, s.gateways[1], []string{"ingester-0", "ingester-1", "ingester-2"}[i], ring.Active)
		}
		auditLive(t, s, n, s.gateways[1].url, began, time.Now())
	}
	n.scraping(t)
	heal()

	step(t, "one ingester is cut off, one doesn't answer, one is slow")
	s.ingesters[0].grpc.set(trouble{refuse: true})
	s.ingesters[1].grpc.set(trouble{stall: true})
	s.ingesters[2].grpc.set(trouble{delay: 100 * time.Millisecond})
	metricIs(t, time.Minute, n.sidecar.url, "epimetheus_sidecar_detached_owners", more(1))
	pause(t.Context(), 3*time.Second)
	n.scraping(t)
	heal()

	step(t, "no ingester can be reached")
	for _, m := range s.ingesters {
		m.grpc.set(trouble{refuse: true})
	}
	pause(t.Context(), 10*time.Second)
	n.scraping(t)
	heal()

	step(t, "an ingester can't be reached by the others' gossip: it is lost for a while")
	s.ingesters[1].gossip.set(trouble{stall: true})
	ringState(t, s.gateways[1], "ingester-1", ring.Lost)
	pause(t.Context(), 5*time.Second)
	heal()

	step(t, "all is slow and lossy")
	for _, m := range s.ingesters {
		m.grpc.set(trouble{delay: 50 * time.Millisecond, loss: 0.3})
		m.gossip.set(trouble{delay: 20 * time.Millisecond, loss: 0.2})
	}
	pause(t.Context(), 15*time.Second)
	n.scraping(t)
	heal()
	keptAccount(t, n)
}

// TestUnreachable: no ingester can be reached for minutes, while a Prometheus
// truncates its WAL as it would in hours, and so does not matter to it. An agent
// beside it.
func TestUnreachable(t *testing.T) {
	long(t)
	t.Parallel()
	s := startShape(t, testenv.S3(t), testenv.DynamoDBOn(t, t.TempDir()), shape{links: true})
	began := time.Now().Add(-time.Second)
	n := startPrometheus(t, s, "team-a", "", shortBlocks()...)
	n.startSidecar(t, s)
	agent := startAgent(t, s, "agent")
	n.scraping(t)
	auditLive(t, s, n, s.gateways[0].url, began, time.Now())

	step(t, "no ingester can be reached")
	for _, m := range s.ingesters {
		m.grpc.set(trouble{stall: true})
	}
	for end := time.Now().Add(5 * time.Minute); time.Now().Before(end); {
		pause(t.Context(), 20*time.Second)
		n.scraping(t)
		v, err := metric(t.Context(), n.sidecar.url, "process_resident_memory_bytes")
		if err != nil || v > 256<<20 {
			t.Errorf("the sidecar takes %.0f bytes, %v", v, err)
		}
	}
	truncated(t, n, segments(t, n)[0])
	step(t, "they can be again")
	for _, m := range s.ingesters {
		m.grpc.set(trouble{})
	}
	auditLive(t, s, n, s.gateways[0].url, began, time.Now())
	auditAgent(t, s, agent, began, time.Now())
	keptAccount(t, n)
	keptAccount(t, agent)
}

// TestNamespaces: ingesters in network namespaces of their own, whose cables are
// pulled: from the sidecar, the stores and one another.
func TestNamespaces(t *testing.T) {
	long(t)
	t.Parallel()
	if runtime.GOOS != "linux" || os.Getuid() != 0 {
		t.Skip("network namespaces need Linux and root")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("network namespaces need iproute2")
	}
	name := func(what string, i int) string { return fmt.Sprintf("e%s%d-%d", what, i, os.Getpid()%100000) }
	net := fmt.Sprintf("10.213.%d.", os.Getpid()%256)
	ip := func(line string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "ip", strings.Fields(line)...).CombinedOutput(); err != nil {
			t.Skipf("network namespaces can't be made: ip %s: %v %s", line, err, out)
		}
	}
	undo := func(line string) {
		t.Cleanup(func() {
			if out, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
				t.Errorf("ip %s: %v %s", line, err, out)
			}
		})
	}
	bridge := name("br", 0)
	ip("link add " + bridge + " type bridge")
	undo("link del " + bridge)
	ip("addr add " + net + "1/24 dev " + bridge)
	ip("link set " + bridge + " up")
	var places []place
	for i := range 3 {
		ns, outside, inside, addr := name("ns", i), name("o", i), name("i", i), fmt.Sprint(net, i+2)
		ip("netns add " + ns)
		undo("netns del " + ns)
		ip("link add " + outside + " type veth peer name " + inside + " netns " + ns)
		ip("link set " + outside + " master " + bridge + " up")
		ip("-n " + ns + " addr add " + addr + "/24 dev " + inside)
		ip("-n " + ns + " link set " + inside + " up")
		ip("-n " + ns + " link set lo up")
		places = append(places, place{run: []string{"ip", "netns", "exec", ns}, host: addr})
	}
	s3, db := testenv.S3(t), testenv.DynamoDBOn(t, t.TempDir())
	stores := []*link{startLinkOn(t, net+"1", strings.TrimPrefix(s3.Endpoint, "http://")), startLinkOn(t, net+"1", strings.TrimPrefix(db.Endpoint, "http://"))}
	s := startShape(t, s3, db, shape{s3: "http://" + stores[0].addr, db: "http://" + stores[1].addr, places: places})
	began := time.Now().Add(-time.Second)
	n := startTenant(t, s, "team-a", "")
	cable := func(i int, state string) { ip("link set " + name("o", i) + " " + state) }
	heal := func() {
		t.Helper()
		for i := range places {
			cable(i, "up")
		}
		for i := range places {
			ringState(t, s.gateways[1], fmt.Sprint("ingester-", i), ring.Active)
		}
		auditLive(t, s, n, s.gateways[1].url, began, time.Now())
	}
	n.scraping(t)
	heal()

	step(t, "one cable is pulled")
	cable(1, "down")
	ringState(t, s.gateways[1], "ingester-1", ring.Lost)
	pause(t.Context(), 20*time.Second)
	n.scraping(t)
	heal()

	step(t, "all cables are pulled, for longer than sessions last")
	for i := range places {
		cable(i, "down")
	}
	pause(t.Context(), 100*time.Second)
	n.scraping(t)
	heal()
	keptAccount(t, n)
}
