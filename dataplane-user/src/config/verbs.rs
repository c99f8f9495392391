//! The flags of the verbs that ask, and of those that tidy up.

use super::{DEFAULT_BPFFS, DEFAULT_STATE, PortRange, ServerChoice, named};
use crate::watch::cluster::ApiServer;
use clap::{Args, ValueEnum};
use clap_complete::Shell;
use dataplane_common::Protocol;
use std::path::{Path, PathBuf};

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
    /// Ask each node of the cluster by `kubectl exec`, and show a row for each, and what differs. Needs no root, but `kubectl`.
    #[arg(long, conflicts_with = "node")]
    pub all_nodes: bool,
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
            show: ShowArgs { bpffs: bpffs.to_owned(), output: Output::Table, node: None },
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
