package gateway

import (
	"context"
	"fmt"
	"net/http"
	"unicode/utf8"
)

// TenantHeader names the tenant of a request where tenancy is by header.
const TenantHeader = "X-Scope-OrgID"

// DefaultTenant is the tenant of all requests where there is only one.
const DefaultTenant = "default"

// maxTenantBytes bounds the name of a tenant.
const maxTenantBytes = 150

type tenantKey struct{}

// WithTenant gives a context for requests of a tenant.
func WithTenant(ctx context.Context, tenant string) context.Context {
	return context.WithValue(ctx, tenantKey{}, tenant)
}

// TenantOf is the tenant that WithTenant put into the context, or "".
func TenantOf(ctx context.Context) string {
	t, _ := ctx.Value(tenantKey{}).(string)
	return t
}

// Tenancy says where the tenant of a request comes from.
type Tenancy string

// The kinds of tenancy.
const (
	Single Tenancy = "single" // all is of DefaultTenant
	Header Tenancy = "header" // from TenantHeader, set by an authenticating proxy
)

// tenant of a request; an error is the client's.
func (t Tenancy) tenant(r *http.Request) (string, error) {
	if t != Header {
		return DefaultTenant, nil
	}
	switch name := r.Header.Get(TenantHeader); {
	case name == "":
		return "", fmt.Errorf("no tenant: set the header %s", TenantHeader)
	case len(name) > maxTenantBytes:
		return "", fmt.Errorf("the header %s has %d bytes, the limit is %d", TenantHeader, len(name), maxTenantBytes)
	case !utf8.ValidString(name):
		return "", fmt.Errorf("the header %s is not valid UTF-8", TenantHeader)
	default:
		return name, nil
	}
}
