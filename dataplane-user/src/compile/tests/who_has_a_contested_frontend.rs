//! Z1: two Services that claim the same address, port and protocol.

use super::{context, frontends};
use crate::compile::{Compiler, Context, Update};
use crate::model::samples::{ip, name, service, service_port};
use crate::model::{Change, Kind, LoadBalancerIngress, Object, Reference, Service, ServicePort, Store};
use dataplane_common::Protocol;
use std::collections::BTreeMap;

/// A store and its compiler, and the sum of their updates.
struct World {
    store: Store,
    compiler: Compiler,
    context: Context,
    tables: BTreeMap<String, Vec<String>>,
}

impl World {
    fn new() -> Self {
        let (store, compiler) = (Store::new("here"), Compiler::default());
        Self { store, compiler, context: context(), tables: BTreeMap::new() }
    }

    fn apply(&mut self, change: Change) -> Update {
        let dirty = self.store.apply(change);
        let update = self.compiler.update(&self.store, &dirty.services, &self.context);
        for (name, compiled) in &update.services {
            let ports = compiled.tables.ports.values();
            let keys = ports.flat_map(frontends).map(|(addr, port, ..)| format!("{addr}:{port}"));
            let closed = compiled.tables.closed.iter().map(|addr| format!("closed {addr}"));
            self.tables.insert(name.name.to_string(), keys.chain(closed).collect());
        }
        update
    }

    fn add(&mut self, service: Service) -> Update {
        self.apply(Change::Applied(Object::Service(service)))
    }

    fn delete(&mut self, text: &str) -> Update {
        self.apply(Change::Deleted(Reference { kind: Kind::Service, name: name(text) }))
    }

    fn has(&self, service: &str, frontend: &str) -> bool {
        self.tables[service].iter().any(|held| held == frontend)
    }
}

/// ClusterIP 10.96.0.`host`, external IP 203.0.113.1.
fn external(text: &str, created: i64, host: u8) -> Service {
    Service {
        created,
        cluster_ips: vec![ip(&format!("10.96.0.{host}"))],
        external_ips: [ip("203.0.113.1")].into(),
        ..service(text)
    }
}

/// Z1
#[test]
fn the_older_service_has_it_whichever_came_first() {
    for younger_first in [false, true] {
        let mut world = World::new();
        let mut services = [external("old", 1, 1), external("young", 2, 2)];
        if younger_first {
            services.reverse();
        }
        for service in services {
            world.add(service);
        }
        assert!(world.has("old", "203.0.113.1:80") && !world.has("young", "203.0.113.1:80"));
        assert!(world.has("old", "10.96.0.1:80") && world.has("young", "10.96.0.2:80"));
    }
}

/// Z1
#[test]
fn the_loser_is_told_who_has_it() {
    let mut world = World::new();
    world.add(external("old", 1, 1));
    let update = world.add(external("young", 2, 2));
    assert_eq!(
        super::texts(&update.services[&name("young")].complaints),
        [
            "Service default/young: AddressConflict: external IP 203.0.113.1:80/TCP is not programmed: Service default/old has it"
        ]
    );
}

/// Z1
#[test]
fn of_two_services_of_one_age_the_smaller_name_has_it() {
    let mut world = World::new();
    world.add(external("b", 1, 2));
    world.add(external("a", 1, 1));
    assert!(world.has("a", "203.0.113.1:80") && !world.has("b", "203.0.113.1:80"));
}

/// Z1
#[test]
fn the_heir_gets_it_when_the_holder_goes_or_gives_it_up() {
    for deleted in [false, true] {
        let mut world = World::new();
        world.add(Service { external_ips: [ip("203.0.113.2")].into(), ..external("bystander", 0, 9) });
        for service in [external("old", 1, 1), external("mid", 2, 2), external("young", 3, 3)] {
            world.add(service);
        }
        let update = if deleted {
            world.delete("old")
        } else {
            world.add(Service { external_ips: [].into(), ..external("old", 1, 1) })
        };
        assert!(world.has("mid", "203.0.113.1:80") && !world.has("young", "203.0.113.1:80"));
        let touched: Vec<_> = update.services.keys().map(|name| &*name.name).collect();
        assert_eq!(touched, ["mid", "old", "young"], "rivals are compiled again, nobody else");
        assert!(super::texts(&update.services[&name("young")].complaints)[0].ends_with("default/mid has it"));
    }
}

/// Z1
#[test]
fn different_ports_and_protocols_of_an_external_ip_may_belong_to_different_services() {
    let mut world = World::new();
    world.add(external("old", 1, 1));
    let udp = ServicePort { protocol: Protocol::Udp, ..service_port() };
    world.add(Service { ports: vec![udp], ..external("udp", 2, 2) });
    let other = ServicePort { port: 81, ..service_port() };
    world.add(Service { ports: vec![other], ..external("other", 3, 3) });
    assert!(world.has("udp", "203.0.113.1:80") && world.has("other", "203.0.113.1:81"));
}

/// Node ports of two Services in manifests, where no API server hands them out.
#[test]
fn a_node_port_goes_to_the_older_service_too() {
    let node_port = |text, created, host| Service {
        ports: vec![ServicePort { node_port: Some(30_001), ..service_port() }],
        external_ips: [].into(),
        ..external(text, created, host)
    };
    let mut world = World::new();
    world.add(node_port("young", 2, 2));
    world.add(node_port("old", 1, 1));
    assert!(world.has("old", "0.0.0.0:30001") && !world.has("young", "0.0.0.0:30001"));
}

/// Z1: nobody takes another Service's ClusterIP, on any port, however old he is
#[test]
fn a_cluster_ip_goes_before_external_ips_at_its_address() {
    let thief = |port| Service {
        ports: vec![ServicePort { port, ..service_port() }],
        external_ips: [].into(),
        ingress: [LoadBalancerIngress { ip: ip("10.96.0.9"), proxy: false }].into(),
        ..external("thief", 1, 1)
    };
    for port in [80, 81] {
        let mut world = World::new();
        world.add(thief(port));
        let stolen = format!("10.96.0.9:{port}");
        assert!(world.has("thief", &stolen));
        let victim = Service { external_ips: [].into(), ..external("victim", 2, 9) };
        world.add(victim);
        assert!(!world.has("thief", &stolen) && world.has("victim", "10.96.0.9:80"));
        assert!(world.has("victim", "closed 10.96.0.9"));
        world.delete("victim");
        assert!(world.has("thief", &stolen));
    }
}

/// Two Services with one ClusterIP (manifests): different ports both work, and the address stays closed while one is there.
#[test]
fn a_shared_cluster_ip_is_closed_by_one_service_and_inherited_by_the_other() {
    let with_port = |text: &str, created, port| Service {
        created,
        ports: vec![ServicePort { port, ..service_port() }],
        ..service(text)
    };
    let mut world = World::new();
    world.add(with_port("a", 1, 80));
    world.add(with_port("b", 2, 81));
    assert_eq!(world.tables["a"], ["10.96.0.10:80", "closed 10.96.0.10"]);
    assert_eq!(world.tables["b"], ["10.96.0.10:81"]);
    world.delete("a");
    assert_eq!(world.tables["a"], Vec::<String>::new());
    assert_eq!(world.tables["b"], ["10.96.0.10:81", "closed 10.96.0.10"]);
}

/// P16
#[test]
fn an_lb_ip_on_an_interface_of_the_node_makes_the_nodes_tables_stale() {
    let balanced = Service {
        ingress: [LoadBalancerIngress { ip: ip("192.0.2.1"), proxy: false }].into(),
        ..service("web")
    };
    let mut world = World::new();
    assert!(!world.add(service("web")).node);
    assert!(world.add(balanced.clone()).node);
    assert!(!world.add(balanced).node);
    assert_eq!(
        world.compiler.load_balancer_ips(&world.context.node_addresses),
        [super::addr("192.0.2.1")].into()
    );
    assert!(world.delete("web").node);
}

/// A changed age changes who has it, too: manifests may be edited.
#[test]
fn a_service_that_is_created_anew_loses_its_precedence() {
    let mut world = World::new();
    world.add(external("a", 1, 1));
    world.add(external("b", 2, 2));
    world.add(external("a", 3, 1));
    assert!(world.has("b", "203.0.113.1:80") && !world.has("a", "203.0.113.1:80"));
}
