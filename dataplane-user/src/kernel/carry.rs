//! Carries flows over from the maps of another layout, and what programs remember beside them, so that an upgrade breaks no connection: C3.
//!
//! The programs of the old layout go on writing to their own maps meanwhile, so it is done twice: before the new programs take their
//! place, and once more after that. What both generations know by then is brought up to what the older one saw last. Endpoints have
//! other ids in the new maps; a flow finds its own by the address that its client called. Never writes to the other layout's maps.

mod remembered;

use super::bpf::{self, MapFd};
use super::maps::{KernelMaps, MapError};
use super::open::OpenCells;
use super::pins::{PinError, Pins};
use crate::sync::Maps;
use bytemuck::Zeroable as _;
use dataplane_common::backend::BackendStatus;
use dataplane_common::flow::{Flow, FlowKey, Numbers, Stage};
use dataplane_common::frontend::FrontendKey;
use dataplane_common::tables::{Backends, Flows, Frontends, Nodes, Table as _};
use dataplane_common::{Addr, Port};
use remembered::Failure;
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::io;

/// Bytes of a flow in the layouts v3 and v4; what came later lies behind.
const FLOW_V3: usize = 56;
const FLOW_V4: usize = 72;

/// Why flows are not carried over.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The pins cannot be read.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// This layout's maps cannot be read or written.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The other layout's flows cannot be read.
    #[error("cannot read the flows of layout {layout}: {source}; connections that began with it end")]
    Read {
        /// Which layout.
        layout: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Flows on their way from other layouts.
#[derive(Debug, Default)]
pub struct Carried {
    /// What was copied already.
    copied: HashMap<FlowKey, Seen>,
    /// The layouts of which all else was.
    layouts: BTreeSet<String>,
}

/// What a half of a flow was like when it was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    flags: u16,
    numbers: Numbers,
    /// Tells its ends from most others.
    ends: u16,
}

impl Seen {
    fn of(flow: &Flow, proto: u8) -> Self {
        Self { flags: flow.flags(), numbers: flow.numbers, ends: flow.partner(proto).check() }
    }
}

impl Carried {
    /// Copies the flows that the other layouts have and that were not copied before, as seen at the tick `now`: those of the other
    /// layout may be longer or shorter. What was copied before and has gone on there is brought up to that. How many entries came.
    ///
    /// # Errors
    /// [`CarryError`]; what was copied before stays.
    pub fn carry(&mut self, pins: &Pins, to: &KernelMaps, now: u32) -> Result<usize, CarryError> {
        let (endpoints, flows) = (Endpoints::read(to)?, to.map::<Flows>()?);
        let open = OpenCells::map(&to.map()?)?;
        let mut carried = 0;
        for layout in pins.other_layouts()? {
            let failed = |source| CarryError::Read { layout: layout.clone(), source };
            let others = Pins::with_layout(pins.root(), &layout);
            // Once is enough for what is remembered beside flows. They come over even if that fails.
            let first = self.layouts.insert(layout.clone());
            let remembered = if first { remembered::carry(&others, to, &endpoints) } else { Ok(()) };
            let path = others.map(Flows::NAME);
            // An upgrade that was cut short may have left a part.
            let Ok(from) = MapFd::open(&path) else { continue };
            for (key, mut flow) in read(&from).map_err(failed)? {
                let seen = Seen::of(&flow, key.proto());
                flow.last_seen = now;
                match self.copied.entry(key) {
                    Entry::Vacant(entry) if flow.stage() != Stage::Closing => {
                        entry.insert(seen);
                        let own = endpoints.own(&key, flow);
                        if flows.insert(&key, &own, bpf::NO_EXIST).is_ok() {
                            carried += 1;
                            count(&open, None, Some(&own));
                        }
                    }
                    Entry::Vacant(_) => {}
                    Entry::Occupied(mut entry) => {
                        let before = entry.insert(seen);
                        if before != seen
                            && let Some(here) = flows.get(&key)?
                            && let Some(newer) = caught_up(before, &flow, here, key.proto())
                        {
                            let own = endpoints.own(&key, newer);
                            // It may have gone meanwhile.
                            if flows.insert(&key, &own, bpf::EXIST).is_ok() {
                                count(&open, Some(&here), Some(&own));
                            }
                        }
                    }
                }
            }
            remembered.map_err(|failure| match failure {
                Failure::Read(source) => failed(source),
                Failure::Own(error) => error.into(),
            })?;
        }
        Ok(carried)
    }
}

/// Counts what is open in the place of what was, of one key (L2).
fn count(open: &OpenCells, before: Option<&Flow>, after: Option<&Flow>) {
    let counted =
        |flow: Option<&Flow>| flow.filter(|flow| flow.has(Flow::COUNTED_OPEN)).map(|flow| flow.backend);
    if let Some(backend) = counted(before) {
        open.ended(backend);
    }
    if let Some(backend) = counted(after) {
        open.begun(backend);
    }
}

/// What a half of a flow must become here that was copied when it was as `before` says, and is `there` by now in the other layout:
/// programs of either layout may have met its packets since. `None` if it stays as it is.
fn caught_up(before: Seen, there: &Flow, mut here: Flow, proto: u8) -> Option<Flow> {
    let known = Seen::of(&here, proto);
    if before.ends != known.ends {
        // Another flow has the key here.
        return None;
    }
    if before.ends != Seen::of(there, proto).ends {
        // Another flow has it there: the client began anew, if nobody has gone on with the old one here.
        return (known == before && there.stage() != Stage::Closing).then_some(*there);
    }
    here.set(there.flags());
    if known.numbers == before.numbers {
        here.numbers = there.numbers;
    }
    if !here.has(Flow::REPLY) && known.flags & Flow::ANSWERED == 0 {
        here.detail = there.detail;
    }
    Some(here)
}

/// Has the programs that read `maps` hold back what may be of a flow that others begin, from now on for some seconds at most, or no
/// longer.
///
/// # Errors
/// If the settings cannot be read or written.
pub fn hold_back<M: Maps>(maps: &M, since: Option<u32>) -> Result<(), MapError> {
    let Some(mut node) = maps.get::<Nodes>(&0)? else { return Ok(()) };
    let before = node.held_back_until;
    node.held_back_until = 0;
    if let Some(now) = since {
        node.hold_back(now);
    }
    if node.held_back_until == before { Ok(()) } else { maps.write::<Nodes>(&[(0, node)]) }
}

/// The entries of another layout's `flows`, as this one has them.
fn read(from: &MapFd) -> io::Result<Vec<(FlowKey, Flow)>> {
    let shape = from.shape();
    let known = [FLOW_V3, FLOW_V4, size_of::<Flow>()];
    if shape.key_size != size_of::<FlowKey>() || !known.contains(&shape.value_size) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let typed = |(key, value): (Vec<u8>, Vec<u8>)| {
        let mut flow = Flow::zeroed();
        bytemuck::bytes_of_mut(&mut flow)[..value.len()].copy_from_slice(&value);
        // Its name is in the other layout's ring.
        flow.turn = 0;
        (bytemuck::pod_read_unaligned(&key), flow)
    };
    Ok(entries(from)?.into_iter().map(typed).collect())
}

/// Keys and values of a map that is not per CPU.
fn entries(from: &MapFd) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let shape = from.shape();
    let (mut value, mut next) = (vec![0; from.copied_size()], vec![0; shape.key_size]);
    let mut key: Option<Vec<u8>> = None;
    let mut entries = Vec::new();
    // A table that changes meanwhile may begin again at its first key, but not for ever.
    for _ in 0..shape.max_entries.saturating_mul(2) {
        if !from.next_key(key.as_deref(), &mut next)? {
            break;
        }
        if from.lookup(&next, &mut value)? {
            entries.push((next.clone(), value.clone()));
        }
        key = Some(next.clone());
    }
    Ok(entries)
}

/// The ids of endpoints in this layout's maps, and which service port is at an address.
struct Endpoints {
    services: HashMap<FrontendKey, u32>,
    backends: HashMap<(u32, Addr, Port), (u32, BackendStatus)>,
}

impl Endpoints {
    fn read(maps: &KernelMaps) -> Result<Self, MapError> {
        let (mut services, mut backends) = (HashMap::new(), HashMap::new());
        maps.visit::<Frontends>(|key, frontend| {
            services.insert(key, frontend.service());
        })?;
        maps.visit::<Backends>(|id, backend| {
            if id != 0 && backend.status().generation() != 0 {
                let at = (backend.service(), *backend.addr(), backend.port());
                backends.insert(at, (id, backend.status()));
            }
        })?;
        Ok(Self { services, backends })
    }

    /// The flow with the id that its endpoint has here. One whose endpoint is gone belongs to nobody: UDP chooses anew, TCP goes on
    /// (C1, C2).
    fn own(&self, key: &FlowKey, mut flow: Flow) -> Flow {
        let (frontend, endpoint) = if flow.has(Flow::REPLY) {
            ((flow.src, flow.src_port), (key.src, key.src_port))
        } else {
            ((key.dst, key.dst_port), (flow.dst, flow.dst_port))
        };
        let any = if frontend.0.is_v4() { Addr::from_v4([0; 4]) } else { Addr::UNSPECIFIED };
        let service = |addr| self.services.get(&FrontendKey::new(addr, frontend.1, key.proto()));
        let found = service(frontend.0).or_else(|| service(any));
        let backend = found.and_then(|service| self.backends.get(&(*service, endpoint.0, endpoint.1)));
        // Its packets are of no total there any more.
        flow.service = found.copied().unwrap_or_default();
        (flow.backend, flow.generation) =
            backend.map_or((0, NOBODYS), |(id, status)| (*id, status.generation()));
        // Its endpoint counts it here as long as it is not over.
        flow.clear(Flow::COUNTED_OPEN);
        if !flow.has(Flow::REPLY) && flow.stage() != Stage::Closing && flow.backend != 0 {
            flow.set(Flow::COUNTED_OPEN);
        }
        flow
    }
}

/// A generation that the id 0, which is never given out, does not have.
const NOBODYS: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// C3: the layout of v3, byte for byte.
    #[test]
    fn a_flow_of_the_older_layout_begins_like_one_of_this() {
        let mut flow = Flow::with_flags(Flow::CONFIRMED);
        (flow.check, flow.last_seen, flow.detail, flow.backend) = (0x0102, 3, 4, 5);
        let bytes = bytemuck::bytes_of(&flow);
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        assert_eq!((word(40), word(48), word(52)), (5, 3, 4));
        let numbers = offset_of!(Flow, numbers);
        assert_eq!(numbers + size_of::<Numbers>(), FLOW_V4);
        assert!(bytes[FLOW_V3..].iter().all(|byte| *byte == 0));
    }

    /// C3
    #[test]
    fn what_was_copied_is_brought_up_to_what_the_older_programs_saw_last() {
        let (own, other) = (Port::new(8080), Port::new(9090));
        let half = |flags, end, dst_port| {
            let mut flow = Flow::with_flags(flags);
            (flow.numbers, flow.dst_port) = (Numbers { end, ack: 0 }, dst_port);
            flow
        };
        let copied = half(0, 10, own);
        let before = Seen::of(&copied, 6);
        let caught = |there, here| caught_up(before, &there, here, 6).map(|flow| Seen::of(&flow, 6));
        let confirmed = half(Flow::CONFIRMED, 30, own);
        assert_eq!(caught(confirmed, copied), Some(Seen::of(&confirmed, 6)));
        let further = half(Flow::CONFIRMED, 40, own);
        let ended = half(Flow::CONFIRMED | Flow::CLOSING, 30, own);
        assert_eq!(
            caught(ended, further),
            Some(Seen::of(&half(Flow::CONFIRMED | Flow::CLOSING, 40, own), 6)),
            "it has gone on here as well"
        );
        assert_eq!(caught(confirmed, half(0, 10, other)), None, "another flow has the key here");
        let anew = half(0, 70, other);
        assert_eq!(caught(anew, copied), Some(Seen::of(&anew, 6)));
        assert_eq!(caught(anew, further), None, "it has gone on here");
        assert_eq!(caught(half(Flow::CLOSING, 70, other), copied), None);
    }

    /// C3
    #[test]
    fn connections_are_held_back_and_released() {
        let maps = crate::sync::MemoryMaps::default();
        let written = dataplane_common::node::Node { port_count: 7, ..bytemuck::Zeroable::zeroed() };
        maps.write::<Nodes>(&[(0, written)]).unwrap();
        hold_back(&maps, Some(5)).unwrap();
        assert!(maps.get::<Nodes>(&0).unwrap().unwrap().holds_back(6));
        hold_back(&maps, None).unwrap();
        assert_eq!(maps.get::<Nodes>(&0).unwrap(), Some(written));
    }

    /// C3
    #[test]
    fn a_flow_finds_its_endpoint_under_another_id() {
        let (client, frontend) = (Addr::from_v4([10, 0, 0, 5]), Addr::from_v4([10, 96, 0, 1]));
        let (endpoint, node) = (Addr::from_v4([10, 244, 1, 2]), Addr::from_v4([192, 0, 2, 1]));
        let port = Port::new;
        let services = [
            (FrontendKey::new(frontend, port(80), 6), 7),
            (FrontendKey::new(Addr::from_v4([0; 4]), port(30_080), 6), 7),
        ];
        let status = BackendStatus::new(3, BackendStatus::SERVING);
        let endpoints = Endpoints {
            services: services.into(),
            backends: [((7, endpoint, port(8080)), (9, status))].into(),
        };
        for (called, number) in [(frontend, 80), (node, 30_080)] {
            let key = FlowKey::new(client, port(40_000), called, port(number), 6);
            let mut flow = Flow::with_flags(0);
            (flow.src, flow.src_port, flow.dst, flow.dst_port) = (client, port(40_000), endpoint, port(8080));
            let mut reply = Flow::with_flags(Flow::REPLY);
            (reply.src, reply.src_port, reply.dst, reply.dst_port) =
                (called, port(number), client, port(40_000));
            for (key, half) in [(key, flow), (flow.partner(6), reply)] {
                let own = endpoints.own(&key, half);
                assert_eq!((own.service, own.backend, own.generation), (7, 9, 3));
                assert_eq!(own.has(Flow::COUNTED_OPEN), !half.has(Flow::REPLY), "it is open");
            }
            flow.dst_port = port(9090);
            let gone = endpoints.own(&key, flow);
            assert_eq!((gone.backend, gone.has(Flow::COUNTED_OPEN)), (0, false), "an endpoint that is gone");
        }
    }
}
