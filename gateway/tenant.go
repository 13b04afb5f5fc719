package gateway

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"
)

// TenantHeader names the tenant of a request where tenancy is by header.
const TenantHeader = "X-Scope-OrgID"

// DefaultTenant is the tenant of all requests where there is only one.
const DefaultTenant = "default"

// maxTenantBytes bounds the name of a tenant.
const maxTenantBytes = 150

// maxTenants bounds how many tenants one request can be about.
const maxTenants = 100

type tenantKey struct{}

// WithTenant gives a context for requests of a tenant.
func WithTenant(ctx context.Context, tenant string) context.Context {
	return withTenants(ctx, []string{tenant})
}

// TenantOf is the tenant that WithTenant put into the context, or "". No storage
// has anything of the name that it gives where there are several tenants.
func TenantOf(ctx context.Context) string { return strings.Join(tenantsOf(ctx), "|") }

func withTenants(ctx context.Context, tenants []string) context.Context {
	return context.WithValue(ctx, tenantKey{}, tenants)
}

func tenantsOf(ctx context.Context) []string {
	ts, _ := ctx.Value(tenantKey{}).([]string)
	return ts
}

// Tenancy says where the tenant of a request comes from.
type Tenancy string

// The kinds of tenancy.
const (
	Single Tenancy = "single" // all is of DefaultTenant
	Header Tenancy = "header" // from TenantHeader, set by an authenticating proxy
)

// tenants of a request, sorted, each once: one, or with federation those that the
// header has between bars. An error is the client's.
func (t Tenancy) tenants(r *http.Request, federation bool) ([]string, error) {
	if t != Header {
		return []string{DefaultTenant}, nil
	}
	header := r.Header.Get(TenantHeader)
	if header == "" {
		return nil, fmt.Errorf("no tenant: set the header %s", TenantHeader)
	}
	names := []string{header}
	if federation {
		names = strings.Split(header, "|")
		slices.Sort(names)
		names = slices.Compact(names)
	}
	if len(names) > maxTenants {
		return nil, fmt.Errorf("the header %s has %d tenants, the limit is %d", TenantHeader, len(names), maxTenants)
	}
	for _, name := range names {
		switch {
		case name == "":
			return nil, fmt.Errorf("the header %s has an empty tenant beside a bar", TenantHeader)
		case len(name) > maxTenantBytes:
			return nil, fmt.Errorf("the header %s has a tenant of %d bytes, the limit is %d", TenantHeader, len(name), maxTenantBytes)
		case !utf8.ValidString(name):
			return nil, fmt.Errorf("the header %s is not valid UTF-8", TenantHeader)
		}
	}
	return names, nil
}
