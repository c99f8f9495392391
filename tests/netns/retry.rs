//! Second tries (L5, L6): clients of a Service some of whose endpoints are silent, or refuse.

use crate::world::{BOTH, Tcp, Udp, World, ask, eventually, everywhere};
use dataplane_tests::lab::{Client, Endpoint, Family, Service};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// An endpoint at an address of node 2 that nobody has.
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

everywhere! {
    /// L5, L6: connections by packet are served all the same, by default from outside, and where the Service asks for it from pods and
    /// the node as well.
    fn a_silent_endpoint_costs_no_connection(world) {
        // Packets to it vanish there. Without this they would go to and fro until a router says that they are too old.
        let (nobody, node) = (nobody(world), world.node(2));
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

/// A Service of these endpoints by turns, whose TCP goes by packet everywhere.
fn by_packet(world: &World, number: u8, pods: &[&str]) -> Service {
    let service = world
        .node_port_service(number)
        .annotation("service.portolan.dev/lb-algorithm", "round-robin")
        .annotation("service.portolan.dev/retry", "3");
    service.endpoints(pods.iter().map(|pod| world.pod(pod).endpoint()))
}

/// Whoever calls from outside, from a pod and from a node, and whom.
fn callers(world: &World, number: u8) -> [(Client, SocketAddr); 6] {
    [
        (world.outside(), world.node_frontend(1, number.into())),
        (world.outside(), world.node_frontend(2, number.into())),
        (world.outside(), world.node_frontend(3, number.into())),
        (world.in_pod("shell-1"), world.frontend(number)),
        (world.in_pod("shell-3"), world.frontend(number)),
        (world.on_node(1), world.frontend(number)),
    ]
}

everywhere! {
    /// L5: two of three endpoints refuse: nothing listens in these pods. No client notices, by TCP or by UDP, wherever it and the endpoints
    /// are.
    fn endpoints_that_refuse_cost_no_connection(world) {
        let service = by_packet(world, 0, &["web-1", "shell-1", "shell-2"]);
        world.apply(&service);
        for (client, to) in callers(world, 0) {
            for transport in BOTH {
                // Endpoints send no more ICMP errors at once than six to a client.
                for number in 0..if transport == Udp { 3 } else { 6 } {
                    let answer = ask(&client, transport, to);
                    let answer = answer.unwrap_or_else(|error| panic!("{transport:?} {to} {number}: {error}"));
                    assert_eq!(answer.pod, "web-1", "{transport:?} {to}");
                }
            }
        }
        for transport in BOTH {
            let (protocol, port) = if transport == Tcp { ("TCP", "tcp-80") } else { ("UDP", "udp-80") };
            let labels = format!(
                "{{namespace=\"default\",service=\"{}\",port=\"{port}\",protocol=\"{protocol}\",ip_family=\"IP{}\"}} ",
                service.name(),
                if world.family() == Family::V4 { "v4" } else { "v6" }
            );
            let told = |what| world.node(1).metric(&format!("portolan_service_{what}_total{labels}")).unwrap_or(0.0);
            eventually("the metrics tell of it", || told("moved") >= told("rescued") && told("rescued") > 0.0);
        }
    }
}
