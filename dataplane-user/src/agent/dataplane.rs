//! One node's dataplane: objects in, tables out, whatever holds the tables.
//!
//! It keeps what could not be written yet and tries it again; nothing that an object says can end it (Z5).

use super::masquerade::Netfilter;
use super::settings::Settings;
use crate::compile::{
    self, Compiler, Complaint, Context, HealthCheck, NodePortAddresses, NodeTables, OwnAddresses,
    ServiceTables, Sources,
};
use crate::kernel::maps::MapError;
use crate::model::{AddressType, Change, Dirty, Kind, Object, ObjectName, Store};
use crate::status::endpoints::ServiceEndpoints;
use crate::sync::{Maps, Mirror, Outcome};
use dataplane_common::node::{Node, NodeAddress};
use dataplane_common::tables;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::{Instant, SystemTime};

/// The kinds that must have been listed before the first tables are written.
const KINDS: [Kind; 4] = crate::watch::KINDS;
/// Of how many changes of one Service's endpoints the latency is told that are written at once; a kernel that refuses for long
/// may let more come together.
const TRIGGERS: usize = 64;

/// When endpoints of a Service changed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trigger {
    /// Of which family they are.
    pub(super) ipv6: bool,
    /// The moment.
    pub(super) time: SystemTime,
}

/// What a flush came to.
#[derive(Debug, Default)]
pub(super) struct Flushed {
    /// What `sync` says.
    pub(super) outcome: Outcome,
    /// When the endpoints of Services changed that are in the kernel now.
    pub(super) triggers: Vec<Trigger>,
    /// The health checks of the Services that may have another now (S4).
    pub(super) health_checks: Vec<(ObjectName, Option<HealthCheck>)>,
    /// If it may differ now: where node ports answer, `None` for every address (P17).
    pub(super) node_port_addresses: Option<Option<BTreeSet<IpAddr>>>,
}

/// What dirty objects were compiled to; the node's tables only if they may differ.
struct Compilation {
    services: BTreeMap<ObjectName, compile::Compiled>,
    health_checks: Vec<(ObjectName, Option<HealthCheck>)>,
    node: Option<(NodeTables, Vec<Complaint>)>,
}

/// The objects, the compiler and the mirror of the tables in `maps`.
#[derive(Debug)]
pub(super) struct Dataplane<M> {
    settings: Settings,
    maps: M,
    store: Store,
    compiler: Compiler,
    mirror: Mirror,
    addresses: OwnAddresses,
    /// How many of them there is room for.
    address_room: usize,
    /// The primary addresses that Services were compiled with.
    primary: [Option<IpAddr>; 2],
    /// The kinds of which the source has told everything.
    listed: BTreeSet<Kind>,
    /// A snapshot stands in for those that are not listed yet.
    snapshot: bool,
    dirty: Dirty,
    complete: bool,
    /// When endpoints changed that are not in the kernel yet, by Service.
    triggers: BTreeMap<ObjectName, Vec<Trigger>>,
    /// What objects get wrong now, by Service; without a name, the node.
    complaints: BTreeMap<Option<ObjectName>, Vec<Complaint>>,
    /// What of it nobody was told yet.
    news: Vec<Complaint>,
}

impl<M: Maps> Dataplane<M> {
    /// Reads what `maps` hold. `addresses` are those on the node's interfaces.
    ///
    /// # Errors
    /// If a map cannot be read.
    pub(super) fn open(settings: Settings, maps: M, addresses: OwnAddresses) -> Result<Self, MapError> {
        let mirror = Mirror::open(&maps, Instant::now())?;
        let address_room = maps.capacity::<tables::NodeAddrs>()?;
        Ok(Self {
            store: Store::new(settings.node_name.clone()),
            settings,
            maps,
            compiler: Compiler::default(),
            mirror,
            addresses,
            address_room,
            primary: [None; 2],
            listed: BTreeSet::new(),
            snapshot: false,
            dirty: Dirty { node: true, ..Dirty::default() },
            complete: false,
            triggers: BTreeMap::new(),
            complaints: BTreeMap::new(),
            news: Vec::new(),
        })
    }

    /// The maps.
    #[cfg(test)]
    pub(super) fn maps(&self) -> &M {
        &self.maps
    }

    /// What the kernel holds.
    pub(super) fn mirror(&mut self) -> (&mut Mirror, &M) {
        (&mut self.mirror, &self.maps)
    }

    /// The objects.
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// The endpoints of a Service, and why each takes part or not; none if there is no such Service.
    pub(super) fn explain(&self, service: &ObjectName) -> Option<ServiceEndpoints> {
        let context = self.context();
        let ports = compile::explain(self.store.service(service)?, self.store.slices(service), &context);
        Some(ServiceEndpoints { zone: context.zone.as_deref().map(str::to_owned), ports })
    }

    /// Whether a complete snapshot was written.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether all was told that the first tables need.
    pub(super) fn is_informed(&self) -> bool {
        (self.snapshot || self.is_current()) && (!self.settings.needs_node || self.store.own_node().is_some())
    }

    /// Whether the source has told everything.
    pub(super) fn is_current(&self) -> bool {
        KINDS.iter().all(|kind| self.listed.contains(kind))
    }

    /// Whether there is something of a snapshot that the source may know better.
    pub(super) fn is_outdated(&self) -> bool {
        self.snapshot && !self.is_current()
    }

    /// Takes in the objects of a snapshot, but for kinds of which the source has told everything: they are as if they had
    /// been listed, until the source's own list says what of them is gone.
    pub(super) fn take_snapshot(&mut self, objects: Vec<Object>) {
        let mut kinds: BTreeMap<Kind, Vec<Object>> = BTreeMap::new();
        for object in objects {
            kinds.entry(object.reference().kind).or_default().push(object);
        }
        for (kind, objects) in kinds {
            if !self.listed.contains(&kind) {
                self.dirty.merge(self.store.apply(Change::replaced(kind, objects)));
            }
        }
        self.snapshot = true;
    }

    /// Whether tables can be written: once they were, Services are followed whatever becomes of the Node.
    pub(super) fn is_writable(&self) -> bool {
        self.complete || self.is_informed()
    }

    /// Whether something waits to be written.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// What objects get wrong and did not a moment ago; each is told once.
    pub(super) fn new_complaints(&mut self) -> Vec<Complaint> {
        std::mem::take(&mut self.news)
    }

    /// All that objects get wrong now.
    pub(super) fn complaints(&self) -> impl Iterator<Item = &Complaint> {
        self.complaints.values().flatten()
    }

    /// Takes in a change; writes nothing.
    pub(super) fn take_in(&mut self, change: Change) {
        if let Change::Replaced { kind, .. } = &change {
            self.listed.insert(*kind);
        }
        let trigger = if self.complete { trigger(&change) } else { None };
        let dirty = self.store.apply(change);
        // As kube-proxy: a slice that is as it was, or of no Service, is no change.
        if let Some((service, trigger)) = trigger.filter(|(service, _)| dirty.services.contains(service)) {
            let triggers = self.triggers.entry(service).or_default();
            if triggers.len() < TRIGGERS {
                triggers.push(trigger);
            }
        }
        self.dirty.merge(dirty);
    }

    /// The addresses on the node's interfaces are these now.
    pub(super) fn set_addresses(&mut self, addresses: OwnAddresses) {
        if self.addresses == addresses {
            return;
        }
        let (old, new) = (self.addresses.addrs(), addresses.addrs());
        let changed = old.symmetric_difference(&new).copied().collect();
        self.dirty.services.append(&mut self.store.services_with_address(&changed));
        self.dirty.node = true;
        self.addresses = addresses;
    }

    /// The service ranges, each with the node's primary address of its family, from which the node itself calls Services; none
    /// before the first tables were written.
    pub(super) fn service_sources(&self) -> BTreeSet<(IpNet, IpAddr)> {
        let [v4, v6] = self.primary;
        let source = |range: &IpNet| if range.addr().is_ipv4() { v4 } else { v6 };
        let ranges = self.settings.node.service_ranges.iter().map(IpNet::trunc);
        ranges.filter_map(|range| Some((range, source(&range)?))).collect()
    }

    /// Whether TCP connections are left to another proxy (C5).
    pub(super) fn takes_over(&self) -> bool {
        self.settings.node.flags & Node::TAKES_OVER != 0
    }

    /// The source ports that the programs translate to (P12).
    pub(super) fn translated_ports(&self) -> Vec<RangeInclusive<u16>> {
        self.settings.node.snat_ports.clone()
    }

    /// No TCP connection is left to another proxy any more (C5).
    pub(super) fn end_take_over(&mut self) {
        self.settings.node.flags &= !Node::TAKES_OVER;
        self.dirty.node = true;
    }

    /// Who may call from outside.
    pub(super) fn set_sources(&mut self, sources: Sources) {
        self.dirty.node |= self.settings.node.sources != sources;
        self.settings.node.sources = sources;
    }

    /// The node's netfilter does this now.
    pub(super) fn set_netfilter(&mut self, netfilter: Netfilter) {
        let node = &mut self.settings.node;
        let flags = if netfilter.before_tc { Node::BRIDGE_NETFILTER } else { 0 };
        let flags = node.flags & !Node::BRIDGE_NETFILTER | flags;
        let Netfilter { mark, connection_mark, .. } = netfilter;
        let before = (node.masquerade_mark, node.connection_mark, node.flags);
        self.dirty.node |= before != (mark, connection_mark, flags);
        (node.masquerade_mark, node.connection_mark, node.flags) = (mark, connection_mark, flags);
    }

    /// Compiles and writes what waits, as soon as all was told that it needs. What fails waits for the next flush.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(super) fn flush(&mut self, now: Instant) -> Result<Option<Flushed>, MapError> {
        if !self.is_writable() || (self.complete && self.dirty.is_empty()) {
            return Ok(None);
        }
        let mut dirty = std::mem::take(&mut self.dirty);
        let result = self.write(&mut dirty, now);
        match result {
            Ok(flushed) => {
                self.complete = true;
                Ok(Some(flushed))
            }
            Err(error) => {
                self.dirty.merge(dirty);
                Err(error)
            }
        }
    }

    /// All tables as text: the node's, then each Service's by name.
    pub(super) fn text(&mut self) -> String {
        let context = self.context();
        let (node, _) = self.compile_node(&context);
        let update = self.compiler.update(&self.store, &self.store.service_names(), &context);
        let mut text = node.to_string();
        for (name, compiled) in update.services {
            let _ = write!(text, "Service {name}\n{}", compiled.tables);
        }
        text
    }

    fn context(&self) -> Context {
        let (proxy_name, cidrs) = (self.settings.proxy_name.clone(), &self.settings.cluster_cidrs);
        let context = Context::new(&self.store, proxy_name, cidrs, &self.addresses);
        Context { external_ips: self.settings.external_ips, defaults: self.settings.defaults, ..context }
    }

    /// Adds to what is dirty what it touches elsewhere: after a failure all of it is to be written again.
    fn write(&mut self, dirty: &mut Dirty, now: Instant) -> Result<Flushed, MapError> {
        if !self.complete {
            return self.write_all(now);
        }
        let Compilation { services, health_checks, node } = self.compile(dirty);
        dirty.services.extend(services.keys().cloned());
        dirty.node |= node.is_some();
        let mut flushed = Flushed { health_checks, ..Flushed::default() };
        if let Some((tables, complaints)) = node {
            self.complain(None, complaints);
            flushed.node_port_addresses = Some(self.node_port_addresses(&tables));
            flushed.outcome = self.mirror.set_node(&self.maps, &tables, now)?;
        }
        let names: Vec<_> = services.keys().cloned().collect();
        let mut tables: BTreeMap<ObjectName, ServiceTables> = BTreeMap::new();
        for (name, compiled) in services {
            self.complain(Some(name.clone()), compiled.complaints);
            tables.insert(name, compiled.tables);
        }
        let wanted =
            names.iter().map(|name| (name, tables.get(name).filter(|it| **it != ServiceTables::default())));
        let outcome = self.mirror.change(&self.maps, wanted, now)?;
        for name in &names {
            // A Service without a table is not ours, and one that found no room is not in the kernel.
            let is_in = tables.get(name).is_some_and(|tables| *tables != ServiceTables::default());
            let triggers = self.triggers.remove(name).unwrap_or_default();
            if is_in && outcome.refused.iter().all(|refused| refused.service != *name) {
                flushed.triggers.extend(triggers);
            }
        }
        flushed.outcome = add(flushed.outcome, outcome);
        Ok(flushed)
    }

    /// Writes all there is, for the first time. The tables of all Services at once would take several times the memory of all
    /// that stays: each is compiled as it is asked for.
    fn write_all(&mut self, now: Instant) -> Result<Flushed, MapError> {
        let context = self.context();
        self.primary = context.primary;
        self.compiler.claim_all(&self.store, &context);
        let (node, complaints) = self.compile_node(&context);
        self.complain(None, complaints);
        let node_port_addresses = Some(self.node_port_addresses(&node));
        let first = self.mirror.set_node(&self.maps, &node, now)?;
        let names = self.store.service_names();
        let mut complaints = BTreeMap::new();
        let all = names.iter().filter_map(|name| {
            let compiled = self.compiler.compile(&self.store, name, &context);
            if !compiled.complaints.is_empty() {
                complaints.insert(Some(name.clone()), compiled.complaints);
            }
            (compiled.tables != ServiceTables::default()).then_some((name, compiled.tables))
        });
        let outcome = self.mirror.replace(&self.maps, all, now)?;
        self.complaints.retain(|about, _| about.is_none() || complaints.contains_key(about));
        for (about, complaints) in complaints {
            self.complain(about, complaints);
        }
        let health_checks = self.health_checks(&names, &context);
        let outcome = add(first, outcome);
        Ok(Flushed { outcome, health_checks, node_port_addresses, ..Flushed::default() })
    }

    fn compile_node(&mut self, context: &Context) -> (NodeTables, Vec<Complaint>) {
        if self.settings.service_cidrs.is_empty() {
            self.settings.node.service_ranges = self.store.service_ranges();
        }
        let ips = self.compiler.load_balancer_ips(&context.node_addresses);
        let own_node = self.store.own_node();
        let (addresses, left_out) = self.addresses.within(self.address_room, own_node);
        let (tables, mut complaints) = compile::node(&self.settings.node, own_node, &addresses, &ips);
        complaints.extend(left_out);
        (tables, complaints)
    }

    fn health_checks(
        &self,
        names: &BTreeSet<ObjectName>,
        context: &Context,
    ) -> Vec<(ObjectName, Option<HealthCheck>)> {
        let check = |name: &ObjectName| {
            let service = self.store.service(name)?;
            compile::health_check(service, self.store.slices(name), context)
        };
        names.iter().map(|name| (name.clone(), check(name))).collect()
    }

    /// What is dirty, compiled.
    fn compile(&mut self, dirty: &Dirty) -> Compilation {
        let context = self.context();
        let mut services = dirty.services.clone();
        if std::mem::replace(&mut self.primary, context.primary) != context.primary {
            services.append(&mut self.store.services_with_source_ranges());
        }
        let update = self.compiler.update(&self.store, &services, &context);
        let node = (dirty.node || update.node).then(|| self.compile_node(&context));
        let health_checks = self.health_checks(&services, &context);
        Compilation { services: update.services, health_checks, node }
    }

    fn node_port_addresses(&self, tables: &NodeTables) -> Option<BTreeSet<IpAddr>> {
        if self.settings.node.node_port_addresses == NodePortAddresses::All {
            return None;
        }
        let answering = tables.addresses.iter().filter(|(_, value)| value.has(NodeAddress::NODE_PORTS));
        // Nobody can listen at a link-local address without naming its interface.
        let is_link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        Some(answering.map(|(addr, _)| addr.to_ip()).filter(|ip| !is_link_local(ip)).collect())
    }

    /// Replaces what is wrong with one Service.
    fn complain(&mut self, about: Option<ObjectName>, complaints: Vec<Complaint>) {
        let old = match complaints.is_empty() {
            true => self.complaints.remove(&about),
            false => self.complaints.insert(about, complaints.clone()),
        };
        let old = old.unwrap_or_default();
        self.news.extend(complaints.into_iter().filter(|complaint| !old.contains(complaint)));
    }
}

/// The Service whose endpoints changed, and when, as far as the change says so.
fn trigger(change: &Change) -> Option<(ObjectName, Trigger)> {
    let Change::Applied(Object::EndpointSlice(slice)) = change else { return None };
    let time = slice.trigger_time.as_deref()?.parse::<jiff::Timestamp>().ok()?.into();
    let ipv6 = slice.address_type == AddressType::Ipv6;
    Some((slice.service.clone(), Trigger { ipv6, time }))
}

/// Both outcomes as one.
pub(super) fn add(mut first: Outcome, second: Outcome) -> Outcome {
    first.ops += second.ops;
    first.calls += second.calls;
    first.refused.extend(second.refused);
    first.names_changed |= second.names_changed;
    first.repaired += second.repaired;
    first
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Cli, Command};
    use crate::sync::MemoryMaps;
    use crate::sync::checks::CheckedMaps;
    use crate::watch::manifests;
    use clap::Parser as _;
    use dataplane_common::frontend::FrontendKey;
    use dataplane_common::{Addr, Port};
    use std::sync::Arc;

    const WEB: &str = "
apiVersion: v1
kind: Service
metadata: {namespace: default, name: web}
spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: default, name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.0.0.1]}, {addresses: [10.0.0.2]}]
";

    fn dataplane<M: Maps>(maps: M) -> Dataplane<M> {
        let cli = Cli::try_parse_from(["portolan", "agent", "--node-name", "n", "--manifests", "d"]).unwrap();
        let Command::Agent(args) = cli.command else { panic!("not the agent") };
        Dataplane::open(Settings::new(&args, 1, true), maps, addresses(&["192.0.2.1"])).unwrap()
    }

    fn addresses(own: &[&str]) -> OwnAddresses {
        own.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<IpAddr>>().into()
    }

    fn objects(text: &str) -> Vec<Object> {
        let (objects, errors) = manifests::parse(text, "test.yaml");
        assert!(errors.is_empty(), "{errors:?}");
        objects
    }

    fn list<M: Maps>(dataplane: &mut Dataplane<M>, kinds: &[Kind], text: &str) {
        for kind in kinds {
            let of_kind =
                objects(text).into_iter().filter(|object| object.reference().kind == *kind).collect();
            dataplane.take_in(Change::replaced(*kind, of_kind));
        }
    }

    fn frontends(dataplane: &Dataplane<MemoryMaps>) -> usize {
        let mut count = 0;
        dataplane.maps().visit::<tables::Frontends>(|_, _| count += 1).unwrap();
        count
    }

    #[test]
    fn nothing_is_written_before_every_kind_was_listed() {
        let mut dataplane = dataplane(MemoryMaps::default());
        list(&mut dataplane, &[Kind::Service, Kind::EndpointSlice, Kind::Node], WEB);
        assert!(dataplane.flush(Instant::now()).unwrap().is_none());
        assert_eq!(frontends(&dataplane), 0);
        list(&mut dataplane, &[Kind::ServiceCidr], "");
        assert!(dataplane.flush(Instant::now()).unwrap().is_some());
        // The port, and the refusal of all other ports (P13).
        assert_eq!(frontends(&dataplane), 2);
        assert!(dataplane.is_complete());
    }

    /// H3
    #[test]
    fn latency_is_told_of_endpoints_that_changed_and_are_ours() {
        let mut dataplane = dataplane(MemoryMaps::default());
        let headless = WEB.replace("name: web", "name: none").replace("10.96.0.10", "None");
        let headless = headless.replace("service-name: web", "service-name: none");
        list(&mut dataplane, &KINDS, &format!("{WEB}---{headless}"));
        dataplane.flush(Instant::now()).unwrap();
        let told = |dataplane: &mut Dataplane<MemoryMaps>, text: &str, second: u32| {
            let annotated = format!(
                "annotations: {{endpoints.kubernetes.io/last-change-trigger-time: \"2026-01-01T00:00:0{second}Z\"}}, labels"
            );
            for object in objects(&text.replace("labels", &annotated)) {
                dataplane.take_in(Change::Applied(object));
            }
            dataplane.flush(Instant::now()).unwrap().map_or(0, |flushed| flushed.triggers.len())
        };
        assert_eq!(told(&mut dataplane, WEB, 1), 0, "all is as it was");
        let changed = |text: &str| text.replace("10.0.0.2", "10.0.0.3");
        assert_eq!(told(&mut dataplane, &changed(WEB), 2), 1);
        assert_eq!(told(&mut dataplane, &changed(WEB), 3), 0, "only the time differs");
        assert_eq!(told(&mut dataplane, &changed(&headless), 4), 0, "it has no dataplane");
        let strange = WEB
            .replace("service-name: web", "service-name: strange")
            .replace("name: web-1", "name: strange-1");
        let slice = strange.split_once("---").unwrap().1;
        assert_eq!(told(&mut dataplane, slice, 5), 0, "nobody knows the Service");
        assert!(dataplane.triggers.is_empty());
    }

    #[test]
    fn a_service_that_goes_leaves_nothing() {
        let mut dataplane = dataplane(MemoryMaps::default());
        list(&mut dataplane, &KINDS, WEB);
        dataplane.flush(Instant::now()).unwrap();
        list(&mut dataplane, &[Kind::Service], "");
        assert!(dataplane.is_dirty());
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(frontends(&dataplane), 0);
        assert_eq!(dataplane.mirror().0.sizes(), (0, 0, 0));
    }

    /// S4
    #[test]
    fn health_checks_follow_services_and_endpoints() {
        let mut dataplane = dataplane(MemoryMaps::default());
        let local = "externalTrafficPolicy: Local, healthCheckNodePort: 30000, clusterIP";
        let web = WEB.replace("clusterIP", &format!("type: LoadBalancer, {local}"));
        let web = web.replace("{addresses: [10.0.0.1]}", "{addresses: [10.0.0.1], nodeName: n}");
        list(&mut dataplane, &KINDS, &web);
        let flushed = dataplane.flush(Instant::now()).unwrap().unwrap();
        let check = flushed.health_checks[0].1.clone().unwrap();
        assert_eq!((check.port, check.endpoints), (30_000, [Some(1), None]));
        assert_eq!(flushed.node_port_addresses, Some(None));
        list(&mut dataplane, &[Kind::EndpointSlice], "");
        let flushed = dataplane.flush(Instant::now()).unwrap().unwrap();
        assert_eq!(flushed.health_checks[0].1.as_ref().unwrap().endpoints, [Some(0), None]);
        list(&mut dataplane, &[Kind::Service], "");
        assert_eq!(dataplane.flush(Instant::now()).unwrap().unwrap().health_checks[0].1, None);
    }

    /// H3, P2, P3
    #[test]
    fn services_without_local_endpoints_are_counted_by_policy() {
        let mut dataplane = dataplane(MemoryMaps::default());
        list(&mut dataplane, &KINDS, &WEB.replace("clusterIP", "internalTrafficPolicy: Local, clusterIP"));
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(dataplane.mirror().0.without_local_endpoints(), [[1, 0], [0, 0]]);
        let here = WEB.replace("{addresses: [10.0.0.1]}", "{addresses: [10.0.0.1], nodeName: n}");
        list(&mut dataplane, &[Kind::EndpointSlice], &here);
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(dataplane.mirror().0.without_local_endpoints(), [[0; 2]; 2]);
    }

    /// Z5
    #[test]
    fn a_complaint_is_told_once_and_goes_with_its_cause() {
        let mut dataplane = dataplane(MemoryMaps::default());
        let bad = WEB.replace("10.0.0.2", "127.0.0.1");
        list(&mut dataplane, &KINDS, &bad);
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(dataplane.new_complaints().len(), 1);
        list(&mut dataplane, &[Kind::Service], &bad.replace("port: 80}", "port: 81}"));
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(dataplane.new_complaints(), []);
        assert_eq!(dataplane.complaints().count(), 1);
        list(&mut dataplane, &[Kind::EndpointSlice], WEB);
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(dataplane.complaints().count(), 0);
    }

    #[test]
    fn a_full_table_costs_the_service_that_found_no_room_only() {
        let mut dataplane = dataplane(MemoryMaps::with_capacities([("frontends", 3)]));
        let second = WEB.replace("name: web", "name: two").replace("10.96.0.10", "10.96.0.11");
        let second = second.replace("service-name: web", "service-name: two");
        list(&mut dataplane, &KINDS, &format!("{WEB}---{second}"));
        let flushed = dataplane.flush(Instant::now()).unwrap().unwrap();
        assert_eq!(flushed.outcome.refused.len(), 1);
        assert!(flushed.outcome.refused[0].error.to_string().contains("--map-size frontends="));
        assert_eq!(frontends(&dataplane), 2);
    }

    #[test]
    fn an_address_of_the_node_is_followed() {
        let mut dataplane = dataplane(MemoryMaps::default());
        list(&mut dataplane, &KINDS, WEB);
        dataplane.flush(Instant::now()).unwrap();
        dataplane.set_addresses(addresses(&["192.0.2.1", "10.96.0.10"]));
        dataplane.flush(Instant::now()).unwrap();
        // P13: a ClusterIP that is on an interface of this node belongs to the node.
        assert_eq!(frontends(&dataplane), 0);
        assert_eq!(own_addresses(&dataplane).len(), 2);
        dataplane.set_addresses(addresses(&["192.0.2.1"]));
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(frontends(&dataplane), 2);
    }

    fn own_addresses(dataplane: &Dataplane<MemoryMaps>) -> BTreeMap<IpAddr, NodeAddress> {
        let mut own = BTreeMap::new();
        dataplane
            .maps()
            .visit::<tables::NodeAddrs>(|addr, value| {
                own.insert(addr.to_ip(), value);
            })
            .unwrap();
        own
    }

    /// P13, P16
    #[test]
    fn what_another_proxy_left_behind_is_served_and_no_address_of_the_node() {
        let mut dataplane = dataplane(MemoryMaps::default());
        list(&mut dataplane, &KINDS, WEB);
        let left_over = vec!["10.96.0.10".parse().unwrap()];
        dataplane.set_addresses(OwnAddresses { left_over, ..addresses(&["192.0.2.1"]) });
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(frontends(&dataplane), 2);
        let own = own_addresses(&dataplane);
        assert!(own[&"192.0.2.1".parse::<IpAddr>().unwrap()].has(NodeAddress::NODE_PORTS));
        assert!(!own[&"10.96.0.10".parse::<IpAddr>().unwrap()].has(NodeAddress::NODE_PORTS));
    }

    /// Z5
    #[test]
    fn more_addresses_than_there_is_room_for_cost_no_service_anything() {
        let mut dataplane = dataplane(MemoryMaps::with_capacities([("node_addrs", 2)]));
        dataplane.set_addresses(addresses(&["192.0.2.1", "192.0.2.2", "192.0.2.3"]));
        list(&mut dataplane, &KINDS, WEB);
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(frontends(&dataplane), 2);
        let known =
            |dataplane: &_| own_addresses(dataplane).into_keys().map(|ip| ip.to_string()).collect::<Vec<_>>();
        assert_eq!(known(&dataplane), ["192.0.2.1", "192.0.2.2"]);
        let complaints = dataplane.new_complaints();
        assert_eq!(complaints.len(), 1);
        assert!(complaints[0].text.contains("--map-size node_addrs=3"), "{}", complaints[0]);
        // All of them change at once, and there is no room for both.
        dataplane.set_addresses(addresses(&["192.0.2.8", "192.0.2.9"]));
        list(&mut dataplane, &[Kind::EndpointSlice], "");
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(known(&dataplane), ["192.0.2.8", "192.0.2.9"]);
        assert_eq!(dataplane.complaints().count(), 0);
    }

    /// Z1: the kernel refuses while an address passes from one Service to another.
    #[test]
    fn a_rival_gets_what_became_free_while_the_kernel_refused() {
        let maps = Arc::new(CheckedMaps::new(&[]));
        let mut dataplane = dataplane(maps.clone());
        let named = |name: &str, ip: &str, rest: &str| {
            WEB.replace("name: web", &format!("name: {name}")).replace("10.96.0.10", &format!("{ip}{rest}"))
        };
        let shared = ", externalIPs: [198.51.100.1]";
        let other = named("a", "10.96.0.11", "");
        let rivals = [named("b", "10.96.0.12", shared), named("c", "10.96.0.13", shared)];
        list(&mut dataplane, &KINDS, &[&other[..], &rivals[0], &rivals[1]].join("---"));
        dataplane.flush(Instant::now()).unwrap();
        let external = FrontendKey::new(Addr::from_v4([198, 51, 100, 1]), Port::new(80), 6);
        assert!(maps.get::<tables::Frontends>(&external).unwrap().is_some());
        maps.fail_after(Some(0));
        list(&mut dataplane, &[Kind::Service], &[&rivals[0][..], &rivals[1]].join("---"));
        dataplane.flush(Instant::now()).unwrap_err();
        list(&mut dataplane, &[Kind::Service], &rivals[1]);
        dataplane.flush(Instant::now()).unwrap_err();
        maps.fail_after(None);
        dataplane.flush(Instant::now()).unwrap();
        assert!(maps.get::<tables::Frontends>(&external).unwrap().is_some(), "it is c's now");
    }

    /// C3: what was served before is served until it is known to be gone.
    #[test]
    fn a_snapshot_is_served_until_the_source_tells_what_is_gone() {
        let old = WEB.replace("name: web", "name: old").replace("10.96.0.10", "10.96.0.11");
        let mut dataplane = dataplane(MemoryMaps::default());
        dataplane.take_snapshot(objects(&format!("{WEB}---{old}")));
        assert!(dataplane.is_outdated() && !dataplane.is_current());
        dataplane.flush(Instant::now()).unwrap().unwrap();
        assert!(dataplane.is_complete());
        assert_eq!(frontends(&dataplane), 4);
        list(&mut dataplane, &[Kind::Node, Kind::ServiceCidr, Kind::EndpointSlice], WEB);
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(frontends(&dataplane), 4, "nobody said yet that a Service is gone");
        assert!(dataplane.is_outdated());
        list(&mut dataplane, &[Kind::Service], WEB);
        assert!(!dataplane.is_outdated() && dataplane.is_current());
        dataplane.flush(Instant::now()).unwrap();
        assert_eq!(frontends(&dataplane), 2);
    }

    #[test]
    fn a_snapshot_changes_nothing_of_what_the_source_told() {
        let mut dataplane = dataplane(MemoryMaps::default());
        list(&mut dataplane, &[Kind::Service], WEB);
        let old = WEB.replace("name: web", "name: old").replace("10.96.0.10", "10.96.0.11");
        dataplane.take_snapshot(objects(&format!("{WEB}---{old}")));
        dataplane.flush(Instant::now()).unwrap().unwrap();
        assert_eq!(frontends(&dataplane), 2, "the Service of the snapshot is gone");
        assert_eq!(dataplane.mirror().0.sizes().1, 2, "its endpoints are of use");
    }

    /// H1: Services are followed although the Node is gone.
    #[test]
    fn services_are_followed_whatever_becomes_of_the_node() {
        let cli =
            Cli::try_parse_from(["portolan", "agent", "--node-name", "n", "--kubeconfig", "k"]).unwrap();
        let Command::Agent(args) = cli.command else { panic!("not the agent") };
        let mut dataplane =
            Dataplane::open(Settings::new(&args, 1, true), MemoryMaps::default(), OwnAddresses::default())
                .unwrap();
        list(&mut dataplane, &KINDS, WEB);
        assert!(dataplane.flush(Instant::now()).unwrap().is_none(), "the Node is not known");
        let node = "---\napiVersion: v1\nkind: Node\nmetadata: {name: n}\n";
        list(&mut dataplane, &KINDS, &format!("{WEB}{node}"));
        dataplane.flush(Instant::now()).unwrap().unwrap();
        list(&mut dataplane, &[Kind::Node, Kind::Service], "");
        dataplane.flush(Instant::now()).unwrap().unwrap();
        assert_eq!(frontends(&dataplane), 0);
    }
}
