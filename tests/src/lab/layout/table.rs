//! The table of them.

use super::{End, Layout, On, Target, Who};
use crate::lab::PodNetwork;
use End::{Here, There};
use On::{Second as AtSecond, Uplink, Vpn as AtVpn};
use Target::{Cached, ClusterIp, LbIp, NodePort};

const PLAIN: Layout = Layout {
    name: "plain",
    pods: PodNetwork::HostRoutes,
    second: &[],
    later: &[],
    lines: &[],
    rules: &[],
    flags: &[],
    cache: &[],
    answered: &[],
    unanswered: &[],
};
const CLUSTER_IPS: &[Target] = &[ClusterIp(Here), ClusterIp(There)];
const NODE_PORTS: &[Target] = &[NodePort(Here, Uplink), NodePort(There, Uplink)];
const FROM_EVERYWHERE: &[(Who, &[Target])] =
    &[(Who::Client, NODE_PORTS), (Who::Node, CLUSTER_IPS), (Who::Pod, CLUSTER_IPS)];

/// All of them.
pub const LAYOUTS: &[Layout] = &[
    Layout { name: "host_routes", answered: FROM_EVERYWHERE, ..PLAIN },
    Layout { name: "pods_on_a_bridge", pods: PodNetwork::Bridge, answered: FROM_EVERYWHERE, ..PLAIN },
    Layout { name: "vxlan_overlay", pods: PodNetwork::Vxlan, answered: FROM_EVERYWHERE, ..PLAIN },
    Layout { name: "overlay_without_ethernet", pods: PodNetwork::Tun, answered: FROM_EVERYWHERE, ..PLAIN },
    Layout {
        name: "second_nic_without_default_route",
        second: &[Who::Node, Who::Second],
        answered: &[
            (Who::Client, NODE_PORTS),
            (Who::Second, &[NodePort(Here, AtSecond), NodePort(There, AtSecond)]),
        ],
        ..PLAIN
    },
    Layout {
        name: "a_nic_that_comes_later",
        later: &[Who::Node, Who::Second],
        answered: &[(Who::Second, &[NodePort(Here, AtSecond), NodePort(There, AtSecond)])],
        ..PLAIN
    },
    Layout {
        name: "pods_of_other_nodes_by_the_second_nic",
        second: &[Who::Node, Who::Other],
        lines: &[
            (
                Who::Node,
                &[
                    "route replace 10.244.2.0/24 via 10.201.0.12 dev eth1",
                    "route replace fd00:10:244:2::/64 via fd00:201::12 dev eth1",
                ],
            ),
            (
                Who::Other,
                &[
                    "route replace 10.244.1.0/24 via 10.201.0.11 dev eth1",
                    "route replace fd00:10:244:1::/64 via fd00:201::11 dev eth1",
                ],
            ),
        ],
        answered: FROM_EVERYWHERE,
        ..PLAIN
    },
    Layout {
        name: "clients_answered_by_the_second_nic",
        second: &[Who::Node, Who::Client],
        lines: &[(
            Who::Node,
            &[
                "route add 192.168.100.200/32 via 10.201.0.200 dev eth1",
                "route add fd00:100::200/128 via fd00:201::200 dev eth1",
            ],
        )],
        answered: &[(Who::Client, NODE_PORTS)],
        ..PLAIN
    },
    Layout {
        name: "route_to_the_service_range_by_the_second_nic",
        second: &[Who::Node, Who::Second],
        lines: &[(
            Who::Node,
            &[
                "route add 10.0.0.0/8 via 10.201.0.200 dev eth1",
                "route add fd00:10::/32 via fd00:201::200 dev eth1",
            ],
        )],
        answered: FROM_EVERYWHERE,
        ..PLAIN
    },
    Layout {
        name: "clients_behind_a_vpn",
        second: &[Who::Node, Who::Vpn],
        answered: &[(
            Who::Vpn,
            &[
                NodePort(Here, AtVpn),
                NodePort(There, AtVpn),
                NodePort(Here, Uplink),
                NodePort(There, Uplink),
                ClusterIp(Here),
                ClusterIp(There),
            ],
        )],
        ..PLAIN
    },
    Layout {
        name: "no_default_route",
        lines: &[(Who::Node, &["route del 0.0.0.0/0", "route del ::/0"])],
        answered: &[(Who::Client, NODE_PORTS), (Who::Pod, CLUSTER_IPS)],
        ..PLAIN
    },
    Layout {
        name: "default_route_to_nowhere",
        lines: &[(
            Who::Node,
            &[
                "link add hole type bridge mcast_snooping 0",
                "link set hole arp off up",
                "addr add 203.0.113.254/31 dev hole",
                "addr add fd00:203::1/64 dev hole nodad",
                "route replace 0.0.0.0/0 dev hole",
                "route replace ::/0 dev hole",
            ],
        )],
        answered: FROM_EVERYWHERE,
        ..PLAIN
    },
    Layout {
        name: "uplink_in_a_bridge",
        lines: &[(
            Who::Node,
            &[
                "addr flush dev eth0",
                "link add br0 type bridge mcast_snooping 0",
                "link set eth0 master br0",
                "link set br0 up",
                "addr add 192.168.100.11/24 dev br0",
                "addr add fd00:100::11/64 dev br0 nodad",
                "route replace 0.0.0.0/0 via 192.168.100.1 dev br0",
                "route replace ::/0 via fd00:100::1 dev br0",
                "route replace 10.244.2.0/24 via 192.168.100.12 dev br0",
                "route replace fd00:10:244:2::/64 via fd00:100::12 dev br0",
            ],
        )],
        answered: FROM_EVERYWHERE,
        ..PLAIN
    },
    Layout {
        name: "macvlan_of_the_nic",
        lines: &[
            (
                Who::Node,
                &[
                    // Else it would answer for the address too, whose interface is another now.
                    "link set eth0 arp off",
                    "addr flush dev eth0",
                    "link add link eth0 name mv0 type macvlan mode bridge",
                    "link set mv0 up",
                    "addr add 192.168.100.11/24 dev mv0",
                    "addr add fd00:100::11/64 dev mv0 nodad",
                    "route replace 0.0.0.0/0 via 192.168.100.1 dev mv0",
                    "route replace ::/0 via fd00:100::1 dev mv0",
                    "route replace 10.244.2.0/24 via 192.168.100.12 dev mv0",
                    "route replace fd00:10:244:2::/64 via fd00:100::12 dev mv0",
                ],
            ),
            // They knew the NIC's own link-layer address, and the macvlan has another.
            (Who::Client, &["neigh flush all"]),
        ],
        answered: FROM_EVERYWHERE,
        ..PLAIN
    },
    Layout {
        name: "left_over_from_ipvs",
        lines: &[
            (
                Who::Node,
                &[
                    "link add kube-ipvs0 type bridge mcast_snooping 0",
                    "addr add 10.96.0.10/32 dev kube-ipvs0",
                    "addr add 10.96.0.20/32 dev kube-ipvs0",
                    "addr add fd00:10:96::10/128 dev kube-ipvs0 nodad",
                    "addr add fd00:10:96::20/128 dev kube-ipvs0 nodad",
                    "link set kube-ipvs0 up",
                ],
            ),
            (
                Who::Client,
                &[
                    "route add 10.96.0.0/16 via 192.168.100.11 dev eth0",
                    "route add fd00:10:96::/108 via fd00:100::11 dev eth0",
                ],
            ),
        ],
        answered: &[
            (Who::Node, CLUSTER_IPS),
            (Who::Pod, CLUSTER_IPS),
            (
                Who::Client,
                &[NodePort(Here, Uplink), NodePort(There, Uplink), ClusterIp(Here), ClusterIp(There)],
            ),
        ],
        unanswered: &[(Who::Client, &[NodePort(Here, On::ClusterIp)])],
        ..PLAIN
    },
    Layout {
        name: "cache_at_a_cluster_ip",
        lines: &[(
            Who::Node,
            &[
                "link add nodelocal type bridge mcast_snooping 0",
                "link set nodelocal up",
                "addr add 10.96.0.53/32 dev nodelocal",
                "addr add fd00:10:96::53/128 dev nodelocal nodad",
            ],
        )],
        // What NodeLocal DNSCache has iptables do: connection tracking leaves its packets alone.
        rules: &[
            "add table inet nodelocal",
            "add chain inet nodelocal in { type filter hook prerouting priority raw; }",
            "add chain inet nodelocal out { type filter hook output priority raw; }",
            "add rule inet nodelocal in ip daddr 10.96.0.53 meta l4proto { tcp, udp } th dport 80 notrack",
            "add rule inet nodelocal in ip6 daddr fd00:10:96::53 meta l4proto { tcp, udp } th dport 80 notrack",
            "add rule inet nodelocal out ip daddr 10.96.0.53 meta l4proto { tcp, udp } th dport 80 notrack",
            "add rule inet nodelocal out ip6 daddr fd00:10:96::53 meta l4proto { tcp, udp } th dport 80 notrack",
            "add rule inet nodelocal out ip saddr 10.96.0.53 meta l4proto { tcp, udp } th sport 80 notrack",
            "add rule inet nodelocal out ip6 saddr fd00:10:96::53 meta l4proto { tcp, udp } th sport 80 notrack",
        ],
        cache: &["10.96.0.53", "fd00:10:96::53"],
        answered: &[(Who::Pod, &[Cached, ClusterIp(Here)]), (Who::Node, &[Cached, ClusterIp(There)])],
        ..PLAIN
    },
    Layout {
        name: "lb_ips_on_the_node",
        lines: &[(
            Who::Node,
            &[
                "link add lb0 type bridge mcast_snooping 0",
                "link set lb0 up",
                "addr add 172.20.0.10/32 dev lb0",
                "addr add 172.20.0.20/32 dev lb0",
                "addr add fd00:172:20::10/128 dev lb0 nodad",
                "addr add fd00:172:20::20/128 dev lb0 nodad",
            ],
        )],
        answered: &[(Who::Node, &[LbIp(Here), LbIp(There)]), (Who::Pod, &[LbIp(Here), LbIp(There)])],
        ..PLAIN
    },
    Layout {
        name: "pods_that_answer_by_a_road_of_their_own",
        lines: &[(
            Who::Server,
            &[
                "link add vpn0 type bridge mcast_snooping 0",
                "link set vpn0 up",
                "addr add 10.99.0.2/24 dev vpn0",
                "addr add fd00:99::2/64 dev vpn0 nodad",
                "route add 10.244.0.0/16 via 10.244.1.1 dev eth0",
                "route add fd00:10:244::/48 via fd00:10:244:1::1 dev eth0",
                "route add 192.168.100.11/32 via 10.244.1.1 dev eth0",
                "route add fd00:100::11/128 via fd00:10:244:1::1 dev eth0",
                "route replace 0.0.0.0/0 via 10.99.0.1 dev vpn0",
                "route replace ::/0 via fd00:99::1 dev vpn0",
            ],
        )],
        answered: &[(Who::Client, NODE_PORTS), (Who::Pod, CLUSTER_IPS)],
        ..PLAIN
    },
    Layout {
        name: "routes_by_the_mark_of_a_connection",
        second: &[Who::Node],
        // What AWS' plugin does for pods whose address is of the second NIC.
        lines: &[(
            Who::Node,
            &[
                "route add 0.0.0.0/0 via 10.201.0.200 dev eth1 table 2",
                "route add ::/0 via fd00:201::200 dev eth1 table 2",
                "-4 rule add fwmark 0x80/0x80 lookup main priority 1024",
                "-6 rule add fwmark 0x80/0x80 lookup main priority 1024",
                "-4 rule add from 10.244.1.2 lookup 2 priority 1536",
                "-6 rule add from fd00:10:244:1::2 lookup 2 priority 1536",
            ],
        )],
        rules: &[
            "add table inet plugin",
            "add chain inet plugin in { type filter hook prerouting priority mangle; }",
            "add rule inet plugin in iifname eth0 fib daddr type local ct mark set ct mark or 0x80",
            "add rule inet plugin in iifname \"veth*\" meta mark set ct mark and 0x80",
        ],
        flags: &["--connection-mark-bit=7"],
        answered: &[(Who::Client, NODE_PORTS)],
        ..PLAIN
    },
];
