//! The table of them.

use super::{End, Layout, On, Target, Who};
use crate::lab::PodNetwork;
use End::{Beside, Here, There};
use On::{Second as AtSecond, Uplink, Vpn as AtVpn};
use Target::{Cached, ClusterIp, LbIp, NodePort};

/// A node as the laboratory makes it; nobody asks anything.
pub const PLAIN: Layout = Layout {
    name: "plain",
    about: "",
    pods: PodNetwork::HostRoutes,
    second: &[],
    later: &[],
    vpn_delay_ms: 0,
    lines: &[],
    commands: &[],
    rules: &[],
    flags: &[],
    beside: false,
    cache: &[],
    answered: &[],
    unanswered: &[],
    cut_up: &[],
    needs: &[],
};
const CLUSTER_IPS: &[Target] = &[ClusterIp(Here), ClusterIp(There)];
const NODE_PORTS: &[Target] = &[NodePort(Here, Uplink), NodePort(There, Uplink)];
const FROM_EVERYWHERE: &[(Who, &[Target])] =
    &[(Who::Client, NODE_PORTS), (Who::Node, CLUSTER_IPS), (Who::Pod, CLUSTER_IPS)];

/// The NIC of `node-1` is a port of a bridge, and that has all that the NIC had.
const NIC_IN_A_BRIDGE: &[(Who, &[&str])] = &[(
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
)];

/// All of them.
pub const LAYOUTS: &[Layout] = &[
    Layout {
        name: "host_routes",
        about: "a veth and a host route for each pod, as kindnet and Calico make them",
        answered: FROM_EVERYWHERE,
        ..PLAIN
    },
    Layout {
        name: "pods_on_a_bridge",
        about: "pods on a bridge that has the gateway's address, as flannel, kubenet and k3s make them",
        pods: PodNetwork::Bridge,
        answered: FROM_EVERYWHERE,
        ..PLAIN
    },
    Layout {
        name: "vxlan_overlay",
        about: "pods of other nodes by a VXLAN device, as with flannel and Calico",
        pods: PodNetwork::Vxlan,
        answered: FROM_EVERYWHERE,
        cut_up: &[(Who::Client, NODE_PORTS)],
        ..PLAIN
    },
    Layout {
        name: "overlay_without_ethernet",
        about: "pods of other nodes by a TUN device without Ethernet headers, as IPIP and WireGuard have none",
        pods: PodNetwork::Tun,
        answered: FROM_EVERYWHERE,
        ..PLAIN
    },
    Layout {
        name: "second_nic_without_default_route",
        about: "a second NIC with an address of the node and without the default route: private networks of clouds",
        second: &[Who::Node, Who::Second],
        answered: &[
            (Who::Client, NODE_PORTS),
            (Who::Second, &[NodePort(Here, AtSecond), NodePort(There, AtSecond)]),
        ],
        ..PLAIN
    },
    Layout {
        name: "a_nic_that_comes_later",
        about: "that NIC, added when everything runs",
        later: &[Who::Node, Who::Second],
        answered: &[(Who::Second, &[NodePort(Here, AtSecond), NodePort(There, AtSecond)])],
        ..PLAIN
    },
    Layout {
        name: "pods_of_other_nodes_by_the_second_nic",
        about: "the default route by one NIC, the way to other nodes' pods by the other",
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
        about: "clients that come by one NIC and are answered by the other",
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
        about: "a route for 10.0.0.0/8, which holds the ClusterIPs, by the second NIC",
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
        about: "clients of a VPN that ends on the node (a TUN device), to node ports and ClusterIPs",
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
        about: "no default route: air-gapped nodes",
        lines: &[(Who::Node, &["route del 0.0.0.0/0", "route del ::/0"])],
        answered: &[(Who::Client, NODE_PORTS), (Who::Pod, CLUSTER_IPS)],
        ..PLAIN
    },
    Layout {
        name: "default_route_to_nowhere",
        about: "a default route without a gateway, by a bridge that nobody is behind",
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
        about: "the NIC in a bridge that has the node's address, as virtual machines' hosts have it",
        lines: NIC_IN_A_BRIDGE,
        answered: FROM_EVERYWHERE,
        ..PLAIN
    },
    Layout {
        name: "pod_on_the_bridge_of_the_nic",
        about: "a pod with an address of the nodes' network on that bridge, which answers clients there itself: macvlan, SR-IOV, ipvlan alike",
        lines: NIC_IN_A_BRIDGE,
        beside: true,
        answered: &[
            (Who::Client, &[NodePort(Beside, Uplink), NodePort(Here, Uplink)]),
            (Who::Node, &[ClusterIp(Beside)]),
        ],
        ..PLAIN
    },
    Layout {
        name: "macvlan_of_the_nic",
        about: "the node's address on a macvlan of its NIC",
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
        about: "the interface kube-ipvs0 with all ClusterIPs, left over from kube-proxy's mode ipvs",
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
        about: "NodeLocal DNSCache: a server of the node at the ClusterIP, with its rules of netfilter",
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
        about: "load balancer addresses on an interface of the node, as kube-vip and keepalived put them there",
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
        about: "a pod whose default route is a device of its own: sidecar VPNs, Multus",
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
        about: "pods with addresses of the second NIC and routes by the connection's mark: the AWS VPC CNI (with `--connection-mark-bit`)",
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
    Layout {
        name: "default_route_by_a_dummy",
        about: "a default route by a dummy interface, as k3s' documents have air-gapped nodes make it",
        lines: &[(
            Who::Node,
            &[
                "link add hole type dummy",
                "link set hole up",
                "addr add 203.0.113.254/31 dev hole",
                "addr add fd00:203::1/64 dev hole nodad",
                "route replace 0.0.0.0/0 via 203.0.113.255 dev hole metric 1000",
                "route replace ::/0 dev hole",
            ],
        )],
        answered: FROM_EVERYWHERE,
        needs: &["dummy"],
        ..PLAIN
    },
    Layout {
        name: "left_over_from_ipvs_on_a_dummy",
        about: "kube-ipvs0 as mode ipvs makes it, a dummy interface",
        lines: &[(
            Who::Node,
            &[
                "link add kube-ipvs0 type dummy",
                "addr add 10.96.0.10/32 dev kube-ipvs0",
                "addr add 10.96.0.20/32 dev kube-ipvs0",
                "addr add fd00:10:96::10/128 dev kube-ipvs0 nodad",
                "addr add fd00:10:96::20/128 dev kube-ipvs0 nodad",
            ],
        )],
        answered: FROM_EVERYWHERE,
        needs: &["dummy"],
        ..PLAIN
    },
    Layout {
        name: "nic_in_a_bond",
        about: "the node's address on a bond of its NICs",
        lines: &[(
            Who::Node,
            &[
                "addr flush dev eth0",
                "link set eth0 down",
                "link add bond0 type bond mode active-backup",
                "link set eth0 master bond0",
                "link set bond0 up",
                "addr add 192.168.100.11/24 dev bond0",
                "addr add fd00:100::11/64 dev bond0 nodad",
                "route replace 0.0.0.0/0 via 192.168.100.1 dev bond0",
                "route replace ::/0 via fd00:100::1 dev bond0",
                "route replace 10.244.2.0/24 via 192.168.100.12 dev bond0",
                "route replace fd00:10:244:2::/64 via fd00:100::12 dev bond0",
            ],
        )],
        answered: FROM_EVERYWHERE,
        needs: &["bond"],
        ..PLAIN
    },
    Layout {
        name: "nodes_on_a_vlan",
        about: "the nodes' network is a VLAN on their NICs",
        lines: &[
            (
                Who::Node,
                &[
                    "addr flush dev eth0",
                    "link add link eth0 name eth0.5 type vlan id 5",
                    "link set eth0.5 up",
                    "addr add 192.168.100.11/24 dev eth0.5",
                    "addr add fd00:100::11/64 dev eth0.5 nodad",
                    "route replace 0.0.0.0/0 via 192.168.100.1 dev eth0.5",
                    "route replace ::/0 via fd00:100::1 dev eth0.5",
                    "route replace 10.244.2.0/24 via 192.168.100.12 dev eth0.5",
                    "route replace fd00:10:244:2::/64 via fd00:100::12 dev eth0.5",
                ],
            ),
            (
                Who::Other,
                &[
                    "addr flush dev eth0",
                    "link add link eth0 name eth0.5 type vlan id 5",
                    "link set eth0.5 up",
                    "addr add 192.168.100.12/24 dev eth0.5",
                    "addr add fd00:100::12/64 dev eth0.5 nodad",
                    "route replace 0.0.0.0/0 via 192.168.100.1 dev eth0.5",
                    "route replace ::/0 via fd00:100::1 dev eth0.5",
                    "route replace 10.244.1.0/24 via 192.168.100.11 dev eth0.5",
                    "route replace fd00:10:244:1::/64 via fd00:100::11 dev eth0.5",
                ],
            ),
            (
                Who::Client,
                &[
                    "addr flush dev eth0",
                    "link add link eth0 name eth0.5 type vlan id 5",
                    "link set eth0.5 up",
                    "addr add 192.168.100.200/24 dev eth0.5",
                    "addr add fd00:100::200/64 dev eth0.5 nodad",
                ],
            ),
        ],
        answered: FROM_EVERYWHERE,
        needs: &["vlan"],
        ..PLAIN
    },
    Layout {
        name: "ipip_overlay",
        about: "pods of other nodes by an IPIP tunnel, as with Calico and kube-router",
        lines: &[
            (
                Who::Node,
                &[
                    "link add ipip0 type ipip local 192.168.100.11 remote 192.168.100.12 ttl 64",
                    "link set ipip0 up",
                    "addr add 10.244.1.254/32 dev ipip0",
                    "route replace 10.244.2.0/24 dev ipip0 src 10.244.1.254",
                ],
            ),
            (
                Who::Other,
                &[
                    "link add ipip0 type ipip local 192.168.100.12 remote 192.168.100.11 ttl 64",
                    "link set ipip0 up",
                    "addr add 10.244.2.254/32 dev ipip0",
                    "route replace 10.244.1.0/24 dev ipip0 src 10.244.2.254",
                ],
            ),
        ],
        answered: FROM_EVERYWHERE,
        needs: &["ipip"],
        ..PLAIN
    },
    Layout {
        name: "pods_by_netkit",
        about: "pods behind netkit devices in place of veths",
        pods: PodNetwork::Netkit,
        answered: FROM_EVERYWHERE,
        needs: &["netkit"],
        ..PLAIN
    },
    Layout {
        name: "wireguard_overlay",
        about: "pods of other nodes by WireGuard, as with Calico, Cilium and flannel",
        lines: &[
            (
                Who::Node,
                &[
                    "link add wg0 mtu 1420 type wireguard",
                    "link set wg0 up",
                    "addr add 10.244.1.254/32 dev wg0",
                    "addr add fd00:10:244:1::fe/128 dev wg0 nodad",
                    "route replace 10.244.2.0/24 dev wg0 src 10.244.1.254",
                    "route replace fd00:10:244:2::/64 dev wg0 src fd00:10:244:1::fe",
                ],
            ),
            (
                Who::Other,
                &[
                    "link add wg0 mtu 1420 type wireguard",
                    "link set wg0 up",
                    "addr add 10.244.2.254/32 dev wg0",
                    "addr add fd00:10:244:2::fe/128 dev wg0 nodad",
                    "route replace 10.244.1.0/24 dev wg0 src 10.244.2.254",
                    "route replace fd00:10:244:1::/64 dev wg0 src fd00:10:244:2::fe",
                ],
            ),
        ],
        // A key is any 32 bytes of which some bits are as they must be (RFC 7748, 5).
        commands: &[
            (
                Who::Node,
                "echo QAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEE= | wg set wg0 private-key /proc/self/fd/0 listen-port 51820 \
                 peer $(echo QAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEI= | wg pubkey) \
                 endpoint 192.168.100.12:51820 allowed-ips 10.244.2.0/24,fd00:10:244:2::/64",
            ),
            (
                Who::Other,
                "echo QAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEI= | wg set wg0 private-key /proc/self/fd/0 listen-port 51820 \
                 peer $(echo QAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEE= | wg pubkey) \
                 endpoint 192.168.100.11:51820 allowed-ips 10.244.1.0/24,fd00:10:244:1::/64",
            ),
        ],
        answered: FROM_EVERYWHERE,
        needs: &["wireguard"],
        ..PLAIN
    },
    Layout {
        name: "second_nic_in_a_vrf",
        about: "a second NIC for management in a VRF of its own",
        second: &[Who::Node, Who::Second],
        lines: &[(
            Who::Node,
            &[
                "link add management type vrf table 10",
                "link set management up",
                "link set eth1 master management",
            ],
        )],
        answered: FROM_EVERYWHERE,
        needs: &["vrf"],
        ..PLAIN
    },
];
