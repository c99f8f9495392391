//! The tier `kind`: the tour in a real Kubernetes cluster, made by kind. It takes minutes, and up to half an hour where the node image is
//! made first, so it runs only where it is named.

use dataplane_tests::lab::program;
use std::process::Command;

/// The node image of the cluster, if it is another than kind's own choice: set by `cargo xtask test kind --node-image IMAGE`.
const NODE_IMAGE: &str = "PORTOLAN_KIND_NODE_IMAGE";

/// Installed by the chart, looked at from inside, outside and a workstation, replaced under load, uninstalled: every step and check of
/// the tour, and nothing is left.
#[test]
fn the_tour_in_a_kind_cluster_is_as_it_should_be() {
    let mut command = Command::new(program("portolan-lab", "PORTOLAN_LAB_PROGRAM").unwrap());
    command.args(["run", "--kind", "--once"]);
    if let Some(image) = std::env::var_os(NODE_IMAGE) {
        command.arg("--node-image").arg(image);
    }
    let status = command.status().unwrap();
    assert!(status.success(), "{status}: what failed is said above");
}
