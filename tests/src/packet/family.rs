//! The same world in both families: a case that takes its addresses from here holds for IPv4 and for IPv6.

use super::build::{LINK_FROM, LINK_TO, Packet, Transport, ip, tcp_packet};
use super::{counted_in, counted_out, in_namespace};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The addresses of one family, and what else differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// The node's address on its uplink.
    pub node: &'static str,
    /// Another node, behind the gateway.
    pub other_node: &'static str,
    /// A client outside the cluster, behind the gateway.
    pub client: &'static str,
    /// A pod of this node.
    pub pod: &'static str,
    /// Another pod of this node.
    pub other_pod: &'static str,
    /// A pod of another node.
    pub remote: &'static str,
    /// A pod of another node, the way to which takes packets of 1,300 bytes only.
    pub narrow: &'static str,
    /// A pod to which there is no way.
    pub lost: &'static str,
    /// A host behind the gateway whose packets the kernel's test run takes for what they are, although they have no Ethernet
    /// header: it reads the EtherType where their source address is.
    pub bare: &'static str,
    /// The ClusterIP of the Service `web`.
    pub cluster_ip: &'static str,
    /// The LB IP of [`Family::load_balancer`].
    pub lb_ip: &'static str,
    /// Its external IP.
    pub external_ip: &'static str,
    /// An address of the service range that no Service has.
    pub unknown_ip: &'static str,
    /// An address of nobody that matters.
    pub elsewhere: &'static str,
    /// An address of loopback.
    pub loopback: &'static str,
    /// The loopback address that the node has.
    pub localhost: &'static str,
    /// Addresses that no client can have: multicast, broadcast, unspecified.
    pub no_clients: &'static [&'static str],
    /// Number of its ICMP.
    pub icmp: u8,
    /// Type of an echo request.
    pub echo_request: u8,
    /// `addressType` of its slices.
    pub address_type: &'static str,
    /// Type and code of port unreachable.
    pub port_unreachable: [u8; 2],
    /// Type and code of the error about a time to live that ended.
    pub time_exceeded: [u8; 2],
    /// Type and code of the error about a destination without a route.
    pub no_route: [u8; 2],
    /// Type and code of the error about a packet that is too big.
    pub too_big: [u8; 2],
    /// Bytes of its header.
    pub header: usize,
}

/// IPv4.
pub const V4: Family = Family {
    node: "192.0.2.1",
    other_node: "192.0.2.2",
    client: "198.51.100.7",
    pod: "10.244.1.9",
    other_pod: "10.244.1.8",
    remote: "10.244.2.9",
    narrow: "10.244.3.9",
    lost: "10.244.9.9",
    bare: "8.0.0.9",
    cluster_ip: "10.96.0.1",
    lb_ip: "203.0.113.10",
    external_ip: "203.0.113.20",
    unknown_ip: "10.96.7.7",
    elsewhere: "203.0.113.9",
    loopback: "127.3.2.1",
    localhost: "127.0.0.1",
    no_clients: &["224.0.0.1", "255.255.255.255", "0.0.0.0"],
    icmp: 1,
    echo_request: 8,
    address_type: "IPv4",
    port_unreachable: [3, 3],
    time_exceeded: [11, 0],
    no_route: [3, 0],
    too_big: [3, 4],
    header: 20,
};

/// IPv6.
pub const V6: Family = Family {
    node: "2001:db8::1",
    other_node: "2001:db8::2",
    client: "2001:db8:c::7",
    pod: "fd00:10:244:1::9",
    other_pod: "fd00:10:244:1::8",
    remote: "fd00:10:244:2::9",
    narrow: "fd00:10:244:3::9",
    lost: "fd00:10:244:9::9",
    bare: "2001:db8:86dd::9",
    cluster_ip: "fd00:10:96::1",
    lb_ip: "2001:db8:b::10",
    external_ip: "2001:db8:b::20",
    unknown_ip: "fd00:10:96::707",
    elsewhere: "2001:db8:e::9",
    loopback: "::1",
    localhost: "::1",
    no_clients: &["ff02::1", "ff0e::1", "::"],
    icmp: 58,
    echo_request: 128,
    address_type: "IPv6",
    port_unreachable: [1, 4],
    time_exceeded: [3, 0],
    no_route: [1, 0],
    too_big: [2, 0],
    header: 40,
};

/// The longest packet that the way to [`Family::narrow`] takes, in bytes. IPv6 knows no less than 1,280.
pub const NARROW: u32 = 1_300;

/// Runs a test for each family, in a network namespace of its own.
pub fn for_both(test: impl Fn(&Family) + Send + Sync + Clone + 'static) {
    for family in [&V4, &V6] {
        let test = test.clone();
        in_namespace(move || {
            println!("addresses are {}", family.address_type);
            test(family);
        });
    }
}

impl Family {
    /// The commands of `ip` that give the world its addresses, routes and neighbours.
    pub(super) fn network(&self) -> String {
        let Self { node, pod, remote, narrow, lost, .. } = self;
        let v4 = self == &V4;
        let link = node.rsplit_once(['.', ':']).map_or("", |(link, _)| link);
        let dot = if v4 { "." } else { ":" };
        let (host, nodad) = if v4 { (32, "") } else { (128, "nodad") };
        let (subnet, pods) = if v4 { (24, 24) } else { (64, 64) };
        let gateway = format!("{link}{dot}254");
        let range = |pod: &str| {
            format!("{}{dot}0/{pods}", pod.rsplit_once(['.', ':']).map_or("", |(range, _)| range))
        };
        let (remote, narrow, lost) = (range(remote), range(narrow), range(lost));
        let neighbour =
            |addr: &str| format!("-FAMILY neigh add {addr} lladdr 02:00:00:00:00:fe nud permanent dev up0");
        [
            format!("-FAMILY addr add {node}/{subnet} dev up0 {nodad}"),
            format!("-FAMILY route add default via {gateway}"),
            format!("-FAMILY route add {pod}/{host} dev pod0"),
            format!("-FAMILY route add {remote} via {link}{dot}2"),
            format!("-FAMILY route add {narrow} via {link}{dot}3 mtu lock {NARROW}"),
            format!("-FAMILY route add unreachable {lost}"),
            neighbour(&gateway),
            neighbour(&format!("{link}{dot}2")),
            neighbour(&format!("{link}{dot}3")),
            format!("-FAMILY neigh add {pod} lladdr 02:00:00:00:00:09 nud permanent dev pod0"),
        ]
        .join("\n")
        .replace("FAMILY", if v4 { "4" } else { "6" })
    }

    /// A Service `web` with TCP and UDP port 80 and node port 30080, extra lines of its spec, and one slice with these
    /// endpoints: address, node, conditions.
    pub fn web(&self, spec: &str, endpoints: &[(&str, &str, &str)]) -> String {
        let Self { cluster_ip, address_type, .. } = self;
        let mut yaml = format!(
            "apiVersion: v1
kind: Service
metadata: {{name: web, namespace: default}}
spec:
  type: NodePort
  clusterIP: \"{cluster_ip}\"
  clusterIPs: [\"{cluster_ip}\"]
  ipFamilies: [{address_type}]
  {spec}
  ports:
  - {{name: tcp, protocol: TCP, port: 80, targetPort: 8080, nodePort: 30080}}
  - {{name: udp, protocol: UDP, port: 80, targetPort: 8080, nodePort: 30080}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web-1, namespace: default, labels: {{kubernetes.io/service-name: web}}}}
addressType: {address_type}
ports:
- {{name: tcp, protocol: TCP, port: 8080}}
- {{name: udp, protocol: UDP, port: 8080}}
"
        );
        if endpoints.is_empty() {
            yaml.push_str("endpoints: []\n");
            return yaml;
        }
        yaml.push_str("endpoints:\n");
        for (address, node, conditions) in endpoints {
            yaml.push_str(&format!(
                "- {{addresses: [\"{address}\"], nodeName: {node}, conditions: {{{conditions}}}}}\n"
            ));
        }
        yaml
    }

    /// The same Service at an LB IP and an external IP too.
    pub fn load_balancer(&self, spec: &str, endpoints: &[(&str, &str, &str)]) -> String {
        let Self { lb_ip, external_ip, .. } = self;
        let status = format!("kind: Service\nstatus: {{loadBalancer: {{ingress: [{{ip: \"{lb_ip}\"}}]}}}}\n");
        self.web(&format!("externalIPs: [\"{external_ip}\"]\n  {spec}"), endpoints)
            .replacen("type: NodePort", "type: LoadBalancer", 1)
            .replacen("kind: Service\n", &status, 1)
    }

    /// An endpoint in a pod of this node.
    pub const fn local_endpoint(&self) -> (&'static str, &'static str, &'static str) {
        (self.pod, "here", "ready: true")
    }

    /// An endpoint on another node.
    pub const fn remote_endpoint(&self) -> (&'static str, &'static str, &'static str) {
        (self.remote, "there", "ready: true")
    }

    /// The `n`th address behind [`Family::remote`].
    pub fn nth_remote(&self, n: u32) -> IpAddr {
        match ip(self.remote) {
            IpAddr::V4(first) => Ipv4Addr::from_bits(first.to_bits() + n).into(),
            IpAddr::V6(first) => Ipv6Addr::from_bits(first.to_bits() + u128::from(n)).into(),
        }
    }

    /// The counters of one packet from a client with this much behind its header; `new` if it began a flow.
    pub fn counted_in(&self, payload: u64, new: bool) -> BTreeMap<String, u64> {
        counted_in(self.header as u64 + payload, new)
    }

    /// The counters of one packet from an endpoint with this much behind its header.
    pub fn counted_out(&self, payload: u64) -> BTreeMap<String, u64> {
        counted_out(self.header as u64 + payload)
    }

    /// The translated source port that a packet out has.
    pub fn source_port(&self, bytes: &[u8]) -> u16 {
        let at = 14 + self.header;
        u16::from_be_bytes([bytes[at], bytes[at + 1]])
    }

    /// The destination that a packet out has.
    pub fn destination(&self, bytes: &[u8]) -> IpAddr {
        let end = 14 + self.header;
        if self == &V4 {
            let octets: [u8; 4] = std::array::from_fn(|n| bytes[end - 4 + n]);
            return octets.into();
        }
        let octets: [u8; 16] = std::array::from_fn(|n| bytes[end - 16 + n]);
        octets.into()
    }

    /// The RST that answers `about`, with these numbers and flags.
    pub fn reset(&self, about: &Packet, seq: u32, ack: u32, flags: u8) -> Packet {
        let (src, dst) = (about.dst.0.to_string(), about.src.0.to_string());
        let mut answer = tcp_packet((&src, about.dst.1), (&dst, about.src.1), flags).numbers(seq, ack);
        if let Transport::Tcp { window, .. } = &mut answer.transport {
            *window = 0;
        }
        answer.id = 0;
        answer.link(LINK_FROM, LINK_TO)
    }
}
