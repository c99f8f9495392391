//! The kernel's side of the agent: loading, attaching, maps, links. The only place that names aya.

pub mod bpf;
pub mod hook;
pub mod link;
pub mod links;
pub mod maps;
pub mod pins;

use std::path::Path;

/// Removes every link, map and pin below `bpffs`; says what was removed.
pub fn cleanup(_bpffs: &Path) -> anyhow::Result<Vec<String>> {
    anyhow::bail!("cleanup is not built in yet")
}
