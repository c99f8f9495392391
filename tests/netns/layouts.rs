//! Nodes as people have them, with an agent that has its default flags wherever they do: whoever calls is served, whatever the node's interfaces and
//! routes are (P9, P10, P13, P16, P17).

use dataplane_tests::lab::layout::{LAYOUTS, Layout, Proxy};
use std::time::Duration;

/// How long an agent may take to be ready.
const START_TIME: Duration = Duration::from_secs(60);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(1);

macro_rules! layouts {
    ($($name:ident)*) => {
        $(
            /// P9, P10, P13, P16, P17
            #[test]
            fn $name() {
                let layout = LAYOUTS.iter().find(|layout| layout.name == stringify!($name));
                run(layout.expect("no such layout"));
            }
        )*

        #[test]
        fn every_layout_that_any_kernel_can_make_is_tried() {
            let tried: Vec<_> = [$(stringify!($name)),*].to_vec();
            let all = LAYOUTS.iter().filter(|layout| layout.needs.is_empty());
            let all: Vec<_> = all.map(|layout| layout.name).collect();
            assert_eq!(tried, all);
        }
    };
}

layouts!(
    host_routes
    pods_on_a_bridge
    vxlan_overlay
    overlay_without_ethernet
    second_nic_without_default_route
    a_nic_that_comes_later
    pods_of_other_nodes_by_the_second_nic
    clients_answered_by_the_second_nic
    route_to_the_service_range_by_the_second_nic
    clients_behind_a_vpn
    no_default_route
    default_route_to_nowhere
    uplink_in_a_bridge
    pod_on_the_bridge_of_the_nic
    macvlan_of_the_nic
    left_over_from_ipvs
    cache_at_a_cluster_ip
    lb_ips_on_the_node
    pods_that_answer_by_a_road_of_their_own
    routes_by_the_mark_of_a_connection
);

fn run(layout: &'static Layout) {
    let raised = layout.raise().unwrap();
    let _serving = raised.start(Proxy::Portolan, START_TIME).unwrap();
    let wrong = raised.wrong(PATIENCE).unwrap();
    if !wrong.is_empty() {
        raised.lab.tell_agent_logs();
        let drops = raised.lab.node(0).portolan(&["drops"]).unwrap_or_default();
        drops
            .lines()
            .filter(|line| line.split_whitespace().nth(1) != Some("0"))
            .for_each(|line| eprintln!("{line}"));
        panic!("{}:\n{}", layout.name, wrong.join("\n"));
    }
}
