//! What programs see whose sockets the hooks serve: the address they called, also as an IPv4-mapped one on a socket of IPv6.

use crate::world::{BOTH, PORT, TARGET, Tcp, Transport, Udp, World, eventually, everywhere, on_one_network};
use dataplane_tests::lab::{Family, Place, Stream, ask_datagram, at, next_source};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(3);

/// An IPv4 address in the form in which sockets of IPv6 have it.
fn mapped(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) => at(v4.to_ipv6_mapped(), address.port()),
        IpAddr::V6(_) => address,
    }
}

/// Who answers on a connected IPv6 socket; what the socket says that its peer is must be who was called.
#[track_caller]
fn ask_connected(place: &Place, transport: Transport, to: SocketAddr) -> String {
    match transport {
        Tcp => {
            let mut stream = Stream::connect(place.tcp_socket(Family::V6).unwrap(), to, PATIENCE).unwrap();
            assert_eq!(stream.get_ref().peer_addr().unwrap(), to);
            stream.ask().unwrap().pod
        }
        Udp => {
            let socket = udp_socket(place);
            socket.connect(to).unwrap();
            assert_eq!(socket.peer_addr().unwrap(), to);
            ask_datagram(&socket, None, PATIENCE).unwrap().pod
        }
    }
}

fn udp_socket(place: &Place) -> UdpSocket {
    place.udp_socket(Some(next_source(place, Family::V6))).unwrap()
}

/// The addresses of a Service that a place has a way to.
fn called(world: &World, from_node: bool) -> Vec<SocketAddr> {
    let mut called = vec![world.frontend(0), world.node_frontend(2, 0)];
    if from_node && world.kind().serves_own_node_ports() {
        called.extend([world.node_frontend(1, 0), at(world.loopback(), world.node_port(0))]);
    }
    called
}

on_one_network! {
    /// P4, P9, P18: a socket of IPv6 that calls an IPv4 address calls the same Service, and hears of no other address.
    fn a_socket_of_ipv6_reaches_both_families(world) {
        world.apply(&world.node_port_service(0).endpoints(world.webs()));
        let pod = world.pod("shell-1");
        for (place, from_node) in [(pod.place(), false), (world.node(1).place(), true)] {
            for to in called(world, from_node).into_iter().map(mapped) {
                for transport in BOTH {
                    let pod = ask_connected(place, transport, to);
                    assert!(["web-1", "web-3"].contains(&pod.as_str()), "{transport:?} {to}: {pod}");
                }
                // The answer must come from the address that was called: the client holds it to that.
                let pod = ask_datagram(&udp_socket(place), Some(to), PATIENCE).unwrap().pod;
                assert!(["web-1", "web-3"].contains(&pod.as_str()), "{to}: {pod}");
            }
        }
    }
}

everywhere! {
    /// C1: a connected socket that calls its own node's node port is closed when its endpoint goes, and the next one gets another.
    fn a_connected_socket_to_the_nodes_own_node_port_is_closed_when_its_endpoint_goes(world) {
        if !world.kind().serves_own_node_ports() {
            return;
        }
        let service = world.bare_service(0).udp_node_port(PORT, TARGET, world.node_port(0));
        world.apply(&service.clone().endpoints([world.pod("web-1").endpoint()]));
        let to = at(world.loopback(), world.node_port(0));
        let place = world.node(1).place();
        let mut sockets = vec![(udp_socket(place), mapped(to))];
        if to.is_ipv4() {
            sockets.push((place.udp_socket(None).unwrap(), to));
        }
        for (socket, to) in &sockets {
            socket.connect(to).unwrap();
            assert_eq!(ask_datagram(socket, None, PATIENCE).unwrap().pod, "web-1");
        }
        world.apply(&service.endpoints([world.pod("web-3").endpoint()]));
        for (socket, to) in &sockets {
            eventually(&format!("the socket to {to} is closed"), || socket.send(b"hello").is_err());
        }
        assert_eq!(ask_connected(place, Udp, mapped(to)), "web-3");
    }
}

on_one_network! {
    /// P18: the name of a socket's peer is that of who was called last, not of a Service that refused it before.
    fn a_socket_that_was_refused_by_a_service_is_connected_again(world) {
        world.apply(&world.bare_service(0).tcp(PORT, 9).endpoints([world.pod("web-1").endpoint()]));
        let client = world.pod("shell-1");
        let (refused, pod) = (mapped(world.frontend(0)), mapped(at(world.pod_ip("web-1"), TARGET)));
        let socket = client.place().tcp_socket(Family::V6).unwrap();
        let connect = |to| Stream::connect(socket.try_clone().unwrap(), to, PATIENCE);
        assert!(connect(refused).is_err());
        // The kernel tells the next call that the connection before it was aborted.
        let mut stream = connect(pod).or_else(|_| connect(pod)).unwrap();
        assert_eq!(stream.get_ref().peer_addr().unwrap(), pod);
        assert_eq!(stream.ask().unwrap().pod, "web-1");
    }
}
