//! Layouts of a node, as people have them, as data: what its interfaces and routes are, who calls whom, and who must answer.
//!
//! Each is a lab of two nodes. Pod `a` and pod `q` are on `node-1`, which has the agent, pod `c` is on `node-2`. `here` is a Service
//! with the endpoint `a`, `there` one with the endpoint `c`. The agent has its default flags, but where a layout needs what only its operator knows.

use super::agent::AgentOptions;
use super::client::{Client, at};
use super::manifests::{Endpoint, Service};
use super::network::{self, Addresses, Family, PodNetwork};
use super::node::PodOptions;
use super::place::Place;
use super::process::{Process, program};
use super::tunnel;
use super::{Lab, Options};
use anyhow::{Context, Result};
use serde_json::json;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

/// Who does something, or has something done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The client outside, on the nodes' network.
    Client,
    /// A client on the second network alone.
    Second,
    /// A client behind the VPN device of `node-1`, which comes to it by the second network.
    Vpn,
    /// `node-1` itself.
    Node,
    /// `node-2` itself.
    Other,
    /// The pod `q` of `node-1`.
    Pod,
    /// The pod `a` of `node-1`.
    Server,
}

/// Which of the two Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// `here`, whose endpoint is on `node-1`.
    Here,
    /// `there`, whose endpoint is on `node-2`.
    There,
}

/// An address of `node-1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// On the nodes' network.
    Uplink,
    /// On the second network.
    Second,
    /// On the VPN device.
    Vpn,
    /// The ClusterIP of `here`.
    ClusterIp,
}

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The ClusterIP.
    ClusterIp(End),
    /// The node port, on an address of `node-1`.
    NodePort(End, On),
    /// The LB IP.
    LbIp(End),
    /// The ClusterIP of the Service `cached`, whose endpoint is `c`; `node-1` has a server of its own there, `cache`.
    Cached,
}

/// A layout.
#[derive(Debug)]
pub struct Layout {
    /// Its name.
    pub name: &'static str,
    /// How pods are joined.
    pub pods: PodNetwork,
    /// Who is on the second network, by `eth1`.
    pub second: &'static [Who],
    /// Who joins it when the agent runs already.
    pub later: &'static [Who],
    /// Lines of `ip`, before the agent starts.
    pub lines: &'static [(Who, &'static [&'static str])],
    /// Commands of `nft` on `node-1`.
    pub rules: &'static [&'static str],
    /// Flags of the agent.
    pub flags: &'static [&'static str],
    /// Addresses at which `node-1` has the server `cache`.
    pub cache: &'static [&'static str],
    /// Who calls what over TCP and UDP, and must be answered.
    pub answered: &'static [(Who, &'static [Target])],
    /// Who calls what, and must not be answered.
    pub unanswered: &'static [(Who, &'static [Target])],
}

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

/// The name of the VPN device.
const VPN: &str = "vpn0";
/// Where each end of the VPN listens on the second network.
const VPN_PORT: u16 = 8473;
const SERVICE_PORT: u16 = 80;
const TARGET: u16 = 8080;
const START_TIME: Duration = Duration::from_secs(20);

impl End {
    const fn name(self) -> &'static str {
        match self {
            Here => "here",
            There => "there",
        }
    }

    /// The last byte of its ClusterIP and LB IP.
    const fn host(self) -> u8 {
        match self {
            Here => 10,
            There => 20,
        }
    }

    const fn node_port(self) -> u16 {
        match self {
            Here => 30_002,
            There => 30_003,
        }
    }

    const fn pod(self) -> &'static str {
        match self {
            Here => "a",
            There => "c",
        }
    }
}

impl Target {
    /// Who answers there.
    pub const fn answers(self) -> &'static str {
        match self {
            ClusterIp(end) | NodePort(end, _) | LbIp(end) => end.pod(),
            Cached => "cache",
        }
    }
}

/// A layout that is raised.
#[derive(Debug)]
pub struct Raised {
    /// Its lab.
    pub lab: Lab,
    layout: &'static Layout,
    second: Option<Place>,
    vpn: Option<Place>,
    _carriers: Vec<Process>,
}

impl Layout {
    /// Makes the lab with its pods and Services. Nobody serves them yet.
    pub fn raise(&'static self) -> Result<Raised> {
        let lab = Options::default().nodes(2).pods(self.pods).create()?;
        let all = || self.second.iter().chain(self.later);
        let outside = |who, name| -> Result<Option<Place>> {
            if all().any(|other| *other == who) { lab.add_alone(name).map(Some) } else { Ok(None) }
        };
        let second = outside(Who::Second, "second")?;
        let vpn = outside(Who::Vpn, "vpn")?;
        let mut raised = Raised { layout: self, second, vpn, _carriers: Vec::new(), lab };
        if all().next().is_some() {
            raised.lab.net().ip(&network::second_bridge())?;
        }
        for (name, node) in [("a", 0), ("c", 1)] {
            raised.lab.add_pod(name, node, &PodOptions::default())?;
        }
        raised.lab.add_pod("q", 0, &PodOptions::client())?;
        self.second.iter().try_for_each(|who| raised.join_second(*who))?;
        if raised.vpn.is_some() {
            raised.raise_vpn()?;
        }
        for (who, lines) in self.lines {
            // Rules of routing have the family of an option, and a batch has none.
            let (alone, batch): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.starts_with('-'));
            let batch: Vec<_> = batch.into_iter().map(|line: &&str| (*line).to_owned()).collect();
            raised.place(*who)?.ip(&batch)?;
            for line in alone {
                let words: Vec<_> = line.split_whitespace().collect();
                raised.place(*who)?.run("ip", &words)?;
            }
        }
        for rule in self.rules {
            raised.lab.node(0).place().run("nft", &[rule])?;
        }
        raised.serve()?;
        Ok(raised)
    }
}

impl Raised {
    /// Starts the agent with its default flags, and does what comes later.
    pub fn start_agent(&self) -> Result<()> {
        self.lab.node(0).start_agent(&AgentOptions::default().arguments(self.layout.flags))?;
        self.layout.later.iter().try_for_each(|who| self.join_second(*who))
    }

    /// A client.
    pub fn client(&self, who: Who) -> Result<Client> {
        Ok(Client::at(&self.place(who)?))
    }

    /// The address and port of a target.
    pub fn address(&self, target: Target, family: Family) -> SocketAddr {
        match target {
            ClusterIp(end) => at(cluster_ip(end.host()).of(family), SERVICE_PORT),
            NodePort(end, on) => at(self.node_address(on).of(family), end.node_port()),
            LbIp(end) => at(lb_ip(end).of(family), SERVICE_PORT),
            Cached => at(cluster_ip(CACHE_HOST).of(family), SERVICE_PORT),
        }
    }

    fn node_address(&self, on: On) -> Addresses {
        match on {
            Uplink => self.lab.node(0).addresses(),
            AtSecond => network::second(NODE_HOST),
            AtVpn => network::vpn(1),
            On::ClusterIp => cluster_ip(Here.host()),
        }
    }

    fn place(&self, who: Who) -> Result<Place> {
        let place = match who {
            Who::Client => Some(self.lab.client().clone()),
            Who::Second => self.second.clone(),
            Who::Vpn => self.vpn.clone(),
            Who::Node => Some(self.lab.node(0).place().clone()),
            Who::Other => Some(self.lab.node(1).place().clone()),
            Who::Pod => self.lab.pod("q").map(|pod| pod.place().clone()),
            Who::Server => self.lab.pod("a").map(|pod| pod.place().clone()),
        };
        place.with_context(|| format!("{}: there is no {who:?}", self.layout.name))
    }

    fn join_second(&self, who: Who) -> Result<()> {
        let host = match who {
            Who::Node => NODE_HOST,
            Who::Other => NODE_HOST + 1,
            Who::Vpn => VPN_HOST,
            Who::Client | Who::Second | Who::Pod | Who::Server => 200,
        };
        let place = self.place(who)?;
        let port = format!("{}-2", place.name());
        self.lab.net().ip(&[
            format!("link add {port} type veth peer name eth1 netns {}", place.namespace()),
            format!("link set {port} master br1 up"),
        ])?;
        place.ip(&network::second_side(network::second(host)))
    }

    /// A TUN device at each end, and all that the client calls by way of it.
    fn raise_vpn(&mut self) -> Result<()> {
        let everything = Family::BOTH.map(|family| family.everything().to_owned());
        let client = network::vpn(2).each().map(|(family, address)| format!("{address}/{}", family.bits()));
        let client: Vec<String> = client.collect();
        let node_routes: Vec<String> =
            client.iter().map(|range| format!("route add {range} dev {VPN}")).collect();
        let client_routes = everything.iter().map(|range| format!("route add {range} dev {VPN}")).collect();
        self.carry(Who::Node, (NODE_HOST, 1), &client, VPN_HOST, node_routes)?;
        self.carry(Who::Vpn, (VPN_HOST, 2), &everything, NODE_HOST, client_routes)
    }

    fn carry(
        &mut self,
        who: Who,
        (host, end): (u8, u8),
        ranges: &[String],
        peer: u8,
        routes: Vec<String>,
    ) -> Result<()> {
        let place = self.place(who)?;
        let mut command = place.command(program("portolan-lab", "PORTOLAN_LAB_PROGRAM")?)?;
        command.args(["carry", "--device", VPN, "--listen"]);
        command.arg(SocketAddr::new(network::second(host).v4.into(), VPN_PORT).to_string());
        for range in ranges {
            command.arg("--peer").arg(format!("{range}={}:{VPN_PORT}", network::second(peer).v4));
        }
        let carrier = Process::start(&self.lab.logs(), &format!("vpn-{}", place.name()), command)?;
        carrier.wait_for_line(START_TIME, |line| line == tunnel::READY)?;
        self._carriers.push(carrier);
        let addresses = network::vpn(end).each();
        let mut lines: Vec<_> = addresses
            .map(|(family, address)| network::address_on(VPN, family, address, family.bits()))
            .collect();
        lines.push(format!("link set {VPN} mtu 1400 up"));
        lines.extend(routes);
        place.ip(&lines)
    }

    fn serve(&self) -> Result<()> {
        for end in [Here, There] {
            let pod = self.lab.pod(end.pod()).context("no pod")?;
            for family in Family::BOTH {
                let service = service(end.name(), family, cluster_ip(end.host()))
                    .tcp_node_port(SERVICE_PORT, TARGET, end.node_port())
                    .udp_node_port(SERVICE_PORT, TARGET, end.node_port())
                    .spec("type", json!("LoadBalancer"))
                    .status(json!({ "loadBalancer": { "ingress": [{ "ip": lb_ip(end).of(family), "ipMode": "VIP" }] } }));
                self.lab.manifests().apply(&service.endpoints([pod.endpoint()]))?;
            }
        }
        if self.layout.cache.is_empty() {
            return Ok(());
        }
        let other: Endpoint = self.lab.pod("c").context("no pod")?.endpoint();
        for family in Family::BOTH {
            let service = service("cached", family, cluster_ip(CACHE_HOST));
            let service = service.tcp(SERVICE_PORT, TARGET).udp(SERVICE_PORT, TARGET);
            self.lab.manifests().apply(&service.endpoints([other.clone()]))?;
        }
        let addresses: Vec<IpAddr> =
            self.layout.cache.iter().map(|address| Ok(address.parse()?)).collect::<Result<_>>()?;
        let server = PodOptions::default().tcp(&[SERVICE_PORT]).udp(&[SERVICE_PORT]).at(&addresses);
        self.lab.node(0).serve("cache", &server)
    }
}

/// The last byte of the ClusterIP of `cached`.
const CACHE_HOST: u8 = 53;
/// `node-1` on the second network; `node-2` is the next.
const NODE_HOST: u8 = 11;
/// The VPN's client there.
const VPN_HOST: u8 = 210;

fn service(name: &str, family: Family, cluster_ip: Addresses) -> Service {
    let number = match family {
        Family::V4 => 4,
        Family::V6 => 6,
    };
    Service::new(&format!("{name}-{number}"), cluster_ip.of(family))
}

/// A ClusterIP of each family.
fn cluster_ip(host: u8) -> Addresses {
    network::on(([10, 96, 0], [0xfd00, 0x10, 0x96]), host)
}

fn lb_ip(end: End) -> Addresses {
    network::on(([172, 20, 0], [0xfd00, 0x172, 0x20]), end.host())
}
