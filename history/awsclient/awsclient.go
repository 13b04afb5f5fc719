// Package awsclient configures the clients of S3 and DynamoDB, and of servers that speak their
// protocols.
package awsclient

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/ratelimit"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
)

// Options of a client. Credentials come from the AWS SDK's own chain, if there are none here.
type Options struct {
	Endpoint string // URL; empty for AWS itself
	Region   string // empty: from the AWS configuration; with an endpoint, us-east-1 if that has none either

	AccessKey, SecretKey string

	// HTTPClient replaces the SDK's client; nil: there is one that waits for the headers
	// of an answer as long as that, and keeps so many connections to a host.
	HTTPClient     *http.Client
	HeaderTimeout  time.Duration
	MaxConnections int

	// Retry says how often and when a request is repeated.
	Retry func(*retry.StandardOptions)
}

// Load makes the configuration; it sends nothing to the service.
func Load(ctx context.Context, o Options) (aws.Config, error) {
	load := []func(*config.LoadOptions) error{
		config.WithHTTPClient(awshttp.NewBuildableClient().WithTransportOptions(func(t *http.Transport) {
			t.ResponseHeaderTimeout, t.MaxIdleConnsPerHost = o.HeaderTimeout, o.MaxConnections
		})),
		config.WithRetryer(func() aws.Retryer {
			return retry.NewStandard(func(r *retry.StandardOptions) {
				// Callers have deadlines, or back off and try for as long as it takes; a
				// token bucket would make one slow minute fail the next.
				r.RateLimiter = ratelimit.None
				o.Retry(r)
			})
		}),
	}
	if o.Region != "" {
		load = append(load, config.WithRegion(o.Region))
	}
	if o.AccessKey != "" {
		load = append(load, config.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(o.AccessKey, o.SecretKey, "")))
	}
	cfg, err := config.LoadDefaultConfig(ctx, load...)
	if err != nil {
		return cfg, err
	}
	if o.HTTPClient != nil { // not before: the SDK adds AWS_CA_BUNDLE to its own clients only
		cfg.HTTPClient = o.HTTPClient
	}
	if o.Endpoint != "" {
		cfg.BaseEndpoint = aws.String(o.Endpoint)
	}
	if cfg.Region == "" {
		if o.Endpoint == "" {
			return cfg, errors.New("no region given, neither in the configuration nor in AWS_REGION")
		}
		cfg.Region = "us-east-1"
	}
	return cfg, nil
}
