# Tools and servers that building, linting and testing need, each at an exact
# version, built from modules of their own into .tools (never into GOBIN).
#
#   make tools          everything that `make test` and `make lint` need
#   make tools-test     the servers that tests start: S3, DynamoDB, memcached, Prometheus, node exporter
#   make tools-lint     golangci-lint and benchstat
#   make tools-generate buf and the two protobuf plugins
#
# A stamp carries the checksum of what pins the version, so that a tool is built
# again exactly when its version changes.

TOOLS_DIR := $(CURDIR)/.tools
TOOLS_BIN := $(TOOLS_DIR)/bin

tools_stamp = $(TOOLS_DIR)/stamps/$(1)-$(firstword $(shell cat $(2) | cksum))
TOOLS_STAMP_SERVERS  := $(call tools_stamp,servers,tools/servers/go.mod tools/tools.mk)
TOOLS_STAMP_DYNALITE := $(call tools_stamp,dynalite,tools/dynalite/package-lock.json)
TOOLS_STAMP_LINT     := $(call tools_stamp,lint,tools/lint/go.mod)
TOOLS_STAMP_GENERATE := $(call tools_stamp,generate,tools/gen/go.mod tools/buf/go.mod)

# The version that Prometheus reports; without it buildinfo is empty.
TOOLS_PROMETHEUS_LDFLAGS := -s -w \
	-X github.com/prometheus/common/version.Version=3.16.0 \
	-X github.com/prometheus/common/version.Revision=v0.316.0 \
	-X github.com/prometheus/common/version.Branch=HEAD

tools_done = @mkdir -p $(TOOLS_DIR)/stamps && rm -f $(TOOLS_DIR)/stamps/$(1)-* && touch $@

.PHONY: tools tools-test tools-lint tools-generate tools-memcached
tools: tools-test tools-lint ## install what tests and linters need into .tools
tools-test: $(TOOLS_STAMP_SERVERS) $(TOOLS_STAMP_DYNALITE) tools-memcached
tools-lint: $(TOOLS_STAMP_LINT)
tools-generate: $(TOOLS_STAMP_GENERATE)

$(TOOLS_STAMP_SERVERS):
	@echo "building the servers that tests need (a few minutes, once)"
	@mkdir -p $(TOOLS_BIN)
	cd tools/servers && GOFLAGS=-mod=readonly nice go build -ldflags '-s -w' -o $(TOOLS_BIN)/ \
		github.com/versity/versitygw/cmd/versitygw github.com/prometheus/node_exporter
	cd tools/servers && GOFLAGS=-mod=readonly nice go build -tags remove_all_sd -ldflags "$(TOOLS_PROMETHEUS_LDFLAGS)" -o $(TOOLS_BIN)/ \
		github.com/prometheus/prometheus/cmd/prometheus github.com/prometheus/prometheus/cmd/promtool
	$(call tools_done,servers)

$(TOOLS_STAMP_DYNALITE):
	@command -v npm >/dev/null || { echo "npm is needed for the DynamoDB server of the tests: apt-get install -y npm"; exit 1; }
	@rm -rf $(TOOLS_DIR)/dynalite && mkdir -p $(TOOLS_DIR)/dynalite
	cp tools/dynalite/package.json tools/dynalite/package-lock.json $(TOOLS_DIR)/dynalite/
	cd $(TOOLS_DIR)/dynalite && npm ci --no-audit --no-fund --loglevel=error
	$(call tools_done,dynalite)

# A package of the system, 1.6 or newer: there is no module of it.
tools-memcached:
	@command -v memcached >/dev/null || { [ $$(id -u) = 0 ] && apt-get update -q && apt-get install -qy --no-install-recommends memcached; } || \
		{ echo "memcached is needed by the tests: apt-get install -y memcached"; exit 1; }

$(TOOLS_STAMP_LINT):
	@mkdir -p $(TOOLS_BIN)
	cd tools/lint && GOFLAGS=-mod=readonly nice go build -ldflags '-s -w' -o $(TOOLS_BIN)/ \
		github.com/golangci/golangci-lint/v2/cmd/golangci-lint golang.org/x/perf/cmd/benchstat
	$(call tools_done,lint)

$(TOOLS_STAMP_GENERATE):
	@mkdir -p $(TOOLS_BIN)
	cd tools/gen && GOFLAGS=-mod=readonly nice go build -o $(TOOLS_BIN)/ \
		google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	cd tools/buf && GOFLAGS=-mod=readonly nice go build -o $(TOOLS_BIN)/ github.com/bufbuild/buf/cmd/buf
	$(call tools_done,generate)
