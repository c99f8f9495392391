//go:build tools

// Package promtool pins Prometheus' promtool, by which tests check the alert
// rules. It is never compiled: the import is what `go mod tidy` keeps in go.mod.
package promtool

import _ "github.com/prometheus/prometheus/cmd/promtool"
