package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/epimetheus-tsdb/epimetheus/history"
	"github.com/epimetheus-tsdb/epimetheus/history/index"
	"github.com/epimetheus-tsdb/epimetheus/history/memcached"
	"github.com/epimetheus-tsdb/epimetheus/history/object"
)

// stores are where blocks and rows are.
type stores struct {
	history   *history.History
	index     *index.Index
	objects   object.Store
	memcached *memcached.Client // nil without
	closers   []func() error
}

func (s *stores) close() {
	for _, c := range slices.Backward(s.closers) {
		_ = c() // at the end of the process; what is durable is so already
	}
}

// openTimeout bounds the look at bucket and table at the start.
const openTimeout = 30 * time.Second

// openStores opens the object store and the index, and sees that they can be
// used. shared says that other processes use them as well.
func (p *process) openStores(shared bool) (_ *stores, err error) {
	c := &p.config
	if shared {
		if c.Index.Type == "embedded" {
			return nil, fmt.Errorf("index.type is embedded: its file is for one process only, which is `epimetheus all`; set index.type: dynamodb for the role %s", p.role)
		}
		if c.Objects.Type == "files" && c.Objects.Files.Directory == "" {
			return nil, fmt.Errorf("objects.type is files: set objects.files.directory to a directory that all ingesters and gateways share, or objects.type: s3")
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
	defer cancel()
	s := &stores{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	var objects object.Store
	switch c.Objects.Type {
	case "s3":
		s3, err := object.NewS3(ctx, object.S3Options{
			Bucket: c.Objects.S3.Bucket, Prefix: c.Objects.S3.Prefix, Endpoint: c.Objects.S3.Endpoint,
			Region: c.Objects.S3.Region, PathStyle: c.Objects.S3.PathStyle,
		}, p.reg)
		if err != nil {
			return nil, fmt.Errorf("objects.s3: %w", err)
		}
		if err := s3.Check(ctx); err != nil {
			return nil, fmt.Errorf("objects.s3: %w (see that bucket, endpoint, region and credentials are right)", err)
		}
		objects = s3
	default:
		dir := c.Objects.Files.Directory
		if dir == "" {
			dir = filepath.Join(p.flags.dataDir, "objects")
		}
		files, err := object.NewFiles(dir, p.reg)
		if err != nil {
			return nil, fmt.Errorf("objects.files: %w", err)
		}
		if err := files.Check(ctx); err != nil {
			return nil, fmt.Errorf("objects.files: %w", err)
		}
		objects = files
	}
	var rows index.Store
	switch c.Index.Type {
	case "dynamodb":
		db, err := index.NewDynamoDB(ctx, dynamoDBOptions(c.Index.DynamoDB), p.reg)
		if err != nil {
			return nil, fmt.Errorf("index.dynamodb: %w", err)
		}
		if err := db.Check(ctx); err != nil {
			return nil, fmt.Errorf("index.dynamodb: %w", err)
		}
		rows = db
	default:
		bolt, err := index.NewBolt(filepath.Join(p.flags.dataDir, "index.db"), p.reg)
		if err != nil {
			return nil, fmt.Errorf("index: %w", err)
		}
		s.closers = append(s.closers, bolt.Close)
		rows = bolt
	}
	s.index, s.objects = index.New(rows), objects
	p.settings.set(c)
	if len(c.Memcached.Addresses) > 0 {
		if s.memcached, err = memcached.New(ctx, memcached.Options{Addresses: c.Memcached.Addresses, Logger: p.logger, Registerer: p.reg}); err != nil {
			return nil, err
		}
	}
	s.history, err = history.New(history.Options{
		Objects: objects, Index: s.index, Retentions: p.settings.retentions.Load, VisibilityDelay: time.Duration(c.Ingester.VisibilityDelay),
		PageCacheBytes: int64(c.Gateway.CacheBytes), Memcached: s.memcached, Logger: p.logger, Registerer: p.reg,
	})
	return s, err
}

// addMemcached runs the client, if there is one. Add it last, so that it is stopped
// when nobody uses it any more.
func (p *process) addMemcached(st *stores) {
	if st.memcached != nil {
		p.addRun("memcached", st.memcached.Run, nil)
	}
}

func dynamoDBOptions(c DynamoDBConfig) index.DynamoDBOptions {
	return index.DynamoDBOptions{Table: c.Table, Endpoint: c.Endpoint, Region: c.Region}
}
