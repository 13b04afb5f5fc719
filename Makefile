# Everything is built and tested from here; `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

include tools/tools.mk

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/prometheus/common/version.Version=$(VERSION) \
	-X github.com/prometheus/common/version.Revision=$(shell git rev-parse HEAD 2>/dev/null || echo unknown)

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | sort | column -t -s "$$(printf '\t')"

.PHONY: build
build: ## build bin/epimetheus
	@mkdir -p bin
	CGO_ENABLED=0 go build -trimpath -ldflags "$(LDFLAGS)" -o bin/epimetheus ./cmd/epimetheus

DEMO_FOR ?=
DEMO_GATEWAY ?= 127.0.0.1:9009
DEMO_GRPC ?= 127.0.0.1:9010
DEMO_PROMETHEUS ?= 127.0.0.1:9090
DEMO_NODE_EXPORTER ?= 127.0.0.1:9100
DEMO_SIDECAR ?= 127.0.0.1:9013

.PHONY: demo
demo: build $(TOOLS_STAMP_SERVERS) ## run Epimetheus beside a real Prometheus (DEMO_FOR=60s stops by itself)
	@go build -o bin/demo ./e2e/demo
	@exec bin/demo -gateway $(DEMO_GATEWAY) -grpc $(DEMO_GRPC) -prometheus $(DEMO_PROMETHEUS) \
		-node-exporter $(DEMO_NODE_EXPORTER) -sidecar $(DEMO_SIDECAR) $(if $(DEMO_FOR),-for $(DEMO_FOR))

# The race detector's own tables overflow in bubbles of testing/synctest as long as the
# simulations' (golang/go#78156): those run without it. What they simulate has
# tests with it. The end-to-end tests mostly wait for processes of the built binary, which
# has no race detector: four at a time. What runs on one goroutine and computes for minutes
# where the detector looks on has nothing to show to it: chunkfmt, these tests (TestLikePrometheus has it for all requests that are
# compared with Prometheus's answers), and most of the planner's, whose suites that run on several goroutines have it. (With it
# a gateway takes so long for its share of a query that others don't wait for it.)
NO_RACE := TestFederationLikePrometheus|TestGatewaysShareWork|TestLedgerModel|TestMergeCorrupt|TestMergeRandom|TestOddLikePrometheus|TestPrometheusSuite|TestReusedSummaries|TestSelectWindows|TestSimulation|TestSimulationRepeats
.PHONY: test
test: tools-test ## every test, unit to end to end; with the race detector where there are goroutines to race
	go test -race -timeout 20m -skip '^($(NO_RACE))$$' $$(go list ./... | grep -v -e /chunkfmt -e /e2e$$ -e /e2e/sim$$ -e /e2e/cost$$ -e /gateway/plan$$)
	go test -race -timeout 10m ./history/compact -run 'TestSimulation$$' -sim.n 1
	go test -race -timeout 10m ./gateway/plan -run 'TestAgreement|TestLateSamples|TestTasks|TestTogether' -agree.n 300
	go test -timeout 10m -run '^($(NO_RACE))$$' ./gateway ./gateway/merge ./history ./history/compact ./sidecar
	go test -timeout 10m ./chunkfmt/... ./gateway/plan ./e2e/sim ./e2e/cost
	go test -timeout 15m -parallel 4 ./e2e

.PHONY: e2e
e2e: tools-test ## the built binary against real Prometheis, object stores and indexes that fail
	go test -count 1 -timeout 15m -parallel 4 ./e2e

.PHONY: e2e-long
e2e-long: tools-test ## e2e, with what takes minutes: frozen processes, long cuts, network namespaces (as root)
	EPIMETHEUS_LONG=1 go test -count 1 -v -timeout 45m ./e2e

.PHONY: lint
lint: tools-lint ## golangci-lint, go vet, gofmt, generated files
	go vet ./...
	.tools/bin/golangci-lint run ./...

.PHONY: fmt
fmt: tools-lint ## format the code
	.tools/bin/golangci-lint fmt ./...

.PHONY: generate
generate: tools-generate ## code from the protocols, and the generated pages of docs
	.tools/bin/buf generate
	go test ./cmd/epimetheus -run TestDocs -update

FUZZTIME ?= 30s
.PHONY: fuzz
fuzz: ## fuzz every decoder for FUZZTIME each
	@set -e; for f in $$(grep -rlE '^func Fuzz' --include='*_test.go' .); do \
		for t in $$(grep -oE '^func Fuzz[A-Za-z0-9_]+' $$f | cut -d' ' -f2); do \
			echo "$$f $$t"; go test -run '^$$' -fuzz "^$$t$$" -fuzztime $(FUZZTIME) ./$$(dirname $$f); done; done

SEED ?=
STEPS ?= 40
N ?= 2000
.PHONY: sim
sim: ## simulate the write path: SEED= (20 seeds if empty), STEPS=; see docs/simulation.md
	go test ./e2e/sim -run 'TestSim$$' -count 1 $(if $(SEED),-v) -sim.steps $(STEPS) $(if $(SEED),-sim.seed $(SEED))

.PHONY: sim-long
sim-long: ## simulate N= seeds of STEPS= steps each
	go test ./e2e/sim -run 'TestSim$$' -count 1 -timeout 0 -sim.steps $(STEPS) -sim.n $(N)

COST_FLAGS ?=
.PHONY: cost
cost: ## what stated fleets cost on AWS, from a simulation of weeks (minutes; COST_FLAGS="-cost.million-puts 5 …" for other prices)
	go test ./e2e/cost -run TestCost -count 1 -v -timeout 60m -cost.full $(COST_FLAGS)

.PHONY: bench
bench: tools ## the benchmarks that docs/benchmarks.md shows (half an hour)
	go test -run '^$$' -bench WritePath -benchtime 1x -count 3 -timeout 30m ./e2e/bench
	go test -run '^$$' -bench Start -benchtime 5x ./e2e/bench
	go test -run '^$$' -bench 'Restart|Resend' -benchtime 1x -timeout 60m ./e2e/bench
	go test -run '^$$' -bench 'Wide|Servers' -benchtime 1x -timeout 60m ./e2e/bench
	go test -run TestMemoryPerSeries -count 1 -v ./sidecar
	go test -run '^$$' -bench . -benchmem -timeout 30m ./ingest/... ./sidecar/... ./history/... ./gateway/...
	go test -run TestSizes -count 1 -v ./chunkfmt
	@mkdir -p bin
	go test -run '^$$' -bench 'Decode/./set=mix|Write' -count 10 -timeout 30m ./chunkfmt >bin/chunkfmt.bench
	.tools/bin/benchstat -row .name,/samples -col /codec bin/chunkfmt.bench

.PHONY: check
check: lint test ## all that CI runs
