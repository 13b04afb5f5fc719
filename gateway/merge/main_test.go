package merge_test

import (
	"testing"

	"github.com/epimetheus-tsdb/epimetheus/gateway/gatewaytest"
)

func TestMain(m *testing.M) { gatewaytest.Main(m) }
