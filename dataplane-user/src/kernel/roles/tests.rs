use super::*;

/// A node of which each line is an interface: name and kind, then its addresses, `of=MASTER`, `on=LOWER`, `mtu=BYTES` and what its routes do.
fn node(text: &str) -> Interfaces {
    let mut node = Interfaces::default();
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let index = |name: &str| (1..).zip(&lines).find(|(_, words)| words[0] == name).unwrap().0;
    for (at, words) in (1..).zip(&lines) {
        let (kind, layer) = match words[1] {
            "loopback" => (Kind::Device, LinkLayer::Loopback),
            "device" => (Kind::Device, LinkLayer::Ethernet),
            "tunnel" => (Kind::Device, LinkLayer::None),
            "tun" => (Kind::Guest, LinkLayer::None),
            "tap" | "macvlan" => (Kind::Guest, LinkLayer::Ethernet),
            "veth" => (Kind::Pair, LinkLayer::Ethernet),
            "bridge" => (Kind::Bridge, LinkLayer::Ethernet),
            "switch" => (Kind::Switch, LinkLayer::Ethernet),
            "dummy" => (Kind::Dummy, LinkLayer::Ethernet),
            "vrf" => (Kind::Vrf, LinkLayer::Ethernet),
            "infiniband" => (Kind::Device, LinkLayer::Unknown),
            other => panic!("{other}"),
        };
        let mut link =
            Interface { name: words[0].into(), kind, layer, master: None, lower: None, mtu: 1_500 };
        let routes = node.routes.entry(at).or_default();
        for word in &words[2..] {
            match *word {
                "default" => routes.default = true,
                "host" => routes.host = true,
                "routes" => routes.other = true,
                word => match word.split_once('=') {
                    Some(("of", master)) => link.master = Some(index(master)),
                    Some(("on", lower)) => link.lower = Some(index(lower)),
                    Some(("mtu", bytes)) => link.mtu = bytes.parse().unwrap(),
                    Some(other) => panic!("{other:?}"),
                    None => node.addresses.entry(at).or_default().push(word.parse().unwrap()),
                },
            }
        }
        node.links.insert(at, link);
    }
    node
}

/// Each interface of a node with its role and the reason for it.
fn told(text: &str, choice: &Choice) -> Vec<String> {
    let node = node(text);
    let findings = node.findings(choice);
    let line = |(index, finding): (&u32, &Finding)| {
        let role = finding.role.map_or_else(|| "-".to_owned(), |role| role.to_string());
        format!("{} {role}: {}", node.links[index].name, finding.reason)
    };
    findings.iter().map(line).collect()
}

#[track_caller]
fn assert_roles(text: &str, expected: &[&str]) {
    assert_eq!(told(text.trim(), &Choice::default()), expected);
}

fn patterns(patterns: &[&str]) -> Vec<Pattern> {
    patterns.iter().map(|pattern| pattern.parse().unwrap()).collect()
}

#[test]
fn every_interface_with_an_address_of_the_node_is_an_uplink_whatever_its_kind() {
    assert_roles(
        "lo loopback 127.0.0.1/8
eth0 device 192.0.2.7/24 fe80::1/64 default
eth1 device 10.0.0.7/24
eth0.7 device 10.7.0.7/24
bond0 device 10.8.0.7/24
macvlan0 macvlan 10.9.0.7/24
wg0 tunnel 100.64.0.1/32 routes
tun0 tun 100.65.0.1/24
flannel.1 device 10.244.1.0/32 routes
v6 device 2001:db8::7/64",
        &[
            "lo -: loopback",
            "eth0 uplink: default route",
            "eth1 uplink: address 10.0.0.7/24",
            "eth0.7 uplink: address 10.7.0.7/24",
            "bond0 uplink: address 10.8.0.7/24",
            "macvlan0 uplink: address 10.9.0.7/24",
            "wg0 uplink: address 100.64.0.1/32",
            "tun0 uplink: address 100.65.0.1/24",
            "flannel.1 uplink: address 10.244.1.0/32",
            "v6 uplink: address 2001:db8::7/64",
        ],
    );
}

#[test]
fn an_interface_without_an_address_is_an_uplink_if_routes_lead_by_it() {
    assert_roles(
        "eth0 device fe80::1/64 routes
tun-10a tunnel routes
tunl0 tunnel
eth1 device fe80::2/64
eth2 device host",
        &[
            "eth0 uplink: routes",
            "tun-10a uplink: routes",
            "tunl0 -: it has neither an address of the node nor a route",
            "eth1 -: it has neither an address of the node nor a route",
            "eth2 uplink: routes",
        ],
    );
}

#[test]
fn a_pair_leads_to_a_pod_unless_the_node_has_a_network_there() {
    assert_roles(
        "eth0 veth 172.18.0.2/16 default
eth1 veth 10.0.0.7/24
routed veth 10.5.0.7/32 host default
veth1 veth 10.244.1.1/32 fd00:10:244:1::1/128 host
cali1 veth fe80::ecee:eeff:feee:eeee/64 host
cali2 veth 169.254.1.1/32 host
fresh veth
zeroconf veth 169.254.7.9/16
eth2 veth
eth2.5 device 10.5.0.7/24 on=eth2
router veth 10.244.1.1/32 host routes",
        &[
            "eth0 uplink: default route",
            "eth1 uplink: address 10.0.0.7/24",
            "routed uplink: default route",
            "veth1 pod interface: routes to single addresses",
            "cali1 pod interface: routes to single addresses",
            "cali2 pod interface: routes to single addresses",
            "fresh pod interface: one end of a pair",
            "zeroconf pod interface: one end of a pair",
            "eth2 -: it carries eth2.5, which is served in its place",
            "eth2.5 uplink: address 10.5.0.7/24",
            "router pod interface: routes to single addresses",
        ],
    );
}

#[test]
fn a_guest_s_device_is_a_pod_interface_if_single_addresses_are_all_that_is_behind_it() {
    assert_roles(
        "tap0 tap host
tap1 tap 192.168.9.1/24 host
tap2 tap
shim macvlan 10.0.0.9/32 host
tun0 tun 10.8.0.1/32 host",
        &[
            "tap0 pod interface: routes to single addresses",
            "tap1 uplink: address 192.168.9.1/24",
            "tap2 -: it has neither an address of the node nor a route",
            "shim pod interface: routes to single addresses",
            "tun0 uplink: address 10.8.0.1/32",
        ],
    );
}

#[test]
fn pods_on_a_bridge_of_their_own_are_served_at_its_ports() {
    assert_roles(
        "cni0 bridge 10.244.1.1/24
veth1 veth of=cni0
tap0 tap of=cni0
docker0 bridge 172.17.0.1/16",
        &[
            "cni0 -: its ports are served in its place",
            "veth1 pod interface: port of cni0",
            "tap0 pod interface: port of cni0",
            "docker0 -: nothing is behind it",
        ],
    );
}

#[test]
fn a_bridge_that_leads_to_more_than_guests_is_served_itself() {
    assert_roles(
        "br0 bridge 192.0.2.7/24 default
eth0 device of=br0
veth1 veth of=br0
br1 bridge 10.0.0.7/24
eth1 device of=br1
br2 bridge
eth2 device of=br2
veth2 veth of=br2",
        &[
            "br0 uplink: default route",
            "eth0 -: port of br0, which is served in its place",
            "veth1 pod interface: port of br0",
            "br1 uplink: address 10.0.0.7/24",
            "eth1 -: port of br1, which is served in its place",
            "br2 -: it has neither an address of the node nor a route",
            "eth2 -: port of br2, which is served in its place",
            "veth2 pod interface: port of br2",
        ],
    );
}

#[test]
fn a_bridge_whose_way_out_looks_like_a_guest_is_served_alone() {
    assert_roles(
        "br0 bridge 192.0.2.7/24 default
eth0 veth of=br0
veth1 veth of=br0",
        &[
            "br0 uplink: default route",
            "eth0 -: port of br0, which is served in its place",
            "veth1 -: port of br0, which is served in its place",
        ],
    );
}

#[test]
fn a_port_is_served_once_by_its_master() {
    assert_roles(
        "bond0 device 192.0.2.7/24 default
eth0 device of=bond0
eth1 device of=bond0
bond0.5 device 10.5.0.7/24
eth2 device 10.6.0.7/24
vf device of=eth2
ovs-system switch
br-ex switch 10.7.0.7/24 of=ovs-system
eth3 device of=ovs-system
pod veth of=ovs-system
red vrf
eth4 device 10.8.0.7/24 of=red",
        &[
            "bond0 uplink: default route",
            "eth0 -: port of bond0, which is served in its place",
            "eth1 -: port of bond0, which is served in its place",
            "bond0.5 uplink: address 10.5.0.7/24",
            "eth2 uplink: address 10.6.0.7/24",
            "vf -: port of eth2, which is served in its place",
            "ovs-system -: it has neither an address of the node nor a route",
            "br-ex uplink: address 10.7.0.7/24",
            "eth3 -: port of ovs-system, which is served in its place",
            "pod pod interface: port of ovs-system",
            "red -: it has neither an address of the node nor a route",
            "eth4 uplink: address 10.8.0.7/24",
        ],
    );
}

#[test]
fn nothing_comes_by_an_interface_that_has_nothing_behind_it_but_what_is_routed_there_leaves() {
    assert_roles(
        "nodelocaldns dummy 169.254.20.10/32 10.96.0.10/32
dummy0 dummy 203.0.113.254/31 default
dummy1 dummy routes
nld bridge 10.96.0.11/32
hole bridge routes
kube-ipvs0 dummy 10.96.0.1/32
kube-dummy-if dummy 10.96.0.2/32",
        &[
            "nodelocaldns -: nothing is behind it",
            "dummy0 uplink: default route",
            "dummy1 uplink: routes",
            "nld -: nothing is behind it",
            "hole uplink: routes",
            "kube-ipvs0 -: another proxy left it behind",
            "kube-dummy-if -: another proxy left it behind",
        ],
    );
}

#[test]
fn what_the_programs_cannot_read_has_no_role_whatever_a_flag_says() {
    assert_roles("ib0 infiniband 192.0.2.7/24 default", &["ib0 -: its link layer is not known"]);
    let all = Choice { uplinks: patterns(&["*"]), pods: patterns(&["*"]) };
    assert_eq!(
        told("ib0 infiniband 192.0.2.7/24\nlo loopback", &all),
        ["ib0 -: its link layer is not known", "lo -: loopback"]
    );
}

#[test]
fn the_device_of_the_routes_to_services_is_an_uplink_and_its_other_end_nothing() {
    let text = "portolan0 veth routes
portolan1 veth";
    let all = Choice { uplinks: patterns(&["eth*"]), pods: patterns(&["*"]) };
    for choice in [Choice::default(), all] {
        assert_eq!(
            told(text, &choice),
            [
                "portolan0 uplink: the node's own route to Services",
                "portolan1 -: the node's own route to Services",
            ]
        );
    }
}

#[test]
fn flags_narrow_what_the_rules_find_and_name_what_they_do_not() {
    let text = "eth0 device 192.0.2.7/24 default
wg0 tunnel 100.64.0.1/32
veth1 veth host
cali1 veth host";
    let uplinks = Choice { uplinks: patterns(&["wg*"]), pods: Vec::new() };
    assert_eq!(
        told(text, &uplinks),
        [
            "eth0 -: a flag names others",
            "wg0 uplink: a flag names it",
            "veth1 pod interface: routes to single addresses",
            "cali1 pod interface: routes to single addresses",
        ]
    );
    let pods = Choice { uplinks: Vec::new(), pods: patterns(&["cali*"]) };
    assert_eq!(
        told(text, &pods),
        [
            "eth0 uplink: default route",
            "wg0 uplink: address 100.64.0.1/32",
            "veth1 -: a flag names others",
            "cali1 pod interface: a flag names it",
        ]
    );
    let both = Choice { uplinks: patterns(&["veth*"]), pods: patterns(&["*"]) };
    assert_eq!(
        told(text, &both),
        [
            "eth0 pod interface: a flag names it",
            "wg0 pod interface: a flag names it",
            "veth1 uplink: a flag names it",
            "cali1 pod interface: a flag names it",
        ]
    );
}

#[test]
fn the_addresses_of_default_routes_come_first_then_those_of_uplinks_and_each_once() {
    let node = node(
        "lo loopback 127.0.0.1/8
docker0 bridge 172.17.0.1/16
eth1 device 10.0.0.7/24
eth0 device 192.0.2.7/24 127.0.0.1/8 default",
    );
    let own = node.own_addresses(&node.roles(&Choice::default()));
    let expected = ["192.0.2.7", "127.0.0.1", "10.0.0.7", "172.17.0.1"];
    assert_eq!(own, expected.map(|ip| ip.parse::<IpAddr>().unwrap()));
}

#[test]
fn link_local_addresses_of_pod_interfaces_are_none_of_the_node() {
    let node = node(
        "eth0 device 192.0.2.7/24 fe80::1/64 default
veth1 veth 10.244.1.1/32 fe80::2/64 host
veth2 veth 169.254.1.1/32 host",
    );
    let own = node.own_addresses(&node.roles(&Choice::default()));
    assert_eq!(own, ["192.0.2.7", "fe80::1", "10.244.1.1"].map(|ip| ip.parse::<IpAddr>().unwrap()));
}

#[test]
fn addresses_that_another_proxy_left_behind_are_told_apart() {
    let node = node(
        "eth0 device 192.0.2.7/24 default
nodelocaldns dummy 10.96.0.10/32
kube-ipvs0 dummy 10.96.0.1/32 10.96.0.10/32",
    );
    let own = node.own_addresses(&node.roles(&Choice::default()));
    assert_eq!(own, ["192.0.2.7", "10.96.0.10"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    assert_eq!(node.left_over_addresses(), ["10.96.0.1".parse::<IpAddr>().unwrap()]);
}

/// Packets that are longer than an uplink takes come back with an error: none is longer than the shortest of them takes.
#[test]
fn the_smallest_mtu_of_the_uplinks_is_that_of_the_routes_to_services() {
    let text = "portolan0 veth routes mtu=1280
eth0 device default 192.0.2.1/24 mtu=9000
wg0 device 198.51.100.1/24 routes mtu=1420
cali1 veth host mtu=1300";
    assert_eq!(node(text).uplink_mtu(&Choice::default()), 1_420);
    assert_eq!(node("cali1 veth host mtu=1300").uplink_mtu(&Choice::default()), 0);
}
