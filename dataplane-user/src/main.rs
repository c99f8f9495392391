//! `portolan`: the node agent and its command line.

fn main() -> anyhow::Result<()> {
    Ok(())
}
