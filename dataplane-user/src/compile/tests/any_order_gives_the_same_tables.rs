//! Properties over seeded random objects: compiling does not depend on order, nor on the way the store got there.

use super::context;
use crate::compile::{Compiled, Compiler, Context};
use crate::model::samples::{Seed, endpoint, ip, name, service, service_port, slice};
use crate::model::{
    Change, Endpoint, EndpointSlice, Kind, LoadBalancerIngress, Object, ObjectName, Reference, Service,
    ServicePort, Store,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use thin_vec::ThinVec;

const NODES: [&str; 3] = ["here", "there", ""];
const ZONES: [&str; 2] = ["a", "b"];

fn random_endpoint(seed: &mut Seed) -> Endpoint {
    let names = |seed: &mut Seed, from: &[&str]| -> ThinVec<Arc<str>> {
        from.iter().filter(|_| seed.flip()).map(|name| Arc::from(*name)).collect()
    };
    // Few addresses, so that duplicates are many.
    let address = format!("10.1.0.{}", 1 + seed.below(6));
    Endpoint {
        ready: seed.flip(),
        serving: seed.flip(),
        terminating: seed.flip(),
        for_nodes: names(seed, &NODES[..2]),
        for_zones: names(seed, &ZONES),
        ..endpoint(&address, NODES[seed.below(NODES.len())])
    }
}

fn random_slice(seed: &mut Seed) -> EndpointSlice {
    let endpoints = (0..seed.below(4)).map(|_| random_endpoint(seed)).collect();
    slice(&format!("slice-{}", seed.below(8)), &format!("svc-{}", seed.below(5)), endpoints)
}

fn random_service(seed: &mut Seed) -> Service {
    let number = seed.below(5);
    let ports = vec![ServicePort {
        node_port: seed.flip().then_some(30_001),
        port: 80 + u16::from(seed.flip()),
        ..service_port()
    }];
    Service {
        created: i64::try_from(seed.below(3)).unwrap(),
        cluster_ips: if seed.below(4) == 0 {
            [].into()
        } else {
            vec![ip(&format!("10.96.0.{}", seed.below(5)))]
        },
        external_ips: if seed.flip() {
            [ip(&format!("10.96.0.{}", seed.below(7)))].into()
        } else {
            [].into()
        },
        ingress: if seed.flip() {
            [LoadBalancerIngress { ip: ip("203.0.113.1"), proxy: false }].into()
        } else {
            [].into()
        },
        ports,
        internal_local: seed.flip(),
        external_local: seed.flip(),
        ..service(&format!("svc-{number}"))
    }
}

fn random_change(seed: &mut Seed) -> Change {
    let reference = |kind, text: String| Reference { kind, name: name(&text) };
    match seed.below(8) {
        0..=2 => Change::Applied(Object::Service(random_service(seed))),
        3..=4 => Change::Applied(Object::EndpointSlice(random_slice(seed))),
        5 => Change::Deleted(reference(Kind::Service, format!("svc-{}", seed.below(5)))),
        6 => Change::Deleted(reference(Kind::EndpointSlice, format!("slice-{}", seed.below(8)))),
        _ => {
            let slices = (0..seed.below(4)).map(|_| Object::EndpointSlice(random_slice(seed)));
            Change::replaced(Kind::EndpointSlice, slices.collect())
        }
    }
}

/// F5
#[test]
fn slices_and_endpoints_in_any_order_give_the_same_tables() {
    for number in 0..500 {
        let seed = &mut Seed(number);
        let service = random_service(seed);
        let mut slices: Vec<_> = (0..4).map(|_| random_slice(seed)).collect();
        let (tables, complaints) = crate::compile::service(&service, &slices, &context());
        seed.shuffle(&mut slices);
        for slice in &mut slices {
            seed.shuffle(&mut slice.endpoints);
        }
        let shuffled = crate::compile::service(&service, &slices, &context());
        assert_eq!(shuffled.0, tables, "seed {number}");
        assert_eq!(shuffled.1.len(), complaints.len(), "seed {number}");
    }
}

/// What holds for every table, whatever the objects.
#[test]
fn sets_hold_backends_only_and_are_empty_without_endpoints() {
    use dataplane_common::service::Policy;
    for number in 0..500 {
        let seed = &mut Seed(number);
        let service = random_service(seed);
        let slices: Vec<_> = (0..3).map(|_| random_slice(seed)).collect();
        let (tables, _) = crate::compile::service(&service, &slices, &context());
        for port in tables.ports.values() {
            assert!(port.cluster.union(&port.local).all(|key| port.backends.contains_key(key)));
            let any = port.policy.has(Policy::HAS_ENDPOINTS);
            assert!(any || (port.cluster.is_empty() && port.local.is_empty()), "seed {number}");
        }
    }
}

fn all(store: &Store, compiler: &mut Compiler, context: &Context) -> BTreeMap<ObjectName, Compiled> {
    compiler.update(store, &store.service_names(), context).services
}

/// Change by change, with only what is dirty compiled again, comes to the same as everything at once.
#[test]
fn tables_built_incrementally_equal_tables_from_scratch() {
    for number in 0..60 {
        let seed = &mut Seed(number);
        let (mut store, mut compiler) = (Store::new("here"), Compiler::default());
        let context = context();
        let mut tables: BTreeMap<ObjectName, Compiled> = BTreeMap::new();
        for step in 0..60 {
            let dirty = store.apply(random_change(seed));
            tables.append(&mut compiler.update(&store, &dirty.services, &context).services);
            tables.retain(|name, _| store.service(name).is_some());
            let expected = all(&store, &mut Compiler::default(), &context);
            assert_eq!(tables, expected, "seed {number}, step {step}");
        }
    }
}

/// A frontend never leads to two Services, and each that anybody claims leads to one.
#[test]
fn a_frontend_leads_to_one_service() {
    for number in 0..200 {
        let seed = &mut Seed(number);
        let mut store = Store::new("here");
        for _ in 0..8 {
            store.apply(Change::Applied(Object::Service(random_service(seed))));
        }
        let mut held = BTreeSet::new();
        for compiled in all(&store, &mut Compiler::default(), &context()).values() {
            for key in compiled.tables.ports.values().flat_map(|port| port.frontends.keys()) {
                assert!(held.insert(*key), "seed {number}: {key:?}");
            }
        }
        for service in store.services() {
            let (tables, _) = crate::compile::service(service, &[], &context());
            for (key, kind) in tables.ports.values().flat_map(|port| &port.frontends) {
                // An address that is somebody's ClusterIP is not for external IPs of others.
                let cluster_ip = store.services().any(|other| {
                    other.cluster_ips.iter().any(|ip| dataplane_common::Addr::from(*ip) == *key.addr())
                });
                let refused = cluster_ip && *kind != dataplane_common::frontend::FrontendKind::ClusterIp;
                assert!(refused || held.contains(key), "seed {number}: {key:?}");
            }
        }
    }
}
