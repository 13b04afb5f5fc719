package chunkfmt

import (
	"fmt"
	"testing"
)

// TestSmallTenants shows what a tenant with few series costs in a block that
// holds many such.
func TestSmallTenants(t *testing.T) {
	set := cachedSets[120]()[0]
	for _, perTenant := range []int{10, 1000} {
		var in []tenantSeries
		tenants := 0
		for i := 0; i+perTenant <= len(set.series) && tenants < 200; i += perTenant {
			for _, s := range set.series[i : i+perTenant] {
				in = append(in, tenantSeries{fmt.Sprintf("tenant-%05d", tenants), s})
			}
			tenants++
		}
		block, sum := writeBlock(t, in, WriterOptions{})
		data := int64(0)
		for _, tenant := range sum.Tenants {
			d, err := ParseDirectory(at(block, tenant.Directory))
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range d.pages {
				data += p.Data.Size
			}
		}
		rest := (int64(len(block)) - data) / int64(tenants)
		t.Logf("%d tenants of %d series: %d bytes each, %d of them not samples", tenants, perTenant, len(block)/tenants, rest)
		if rest > int64(600+60*perTenant) {
			t.Errorf("%d series: %d bytes besides the samples", perTenant, rest)
		}
	}
}
