//! `--dry-run`: reads all objects once, writes the tables to memory, and prints them. It needs no right and touches nothing.

use super::dataplane::Dataplane;
use super::settings::{self, Settings};
use crate::config::{AgentArgs, Machine};
use crate::kernel::links;
use crate::sync::MemoryMaps;
use crate::watch::cluster::Answered;
use anyhow::{Context as _, Result, bail};
use std::io::Write as _;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// How long the objects may take to arrive.
const PATIENCE: Duration = Duration::from_secs(60);

/// Prints the tables that would be written.
///
/// # Errors
/// If the objects cannot be read.
pub(super) async fn print(args: &AgentArgs) -> Result<()> {
    let interfaces = links::follow().await?;
    let addresses = super::own_addresses(&interfaces.borrow(), &settings::choice(args));
    // What depends on the kernel is shown as on a new one.
    let settings = Settings::new(args, links::netns_cookie().unwrap_or_default(), true);
    let (sender, mut changes) = mpsc::channel(super::CHANGES);
    let _watch = super::watch_objects(args, &settings, Answered::default(), sender).await?;
    let sizes = args.map_sizes(Machine::this()).into_iter().map(|size| (size.map, size.entries as usize));
    let mut dataplane = Dataplane::open(settings, MemoryMaps::with_capacities(sizes), addresses)?;
    let listed = tokio::time::timeout(PATIENCE, async {
        while !dataplane.is_informed() {
            match changes.recv().await {
                Some(change) => dataplane.take_in(change),
                None => bail!("the source of objects ended"),
            }
        }
        Ok(())
    });
    listed.await.context("not all objects arrived within a minute: see the log")??;
    let flushed = dataplane.flush(Instant::now())?.unwrap_or_default();
    std::io::stdout().write_all(dataplane.text().as_bytes())?;
    for complaint in dataplane.complaints() {
        eprintln!("{complaint}");
    }
    for refused in flushed.outcome.refused {
        eprintln!("Service {}: {}", refused.service, refused.error);
    }
    Ok(())
}
