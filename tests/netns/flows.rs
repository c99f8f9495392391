//! What becomes of flows when their endpoint goes: C1, C2, T5; and what follows Services live: F1, F2, F7.

use crate::world::{
    BOTH, PORT, Tcp, Udp, ask, ask_many, assert_refused, assert_transport_refused, eventually, everywhere,
    on_both_paths, pods,
};
use dataplane_tests::lab::{Failure, ask_datagram};
use std::collections::BTreeSet;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_millis(700);

everywhere! {
    /// C1: the same socket, which never pauses, follows its endpoint; through no endpoints at all and back.
    fn a_udp_flow_follows_the_endpoints(world) {
        let mut service = world.cluster_service(0);
        world.apply(&service);
        let socket = world.pod("shell-1").place().udp_socket(Some(world.any_port())).unwrap();
        socket.connect(world.frontend(0)).unwrap();
        assert_eq!(ask_datagram(&socket, None, PATIENCE), Err(Failure::Refused), "before there are endpoints");
        for (name, other) in [("web-1", "web-3"), ("web-3", "web-1")] {
            service.set_endpoints([world.pod(name).endpoint()]);
            world.apply(&service);
            let answers = || ask_datagram(&socket, None, PATIENCE).is_ok_and(|answer| answer.pod == name);
            eventually(&format!("the socket is answered by {name}"), answers);
            service.set_endpoints([world.pod(other).endpoint()]);
            world.apply(&service);
            let moved = || ask_datagram(&socket, None, PATIENCE).is_ok_and(|answer| answer.pod == other);
            eventually(&format!("the socket has moved to {other}"), moved);
            service.set_endpoints([]);
            world.apply(&service);
            let refused = || ask_datagram(&socket, None, PATIENCE) == Err(Failure::Refused);
            eventually("the socket is refused", refused);
        }
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
