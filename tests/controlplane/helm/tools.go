//go:build tools

// Package helm pins Helm, which brings a Kubernetes client of its own
// and so lives in a module of its own.
// It is never compiled: the import is what `go mod tidy` keeps in go.mod.
package helm

import _ "helm.sh/helm/v4/cmd/helm"
