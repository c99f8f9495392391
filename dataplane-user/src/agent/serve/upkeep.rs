//! What is due from time to time, most of it beside the loop: audits, sweeps of the flow tables, names, sockets.

use super::accounting::Accounting;
use super::{JOB, SWEEP, Service};
use crate::admin::names::Names;
use crate::expire::{self, Clock, Swept};
use crate::kernel::callers::CallerCells;
use crate::kernel::maps::{KernelMaps, MapError};
use crate::kernel::sockets::{self, SocketError};
use crate::memory;
use crate::sync::Maps as _;
use dataplane_common::tables::{
    self, Backends, Closing, Flows, Frontends, HalfOpen, SocketPeers, Table as _, TableKind,
};
use std::collections::BTreeMap;
use std::time::Instant;

impl Service {
    /// Beside the loop: a node's own UDP sockets do not follow their endpoints by themselves (C1).
    pub(super) fn close_orphans(&mut self) {
        let maps = self.dataplane.mirror().1.clone();
        let beat = self.health.heartbeat().part("the look through sockets", JOB);
        self.closing = Some(tokio::task::spawn_blocking(move || {
            let _at_work = beat;
            let closed = maps
                .map::<SocketPeers>()
                .and_then(|peers| Ok((peers, maps.map::<Backends>()?)))
                .map_err(SocketError::from)
                .and_then(|(peers, backends)| sockets::close_orphans(&peers, &backends));
            match closed {
                Ok(0) => {}
                Ok(closed) => tracing::info!("closed {closed} UDP sockets whose endpoint is gone"),
                Err(error) => tracing::warn!("{error}"),
            }
        }));
    }

    /// Beside the loop, and not for every change: people read it.
    pub(super) fn write_names(&mut self) {
        let names = Names::new(self.dataplane.mirror().0.names());
        let bpffs = self.bpffs.clone();
        let beat = self.health.heartbeat().part("the writing of names", JOB);
        self.naming = Some(tokio::task::spawn_blocking(move || {
            let _at_work = beat;
            if let Err(error) = names.write(&bpffs) {
                tracing::warn!("cannot write the names of Services for the command line: {error}");
            }
        }));
    }

    /// Reads the kernel's tables again and repairs what differs (H2).
    pub(super) fn audit(&mut self) {
        self.audited = Instant::now();
        let (mirror, maps) = self.dataplane.mirror();
        let begun = Instant::now();
        let result = mirror.audit(maps, begun);
        if let Ok(repaired) = result {
            self.health.audited(repaired);
            self.audit_soon = repaired > 0;
        }
        match result {
            Ok(0) => tracing::debug!("audit: nothing to repair, {} ms", begun.elapsed().as_millis()),
            Ok(repaired) => {
                tracing::warn!("audit: repaired {repaired} entries. Does something else write the maps?");
                self.metrics.repairs.add(repaired as u64);
            }
            Err(error) => return self.failed(&error),
        }
        self.metrics.audits.add(1);
    }

    /// Removes idle flows from time to time, beside the loop; and clears what nothing needs any more of the filters.
    pub(super) async fn sweep(&mut self) {
        match self.sweeping.take() {
            Some(sweeping) if !sweeping.is_finished() => self.sweeping = Some(sweeping),
            Some(sweeping) => match sweeping.await {
                Ok(Ok((bits, counts))) => {
                    self.fill(&counts);
                    self.flow_entries =
                        counts.iter().find(|(name, _)| *name == Flows::NAME).map_or(0, |(_, count)| *count);
                    let (mirror, maps) = self.dataplane.mirror();
                    match mirror.clear_bits(maps, &bits, Instant::now()) {
                        Ok(outcome) => self.metrics.calls.add(outcome.calls),
                        Err(error) => self.failed(&error),
                    }
                }
                Ok(Err(error)) => tracing::warn!("sweep of the flow tables: {error}"),
                Err(error) => tracing::error!("sweep of the flow tables: {error}"),
            },
            None if self.swept.elapsed() >= SWEEP => self.start_sweep(),
            None => {}
        }
    }

    fn start_sweep(&mut self) {
        self.swept = Instant::now();
        let (mirror, maps) = self.dataplane.mirror();
        let (mut bits, maps) = (mirror.lingering_bits(Instant::now()), maps.clone());
        let room = maps.capacity::<Flows>().unwrap_or(usize::MAX);
        let (idle, clock) = (self.idle.for_table(self.flow_entries, room), self.clock.clone());
        let (fold, metrics, recount) = (self.fold.clone(), self.metrics.clone(), self.recount.clone());
        // Programs of another version, if they could not be replaced, may mark no cells.
        let are_marked = self.health.is_attached() && self.hooks.is_none();
        let beat = self.health.heartbeat().part("the sweep of the flow tables", JOB);
        self.sweeping = Some(tokio::task::spawn_blocking(move || {
            let _at_work = beat;
            let now = Clock { now: clock.tick(), tick: clock.tick_length() };
            let cells = maps.map().and_then(|table| CallerCells::map(&table));
            let cells =
                cells.inspect_err(|error| tracing::warn!("the filter of replies is not cleared: {error}"));
            let cells = cells.ok().filter(|_| are_marked);
            let mut marks = cells.as_ref().map(|cells| cells.old(now.now)).unwrap_or_default();
            let mut accounts = Accounting::new(&maps, fold, recount, metrics);
            let swept = expire::sweep(&maps, &idle, now, &mut bits, &mut marks, &mut accounts)?;
            accounts.end();
            if let Some(cells) = cells {
                cells.clear(&marks);
            }
            tracing::debug!("{swept:?}");
            let counts = count(&maps, &swept)?;
            // Here, beside the loop: all that was freed since the last time, and code that ran meanwhile.
            memory::give_back();
            memory::let_go_of_code();
            Ok((bits, counts))
        }));
    }

    /// Takes over how full the tables are; warns of those that soon are full.
    pub(super) fn fill(&mut self, counts: &[(&'static str, usize)]) {
        let (mirror, maps) = self.dataplane.mirror();
        let rooms: BTreeMap<_, _> = maps.iter().map(|(name, map)| (name, map.shape().max_entries)).collect();
        let counted = counts.iter().filter_map(|(name, count)| Some((*name, *count, *rooms.get(name)?)));
        for (table, entries, room) in mirror.fill().into_iter().chain(counted) {
            self.metrics.filled(table, entries, room);
        }
    }
}

/// How many entries the hash tables have: that of flows as it was swept, all others counted, but for what `sync` keeps count of.
/// A ring has one name for each flow of its stage; it may have more, of flows that are further or gone.
fn count(maps: &KernelMaps, swept: &Swept) -> Result<Vec<(&'static str, usize)>, MapError> {
    let mut counts = vec![
        (Flows::NAME, swept.entries()),
        (HalfOpen::NAME, swept.half_open / 2),
        (Closing::NAME, swept.closing / 2),
    ];
    for (name, kind, _) in tables::ALL {
        let uncounted = match kind {
            TableKind::Hash | TableKind::HashByEntry | TableKind::LruHash => *name != Frontends::NAME,
            // Arrays have all their elements; a trie is written by the agent alone.
            TableKind::Array | TableKind::MappedArray | TableKind::PerCpuArray => false,
            TableKind::LpmTrie | TableKind::SkStorage => false,
        };
        if uncounted && !counts.iter().any(|(counted, _)| counted == name) {
            counts.push((name, maps.count(name)?));
        }
    }
    Ok(counts)
}
