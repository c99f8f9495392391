//! Which endpoint a connection gets, on the socket path and the packet path: algorithms and weights (L1 to L4).

use crate::world::{BOTH, Transport, World, ask, ask_many, on_all_paths, pods};
use dataplane_tests::lab::{Client, Service};
use std::collections::BTreeSet;
use std::net::SocketAddr;

fn with(service: Service, name: &str, value: &str) -> Service {
    service.annotation(&format!("service.portolan.dev/{name}"), value)
}

/// Clients of each kind and the address that each calls.
fn clients(world: &World) -> [(Client, SocketAddr); 4] {
    [
        (world.in_pod("shell-3"), world.frontend(0)),
        (world.on_node(1), world.frontend(0)),
        (world.outside(), world.node_frontend(1, 0)),
        (world.outside(), world.node_frontend(3, 0)),
    ]
}

/// Who answers one connection after the other.
#[track_caller]
fn one_by_one(client: &Client, transport: Transport, to: SocketAddr) -> Vec<String> {
    (0..12).map(|_| ask(client, transport, to).unwrap().pod).collect()
}

on_all_paths! {
    /// L1, L2: endpoints take turns; then the client's address leads to one; then chance. Each begins with the annotation.
    fn an_algorithm_chooses_by_socket_and_by_packet(world) {
        let service = world.node_port_service(0).endpoints(world.webs());
        world.apply(&with(service.clone(), "lb-algorithm", "round-robin"));
        for transport in BOTH {
            for (client, to) in clients(world) {
                let seen = one_by_one(&client, transport, to);
                assert!(seen.windows(2).all(|pair| pair[0] != pair[1]), "{transport:?} {to}: {seen:?}");
            }
        }
        world.apply(&with(service.clone(), "lb-algorithm", "source-hash"));
        for transport in BOTH {
            for (client, to) in clients(world) {
                let answers = ask_many(&client, transport, to);
                assert_eq!(pods(&answers).len(), 1, "{transport:?} {to}");
            }
        }
        world.apply(&with(service.clone(), "lb-algorithm", "maglev"));
        for transport in BOTH {
            for (client, to) in clients(world) {
                assert_eq!(pods(&ask_many(&client, transport, to)).len(), 2, "{transport:?} {to}");
            }
        }
        world.apply(&service);
    }
}

on_all_paths! {
    /// L3, L4: weights share turns out; an endpoint without weight gets no connection, and with none of weight all are refused.
    fn weights_share_connections_out(world) {
        let service = with(world.node_port_service(0).endpoints(world.webs()), "lb-algorithm", "round-robin");
        let weigh = |weights: &str| world.apply(&with(service.clone(), "weights", weights));
        let first = world.webs()[0].clone();
        let address = world.pod_ip(&first.pod);
        weigh(&format!("{{\"{address}\": 2}}"));
        for transport in BOTH {
            for (client, to) in clients(world) {
                let seen = one_by_one(&client, transport, to);
                let of_first = seen.iter().filter(|pod| **pod == first.pod).count();
                assert_eq!(of_first, 8, "{transport:?} {to}: {seen:?}");
            }
        }
        weigh(&format!("{{\"{address}\": 0}}"));
        for transport in BOTH {
            for (client, to) in clients(world) {
                let answers = ask_many(&client, transport, to);
                assert_eq!(pods(&answers), BTreeSet::from([world.webs()[1].pod.as_str()]), "{transport:?} {to}");
            }
        }
        weigh("{\"*\": 0}");
        for (client, to) in clients(world) {
            crate::world::assert_refused(&client, to);
        }
        world.apply(&service);
    }
}
