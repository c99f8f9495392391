//! What is refused and what is met by silence: P1, P2, P3, P13.

use crate::world::{
    BOTH, PORT, TARGET, Tcp, Udp, ask, assert_refused, assert_silent, assert_transport_refused, everywhere,
    on_all_paths, on_both_paths,
};
use dataplane_tests::lab::at;

everywhere! {
    /// P1: any kind of address, from a pod, from the node and from outside.
    fn a_service_without_endpoints_is_refused_at_once(world) {
        world.apply(&world.node_port_service(0));
        for client in [world.in_pod("shell-1"), world.in_pod("shell-3"), world.on_node(1)] {
            assert_refused(&client, world.frontend(0));
        }
        if world.pods_reach_other_nodes() {
            assert_refused(&world.in_pod("shell-1"), world.node_frontend(2, 0));
            assert_refused(&world.in_pod("shell-3"), world.node_frontend(2, 0));
        }
        assert_refused(&world.on_node(1), world.node_frontend(2, 0));
        assert_refused(&world.in_pod("shell-1"), world.node_frontend(1, 0));
        for node in 1..=3 {
            assert_refused(&world.outside(), world.node_frontend(node, 0));
        }
        assert!(world.count(1, "no-endpoints") >= 8);
    }
}

on_all_paths! {
    /// P1: so for every kind of address and every client, over sockets, tc and XDP.
    fn every_kind_of_address_is_refused_without_endpoints(world) {
        world.apply(&world.balanced_service(0));
        let [lb, external] = [world.lb_ip(0), world.external_ip(0)].map(|address| at(address, PORT));
        for to in [lb, external] {
            world.route_from_outside(to.ip(), 1);
        }
        for client in [world.in_pod("shell-1"), world.in_pod("shell-3"), world.on_node(1), world.on_node(3)] {
            for to in [world.frontend(0), world.node_frontend(2, 0), lb, external] {
                assert_refused(&client, to);
            }
        }
        for to in [world.node_frontend(1, 0), lb, external] {
            assert_refused(&world.outside(), to);
        }
        for to in [world.node_frontend(1, 0), at(world.loopback(), world.node_port(0))] {
            assert_refused(&world.on_node(1), to);
        }
    }
}

on_all_paths! {
    /// P2, P3: so for every kind of address where the policy is Local and no endpoint is, over sockets, tc and XDP.
    fn every_kind_of_address_is_silent_without_local_endpoints(world) {
        let service = world.balanced_service(0).internal_local().external_local();
        world.apply(&service.endpoints(world.webs()));
        for client in [world.in_pod("shell-3"), world.on_node(3)] {
            assert_silent(&client, world.frontend(0));
        }
        let [lb, external] = [world.lb_ip(0), world.external_ip(0)].map(|address| at(address, PORT));
        for to in [world.node_frontend(3, 0), lb, external] {
            if to != world.node_frontend(3, 0) {
                world.route_from_outside(to.ip(), 3);
            }
            assert_silent(&world.outside(), to);
        }
        assert!(world.count(3, "no-local-endpoints") >= 10);
    }
}

on_both_paths! {
    /// P1: an endpoint that is not ready is none.
    fn a_service_whose_endpoints_are_not_ready_is_refused_at_once(world) {
        let mut service = world.cluster_service(0).endpoints(world.webs());
        world.apply(&service);
        for transport in BOTH {
            ask(&world.in_pod("shell-1"), transport, world.frontend(0)).unwrap();
        }
        service.endpoints_mut().iter_mut().for_each(|endpoint| endpoint.set_not_ready());
        world.apply(&service);
        assert_refused(&world.in_pod("shell-1"), world.frontend(0));
        assert_refused(&world.on_node(3), world.frontend(0));
    }
}

everywhere! {
    /// P2: internalTrafficPolicy Local where there is no local endpoint.
    fn a_local_cluster_ip_without_local_endpoint_is_silent(world) {
        world.apply(&world.cluster_service(0).internal_local().endpoints(world.webs()));
        assert_silent(&world.in_pod("shell-3"), world.frontend(0));
        assert_silent(&world.on_node(3), world.frontend(0));
        for transport in BOTH {
            for (client, pod) in [(world.in_pod("shell-1"), "web-1"), (world.on_node(2), "web-3")] {
                assert_eq!(ask(&client, transport, world.frontend(0)).unwrap().pod, pod);
            }
        }
        assert!(world.count(3, "no-local-endpoints") >= 4);
    }
}

everywhere! {
    /// P3: externalTrafficPolicy Local where there is no local endpoint, from outside and from another node's pods (P8).
    fn a_local_node_port_without_local_endpoint_is_silent(world) {
        world.apply(&world.node_port_service(0).external_local().endpoints(world.webs()));
        assert_silent(&world.outside(), world.node_frontend(3, 0));
        assert!(world.count(3, "no-local-endpoints") >= 2);
        for transport in BOTH {
            assert_eq!(ask(&world.outside(), transport, world.node_frontend(1, 0)).unwrap().pod, "web-1");
        }
    }
}

everywhere! {
    /// P13
    fn a_port_that_no_service_has_is_refused_at_once(world) {
        world.apply(&world.cluster_service(0).endpoints(world.webs()));
        for client in [world.in_pod("shell-1"), world.in_pod("shell-3"), world.on_node(1), world.on_node(3)] {
            assert_refused(&client, at(world.cluster_ip(0), PORT + 1));
        }
    }
}

on_both_paths! {
    /// P13, F7: the same number with another protocol is another port.
    fn a_port_of_the_other_protocol_is_refused_at_once(world) {
        world.apply(&world.bare_service(0).tcp(PORT, TARGET).endpoints(world.webs()));
        ask(&world.in_pod("shell-1"), Tcp, world.frontend(0)).unwrap();
        assert_transport_refused(&world.in_pod("shell-1"), Udp, world.frontend(0));
        assert_transport_refused(&world.on_node(3), Udp, world.frontend(0));
    }
}

everywhere! {
    /// P13: it would leave the node, and does not.
    fn a_service_address_that_no_service_has_is_silent(world) {
        let nobody = at(world.cluster_ip(100), PORT);
        assert_silent(&world.in_pod("shell-3"), nobody);
        assert_silent(&world.on_node(3), nobody);
        assert!(world.count(3, "unknown-service") >= 4);
    }
}
