//! Section 2 of the contract: which endpoints.

use super::Cluster;
use super::address::is_nobodys;
use super::choice::Weights;
use super::cluster::{PortId, protocol};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// The label of F3.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// The label by which a slice names its Service.
const SERVICE: &str = "kubernetes.io/service-name";

/// An endpoint of a service port, its conditions completed.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    ready: bool,
    serving: bool,
    terminating: bool,
    here: bool,
    weight: u16,
    for_nodes: BTreeSet<String>,
    for_zones: BTreeSet<String>,
}

impl Candidate {
    /// FALLBACK(e).
    fn is_fallback(&self) -> bool {
        self.serving && self.terminating
    }
}

/// The endpoint sets of a service port.
#[derive(Clone, Debug, Default)]
pub struct Sets {
    /// The cluster set.
    pub cluster: BTreeSet<SocketAddr>,
    /// The local set.
    pub local: BTreeSet<SocketAddr>,
    /// *has any*.
    pub any: bool,
    /// The weights of the endpoints (L3).
    pub weights: BTreeMap<SocketAddr, u16>,
    /// Endpoints whose flows go on: those that are ready or serving; and whether each is on this node.
    pub usable: BTreeMap<SocketAddr, bool>,
}

/// F3 to F6: the endpoints of a service port, each once.
pub(super) fn candidates(
    cluster: &Cluster,
    id: &PortId,
    node: &str,
    weights: &Weights,
) -> BTreeMap<SocketAddr, Candidate> {
    let mut candidates: BTreeMap<SocketAddr, Candidate> = BTreeMap::new();
    for slice in cluster.slices.iter().filter(|slice| is_of(slice, id)) {
        for port in slice.ports.iter().flatten() {
            let name = port.name.as_deref().unwrap_or_default();
            // F5: a port without a number is ignored.
            let Some(number) = port.port else { continue };
            if (name, protocol(port.protocol.as_deref())) != (&id.port, id.proto) {
                continue;
            }
            for endpoint in slice.endpoints.iter().flatten() {
                // F5: the first address counts. F4: it must be of the slice's family. Z2.
                let Some(ip) = endpoint.addresses.first().and_then(|ip| ip.parse::<IpAddr>().ok()) else {
                    continue;
                };
                if ip.is_ipv6() != id.v6 || is_nobodys(ip) {
                    continue;
                }
                let candidate = candidate(endpoint, ip, node, weights);
                let place = candidates.entry(SocketAddr::new(ip, number as u16));
                // F5: of duplicates one that is not terminating wins, then one that is ready, then one that serves.
                let better = |old: &Candidate| {
                    let rank = |c: &Candidate| (c.terminating, !c.ready, !c.serving);
                    rank(&candidate) < rank(old)
                };
                match place {
                    std::collections::btree_map::Entry::Vacant(place) => {
                        place.insert(candidate);
                    }
                    std::collections::btree_map::Entry::Occupied(mut place) => {
                        if better(place.get()) {
                            place.insert(candidate);
                        }
                    }
                }
            }
        }
    }
    candidates
}

/// Whether a slice is of this Service and family (F3, F4, F5).
fn is_of(slice: &EndpointSlice, id: &PortId) -> bool {
    let labels = slice.metadata.labels.clone().unwrap_or_default();
    let namespace = slice.metadata.namespace.as_deref().unwrap_or("default");
    let family = if id.v6 { "IPv6" } else { "IPv4" };
    namespace == id.namespace
        && labels.get(SERVICE) == Some(&id.service)
        && !labels.contains_key(HEADLESS)
        && slice.address_type == family
}

/// F6.
fn candidate(endpoint: &Endpoint, ip: IpAddr, node: &str, weights: &Weights) -> Candidate {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let hints = endpoint.hints.clone().unwrap_or_default();
    Candidate {
        ready: conditions.ready.unwrap_or(true),
        serving: conditions.serving.unwrap_or(true),
        terminating: conditions.terminating.unwrap_or(false),
        weight: weights.of(endpoint, ip),
        here: endpoint.node_name.as_deref() == Some(node),
        for_nodes: hints.for_nodes.into_iter().flatten().map(|hint| hint.name).collect(),
        for_zones: hints.for_zones.into_iter().flatten().map(|hint| hint.name).collect(),
    }
}

/// The sets, by the definitions at the head of section 2.
pub(super) fn sets(candidates: &BTreeMap<SocketAddr, Candidate>, node: &str, zone: Option<&str>) -> Sets {
    let of = |wanted: &dyn Fn(&Candidate) -> bool| -> BTreeSet<SocketAddr> {
        candidates.iter().filter(|(_, c)| wanted(c)).map(|(address, _)| *address).collect()
    };
    // L4: weight 0 is out, but where it would leave nothing of the local set.
    let weighs = |c: &Candidate| c.weight > 0;
    let ready = of(&|c| c.ready);
    let all = if ready.is_empty() { of(&Candidate::is_fallback) } else { ready.clone() };
    let chosen: BTreeSet<_> = all.iter().copied().filter(|at| weighs(&candidates[at])).collect();
    let ready_here = of(&|c| c.ready && c.here);
    let fallback_here = of(&|c| c.is_fallback() && c.here);
    let here = if ready_here.is_empty() { fallback_here } else { ready_here };
    let weighty: BTreeSet<_> = here.iter().copied().filter(|at| weighs(&candidates[at])).collect();
    let local = if weighty.is_empty() { here } else { weighty };
    let usable = candidates.iter().filter(|(_, c)| c.ready || c.serving);
    Sets {
        any: !chosen.is_empty(),
        weights: candidates.iter().map(|(address, c)| (*address, c.weight)).collect(),
        // T3: no hints for the local set.
        local: if chosen.is_empty() { BTreeSet::new() } else { local },
        cluster: if ready.is_empty() { chosen } else { by_hints(&chosen, candidates, node, zone) },
        usable: usable.map(|(address, c)| (*address, c.here)).collect(),
    }
}

/// T1.
fn by_hints(
    ready: &BTreeSet<SocketAddr>,
    candidates: &BTreeMap<SocketAddr, Candidate>,
    node: &str,
    zone: Option<&str>,
) -> BTreeSet<SocketAddr> {
    let all = || ready.iter().map(|address| (address, &candidates[address]));
    let same_node: BTreeSet<_> =
        all().filter(|(_, c)| c.for_nodes.contains(node)).map(|(address, _)| *address).collect();
    if all().all(|(_, c)| !c.for_nodes.is_empty()) && !same_node.is_empty() {
        return same_node;
    }
    let Some(zone) = zone else { return ready.clone() };
    let same_zone: BTreeSet<_> =
        all().filter(|(_, c)| c.for_zones.contains(zone)).map(|(address, _)| *address).collect();
    if all().all(|(_, c)| !c.for_zones.is_empty()) && !same_zone.is_empty() {
        return same_zone;
    }
    ready.clone()
}
