//! What the kernel holds, as far as the agent knows, and the way from there to what it should hold.

use super::filter::{Filter, LingeringBits};
use super::ids::Ids;
use super::plan::Plan;
use super::recover::{self, BackendMirror, DAMAGED, PortMirror, Reading, Recovered};
use super::slots::Slots;
use super::{Maps, Op, apply};
use crate::compile::{
    Endpoint, Member, NodeTables, PortTables, ServicePortName, ServiceTables, range_key, run,
};
use crate::kernel::maps::MapError;
use crate::model::ObjectName;
use dataplane_common::Addr;
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::filter::FilterBit;
use dataplane_common::frontend::{Frontend, FrontendKey, FrontendKind};
use dataplane_common::node::{Node, NodeAddress};
use dataplane_common::range::SourceRangeKey;
use dataplane_common::service::{EndpointSet, Policy, Service};
use dataplane_common::tables::{self, Table as _};
use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

/// How many Services a snapshot writes at a time.
const AT_A_TIME: usize = 1_000;

/// A Service that found no room: what the kernel held of it stays as it was.
#[derive(Debug)]
pub struct Refused {
    /// The Service.
    pub service: ObjectName,
    /// Which table is full, and how to enlarge it.
    pub error: MapError,
}

/// What a change came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many entries were written or removed.
    pub ops: usize,
    /// How many `bpf(2)` calls that took.
    pub calls: u64,
    /// Services that found no room; [`Mirror::tick`] tries them again.
    pub refused: Vec<Refused>,
    /// Whether a service port was added or removed: the file of names is to be written anew.
    pub names_changed: bool,
    /// How many entries an audit, needed because an earlier apply failed, had to repair first.
    pub repaired: usize,
}

/// The ports of a Service, and its addresses that are closed on all other ports.
#[derive(Debug, Default)]
pub(super) struct ServiceMirror {
    pub(super) ports: Vec<(ServicePortName, PortMirror)>,
    pub(super) closed: Box<[Addr]>,
}

/// What the kernel holds. See the module's documentation for the calls and their order.
#[derive(Debug)]
pub struct Mirror {
    pub(super) services: BTreeMap<ObjectName, ServiceMirror>,
    pub(super) frontends: HashMap<FrontendKey, Frontend>,
    /// How many Services have an address closed.
    pub(super) closed: HashMap<Addr, u32>,
    pub(super) generations: Vec<u32>,
    pub(super) filter: Filter,
    pub(super) addresses: BTreeMap<Addr, NodeAddress>,
    pub(super) node: Option<Node>,
    /// Ranges of sources that are of no service port, but of the node.
    pub(super) node_ranges: BTreeSet<SourceRangeKey>,
    service_ids: Ids,
    backend_ids: Ids,
    slots: Slots,
    frontend_room: usize,
    address_room: usize,
    /// How many ranges of sources there are.
    ranges: usize,
    range_room: usize,
    /// Services that found no room, as they should be.
    waiting: BTreeMap<ObjectName, ServiceTables>,
    /// What an earlier agent left; `None` once the first complete snapshot is in.
    pub(super) recovered: Option<Recovered>,
    /// An apply failed: the kernel may hold something else.
    pub(super) doubtful: bool,
}

/// A set of a service port while it is planned.
struct DraftSet {
    run: EndpointSet,
    ids: Box<[u32]>,
    fresh: bool,
}

/// A service port while it is planned: all that it needs is taken, nothing is written yet.
struct Draft<'a> {
    name: &'a ServicePortName,
    tables: &'a PortTables,
    id: u32,
    fresh: bool,
    backends: Box<[BackendMirror]>,
    fresh_backends: BTreeSet<u32>,
    sets: Vec<DraftSet>,
}

impl Mirror {
    /// Reads what the kernel holds. Writes nothing.
    ///
    /// # Errors
    /// If a map cannot be read.
    pub fn open<M: Maps>(maps: &M, _now: Instant) -> Result<Self, MapError> {
        let reading = Reading::of(maps)?;
        let mut words = Vec::new();
        maps.visit::<tables::Filter>(|word, bits| words.push((word, bits)))?;
        let mut addresses = BTreeMap::new();
        maps.visit::<tables::NodeAddrs>(|addr, value| {
            addresses.insert(addr, value);
        })?;
        let mut filter = Filter::new(words);
        for addr in addresses.keys() {
            filter.add(FilterBit::node_address(addr));
        }
        for key in reading.frontends.keys() {
            bits_of(key, &addresses).for_each(|bit| filter.add(bit));
        }
        Ok(Self {
            services: BTreeMap::new(),
            service_ids: Ids::new(maps.capacity::<tables::Services>()?, &reading.used_services),
            backend_ids: Ids::new(maps.capacity::<tables::Backends>()?, &reading.used_backends),
            frontends: reading.frontends,
            closed: HashMap::new(),
            generations: reading.generations,
            filter,
            addresses,
            node: maps.get::<tables::Nodes>(&0)?,
            slots: reading.slots,
            frontend_room: maps.capacity::<tables::Frontends>()?,
            address_room: maps.capacity::<tables::NodeAddrs>()?,
            ranges: reading.ranges,
            node_ranges: reading.node_ranges,
            range_room: maps.capacity::<tables::SourceRanges>()?,
            waiting: BTreeMap::new(),
            recovered: Some(reading.recovered),
            doubtful: false,
        })
    }

    /// Makes these Services, and no others, the kernel's: the first complete snapshot, or one after a relist. What nothing
    /// names any more is removed after the rest is in (make before break). Some are asked for at a time, and then written: not
    /// all of their tables need be in memory at once.
    ///
    /// # Errors
    /// If the kernel refuses a write; the next call repairs first. A full table is no error, see [`Outcome::refused`].
    pub fn replace<'a, M: Maps, T: Borrow<ServiceTables>>(
        &mut self,
        maps: &M,
        services: impl IntoIterator<Item = (&'a ObjectName, T)>,
        now: Instant,
    ) -> Result<Outcome, MapError> {
        let (mut plan, mut outcome) = self.begin(maps, now)?;
        let mut gone: BTreeSet<ObjectName> =
            self.services.keys().chain(self.waiting.keys()).cloned().collect();
        for (planned, (name, desired)) in (1..).zip(services) {
            gone.remove(name);
            self.plan_or_wait(&mut plan, &mut outcome, name, Some(desired.borrow()), now);
            if planned % AT_A_TIME == 0 {
                outcome.ops += self.write(maps, std::mem::take(&mut plan))?;
            }
        }
        for name in &gone {
            self.plan_or_wait(&mut plan, &mut outcome, name, None, now);
        }
        // The first time, the file of names may be of an earlier agent, or missing.
        outcome.names_changed |= self.recovered.is_some();
        self.plan_orphans(&mut plan, now);
        self.finish(maps, plan, outcome)
    }

    /// Makes these Services as they should be now; `None` if a Service is gone.
    ///
    /// # Errors
    /// As [`Self::replace`].
    pub fn change<'a, M: Maps>(
        &mut self,
        maps: &M,
        changes: impl IntoIterator<Item = (&'a ObjectName, Option<&'a ServiceTables>)>,
        now: Instant,
    ) -> Result<Outcome, MapError> {
        let (mut plan, mut outcome) = self.begin(maps, now)?;
        for (name, desired) in changes {
            self.plan_or_wait(&mut plan, &mut outcome, name, desired, now);
        }
        self.finish(maps, plan, outcome)
    }

    /// Tries again what found no room. Cheap when nothing waits.
    ///
    /// # Errors
    /// As [`Self::replace`].
    pub fn tick<M: Maps>(&mut self, maps: &M, now: Instant) -> Result<Outcome, MapError> {
        let (mut plan, mut outcome) = self.begin(maps, now)?;
        for (name, desired) in std::mem::take(&mut self.waiting) {
            self.plan_or_wait(&mut plan, &mut outcome, &name, Some(&desired), now);
        }
        self.finish(maps, plan, outcome)
    }

    /// Writes the tables of the node itself.
    ///
    /// # Errors
    /// As [`Self::replace`].
    pub fn set_node<M: Maps>(
        &mut self,
        maps: &M,
        desired: &NodeTables,
        now: Instant,
    ) -> Result<Outcome, MapError> {
        let (mut plan, mut outcome) = self.begin(maps, now)?;
        let fresh = desired.addresses.keys().filter(|addr| !self.addresses.contains_key(addr)).count();
        if self.addresses.len() + fresh > self.address_room {
            // There is no room for both those that go and those that come.
            let kept = self.addresses.iter().filter(|(addr, _)| desired.addresses.contains_key(addr));
            let kept = kept.map(|(addr, value)| (*addr, *value)).collect();
            self.plan_addresses(&mut plan, &kept, now);
            outcome.ops += self.write(maps, std::mem::take(&mut plan))?;
        }
        if self.node != Some(desired.node) {
            self.node = Some(desired.node);
            plan.node = Some(Box::new(desired.node));
        }
        if self.addresses != desired.addresses {
            self.plan_addresses(&mut plan, &desired.addresses, now);
        }
        if self.node_ranges != desired.ranges {
            let old: Vec<_> =
                std::mem::replace(&mut self.node_ranges, desired.ranges.clone()).into_iter().collect();
            self.plan_ranges(&mut plan, &old, &desired.ranges);
        }
        self.finish(maps, plan, outcome)
    }

    /// Filter bits that no table needs any more and that have rested: a sweep of the flow tables tells which of them flows
    /// need ([`LingeringBits::keep_for`]); [`Self::clear_bits`] clears the others.
    pub fn lingering_bits(&self, now: Instant) -> LingeringBits {
        self.filter.lingering(now)
    }

    /// Clears filter bits that neither a table nor a flow needs.
    ///
    /// # Errors
    /// As [`Self::replace`].
    pub fn clear_bits<M: Maps>(
        &mut self,
        maps: &M,
        bits: &LingeringBits,
        now: Instant,
    ) -> Result<Outcome, MapError> {
        let (plan, outcome) = self.begin(maps, now)?;
        self.filter.clear(bits);
        self.finish(maps, plan, outcome)
    }

    /// Ids and names of all service ports, for the file of names and for metrics.
    pub fn names(&self) -> impl Iterator<Item = (u32, &ServicePortName)> {
        self.services.values().flat_map(|service| service.ports.iter().map(|(name, port)| (port.id, name)))
    }

    /// Services that wait for room.
    pub fn waiting(&self) -> impl Iterator<Item = &ObjectName> {
        self.waiting.keys()
    }

    /// How many service ports, live backends and frontends the kernel holds for the Services that are known.
    pub fn sizes(&self) -> (usize, usize, usize) {
        let ports = || self.services.values().flat_map(|service| &service.ports);
        let backends = ports().map(|(_, port)| port.backends.len()).sum();
        (ports().count(), backends, self.frontends.len())
    }

    /// How many entries the tables have that only the agent writes, and how many they have room for.
    pub fn fill(&self) -> [(&'static str, usize, usize); 5] {
        let (ports, backends, frontends) = self.sizes();
        [
            (tables::Services::NAME, ports, self.service_ids.capacity()),
            (tables::Backends::NAME, backends, self.backend_ids.capacity()),
            (tables::Frontends::NAME, frontends, self.frontend_room),
            (tables::Slots::NAME, self.slots.used(), self.slots.capacity()),
            (tables::SourceRanges::NAME, self.ranges, self.range_room),
        ]
    }

    /// Service ports with a Local policy, internal and external, whose endpoints are all on other nodes (P2, P3), of IPv4 and of
    /// IPv6.
    pub fn without_local_endpoints(&self) -> [[usize; 2]; 2] {
        let ports = || self.services.values().flat_map(|service| &service.ports);
        [Policy::INTERNAL_LOCAL, Policy::EXTERNAL_LOCAL].map(|local| {
            let lacking =
                |value: &Service| value.policy.has(local | Policy::HAS_ENDPOINTS) && value.local.count() == 0;
            [false, true]
                .map(|ipv6| ports().filter(|(name, port)| name.ipv6 == ipv6 && lacking(&port.value)).count())
        })
    }

    fn begin<M: Maps>(&mut self, maps: &M, now: Instant) -> Result<(Plan, Outcome), MapError> {
        let calls = maps.calls();
        let repaired = if self.doubtful { self.audit(maps, now)? } else { 0 };
        self.service_ids.wake(now);
        self.backend_ids.wake(now);
        self.slots.wake(now);
        Ok((Plan::default(), Outcome { calls, repaired, ..Outcome::default() }))
    }

    fn finish<M: Maps>(&mut self, maps: &M, plan: Plan, mut outcome: Outcome) -> Result<Outcome, MapError> {
        outcome.ops += self.write(maps, plan)?;
        outcome.calls = maps.calls() - outcome.calls;
        Ok(outcome)
    }

    /// How many entries were written or removed.
    fn write<M: Maps>(&mut self, maps: &M, plan: Plan) -> Result<usize, MapError> {
        let ops = plan.into_ops(&mut self.filter);
        self.perform(maps, &ops)?;
        Ok(ops.len())
    }

    /// Applies; after a failure nothing is taken for certain until the next audit.
    pub(super) fn perform<M: Maps>(&mut self, maps: &M, ops: &[Op]) -> Result<(), MapError> {
        apply(maps, ops).inspect_err(|_| self.doubtful = true)
    }

    pub(super) fn plan_or_wait(
        &mut self,
        plan: &mut Plan,
        outcome: &mut Outcome,
        name: &ObjectName,
        desired: Option<&ServiceTables>,
        now: Instant,
    ) {
        self.waiting.remove(name);
        match self.plan_service(plan, name, desired, now) {
            Ok(names_changed) => outcome.names_changed |= names_changed,
            Err(error) => {
                outcome.refused.push(Refused { service: name.clone(), error });
                self.waiting.extend(desired.map(|desired| (name.clone(), desired.clone())));
            }
        }
    }

    /// Plans one Service, whole or not at all. Says whether it has other ports than before.
    fn plan_service(
        &mut self,
        plan: &mut Plan,
        name: &ObjectName,
        desired: Option<&ServiceTables>,
        now: Instant,
    ) -> Result<bool, MapError> {
        let nothing = ServiceTables::default();
        let wanted = desired.unwrap_or(&nothing);
        let mut old = self.services.remove(name).unwrap_or_default();
        self.adopt_ports(&mut old, wanted);
        let drafts = match self.draft_service(plan, &old, wanted) {
            Ok(drafts) => drafts,
            Err(error) => {
                self.services.insert(name.clone(), old);
                return Err(error);
            }
        };
        let before = old.ports.len();
        let fresh = drafts.iter().any(|draft| draft.fresh);
        let mut ports = Vec::with_capacity(drafts.len());
        for draft in drafts {
            let at = old.ports.iter().position(|(name, _)| name == draft.name);
            let before = at.map_or_else(PortMirror::default, |at| old.ports.swap_remove(at).1);
            let name = draft.name.clone();
            ports.push((name, self.plan_port(plan, before, draft, now)));
        }
        let changed = fresh || ports.len() != before;
        for (_, gone) in old.ports {
            self.plan_port_removal(plan, gone, now);
        }
        self.plan_closed(plan, &old.closed, wanted, now);
        if desired.is_some() {
            let closed = wanted.closed.iter().copied().collect();
            self.services.insert(name.clone(), ServiceMirror { ports, closed });
        }
        Ok(changed)
    }

    /// Finds ports of the Service in what an earlier agent left.
    fn adopt_ports(&mut self, old: &mut ServiceMirror, wanted: &ServiceTables) {
        let Some(recovered) = &mut self.recovered else { return };
        for (name, tables) in &wanted.ports {
            if old.ports.iter().any(|(known, _)| known == name) {
                continue;
            }
            if let Some(mut port) = recovered.adopt(&tables.frontends, &self.frontends) {
                port.proto = name.proto;
                for backend in &port.backends {
                    self.filter.add(backend_bit(&backend.endpoint, port.proto));
                }
                old.ports.push((name.clone(), port));
            }
        }
    }

    /// Takes all ids and runs that the Service needs, or none.
    fn draft_service<'a>(
        &mut self,
        plan: &Plan,
        old: &ServiceMirror,
        wanted: &'a ServiceTables,
    ) -> Result<Vec<Draft<'a>>, MapError> {
        let keys = wanted.ports.values().flat_map(|port| port.frontends.keys().copied());
        let closed = wanted.closed.iter().map(|addr| FrontendKey::any_port(*addr));
        let new = keys.chain(closed).filter(|key| !self.frontends.contains_key(key)).count();
        if new > 0 && self.frontends.len() + plan.removed_frontends.len() + new > self.frontend_room {
            return Err(full::<tables::Frontends>(self.frontend_room));
        }
        let held = |name: &ServicePortName| old.ports.iter().find(|(known, _)| known == name);
        let more = wanted.ports.iter().map(|(name, port)| {
            let held = held(name).map(|(_, port)| (port.id, &*port.ranges)).unwrap_or_default();
            port.ranges.iter().filter(|range| !held.1.contains(&range_key(held.0, range))).count()
        });
        let more = more.sum::<usize>();
        if more > 0 && self.ranges + plan.removed_ranges.len() + more > self.range_room {
            return Err(full::<tables::SourceRanges>(self.range_room));
        }
        let mut drafts = Vec::with_capacity(wanted.ports.len());
        for (name, tables) in &wanted.ports {
            let known = old.ports.iter().find(|(known, _)| known == name).map(|(_, port)| port);
            let mut draft = Draft {
                name,
                tables,
                id: known.map_or(0, |port| port.id),
                fresh: false,
                backends: Box::default(),
                fresh_backends: BTreeSet::new(),
                sets: Vec::new(),
            };
            let result = self.draft_port(&mut draft, known);
            drafts.push(draft);
            if let Err(error) = result {
                drafts.into_iter().for_each(|draft| self.give_back(draft));
                return Err(error);
            }
        }
        Ok(drafts)
    }

    fn draft_port(&mut self, draft: &mut Draft<'_>, known: Option<&PortMirror>) -> Result<(), MapError> {
        if known.is_none() {
            let id = self.service_ids.take_late();
            draft.id = id.ok_or_else(|| full::<tables::Services>(self.service_ids.capacity()))?;
            draft.fresh = true;
        }
        let mut backends = Vec::with_capacity(draft.tables.backends.len());
        for (endpoint, flags) in &draft.tables.backends {
            let id = match known.and_then(|port| port.backend(endpoint)) {
                Some(backend) => backend.id,
                None => {
                    let id = self.backend_ids.take();
                    let id = id.ok_or_else(|| full::<tables::Backends>(self.backend_ids.capacity()))?;
                    draft.fresh_backends.insert(id);
                    id
                }
            };
            let weight = draft.tables.weights.get(endpoint).copied().unwrap_or(1);
            backends.push(BackendMirror { endpoint: *endpoint, id, flags: *flags, weight });
        }
        draft.backends = backends.into();
        let old = known.map(|port| [(port.value.cluster, &port.cluster), (port.value.local, &port.local)]);
        for (at, set) in [&draft.tables.cluster, &draft.tables.local].into_iter().enumerate() {
            let ids = run_of(set, draft);
            // Whose slots they are, and how one is chosen.
            let algorithm = draft.tables.algorithm;
            let several = ids.iter().any(|id| Some(id) != ids.first());
            let shaped = |run: EndpointSet| run.with_algorithm(algorithm).of_several(several);
            let kept = old
                .and_then(|old| old.get(at).copied())
                .filter(|(run, held)| ***held == *ids && *run != DAMAGED && *run == shaped(*run));
            let set = match kept {
                Some((run, _)) => DraftSet { run, ids, fresh: false },
                None => {
                    let run = self.slots.take(ids.len() as u32);
                    let run = run.ok_or_else(|| full::<tables::Slots>(self.slots.capacity()))?;
                    DraftSet { run: shaped(run), ids, fresh: true }
                }
            };
            draft.sets.push(set);
        }
        Ok(())
    }

    /// Returns what a draft took.
    fn give_back(&mut self, draft: Draft<'_>) {
        if draft.fresh {
            self.service_ids.give_back(draft.id);
        }
        draft.fresh_backends.into_iter().for_each(|id| self.backend_ids.give_back(id));
        draft.sets.iter().filter(|set| set.fresh).for_each(|set| self.slots.give_back(set.run));
    }

    fn plan_port(&mut self, plan: &mut Plan, old: PortMirror, draft: Draft<'_>, now: Instant) -> PortMirror {
        let id = draft.id;
        if draft.fresh {
            plan.zero_services.push(id);
        }
        for backend in &draft.backends {
            self.plan_backend(plan, old.backend(&backend.endpoint), backend, &draft);
        }
        let mut sets = draft.sets.into_iter();
        let mut next_set = |slots: &mut Slots, old_run: EndpointSet| {
            let set = sets.next().unwrap_or(DraftSet {
                run: EndpointSet::EMPTY,
                ids: Box::default(),
                fresh: false,
            });
            if set.fresh {
                plan.slots.extend((set.run.base()..).zip(set.ids.iter().copied()));
                slots.release(old_run, now);
            }
            (set.run, set.ids)
        };
        let (cluster_run, cluster) = next_set(&mut self.slots, old.value.cluster);
        let (local_run, local) = next_set(&mut self.slots, old.value.local);
        let value = Service::new(cluster_run, local_run, draft.tables.policy, draft.tables.seed);
        if value != old.value {
            plan.services.push((id, value));
        }
        for (key, kind) in &draft.tables.frontends {
            self.plan_frontend(plan, *key, Frontend::new(id, *kind));
        }
        for key in old.frontends.iter().filter(|key| !draft.tables.frontends.contains_key(key)) {
            self.plan_frontend_removal(plan, key, id, now);
        }
        let proto = draft.name.proto;
        let kept: BTreeSet<u32> = draft.backends.iter().map(|backend| backend.id).collect();
        for gone in old.backends.iter().filter(|backend| !kept.contains(&backend.id)) {
            self.plan_retirement(plan, gone, id, Some(proto), now);
        }
        let frontends = draft.tables.frontends.keys().copied().collect();
        let ranges = draft.tables.ranges.iter().map(|range| range_key(id, range)).collect();
        self.plan_ranges(plan, &old.ranges, &ranges);
        let ranges = ranges.into_iter().collect();
        PortMirror { id, proto, value, backends: draft.backends, cluster, local, frontends, ranges }
    }

    fn plan_ranges(&mut self, plan: &mut Plan, old: &[SourceRangeKey], new: &BTreeSet<SourceRangeKey>) {
        for key in new.iter().filter(|key| !old.contains(key)) {
            plan.ranges.push(*key);
            self.ranges += 1;
        }
        for key in old.iter().filter(|key| !new.contains(key)) {
            plan.removed_ranges.insert(*key);
            self.ranges -= 1;
        }
    }

    /// A backend that stays or comes. One that no longer serves is written after the sets that held it (C1).
    fn plan_backend(
        &mut self,
        plan: &mut Plan,
        old: Option<&BackendMirror>,
        new: &BackendMirror,
        draft: &Draft<'_>,
    ) {
        if draft.fresh_backends.contains(&new.id) {
            self.filter.add(backend_bit(&new.endpoint, draft.name.proto));
            let generation = recover::at(&mut self.generations, new.id);
            if *generation > 0 {
                plan.zero_backends.push(new.id);
            }
            // Generation 0 is that of an id which was never given out.
            *generation = generation.wrapping_add(1).max(1);
            plan.backends.push((new.id, self.backend_value(new, draft.id)));
        } else if old.is_some_and(|old| (old.flags, old.weight) != (new.flags, new.weight)) {
            let value = self.backend_value(new, draft.id);
            let phase = if value.status().has(BackendStatus::SERVING) {
                &mut plan.backends
            } else {
                &mut plan.retired
            };
            phase.push((new.id, value));
        }
    }

    /// What the kernel holds of a live backend.
    pub(super) fn backend_value(&self, backend: &BackendMirror, service: u32) -> Backend {
        let generation = self.generations.get(backend.id as usize).copied().unwrap_or_default();
        let status = BackendStatus::new(generation, backend.flags);
        Backend::new(status, backend.endpoint.addr, backend.endpoint.port, service)
            .with_weight(backend.weight)
    }

    /// A backend that goes keeps its address and generation in the kernel, for readers that are under way and for the
    /// next agent; without a flag it serves nobody.
    fn plan_retirement(
        &mut self,
        plan: &mut Plan,
        gone: &BackendMirror,
        service: u32,
        proto: Option<u8>,
        now: Instant,
    ) {
        plan.retired.push((gone.id, self.backend_value(&BackendMirror { flags: 0, ..*gone }, service)));
        self.backend_ids.release(gone.id, now);
        if let Some(proto) = proto {
            self.filter.remove(backend_bit(&gone.endpoint, proto), now);
        }
    }

    fn plan_frontend(&mut self, plan: &mut Plan, key: FrontendKey, value: Frontend) {
        match self.frontends.insert(key, value) {
            Some(old) if old == value => return,
            Some(_) => {}
            None => bits_of(&key, &self.addresses).for_each(|bit| self.filter.add(bit)),
        }
        plan.removed_frontends.remove(&key);
        plan.frontends.push((key, value));
    }

    /// Removes a frontend if it still leads to this service port: another one may have taken it over.
    fn plan_frontend_removal(&mut self, plan: &mut Plan, key: &FrontendKey, service: u32, now: Instant) {
        if self.frontends.get(key).is_some_and(|value| value.service() == service) {
            self.frontends.remove(key);
            bits_of(key, &self.addresses).for_each(|bit| self.filter.remove(bit, now));
            plan.removed_frontends.insert(*key);
        }
    }

    fn plan_port_removal(&mut self, plan: &mut Plan, gone: PortMirror, now: Instant) {
        self.plan_withdrawal(plan, &gone, Some(gone.proto), now);
    }

    fn plan_withdrawal(&mut self, plan: &mut Plan, gone: &PortMirror, proto: Option<u8>, now: Instant) {
        for key in &gone.frontends {
            self.plan_frontend_removal(plan, key, gone.id, now);
        }
        if gone.value != Service::default() {
            plan.cleared_services.push(gone.id);
        }
        for backend in &gone.backends {
            self.plan_retirement(plan, backend, gone.id, proto, now);
        }
        self.plan_ranges(plan, &gone.ranges, &BTreeSet::new());
        self.slots.release(gone.value.cluster, now);
        self.slots.release(gone.value.local, now);
        self.service_ids.release(gone.id, now);
    }

    /// Addresses closed on all other ports may be those of several Services (P13).
    fn plan_closed(&mut self, plan: &mut Plan, old: &[Addr], wanted: &ServiceTables, now: Instant) {
        for addr in wanted.closed.iter().filter(|addr| !old.contains(addr)) {
            *self.closed.entry(*addr).or_insert(0) += 1;
            self.plan_frontend(
                plan,
                FrontendKey::any_port(*addr),
                Frontend::new(0, FrontendKind::ClosedPort),
            );
        }
        for addr in old.iter().filter(|addr| !wanted.closed.contains(addr)) {
            let Some(count) = self.closed.get_mut(addr) else { continue };
            *count -= 1;
            if *count == 0 {
                self.closed.remove(addr);
                self.plan_frontend_removal(plan, &FrontendKey::any_port(*addr), 0, now);
            }
        }
    }

    /// Removes what an earlier agent left and no Service named.
    fn plan_orphans(&mut self, plan: &mut Plan, now: Instant) {
        let Some(recovered) = self.recovered.take() else { return };
        for orphan in recovered.into_orphans() {
            // Their protocol is not known, so their bits were never counted.
            self.plan_withdrawal(plan, &orphan, None, now);
        }
        let closed = |(key, value): (&FrontendKey, &Frontend)| (value.service() == 0).then_some(*key);
        for key in self.frontends.iter().filter_map(closed).collect::<Vec<_>>() {
            if !self.closed.contains_key(key.addr()) {
                self.plan_frontend_removal(plan, &key, 0, now);
            }
        }
        self.filter.linger_unknown(now);
    }

    /// Node ports have a filter bit on each address of the node, so these bits come before the addresses. Only what differs is looked
    /// at: addresses and node ports may be many.
    fn plan_addresses(&mut self, plan: &mut Plan, wanted: &BTreeMap<Addr, NodeAddress>, now: Instant) {
        let old = std::mem::replace(&mut self.addresses, wanted.clone());
        let node_ports: Vec<_> =
            self.frontends.keys().filter(|key| key.addr().is_unspecified()).copied().collect();
        let differing = |these: &BTreeMap<Addr, NodeAddress>, others: &BTreeMap<Addr, NodeAddress>| {
            let differing = these.iter().filter(|(addr, value)| others.get(addr) != Some(value));
            differing.map(|(addr, value)| (*addr, *value)).collect::<BTreeMap<_, _>>()
        };
        let (come, go) = (differing(wanted, &old), differing(&old, wanted));
        plan.addresses.extend(&come);
        plan.removed_addresses.extend(old.keys().filter(|addr| !wanted.contains_key(addr)));
        // Bits are added before any is removed, so that none that stays lingers.
        come.keys().for_each(|addr| self.filter.add(FilterBit::node_address(addr)));
        for key in &node_ports {
            bits_of(key, &come).for_each(|bit| self.filter.add(bit));
        }
        go.keys().for_each(|addr| self.filter.remove(FilterBit::node_address(addr), now));
        for key in &node_ports {
            bits_of(key, &go).for_each(|bit| self.filter.remove(bit, now));
        }
    }
}

impl PortMirror {
    fn backend(&self, endpoint: &Endpoint) -> Option<&BackendMirror> {
        let at = self.backends.partition_point(|backend| backend.endpoint < *endpoint);
        self.backends.get(at).filter(|backend| backend.endpoint == *endpoint)
    }
}

fn full<T: tables::Table>(capacity: usize) -> MapError {
    MapError::Full { name: T::NAME, capacity }
}

/// What the slots of a set are to hold. Its endpoints are all among the backends. Where all have the weight 0, all have one (L4).
fn run_of(set: &BTreeSet<Endpoint>, draft: &Draft<'_>) -> Box<[u32]> {
    let backend = |endpoint: &Endpoint| {
        let at = draft.backends.binary_search_by_key(endpoint, |backend| backend.endpoint).ok()?;
        draft.backends.get(at)
    };
    let member = |b: &BackendMirror| Member { endpoint: b.endpoint, id: b.id, weight: b.weight.max(1) };
    let members: Vec<_> = set.iter().filter_map(backend).map(member).collect();
    run(draft.tables.algorithm, &members, draft.tables.seed, draft.tables.order)
}

pub(super) fn backend_bit(endpoint: &Endpoint, proto: u8) -> FilterBit {
    FilterBit::backend(&endpoint.addr, endpoint.port, proto)
}

/// The filter bits of a frontend: that of its address; of a node port, one for each address of the node that answers
/// node ports.
pub(super) fn bits_of<'a>(
    key: &'a FrontendKey,
    addresses: &'a BTreeMap<Addr, NodeAddress>,
) -> impl Iterator<Item = FilterBit> + 'a {
    let node_port = key.addr().is_unspecified();
    let own = (!node_port).then(|| FilterBit::service_address(key.addr()));
    let on_node = addresses
        .iter()
        .filter(move |(addr, value)| {
            node_port && value.has(NodeAddress::NODE_PORTS) && addr.is_v4() == key.addr().is_v4()
        })
        .map(|(addr, _)| FilterBit::node_port(addr, key.port(), key.proto()));
    own.into_iter().chain(on_node)
}
