package sidecar

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

const (
	gatewayTimeout   = 15 * time.Second
	maxGatewayAnswer = 64 << 20
)

// postToGateway posts JSON to a path of a gateway's API, for a tenant, and decodes
// the data of the answer, unless to is nil. The error says what the gateway said.
func postToGateway(ctx context.Context, client *http.Client, gateway, path, tenant string, what, to any) error {
	ctx, cancel := context.WithTimeout(ctx, gatewayTimeout)
	defer cancel()
	body, err := json.Marshal(what)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(gateway, "/")+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Scope-OrgID", tenant)
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer := struct {
		Error string `json:"error"`
		Data  any    `json:"data"`
	}{Data: to}
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // for the error only
		text := strings.TrimSpace(string(b))
		if json.Unmarshal(b, &answer) == nil && answer.Error != "" {
			text = answer.Error
		}
		return fmt.Errorf("%s answered %s: %s", gateway, resp.Status, text)
	}
	if to == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxGatewayAnswer)).Decode(&answer); err != nil {
		return fmt.Errorf("what %s answered: %w", gateway, err)
	}
	return nil
}
