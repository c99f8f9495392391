//! What programs remember of clients, sockets and other connections, carried over from another layout: which endpoint a client has
//! (S1), what a socket called, what left the node and is of no flow (P22).
//!
//! Service ports and endpoints have other ids in the new maps; what is of one that is gone is left behind.

use super::{Endpoints, entries};
use crate::kernel::bpf::{self, MapFd};
use crate::kernel::maps::{KernelMaps, Map, MapError, map_type};
use crate::kernel::pins::Pins;
use bytemuck::pod_read_unaligned;
use dataplane_common::affinity::{Affinity, AffinityKey, Choice};
use dataplane_common::backend::Backend;
use dataplane_common::frontend::{Frontend, FrontendKey};
use dataplane_common::socket::{SocketChoiceKey, SocketPeer, SocketPeerKey};
use dataplane_common::tables::{
    Affinities, Backends, Fragments, Frontends, Newcomers, Outgoings, SocketChoices, SocketPeers, Table,
    Uplinks,
};
use std::collections::HashMap;
use std::io;

/// What the ids of another layout are here.
struct Ids<'a> {
    /// Service ports.
    services: HashMap<u32, u32>,
    /// Endpoints, as the other layout has them.
    backends: HashMap<u32, Backend>,
    endpoints: &'a Endpoints,
}

impl<'a> Ids<'a> {
    fn read(pins: &Pins, endpoints: &'a Endpoints) -> io::Result<Self> {
        let mut ids = Self { services: HashMap::new(), backends: HashMap::new(), endpoints };
        for (key, frontend) in table::<Frontends>(pins)? {
            let (key, frontend): (FrontendKey, Frontend) = (key, frontend);
            if let Some(own) = endpoints.services.get(&key).filter(|own| **own != 0)
                && frontend.service() != 0
            {
                ids.services.insert(frontend.service(), *own);
            }
        }
        let backends = table::<Backends>(pins)?;
        ids.backends =
            backends.into_iter().filter(|(_, backend)| backend.status().generation() != 0).collect();
        Ok(ids)
    }

    /// A service port.
    fn service(&self, id: u32) -> Option<u32> {
        self.services.get(&id).copied()
    }

    /// An endpoint that has this generation of its id in the other layout: its id here, and the generation of that.
    fn backend(&self, id: u32, generation: u32) -> Option<(u32, u32)> {
        let known = self.backends.get(&id).filter(|it| it.status().generation() == generation)?;
        let at = (self.service(known.service())?, *known.addr(), known.port());
        self.endpoints.backends.get(&at).map(|(id, status)| (*id, status.generation()))
    }

    fn affinity(&self, key: AffinityKey, value: Affinity) -> Option<(AffinityKey, Affinity)> {
        let (backend, generation) = self.backend(value.choice.backend, value.choice.generation)?;
        let choice = Choice { backend, generation };
        Some((key.of_service(self.service(key.service())?), Affinity { choice, ..value }))
    }

    fn choice(&self, key: SocketChoiceKey, value: Choice) -> Option<(SocketChoiceKey, Choice)> {
        let (backend, generation) = self.backend(value.backend, value.generation)?;
        let key = SocketChoiceKey::new(key.cookie, self.service(key.service)?);
        Some((key, Choice { backend, generation }))
    }

    fn peer(&self, key: SocketPeerKey, value: SocketPeer) -> Option<(SocketPeerKey, SocketPeer)> {
        let (backend, generation) = self.backend(value.backend, value.generation)?;
        let service = self.service(value.service)?;
        Some((key, SocketPeer::new(value.addr, value.port, service, backend, generation)))
    }
}

/// The entries of a table of another layout, if keys and values are there what they are here; none if not.
fn table<T: Table>(pins: &Pins) -> io::Result<Vec<(T::Key, T::Value)>> {
    // An upgrade that was cut short may have left a part.
    let Ok(from) = MapFd::open(&pins.map(T::NAME)) else { return Ok(Vec::new()) };
    let shape = from.shape();
    let is_same = shape.map_type == map_type(T::KIND)
        && shape.key_size == size_of::<T::Key>()
        && shape.value_size == size_of::<T::Value>();
    if !is_same {
        return Ok(Vec::new());
    }
    let typed = |(key, value): (Vec<u8>, Vec<u8>)| (pod_read_unaligned(&key), pod_read_unaligned(&value));
    Ok(entries(&from)?.into_iter().map(typed).collect())
}

/// Copies what the layout at `pins` remembers and these maps do not: what the new programs know is newer.
pub(super) fn carry(pins: &Pins, to: &KernelMaps, endpoints: &Endpoints) -> Result<(), Failure> {
    let ids = Ids::read(pins, endpoints)?;
    copy::<Affinities>(pins, to, |key, value| ids.affinity(key, value))?;
    copy::<Newcomers>(pins, to, |key, value| ids.affinity(key, value))?;
    copy::<SocketChoices>(pins, to, |key, value| ids.choice(key, value))?;
    copy::<SocketPeers>(pins, to, |key, value| ids.peer(key, value))?;
    copy::<Outgoings>(pins, to, |key, value| Some((key, value)))?;
    copy::<Fragments>(pins, to, |key, value| Some((key, value)))?;
    copy::<Uplinks>(pins, to, |key, value| Some((key, value)))
}

fn copy<T: Table>(
    pins: &Pins,
    to: &KernelMaps,
    own: impl Fn(T::Key, T::Value) -> Option<(T::Key, T::Value)>,
) -> Result<(), Failure> {
    let map: Map<T> = to.map()?;
    for (key, value) in table::<T>(pins)?.into_iter().filter_map(|(key, value)| own(key, value)) {
        // What is there already stays.
        let _ = map.insert(&key, &value, bpf::NO_EXIST);
    }
    Ok(())
}

/// Which side failed.
pub(super) enum Failure {
    /// The other layout's maps cannot be read.
    Read(io::Error),
    /// This layout's.
    Own(MapError),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

impl From<MapError> for Failure {
    fn from(error: MapError) -> Self {
        Self::Own(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataplane_common::backend::BackendStatus;
    use dataplane_common::{Addr, Port};

    /// C3, S1
    #[test]
    fn what_is_remembered_finds_service_and_endpoint_under_other_ids() {
        let (client, endpoint) = (Addr::from_v4([10, 0, 0, 5]), Addr::from_v4([10, 244, 1, 2]));
        let port = Port::new(8080);
        let status = |generation| BackendStatus::new(generation, BackendStatus::SERVING);
        let endpoints =
            Endpoints { services: HashMap::new(), backends: [((7, endpoint, port), (9, status(3)))].into() };
        let ids = Ids {
            services: [(2, 7)].into(),
            backends: [
                (4, Backend::new(status(5), endpoint, port, 2)),
                (6, Backend::new(status(1), client, port, 2)),
            ]
            .into(),
            endpoints: &endpoints,
        };
        assert_eq!(ids.backend(4, 5), Some((9, 3)));
        assert_eq!(ids.backend(4, 4), None, "its id is of another now");
        assert_eq!(ids.backend(6, 1), None, "that endpoint is gone");
        let affinity = |backend| Affinity { choice: Choice { backend, generation: 5 }, last_used: 11 };
        let own = Affinity { choice: Choice { backend: 9, generation: 3 }, last_used: 11 };
        assert_eq!(
            ids.affinity(AffinityKey::address(client, 2), affinity(4)),
            Some((AffinityKey::address(client, 7), own))
        );
        assert_eq!(
            ids.affinity(AffinityKey::namespace(8, 2), affinity(4)),
            Some((AffinityKey::namespace(8, 7), own))
        );
        assert_eq!(ids.affinity(AffinityKey::address(client, 3), affinity(4)), None);
        let choice = Choice { backend: 4, generation: 5 };
        let own = Choice { backend: 9, generation: 3 };
        let found = ids.choice(SocketChoiceKey::new(1, 2), choice);
        assert_eq!(found, Some((SocketChoiceKey::new(1, 7), own)));
        let key = SocketPeerKey::new(1, endpoint, port, 17);
        let peer = SocketPeer::new(client, port, 2, 4, 5);
        assert_eq!(ids.peer(key, peer), Some((key, SocketPeer::new(client, port, 7, 9, 3))));
    }
}
