//! The objects as they are now: what the watches told, each kept once.
//!
//! It answers which Services and whether the node may need new tables; it never compiles, and never forgets an object
//! because another one is missing or broken.

use super::{Change, EndpointSlice, Kind, Node, Object, ObjectName, Reference, Service};
use dataplane_common::Addr;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// What a change may have made stale.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// Services whose tables may differ now, deleted ones included.
    pub services: BTreeSet<ObjectName>,
    /// Whether the node's tables, or what the compiler must know of the node, may differ now.
    pub node: bool,
}

impl Dirty {
    /// Whether nothing can have become stale.
    pub fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.node
    }

    /// Takes over what `other` names.
    pub fn merge(&mut self, mut other: Self) {
        self.services.append(&mut other.services);
        self.node |= other.node;
    }
}

/// All objects that the watches told of.
#[derive(Debug)]
pub struct Store {
    node_name: Arc<str>,
    /// Behind pointers, because a hash table is half empty at its worst, and because they are shared ([`Shared`]).
    services: HashMap<ObjectName, Arc<Service>>,
    /// By Service, sorted by name; also of Services that do not exist (yet).
    slices: HashMap<ObjectName, Arc<Vec<EndpointSlice>>>,
    /// The name of each slice's Service, to find it when the label changes or the slice is deleted.
    slice_owners: HashMap<ObjectName, Arc<str>>,
    nodes: BTreeMap<Arc<str>, Node>,
    service_cidrs: BTreeMap<Arc<str>, Vec<IpNet>>,
    /// Goes up whenever an object changes, comes or goes.
    revision: u64,
}

/// All objects of one moment, shared with the store: keeping them costs a pointer each, and what the store changes meanwhile
/// is copied.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    /// The Services, in no order.
    pub services: Vec<Arc<Service>>,
    /// The slices of each Service, in no order.
    pub slices: Vec<Arc<Vec<EndpointSlice>>>,
    /// Nodes and ServiceCIDRs.
    pub others: Vec<Object>,
}

impl Store {
    /// An empty store of the node with this name.
    pub fn new(node_name: impl Into<Arc<str>>) -> Self {
        Self {
            node_name: node_name.into(),
            services: HashMap::new(),
            slices: HashMap::new(),
            slice_owners: HashMap::new(),
            nodes: BTreeMap::new(),
            service_cidrs: BTreeMap::new(),
            revision: 0,
        }
    }

    /// Takes a change in and says what it may have made stale. A change that repeats what is known makes nothing stale.
    pub fn apply(&mut self, change: Change) -> Dirty {
        match change {
            Change::Applied(object) => self.insert(object),
            Change::Deleted(reference) => self.remove(&reference),
            Change::Replaced { kind, objects, unreadable } => self.replace(kind, objects, unreadable),
            // What was known of it stays (Z5).
            Change::Unreadable { .. } => Dirty::default(),
        }
    }

    /// All objects as they are now.
    pub fn share(&self) -> Shared {
        let nodes = self.nodes.values().cloned().map(Object::Node);
        let cidrs = self.service_cidrs.iter();
        let cidrs =
            cidrs.map(|(name, cidrs)| Object::ServiceCidr { name: name.clone(), cidrs: cidrs.clone() });
        Shared {
            services: self.services.values().cloned().collect(),
            slices: self.slices.values().cloned().collect(),
            others: nodes.chain(cidrs).collect(),
        }
    }

    /// A number that is another one whenever an object changed.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Name of the node this agent runs on.
    pub fn node_name(&self) -> &Arc<str> {
        &self.node_name
    }

    /// The Service of this name.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name).map(Arc::as_ref)
    }

    /// All Services, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values().map(Arc::as_ref)
    }

    /// The slices of a Service, sorted by name.
    pub fn slices(&self, service: &ObjectName) -> &[EndpointSlice] {
        self.slices.get(service).map_or(&[], |slices| slices.as_slice())
    }

    /// The Node this agent runs on, once it was told.
    pub fn own_node(&self) -> Option<&Node> {
        self.nodes.get(&self.node_name)
    }

    /// All Nodes, sorted by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// The ranges of all ServiceCIDR objects, sorted, each once.
    pub fn service_ranges(&self) -> Vec<IpNet> {
        let ranges: BTreeSet<IpNet> = self.service_cidrs.values().flatten().copied().collect();
        ranges.into_iter().collect()
    }

    /// The pod ranges of all Nodes, neighbouring ones joined.
    pub fn pod_ranges(&self) -> Vec<IpNet> {
        let ranges: Vec<IpNet> = self.nodes.values().flat_map(|node| &node.pod_cidrs).copied().collect();
        IpNet::aggregate(&ranges)
    }

    /// Services with one of these ClusterIPs or external IPs: what a change of the interfaces' addresses may have made stale (P13, Z1).
    pub fn services_with_address(&self, addrs: &BTreeSet<Addr>) -> BTreeSet<ObjectName> {
        let has = |service: &&Service| {
            let mut all = service.cluster_ips.iter().chain(service.external_ips.iter());
            all.any(|ip| addrs.contains(&Addr::from(*ip)))
        };
        self.services().filter(has).map(|service| service.name.clone()).collect()
    }

    /// Services whose source ranges may hold the node's primary address, or not, since that changed (S2).
    pub fn services_with_source_ranges(&self) -> BTreeSet<ObjectName> {
        let restricted = |service: &&Service| !service.source_ranges.is_empty();
        self.services().filter(restricted).map(|service| service.name.clone()).collect()
    }

    /// The names of all Services.
    pub fn service_names(&self) -> BTreeSet<ObjectName> {
        self.services.keys().cloned().collect()
    }

    fn insert(&mut self, object: Object) -> Dirty {
        match object {
            Object::Service(service) => self.insert_service(service),
            Object::EndpointSlice(slice) => self.insert_slice(slice),
            Object::Node(node) => self.replace_node(&node.name.clone(), Some(node)),
            Object::ServiceCidr { name, cidrs } => {
                let node = self.service_cidrs.get(&name) != Some(&cidrs);
                self.service_cidrs.insert(name, cidrs);
                self.revision += u64::from(node);
                Dirty { node, ..Dirty::default() }
            }
        }
    }

    fn remove(&mut self, reference: &Reference) -> Dirty {
        match reference.kind {
            Kind::Service => match self.services.remove(&reference.name) {
                Some(service) => {
                    self.revision += 1;
                    dirty_service(service.name.clone())
                }
                None => Dirty::default(),
            },
            Kind::EndpointSlice => self.remove_slice(&reference.name),
            Kind::Node => self.replace_node(&reference.name.name, None),
            Kind::ServiceCidr => {
                let node = self.service_cidrs.remove(&reference.name.name).is_some();
                self.revision += u64::from(node);
                Dirty { node, ..Dirty::default() }
            }
        }
    }

    fn replace(&mut self, kind: Kind, objects: Vec<Object>, unreadable: Vec<Reference>) -> Dirty {
        let mut listed: HashSet<Reference> = objects.iter().map(Object::reference).collect();
        listed.extend(unreadable);
        let mut dirty = Dirty::default();
        for reference in self.references(kind).into_iter().filter(|known| !listed.contains(known)) {
            dirty.merge(self.remove(&reference));
        }
        for object in objects {
            dirty.merge(self.insert(object));
        }
        dirty
    }

    fn references(&self, kind: Kind) -> Vec<Reference> {
        let cluster_wide = |name: &Arc<str>| ObjectName::new("", name.clone());
        let names: Vec<ObjectName> = match kind {
            Kind::Service => self.services.keys().cloned().collect(),
            Kind::EndpointSlice => self.slice_owners.keys().cloned().collect(),
            Kind::Node => self.nodes.keys().map(cluster_wide).collect(),
            Kind::ServiceCidr => self.service_cidrs.keys().map(cluster_wide).collect(),
        };
        names.into_iter().map(|name| Reference { kind, name }).collect()
    }

    fn insert_service(&mut self, mut service: Service) -> Dirty {
        if self.service(&service.name) == Some(&service) {
            return Dirty::default();
        }
        service.cluster_ips.shrink_to_fit();
        service.external_ips.shrink_to_fit();
        service.ingress.shrink_to_fit();
        service.ports.shrink_to_fit();
        service.source_ranges.shrink_to_fit();
        let name = service.name.clone();
        self.services.insert(name.clone(), Arc::new(service));
        self.revision += 1;
        dirty_service(name)
    }

    fn insert_slice(&mut self, mut slice: EndpointSlice) -> Dirty {
        slice.trigger_time = None;
        let known = self.slices(&slice.service);
        if known.binary_search_by(|other| other.name.cmp(&slice.name)).is_ok_and(|at| known[at] == slice) {
            return Dirty::default();
        }
        let mut dirty = self.remove_slice(&slice.name);
        slice.ports.shrink_to_fit();
        slice.endpoints.shrink_to_fit();
        dirty.merge(self.dirty_if_known(&slice.service));
        self.slice_owners.insert(slice.name.clone(), slice.service.name.clone());
        self.revision += 1;
        let slices = Arc::make_mut(self.slices.entry(slice.service.clone()).or_default());
        let at = slices.partition_point(|other| other.name < slice.name);
        slices.reserve_exact(1);
        slices.insert(at, slice);
        dirty
    }

    fn remove_slice(&mut self, name: &ObjectName) -> Dirty {
        let Some(service) = self.slice_owners.remove(name) else { return Dirty::default() };
        let service = ObjectName { namespace: name.namespace.clone(), name: service };
        self.revision += 1;
        if let Some(slices) = self.slices.get_mut(&service) {
            let slices = Arc::make_mut(slices);
            slices.retain(|slice| slice.name != *name);
            if slices.is_empty() {
                self.slices.remove(&service);
            }
        }
        self.dirty_if_known(&service)
    }

    fn replace_node(&mut self, name: &Arc<str>, node: Option<Node>) -> Dirty {
        let old = self.nodes.get(name);
        if old == node.as_ref() {
            return Dirty::default();
        }
        self.revision += 1;
        let pods = |node: Option<&Node>| node.map(|node| node.pod_cidrs.clone()).unwrap_or_default();
        let zone = |node: Option<&Node>| node.and_then(|node| node.zone.clone());
        let own = *name == self.node_name;
        let pods_changed = pods(old) != pods(node.as_ref());
        let zone_changed = own && zone(old) != zone(node.as_ref());
        match node {
            Some(node) => self.nodes.insert(name.clone(), node),
            None => self.nodes.remove(name),
        };
        let services = if zone_changed {
            self.service_names()
        } else if pods_changed {
            // An external IP inside a pod range is refused (Z1).
            let outside =
                |service: &&Service| !service.external_ips.is_empty() || !service.ingress.is_empty();
            self.services().filter(outside).map(|service| service.name.clone()).collect()
        } else {
            BTreeSet::new()
        };
        Dirty { services, node: own || pods_changed }
    }

    fn dirty_if_known(&self, service: &ObjectName) -> Dirty {
        match self.services.get(service) {
            Some(service) => dirty_service(service.name.clone()),
            None => Dirty::default(),
        }
    }
}

fn dirty_service(name: ObjectName) -> Dirty {
    Dirty { services: BTreeSet::from([name]), node: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::samples::{endpoint, ip, name, service, slice};

    fn store() -> Store {
        Store::new("here")
    }

    fn add(store: &mut Store, object: Object) -> Dirty {
        store.apply(Change::Applied(object))
    }

    fn delete(store: &mut Store, kind: Kind, object: ObjectName) -> Dirty {
        store.apply(Change::Deleted(Reference { kind, name: object }))
    }

    fn dirty(names: &[&str]) -> Dirty {
        Dirty { services: names.iter().map(|text| name(text)).collect(), node: false }
    }

    fn node(text: &str) -> Node {
        Node { name: text.into(), ..Node::default() }
    }

    #[test]
    fn a_change_makes_its_service_stale_once() {
        let mut store = store();
        assert_eq!(add(&mut store, Object::Service(service("web"))), dirty(&["web"]));
        assert!(add(&mut store, Object::Service(service("web"))).is_empty(), "told again");
        let web_1 = slice("web-1", "web", vec![endpoint("10.1.0.1", "here")]);
        assert_eq!(add(&mut store, Object::EndpointSlice(web_1.clone())), dirty(&["web"]));
        assert!(add(&mut store, Object::EndpointSlice(web_1)).is_empty(), "told again");
        assert_eq!(add(&mut store, Object::EndpointSlice(slice("web-1", "web", vec![]))), dirty(&["web"]));
        assert_eq!(store.slices(&name("web")).len(), 1);
    }

    #[test]
    fn deleting_what_was_never_told_makes_nothing_stale() {
        let mut store = store();
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node, Kind::ServiceCidr] {
            assert!(delete(&mut store, kind, name("web")).is_empty());
        }
    }

    #[test]
    fn a_slice_waits_for_its_service() {
        let mut store = store();
        assert!(add(&mut store, Object::EndpointSlice(slice("web-1", "web", vec![]))).is_empty());
        add(&mut store, Object::Service(service("web")));
        assert_eq!(store.slices(&name("web")).len(), 1);
        assert_eq!(delete(&mut store, Kind::Service, name("web")), dirty(&["web"]));
        add(&mut store, Object::Service(service("web")));
        assert_eq!(store.slices(&name("web")).len(), 1, "it outlives the Service");
    }

    #[test]
    fn a_slice_that_changes_its_label_moves_to_the_other_service() {
        let mut store = store();
        add(&mut store, Object::Service(service("web")));
        add(&mut store, Object::Service(service("api")));
        add(&mut store, Object::EndpointSlice(slice("s", "web", vec![])));
        let moved = add(&mut store, Object::EndpointSlice(slice("s", "api", vec![])));
        assert_eq!(moved, dirty(&["web", "api"]));
        assert_eq!((store.slices(&name("web")).len(), store.slices(&name("api")).len()), (0, 1));
        assert_eq!(delete(&mut store, Kind::EndpointSlice, name("s")), dirty(&["api"]));
    }

    #[test]
    fn a_list_replaces_all_that_was_known_of_its_kind() {
        let mut store = store();
        for text in ["keep", "change", "go"] {
            add(&mut store, Object::Service(service(text)));
        }
        add(&mut store, Object::EndpointSlice(slice("s", "keep", vec![])));
        let changed = Service { internal_local: true, ..service("change") };
        let listed = [service("keep"), changed, service("new")].map(Object::Service);
        let stale = store.apply(Change::replaced(Kind::Service, listed.to_vec()));
        assert_eq!(stale, dirty(&["change", "go", "new"]));
        assert_eq!(store.services().count(), 3);
        assert_eq!(store.slices(&name("keep")).len(), 1, "other kinds are untouched");
        assert_eq!(store.apply(Change::replaced(Kind::EndpointSlice, vec![])), dirty(&["keep"]));
    }

    /// Z5
    #[test]
    fn an_unreadable_object_stays_as_it_was_while_lists_say_that_it_exists() {
        let mut store = store();
        add(&mut store, Object::Service(service("web")));
        let object = Reference { kind: Kind::Service, name: name("web") };
        let unreadable = Change::Unreadable { object: object.clone(), error: "a port out of range".into() };
        assert!(store.apply(unreadable).is_empty());
        for _ in 0..2 {
            let (kind, unreadable) = (Kind::Service, vec![object.clone()]);
            assert!(store.apply(Change::Replaced { kind, objects: vec![], unreadable }).is_empty());
        }
        assert!(store.service(&name("web")).is_some());
        assert_eq!(
            store.apply(Change::replaced(Kind::Service, vec![])),
            dirty(&["web"]),
            "now it is really gone"
        );
        add(&mut store, Object::Service(service("web")));
        assert_eq!(store.apply(Change::Deleted(object)), dirty(&["web"]), "a deletion counts at once");
    }

    /// T1
    #[test]
    fn a_new_zone_of_the_own_node_makes_all_services_stale() {
        let mut store = store();
        add(&mut store, Object::Service(service("web")));
        add(&mut store, Object::Service(service("api")));
        let zoned = |text| Object::Node(Node { zone: Some("a".into()), ..node(text) });
        assert_eq!(add(&mut store, zoned("here")), Dirty { node: true, ..dirty(&["api", "web"]) });
        assert!(add(&mut store, zoned("here")).is_empty(), "told again");
        assert!(add(&mut store, zoned("there")).is_empty(), "not our zone");
        let gone = delete(&mut store, Kind::Node, ObjectName::new("", "here"));
        assert_eq!(gone, Dirty { node: true, ..dirty(&["api", "web"]) });
    }

    #[test]
    fn addresses_of_the_own_node_and_service_ranges_make_the_node_stale() {
        let mut store = store();
        add(&mut store, Object::Service(service("web")));
        let addressed = |text| Object::Node(Node { addresses: vec![ip("192.0.2.1")], ..node(text) });
        assert_eq!(add(&mut store, addressed("here")), Dirty { node: true, ..Dirty::default() });
        assert!(add(&mut store, addressed("there")).is_empty());
        let range = |text: &str| vec![text.parse().unwrap()];
        let cidr = |text| Object::ServiceCidr { name: "kubernetes".into(), cidrs: range(text) };
        assert!(add(&mut store, cidr("10.96.0.0/16")).node);
        assert!(!add(&mut store, cidr("10.96.0.0/16")).node);
        assert!(add(&mut store, cidr("10.97.0.0/16")).node);
        assert_eq!(store.service_ranges(), range("10.97.0.0/16"));
        assert!(delete(&mut store, Kind::ServiceCidr, ObjectName::new("", "kubernetes")).node);
        assert_eq!(store.service_ranges(), []);
    }

    /// Z1
    #[test]
    fn pod_ranges_of_any_node_make_services_with_external_ips_stale() {
        let mut store = store();
        add(&mut store, Object::Service(service("web")));
        add(
            &mut store,
            Object::Service(Service { external_ips: [ip("203.0.113.1")].into(), ..service("ext") }),
        );
        let pods = |text: &str| vec![text.parse().unwrap()];
        let there = Node { pod_cidrs: pods("10.1.0.0/24"), ..node("there") };
        assert_eq!(add(&mut store, Object::Node(there)), Dirty { node: true, ..dirty(&["ext"]) });
        add(&mut store, Object::Node(Node { pod_cidrs: pods("10.1.1.0/24"), ..node("here") }));
        assert_eq!(store.pod_ranges(), pods("10.1.0.0/23"), "neighbours are joined");
    }

    /// P13
    #[test]
    fn services_are_found_by_the_cluster_ips_that_came_to_an_interface() {
        let mut store = store();
        add(&mut store, Object::Service(service("web")));
        add(&mut store, Object::Service(Service { cluster_ips: vec![], ..service("headless") }));
        let found = store.services_with_address(&BTreeSet::from([Addr::from(ip("10.96.0.10"))]));
        assert_eq!(found, dirty(&["web"]).services);
        let external = Service { external_ips: [ip("203.0.113.1")].into(), ..service("headless") };
        add(&mut store, Object::Service(external));
        let found = store.services_with_address(&BTreeSet::from([Addr::from(ip("203.0.113.1"))]));
        assert_eq!(found, dirty(&["headless"]).services);
    }
}
