//! Nodes as people have them, with an agent that has its default flags wherever they do: whoever calls is served, whatever the node's interfaces and
//! routes are (P9, P10, P13, P16, P17).

use crate::world::{BOTH, SILENCE, ask};
use dataplane_tests::lab::Family;
use dataplane_tests::lab::layout::{LAYOUTS, Layout};
use std::time::{Duration, Instant};

/// How long an interface that has just come may take to be served.
const SERVED_WITHIN: Duration = Duration::from_secs(5);

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
        fn every_layout_is_tried() {
            let tried: Vec<_> = [$(stringify!($name)),*].to_vec();
            let all: Vec<_> = LAYOUTS.iter().map(|layout| layout.name).collect();
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
    macvlan_of_the_nic
    left_over_from_ipvs
    cache_at_a_cluster_ip
    lb_ips_on_the_node
    pods_that_answer_by_a_road_of_their_own
    routes_by_the_mark_of_a_connection
);

fn run(layout: &'static Layout) {
    let raised = layout.raise().unwrap();
    raised.start_agent().unwrap();
    let mut wrong = Vec::new();
    let begun = Instant::now();
    for family in Family::BOTH {
        for (who, targets) in layout.answered {
            let client = raised.client(*who).unwrap().timeout(Duration::from_secs(1));
            for (target, transport) in
                targets.iter().flat_map(|target| BOTH.map(|transport| (target, transport)))
            {
                let to = raised.address(*target, family);
                let mut answer = ask(&client, transport, to);
                while answer.is_err() && !layout.later.is_empty() && begun.elapsed() < SERVED_WITHIN {
                    answer = ask(&client, transport, to);
                }
                if answer.as_ref().map(|answer| answer.pod.as_str()) != Ok(target.answers()) {
                    let answer = answer.map(|answer| answer.text);
                    wrong.push(format!("{who:?} {transport:?} {target:?} {to}: {answer:?}"));
                }
            }
        }
        for (who, targets) in layout.unanswered {
            let client = raised.client(*who).unwrap().timeout(SILENCE);
            for (target, transport) in
                targets.iter().flat_map(|target| BOTH.map(|transport| (target, transport)))
            {
                let to = raised.address(*target, family);
                if let Ok(answer) = ask(&client, transport, to) {
                    wrong.push(format!("{who:?} {transport:?} {target:?} {to}: {}", answer.text));
                }
            }
        }
    }
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
