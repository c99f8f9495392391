//! Who answers and which source the endpoint sees, by policy and by where the client is: P4 to P9, P12.

use crate::world::{BOTH, World, ask, ask_many, everywhere, pods};
use dataplane_tests::lab::Answer;
use std::collections::BTreeSet;

/// Asserts what a pod of `node` (from 1) saw of the outside client that called that node's port.
#[track_caller]
pub(crate) fn assert_source_by_place(world: &World, called: usize, answer: &Answer) {
    let local = answer.node == world.node(called).name();
    let expected = if local { world.outside_ip() } else { world.node_source(called) };
    assert_eq!(answer.client_ip(), expected, "node-{called} was called: {answer}");
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
    /// P4, P12: kept for an endpoint of the node that was called, else a node address and a port of the range.
    fn a_node_port_keeps_the_source_for_local_endpoints_only(world) {
        world.apply(&world.node_port_service(0).endpoints(world.webs()));
        for transport in BOTH {
            for node in 1..=3 {
                let answers = ask_many(&world.outside(), transport, world.node_frontend(node, 0));
                assert_eq!(pods(&answers), BTreeSet::from(["web-1", "web-3"]));
                for answer in &answers {
                    assert_source_by_place(world, node, answer);
                    if answer.client_ip() == world.node_source(node) {
                        assert!((61_000..=65_535).contains(&answer.client.port()), "{answer}");
                    }
                }
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
