//! Who serves the Services of a layout: Portolan's agent, or the real kube-proxy, from the same objects.

use super::Raised;
use crate::api_server::ApiServer;
use crate::controlplane::{Binaries, kube_proxy};
use crate::lab::Lab;
use crate::lab::METRICS;
use crate::lab::agent::AgentOptions;
use crate::lab::client::{Client, at};
use crate::lab::manifests::{self, Service};
use crate::lab::process::Process;
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

/// How long kube-proxy may take to write what it has read.
const WRITING: Duration = Duration::from_secs(4);
const LOOK: Duration = Duration::from_millis(50);
/// A dataplane for Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proxy {
    /// Portolan, with its default flags.
    Portolan,
    /// kube-proxy in its mode `nftables`.
    Nftables,
    /// kube-proxy in its mode `iptables`.
    Iptables,
}

impl Proxy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Portolan, Self::Nftables, Self::Iptables];

    /// Its name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portolan => "Portolan",
            Self::Nftables => "kube-proxy nftables",
            Self::Iptables => "kube-proxy iptables",
        }
    }
}

/// kube-proxy and the server that it asks, as long as they are wanted. An agent is its node's.
#[derive(Debug)]
pub struct Serving(Option<(Process, ApiServer)>);

impl Raised {
    /// Starts what serves the Services on `node-1` and waits until it does, at most so long; does what comes later.
    pub fn start(&self, proxy: Proxy, within: Duration) -> Result<Serving> {
        let serving = match proxy {
            Proxy::Portolan => {
                let options = AgentOptions::default().arguments(self.layout().flags).ready_within(within);
                self.lab.node(0).start_agent(&options)?;
                Serving(None)
            }
            Proxy::Nftables => self.start_kube_proxy("nftables", within)?,
            Proxy::Iptables => self.start_kube_proxy("iptables", within)?,
        };
        self.join_late()?;
        Ok(serving)
    }

    fn start_kube_proxy(&self, mode: &str, within: Duration) -> Result<Serving> {
        kube_proxy_on(&self.lab, 0, self.services(), mode, within)
    }
}

/// Starts kube-proxy on a node (from 0) for these Services, and waits until it has written them, at most so long.
///
/// # Errors
/// If it ends, or takes longer.
pub fn kube_proxy_on(
    lab: &Lab,
    node: usize,
    services: &[Service],
    mode: &str,
    within: Duration,
) -> Result<Serving> {
    let node = lab.node(node);
    let server = ApiServer::start(node.place())?;
    lab.nodes().iter().for_each(|node| server.put(manifests::node(node)));
    services.iter().flat_map(Service::objects).for_each(|object| server.put(object));
    let kubeconfig = server.kubeconfig(lab.folder())?;
    let command = kube_proxy(&Binaries::find_or_build()?, node, mode, &kubeconfig)?;
    let process = Process::start(&lab.logs(), &format!("kube-proxy-{mode}"), command)?;
    let end = Instant::now() + within;
    let client = Client::at(node.place()).timeout(Duration::from_secs(1));
    let metrics = || client.connect(at(Ipv4Addr::LOCALHOST, METRICS))?.read_all("/metrics");
    let slices = services.iter().flat_map(Service::objects);
    let slices = slices.filter(|object| object["kind"] == "EndpointSlice").count();
    while !metrics().is_ok_and(|text| has_written(&text, slices)) {
        let log = || crate::lab::last_lines(&process.log(), 20);
        ensure!(process.exit_status().is_none(), "kube-proxy ended:\n{}", log());
        ensure!(Instant::now() < end, "kube-proxy is not ready after {within:?}:\n{}", log());
        std::thread::sleep(LOOK);
    }
    // What it counts is on its way into the kernel: it writes at most once a second, one family after the other.
    std::thread::sleep(WRITING);
    Ok(Serving(Some((process, server))))
}

/// Whether all slices have come and nothing waits to be written.
fn has_written(metrics: &str, slices: usize) -> bool {
    // A line for each family, or one.
    let values = |name: &str| -> Vec<f64> {
        let name = format!("kubeproxy_sync_proxy_rules_{name}");
        let lines = metrics.lines().filter(|line| line.split(['{', ' ']).next() == Some(&*name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect()
    };
    let pending = ["endpoint", "service"].map(|what| values(&format!("{what}_changes_pending")));
    let written = pending.iter().all(|values| !values.is_empty() && values.iter().all(|value| *value == 0.0));
    written && values("endpoint_changes_total").iter().sum::<f64>() >= slices as f64
}

impl Serving {
    /// The last lines of kube-proxy's log.
    pub fn log(&self) -> Option<String> {
        self.0.as_ref().map(|(process, _)| crate::lab::last_lines(&process.log(), 30))
    }
}
