//! The agent of a node of the lab: `portolan agent` in the node's namespace and cgroup.

use super::node::Node;
use super::place::Place;
use super::process::{Process, program};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The line that the agent prints when the first complete snapshot is in the kernel.
const READY: &str = "ready";

/// Where an agent reads the objects.
#[derive(Clone, Debug, Default)]
pub enum Source {
    /// The lab's folder of manifests.
    #[default]
    Manifests,
    /// An API server.
    Kubeconfig(PathBuf),
}

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    source: Source,
    arguments: Vec<String>,
    program: Option<PathBuf>,
    log: String,
    ready_within: Duration,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self {
            source: Source::Manifests,
            arguments: Vec::new(),
            program: None,
            log: "info".into(),
            ready_within: Duration::from_secs(60),
        }
    }
}

impl AgentOptions {
    /// Reads the objects from there.
    #[must_use]
    pub fn source(mut self, source: Source) -> Self {
        self.source = source;
        self
    }

    /// One more argument or several.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// Another build of the agent than [`portolan`].
    #[must_use]
    pub fn program(mut self, program: &Path) -> Self {
        self.program = Some(program.into());
        self
    }

    /// The filter of its log.
    #[must_use]
    pub fn log(mut self, filter: &str) -> Self {
        self.log = filter.into();
        self
    }

    /// How long it may take to be ready (60 s unless told).
    #[must_use]
    pub fn ready_within(mut self, time: Duration) -> Self {
        self.ready_within = time;
        self
    }
}

/// The agent's program: `PORTOLAN_PROGRAM`, else the one beside the running program.
pub fn portolan() -> Result<PathBuf> {
    program("portolan", "PORTOLAN_PROGRAM")
}

/// A running agent. Dropping it kills it and leaves its programs in the kernel.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    ready_within: Duration,
}

impl Agent {
    pub(crate) fn launch(node: &Node, place: &Place, logs: &Path, options: &AgentOptions) -> Result<Self> {
        let program = options.program.clone().map_or_else(portolan, Ok)?;
        let mut command = place.command(program)?;
        command.args(["agent", "--node-name", node.name(), "--log", &options.log]);
        command.arg("--bpffs").arg(node.bpffs());
        command.arg("--cgroup").arg(node.cgroup());
        command.arg("--state-dir").arg(node.state_folder());
        command.args(["--pod-cidr", super::POD_RANGES]);
        match &options.source {
            Source::Manifests => {
                command.arg("--manifests").arg(node.manifests_folder());
                command.args(["--service-cidr", super::SERVICE_RANGES]);
            }
            Source::Kubeconfig(file) => {
                command.arg("--kubeconfig").arg(file);
            }
        }
        command.args(&options.arguments);
        let process = Process::start(logs, &format!("agent-{}", node.name()), command)?;
        Ok(Self { process, ready_within: options.ready_within })
    }

    /// Waits for its line `ready`.
    pub fn wait_until_ready(&self) -> Result<()> {
        self.process
            .wait_for_line(self.ready_within, |line| line == READY)
            .map(drop)
            .context("the agent is not ready")
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// SIGTERM, and waits for its end.
    pub fn stop(&self) -> Result<()> {
        let status = self.process.terminate(Duration::from_secs(20))?;
        anyhow::ensure!(status.success(), "the agent ended with {status}");
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&self) {
        self.process.kill();
    }
}
