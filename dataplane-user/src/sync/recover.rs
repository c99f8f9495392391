//! What an earlier agent left in the kernel. Names are not in there: a service port is found again by its frontends, its
//! backends by their addresses and ports. So ids and generations of what did not change stay over a restart, and with
//! them every flow (C1, C2, C3), without any state on a disk.

use super::Maps;
use super::slots::Slots;
use crate::compile::Endpoint;
use crate::kernel::maps::MapError;
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::frontend::{Frontend, FrontendKey, FrontendKind};
use dataplane_common::range::SourceRangeKey;
use dataplane_common::service::{EndpointSet, Service};
use dataplane_common::tables;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A backend that the kernel holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BackendMirror {
    pub(super) endpoint: Endpoint,
    pub(super) id: u32,
    pub(super) flags: u32,
    pub(super) weight: u16,
}

/// A service port that the kernel holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PortMirror {
    pub(super) id: u32,
    pub(super) proto: u8,
    pub(super) value: Service,
    /// Ordered by endpoint.
    pub(super) backends: Box<[BackendMirror]>,
    /// What the slots of the cluster set hold.
    pub(super) cluster: Box<[u32]>,
    /// What the slots of the local set hold.
    pub(super) local: Box<[u32]>,
    pub(super) frontends: Box<[FrontendKey]>,
    /// The sources that may call its restricted addresses.
    pub(super) ranges: Box<[SourceRangeKey]>,
}

/// Backends by the id of their service port.
type BackendsByService = HashMap<u32, Vec<BackendMirror>>;

/// A set that no run can be: whatever is wanted differs from it, so it is written.
pub(super) const DAMAGED: EndpointSet = EndpointSet::new(u32::MAX, 0);

/// What was read, until the first complete snapshot says what of it is still wanted.
#[derive(Debug, Default)]
pub(super) struct Recovered {
    ports: HashMap<u32, PortMirror>,
}

/// All that is read from the kernel when the agent starts.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) recovered: Recovered,
    pub(super) frontends: HashMap<FrontendKey, Frontend>,
    /// Generation of each backend id up to the last that was ever given out.
    pub(super) generations: Vec<u32>,
    pub(super) slots: Slots,
    /// Ranges of sources that are the node's own.
    pub(super) node_ranges: BTreeSet<SourceRangeKey>,
    /// How many ranges of sources there are.
    pub(super) ranges: usize,
    pub(super) used_services: BTreeSet<u32>,
    pub(super) used_backends: BTreeSet<u32>,
}

impl Reading {
    /// Reads frontends, services, slots and backends.
    pub(super) fn of<M: Maps>(maps: &M) -> Result<Self, MapError> {
        let mut ports: BTreeMap<u32, PortMirror> = BTreeMap::new();
        let mut frontends = HashMap::new();
        maps.visit::<tables::Frontends>(|key, value| {
            frontends.insert(key, value);
        })?;
        for (key, value) in &frontends {
            if value.kind() != Ok(FrontendKind::ClosedPort) {
                let port = ports.entry(value.service()).or_default();
                port.frontends = [&*port.frontends, &[*key]].concat().into();
            }
        }
        let (generations, mut backends) = read_backends(maps)?;
        let used_backends = backends.values().flatten().map(|backend| backend.id).collect();
        for service in backends.keys() {
            ports.entry(*service).or_default();
        }
        maps.visit::<tables::Services>(|id, value| {
            if value != Service::default() {
                ports.entry(id).or_default().value = value;
            }
        })?;
        let mut node_ranges = BTreeSet::new();
        maps.visit::<tables::SourceRanges>(|key, _| {
            if key.is_of_node() {
                node_ranges.insert(key);
                return;
            }
            let port = ports.entry(key.service()).or_default();
            port.ranges = [&*port.ranges, &[key]].concat().into();
        })?;
        let mut slots = Slots::new(maps.capacity::<tables::Slots>()?);
        let held = read_slots(maps, &ports)?;
        for (id, port) in &mut ports {
            port.id = *id;
            port.backends = backends.remove(id).unwrap_or_default().into();
            (port.value.cluster, port.cluster) = recover_set(&mut slots, &held, port.value.cluster);
            (port.value.local, port.local) = recover_set(&mut slots, &held, port.value.local);
        }
        let ranges = node_ranges.len() + ports.values().map(|port| port.ranges.len()).sum::<usize>();
        let used_services = ports.keys().copied().collect();
        let recovered = Recovered { ports: ports.into_iter().collect() };
        Ok(Self {
            recovered,
            frontends,
            generations,
            slots,
            node_ranges,
            ranges,
            used_services,
            used_backends,
        })
    }
}

/// Generations of all ids, and the live backends by their service port, ordered by endpoint.
fn read_backends<M: Maps>(maps: &M) -> Result<(Vec<u32>, BackendsByService), MapError> {
    let mut generations = Vec::new();
    let mut backends = BackendsByService::new();
    maps.visit::<tables::Backends>(|id, value: Backend| {
        if value.status().generation() != 0 {
            *at(&mut generations, id) = value.status().generation();
        }
        // An id whose backend no longer serves is free; only its generation is remembered.
        if value.status().has(BackendStatus::SERVING) {
            let endpoint = Endpoint { addr: *value.addr(), port: value.port() };
            let (flags, weight) = (value.status().flags(), value.weight());
            let backend = BackendMirror { endpoint, id, flags, weight };
            backends.entry(value.service()).or_default().push(backend);
        }
    })?;
    for list in backends.values_mut() {
        list.sort_by_key(|backend| (backend.endpoint, backend.id));
    }
    Ok((generations, backends))
}

/// The generation of an id, 0 if it was never given out.
pub(super) fn at(generations: &mut Vec<u32>, id: u32) -> &mut u32 {
    let index = id as usize;
    if generations.len() <= index {
        generations.resize(index + 1, 0);
    }
    &mut generations[index]
}

/// The slots, if any service has a set.
fn read_slots<M: Maps>(maps: &M, ports: &BTreeMap<u32, PortMirror>) -> Result<Vec<u32>, MapError> {
    let mut held = Vec::new();
    if ports.values().any(|port| port.value.cluster.count() + port.value.local.count() > 0) {
        held.resize(maps.capacity::<tables::Slots>()?, 0);
        maps.visit::<tables::Slots>(|slot, id| {
            if let Some(to) = held.get_mut(slot as usize) {
                *to = id;
            }
        })?;
    }
    Ok(held)
}

/// Takes the run of a set that the kernel holds, and what its slots hold.
fn recover_set(slots: &mut Slots, held: &[u32], set: EndpointSet) -> (EndpointSet, Box<[u32]>) {
    if set.count() == 0 {
        return (if set == EndpointSet::EMPTY { set } else { DAMAGED }, Box::default());
    }
    if !slots.reserve(set) {
        return (DAMAGED, Box::default());
    }
    let base = set.base() as usize;
    (set, held.get(base..base + set.count() as usize).unwrap_or_default().into())
}

impl Recovered {
    /// Takes the service port that most of these addresses lead to in the kernel; ClusterIPs weigh more than node ports,
    /// which pass from one Service to another.
    pub(super) fn adopt(
        &mut self,
        wanted: &BTreeMap<FrontendKey, FrontendKind>,
        kernel: &HashMap<FrontendKey, Frontend>,
    ) -> Option<PortMirror> {
        let mut candidates: Vec<_> = wanted
            .iter()
            .filter_map(|(key, kind)| Some((*kind, kernel.get(key)?.service())))
            .filter(|(_, id)| *id != 0 && self.ports.contains_key(id))
            .collect();
        candidates.sort_unstable();
        let (_, id) = candidates.first()?;
        self.ports.remove(id)
    }

    /// What nothing adopted.
    pub(super) fn into_orphans(self) -> Vec<PortMirror> {
        let mut orphans: Vec<_> = self.ports.into_values().collect();
        orphans.sort_unstable_by_key(|port| port.id);
        orphans
    }
}
