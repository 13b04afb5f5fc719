package account_test

import (
	"context"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/epimetheus-tsdb/epimetheus/gateway/account"
)

// Of the tenant that holds most the heaviest query ends, not that of another that is
// heavier than each of its many.
func TestMemoryOfTenants(t *testing.T) {
	m := account.NewMemory(100, prometheus.NewRegistry())
	open := func(tenant string, bytes int64) context.Context {
		ctx, a, done := m.Open(t.Context(), tenant, account.Limits{})
		t.Cleanup(done)
		a.Hold(bytes)
		return ctx
	}
	few := open("few", 40)
	var many []context.Context
	for i := range int64(6) {
		many = append(many, open("many", 7+i))
	}
	require.NoError(t, few.Err())
	for i, ctx := range many[:5] {
		require.NoError(t, ctx.Err(), i)
	}
	last := open("many", 5)
	require.NoError(t, few.Err())
	require.NoError(t, last.Err())
	require.ErrorIs(t, context.Cause(many[5]), account.ErrLimit)
	require.ErrorContains(t, context.Cause(many[5]), "held 12 bytes of memory, the most of its tenant's, which held 62")
}
