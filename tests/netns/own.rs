//! The node's own node ports, and clients that are their own endpoints: P11, P18.

use crate::world::{
    BOTH, HOST_TARGET, PATIENCE, PORT, SILENCE, Tcp, Udp, ask, ask_many, assert_silent, at_once, eventually,
    everywhere, in_kinds, on_both_paths,
};
use dataplane_tests::lab::{ask_datagram, at, next_source};

everywhere! {
    /// P11: a pod reaches itself through its ClusterIP, and sees an address of its node.
    fn a_pod_reaches_itself_through_its_service(world) {
        let web = world.pod("web-1");
        world.apply(&world.node_port_service(0).endpoints([web.endpoint()]));
        for to in [world.frontend(0), world.node_frontend(1, 0)] {
            for transport in BOTH {
                let answer = ask(&world.in_pod("web-1"), transport, to).unwrap();
                assert_eq!(answer.pod, "web-1", "{transport:?} {to}");
            }
        }
    }
}

everywhere! {
    /// P11: the node reaches a server in its own network through a ClusterIP.
    fn a_node_reaches_itself_through_a_cluster_ip(world) {
        let service = world.bare_service(0).tcp(PORT, HOST_TARGET).udp(PORT, HOST_TARGET);
        world.apply(&service.endpoints([world.host_endpoint(1)]));
        for transport in BOTH {
            assert_eq!(ask(&world.on_node(1), transport, world.frontend(0)).unwrap().pod, "host-1");
            assert_eq!(ask(&world.on_node(3), transport, world.frontend(0)).unwrap().pod, "host-1");
            // A UDP server on all addresses answers from the address nearest to the client, whoever translates: a pod behind a
            // tunnel hears nothing from the one that it called, and its own node's pods neither.
            if world.pods_reach_other_nodes() && !(transport == Udp && world.kind().has_tunnel()) {
                assert_eq!(ask(&world.in_pod("shell-3"), transport, world.frontend(0)).unwrap().pod, "host-1");
            }
        }
        assert_eq!(ask(&world.in_pod("shell-1"), Tcp, world.frontend(0)).unwrap().pod, "host-1");
    }
}

everywhere! {
    /// P9: the first packet to a node whose link-layer address is not known waits for that one, not for its route's.
    fn the_first_packet_to_a_neighbour_arrives(world) {
        world.apply(&world.cluster_service(0).endpoints([world.pod("web-3").endpoint()]));
        for transport in BOTH {
            for client in [world.on_node(1), world.in_pod("shell-1")] {
                for _ in 0..3 {
                    at_once(&format!("the first answer over {transport:?}"), || {
                        world.node(1).place().ip(&["neigh flush all".into()]).unwrap();
                        assert_eq!(ask(&client, transport, world.frontend(0)).unwrap().pod, "web-3");
                    });
                }
            }
        }
    }
}

everywhere! {
    /// P18: works from the node's own processes, over TCP and UDP, on every address of the node.
    fn a_node_port_answers_on_loopback_from_the_node_itself(world) {
        if !world.kind().serves_own_node_ports() {
            return;
        }
        world.apply(&world.node_port_service(0).endpoints(world.webs()));
        for node in [1, 3] {
            let client = world.on_node(node);
            for to in [at(world.loopback(), world.node_port(0)), world.node_frontend(node, 0)] {
                for transport in BOTH {
                    assert_eq!(crate::world::pods(&ask_many(&client, transport, to)).len(), 2, "{transport:?} {to}");
                }
                let answer = client.udp_unconnected(to).unwrap();
                assert!(["web-1", "web-3"].contains(&answer.pod.as_str()));
            }
        }
    }
}

on_both_paths! {
    /// P18: a pod's loopback is its own.
    fn a_node_port_on_loopback_is_not_for_pods(world) {
        world.apply(&world.node_port_service(0).endpoints(world.webs()));
        let to = at(world.loopback(), world.node_port(0));
        for transport in BOTH {
            assert!(ask(&world.in_pod("shell-1").timeout(SILENCE), transport, to).is_err());
        }
    }
}

everywhere! {
    /// P10: a client outside that has a route to the node reaches a ClusterIP; the endpoint sees the node.
    fn a_cluster_ip_routed_to_a_node_serves_clients_outside(world) {
        world.route_from_outside(world.cluster_ip(0), 2);
        world.apply(&world.cluster_service(0).endpoints(world.webs()));
        for transport in BOTH {
            for answer in ask_many(&world.outside(), transport, world.frontend(0)) {
                assert_ne!(answer.client_ip(), world.outside_ip(), "{answer}");
                assert!(world.node_sources(2).contains(&answer.client_ip()), "{answer}");
            }
        }
    }
}

everywhere! {
    /// P16, P17: no other address of the lab answers on the node port.
    fn a_node_port_answers_on_no_pods_address(world) {
        world.apply(&world.node_port_service(0).endpoints(world.webs()));
        let pod = at(world.pod_ip("shell-3"), world.node_port(0));
        for transport in BOTH {
            assert!(ask(&world.in_pod("shell-1").timeout(SILENCE), transport, pod).is_err());
        }
        // P13: and on a ClusterIP it is a port that no Service has.
        crate::world::assert_refused(&world.in_pod("shell-1"), at(world.cluster_ip(0), world.node_port(0)));
        assert_silent(&world.in_pod("shell-1"), at(world.cluster_ip(150), PORT));
    }
}

in_kinds! {
    plain Plain
    bridge_without_checksums_sockets_of_hosts BridgeHostSockets;
    /// P15, P6: an LB IP or external IP that the node has on an interface of its own, as where something announces it, is reached by
    /// the node's own TCP and UDP, which leave by no interface.
    fn a_node_reaches_a_balanced_address_on_its_own_interface(world) {
        world.apply(&world.balanced_service(0).endpoints(world.webs()));
        let client = world.on_node(1).timeout(SILENCE);
        for ip in [world.lb_ip(0), world.external_ip(0)] {
            let (bits, to) = (if ip.is_ipv4() { 32 } else { 128 }, at(ip, PORT));
            world.node(1).place().ip(&[format!("addr add {ip}/{bits} dev lo")]).unwrap();
            for transport in BOTH {
                eventually(&format!("{transport:?} reaches {to}"), || ask(&client, transport, to).is_ok());
                assert_eq!(crate::world::pods(&ask_many(&world.on_node(1), transport, to)).len(), 2);
            }
            assert!(client.udp_unconnected(to).is_ok(), "{to}");
            world.node(1).place().ip(&[format!("addr del {ip}/{bits} dev lo")]).unwrap();
        }
    }
}

in_kinds! {
    plain Plain
    bridge_without_checksums_sockets_of_hosts BridgeHostSockets;
    /// P18: one socket of the node that calls several addresses of a node port is answered from the one that it called.
    fn one_socket_calls_several_addresses_of_a_node_port(world) {
        world.apply(&world.node_port_service(0).endpoints([world.pod("web-1").endpoint()]));
        let place = world.node(1).place();
        let socket = place.udp_socket(Some(next_source(place, world.family()))).unwrap();
        for _ in 0..2 {
            for ip in [world.node_ip(1), world.gateway(1), world.loopback()] {
                let answer = ask_datagram(&socket, Some(at(ip, world.node_port(0))), PATIENCE);
                assert_eq!(answer.unwrap().pod, "web-1");
            }
        }
    }
}
