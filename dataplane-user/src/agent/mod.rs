//! The node agent: wires the watches, the compiler, `sync` and the kernel together. It calls and decides nothing itself.

mod notify;

use crate::config::AgentArgs;
use anyhow::Result;

/// Runs until SIGTERM or SIGINT. Leaves everything in place.
pub fn run(args: AgentArgs) -> Result<()> {
    tracing::info!(bpffs = %args.bpffs.display(), "agent of Portolan {}", env!("CARGO_PKG_VERSION"));
    anyhow::bail!("the agent is not wired up yet")
}
