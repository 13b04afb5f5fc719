package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/relabel"
	"go.yaml.in/yaml/v2"

	"github.com/epimetheus-tsdb/epimetheus/gateway"
	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/compact"
	"github.com/epimetheus-tsdb/epimetheus/history/memcached"
	"github.com/epimetheus-tsdb/epimetheus/ingest"
	"github.com/epimetheus-tsdb/epimetheus/sidecar"
)

// Config is the YAML file; docs/configuration.md describes it. The zero value
// of a field is replaced by the default that setDefaults gives.
type Config struct {
	Tenancy   gateway.Tenancy `yaml:"tenancy,omitempty" doc:"Where the tenant of a request comes from: 'single' (all is of the tenant 'default') or 'header' (X-Scope-OrgID, set by a proxy that authenticates)."`
	Objects   ObjectsConfig   `yaml:"objects,omitempty"`
	Index     IndexConfig     `yaml:"index,omitempty"`
	Memcached MemcachedConfig `yaml:"memcached,omitempty"`
	Ring      RingConfig      `yaml:"ring,omitempty"`
	GRPCTLS   TLSConfig       `yaml:"grpc_tls,omitempty"`
	Ingester  IngesterConfig  `yaml:"ingester,omitempty"`
	Gateway   GatewayConfig   `yaml:"gateway,omitempty"`
	Compactor CompactorConfig `yaml:"compactor,omitempty"`
	Retention RetentionConfig `yaml:"retention,omitempty"`
	Sidecar   SidecarConfig   `yaml:"sidecar,omitempty"`
}

// ObjectsConfig says where blocks are.
type ObjectsConfig struct {
	Type  string      `yaml:"type,omitempty" doc:"'files' or 's3'."`
	Files FilesConfig `yaml:"files,omitempty"`
	S3    S3Config    `yaml:"s3,omitempty"`
}

// FilesConfig is for blocks as files.
type FilesConfig struct {
	Directory string `yaml:"directory,omitempty" doc:"Where blocks are as files. Empty: 'objects' in the data directory. Several processes need one that they share."`
}

// S3Config is for blocks in S3. Credentials come from the AWS SDK's own chain.
type S3Config struct {
	Bucket    string `yaml:"bucket,omitempty" doc:"The bucket. Credentials come from the AWS SDK's own chain (environment, profile, role)."`
	Prefix    string `yaml:"prefix,omitempty" doc:"Before each key, with its slash."`
	Endpoint  string `yaml:"endpoint,omitempty" doc:"URL of an S3 server that is not AWS."`
	Region    string `yaml:"region,omitempty" doc:"Empty: from the AWS configuration."`
	PathStyle bool   `yaml:"path_style,omitempty" doc:"The bucket in the path instead of the host name: for most servers that are not AWS."`
}

// IndexConfig says where index rows are.
type IndexConfig struct {
	Type     string         `yaml:"type,omitempty" doc:"'embedded' (a file in the data directory, for 'epimetheus all') or 'dynamodb'."`
	DynamoDB DynamoDBConfig `yaml:"dynamodb,omitempty"`
}

// DynamoDBConfig is for rows in DynamoDB. Credentials come from the AWS SDK's
// own chain.
type DynamoDBConfig struct {
	Table    string `yaml:"table,omitempty" doc:"The table; 'epimetheus tool create-table' creates it."`
	Endpoint string `yaml:"endpoint,omitempty" doc:"URL of a DynamoDB server that is not AWS."`
	Region   string `yaml:"region,omitempty" doc:"Empty: from the AWS configuration."`
}

// MemcachedConfig is for pages and results in memcached.
type MemcachedConfig struct {
	Addresses []string `yaml:"addresses,omitempty" doc:"Addresses (host:port) of memcached servers, of all roles the same: pages of blocks and results of parts of queries are kept there, and recent ones written ahead. A name stands for all addresses that it resolves to. Empty: there are none."`
}

// RingConfig is what a member says of itself.
type RingConfig struct {
	Zone string   `yaml:"zone,omitempty" doc:"Zone of this member: the replicas of a series go to different ones."`
	Join []string `yaml:"join,omitempty" doc:"Gossip addresses (host:port) of other members, beside those of '--gossip.join'."`
}

// IngesterConfig is for ingesters.
type IngesterConfig struct {
	FlushInterval   duration      `yaml:"flush_interval,omitempty" doc:"How often the head becomes a block. Longer: fewer, larger blocks, more memory, more to send again after a crash."`
	FlushBytes      size          `yaml:"flush_bytes,omitempty" doc:"Memory of a generation at which it is flushed early."`
	MaxBytes        size          `yaml:"max_bytes,omitempty" doc:"Memory of the head at which nothing new is taken until a flush has worked; the sources wait."`
	VisibilityDelay duration      `yaml:"visibility_delay,omitempty" doc:"How long a generation stays readable after its flush: at least twice 'gateway.query_timeout'."`
	LeaveTimeout    duration      `yaml:"leave_timeout,omitempty" doc:"How long the last flush may take when the process is stopped. What isn't durable then its sources send again. Whoever stops the process should give it some seconds more."`
	CommitLog       bool          `yaml:"commit_log" doc:"Whether what is received is logged in the data directory, so that a restart need not ask every source again. 'epimetheus ingester' does it only where '--data.dir' is given."`
	Limits          ingest.Limits `yaml:"limits,omitempty"`
}

// GatewayConfig is for gateways.
type GatewayConfig struct {
	QueryTimeout       duration                       `yaml:"query_timeout,omitempty" doc:"The longest query, and the longest request for series, labels, metadata, exemplars, cardinality or a remote read, which ends though its client still takes the answer."`
	LookbackDelta      duration                       `yaml:"lookback_delta,omitempty" doc:"As Prometheus's --query.lookback-delta."`
	EvaluationInterval duration                       `yaml:"evaluation_interval,omitempty" doc:"As 'global.evaluation_interval' of Prometheus's configuration: the step of subqueries that name none, such as 'x[1h:]'."`
	MaxSamples         int                            `yaml:"max_samples,omitempty" doc:"As Prometheus's --query.max-samples: in memory for one query."`
	CacheBytes         size                           `yaml:"cache_bytes,omitempty" doc:"Memory for pages of blocks."`
	ResultBytes        size                           `yaml:"result_cache_bytes,omitempty" doc:"Memory for results of parts of long queries."`
	EnableFeatures     []string                       `yaml:"enable_features,omitempty" doc:"As Prometheus's --enable-feature, of what concerns queries: promql-binop-fill-modifiers, promql-delayed-name-removal, promql-experimental-functions, promql-per-step-stats, promql-unquoted-utf8-names, query-cost, search-api, type-and-unit-labels, use-start-timestamps."`
	TenantFederation   bool                           `yaml:"tenant_federation,omitempty" doc:"Whether a request may be about several tenants, as 'X-Scope-OrgID: a|b'. Series then have the label '__tenant_id__'. The proxy that authenticates must check each of them. Off, a bar is a part of a tenant's name."`
	Tenants            map[string]GatewayTenantConfig `yaml:"tenants,omitempty" doc:"By tenant: its own 'lookback_delta', 'evaluation_interval' and 'enable_features', where those that its sidecar reports aren't wanted, and its own 'limits'. With one of the first three, the others are as above if absent; 'enable_features: []' is none; a tenant with 'limits' has those alone, and the default of 'queries' if they don't say."`
	Limits             QueryLimits                    `yaml:"limits,omitempty"`
	QueryMemory        size                           `yaml:"query_memory_bytes,omitempty" doc:"Memory that all queries may hold together (samples of heads, series and pages of blocks, points and labels that the engine makes, steps of subqueries, results, bodies of requests). Beyond it, of the tenant that holds most, the query that holds most is ended. 0: no bound."`
	SlowQuery          duration                       `yaml:"slow_query,omitempty" doc:"Queries that take so long are logged, with what they read, and the first 2 KiB of what they say. 0: none are."`
	Prices             PricesConfig                   `yaml:"prices,omitempty"`
}

// QueryLimits are of each tenant.
type QueryLimits struct {
	Queries     int      `yaml:"queries" doc:"Queries, and requests for series, labels, metadata, exemplars or cardinality, of a tenant at a time, at each gateway, so that no tenant takes what others need; ten times as many wait, the next get status 429. 0: no limit."`
	Range       duration `yaml:"query_range,omitempty" doc:"Time between the first and the last sample that a query may need. 0: no limit."`
	Series      int64    `yaml:"query_series,omitempty" doc:"Series that a query may read. 0: no limit."`
	Samples     int64    `yaml:"query_samples,omitempty" doc:"Samples that a query may read. 0: no limit."`
	Bytes       size     `yaml:"query_bytes,omitempty" doc:"Bytes that a query may read: of the object store, where a cache hasn't got them, and those of samples in heads. 0: no limit."`
	AnswerBytes size     `yaml:"answer_bytes,omitempty" doc:"How long an answer may be, about. 0: no limit."`
}

// UnmarshalYAML lets a tenant with limits of its own have its share of a gateway and no more,
// where they don't say otherwise.
func (l *QueryLimits) UnmarshalYAML(unmarshal func(any) error) error {
	type plain QueryLimits
	*l = QueryLimits{Queries: gateway.DefaultQueries}
	return unmarshal((*plain)(l))
}

func (l *QueryLimits) limits() gateway.Limits {
	return gateway.Limits{
		Limits:  account.Limits{Series: l.Series, Samples: l.Samples, Range: time.Duration(l.Range), Read: int64(l.Bytes), Bytes: int64(l.AnswerBytes)},
		Queries: l.Queries,
	}
}

func (l *QueryLimits) validate(name string, bad func(string, ...any)) {
	if l.Queries < 0 || l.Range < 0 || l.Series < 0 || l.Samples < 0 || l.Bytes < 0 || l.AnswerBytes < 0 {
		bad("%s: none may be negative (0 means no limit)", name)
	}
}

// PricesConfig is for the dollars in a query's statistics.
type PricesConfig struct {
	MillionObjectGets float64 `yaml:"million_object_gets,omitempty" doc:"Dollars for a million GETs of the object store, shown with 'stats=all'."`
	MillionIndexReads float64 `yaml:"million_index_reads,omitempty" doc:"Dollars for a million queries of the index."`
}

// GatewayTenantConfig is what a tenant has of its own.
type GatewayTenantConfig struct {
	LookbackDelta      duration `yaml:"lookback_delta,omitempty"`
	EvaluationInterval duration `yaml:"evaluation_interval,omitempty"`
	EnableFeatures     []string `yaml:"enable_features"`

	Limits *QueryLimits `yaml:"limits,omitempty"`
}

// engine gives the options of the engine for most tenants.
func (c *GatewayConfig) engine() gateway.EngineOptions {
	return gateway.EngineOptions{LookbackDelta: time.Duration(c.LookbackDelta), EvaluationInterval: time.Duration(c.EvaluationInterval), Features: c.EnableFeatures}
}

// tenants gives the options of the engine for those that have their own.
func (c *GatewayConfig) tenants() map[string]gateway.EngineOptions {
	out := map[string]gateway.EngineOptions{}
	for name, t := range c.Tenants {
		if t.LookbackDelta == 0 && t.EvaluationInterval == 0 && t.EnableFeatures == nil {
			continue // those that its sidecar reports
		}
		e := c.engine()
		if t.LookbackDelta != 0 {
			e.LookbackDelta = time.Duration(t.LookbackDelta)
		}
		if t.EvaluationInterval != 0 {
			e.EvaluationInterval = time.Duration(t.EvaluationInterval)
		}
		if t.EnableFeatures != nil {
			e.Features = t.EnableFeatures
		}
		out[name] = e
	}
	return out
}

// tenantLimits gives the limits of those that have their own.
func (c *GatewayConfig) tenantLimits() map[string]gateway.Limits {
	out := map[string]gateway.Limits{}
	for name, t := range c.Tenants {
		if t.Limits != nil {
			out[name] = t.Limits.limits()
		}
	}
	return out
}

// CompactorConfig is for compactors.
type CompactorConfig struct {
	Enabled    bool       `yaml:"enabled" doc:"Whether 'epimetheus all' compacts. The role 'compactor' always does."`
	Ranges     []duration `yaml:"ranges,omitempty" doc:"Widths of time of the levels, each a multiple of the one before, at most a week; default '[2h, 1d, 1w]'. Fewer levels: fewer rewrites, but more small blocks for longer. The same in all compactors."`
	BlockBytes size       `yaml:"block_bytes,omitempty" doc:"Where a block is cut. A compactor needs room for two to four of them in its data directory."`
}

// RetentionConfig says how long samples are kept. It is followed at run time.
type RetentionConfig struct {
	Raw     duration                         `yaml:"raw,omitempty" doc:"How long samples are kept, at least 1h. 0: for ever. Older ones can't be queried, and are deleted with the block that they are in, when all of the tenant's in it are older. The same in all gateways and compactors; a change is taken within a minute, or at once with SIGHUP."`
	Short   duration                         `yaml:"5m,omitempty" doc:"How long summaries of windows of 5 minutes are kept, which answer most functions at steps of 5 minutes. 0: as long as samples."`
	Long    duration                         `yaml:"1h,omitempty" doc:"How long summaries of windows of an hour are kept, which answer most functions at steps of an hour; '100y' is for ever. 0: as long as those of 5 minutes."`
	Tenants map[string]TenantRetentionConfig `yaml:"tenants,omitempty" doc:"By tenant: its own 'raw', '5m' and '1h'. Absent: for ever, whatever holds for others."`
}

// TenantRetentionConfig is what a tenant has of its own.
type TenantRetentionConfig struct {
	Raw   duration `yaml:"raw,omitempty"`
	Short duration `yaml:"5m,omitempty"`
	Long  duration `yaml:"1h,omitempty"`
}

func (c TenantRetentionConfig) retention() history.Retention {
	return history.Retention{Raw: time.Duration(c.Raw), Short: time.Duration(c.Short), Long: time.Duration(c.Long)}
}

// all is what holds for tenants that have nothing of their own.
func (c *RetentionConfig) all() TenantRetentionConfig {
	return TenantRetentionConfig{c.Raw, c.Short, c.Long}
}

func (c *RetentionConfig) retentions() *history.Retentions {
	out := &history.Retentions{Default: c.all().retention(), Tenants: map[string]history.Retention{}}
	for name, t := range c.Tenants {
		out.Tenants[name] = t.retention()
	}
	return out
}

// minRetention is less than any block is made for.
const minRetention = time.Hour

// validate is told whether compaction makes summaries.
func (c *RetentionConfig) validate(summaries bool, bad func(string, ...any)) {
	check := func(name string, r TenantRetentionConfig) {
		if r.Raw != 0 && time.Duration(r.Raw) < minRetention {
			bad("%s.raw: %s is less than 1h (0 means for ever)", name, r.Raw)
		}
		switch {
		case r.Short == 0 && r.Long == 0:
		case r.Raw == 0:
			bad("%s: '5m' and '1h' are for summaries that stay when samples go, but without 'raw' samples stay for ever: set 'raw', or remove them", name)
		case !summaries:
			bad("%s: summaries are made in blocks of a day or more: the last of compactor.ranges has to be 1d or more", name)
		}
		if r.Short != 0 && r.Short < r.Raw {
			bad("%s.5m: %s is less than 'raw', %s", name, r.Short, r.Raw)
		}
		if finer := max(r.Raw, r.Short); r.Long != 0 && r.Long < finer {
			bad("%s.1h: %s is less than what is finer is kept for, %s", name, r.Long, finer)
		}
	}
	check("retention", c.all())
	for _, name := range slices.Sorted(maps.Keys(c.Tenants)) {
		check("retention.tenants."+name, c.Tenants[name])
	}
}

// SidecarConfig is for sidecars.
type SidecarConfig struct {
	Tenant               string            `yaml:"tenant,omitempty" doc:"Tenant that the samples are of."`
	Gateways             []string          `yaml:"gateways,omitempty" doc:"URLs of gateways, beside '--gateway.url'."`
	PrometheusDirectory  string            `yaml:"prometheus_directory,omitempty" doc:"As '--prometheus.data-dir'."`
	PrometheusURL        string            `yaml:"prometheus_url,omitempty" doc:"As '--prometheus.url': external labels and metadata of metrics are read there, and follow a reload."`
	PrometheusConfigFile string            `yaml:"prometheus_config_file,omitempty" doc:"As '--prometheus.config-file'."`
	RelabelConfigs       []*relabel.Config `yaml:"relabel_configs,omitempty" doc:"Prometheus's relabel configs, applied to each series after the external labels: drop what need not be kept."`
	Shards               int               `yaml:"shards,omitempty" doc:"Over how many ingesters the tenant's series are spread. 0: all."`
	ReplicationFactor    int               `yaml:"replication_factor,omitempty" doc:"How many ingesters, in different zones as far as there are, get each series, 1 to 3. With 2 or 3 fresh samples can be queried while an ingester is missing, for as many times the network and the ingesters' memory. The same in all sidecars of a tenant."`
	HA                   HAConfig          `yaml:"ha,omitempty"`
	Backfill             BackfillConfig    `yaml:"backfill,omitempty"`
	KeepWALBytes         size              `yaml:"keep_wal_bytes,omitempty" doc:"How much WAL that Prometheus has deleted is kept (hard links, open files) while it isn't durable. It takes room on Prometheus's volume. Beyond it samples come from Prometheus's blocks, hours later."`
}

// HAConfig is for Prometheis that scrape the same targets.
type HAConfig struct {
	ReplicaLabel string   `yaml:"replica_label,omitempty" doc:"As '--ha.replica-label'. Empty: all samples are sent, with all external labels."`
	Lease        duration `yaml:"lease,omitempty" doc:"How far ahead of its samples the chosen replica claims, 10s to 5m: the longest gap when it is gone. Shorter: more writes to the index. It must be longer than the scrape interval."`
}

// BackfillConfig is for the history in Prometheus's blocks at the first start.
type BackfillConfig struct {
	Enabled          bool     `yaml:"enabled" doc:"Whether the history that is in Prometheus's blocks at the first start is sent, newest first."`
	MaxAge           duration `yaml:"max_age,omitempty" doc:"How old samples may be to be sent. 0: all."`
	SamplesPerSecond int      `yaml:"samples_per_second,omitempty" doc:"How fast blocks are read at most: at the first start, and where a gap is filled."`
}

// age is how the sidecar's options want it.
func (c *BackfillConfig) age() time.Duration {
	if !c.Enabled {
		return -1
	}
	return time.Duration(c.MaxAge)
}

// defaults of the file.
func defaultConfig() Config {
	return Config{
		Tenancy: gateway.Single,
		Objects: ObjectsConfig{Type: "files"},
		Index:   IndexConfig{Type: "embedded"},
		Ingester: IngesterConfig{
			FlushInterval:   duration(30 * time.Minute),
			FlushBytes:      gib,
			MaxBytes:        4 * gib,
			VisibilityDelay: duration(5 * time.Minute),
			LeaveTimeout:    duration(time.Minute),
			CommitLog:       true,
			Limits:          ingest.Limits{LabelsPerSeries: 128, LabelNameBytes: 1024, LabelValueBytes: 64 << 10},
		},
		Gateway: GatewayConfig{
			QueryTimeout:       duration(2 * time.Minute),
			LookbackDelta:      duration(5 * time.Minute),
			EvaluationInterval: duration(time.Minute),
			MaxSamples:         50_000_000,
			CacheBytes:         512 * mib,
			ResultBytes:        128 * mib,
			QueryMemory:        2048 * mib,
			SlowQuery:          duration(10 * time.Second),
			Limits:             QueryLimits{Queries: gateway.DefaultQueries},
			Prices:             PricesConfig{MillionObjectGets: 0.4, MillionIndexReads: 0.25},
		},
		Compactor: CompactorConfig{Enabled: true, BlockBytes: 512 * mib},
		Sidecar: SidecarConfig{
			Tenant: gateway.DefaultTenant, KeepWALBytes: 4 * gib, ReplicationFactor: 1,
			HA:       HAConfig{Lease: duration(time.Minute)},
			Backfill: BackfillConfig{Enabled: true, SamplesPerSecond: 500_000},
		},
	}
}

// loadConfig reads the file, if one is given, over the defaults. The error names
// all that is wrong with it.
func loadConfig(path string) (Config, error) {
	if path == "" {
		return defaultConfig(), nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return defaultConfig(), fmt.Errorf("configuration file: %w", err)
	}
	return parseConfig(path, b)
}

// parseConfig reads the bytes of the file at path.
func parseConfig(path string, b []byte) (Config, error) {
	c := defaultConfig()
	if err := yaml.UnmarshalStrict(b, &c); err != nil {
		return c, fmt.Errorf("%s: %s", path, strings.ReplaceAll(strings.ReplaceAll(err.Error(), "\n  ", " "), "\n", " "))
	}
	if err := c.validate(); err != nil {
		return c, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// validate returns all that is wrong, each with its path in the file.
func (c *Config) validate() error {
	var problems []string
	bad := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	if c.Tenancy != gateway.Single && c.Tenancy != gateway.Header {
		bad("tenancy: %q is not one of single, header", c.Tenancy)
	}
	switch c.Objects.Type {
	case "files":
	case "s3":
		if c.Objects.S3.Bucket == "" {
			bad("objects.s3.bucket: is required with objects.type s3")
		}
	default:
		bad("objects.type: %q is not one of files, s3", c.Objects.Type)
	}
	switch c.Index.Type {
	case "embedded":
	case "dynamodb":
		if c.Index.DynamoDB.Table == "" {
			bad("index.dynamodb.table: is required with index.type dynamodb")
		}
	default:
		bad("index.type: %q is not one of embedded, dynamodb", c.Index.Type)
	}
	for i, a := range c.Memcached.Addresses {
		if err := memcached.ValidateAddress(a); err != nil {
			bad("memcached.addresses[%d]: %v", i, err)
		}
	}
	c.GRPCTLS.validate(bad)
	i := &c.Ingester
	if d := time.Duration(i.FlushInterval); d < time.Second || d > 24*time.Hour {
		bad("ingester.flush_interval: %s is not between 1s and 24h", i.FlushInterval)
	}
	if d := time.Duration(i.LeaveTimeout); d < time.Second || d > time.Hour {
		bad("ingester.leave_timeout: %s is not between 1s and 1h", i.LeaveTimeout)
	}
	if i.FlushBytes < 16*mib {
		bad("ingester.flush_bytes: %s is less than 16MiB", i.FlushBytes)
	}
	if i.MaxBytes < 2*i.FlushBytes {
		bad("ingester.max_bytes: %s is less than twice ingester.flush_bytes (%s): samples arrive while a flush is under way", i.MaxBytes, i.FlushBytes)
	}
	g := &c.Gateway
	if g.QueryTimeout <= 0 {
		bad("gateway.query_timeout: %s is not positive", g.QueryTimeout)
	}
	if g.LookbackDelta <= 0 {
		bad("gateway.lookback_delta: %s is not positive", g.LookbackDelta)
	}
	if g.EvaluationInterval <= 0 {
		bad("gateway.evaluation_interval: %s is not positive", g.EvaluationInterval)
	}
	if e := (gateway.EngineOptions{Features: g.EnableFeatures}); e.Validate() != nil {
		bad("gateway.enable_features: %s", e.Validate())
	}
	for _, name := range slices.Sorted(maps.Keys(g.Tenants)) {
		if e := (gateway.EngineOptions{Features: g.Tenants[name].EnableFeatures}); e.Validate() != nil {
			bad("gateway.tenants.%s.enable_features: %s", name, e.Validate())
		}
	}
	var ranges []time.Duration
	for _, r := range c.Compactor.Ranges {
		ranges = append(ranges, time.Duration(r))
	}
	if err := compact.ValidateRanges(ranges); err != nil {
		bad("compactor.ranges: %v", err)
	}
	c.Retention.validate(len(ranges) == 0 || compact.Summarises(ranges[len(ranges)-1]), bad)
	if c.Compactor.BlockBytes < 16*mib {
		bad("compactor.block_bytes: %s is less than 16MiB: there would be very many blocks", c.Compactor.BlockBytes)
	}
	if g.MaxSamples <= 0 {
		bad("gateway.max_samples: %d is not positive", g.MaxSamples)
	}
	if g.CacheBytes < 0 {
		bad("gateway.cache_bytes: %s is negative", g.CacheBytes)
	}
	if g.QueryMemory < 0 {
		bad("gateway.query_memory_bytes: %s is negative", g.QueryMemory)
	}
	if g.SlowQuery < 0 {
		bad("gateway.slow_query: %s is negative", g.SlowQuery)
	}
	g.Limits.validate("gateway.limits", bad)
	for _, name := range slices.Sorted(maps.Keys(g.Tenants)) {
		if l := g.Tenants[name].Limits; l != nil {
			l.validate("gateway.tenants."+name+".limits", bad)
		}
	}
	if g.ResultBytes < 0 {
		bad("gateway.result_cache_bytes: %s is negative", g.ResultBytes)
	}
	if i.VisibilityDelay < 2*g.QueryTimeout {
		bad("ingester.visibility_delay: %s is less than twice gateway.query_timeout (%s): a running query could miss samples", i.VisibilityDelay, g.QueryTimeout)
	}
	for _, l := range []struct {
		name  string
		value int
	}{
		{"series", i.Limits.Series},
		{"labels_per_series", i.Limits.LabelsPerSeries},
		{"label_name_bytes", i.Limits.LabelNameBytes},
		{"label_value_bytes", i.Limits.LabelValueBytes},
	} {
		if l.value < 0 {
			bad("ingester.limits.%s: %d is negative (0 means no limit)", l.name, l.value)
		}
	}
	if c.Sidecar.Tenant == "" || len(c.Sidecar.Tenant) > 150 {
		bad("sidecar.tenant: must have 1 to 150 bytes, it has %d", len(c.Sidecar.Tenant))
	}
	if c.Sidecar.Shards < 0 {
		bad("sidecar.shards: %d is negative (0 means all ingesters)", c.Sidecar.Shards)
	}
	if r := c.Sidecar.ReplicationFactor; r < 1 || r > 3 {
		bad("sidecar.replication_factor: %d is not 1, 2 or 3", r)
	}
	if l := c.Sidecar.HA.ReplicaLabel; l != "" && !model.UTF8Validation.IsValidLabelName(l) {
		bad("sidecar.ha.replica_label: %q is not a label name", l)
	}
	if d := time.Duration(c.Sidecar.HA.Lease); d < sidecar.MinLease || d > sidecar.MaxLease {
		bad("sidecar.ha.lease: %s is not between %s and %s", d, sidecar.MinLease, sidecar.MaxLease)
	}
	if n := c.Sidecar.Backfill.SamplesPerSecond; n < 1000 {
		bad("sidecar.backfill.samples_per_second: %d is less than 1000: a day of a small Prometheus would take weeks", n)
	}
	if len(problems) == 0 {
		return nil
	}
	return errors.New(strings.Join(problems, "; "))
}
