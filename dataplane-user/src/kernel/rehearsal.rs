//! What would become of a packet: the very programs that forward, loaded a second time, on the live tables.
//!
//! They have in common with those that serve what programs only read, and nothing else. Flows, counters, queues, what is remembered
//! of clients: all that programs write is in maps of their own, which end with this process. So a rehearsal leaves no trace, and
//! what a packet's fate may depend on of that (its own flow, its client's affinity) is copied before.

use super::bpf::{self, TestRun};
use super::hook::Hook;
use super::maps::{Entries, KernelMaps, Map, MapError};
use super::object::{Object, ObjectError, Options};
use super::pins::Pins;
use crate::config::MapSize;
use dataplane_common::affinity::{Affinity, AffinityKey};
use dataplane_common::counter::Open;
use dataplane_common::drop::{Disposition, Reason};
use dataplane_common::filter::caller_cell;
use dataplane_common::flow::{Flow, FlowKey};
use dataplane_common::tables::{
    self, Affinities, BackendTraffic, Callers, Closing, Events, Flows, Fragments, HalfOpen, Kept, Newcomers,
    Nodes, OpenCounts, Outgoings, Reasons, Rounds, ServiceTraffic, ServiceTries, SocketChoices, SocketPeers,
    Table, Uplinks,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;

/// Entries of the maps that need few here.
const FEW: u32 = 64;
/// Room for flows: one at a time, both directions, and what the programs look at beside it.
const FLOWS: u32 = 1_024;

/// `TC_ACT_SHOT` and `TC_ACT_REDIRECT`; any other is left to the stack.
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;
/// `XDP_PASS`, `XDP_TX` and `XDP_REDIRECT`.
const XDP_PASS: i32 = 2;
const XDP_TX: i32 = 3;
const XDP_REDIRECT: i32 = 4;

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
    /// The replies that it may have, as they come in: another flow may have one of them (P12).
    pub replies: &'a [FlowKey],
}

/// All that can be seen of a run.
#[derive(Clone, Debug)]
pub struct Trial {
    /// What the program returned.
    pub action: i32,
    /// The packet afterwards.
    pub data: Vec<u8>,
    /// Its mark.
    pub mark: u32,
    /// The reasons that were counted, and how often.
    pub moved: BTreeMap<Reason, u64>,
    /// The flow of the packet.
    pub flow: Option<Flow>,
    /// The flow is in the live table.
    pub known: bool,
    /// By XDP, whose return codes are others than tc's.
    xdp: bool,
    /// Some byte of the packet is another.
    changed: bool,
}

impl Trial {
    /// Whether the packet of a flow goes on, and if so whether past the host's stack.
    const fn goes_on(&self) -> Option<bool> {
        match (self.xdp, self.action) {
            (false, SHOT) => None,
            (false, action) => Some(action == REDIRECT),
            (true, XDP_TX | XDP_REDIRECT) => Some(true),
            (true, XDP_PASS) => Some(false),
            (true, _) => None,
        }
    }

    /// Whether XDP passed the packet as it came: it is tc's, whatever XDP noted.
    const fn is_left_to_tc(&self) -> bool {
        self.xdp && self.action == XDP_PASS && !self.changed
    }

    /// The reason that ended the packet, if one did.
    fn end(&self) -> Option<Reason> {
        self.moved.keys().copied().find(|reason| reason.disposition() != Disposition::Noted)
    }
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
    /// What the live programs remember of clients, and of what left the node.
    affinities: Entries<Affinities>,
    outgoings: Entries<Outgoings>,
    /// How many connections of each backend are open, of those that have some.
    open: HashMap<u32, Open>,
}

impl Rehearsal {
    /// Loads the object beside the maps that are pinned here.
    ///
    /// # Errors
    /// If there are none, or the kernel refuses.
    pub fn open(pins: &Pins) -> Result<Self, RehearsalError> {
        let live = KernelMaps::open(&pins.maps())?;
        let sizes = [
            (Flows::NAME, FLOWS),
            (HalfOpen::NAME, FLOWS),
            (Closing::NAME, FLOWS),
            (Affinities::NAME, FLOWS),
            (Newcomers::NAME, FEW),
            (ServiceTries::NAME, 1),
            (ServiceTraffic::NAME, 1),
            (BackendTraffic::NAME, 1),
            (OpenCounts::NAME, live.map::<OpenCounts>()?.capacity() as u32),
            // A turn that is asked about is not taken: it is the first.
            (Rounds::NAME, 1),
            (Fragments::NAME, FEW),
            // Nobody watches it.
            (Events::NAME, 1),
            (SocketPeers::NAME, FEW),
            (SocketChoices::NAME, FEW),
        ]
        .map(|(map, entries)| MapSize { map, entries });
        let object = Object::open(&Options { sizes: &sizes, reads: Some(pins), ..Options::default() })?;
        let fds = tables::ALL.iter().map(|(name, ..)| Ok((*name, object.map(name)?)));
        let maps = KernelMaps::from_fds(fds.collect::<Result<Vec<_>, ObjectError>>()?)?;
        let mut rehearsal =
            Self { object, maps, live, affinities: Vec::new(), outgoings: Vec::new(), open: HashMap::new() };
        rehearsal.refresh()?;
        Ok(rehearsal)
    }

    /// The live tables.
    pub fn live(&self) -> &KernelMaps {
        &self.live
    }

    /// Has a packet come. What came of earlier ones is forgotten.
    ///
    /// # Errors
    /// If the kernel does not run the program.
    pub fn run(&mut self, arrival: &Arrival<'_>) -> Result<Fate, RehearsalError> {
        let trial = self.trial(arrival)?;
        Ok(match (trial.end(), trial.flow, trial.goes_on()) {
            _ if trial.is_left_to_tc() => Fate::Untouched,
            (Some(reason), ..) if reason.disposition() == Disposition::Rejected => Fate::Refused(reason),
            (Some(reason), ..) => Fate::Dropped(reason),
            (None, Some(flow), Some(past_stack)) => Fate::Served { flow, past_stack, known: trial.known },
            (None, ..) => Fate::Untouched,
        })
    }

    /// The same, and all that can be seen of it.
    ///
    /// # Errors
    /// As [`Rehearsal::run`].
    pub fn trial(&mut self, arrival: &Arrival<'_>) -> Result<Trial, RehearsalError> {
        let flows = self.maps.map::<Flows>()?;
        self.settle(&flows, &arrival.key)?;
        let known = self.recall(&flows, &arrival.key)?;
        for reply in arrival.replies {
            self.recall(&flows, reply)?;
        }
        self.copy_callers(&arrival.key)?;
        let before = self.reasons()?;
        self.object.load(arrival.program)?;
        let xdp = arrival.program == Hook::XdpUplink.program();
        let context =
            if xdp { xdp_md(arrival.data.len(), arrival.interface) } else { sk_buff(arrival.interface) };
        let run = TestRun { data: arrival.data, context: &context, ..TestRun::default() };
        let result = bpf::prog_test_run(self.object.program(arrival.program)?, &run)
            .map_err(|source| RehearsalError::Run { program: arrival.program, source })?;
        let moved = self.reasons()?.into_iter().filter_map(|(index, count)| {
            let more = count - before.get(&index).copied().unwrap_or_default();
            (more > 0).then_some((Reason::from_number(index as u8), more))
        });
        let (action, flow) = (result.retval as i32, flows.get(&arrival.key)?);
        let (mark, changed) = (mark_of(&result.context), result.data != arrival.data);
        Ok(Trial { action, data: result.data, mark, moved: moved.collect(), flow, known, xdp, changed })
    }

    /// Whether flows may have replies to an end of a packet: without a mark nobody looks for them.
    fn copy_callers(&self, key: &FlowKey) -> Result<(), MapError> {
        let (ours, live) = (self.maps.map::<Callers>()?, self.live.map::<Callers>()?);
        for addr in [&key.src, &key.dst] {
            let cell = caller_cell(addr, key.proto());
            if let Some(mark) = live.get(&cell)? {
                ours.insert(&cell, &mark, bpf::ANY)?;
            }
        }
        Ok(())
    }

    /// Copies the flow of a key, both directions of it; whether there is one.
    fn recall(&self, flows: &Map<Flows>, key: &FlowKey) -> Result<bool, MapError> {
        let live = self.live.map::<Flows>()?;
        let Some(flow) = live.get(key)? else { return Ok(false) };
        let partner = flow.partner(key.proto());
        for (key, flow) in [(*key, Some(flow)), (partner, live.get(&partner)?)] {
            if let Some(flow) = flow {
                flows.insert(&key, &flow, bpf::ANY)?;
                self.copy_kept(&flow)?;
            }
        }
        Ok(true)
    }

    /// What a flow began with is what a refusal is turned into.
    fn copy_kept(&self, flow: &Flow) -> Result<(), MapError> {
        let place = flow.kept % Kept::CAPACITY as u32;
        if flow.kept != 0
            && let Some(kept) = self.live.map::<Kept>()?.get(&place)?
        {
            self.maps.map::<Kept>()?.insert(&place, &kept, bpf::ANY)?;
        }
        Ok(())
    }

    /// Everything that this packet may meet is as it is in the live tables again: a client whose endpoint was drawn just now would
    /// have the same again.
    fn settle(&self, flows: &Map<Flows>, key: &FlowKey) -> Result<(), MapError> {
        self.settle_open(flows)?;
        self.clear(flows)?;
        let (affinities, outgoings) = (self.maps.map::<Affinities>()?, self.maps.map::<Outgoings>()?);
        self.clear(&affinities)?;
        self.clear(&self.maps.map::<Newcomers>()?)?;
        self.clear(&outgoings)?;
        let node = self.live.map::<Nodes>()?.get(&0)?;
        let own = node.map_or([key.src; 2], |node| [node.primary_v4, node.primary_v6]);
        let clients =
            |entry: &&(AffinityKey, Affinity)| entry.0.client() == &key.src || own.contains(entry.0.client());
        let of_client: Vec<_> = self.affinities.iter().filter(clients).copied().collect();
        affinities.insert_batch(&of_client)?;
        let answered: Vec<_> = self.outgoings.iter().filter(|(answer, _)| answer == key).copied().collect();
        outgoings.insert_batch(&answered)
    }

    /// The connections that were rehearsed are not open (L2).
    fn settle_open(&self, flows: &Map<Flows>) -> Result<(), MapError> {
        let mut backends = BTreeSet::new();
        flows.visit(|_, flow| backends.extend(flow.iter().map(|flow| flow.backend)))?;
        let before = |id| (id, self.open.get(&id).copied().unwrap_or_default());
        let before: Vec<_> = backends.into_iter().map(before).collect();
        self.maps.map::<OpenCounts>()?.insert_batch(&before)
    }

    fn clear<T: Table>(&self, map: &Map<T>) -> Result<(), MapError> {
        let keys: Vec<_> = map.entries()?.into_iter().map(|(key, _)| key).collect();
        map.remove_batch(&keys).map(drop)
    }

    /// Takes over what the programs that serve have remembered since this was opened.
    ///
    /// # Errors
    /// If a map cannot be read.
    pub fn refresh(&mut self) -> Result<(), MapError> {
        let uplinks = self.live.map::<Uplinks>()?.entries()?;
        self.maps.map::<Uplinks>()?.insert_batch(&uplinks)?;
        // Whose endpoint is known for good has no other.
        self.affinities = self.live.map::<Affinities>()?.entries()?;
        let known: BTreeSet<_> =
            self.affinities.iter().map(|(key, _)| bytemuck::bytes_of(key).to_vec()).collect();
        let newcomers = self.live.map::<Newcomers>()?.entries()?;
        let unknown = newcomers.into_iter().filter(|(key, _)| !known.contains(bytemuck::bytes_of(key)));
        self.affinities.extend(unknown);
        self.outgoings = self.live.map::<Outgoings>()?.entries()?;
        let open = self.maps.map::<OpenCounts>()?;
        let nothing: Vec<_> = self.open.keys().map(|id| (*id, Open::default())).collect();
        open.insert_batch(&nothing)?;
        self.open.clear();
        let found = &mut self.open;
        self.live.map::<OpenCounts>()?.visit(|id, counts| {
            found.extend(counts.first().filter(|open| open.count() > 0).map(|open| (id, *open)));
        })?;
        open.insert_batch(&self.open.iter().map(|(id, open)| (*id, *open)).collect::<Vec<_>>())
    }

    fn reasons(&self) -> Result<BTreeMap<u32, u64>, MapError> {
        Ok(self.maps.map::<Reasons>()?.sums()?.into_iter().collect())
    }
}

/// Bytes of a `struct __sk_buff`; XDP's context is shorter.
const SK_BUFF: usize = 192;

/// The mark in a `struct __sk_buff`; 0 of another context, which has none.
pub fn mark_of(context: &[u8]) -> u32 {
    const MARK: usize = 8;
    let mark = context.get(MARK..MARK + 4).filter(|_| context.len() >= SK_BUFF);
    mark.and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// `struct xdp_md` of a packet that came in by an interface: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
/// egress_ifindex.
pub fn xdp_md(length: usize, interface: u32) -> Vec<u8> {
    [0, length as u32, 0, interface, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect()
}

/// `struct __sk_buff` of a packet of an interface.
pub fn sk_buff(interface: u32) -> Vec<u8> {
    const IFINDEX: usize = 40;
    let mut context = vec![0; SK_BUFF];
    context[IFINDEX..IFINDEX + 4].copy_from_slice(&interface.to_ne_bytes());
    context
}
