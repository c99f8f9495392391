//! The endpoints of a service port, and which of them the two sets hold. The rules T1 to T5 are kept here and nowhere
//! else.

use super::Context;
use super::selection::{self, Weights};
use super::tables::Endpoint;
use crate::model;
use dataplane_common::Port;
use dataplane_common::backend::BackendStatus;
use std::cmp::Reverse;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// An endpoint of a service port.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a> {
    endpoint: &'a model::Endpoint,
    /// Its share of new flows, against that of the others; 0: none (L3).
    pub(super) weight: u16,
}

impl std::ops::Deref for Candidate<'_> {
    type Target = model::Endpoint;

    fn deref(&self) -> &model::Endpoint {
        self.endpoint
    }
}

/// The endpoints of one service port in one family, each once.
pub(super) type Candidates<'a> = BTreeMap<Endpoint, Candidate<'a>>;

/// Which sets are asked for (T4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Needs {
    pub(super) cluster: bool,
    pub(super) local: bool,
}

impl Needs {
    /// T4: the cluster set is needed if internalTrafficPolicy is not Local, or if the port is reachable from outside:
    /// then even with externalTrafficPolicy Local, for the short-circuit of P5 and P6. The local set is needed if
    /// internalTrafficPolicy is Local, or if externalTrafficPolicy is Local and the port is reachable from outside.
    pub(super) fn of(service: &model::Service, outside: bool) -> Self {
        Self {
            cluster: !service.internal_local || outside,
            local: service.internal_local || (service.external_local && outside),
        }
    }
}

/// The endpoint sets of one service port.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sets {
    pub(super) cluster: BTreeSet<Endpoint>,
    pub(super) local: BTreeSet<Endpoint>,
    /// *has any* of the contract: some READY or FALLBACK endpoint exists, and not all have the weight 0 (L4).
    pub(super) any: bool,
    /// Some exist, and all have the weight 0.
    pub(super) all_zero: bool,
}

/// The endpoints of a service port: from all slices of the family, by port name and protocol; of two with one address
/// and port, one that is not terminating wins (F5). The order of slices and endpoints changes nothing.
pub(super) fn candidates<'a>(
    slices: &'a [model::EndpointSlice],
    port: &model::ServicePort,
    ipv6: bool,
    weights: &Weights,
) -> Candidates<'a> {
    let mut candidates = Candidates::new();
    for slice in slices.iter().filter(|slice| is_of_family(slice, ipv6)) {
        let numbers = slice
            .ports
            .iter()
            .filter(|other| other.name == port.name && other.protocol == port.protocol)
            .filter(|other| other.port != 0);
        let of_slice = selection::slice_weight(slice).unwrap_or_default();
        for number in numbers {
            for endpoint in slice.endpoints.iter().filter(|endpoint| is_usable(endpoint.address, ipv6)) {
                let key = Endpoint { addr: endpoint.address.into(), port: Port::new(number.port) };
                let candidate = Candidate { endpoint, weight: weights.weight(endpoint, of_slice) };
                match candidates.entry(key) {
                    Entry::Vacant(entry) => drop(entry.insert(candidate)),
                    Entry::Occupied(mut entry) if precedence(&candidate) < precedence(entry.get()) => {
                        entry.insert(candidate);
                    }
                    Entry::Occupied(_) => {}
                }
            }
        }
    }
    candidates
}

/// Whether the slice's addresses are of this family (F4).
pub(super) fn is_of_family(slice: &model::EndpointSlice, ipv6: bool) -> bool {
    match slice.address_type {
        model::AddressType::Ipv4 => !ipv6,
        model::AddressType::Ipv6 => ipv6,
        model::AddressType::Fqdn => false,
    }
}

/// Whether an endpoint may have this address: of the slice's family, and none that Z2 names.
pub(super) fn is_usable(ip: IpAddr, ipv6: bool) -> bool {
    ip.is_ipv6() == ipv6 && super::service::refused(ip).is_none()
}

/// Of two descriptions of one endpoint the smaller counts: a total order, so that slices may come in any order (F5).
fn precedence<'a>(candidate: &Candidate<'a>) -> impl Ord + use<'a> {
    let Candidate { endpoint, weight } = *candidate;
    let hints = Reverse((&endpoint.for_nodes, &endpoint.for_zones));
    (
        endpoint.terminating,
        !endpoint.ready,
        !endpoint.serving,
        Reverse(&endpoint.node),
        hints,
        Reverse(weight),
    )
}

/// The flags of the endpoint's backend, if flows may go to it: while it is ready or serving.
///
/// An endpoint may be ready without serving: `publishNotReadyAddresses` (S7).
pub(super) fn backend_flags(endpoint: &model::Endpoint, context: &Context) -> Option<u32> {
    if !endpoint.ready && !endpoint.serving {
        return None;
    }
    let local = if is_local(endpoint, context) { BackendStatus::LOCAL } else { 0 };
    Some(BackendStatus::SERVING | local)
}

/// Whether it is on this node.
pub(super) fn is_local(endpoint: &model::Endpoint, context: &Context) -> bool {
    endpoint.node.as_ref() == Some(&context.node_name)
}

/// Chooses the endpoint sets of a service port.
///
/// READY is an endpoint that is ready, FALLBACK one that is serving and terminating.
///
/// - The cluster set is READY, filtered by hints; if no endpoint anywhere is READY it is all FALLBACK, hints ignored.
/// - The local set is READY on this node; if that is empty it is FALLBACK on this node, even if READY ones exist
///   elsewhere.
/// - **T1** Hints, over READY endpoints of the whole service port: *same node* if all have `hints.forNodes` and at least
///   one names this node; else *same zone* if all have `hints.forZones`, this node has a zone and at least one names it;
///   else all. One READY endpoint without a hint switches that kind of hint off.
/// - **T2** Only hints are read: `trafficDistribution` and annotations are not even in the model.
/// - **T3** Hints never touch the local set.
/// - **T4** A set that nothing asks for is empty ([`Needs`]).
/// - **T5** An endpoint that is terminating and not serving is in no set. (`publishNotReadyAddresses` makes it *ready*
///   all the same: then it is READY, S7.)
/// - **L4** Weight 0 goes before hints. All endpoints of the port have it: as if there were none. All of the local set have it:
///   they serve all the same.
pub(super) fn select(candidates: &Candidates<'_>, needs: Needs, context: &Context) -> Sets {
    let ready: Vec<_> = candidates.iter().filter(|(_, e)| e.ready).map(|(key, e)| (*key, *e)).collect();
    let fallback: Vec<_> = candidates
        .iter()
        .filter(|(_, e)| !e.ready && e.serving && e.terminating)
        .map(|(key, e)| (*key, *e))
        .collect();
    let all = if ready.is_empty() { &fallback } else { &ready };
    let weighty: Vec<_> = all.iter().filter(|(_, e)| e.weight > 0).copied().collect();
    let mut sets = Sets { any: !weighty.is_empty(), ..Sets::default() };
    sets.all_zero = !sets.any && !all.is_empty();
    if sets.all_zero {
        return sets;
    }
    if needs.cluster {
        sets.cluster = if ready.is_empty() {
            weighty.iter().map(|(key, _)| *key).collect()
        } else {
            filter_by_hints(&weighty, context)
        };
    }
    if needs.local {
        let here = |(_, e): &&(Endpoint, Candidate<'_>)| is_local(e, context);
        let mut local: Vec<_> = ready.iter().filter(here).collect();
        if local.is_empty() {
            local = fallback.iter().filter(here).collect();
        }
        if local.iter().any(|(_, e)| e.weight > 0) {
            local.retain(|(_, e)| e.weight > 0);
        }
        sets.local = local.into_iter().map(|(key, _)| *key).collect();
    }
    sets
}

/// T1: the READY endpoints meant for this node, else for its zone, else all.
fn filter_by_hints(ready: &[(Endpoint, Candidate<'_>)], context: &Context) -> BTreeSet<Endpoint> {
    let hinted = |hints: fn(&model::Endpoint) -> &[Arc<str>], here: &Arc<str>| {
        if ready.iter().any(|(_, e)| hints(e).is_empty()) {
            return None;
        }
        let chosen: BTreeSet<Endpoint> =
            ready.iter().filter(|(_, e)| hints(e).contains(here)).map(|(key, _)| *key).collect();
        (!chosen.is_empty()).then_some(chosen)
    };
    hinted(|e| &e.for_nodes, &context.node_name)
        .or_else(|| context.zone.as_ref().and_then(|zone| hinted(|e| &e.for_zones, zone)))
        .unwrap_or_else(|| ready.iter().map(|(key, _)| *key).collect())
}
