//! What would become of a packet: the very programs that forward, loaded a second time, on the live tables.
//!
//! They have in common with those that serve what programs only read, and nothing else. Flows, counters, queues, what is remembered
//! of clients: all that programs write is in maps of their own, which end with this process. So a rehearsal leaves no trace, and
//! what a packet's fate may depend on of that (its own flow, its client's affinity) is copied before.

use super::bpf::{self, TestRun};
use super::maps::{KernelMaps, Map, MapError};
use super::object::{Object, ObjectError, Options};
use super::pins::Pins;
use crate::config::MapSize;
use dataplane_common::drop::{Disposition, Reason};
use dataplane_common::flow::{Flow, FlowKey};
use dataplane_common::tables::{
    self, Affinities, BackendTraffic, Flows, Fragments, Outgoings, Reasons, ServiceTraffic, SocketChoices,
    SocketPeers, Table, Uplinks,
};
use std::collections::BTreeMap;
use std::io;

/// Entries of the maps that need few here.
const FEW: u32 = 64;
/// Room for flows: one at a time, both directions, and what the programs look at beside it.
const FLOWS: u32 = 1_024;

/// `TC_ACT_SHOT` and `TC_ACT_REDIRECT`; any other is left to the stack.
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;

/// Why nothing can be rehearsed.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// The programs.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// A map.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The kernel does not run a program.
    #[error("the kernel does not run {program} on a packet: {source}")]
    Run {
        /// Which.
        program: &'static str,
        /// Its answer.
        source: io::Error,
    },
}

/// A packet where it meets the dataplane.
#[derive(Clone, Copy, Debug)]
pub struct Arrival<'a> {
    /// The program there.
    pub program: &'static str,
    /// Index of the interface.
    pub interface: u32,
    /// The packet, from the link-layer header on, where there is one.
    pub data: &'a [u8],
    /// Its five-tuple.
    pub key: FlowKey,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is of a flow: of one that it begins, or of one that is there.
    Served {
        /// What becomes of the client's packets.
        flow: Flow,
        /// They go past the host's stack.
        past_stack: bool,
        /// The flow is in the live table.
        known: bool,
    },
    /// Silence.
    Dropped(Reason),
    /// The sender is told no.
    Refused(Reason),
    /// It goes on as it came.
    Untouched,
}

/// The programs, and their maps.
#[derive(Debug)]
pub struct Rehearsal {
    object: Object,
    maps: KernelMaps,
    live: KernelMaps,
}

impl Rehearsal {
    /// Loads the object beside the maps that are pinned here.
    ///
    /// # Errors
    /// If there are none, or the kernel refuses.
    pub fn open(pins: &Pins) -> Result<Self, RehearsalError> {
        let live = KernelMaps::open(&pins.maps())?;
        let affinities = live.map::<Affinities>()?.capacity() as u32;
        let sizes = [
            (Flows::NAME, FLOWS),
            (Affinities::NAME, affinities),
            (ServiceTraffic::NAME, 1),
            (BackendTraffic::NAME, 1),
            (Fragments::NAME, FEW),
            (SocketPeers::NAME, FEW),
            (SocketChoices::NAME, FEW),
        ]
        .map(|(map, entries)| MapSize { map, entries });
        let object = Object::open(&Options { sizes: &sizes, reads: Some(pins), ..Options::default() })?;
        let fds = tables::ALL.iter().map(|(name, ..)| Ok((*name, object.map(name)?)));
        let maps = KernelMaps::from_fds(fds.collect::<Result<Vec<_>, ObjectError>>()?)?;
        let rehearsal = Self { object, maps, live };
        rehearsal.copy::<Uplinks>()?;
        rehearsal.copy::<Outgoings>()?;
        rehearsal.copy::<Affinities>()?;
        Ok(rehearsal)
    }

    /// The live tables.
    pub fn live(&self) -> &KernelMaps {
        &self.live
    }

    fn copy<T: Table>(&self) -> Result<(), MapError> {
        let entries = self.live.map::<T>()?.entries()?;
        self.maps.map::<T>()?.insert_batch(&entries)
    }

    /// Has a packet come. What came of earlier ones is forgotten.
    ///
    /// # Errors
    /// If the kernel does not run the program.
    pub fn run(&mut self, arrival: &Arrival<'_>) -> Result<Fate, RehearsalError> {
        let flows = self.maps.map::<Flows>()?;
        let known = self.recall(&flows, &arrival.key)?;
        let before = self.reasons()?;
        self.object.load(arrival.program)?;
        let context = sk_buff(arrival.interface);
        let run = TestRun { data: arrival.data, context: &context, ..TestRun::default() };
        let result = bpf::prog_test_run(self.object.program(arrival.program)?, &run)
            .map_err(|source| RehearsalError::Run { program: arrival.program, source })?;
        let action = result.retval as i32;
        let flow = flows.get(&arrival.key)?;
        let fate = match (self.moved(&before)?, flow) {
            (Some((Disposition::Rejected, reason)), _) => Fate::Refused(reason),
            (Some((_, reason)), _) => Fate::Dropped(reason),
            (None, Some(flow)) if action != SHOT => {
                Fate::Served { flow, past_stack: action == REDIRECT, known }
            }
            (None, Some(_) | None) => Fate::Untouched,
        };
        self.forget(&flows, &arrival.key, flow)?;
        Ok(fate)
    }

    /// Copies the flow of a key, both directions of it; whether there is one.
    fn recall(&self, flows: &Map<Flows>, key: &FlowKey) -> Result<bool, MapError> {
        let live = self.live.map::<Flows>()?;
        let Some(flow) = live.get(key)? else { return Ok(false) };
        let partner = flow.partner(key.proto());
        for (key, flow) in [(*key, Some(flow)), (partner, live.get(&partner)?)] {
            if let Some(flow) = flow {
                flows.insert(&key, &flow, bpf::ANY)?;
            }
        }
        Ok(true)
    }

    fn forget(&self, flows: &Map<Flows>, key: &FlowKey, flow: Option<Flow>) -> Result<(), MapError> {
        if let Some(flow) = flow {
            flows.remove(key)?;
            flows.remove(&flow.partner(key.proto()))?;
        }
        // A client whose endpoint was drawn just now would have the same again.
        let (ours, live) = (self.maps.map::<Affinities>()?, self.live.map::<Affinities>()?);
        for (key, _) in ours.entries()? {
            match live.get(&key)? {
                Some(affinity) => ours.insert(&key, &affinity, bpf::ANY)?,
                None => drop(ours.remove(&key)?),
            }
        }
        Ok(())
    }

    fn reasons(&self) -> Result<BTreeMap<u32, u64>, MapError> {
        Ok(self.maps.map::<Reasons>()?.sums()?.into_iter().collect())
    }

    /// The reason that was counted since and that ended a packet, if one was.
    fn moved(&self, before: &BTreeMap<u32, u64>) -> Result<Option<(Disposition, Reason)>, MapError> {
        let moved = self.reasons()?.into_iter().filter(|(index, count)| before.get(index) != Some(count));
        let reasons = moved.map(|(index, _)| Reason::from_number(index as u8));
        let ends = reasons.filter(|reason| reason.disposition() != Disposition::Noted);
        Ok(ends.map(|reason| (reason.disposition(), reason)).next())
    }
}

/// `struct __sk_buff` of a packet of an interface.
fn sk_buff(interface: u32) -> Vec<u8> {
    const LENGTH: usize = 192;
    const IFINDEX: usize = 40;
    let mut context = vec![0; LENGTH];
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&interface.to_ne_bytes());
    context
}
