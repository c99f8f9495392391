//! The command line: every flag, its default, and what is refused before anything is touched.
//!
//! A flag that means what a flag of kube-proxy means has its name.

pub mod kube_proxy;
mod verbs;

pub use verbs::{
    AskArgs, CheckArgs, CleanupArgs, CompletionArgs, ExplainArgs, NoteArgs, Output, PacketFilter, ProbeArgs,
    ProbeCommand, ReportArgs, ShowArgs, StatusArgs, WatchArgs, WatchEvent,
};

use crate::compile::{Sources, selection};
use crate::expire::LONGEST_IDLE;
use crate::kernel::pins::is_layout;
use crate::kernel::sysctls::Conntrack;
use crate::pattern::Pattern;
use crate::watch::cluster::ApiServer;
use clap::{Args, Parser, Subcommand, ValueEnum};
use dataplane_common::service::Algorithm;
use dataplane_common::tables::{self, Closing, Flows, HalfOpen, LAYOUT, Table as _};
use ipnet::IpNet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Where maps and links are pinned unless `--bpffs` says otherwise.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf/portolan";

/// Where what outlives a reboot is kept unless `--state-dir` says otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/portolan";

/// A Kubernetes Service dataplane for one node, in the place of kube-proxy.
#[derive(Debug, Parser)]
#[command(name = "portolan", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// What is logged to stderr: error, warn, info, debug, trace, or a filter such as `info,portolan=debug`.
    #[arg(
        long,
        global = true,
        env = "PORTOLAN_LOG",
        default_value = "info",
        value_name = "FILTER",
        overrides_with = "log",
        display_order = 1_000
    )]
    pub log: String,
    /// How it is logged.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, display_order = 1_001)]
    pub logging_format: LogFormat,
}

/// `--logging-format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// A JSON object for each line, with `timestamp`, `level` and `fields`.
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the node agent in the foreground.
    Agent(Box<AgentArgs>),
    /// Mount a BPF file system if the pin folder lies on none, and make that folder.
    ///
    /// For nodes whose init system mounts none, such as those of kind: an init container runs it before the agent, which has no
    /// right to mount. Where there is one, nothing is mounted.
    MountBpffs(PinArgs),
    /// Note where the kubelet finds the API server, for an agent that may not read the kubelet's kubeconfig.
    ///
    /// For an init container: the kubeconfig names credentials, and of these nothing is noted. Where there is no such file, or none
    /// that can be read, nothing is done.
    NoteApiServer(NoteArgs),
    /// Make the settings of the node's conntrack that the agent may not make: their number, and how long they may be idle.
    ///
    /// For an init container that is privileged: a container that is not sees the kernel's settings read-only. What cannot be set is
    /// told, and is no error.
    SetConntrack(ConntrackArgs),
    /// Remove every program, map and pin, and what is kept on disk, and say what was removed.
    ///
    /// Services are then served no more on this node, and connections through them break. An agent that runs must be stopped
    /// first. On kernels before 6.6, run it in the agent's network namespace: the tc filters are found there.
    Cleanup(CleanupArgs),
    /// One screen about this node: agent, API server, Services, tables, interfaces, and what somebody should look at.
    ///
    /// Needs root. Says what it can where no agent runs, or where the kernel holds nothing. Its exit code is 0 if all is well, 3 if
    /// somebody should look at something although Services are served, and 4 if they are not served as they should be.
    Status(StatusArgs),
    /// The Services that the kernel holds, a row for each port and IP family.
    ///
    /// Reads the pinned maps: needs root, but no agent. CLUSTER and LOCAL are the numbers of endpoints in the set of the whole
    /// cluster and in that of this node. A connection whose endpoint was chosen at its socket counts as a flow; its packets
    /// are not counted.
    Services(ShowArgs),
    /// The endpoints that the kernel holds, and their traffic.
    ///
    /// Reads the pinned maps: needs root, but no agent. NODE tells whether the endpoint is on this node or another. One that is
    /// draining gets no new flow and keeps those it has.
    Backends(ShowArgs),
    /// The flows that the kernel holds.
    ///
    /// Reads the pinned maps: needs root, but no agent. SOURCE-AS is the source that the endpoint sees, where it is not the
    /// client itself. Connections whose endpoint was chosen at their socket are not translated by packet, and are not here:
    /// `portolan backends` counts them.
    Flows(ShowArgs),
    /// Why packets were dropped or refused, and how often.
    ///
    /// Reads the pinned maps: needs root, but no agent. The table has the reasons that occurred since the maps were made; JSON
    /// has all of them.
    Drops(ShowArgs),
    /// The TCP connections to Services that are left to another proxy, whose netfilter rules translated them before.
    ///
    /// Reads the pinned maps and the node's conntrack: needs root and the node's network namespace, but no agent. EXPIRES is the
    /// time after which conntrack forgets a connection if nothing comes.
    TakeOver(ShowArgs),
    /// Whether this node can run Portolan, before an install; and whether it serves, afterwards. Beside each fault it says what helps.
    ///
    /// Changes nothing, but for --pods. Needs root and the node's network namespace. Where an agent runs it opens a connection to the API server's
    /// Service and to DNS, as any process of the node does. The exit code is 0 if all is well, 3 if somebody should look at something,
    /// and 4 if something does not work.
    Check(CheckArgs),
    /// One archive for a bug report: what the other verbs show, the agent's metrics, and how the node is set up.
    ///
    /// Needs root, but not on a workstation: with --node or --all-nodes it comes from there, with the agents' logs. Without --output it is
    /// written to stdout. It holds no credentials; it names Services, addresses and nodes.
    Report(ReportArgs),
    /// What becomes of a new connection, and why: computed by the programs that forward, on the live tables, and changing nothing.
    ///
    /// FROM is an address, with a port or without, or `node`. TO is an address and port, a Service (`default/kubernetes:https`), or a
    /// node port of this node (`node:30080`). Needs root and the node's network namespace; an agent tells besides why endpoints take
    /// no part. The exit code is 0 if the connection is served, 3 if it is none of Portolan's, and 4 if it is dropped or refused.
    Explain(ExplainArgs),
    /// What becomes of flows, as it happens: a line for each that begins, moves, is established, refused, dropped, or ends.
    ///
    /// Needs root, but no agent. Any number may watch; packets wait for none of them, and what is not read in time is lost, and counted.
    /// Only what is new is told: packets of established flows are not, but for those that --packets asks for. JSON is a line for each
    /// event. A connection whose endpoint was chosen at its socket has no end here. Ctrl-C ends it.
    Watch(Box<WatchArgs>),
    /// One end of a call by which `portolan check --pods` tries a cluster.
    #[command(subcommand, hide = true)]
    Probe(ProbeCommand),
    /// Print a script by which a shell completes the verbs and flags: `source <(portolan completion bash)`.
    Completion(CompletionArgs),
}

impl Command {
    /// Where a verb asks that can ask other nodes by having them run it; none: it runs here, or puts nodes together by itself.
    pub fn asks(&self) -> Option<&ShowArgs> {
        match self {
            Self::Status(args) if args.show.all_nodes => None,
            Self::Status(args) => Some(&args.show),
            Self::Check(args) if args.pods => None,
            Self::Check(args) => Some(&args.show),
            Self::Explain(args) => Some(&args.show),
            Self::Services(show)
            | Self::Backends(show)
            | Self::Flows(show)
            | Self::Drops(show)
            | Self::TakeOver(show) => Some(show),
            Self::Agent(_)
            | Self::MountBpffs(_)
            | Self::NoteApiServer(_)
            | Self::SetConntrack(_)
            | Self::Cleanup(_)
            | Self::Report(_)
            | Self::Watch(_)
            | Self::Probe(_)
            | Self::Completion(_) => None,
        }
    }
}

/// Flags of `portolan agent`.
#[derive(Clone, Debug, Args)]
pub struct AgentArgs {
    /// kube-proxy's configuration file (KubeProxyConfiguration): what has a counterpart here is taken, where no flag says otherwise, and
    /// the log lists what is ignored.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of this machine's Node object; without it, the host name.
    #[arg(long, env = "NODE_NAME", value_name = "NAME", visible_alias = "hostname-override")]
    pub node_name: Option<String>,
    /// Credentials for the API server; without it and without --manifests, those of the pod this runs in.
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    pub kubeconfig: Option<PathBuf>,
    /// Where API servers are, as HOST, HOST:PORT or URL: the first that answers is asked. `auto`: the one of --kubeconfig; in a pod,
    /// the endpoints of the cluster's own Service as they were last, proxies on this node (127.0.0.1:7445 and :6444), what
    /// note-api-server has written, and what the environment of the pod says, in this order.
    #[arg(
        long,
        env = "PORTOLAN_API_SERVER",
        value_name = "SERVER|auto",
        default_value = "auto",
        value_delimiter = ',',
        num_args = 1..,
        conflicts_with = "manifests"
    )]
    pub api_server: Vec<ServerChoice>,
    /// Read the objects from the YAML files of this folder, watched live, instead of an API server.
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// Folder for the pins of maps and links, on a BPF file system.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,
    /// The cgroup whose sockets are served; without it, the root of the cgroup2 mount.
    #[arg(long, value_name = "DIR")]
    pub cgroup: Option<PathBuf>,
    /// Interfaces to the network, by name or pattern (`eth*`), and no others; without it, each that has an address of the node or
    /// a route to others.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',', num_args = 1..)]
    pub uplink: Vec<Pattern>,
    /// Interfaces to pods, by name or pattern, and no others; without it, each that leads to single addresses of guests, such as a
    /// veth.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',', num_args = 1..)]
    pub pod_interface: Vec<Pattern>,
    /// Ranges of pod addresses of the whole cluster: no external or load balancer address may lie in them.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', num_args = 1..)]
    pub pod_cidr: Vec<IpNet>,
    /// Flags of kube-proxy that say which clients are pods: they are refused, with what to use.
    #[arg(long, value_parser = told_by_interface, hide = true)]
    pub cluster_cidr: Option<Refused>,
    /// As above.
    #[arg(long, value_parser = told_by_interface, hide = true)]
    pub detect_local_mode: Option<Refused>,
    /// As above.
    #[arg(long, value_parser = told_by_interface, hide = true)]
    pub pod_bridge_interface: Option<Refused>,
    /// As above.
    #[arg(long, value_parser = told_by_interface, hide = true)]
    pub pod_interface_name_prefix: Option<Refused>,
    /// Ranges of ClusterIPs; without it, those of the ServiceCIDR objects.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', num_args = 1..)]
    pub service_cidr: Vec<IpNet>,
    /// A route of Portolan's own for the ranges of ClusterIPs, so that what the node itself sends there is served whatever its
    /// other routes are.
    #[arg(long, value_enum, default_value_t = ServiceRoute::Auto)]
    pub service_route: ServiceRoute,
    /// Ranges in which the node's addresses answer on node ports, or `primary`; without it, all its addresses.
    #[arg(long, value_name = "CIDR|primary", value_delimiter = ',', num_args = 1..)]
    pub nodeport_addresses: Vec<NodePortRange>,
    /// Whose TCP connections get their endpoint when they connect, at no cost per packet. With `all`, what runs beside a program in its
    /// pod and tells Services by their addresses (the sidecar of a mesh, a sandbox, a cluster in a pod) sees endpoints instead.
    #[arg(long, value_enum, default_value_t = SocketLb::Host)]
    pub socket_lb: SocketLb,
    /// XDP on uplinks: `auto` is native where the driver keeps its offloads, else off.
    #[arg(long, value_enum, default_value_t = XdpMode::Auto)]
    pub xdp: XdpMode,
    /// How tc programs are attached: `clsact` is what kernels before 6.6 get, for tests.
    #[arg(long, value_enum, default_value_t = TcMode::Auto, hide = true)]
    pub tc: TcMode,
    /// Further drivers on which `--xdp auto` is native, for tests.
    #[arg(long, value_name = "DRIVER", value_delimiter = ',', hide = true)]
    pub xdp_driver: Vec<String>,
    /// The name of the maps' layout, for tests of an upgrade that changes it.
    #[arg(long, value_name = "vN", default_value = LAYOUT, value_parser = layout, hide = true)]
    pub map_layout: String,
    /// Ports that translated sources get; no local socket may use them. Without it, all from 1024 on that the node itself does not
    /// use: but for `ip_local_port_range`, `ip_local_reserved_ports`, 30000-32767 and the ports of sockets that are open at the start.
    #[arg(long, value_name = "FIRST-LAST")]
    pub snat_ports: Option<PortRange>,
    /// How many established flows there is room for; without it, by the node's memory, at least 131,072 and 32,768 for each CPU. What is
    /// not used takes 16 bytes for a direction of a flow.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1_024..=16_777_216))]
    pub max_flows: Option<u32>,
    /// Room in one map, such as `frontends=131072`.
    #[arg(long, value_name = "MAP=ENTRIES", value_delimiter = ',', num_args = 1..)]
    pub map_size: Vec<MapSize>,
    /// Which externalIPs of Services are served: whoever may write a Service can take any address by them.
    #[arg(long, value_enum, default_value_t = ExternalIps::All)]
    pub external_ips: ExternalIps,
    /// How endpoints are chosen where a Service's annotation asks for nothing: random, round-robin, least-connections, maglev,
    /// source-hash, or a name that an IPVS scheduler of the same meaning has.
    #[arg(
        long,
        visible_alias = "ipvs-scheduler",
        value_name = "ALGORITHM",
        default_value = Algorithm::Random.name(),
        value_parser = selection::algorithm
    )]
    pub lb_algorithm: Algorithm,
    /// How often a connection by packet whose endpoint is silent, refuses it or cannot be reached is given to another, and a UDP question
    /// that is refused, where a Service's annotation does not say it (L5). 0: never.
    #[arg(long, value_name = "N", default_value_t = selection::DEFAULT_TRIES, value_parser = clap::value_parser!(u32).range(0..=7))]
    pub lb_retry: u32,
    /// What becomes of a ClusterIP that is called from outside the cluster.
    #[arg(long, value_enum, default_value_t = FromOutside::Allow)]
    pub cluster_ip_from_outside: FromOutside,
    /// Have endpoints of this node see the client's own address where it calls a node port, an external IP or a load balancer's from
    /// outside, also with externalTrafficPolicy Cluster. kube-proxy translates it, and so does Portolan without this flag.
    #[arg(long)]
    pub keep_client_source: bool,
    /// The bit of a packet's mark by which netfilter is told whose source it is to translate.
    #[arg(long, visible_alias = "iptables-masquerade-bit", value_name = "BIT", default_value_t = 14, value_parser = clap::value_parser!(u8).range(0..=31))]
    pub masquerade_bit: u8,
    /// The bit of a packet's mark that is set on what comes from outside to a Service, and that netfilter notes of the connection, for
    /// nodes with rules of routing by a connection's mark: 7 where the CNI plugin of AWS marks so.
    #[arg(long, value_name = "BIT", value_parser = clap::value_parser!(u8).range(0..=31))]
    pub connection_mark_bit: Option<u8>,
    /// Ports that netfilter gives these clients: none of --snat-ports, of node ports, and of those that the node's own sockets get.
    #[arg(long, value_name = "FIRST-LAST", default_value = "1024-14999")]
    pub masquerade_ports: PortRange,
    /// Translate the source of all that pods send to ClusterIPs, as some pod networks need it. Their TCP goes by packet then, also with
    /// --socket-lb=all.
    #[arg(long)]
    pub masquerade_all: bool,
    /// Apply loadBalancerSourceRanges to node ports and external IPs too, not to load balancer addresses alone.
    #[arg(long)]
    pub source_ranges_everywhere: bool,
    /// Who may call node ports from outside: in place of rules in netfilter's prerouting, which the programs come before. Pods of other
    /// nodes are outside. Without it, everybody; so in a family of which no range is given.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', num_args = 1.., value_parser = clients)]
    pub nodeport_source_ranges: Vec<IpNet>,
    /// A YAML file that is followed live: `nodePortSources`, ranges beside those of --nodeport-source-ranges, and `deniedSources`,
    /// ranges that may call no Service from outside. A connection that lives goes on.
    #[arg(long, value_name = "FILE")]
    pub sources_file: Option<PathBuf>,
    /// Serve the Services with this value of the label service.kubernetes.io/service-proxy-name, and no others.
    #[arg(long, value_name = "NAME")]
    pub service_proxy_name: Option<String>,
    /// Where health is told, /healthz and /livez; empty: nowhere.
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:10256")]
    pub healthz_bind_address: BindAddress,
    /// Where metrics are told, /metrics and /proxyMode; empty: nowhere.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:10249")]
    pub metrics_bind_address: BindAddress,
    /// How many series of service ports and endpoints are told as metrics; the others are left out.
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub metrics_max_series: usize,
    /// Tell the counters of endpoints as metrics too, five series each: on every node, those of all endpoints of the cluster.
    #[arg(long)]
    pub metrics_endpoints: bool,
    /// Settings of conntrack.
    #[command(flatten)]
    pub conntrack: ConntrackArgs,
    /// Idle time after which an answered UDP flow is forgotten.
    #[arg(long, value_name = "TIME", default_value = "3m", value_parser = idle_time)]
    pub conntrack_udp_timeout_stream: Duration,
    /// Time between two audits of the kernel's tables; 0 for none.
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub audit_period: Duration,
    /// How long an update may wait for the kernel before /healthz and health check ports say that the node cannot serve.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = duration)]
    pub healthy_within: Duration,
    /// Time after which TCP connections are no longer left to another proxy whose netfilter rules translate them; 0: when the
    /// last of them has ended. Those that live then break.
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = duration)]
    pub take_over_limit: Duration,
    /// How long the event loop may be busy with one thing before /livez says that the agent hangs; jobs beside it may take five
    /// times as long.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub alive_within: Duration,
    /// Folder for what must outlive a reboot: the objects that the API server told last. With --manifests nothing is kept
    /// there, for the manifests are on a disk themselves.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
    pub state_dir: PathBuf,
    /// How old those objects may be to be served after a boot while the API server is away; 0: none are kept and none
    /// served.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = duration)]
    pub snapshot_max_age: Duration,
    /// Print the tables that would be written, and end.
    #[arg(long)]
    pub dry_run: bool,
}

/// Flags of `portolan mount-bpffs`.
#[derive(Clone, Debug, Args)]
pub struct PinArgs {
    /// Folder of the pins.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,
}

/// What conntrack is to be: as with kube-proxy.
#[derive(Clone, Debug, Args)]
pub struct ConntrackArgs {
    /// Idle time after which an established TCP flow is forgotten, by the programs and by the node's conntrack.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = idle_time)]
    pub conntrack_tcp_timeout_established: Duration,
    /// The same in the node's conntrack where one end has closed; 0: as it is.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    pub conntrack_tcp_timeout_close_wait: Duration,
    /// Connections that the node's conntrack has room for, for each CPU; 0: as many as it has.
    #[arg(long, value_name = "N", default_value_t = 32_768)]
    pub conntrack_max_per_core: u32,
    /// And at least so many.
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    pub conntrack_min: u32,
}

impl ConntrackArgs {
    /// What conntrack is to be on this machine.
    pub fn wanted(&self) -> Conntrack {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Conntrack::new(
            self.conntrack_max_per_core,
            self.conntrack_min,
            cpus,
            self.conntrack_tcp_timeout_established,
            self.conntrack_tcp_timeout_close_wait,
        )
    }
}

/// `--service-route`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ServiceRoute {
    /// To the device `portolan0`.
    Auto,
    /// None: what the node sends by packet is served where its route leaves by an uplink.
    Off,
}

/// `--socket-lb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SocketLb {
    /// The node's own sockets and those of pods.
    All,
    /// The node's own sockets.
    Host,
    /// None: all goes by packet.
    Off,
}

/// `--xdp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum XdpMode {
    /// Native where the driver keeps its offloads, else off.
    Auto,
    /// In the driver, of all uplinks but tunnels; one whose driver cannot is an error.
    Native,
    /// In the stack, of all uplinks but tunnels: slower than tc, for tests.
    Generic,
    /// tc does the work.
    Off,
}

/// `--tc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TcMode {
    /// TCX links where the kernel has them.
    Auto,
    /// clsact filters.
    Clsact,
}

/// `--external-ips`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExternalIps {
    /// All that can be addresses of hosts.
    All,
    /// All but those of this node itself.
    NotOfNode,
    /// None.
    None,
}

/// `--cluster-ip-from-outside`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FromOutside {
    /// Served, with the source translated (P10).
    Allow,
    /// Refused (P10).
    Refuse,
}

/// One entry of `--api-server`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerChoice {
    /// It is looked for.
    Auto,
    /// This one.
    Server(ApiServer),
}

impl FromStr for ServerChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::Server) }
    }
}

impl AgentArgs {
    /// The API servers that were named; none: one is looked for.
    pub fn named_servers(&self) -> Vec<ApiServer> {
        named(&self.api_server)
    }
}

fn named(choices: &[ServerChoice]) -> Vec<ApiServer> {
    let named = choices.iter().filter_map(|choice| match choice {
        ServerChoice::Auto => None,
        ServerChoice::Server(server) => Some(server.clone()),
    });
    named.collect()
}

/// One entry of `--nodeport-addresses`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortRange {
    /// The node's addresses in this range.
    Cidr(IpNet),
    /// The node's primary addresses.
    Primary,
}

impl FromStr for NodePortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "primary" {
            return Ok(Self::Primary);
        }
        text.parse()
            .map(Self::Cidr)
            .map_err(|_| format!("`{text}` is neither a range such as 10.0.0.0/8 nor `primary`"))
    }
}

/// Where to listen, or nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BindAddress(pub Option<SocketAddr>);

impl FromStr for BindAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        let address =
            text.parse().map_err(|_| format!("`{text}` is no address and port such as 0.0.0.0:10256"))?;
        Ok(Self(Some(address)))
    }
}

/// A range of ports, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortRange {
    /// The first.
    pub first: u16,
    /// The last.
    pub last: u16,
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('-').and_then(|(first, last)| {
            Some(Self { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? })
        });
        match parsed {
            Some(range) if range.first > 0 && range.first < range.last => Ok(range),
            Some(_) | None => Err(format!("`{text}` is no range of ports such as 61000-65535")),
        }
    }
}

/// One `--map-size`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapSize {
    /// The map's name in [`tables`].
    pub map: &'static str,
    /// Its number of entries.
    pub entries: u32,
}

impl FromStr for MapSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, entries) =
            text.split_once('=').ok_or_else(|| format!("`{text}` is not of the form MAP=ENTRIES"))?;
        let map = tables::ALL.iter().map(|(name, ..)| *name).filter(|map| !FIXED.contains(map));
        let Some(map) = map.clone().find(|map| *map == name) else {
            let names: Vec<_> = map.collect();
            return Err(format!(
                "there is no map `{name}` whose size can be set; there are {}",
                names.join(", ")
            ));
        };
        match entries.parse() {
            Ok(entries) if entries > 0 => Ok(Self { map, entries }),
            Ok(_) | Err(_) => Err(format!("`{entries}` is no number of entries")),
        }
    }
}

/// What the room for flows depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Bytes of memory.
    pub memory: u64,
    /// CPUs.
    pub cpus: usize,
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next());
        let kibibytes: u64 = total.and_then(|number| number.parse().ok()).unwrap_or_default();
        Self { memory: kibibytes << 10, cpus: std::thread::available_parallelism().map_or(1, usize::from) }
    }

    /// How many established flows there is room for beside so many of the other stages: as kube-proxy has it at least, and an entry
    /// for each 32 KiB of memory, up to four million.
    fn established(self, others: usize) -> usize {
        const LEAST: usize = 131_072;
        const FOR_EACH_CPU: usize = 32_768;
        const MEMORY_OF_AN_ENTRY: u64 = 32 << 10;
        const MOST_ENTRIES: u64 = 1 << 22;
        let entries = (self.memory / MEMORY_OF_AN_ENTRY).min(MOST_ENTRIES) as usize;
        let by_memory = (entries / 2).saturating_sub(others);
        by_memory.max(LEAST).max(FOR_EACH_CPU.saturating_mul(self.cpus))
    }
}

/// Maps whose size the programs know, or that have none.
const FIXED: &[&str] = &[
    "node",
    "filter",
    "callers",
    "turns",
    "port_turn",
    "reasons",
    "watch",
    "events",
    "answers",
    "scratch",
    "socket_names",
];

impl AgentArgs {
    /// Each map whose size differs from its default on this machine, and the size.
    ///
    /// `flows` has room for what is established and for all that the rings of the other stages name, two entries each; the
    /// traffic of services and backends has as many as these.
    pub fn map_sizes(&self, machine: Machine) -> Vec<MapSize> {
        let mut sizes: Vec<MapSize> = Vec::new();
        let set = |map: &str| self.map_size.iter().rfind(|size| size.map == map);
        let rings = [(HalfOpen::NAME, HalfOpen::CAPACITY), (Closing::NAME, Closing::CAPACITY)];
        let [half_open, closing] =
            rings.map(|(ring, default)| set(ring).map_or(default, |size| size.entries as usize));
        let named = half_open + closing;
        let established = self.max_flows.map_or_else(|| machine.established(named), |flows| flows as usize);
        let entries = tables::flow_entries(established, half_open, closing);
        sizes.push(MapSize { map: Flows::NAME, entries: u32::try_from(entries).unwrap_or(u32::MAX) });
        for size in &self.map_size {
            sizes.push(size.clone());
            let followers: &[&'static str] = match size.map {
                "services" => &["service_traffic", "service_tries", "rounds"],
                "backends" => &["backend_traffic", "open"],
                _ => continue,
            };
            sizes.extend(followers.iter().map(|map| MapSize { map, entries: size.entries }));
        }
        sizes
    }
}

/// A number with a unit as kube-proxy writes it: `90s`, `5m`, `24h`, `1h30m`, `0`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no length of time such as 90s, 5m or 24h");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u32 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |end| digits + end);
        let one = match &rest[digits..unit] {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3_600),
            _ => return Err(wrong()),
        };
        total = one.checked_mul(number).and_then(|part| total.checked_add(part)).ok_or_else(wrong)?;
        rest = &rest[unit..];
    }
    if text.is_empty() { Err(wrong()) } else { Ok(total) }
}

/// A range of clients; `/0` is everybody of a family.
fn clients(text: &str) -> Result<IpNet, String> {
    let range: IpNet = text.parse().map_err(|error| format!("{error}"))?;
    if range.prefix_len() != 0 {
        Sources::check(&range)?;
    }
    Ok(range)
}

/// The value of a flag that has none: it is refused.
#[derive(Clone, Debug)]
pub enum Refused {}

/// kube-proxy asks an address, a bridge or a name for what the kernel tells of each interface.
fn told_by_interface(_: &str) -> Result<Refused, String> {
    let text = "Portolan tells pods by the interfaces that they are behind, whatever their addresses: leave this flag out. \
                --pod-interface names those interfaces where the log says that it takes them for something else; --pod-cidr \
                keeps external IPs out of ranges of pods";
    Err(text.to_owned())
}

fn layout(text: &str) -> Result<String, String> {
    if is_layout(text) { Ok(text.to_owned()) } else { Err(format!("`{text}` is no layout such as {LAYOUT}")) }
}

/// A length of time after which a flow may be removed.
fn idle_time(text: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    if time > LONGEST_IDLE {
        return Err(format!(
            "the longest idle time is {} h: the kernel's clock of flows goes round",
            LONGEST_IDLE.as_secs() / 3_600
        ));
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(flags: &[&str]) -> Result<AgentArgs, clap::Error> {
        let cli = Cli::try_parse_from(["portolan", "agent"].iter().chain(flags))?;
        let Command::Agent(args) = cli.command else { panic!("not the agent") };
        Ok(*args)
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn the_defaults_are_the_documented_ones() {
        let args = agent(&[]).unwrap();
        assert_eq!(args.bpffs, PathBuf::from("/sys/fs/bpf/portolan"));
        assert_eq!(args.snat_ports, None);
        assert_eq!(args.masquerade_ports, PortRange { first: 1_024, last: 14_999 });
        assert_eq!((args.masquerade_bit, args.keep_client_source), (14, false));
        assert_eq!(args.healthz_bind_address.0.unwrap().to_string(), "0.0.0.0:10256");
        assert_eq!(args.metrics_bind_address.0.unwrap().to_string(), "127.0.0.1:10249");
        assert_eq!(args.socket_lb, SocketLb::Host);
        assert_eq!(args.xdp, XdpMode::Auto);
        let sizes = args.map_sizes(SMALL);
        assert_eq!(sizes.iter().map(|size| size.map).collect::<Vec<_>>(), ["flows"]);
    }

    #[test]
    fn lists_are_given_by_commas_or_by_repeating_the_flag() {
        let args = agent(&["--uplink", "eth0,ens*", "--uplink", "wg0"]).unwrap();
        assert_eq!(args.uplink.len(), 3);
        let args = agent(&["--nodeport-addresses", "primary,10.0.0.0/8"]).unwrap();
        assert_eq!(args.nodeport_addresses[0], NodePortRange::Primary);
        assert_eq!(args.nodeport_addresses[1], NodePortRange::Cidr("10.0.0.0/8".parse().unwrap()));
    }

    #[test]
    fn an_empty_bind_address_listens_nowhere() {
        assert_eq!(agent(&["--healthz-bind-address="]).unwrap().healthz_bind_address, BindAddress(None));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for flags in [
            ["--snat-ports", "65535-61000"],
            ["--snat-ports", "0-100"],
            ["--snat-ports", "61000"],
            ["--masquerade-bit", "32"],
            ["--nodeport-source-ranges", "::/8"],
            ["--masquerade-ports", "29999"],
            ["--pod-cidr", "10.0.0.0"],
            ["--nodeport-addresses", "eth0"],
            ["--max-flows", "0"],
            ["--map-size", "node=7"],
            ["--map-size", "frontends=0"],
            ["--map-size", "nothing=10"],
            ["--audit-period", "5 minutes"],
            ["--healthz-bind-address", "10256"],
            ["--conntrack-tcp-timeout-established", "961h"],
        ] {
            assert!(agent(&flags).is_err(), "{flags:?}");
        }
        assert!(agent(&["--kubeconfig", "a", "--manifests", "b"]).is_err());
    }

    const SMALL: Machine = Machine { memory: 2 << 30, cpus: 2 };

    /// C4
    #[test]
    fn the_room_for_flows_follows_the_machine() {
        let entries = |memory_gib: u64, cpus| {
            let sizes = agent(&[]).unwrap().map_sizes(Machine { memory: memory_gib << 30, cpus });
            sizes.iter().find(|size| size.map == "flows").unwrap().entries
        };
        let named = 2 * (HalfOpen::CAPACITY + Closing::CAPACITY) as u32;
        assert_eq!(entries(2, 2), 2 * 131_072 + named);
        assert_eq!(entries(0, 1), 2 * 131_072 + named, "what cannot be read");
        assert_eq!(entries(2, 64), 2 * 32_768 * 64 + named, "as kube-proxy");
        assert_eq!(entries(64, 16), 1 << 21);
        assert_eq!(entries(4_096, 16), 1 << 22);
        assert!(Machine::this().memory > 1 << 28 && Machine::this().cpus > 0);
    }

    #[test]
    fn flags_of_kube_proxy_that_tell_pods_are_refused_with_what_to_use() {
        for flags in [
            ["--cluster-cidr", "10.244.0.0/16"],
            ["--detect-local-mode", "ClusterCIDR"],
            ["--pod-bridge-interface", "cni0"],
            ["--pod-interface-name-prefix", "veth"],
        ] {
            let refusal = agent(&flags).unwrap_err().to_string();
            assert!(refusal.contains("--pod-interface") && refusal.contains("--pod-cidr"), "{refusal}");
        }
    }

    #[test]
    fn the_room_for_flows_counts_both_directions() {
        let sizes = agent(&["--max-flows", "50000", "--map-size", "backends=1000"]).unwrap().map_sizes(SMALL);
        let sizes: Vec<_> = sizes.iter().map(|size| (size.map, size.entries)).collect();
        assert_eq!(
            sizes,
            [("flows", 493_216), ("backends", 1_000), ("backend_traffic", 1_000), ("open", 1_000)]
        );
        let sizes = agent(&["--map-size", "half_open=100,closing=200"]).unwrap().map_sizes(SMALL);
        let sizes: Vec<_> = sizes.iter().map(|size| (size.map, size.entries)).collect();
        assert_eq!(sizes, [("flows", 262_744), ("half_open", 100), ("closing", 200)]);
    }

    #[test]
    fn lengths_of_time_have_units() {
        assert_eq!(duration("1h30m").unwrap(), Duration::from_secs(5_400));
        assert_eq!(duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(duration("0").unwrap(), Duration::ZERO);
        assert!(duration("").is_err() && duration("5").is_err() && duration("h").is_err());
    }
}
