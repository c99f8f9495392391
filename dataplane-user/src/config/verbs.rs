//! The flags of the verbs that ask, and of those that tidy up.

use super::{DEFAULT_BPFFS, DEFAULT_STATE, PortRange, ServerChoice, named};
use crate::admin::watch::kind_name;
use crate::watch::cluster::ApiServer;
use clap::{Args, Subcommand, ValueEnum};
use clap_complete::Shell;
use dataplane_common::drop::Reason;
use dataplane_common::event::EventKind;
use dataplane_common::node::Prefix;
use dataplane_common::{Addr, Protocol};
use ipnet::IpNet;
use std::ffi::OsString;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Flags of `portolan note-api-server`.
#[derive(Clone, Debug, Args)]
pub struct NoteArgs {
    /// The kubelet's kubeconfig.
    #[arg(long, value_name = "FILE", default_value = "/etc/kubernetes/kubelet.conf")]
    pub kubelet_kubeconfig: PathBuf,
    /// Folder of what outlives a reboot.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
    pub state_dir: PathBuf,
}

/// Flags of `portolan cleanup`.
#[derive(Clone, Debug, Args)]
pub struct CleanupArgs {
    /// Folder of the pins.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,
    /// Folder of what outlives a reboot.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
    pub state_dir: PathBuf,
    /// Leave what is in the state folder.
    #[arg(long)]
    pub keep_state: bool,
}

/// Flags of the verbs that show what the kernel holds.
#[derive(Clone, Debug, Args)]
pub struct ShowArgs {
    /// Folder of the pins.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,
    /// How it is printed.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Ask the node of this name in place of this one, by `kubectl exec` in the pod of its agent. Needs no root here, but `kubectl`.
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Ask each node of the cluster by `kubectl exec`: all of them in one answer. Needs no root here, but `kubectl`.
    #[arg(long, conflicts_with = "node")]
    pub all_nodes: bool,
}

/// Flags of `portolan status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Where it looks and how it is printed.
    #[command(flatten)]
    pub show: ShowArgs,
    /// End with 0 in place of 3 where Services are served and somebody should look at something.
    #[arg(long)]
    pub allow_warnings: bool,
}

/// Flags of `portolan check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// Credentials for the API server; without it, those of the pod this runs in.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where API servers are, as the agent's flag has it.
    #[arg(long, env = "PORTOLAN_API_SERVER", value_name = "SERVER|auto", default_value = "auto", value_delimiter = ',', num_args = 1..)]
    pub api_server: Vec<ServerChoice>,
    /// The cgroup whose sockets would be served; without it, the root of the cgroup2 mount.
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Ports that translated sources would get; without it, all that the node does not use itself.
    #[arg(long, value_name = "FIRST-LAST")]
    pub snat_ports: Option<PortRange>,
    /// Folder of what outlives a reboot.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
    pub state_dir: PathBuf,
    /// Try the Services of the cluster from a pod on each node, or on the one that --node names: ClusterIPs, node ports, DNS, a pod that
    /// calls itself, traffic policies, a Service without endpoints. Makes a namespace `portolan-check-…`, and removes it whatever
    /// happens. Needs no root here, but `kubectl`, and the right to make namespaces.
    #[arg(long)]
    pub pods: bool,
    /// With --pods: the image of the pods; without it, that of the agents.
    #[arg(long, value_name = "IMAGE", requires = "pods")]
    pub image: Option<String>,
    /// Where it looks and how it is printed.
    #[command(flatten)]
    pub show: ShowArgs,
}

/// Flags of `portolan report`.
#[derive(Clone, Debug, Args)]
pub struct ReportArgs {
    /// Folder of the pins.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,
    /// The file that is written, a tar.gz.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Of the node of this name in place of this one, by `kubectl`, with the log of its agent. Needs no root here.
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Of each node of the cluster by `kubectl`, with the logs of the agents, a folder for each. Needs no root here.
    #[arg(long, conflicts_with = "node")]
    pub all_nodes: bool,
}

impl ReportArgs {
    /// Whether it is of other nodes.
    pub const fn is_remote(&self) -> bool {
        self.all_nodes || self.node.is_some()
    }
}

impl CheckArgs {
    /// The defaults, for another pin folder.
    pub fn of(bpffs: &Path) -> Self {
        Self {
            kubeconfig: None,
            api_server: Vec::new(),
            cgroup: None,
            snat_ports: None,
            state_dir: DEFAULT_STATE.into(),
            pods: false,
            image: None,
            show: ShowArgs { bpffs: bpffs.to_owned(), output: Output::Table, node: None, all_nodes: false },
        }
    }

    /// The API servers that were named; none: one is looked for.
    pub fn named_servers(&self) -> Vec<ApiServer> {
        named(&self.api_server)
    }
}

/// Flags of `portolan explain`.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// Who calls: an address, with a port or without, or `node`.
    pub from: String,
    /// Who is called: an address and port, a Service, or `node:PORT`.
    pub to: String,
    /// By which protocol; without it, the one that is served there.
    #[arg(long, value_name = "tcp|udp|sctp", value_parser = protocol)]
    pub protocol: Option<Protocol>,
    /// Name of this machine's Node object, as the agent has it: where no agent answers, its snapshot tells of endpoints.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// The agent's --service-proxy-name, for the same.
    #[arg(long, value_name = "NAME")]
    pub service_proxy_name: Option<String>,
    /// The agent's --state-dir, for the same.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
    pub state_dir: PathBuf,
    /// Where it looks and how it is printed.
    #[command(flatten)]
    pub show: ShowArgs,
}

/// What a pod of `portolan check --pods` does.
#[derive(Clone, Debug, Subcommand)]
pub enum ProbeCommand {
    /// Answers whoever calls.
    Serve(ProbeArgs),
    /// Calls.
    Ask(AskArgs),
}

/// Flags of the server.
#[derive(Clone, Debug, Args)]
pub struct ProbeArgs {
    /// The port, of TCP and of UDP.
    #[arg(long, value_name = "PORT")]
    pub port: u16,
    /// What it calls its node.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: String,
    /// What it calls itself.
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pub pod: String,
}

/// Flags of the client.
#[derive(Clone, Debug, Args)]
pub struct AskArgs {
    /// A name or an address, and a port.
    pub target: String,
    /// By UDP.
    #[arg(long)]
    pub udp: bool,
    /// How often.
    #[arg(long, default_value_t = 1)]
    pub count: u32,
    /// Milliseconds to wait for each.
    #[arg(long, default_value_t = 2_000)]
    pub timeout: u64,
}

/// Flags of `portolan watch`.
#[derive(Clone, Debug, Args)]
pub struct WatchArgs {
    /// Only what is about this Service: `namespace/name`, or one port of it, `namespace/name:port`.
    #[arg(long, value_name = "SERVICE")]
    pub service: Option<String>,
    /// Only what has this address at either end; or, with --node or --all-nodes, this pod: `name` or `namespace/name`. `node` is the
    /// node itself.
    #[arg(long, value_name = "POD")]
    pub pod: Option<String>,
    /// Only what was moved, refused or dropped for one of these reasons, as `portolan drops` has them.
    #[arg(long, value_name = "REASON", value_delimiter = ',', value_parser = reason)]
    pub reason: Vec<String>,
    /// Only events of these kinds.
    #[arg(long, value_enum, value_name = "KIND", value_delimiter = ',')]
    pub event: Vec<WatchEvent>,
    /// The packets of flows that begin from now on, each at every hook that it meets: of clients in a range
    /// (`client=10.0.0.0/8`), to a Service (`service=namespace/name:port`), or both, with a comma. Up to 1,000 in half a second are told.
    #[arg(long, value_name = "FILTER")]
    pub packets: Option<PacketFilter>,
    /// Show so many in a second at most, and how many were left out.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: Option<u32>,
    /// End when so many were shown.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Where it looks and how it is printed.
    #[command(flatten)]
    pub show: ShowArgs,
}

impl WatchArgs {
    /// Whether other nodes are watched, from here.
    pub const fn is_remote(&self) -> bool {
        self.show.all_nodes || self.show.node.is_some()
    }

    /// The command line for one of those nodes: what is left is for whoever puts them together.
    pub fn for_a_node(&self) -> Vec<OsString> {
        let mut words = vec!["watch".to_owned(), "--output=json".to_owned()];
        words.extend(self.service.iter().map(|service| format!("--service={service}")));
        words.extend(self.reason.iter().map(|reason| format!("--reason={reason}")));
        words.extend(self.event.iter().map(|event| format!("--event={}", event.name())));
        words.extend(self.packets.iter().map(|filter| format!("--packets={}", filter.text)));
        if self.show.bpffs != Path::new(DEFAULT_BPFFS) {
            words.push(format!("--bpffs={}", self.show.bpffs.display()));
        }
        words.into_iter().map(OsString::from).collect()
    }
}

/// A kind of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WatchEvent {
    /// A flow began.
    Begun,
    /// A flow was given to another endpoint.
    Moved,
    /// Both ends have confirmed it.
    Established,
    /// A packet, or the call of a socket, was refused.
    Refused,
    /// A packet was dropped.
    Dropped,
    /// A flow ended.
    Ended,
    /// A packet of a flow that --packets asks for.
    Packet,
}

impl WatchEvent {
    /// As it is written.
    pub const fn name(self) -> &'static str {
        kind_name(match self {
            Self::Begun => EventKind::Begun,
            Self::Moved => EventKind::Moved,
            Self::Established => EventKind::Established,
            Self::Refused => EventKind::Refused,
            Self::Dropped => EventKind::Dropped,
            Self::Ended => EventKind::Ended,
            Self::Packet => EventKind::Packet,
        })
    }
}

/// Whose packets are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketFilter {
    /// Where their clients are.
    pub client: Prefix,
    /// The Service that they call, with its port or without; none: any.
    pub service: Option<String>,
    text: String,
}

impl PacketFilter {
    /// Whether a client is one of them.
    pub fn is_of(&self, client: &Addr) -> bool {
        let everybody = self.client.mask.is_unspecified();
        everybody || self.client.contains(client)
    }
}

impl FromStr for PacketFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut filter =
            Self { client: Prefix::new(Addr::UNSPECIFIED, 0), service: None, text: text.to_owned() };
        for part in text.split(',') {
            match part.split_once('=') {
                Some(("client", range)) => filter.client = prefix(range)?,
                Some(("service", service)) if service.contains('/') => {
                    filter.service = Some(service.to_owned());
                }
                _ => return Err(format!("`{part}` is neither client=RANGE nor service=NAMESPACE/NAME:PORT")),
            }
        }
        Ok(filter)
    }
}

/// A range of addresses, or one address.
fn prefix(text: &str) -> Result<Prefix, String> {
    let one = || text.parse::<IpAddr>().map(IpNet::from);
    let range: IpNet =
        text.parse().or_else(|_| one()).map_err(|_| format!("`{text}` is no range of addresses"))?;
    let mapped = if range.addr().is_ipv4() { 96 } else { 0 };
    Ok(Prefix::new(range.addr().into(), mapped + u32::from(range.prefix_len())))
}

fn reason(text: &str) -> Result<String, String> {
    if Reason::ALL.iter().any(|reason| reason.label() == text) {
        return Ok(text.to_owned());
    }
    let all: Vec<_> = Reason::ALL.iter().map(|reason| reason.label()).collect();
    Err(format!("there is no such reason; there are {}", all.join(", ")))
}

/// Flags of `portolan completion`.
#[derive(Clone, Debug, Args)]
pub struct CompletionArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: Shell,
}

/// How something is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// The same with more of it.
    Wide,
    /// JSON, for programs: fields are added, and none goes or changes within a major version.
    Json,
    /// YAML with the same fields.
    Yaml,
}

fn protocol(text: &str) -> Result<Protocol, String> {
    match text.to_ascii_lowercase().as_str() {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        "sctp" => Ok(Protocol::Sctp),
        _ => Err(format!("`{text}` is none of tcp, udp and sctp")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_asked_for_by_their_client_and_their_service() {
        let addr = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap());
        let filter: PacketFilter = "client=10.1.0.0/16,service=shop/web:http".parse().unwrap();
        assert_eq!(filter.service.as_deref(), Some("shop/web:http"));
        assert!(filter.is_of(&addr("10.1.2.3")) && !filter.is_of(&addr("10.2.2.3")));
        let one: PacketFilter = "client=fd00::7".parse().unwrap();
        assert!(one.is_of(&addr("fd00::7")) && !one.is_of(&addr("fd00::8")) && !one.is_of(&addr("10.0.0.1")));
        let all: PacketFilter = "service=shop/web".parse().unwrap();
        assert!(all.is_of(&addr("fd00::7")) && all.is_of(&addr("10.0.0.1")));
        for wrong in ["", "web", "client=here", "service=web", "port=80"] {
            assert!(wrong.parse::<PacketFilter>().is_err(), "{wrong}");
        }
    }
}
