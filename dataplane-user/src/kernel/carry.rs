//! Carries flows over from the maps of another layout, so that an upgrade breaks no connection: C3.
//!
//! The programs of the old layout go on writing to their own maps meanwhile, so it is done twice: before the new programs take their
//! place, and once more after that. Endpoints have other ids in the new maps; a flow finds its own by the address that its client
//! called. Never writes to the other layout's maps.

use super::bpf::{self, MapFd};
use super::maps::{KernelMaps, MapError};
use super::pins::{PinError, Pins};
use crate::sync::Maps as _;
use bytemuck::Zeroable as _;
use dataplane_common::backend::BackendStatus;
use dataplane_common::flow::{Flow, FlowKey, Stage};
use dataplane_common::frontend::FrontendKey;
use dataplane_common::tables::{Backends, Flows, Frontends, Table as _};
use dataplane_common::{Addr, Port};
use std::collections::{HashMap, HashSet};
use std::io;

/// Bytes of a flow in the layout v3; what came later lies behind.
const FLOW_V3: usize = 56;

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
    keys: HashSet<FlowKey>,
}

impl Carried {
    /// Copies the flows that the other layouts have and that were not copied before, as seen at the tick `now`: those of the other
    /// layout may be longer or shorter. How many entries.
    ///
    /// # Errors
    /// [`CarryError`]; what was copied before stays.
    pub fn carry(&mut self, pins: &Pins, to: &KernelMaps, now: u32) -> Result<usize, CarryError> {
        let (endpoints, flows) = (Endpoints::read(to)?, to.map::<Flows>()?);
        let mut carried = 0;
        for layout in pins.other_layouts()? {
            let failed = |source| CarryError::Read { layout: layout.clone(), source };
            let path = Pins::with_layout(pins.root(), &layout).map(Flows::NAME);
            // An upgrade that was cut short may have left a part.
            let Ok(from) = MapFd::open(&path) else { continue };
            for (key, mut flow) in read(&from).map_err(failed)? {
                flow.last_seen = now;
                if self.keys.insert(key)
                    && flows.insert(&key, &endpoints.own(&key, flow), bpf::NO_EXIST).is_ok()
                {
                    carried += 1;
                }
            }
        }
        Ok(carried)
    }
}

/// The entries of another layout's `flows`, as this one has them. What ended is left out.
fn read(from: &MapFd) -> io::Result<Vec<(FlowKey, Flow)>> {
    let shape = from.shape();
    if shape.key_size != size_of::<FlowKey>() || ![FLOW_V3, size_of::<Flow>()].contains(&shape.value_size) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let (mut value, mut next) = (vec![0; from.copied_size()], vec![0; shape.key_size]);
    let mut key: Option<Vec<u8>> = None;
    let mut entries = Vec::new();
    // A table that changes meanwhile may begin again at its first key, but not for ever.
    for _ in 0..shape.max_entries.saturating_mul(2) {
        if !from.next_key(key.as_deref(), &mut next)? {
            break;
        }
        if from.lookup(&next, &mut value)? {
            let mut flow = Flow::zeroed();
            bytemuck::bytes_of_mut(&mut flow)[..shape.value_size].copy_from_slice(&value[..shape.value_size]);
            // Its name is in the other layout's ring.
            flow.turn = 0;
            if flow.stage() != Stage::Closing {
                entries.push((bytemuck::pod_read_unaligned(&next), flow));
            }
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
        (flow.backend, flow.generation) =
            backend.map_or((0, NOBODYS), |(id, status)| (*id, status.generation()));
        flow
    }
}

/// A generation that the id 0, which is never given out, does not have.
const NOBODYS: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use super::*;

    /// C3: the layout of v3, byte for byte.
    #[test]
    fn a_flow_of_the_older_layout_begins_like_one_of_this() {
        let mut flow = Flow::with_flags(Flow::CONFIRMED);
        (flow.check, flow.last_seen, flow.detail, flow.backend) = (0x0102, 3, 4, 5);
        let bytes = bytemuck::bytes_of(&flow);
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        assert_eq!((word(40), word(48), word(52)), (5, 3, 4));
        assert!(bytes[FLOW_V3..].iter().all(|byte| *byte == 0));
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
                assert_eq!((own.backend, own.generation), (9, 3));
            }
            flow.dst_port = port(9090);
            assert_eq!(endpoints.own(&key, flow).backend, 0, "an endpoint that is gone");
        }
    }
}
