//! What a sweep of the flow tables tells the accounts: traffic that comes to the totals, and whether the counts of what is open are those
//! of the flows and sockets that there are (L2).

use crate::expire::Accounts;
use crate::kernel::events::{self, EventRing};
use crate::kernel::fold::Fold;
use crate::kernel::maps::{KernelMaps, MapError};
use crate::kernel::open::OpenCells;
use crate::kernel::open_sockets::OpenSockets;
use crate::metrics::Metrics;
use crate::recount::{Live, Recount};
use crate::sync::Maps as _;
use dataplane_common::counter::Open;
use dataplane_common::event::{Ended, Event, Place, What};
use dataplane_common::flow::{Flow, FlowKey, Stage};
use dataplane_common::tables::{Backends, Flows, OpenCounts, SocketNames};
use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, PoisonError};

/// What recounts keep from one to the next.
#[derive(Debug)]
pub(in crate::agent) struct Recounting(Mutex<State>);

#[derive(Debug)]
struct State {
    recount: Recount,
    sockets: Sockets,
}

/// The walk through sockets.
#[derive(Debug)]
enum Sockets {
    /// No socket is given an endpoint.
    None,
    /// It was not needed yet.
    Unloaded,
    /// It is loaded.
    Loaded(OpenSockets),
    /// The kernel refuses it, which was said.
    Refused,
}

impl Recounting {
    /// Of an agent whose socket hooks are attached, or not.
    pub(in crate::agent) fn new(has_sockets: bool) -> Self {
        let sockets = if has_sockets { Sockets::Unloaded } else { Sockets::None };
        Self(Mutex::new(State { recount: Recount::default(), sockets }))
    }
}

impl Sockets {
    /// Adds the sockets that each backend counts; false if nobody knows.
    fn count(&mut self, maps: &KernelMaps, live: &mut Live) -> Result<bool, MapError> {
        let names = maps.map::<SocketNames>()?;
        let loaded = match std::mem::replace(self, Self::Refused) {
            Self::None => {
                *self = Self::None;
                return Ok(true);
            }
            Self::Refused => return Ok(false),
            Self::Loaded(walk) => Ok(walk),
            Self::Unloaded => OpenSockets::new(maps.capacity::<Backends>()?),
        };
        match loaded.and_then(|walk| walk.count(names.as_fd(), live).map(|()| walk)) {
            Ok(walk) => *self = Self::Loaded(walk),
            Err(error) => tracing::info!(
                "how many sockets are connected to endpoints is taken as it was counted: the kernel does not let this process walk \
                 through them: {error}"
            ),
        }
        Ok(matches!(self, Self::Loaded(_)))
    }
}

/// The accounts of one sweep.
pub(super) struct Accounting<'a> {
    maps: &'a KernelMaps,
    fold: Arc<Fold>,
    recounting: Arc<Recounting>,
    metrics: Arc<Metrics>,
    /// The counts, and what they were before the sweep.
    counts: Option<(OpenCells, Vec<Open>)>,
    live: Live,
    /// Where somebody watches.
    ring: Option<EventRing>,
    failed: Option<io::Error>,
}

impl<'a> Accounting<'a> {
    /// The counts are read first of all.
    pub(super) fn new(
        maps: &'a KernelMaps,
        fold: Arc<Fold>,
        recounting: Arc<Recounting>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let cells = maps.map::<OpenCounts>().and_then(|table| OpenCells::map(&table));
        let cells = cells.inspect_err(|error| {
            tracing::warn!("the counts of open connections are not looked after: {error}");
        });
        let counts = cells.ok().map(|cells| {
            let before = cells.read();
            (cells, before)
        });
        let ring = EventRing::open(maps).ok().filter(EventRing::is_on);
        Self { maps, fold, recounting, metrics, counts, live: HashMap::new(), ring, failed: None }
    }

    /// The sweep is over.
    pub(super) fn end(self) {
        if let Some(error) = self.failed {
            tracing::warn!("the traffic of Services is not up to date: {error}");
        }
    }

    /// Puts right what is wrong.
    fn recount(&mut self) -> Result<(), MapError> {
        let Some((cells, before)) = &self.counts else { return Ok(()) };
        let mut state = self.recounting.0.lock().unwrap_or_else(PoisonError::into_inner);
        let State { recount, sockets } = &mut *state;
        let all = sockets.count(self.maps, &mut self.live)?;
        let after = cells.read();
        let backends = self.maps.map::<Backends>()?;
        // One that cannot be read now is so the next time.
        let generation = |id| Some(backends.get(&id).ok()??.status().generation());
        for (backend, by) in recount.corrections(before, &after, &self.live, all, generation) {
            tracing::warn!("{} open connections of backend {backend} were miscounted", by.unsigned_abs());
            cells.correct(backend, by);
            self.metrics.open_drift.add(by.unsigned_abs());
        }
        Ok(())
    }
}

impl Accounts for Accounting<'_> {
    fn fold(&mut self, keys: &[FlowKey]) {
        self.failed = self.fold.fold(keys).err().or(self.failed.take());
    }

    fn seen(&mut self, flow: &Flow) {
        if flow.has(Flow::COUNTED_OPEN) {
            *self.live.entry((flow.backend, flow.generation)).or_default() += 1;
        }
    }

    fn all_seen(&mut self) {
        if let Err(error) = self.recount() {
            tracing::warn!("the counts of open connections are not looked after: {error}");
        }
    }

    fn idle(&mut self, keys: &[FlowKey]) {
        if let Some(ring) = &self.ring {
            tell_idle(ring, self.maps, keys);
        }
    }

    fn ending(&mut self, keys: &[FlowKey]) {
        self.failed = self.fold.end(keys).err().or(self.failed.take());
    }
}

/// Tells whoever watches of flows that are about to be removed because they are idle. What ended before was told then.
fn tell_idle(ring: &EventRing, maps: &KernelMaps, keys: &[FlowKey]) {
    for key in keys {
        let Ok(Some(flow)) = maps.get::<Flows>(key) else { continue };
        if flow.has(Flow::REPLY) || flow.stage() == Stage::Closing {
            continue;
        }
        let partner = maps.get::<Flows>(&flow.partner(key.proto())).ok().flatten();
        let ((packets_in, bytes_in), (packets_out, bytes_out)) =
            (flow.passed(), partner.map_or((0, 0), |partner| partner.passed()));
        ring.write(&Event {
            key: *key,
            src: flow.src,
            dst: flow.dst,
            src_port: flow.src_port,
            dst_port: flow.dst_port,
            service: flow.service,
            backend: flow.backend,
            packets_in: packets_in as u32,
            bytes_in,
            packets_out: packets_out as u32,
            bytes_out,
            what: What::ended(Ended::Idle).at(Place::Sweep),
            flags: flow.flags(),
            ..events::record()
        });
    }
}
