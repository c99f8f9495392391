//! Session affinity (S1): which endpoint a client comes back to.

use super::cluster::{PortId, ServicePort, State};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// What is remembered of a client at a service port.
#[derive(Clone, Debug, Default)]
struct Memory {
    /// The endpoint it had; several where it was not seen which.
    had: BTreeSet<SocketAddr>,
    /// The endpoint was gone from the service port, or affinity was off, at some moment: it may have been forgotten, and
    /// the contract does not say whether.
    faded: bool,
}

/// What is remembered of all clients.
#[derive(Clone, Debug, Default)]
pub(super) struct Affinities(BTreeMap<(IpAddr, PortId), Memory>);

impl Affinities {
    /// The endpoints of these that a client may get.
    pub(super) fn narrow(
        &self,
        client: IpAddr,
        port: &ServicePort,
        endpoints: &BTreeSet<SocketAddr>,
    ) -> BTreeSet<SocketAddr> {
        let memory = self.0.get(&(client, port.id.clone())).filter(|_| port.affinity);
        match memory {
            Some(memory) if !memory.faded && memory.had.is_subset(endpoints) => memory.had.clone(),
            Some(_) | None => endpoints.clone(),
        }
    }

    /// A client got one of these.
    pub(super) fn remember(&mut self, client: IpAddr, port: &PortId, had: BTreeSet<SocketAddr>) {
        self.0.insert((client, port.clone()), Memory { had, faded: false });
    }

    pub(super) fn endpoints_changed(&mut self, state: &State) {
        for ((_, id), memory) in &mut self.0 {
            let port = state.ports.iter().find(|port| port.id == *id && port.affinity);
            let there = |endpoint| {
                port.is_some_and(|port| {
                    port.sets.cluster.contains(endpoint) || port.sets.local.contains(endpoint)
                })
            };
            memory.faded |= !memory.had.iter().all(there);
        }
    }
}
