//go:build tools

// Package coredns pins CoreDNS, which wants other versions of what
// Kubernetes is built from and so lives in a module of its own.
// It is never compiled: the import is what `go mod tidy` keeps in go.mod.
package coredns

import _ "github.com/coredns/coredns"
