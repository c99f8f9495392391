//! Second tries (L5, L6): a client of a Service one of whose endpoints is silent.

use crate::world::{Tcp, World, ask, on_all_paths};
use dataplane_tests::lab::{Endpoint, Family, Service};
use std::net::{Ipv4Addr, Ipv6Addr};

/// An endpoint at an address of node 3 that nobody has, and to which packets vanish there.
fn nobody(world: &World) -> Endpoint {
    let mut nobody = world.pod("web-3").endpoint();
    nobody.pod = "nobody".to_owned();
    nobody.address = nobody.address.map(|at| Ipv4Addr::from_bits(at.to_bits() ^ 0x40));
    nobody.address6 = nobody.address6.map(|at| Ipv6Addr::from_bits(at.to_bits() ^ 0x40));
    nobody
}

/// A Service whose endpoints take turns, so that every other connection begins at the silent one.
fn half_silent(world: &World, number: u8) -> Service {
    let service =
        world.node_port_service(number).annotation("service.portolan.dev/lb-algorithm", "round-robin");
    service.endpoints([world.pod("web-1").endpoint(), nobody(world)])
}

on_all_paths! {
    /// L5, L6: connections by packet are served all the same, by default from outside, and where the Service asks for it from pods and
    /// the node as well.
    fn a_silent_endpoint_costs_no_connection(world) {
        let (nobody, node) = (nobody(world), world.node(3));
        let bits = if world.family() == Family::V4 { 32 } else { 128 };
        let address = match world.family() {
            Family::V4 => nobody.address.unwrap().to_string(),
            Family::V6 => nobody.address6.unwrap().to_string(),
        };
        node.place().ip(&[format!("route replace blackhole {address}/{bits}")]).unwrap();
        world.apply(&half_silent(world, 0));
        for _ in 0..4 {
            assert_eq!(ask(&world.outside(), Tcp, world.node_frontend(1, 0)).unwrap().pod, "web-1");
        }
        world.apply(&half_silent(world, 0).annotation("service.portolan.dev/retry", "2"));
        for client in [world.in_pod("shell-3"), world.on_node(1)] {
            for _ in 0..4 {
                assert_eq!(ask(&client, Tcp, world.frontend(0)).unwrap().pod, "web-1");
            }
        }
        node.place().ip(&[format!("route del blackhole {address}/{bits}")]).unwrap();
    }
}
