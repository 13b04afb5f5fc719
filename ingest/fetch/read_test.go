package fetch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/epimetheus-tsdb/epimetheus/ingest/fetch/fetchpb"
)

// ingester answers for series "a" to "e", by refs 0 to 4, in two generations.
type ingester struct {
	fetchpb.UnimplementedFetchServer
	old, gone bool
	asked     int // labels
	spoil     func(*fetchpb.ReadResponse)
}

func name(ref uint32) labels.Labels {
	return labels.FromStrings("__name__", string(rune('a'+ref)), "of", "all")
}

var header = &fetchpb.Header{Start: []byte("0123456789abcdef")}

func (i *ingester) Read(req *fetchpb.ReadRequest, ss fetchpb.Fetch_ReadServer) error {
	if i.old {
		return i.UnimplementedFetchServer.Read(req, ss)
	}
	if err := ss.Send(&fetchpb.ReadResponse{Header: header}); err != nil {
		return err
	}
	for _, c := range []Columns{
		{Generation: 1, Refs: []uint32{0, 2}, Counts: []uint32{2, 1}, Chunks: []Chunk{
			{Encoding: chunkenc.EncXOR2, MinT: 1100, MaxT: 1200, Data: []byte("first")},
			{Encoding: chunkenc.EncXOR, MinT: 900, MaxT: 1000, Data: []byte("2nd")},
			{Encoding: Sample, MinT: 1500, MaxT: 1500, Data: []byte("12345678")},
		}},
		{Generation: 1, Refs: []uint32{3}, Counts: []uint32{1}, Chunks: []Chunk{{Encoding: Sample, MinT: 1600, MaxT: 1600, Data: []byte("87654321")}}},
		{Generation: 2, Refs: []uint32{1, 4}, Counts: []uint32{0, 0}},
	} {
		for _, x := range c.Chunks {
			c.Data = append(c.Data, x.Data...)
		}
		m := &fetchpb.ReadResponse{}
		c.Fill(m, req.Mint)
		if i.spoil != nil {
			i.spoil(m)
		}
		if err := ss.Send(m); err != nil {
			return err
		}
	}
	return nil
}

func (i *ingester) Series(req *fetchpb.SeriesRequest, ss fetchpb.Fetch_SeriesServer) error {
	if i.gone {
		return status.Error(codes.NotFound, "gone")
	}
	var sets LabelSets
	for _, ref := range req.Refs {
		i.asked++
		sets.Add(name(ref))
		if i.asked%2 == 0 {
			if err := ss.Send(sets.Take()); err != nil {
				return err
			}
		}
	}
	if m := sets.Take(); m != nil {
		return ss.Send(m)
	}
	return nil
}

func (i *ingester) Select(_ *fetchpb.SelectRequest, ss fetchpb.Fetch_SelectServer) error {
	return ss.Send(&fetchpb.SelectResponse{Header: header, Series: []*fetchpb.Series{{Labels: []string{"__name__", "whole"}}}})
}

func serve(t *testing.T, i *ingester) *Client {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	s := grpc.NewServer()
	fetchpb.RegisterFetchServer(s, i)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:ingester", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		s.Stop()
		<-done
	})
	return NewClient(conn, NewNames(1<<20, prometheus.NewRegistry()), nil)
}

func show(lists [][]Series) (out []string) {
	for i, l := range lists {
		for _, s := range l {
			text := fmt.Sprint(i, " ", s.Labels.Get("__name__"))
			for _, c := range s.Chunks {
				text += fmt.Sprintf(" %d %d-%d %s", c.Encoding, c.MinT, c.MaxT, c.Data)
			}
			out = append(out, text)
		}
	}
	return out
}

func TestLabelsCrossOnce(t *testing.T) {
	i := &ingester{}
	c := serve(t, i)
	for round := range 3 {
		lists, hd, err := c.Select(t.Context(), Query{Tenant: "t", MinT: 1000, MaxT: 2000})
		if err != nil || string(hd.Start) != string(header.Start) {
			t.Fatal(hd, err)
		}
		want := []string{"0 a 4 1100-1200 first 1 900-1000 2nd", "0 c 0 1500-1500 12345678", "0 d 0 1600-1600 87654321", "1 b", "1 e"}
		if got := show(lists); !slices.Equal(got, want) {
			t.Fatalf("%q", got)
		}
		if i.asked != 5 {
			t.Fatalf("round %d: labels of %d series were asked for", round, i.asked)
		}
	}
	// Of another tenant refs mean something else.
	if _, _, err := c.Select(t.Context(), Query{Tenant: "u", MinT: 1000, MaxT: 2000}); err != nil || i.asked != 10 {
		t.Error(i.asked, err)
	}
}

// TestKeep: an answer that was not released stays as it is, whatever others release.
func TestKeep(t *testing.T) {
	c := serve(t, &ingester{})
	others := serve(t, &ingester{spoil: func(m *fetchpb.ReadResponse) { m.Data = bytes.ToUpper(m.Data) }})
	want := []string{"0 a 4 1100-1200 first 1 900-1000 2nd", "0 c 0 1500-1500 12345678", "0 d 0 1600-1600 87654321", "1 b", "1 e"}
	var open [][][]Series
	for round := range 20 {
		var release func()
		of := c
		if round%3 != 0 {
			of = others
		}
		lists, _, err := of.Select(t.Context(), Query{Tenant: "t", MinT: 1000, MaxT: 2000, Keep: func(f func()) { release = f }})
		if err != nil || release == nil {
			t.Fatal(err)
		}
		if round%3 == 0 {
			open = append(open, lists)
			continue
		}
		release()
	}
	for _, lists := range open {
		if got := show(lists); !slices.Equal(got, want) {
			t.Errorf("%q", got)
		}
	}
}

// TestManyLabels: labels of many series are asked for in several requests, and none is
// too large for an ingester.
func TestManyLabels(t *testing.T) {
	i := &ingester{}
	c := serve(t, i)
	c.atOnce = 2
	l := &list{refs: []uint32{4, 2, 0, 3, 1}, series: make([]Series, 5)}
	if err := c.name(t.Context(), "s", "t", l); err != nil || i.asked != 5 {
		t.Error(i.asked, err)
	}
	for k, s := range l.series {
		if !labels.Equal(s.Labels, name(l.refs[k])) {
			t.Errorf("series %d is %s", l.refs[k], s.Labels)
		}
	}
	l = &list{refs: slices.Repeat([]uint32{1 << 31}, 900<<10), series: make([]Series, 900<<10)}
	if err := serve(t, &ingester{gone: true}).name(t.Context(), "s", "t", l); status.Code(err) != codes.NotFound {
		t.Error("it isn't the ingester that answers:", err)
	}
}

func TestSelectWhole(t *testing.T) {
	for what, i := range map[string]*ingester{"an earlier version": {old: true}, "dropped": {gone: true}} {
		lists, _, err := serve(t, i).Select(t.Context(), Query{Tenant: "t", MinT: 1000, MaxT: 2000})
		if got := show(lists); err != nil || !slices.Equal(got, []string{"0 whole"}) {
			t.Errorf("%s: %q %v", what, got, err)
		}
	}
}

func TestColumnsThatDontFit(t *testing.T) {
	for what, spoil := range map[string]func(*fetchpb.ReadResponse){
		"a count":   func(m *fetchpb.ReadResponse) { m.Chunks = m.Chunks[1:] },
		"counts":    func(m *fetchpb.ReadResponse) { m.Chunks[0] += 1 << 31 },
		"times":     func(m *fetchpb.ReadResponse) { m.Mint = append(m.Mint, 1) },
		"data":      func(m *fetchpb.ReadResponse) { m.Sizes = append(m.Sizes[:0:0], 1<<31, 0, 0) },
		"a ref":     func(m *fetchpb.ReadResponse) { m.Refs = append(m.Refs, 1) },
		"time span": func(m *fetchpb.ReadResponse) { m.Span = []uint64{1 << 63, 0, 0} },
	} {
		if _, _, err := serve(t, &ingester{spoil: spoil}).Select(t.Context(), Query{Tenant: "t", MinT: 1000}); !errors.Is(err, errProtocol) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestNamesAreBounded(t *testing.T) {
	reg := prometheus.NewRegistry()
	n := NewNames(10_000, reg)
	l := &list{}
	var which []int
	for ref := range uint32(40) {
		l.refs, l.series, which = append(l.refs, ref), append(l.series, Series{Labels: name(ref)}), append(which, int(ref))
	}
	for g := range uint64(20) {
		n.put(scope{"s", "t", g}, l, which)
		if n.bytes > n.max {
			t.Fatalf("%d bytes", n.bytes)
		}
	}
	if len(n.get(scope{"s", "t", 19}, l)) != 0 || len(n.get(scope{"s", "t", 0}, l)) != 40 {
		t.Error("not the oldest went")
	}
	n.put(scope{"s", "t", 20}, &list{refs: []uint32{maxRef}, series: l.series}, []int{0}) // takes no memory
	if got := testutil.ToFloat64(n.asks); got != 801 {
		t.Error(got)
	}
}
