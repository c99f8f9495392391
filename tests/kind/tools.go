//go:build tools

// Package kind pins kind itself, and what its nodes have to look at containers.
package kind

import (
	_ "sigs.k8s.io/cri-tools/cmd/crictl"
	_ "sigs.k8s.io/kind"
)
