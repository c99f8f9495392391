//! Tables as stable text, for golden files and `--dry-run`. One line for each thing that could differ.

use super::selection::DEFAULT_TRIES;
use super::tables::{Endpoint, NodeTables, PortTables, ServicePortName, ServiceTables};
use dataplane_common::backend::BackendStatus;
use dataplane_common::frontend::{FrontendKey, FrontendKind};
use dataplane_common::node::{Node, NodeAddress, Prefix};
use dataplane_common::service::{Algorithm, Policy};
use dataplane_common::{Addr, Protocol};
use std::collections::BTreeSet;
use std::fmt;

/// Bits of an IPv4-mapped address before the IPv4 part.
const MAPPED_BITS: u32 = 96;

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.addr.is_v4() {
            return write!(f, "{}:{}", self.addr, self.port);
        }
        write!(f, "[{}]:{}", self.addr, self.port)
    }
}

impl fmt::Display for ServiceTables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, port) in &self.ports {
            write_port(f, name, port)?;
        }
        self.closed.iter().try_for_each(|addr| writeln!(f, "closed {addr}"))
    }
}

fn write_port(f: &mut fmt::Formatter<'_>, name: &ServicePortName, port: &PortTables) -> fmt::Result {
    let family = if name.ipv6 { "IPv6" } else { "IPv4" };
    write!(f, "port {name} ")?;
    match Protocol::try_from(name.proto) {
        Ok(protocol) => writeln!(f, "{protocol} {family}")?,
        Err(number) => writeln!(f, "{number} {family}")?,
    }
    write!(f, "  policy {}", PolicyText(port.policy))?;
    match port.algorithm {
        Algorithm::Random => writeln!(f)?,
        Algorithm::RoundRobin | Algorithm::LeastConnections | Algorithm::Maglev | Algorithm::SourceHash => {
            writeln!(f, " {}", port.algorithm.name())?;
        }
    }
    port.ranges.iter().try_for_each(|range| writeln!(f, "  source-range {range}"))?;
    for (key, kind) in &port.frontends {
        writeln!(f, "  frontend {}", Shown(key, *kind))?;
    }
    write_set(f, "cluster", &port.cluster)?;
    write_set(f, "local", &port.local)?;
    // Which set an endpoint is in the sets have told.
    let member = BackendStatus::IN_CLUSTER | BackendStatus::IN_LOCAL;
    for (endpoint, flags) in &port.backends {
        let words = flag_words(
            *flags & !member,
            &[(BackendStatus::SERVING, "serving"), (BackendStatus::LOCAL, "local")],
        );
        match port.weights.get(endpoint) {
            Some(weight) => writeln!(f, "  backend {endpoint}{words} weight={weight}")?,
            None => writeln!(f, "  backend {endpoint}{words}")?,
        }
    }
    Ok(())
}

fn write_set(f: &mut fmt::Formatter<'_>, name: &str, set: &BTreeSet<Endpoint>) -> fmt::Result {
    write!(f, "  {name}")?;
    if set.is_empty() {
        f.write_str(" empty")?;
    }
    set.iter().try_for_each(|endpoint| write!(f, " {endpoint}"))?;
    writeln!(f)
}

fn kind_text(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "ClusterIP",
        FrontendKind::LoadBalancerIp => "LB IP",
        FrontendKind::ExternalIp => "external IP",
        FrontendKind::NodePort => "NodePort",
        FrontendKind::ClosedPort => "closed",
    }
}

/// A frontend as people write it: its kind, address, port and protocol; a node port has no address.
pub(super) struct Shown<'a>(pub(super) &'a FrontendKey, pub(super) FrontendKind);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(key, kind) = self;
        let socket = Endpoint { addr: *key.addr(), port: key.port() };
        match key.addr().is_unspecified() {
            true => write!(f, "{} {}/", kind_text(*kind), socket.port)?,
            false => write!(f, "{} {socket}/", kind_text(*kind))?,
        }
        match Protocol::try_from(key.proto()) {
            Ok(protocol) => write!(f, "{protocol}"),
            Err(number) => write!(f, "{number}"),
        }
    }
}

/// The names of the flags that are set, each after a space; what has no name as a number.
fn flag_words(flags: u32, names: &[(u32, &str)]) -> String {
    let mut text = String::new();
    for (_, name) in names.iter().filter(|(flag, _)| flags & flag != 0) {
        text.push(' ');
        text.push_str(name);
    }
    let unnamed = names.iter().fold(flags, |flags, (flag, _)| flags & !flag);
    if unnamed != 0 {
        text.push_str(&format!(" {unnamed:#x}"));
    }
    text
}

struct PolicyText(Policy);

impl fmt::Display for PolicyText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(policy) = self;
        f.write_str(if policy.has(Policy::HAS_ENDPOINTS) { "has-endpoints" } else { "no-endpoints" })?;
        let flags = policy.with_tries(0).flags() & !Policy::HAS_ENDPOINTS;
        let names = [
            (Policy::INTERNAL_LOCAL, "internal-local"),
            (Policy::EXTERNAL_LOCAL, "external-local"),
            (Policy::SOURCE_RANGES, "source-ranges"),
            (Policy::BY_PACKET, "by-packet"),
        ];
        f.write_str(&flag_words(flags, &names))?;
        if policy.tries() != DEFAULT_TRIES {
            write!(f, " retry={}", policy.tries())?;
        }
        match policy.affinity_seconds() {
            0 => Ok(()),
            seconds => write!(f, " affinity={seconds}s"),
        }
    }
}

impl fmt::Display for NodeTables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Node::FIB_SOURCE, "fib-source"),
            (Node::SOCKET_LB_PODS, "socket-lb-pods"),
            (Node::CLUSTER_IP_INSIDE_ONLY, "cluster-ip-inside-only"),
            (Node::MASQUERADE_ALL, "masquerade-all"),
            (Node::SOURCE_RANGES_EVERYWHERE, "source-ranges-everywhere"),
            (Node::TAKES_OVER, "takes-over"),
            (Node::BRIDGE_NETFILTER, "bridge-netfilter"),
            (Node::NODE_PORT_SOURCES_V4, "node-port-sources-v4"),
            (Node::NODE_PORT_SOURCES_V6, "node-port-sources-v6"),
            (Node::DENIED_SOURCES, "denied-sources"),
        ];
        let node = &self.node;
        writeln!(f, "node{}", flag_words(node.flags, &names))?;
        for primary in [node.primary_v4, node.primary_v6].iter().filter(|addr| !addr.is_unspecified()) {
            writeln!(f, "  primary {primary}")?;
        }
        let ports = node.ports.iter().filter(|ports| ports.number > 0);
        let ports: Vec<_> =
            ports.map(|ports| format!("{}-{}", ports.first, ports.first + (ports.number - 1))).collect();
        writeln!(f, "  snat-ports {}", ports.join(","))?;
        if node.masquerade_mark != 0 {
            writeln!(f, "  masquerade-mark {:#x}", node.masquerade_mark)?;
        }
        for range in node.service_ranges.iter().filter(|range| range.mask != Addr::UNSPECIFIED) {
            writeln!(f, "  service-range {}", PrefixText(range))?;
        }
        for (addr, value) in &self.addresses {
            let words = flag_words(value.flags(), &[(NodeAddress::NODE_PORTS, "node-ports")]);
            writeln!(f, "  address {addr}{words}")?;
        }
        Ok(())
    }
}

struct PrefixText<'a>(&'a Prefix);

impl fmt::Display for PrefixText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(prefix) = self;
        let bits = u128::from_be_bytes(*prefix.mask.bytes()).leading_ones();
        let bits = if prefix.addr.is_v4() && bits >= MAPPED_BITS { bits - MAPPED_BITS } else { bits };
        write!(f, "{}/{bits}", prefix.addr)
    }
}
