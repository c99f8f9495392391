//! From flags to what the parts of the agent ask for.

use crate::compile::{self, NodePortAddresses, NodeSettings, Sources};
use crate::config::{AgentArgs, ExternalIps, FromOutside, NodePortRange, PortRange, SocketLb};
use crate::kernel::local_ports;
use crate::kernel::masquerade::Masquerade;
use crate::kernel::roles::Choice;
use dataplane_common::node::Node;
use ipnet::IpNet;
use std::hash::{BuildHasher as _, RandomState};
use std::ops::RangeInclusive;
use std::sync::Arc;

/// What the flags say about Services and the node, once and for all.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Name of the Node object.
    pub(super) node_name: Arc<str>,
    /// `--service-proxy-name`.
    pub(super) proxy_name: Option<Arc<str>>,
    /// `--pod-cidr`.
    pub(super) cluster_cidrs: Vec<IpNet>,
    /// `--external-ips`.
    pub(super) external_ips: compile::ExternalIps,
    /// `--lb-algorithm`.
    pub(super) defaults: compile::Defaults,
    /// `--service-cidr`; empty if the ServiceCIDR objects say it.
    pub(super) service_cidrs: Vec<IpNet>,
    /// All else that the node's tables say. The service ranges in it are those of the moment.
    pub(super) node: NodeSettings,
    /// Whether there is no dataplane before the own Node is known.
    pub(super) needs_node: bool,
}

impl Settings {
    /// What the flags say, on a kernel that names source addresses itself or does not.
    pub(super) fn new(args: &AgentArgs, netns_cookie: u64, fib_source: bool) -> Self {
        let flags = [
            (fib_source, Node::FIB_SOURCE),
            (args.socket_lb == SocketLb::All && !args.masquerade_all, Node::SOCKET_LB_PODS),
            (args.cluster_ip_from_outside == FromOutside::Refuse, Node::CLUSTER_IP_INSIDE_ONLY),
            (args.masquerade_all, Node::MASQUERADE_ALL),
            (args.source_ranges_everywhere, Node::SOURCE_RANGES_EVERYWHERE),
        ];
        let flags = flags.into_iter().filter(|(set, _)| *set).fold(0, |flags, (_, flag)| flags | flag);
        Self {
            node_name: node_name(args.node_name.as_deref()),
            proxy_name: args.service_proxy_name.as_deref().map(Arc::from),
            cluster_cidrs: args.pod_cidr.clone(),
            external_ips: match args.external_ips {
                ExternalIps::All => compile::ExternalIps::All,
                ExternalIps::NotOfNode => compile::ExternalIps::NotOfNode,
                ExternalIps::None => compile::ExternalIps::None,
            },
            defaults: compile::Defaults { algorithm: args.lb_algorithm, tries: args.lb_retry },
            service_cidrs: args.service_cidr.clone(),
            node: NodeSettings {
                service_ranges: args.service_cidr.clone(),
                node_port_addresses: node_port_addresses(&args.nodeport_addresses),
                snat_ports: translated_ports(args.snat_ports, &args.masquerade_ports),
                flags,
                masquerade_mark: 0,
                connection_mark: 0,
                sources: Sources::default(),
                netns_cookie,
                secret: random(),
            },
            needs_node: args.manifests.is_none(),
        }
    }
}

/// A number that nobody knows: the standard library has its keys from the kernel's random numbers.
fn random() -> u64 {
    RandomState::new().hash_one(0_u8)
}

/// The translated source ports: those of the flag, else what the node itself leaves. Says which, and why.
fn translated_ports(given: Option<PortRange>, masqueraded: &PortRange) -> Vec<RangeInclusive<u16>> {
    // Conntrack gives those out, and knows nothing of the flows of the programs.
    let taken = local_ports::read().with(masqueraded.first..=masqueraded.last);
    if let Some(PortRange { first, last }) = given {
        for clash in taken.clashes(&(first..=last)) {
            tracing::warn!(
                "--snat-ports {first}-{last}: {clash}; a flow and a connection of the node may get the same port"
            );
        }
        if first <= masqueraded.last && masqueraded.first <= last {
            tracing::warn!(
                "--snat-ports {first}-{last}: netfilter has some of them (--masquerade-ports); a flow may get another's answers"
            );
        }
        return vec![first..=last];
    }
    let ports = taken.left();
    if ports.is_empty() {
        tracing::warn!(
            "the node itself uses all ports, {taken}; translated sources share 61000-65535 with it"
        );
        return vec![61_000..=65_535];
    }
    let number: usize = ports.iter().map(ExactSizeIterator::len).sum();
    let ranges: Vec<_> = ports.iter().map(|ports| format!("{}-{}", ports.start(), ports.end())).collect();
    tracing::info!("{number} translated source ports, {}: all but {taken}", ranges.join(","));
    ports
}

/// What netfilter is to do.
pub(super) fn masquerade(args: &AgentArgs) -> Masquerade {
    let PortRange { first, last } = args.masquerade_ports;
    let mark = if args.keep_client_source && !args.masquerade_all { 0 } else { 1 << args.masquerade_bit };
    let connection_mark = args.connection_mark_bit.map_or(0, |bit| 1 << bit);
    Masquerade { mark, ports: first..=last, connection_mark }
}

/// Which interfaces the flags choose.
pub(super) fn choice(args: &AgentArgs) -> Choice {
    Choice { uplinks: args.uplink.clone(), pods: args.pod_interface.clone() }
}

/// As kubelet and kube-proxy: without a name, the host's in lower case.
pub(crate) fn node_name(given: Option<&str>) -> Arc<str> {
    let host = || {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        name.trim().to_lowercase()
    };
    given.map_or_else(|| host().into(), |name| name.trim().to_lowercase().into())
}

fn node_port_addresses(ranges: &[NodePortRange]) -> NodePortAddresses {
    let cidrs: Vec<_> = ranges
        .iter()
        .filter_map(|range| match range {
            NodePortRange::Cidr(cidr) => Some(*cidr),
            NodePortRange::Primary => None,
        })
        .collect();
    match (ranges, cidrs.is_empty()) {
        ([], _) => NodePortAddresses::All,
        (_, true) => NodePortAddresses::Primary,
        (_, false) => NodePortAddresses::Within(cidrs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Cli, Command};
    use clap::Parser as _;

    fn settings(flags: &[&str]) -> Settings {
        let cli = Cli::try_parse_from(["portolan", "agent"].iter().chain(flags)).unwrap();
        let Command::Agent(args) = cli.command else { panic!("not the agent") };
        Settings::new(&args, 7, true)
    }

    #[test]
    fn flags_become_the_bits_that_programs_read() {
        assert_eq!(settings(&[]).node.flags, Node::FIB_SOURCE);
        assert_eq!(settings(&["--socket-lb=all"]).node.flags, Node::FIB_SOURCE | Node::SOCKET_LB_PODS);
        let flags = [
            "--socket-lb=all",
            "--cluster-ip-from-outside=refuse",
            "--masquerade-all",
            "--source-ranges-everywhere",
        ];
        let expected = Node::FIB_SOURCE
            | Node::CLUSTER_IP_INSIDE_ONLY
            | Node::MASQUERADE_ALL
            | Node::SOURCE_RANGES_EVERYWHERE;
        assert_eq!(settings(&flags).node.flags, expected);
    }

    /// P17
    #[test]
    fn node_ports_answer_everywhere_unless_told() {
        assert_eq!(settings(&[]).node.node_port_addresses, NodePortAddresses::All);
        let primary = settings(&["--nodeport-addresses", "primary"]);
        assert_eq!(primary.node.node_port_addresses, NodePortAddresses::Primary);
        let ranges = settings(&["--nodeport-addresses", "10.0.0.0/8,fd00::/8"]).node.node_port_addresses;
        assert_eq!(
            ranges,
            NodePortAddresses::Within(vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()])
        );
    }

    /// Z1
    #[test]
    fn external_ips_are_served_unless_told() {
        assert_eq!(settings(&[]).external_ips, compile::ExternalIps::All);
        assert_eq!(settings(&["--external-ips=not-of-node"]).external_ips, compile::ExternalIps::NotOfNode);
        assert_eq!(settings(&["--external-ips=none"]).external_ips, compile::ExternalIps::None);
    }

    #[test]
    fn a_node_s_name_is_lower_case_as_kubelet_has_it() {
        assert_eq!(&*settings(&["--node-name", "Node-1"]).node_name, "node-1");
        assert_eq!(&*settings(&["--hostname-override", "other"]).node_name, "other");
    }
}
