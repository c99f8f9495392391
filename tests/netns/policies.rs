//! Who answers and which source the endpoint sees, by policy and by where the client is: P4 to P9, P12.

use crate::world::{
    BOTH, PATIENCE, SILENCE, Transport, Udp, World, ask, ask_many, everywhere, keeps_client_source, pods,
};
use dataplane_tests::lab::{Answer, Asked, Client, Stream, ask_datagram, next_source};
use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};

/// Asserts what a pod of `node` (from 1) saw of the outside client that called that node's port.
#[track_caller]
pub(crate) fn assert_source_by_place(world: &World, called: usize, answer: &Answer) {
    let (seen, port) = (answer.client_ip(), answer.client.port());
    if answer.node != world.node(called).name() {
        assert_eq!(seen, world.node_source(called), "node-{called} was called: {answer}");
        assert!((15_000..=29_999).contains(&port) || (61_000..=65_535).contains(&port), "{answer}");
    } else if keeps_client_source(called) {
        assert_eq!(seen, world.outside_ip(), "node-{called} was called: {answer}");
    } else {
        assert!(world.node_sources(called).contains(&seen), "node-{called} was called: {answer}");
        assert!((1_024..=14_999).contains(&port), "{answer}");
    }
}

everywhere! {
    /// P9
    fn a_cluster_ip_serves_pods_and_nodes_with_their_own_source(world) {
        world.apply(&world.cluster_service(0).endpoints(world.webs()));
        for transport in BOTH {
            for name in ["shell-1", "shell-2", "shell-3"] {
                let answers = ask_many(&world.in_pod(name), transport, world.frontend(0));
                assert_eq!(pods(&answers), BTreeSet::from(["web-1", "web-3"]));
                let own = world.pod_ip(name);
                assert!(answers.iter().all(|answer| answer.client_ip() == own), "{name}: {answers:?}");
            }
            for number in 1..=3 {
                let answers = ask_many(&world.on_node(number), transport, world.frontend(0));
                assert_eq!(pods(&answers), BTreeSet::from(["web-1", "web-3"]));
                let own = world.node_sources(number);
                assert!(answers.iter().all(|answer| own.contains(&answer.client_ip())), "{answers:?}");
            }
        }
    }
}

everywhere! {
    /// P4, P12: an address of the node and a port of the range; but the client's own with the flag, if the endpoint is of the node.
    fn endpoints_behind_a_node_port_see_the_node_or_with_the_flag_the_client(world) {
        world.apply(&world.node_port_service(0).endpoints(world.webs()));
        for transport in BOTH {
            for node in 1..=3 {
                let answers = ask_many(&world.outside(), transport, world.node_frontend(node, 0));
                assert_eq!(pods(&answers), BTreeSet::from(["web-1", "web-3"]));
                answers.iter().for_each(|answer| assert_source_by_place(world, node, answer));
            }
        }
    }
}

everywhere! {
    /// P4: the client is a pod of the node, so the reply comes back anyway.
    fn a_node_port_keeps_the_source_of_the_nodes_own_pods(world) {
        world.apply(&world.node_port_service(0).endpoints(world.webs()));
        for transport in BOTH {
            for (name, node) in [("shell-1", 1), ("shell-3", 3)] {
                let answers = ask_many(&world.in_pod(name), transport, world.node_frontend(node, 0));
                assert_eq!(pods(&answers), BTreeSet::from(["web-1", "web-3"]));
                let own = world.pod_ip(name);
                assert!(answers.iter().all(|answer| answer.client_ip() == own), "{name}: {answers:?}");
            }
        }
    }
}

everywhere! {
    /// P7
    fn a_local_node_port_serves_local_endpoints_with_the_clients_source(world) {
        world.apply(&world.node_port_service(0).external_local().endpoints(world.webs()));
        for transport in BOTH {
            for (node, pod) in [(1, "web-1"), (2, "web-3")] {
                let answers = ask_many(&world.outside(), transport, world.node_frontend(node, 0));
                assert_eq!(pods(&answers), BTreeSet::from([pod]));
                assert!(answers.iter().all(|answer| answer.client_ip() == world.outside_ip()), "{answers:?}");
            }
        }
    }
}

everywhere! {
    /// P5
    fn a_pod_reaches_all_endpoints_by_its_own_nodes_local_node_port(world) {
        world.apply(&world.node_port_service(0).external_local().endpoints(world.webs()));
        for transport in BOTH {
            for (name, node) in [("shell-1", 1), ("shell-3", 3)] {
                let answers = ask_many(&world.in_pod(name), transport, world.node_frontend(node, 0));
                assert_eq!(pods(&answers), BTreeSet::from(["web-1", "web-3"]));
                let own = world.pod_ip(name);
                assert!(answers.iter().all(|answer| answer.client_ip() == own), "{name}: {answers:?}");
            }
        }
    }
}

everywhere! {
    /// P6
    fn a_node_reaches_all_endpoints_by_its_own_local_node_port(world) {
        if !world.kind().serves_own_node_ports() {
            return;
        }
        world.apply(&world.node_port_service(0).external_local().endpoints(world.webs()));
        for transport in BOTH {
            for node in [1, 3] {
                let answers = ask_many(&world.on_node(node), transport, world.node_frontend(node, 0));
                assert_eq!(pods(&answers), BTreeSet::from(["web-1", "web-3"]));
                let own = world.node_sources(node);
                assert!(answers.iter().all(|answer| own.contains(&answer.client_ip())), "{answers:?}");
            }
        }
    }
}

everywhere! {
    /// P8: to another node a pod is an outside client.
    fn a_pod_is_an_outside_client_to_another_nodes_local_node_port(world) {
        world.apply(&world.node_port_service(0).external_local().endpoints(world.webs()));
        if !world.pods_reach_other_nodes() {
            return;
        }
        for transport in BOTH {
            let answer = ask(&world.in_pod("shell-3"), transport, world.node_frontend(1, 0)).unwrap();
            assert_eq!(answer.pod, "web-1");
            assert_eq!(answer.client_ip(), world.pod_ip("shell-3"));
        }
        crate::world::assert_silent(&world.in_pod("shell-1"), world.node_frontend(3, 0));
    }
}

/// Calls an address from a port of a pod, and leaves the connection open, if there is one.
fn ask_from(
    client: &Client,
    socket: &UdpSocket,
    transport: Transport,
    to: SocketAddr,
) -> (Asked, Option<Stream>) {
    if transport == Udp {
        return (ask_datagram(socket, Some(to), PATIENCE), None);
    }
    match client.clone().source(socket.local_addr().unwrap()).connect(to) {
        Ok(mut stream) => (stream.ask(), Some(stream)),
        Err(failure) => (Err(failure), None),
    }
}

/// Asserts that nobody answers on any of these addresses, all called from one port.
#[track_caller]
fn assert_silent_to_one_port(client: &Client, socket: &UdpSocket, called: &[SocketAddr]) {
    for to in called {
        socket.send_to(b"hello", to).unwrap();
    }
    let source = socket.local_addr().unwrap();
    std::thread::scope(|scope| {
        let connect = |to| scope.spawn(move || client.clone().timeout(SILENCE).source(source).connect(to));
        for thread in called.iter().copied().map(connect).collect::<Vec<_>>() {
            let answered = thread.join().unwrap();
            assert!(answered.is_err(), "{called:?}: {answered:?}");
        }
    });
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    let answered = socket.recv_from(&mut [0; 64]);
    assert!(answered.is_err(), "{called:?}: {answered:?}");
}

everywhere! {
    /// P4, P5, P9, P12: the endpoint sees the client, and so does a policy, by whichever addresses of the Service one port of the
    /// client calls it.
    fn a_second_flow_with_the_same_reply_keeps_its_source_and_meets_the_same_policy(world) {
        let db = world.pod("db-1");
        world.apply(&world.node_port_service(0).external_local().endpoints([db.endpoint()]));
        world.apply(&world.node_port_service(1).endpoints([db.endpoint()]));
        let called = |node| {
            [world.frontend(0), world.node_frontend(node, 0), world.frontend(1), world.node_frontend(node, 1)]
        };
        let a_port_of = |pod: &str| {
            let place = world.pod(pod).place().clone();
            place.udp_socket(Some(next_source(&place, world.family()))).unwrap()
        };
        assert_silent_to_one_port(&world.in_pod("shell-1"), &a_port_of("shell-1"), &called(1));
        for transport in BOTH {
            // A socket that is connected already can have no second one with the same port to one endpoint.
            let one_port = transport == Udp || world.kind().pods_connect_by_packet();
            for (pod, node) in [("shell-2", 2), ("shell-3", 3)] {
                let (mut socket, mut seen, mut open) = (a_port_of(pod), BTreeSet::new(), Vec::new());
                for to in called(node) {
                    let (answer, stream) = ask_from(&world.in_pod(pod), &socket, transport, to);
                    let answer = answer.unwrap_or_else(|failure| panic!("{transport:?} {to}: {failure}"));
                    assert_eq!(answer.client_ip(), world.pod_ip(pod), "{transport:?} {to}");
                    seen.insert(answer.client);
                    open.push(stream);
                    if !one_port {
                        socket = a_port_of(pod);
                    }
                }
                assert_eq!(seen.len(), called(node).len(), "{transport:?}: each has its port: {seen:?}");
            }
        }
    }
}
