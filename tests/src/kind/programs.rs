//! The Go programs of a kind cluster: found in PATH, or built from the modules in `tests/kind`, which pin them.

use crate::controlplane::Extra;

/// kind itself.
pub(super) const KIND: Extra =
    Extra { name: "kind", module: "kind", programs: &[("sigs.k8s.io/kind", "kind")], tags: "" };
/// kubectl.
pub(super) const KUBECTL: Extra = Extra {
    name: "kubectl",
    module: "kind/kubernetes",
    programs: &[("k8s.io/kubernetes/cmd/kubectl", "kubectl")],
    tags: "",
};
/// What a node image holds of Kubernetes.
pub(super) const KUBERNETES: Extra = Extra {
    name: "Kubernetes",
    module: "kind/kubernetes",
    programs: &[
        ("k8s.io/kubernetes/cmd/kube-apiserver", "kube-apiserver"),
        ("k8s.io/kubernetes/cmd/kube-controller-manager", "kube-controller-manager"),
        ("k8s.io/kubernetes/cmd/kube-proxy", "kube-proxy"),
        ("k8s.io/kubernetes/cmd/kube-scheduler", "kube-scheduler"),
        ("k8s.io/kubernetes/cmd/kubeadm", "kubeadm"),
        ("k8s.io/kubernetes/cmd/kubectl", "kubectl"),
        ("k8s.io/kubernetes/cmd/kubelet", "kubelet"),
        ("go.etcd.io/etcd/server/v3", "etcd"),
    ],
    tags: "",
};
/// The container runtime of a node, but for runc.
pub(super) const CONTAINERD: Extra = Extra {
    name: "containerd",
    module: "kind/containerd",
    programs: &[
        ("github.com/containerd/containerd/v2/cmd/containerd", "containerd"),
        ("github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2", "containerd-shim-runc-v2"),
        ("github.com/containerd/containerd/v2/cmd/ctr", "ctr"),
    ],
    tags: "",
};
/// By which kind asks a node for its containers.
pub(super) const CRICTL: Extra = Extra {
    name: "crictl",
    module: "kind",
    programs: &[("sigs.k8s.io/cri-tools/cmd/crictl", "crictl")],
    tags: "",
};
/// The plugins of the pod network.
pub(super) const CNI: Extra = Extra {
    name: "the set of CNI plugins",
    module: "kind/cni",
    programs: &[
        ("github.com/containernetworking/plugins/plugins/ipam/host-local", "host-local"),
        ("github.com/containernetworking/plugins/plugins/main/loopback", "loopback"),
        ("github.com/containernetworking/plugins/plugins/main/ptp", "ptp"),
        ("github.com/containernetworking/plugins/plugins/meta/portmap", "portmap"),
    ],
    tags: "",
};
