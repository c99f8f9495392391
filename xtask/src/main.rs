//! The workshop's verbs.

fn main() -> anyhow::Result<()> {
    Ok(())
}
