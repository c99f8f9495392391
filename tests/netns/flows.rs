//! What becomes of flows when their endpoint goes: C1, C2, T5; and what follows Services live: F1, F2, F7.

use crate::world::{
    BOTH, PORT, TARGET, Tcp, Udp, ask, ask_many, assert_refused, assert_transport_refused, eventually,
    everywhere, in_kinds, on_all_paths, on_both_paths, pods,
};
use dataplane_tests::lab::{Failure, ask_datagram, at, next_source};
use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long an answer or a refusal may take on a busy machine. Nothing is dropped here: a shorter time would only leave answers to
/// earlier datagrams to be taken for those to later ones.
const ANSWER: Duration = Duration::from_secs(5);

everywhere! {
    /// C1: the same socket, which never pauses, follows its endpoint; through no endpoints at all and back.
    fn a_udp_flow_follows_the_endpoints(world) {
        let mut service = world.cluster_service(0);
        world.apply(&service);
        let socket = world.pod("shell-1").place().udp_socket(Some(world.any_port())).unwrap();
        socket.connect(world.frontend(0)).unwrap();
        assert_eq!(ask_datagram(&socket, None, ANSWER), Err(Failure::Refused), "before there are endpoints");
        for (name, other) in [("web-1", "web-3"), ("web-3", "web-1")] {
            service.set_endpoints([world.pod(name).endpoint()]);
            world.apply(&service);
            let answers = || ask_datagram(&socket, None, ANSWER).is_ok_and(|answer| answer.pod == name);
            eventually(&format!("the socket is answered by {name}"), answers);
            service.set_endpoints([world.pod(other).endpoint()]);
            world.apply(&service);
            let moved = || ask_datagram(&socket, None, ANSWER).is_ok_and(|answer| answer.pod == other);
            eventually(&format!("the socket has moved to {other}"), moved);
            service.set_endpoints([]);
            world.apply(&service);
            let refused = || ask_datagram(&socket, None, ANSWER) == Err(Failure::Refused);
            eventually("the socket is refused", refused);
        }
    }
}

in_kinds! {
    packet_path_without_checksums_strict PacketPath
    bridge_packet_path_strict BridgePacketPath
    behind_a_router_generic_xdp_packet_path RoutedGenericXdp
    vxlan_packet_path_strict Vxlan
    tun_native_xdp_packet_path_strict TunXdp;
    /// A client that has called a Service calls its endpoint itself, from the same port.
    fn a_port_that_called_a_service_can_call_its_endpoint(world) {
        world.apply(&world.cluster_service(0).endpoints([world.pod("web-3").endpoint()]));
        let endpoint = at(world.pod_ip("web-3"), TARGET);
        for name in ["shell-1", "shell-3"] {
            let (client, pod) = (world.in_pod(name), world.pod(name));
            for _ in 0..3 {
                let mut source = next_source(pod.place(), world.family());
                let mut called = client.clone().source(source).connect(world.frontend(0)).unwrap();
                assert_eq!(called.ask().unwrap().pod, "web-3");
                socket2::SockRef::from(called.get_ref()).set_linger(Some(Duration::ZERO)).unwrap();
                drop(called);
                let answer = client.clone().source(source).tcp(endpoint).unwrap();
                source.set_ip(answer.client_ip());
                assert_eq!(answer.client, source);
            }
        }
    }
}

/// Sends datagrams without a pause until it is told to end: when each was sent, and what came of it.
fn talk(
    socket: &UdpSocket,
    end: &AtomicBool,
    count: &AtomicUsize,
) -> Vec<(Instant, Result<String, Failure>)> {
    let mut outcomes = Vec::new();
    while !end.load(Ordering::Relaxed) {
        let sent = Instant::now();
        outcomes.push((sent, ask_datagram(socket, None, ANSWER).map(|answer| answer.pod)));
        count.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
    }
    outcomes
}

/// Within what time a UDP flow has left an endpoint after the kernel was told.
const MOVED: Duration = Duration::from_millis(100);

on_all_paths! {
    /// C1: a flow that never pauses follows the endpoints at once: one that left, one that does not serve any more, none at all, one
    /// that comes back; and if it began before there was any.
    fn a_udp_flow_that_never_pauses_follows_at_once(world) {
        let mut service = world.node_port_service(0);
        world.apply(&service);
        let sockets = [
            (world.pod("shell-1").place().clone(), world.frontend(0)),
            (world.lab().client().clone(), world.node_frontend(3, 0)),
        ]
        .map(|(place, to)| {
            let socket = place.udp_socket(Some(world.any_port())).unwrap();
            socket.connect(to).unwrap();
            socket
        });
        let endpoint = |name: &str| world.pod(name).endpoint();
        let mut draining = endpoint("web-3");
        draining.set_terminating(false);
        let mut unready = endpoint("web-3");
        unready.set_not_ready();
        let steps = [
            (vec![], Err(Failure::Refused)),
            (vec![endpoint("web-1")], Ok("web-1")),
            (vec![endpoint("web-3")], Ok("web-3")),
            (vec![draining, endpoint("web-1")], Ok("web-1")),
            (vec![], Err(Failure::Refused)),
            (vec![endpoint("web-3")], Ok("web-3")),
            (vec![unready], Err(Failure::Refused)),
            (vec![endpoint("web-3")], Ok("web-3")),
        ];
        let (end, counts) = (AtomicBool::new(false), [AtomicUsize::new(0), AtomicUsize::new(0)]);
        std::thread::scope(|scope| {
            let talks = [0, 1].map(|at| {
                let (socket, end, count) = (&sockets[at], &end, &counts[at]);
                scope.spawn(move || talk(socket, end, count))
            });
            let mut expected = Vec::new();
            for (endpoints, outcome) in steps {
                service.set_endpoints(endpoints);
                world.apply(&service);
                let from = Instant::now() + MOVED;
                std::thread::sleep(MOVED);
                let before = counts.each_ref().map(|count| count.load(Ordering::Relaxed));
                eventually("both have sent some datagrams since", || {
                    counts.iter().zip(before).all(|(count, before)| count.load(Ordering::Relaxed) >= before + 10)
                });
                expected.push((from, Instant::now(), outcome.map(str::to_owned)));
            }
            end.store(true, Ordering::Relaxed);
            for talk in talks {
                let outcomes = talk.join().unwrap();
                for (number, (from, to, expected)) in expected.iter().enumerate() {
                    let within = outcomes.iter().filter(|(time, _)| from <= time && time <= to);
                    let found: Vec<_> = within.map(|(_, outcome)| outcome.clone()).collect();
                    assert!(!found.is_empty(), "step {number}: no datagram");
                    assert!(found.iter().all(|outcome| outcome == expected), "step {number}: {found:?}");
                }
            }
        });
    }
}

everywhere! {
    /// C2, T5: an open connection stays with an endpoint that drains, new ones go elsewhere.
    fn a_draining_endpoint_keeps_its_connections_and_gets_no_new_ones(world) {
        let mut service = world.node_port_service(0).endpoints(world.webs());
        world.apply(&service);
        for (client, to) in [
            (world.in_pod("shell-3"), world.frontend(0)),
            (world.outside(), world.node_frontend(3, 0)),
            (world.outside(), world.node_frontend(1, 0)),
        ] {
            let mut streams: Vec<_> = (0..24).map(|_| client.connect(to).unwrap()).collect();
            let owners: Vec<_> = streams.iter_mut().map(|stream| stream.ask().unwrap().pod).collect();
            assert!(owners.iter().any(|pod| pod == "web-1"), "{owners:?}");
            service.change("web-1", |endpoint| endpoint.set_terminating(true));
            world.apply(&service);
            assert_eq!(pods(&ask_many(&client, Tcp, to)), BTreeSet::from(["web-3"]));
            service.change("web-1", |endpoint| endpoint.set_terminating(false));
            world.apply(&service);
            for (stream, owner) in streams.iter_mut().zip(&owners) {
                assert_eq!(stream.ask().unwrap().pod, *owner, "{to}");
            }
            service.set_endpoints(world.webs());
            world.apply(&service);
        }
    }
}

on_both_paths! {
    /// T5, F6: endpoints that only drain serve when no other is there.
    fn draining_endpoints_serve_when_no_other_is_ready(world) {
        let mut service = world.cluster_service(0).endpoints(world.webs());
        service.endpoints_mut().iter_mut().for_each(|endpoint| endpoint.set_terminating(true));
        world.apply(&service);
        for transport in BOTH {
            assert_eq!(pods(&ask_many(&world.in_pod("shell-3"), transport, world.frontend(0))).len(), 2);
        }
    }
}

on_both_paths! {
    /// F7: removing one protocol's port stops only that one.
    fn removing_the_udp_port_leaves_the_tcp_port(world) {
        world.apply(&world.cluster_service(0).endpoints(world.webs()));
        ask(&world.in_pod("shell-1"), Udp, world.frontend(0)).unwrap();
        world.apply(&world.bare_service(0).tcp(PORT, crate::world::TARGET).endpoints(world.webs()));
        ask(&world.in_pod("shell-1"), Tcp, world.frontend(0)).unwrap();
        assert_transport_refused(&world.in_pod("shell-1"), Udp, world.frontend(0));
    }
}

on_both_paths! {
    /// F2: the label that gives a Service to another proxy takes effect live, both ways.
    fn the_proxy_name_label_comes_and_goes(world) {
        let service = world.cluster_service(0).endpoints(world.webs());
        world.apply(&service);
        ask(&world.in_pod("shell-1"), Tcp, world.frontend(0)).unwrap();
        world.apply(&service.clone().label("service.kubernetes.io/service-proxy-name", "another"));
        let client = world.in_pod("shell-1").timeout(Duration::from_millis(400));
        eventually("the Service is nobody's", || ask(&client, Tcp, world.frontend(0)) == Err(Failure::TimedOut));
        world.apply(&service);
        ask(&world.in_pod("shell-1"), Tcp, world.frontend(0)).unwrap();
    }
}

on_both_paths! {
    /// F1: a Service that is deleted is gone, and its address with it.
    fn a_deleted_service_leaves_nothing(world) {
        let service = world.cluster_service(0).endpoints(world.webs());
        world.apply(&service);
        ask(&world.in_pod("shell-1"), Tcp, world.frontend(0)).unwrap();
        world.delete(&service);
        let client = world.in_pod("shell-1").timeout(Duration::from_millis(400));
        eventually("nobody answers", || ask(&client, Tcp, world.frontend(0)) == Err(Failure::TimedOut));
    }
}

on_both_paths! {
    /// Z5, Z2: a broken object costs itself only.
    fn a_broken_manifest_costs_nobody_else(world) {
        world.apply(&world.cluster_service(0).endpoints(world.webs()));
        let manifests = world.lab().manifests();
        let file = format!("broken-{}.yaml", world.cluster_ip(0));
        let port = 70_000;
        manifests
            .write(&file, &format!("apiVersion: v1\nkind: Service\nmetadata: {{name: broken}}\nspec: {{clusterIP: \"{}\", ports: [{{port: {port}}}]}}\n---\n{{{{\n", world.cluster_ip(9)))
            .unwrap();
        world.settle();
        ask(&world.in_pod("shell-1"), Tcp, world.frontend(0)).unwrap();
        world.apply(&world.cluster_service(1).endpoints(world.webs()));
        ask(&world.in_pod("shell-1"), Tcp, world.frontend(1)).unwrap();
        manifests.remove(&file).unwrap();
    }
}

everywhere! {
    /// Z4: what is no Service's goes its way: pod to pod, outside to node.
    fn other_traffic_goes_its_way(world) {
        for transport in BOTH {
            let direct = dataplane_tests::lab::at(world.pod_ip("web-3"), crate::world::TARGET);
            assert_eq!(ask(&world.in_pod("shell-1"), transport, direct).unwrap().pod, "web-3");
            let node = dataplane_tests::lab::at(world.node_ip(2), crate::world::HOST_TARGET);
            assert_eq!(ask(&world.outside(), transport, node).unwrap().pod, "host-2");
        }
        let nobody = dataplane_tests::lab::at(world.node_ip(2), 9);
        assert_refused(&world.outside(), nobody);
    }
}
