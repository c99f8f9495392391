//! Docker: the one that answers, or one of the run's own.
//!
//! A Docker of its own runs in namespaces of its own: a network without any link, mounts, and processes that all end with it. It is
//! for machines that have no Docker, or can pull nothing. Its images stay in the target folder; all else goes with it.

use super::undo;
use crate::controlplane::target_folder;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How long a daemon may take to answer, and to end.
const START_TIME: Duration = Duration::from_secs(60);
const END_TIME: Duration = Duration::from_secs(30);
/// The first Docker that knows `CAP_BPF` and `CAP_PERFMON`.
const KNOWS_BPF: u32 = 23;
/// What the names of a run's folders and cgroups begin with, before its process id.
const PREFIX: &str = "portolan-kind-";
/// What its containers are run with.
const RUNTIME: &str = "runc";
/// The network that kind makes for its nodes.
pub(super) const NETWORK: &str = "kind";

/// Where containers run.
#[derive(Clone, Debug)]
pub(super) enum Docker {
    /// As `docker` finds it: by `DOCKER_HOST`, a context, or the usual socket.
    Found,
    /// In the namespaces of this process.
    Own { pid: u32, socket: PathBuf },
}

impl Docker {
    /// The Docker that answers, if it can run new nodes or these are there already; else, or if it is to be `isolated`, one of
    /// its own.
    pub(super) fn find_or_start(isolated: bool, for_new_nodes: bool) -> Result<Self> {
        if !isolated {
            if let Some(version) = version(&Self::Found) {
                let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
                ensure!(
                    !for_new_nodes || major.is_none_or(|major| major >= KNOWS_BPF),
                    "Docker {version} gives no container CAP_BPF and CAP_PERFMON: Docker {KNOWS_BPF} or later is needed, \
                     or --isolated, which starts a daemon that does"
                );
                println!("  Docker {version} answers");
                return Ok(Self::Found);
            }
            ensure!(
                std::env::var_os("DOCKER_HOST").is_none(),
                "no Docker answers at DOCKER_HOST={}",
                std::env::var("DOCKER_HOST").unwrap_or_default()
            );
            ensure!(for_new_nodes, "no Docker answers, so there is no cluster in it");
            println!("  no Docker answers: one of its own, without a network");
        }
        start()
    }

    /// Whether it is the run's own.
    pub(super) const fn is_own(&self) -> bool {
        matches!(self, Self::Own { .. })
    }

    /// A program that talks to Docker, or to what it publishes on 127.0.0.1.
    pub(super) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        match self {
            Self::Found => Command::new(program),
            Self::Own { pid, socket } => {
                let mut command = Command::new("nsenter");
                command.args([format!("--net=/proc/{pid}/ns/net").as_str(), "--"]).arg(program);
                command.env("DOCKER_HOST", format!("unix://{}", socket.display()));
                // What kind and Docker unpack goes with the run.
                command.env("TMPDIR", socket.with_file_name("tmp"));
                for proxy in ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"] {
                    command.env_remove(proxy).env_remove(proxy.to_lowercase());
                }
                command
            }
        }
    }

    /// Runs `docker` and returns what it printed.
    pub(super) fn docker(&self, arguments: &[&str]) -> Result<String> {
        undo::output(self.command("docker").args(arguments), "")
    }

    /// The same, with a text on its standard input.
    pub(super) fn docker_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        undo::output(self.command("docker").args(arguments), input)
    }

    /// Whether it has an image.
    pub(super) fn has_image(&self, name: &str) -> Result<bool> {
        Ok(!self.docker(&["images", "--quiet", name])?.trim().is_empty())
    }

    /// Whether it has the network that nodes are in.
    pub(super) fn has_network(&self) -> Result<bool> {
        let names = self.docker(&["network", "ls", "--format", "{{.Name}}"])?;
        Ok(names.lines().any(|name| name == NETWORK))
    }
}

/// The daemon's version, if it answers.
fn version(docker: &Docker) -> Option<String> {
    let mut command = docker.command("docker");
    command.args(["version", "--format", "{{.Server.Version}}"]);
    let output = undo::attempt(&mut command, "").ok()?;
    let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !version.is_empty()).then_some(version)
}

/// Whether a program is found by its name.
pub(super) fn is_in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// What of a Docker of its own stays between runs, and what goes.
pub(super) fn own_folder() -> Result<PathBuf> {
    Ok(target_folder()?.join("kind"))
}

fn start() -> Result<Docker> {
    for program in ["docker", "dockerd", "runc", "unshare", "nsenter"] {
        ensure!(
            is_in_path(program),
            "there is no `{program}`: install docker.io, runc and util-linux, or start Docker"
        );
    }
    let folder = own_folder()?;
    let state = folder.join("run");
    // What a killed run left.
    if state.exists() {
        fs::remove_dir_all(&state).with_context(|| state.display().to_string())?;
    }
    fs::create_dir_all(state.join("tmp"))?;
    let socket = state.join("docker.sock");
    let cgroup = name_of_run();
    remove_old_cgroups();
    write_runtime(&state)?;
    fs::write(state.join("daemon.json"), configuration(&folder, &socket, &cgroup).to_string())?;
    let mut child = spawn(&state)?;
    let first = first_process(&mut child)?;
    let docker = Docker::Own { pid: first, socket };
    let child = Mutex::new(child);
    undo::later("ending the run's own Docker", move || {
        let mut child = child.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        end(&mut child, first)?;
        remove_cgroups(&cgroup);
        Ok(fs::remove_dir_all(&state)?)
    });
    let end = Instant::now() + START_TIME;
    while version(&docker).is_none() {
        if Instant::now() > end || !Path::new(&format!("/proc/{first}")).exists() {
            bail!("its own Docker does not answer\n{}", log());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    println!("  its own Docker {} answers", version(&docker).unwrap_or_default());
    remove_leftovers(&docker)?;
    Ok(docker)
}

/// What a killed run left in it: nobody else has containers there.
fn remove_leftovers(docker: &Docker) -> Result<()> {
    let containers = docker.docker(&["ps", "--all", "--quiet"])?;
    for container in containers.lines() {
        docker.docker(&["rm", "--force", "--volumes", container])?;
    }
    docker.docker(&["network", "prune", "--force"])?;
    docker.docker(&["volume", "prune", "--force"]).map(drop)
}

/// A script that is `portolan-lab runc`, of a copy: the program that runs now may be built anew as long as the cluster is up.
fn write_runtime(state: &Path) -> Result<()> {
    let program = state.join("portolan-lab");
    crate::lab::install(&std::env::current_exe()?, &program)?;
    let script = state.join("runc.sh");
    fs::write(&script, format!("#!/bin/sh\nexec '{}' runc \"$@\"\n", program.display()))?;
    crate::lab::install(&script, &state.join(RUNTIME))
}

/// What the daemon said last.
fn log() -> String {
    let file = own_folder().map(|folder| folder.join("run/dockerd.log"));
    let text = file.ok().and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
    crate::lab::last_lines(&text, 20)
}

fn configuration(folder: &Path, socket: &Path, cgroup: &str) -> serde_json::Value {
    json!({
        "runtimes": { "bounded": { "path": socket.with_file_name(RUNTIME) } },
        "default-runtime": "bounded",
        "storage-driver": "overlay2",
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "cgroup-parent": format!("/{cgroup}"),
        "data-root": folder.join("docker"),
        "exec-root": "/run/docker-exec",
        "pidfile": "/run/docker.pid",
        "hosts": [format!("unix://{}", socket.display())],
        // There is nobody to ask, and containers would be given the machine's.
        "dns": ["127.0.0.1"],
        "log-level": "warn",
    })
}

/// The daemon as the first process of its own namespaces. What it writes to `/run` and `/etc` is its own.
fn spawn(state: &Path) -> Result<Child> {
    let script = "mount -t tmpfs tmpfs /run && mkdir /run/etc /run/etc.work && \
                  mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/etc.work /etc && \
                  ip link set lo up && exec dockerd --config-file \"$0\"";
    let mut command = Command::new("unshare");
    command.args([
        "--net",
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    command.args(["sh", "-c", script]).arg(state.join("daemon.json"));
    let log = File::create(state.join("dockerd.log"))?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    // Not in the terminal's group: Ctrl-C is for this process, which ends the daemon when nothing needs it any more.
    command.process_group(0);
    // SAFETY: only a system call between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command.spawn().context("unshare")
}

/// The process that `unshare` forks: the first of the new namespaces.
fn first_process(child: &mut Child) -> Result<u32> {
    let file = format!("/proc/{0}/task/{0}/children", child.id());
    let end = Instant::now() + START_TIME;
    loop {
        let children = fs::read_to_string(&file).unwrap_or_default();
        if let Some(pid) = children.split_whitespace().next() {
            return Ok(pid.parse()?);
        }
        if child.try_wait()?.is_some() || Instant::now() > end {
            bail!("the namespaces of its own Docker could not be made\n{}", log());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// SIGTERM to the daemon, which ends its containers; in the end everything in its namespaces dies with it.
fn end(child: &mut Child, first: u32) -> Result<()> {
    // SAFETY: a system call; the process is a child of our own child, which has not been waited for.
    unsafe { libc::kill(first as libc::pid_t, libc::SIGTERM) };
    let end = Instant::now() + END_TIME;
    while child.try_wait()?.is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
    }
    if child.try_wait()?.is_none() {
        child.kill()?;
    }
    child.wait()?;
    Ok(())
}

/// All mounts of cgroup hierarchies: one, or one for each controller.
fn hierarchies() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let inside = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    std::iter::once(root.to_owned())
        .chain(inside.filter(|path| path.join("cgroup.procs").is_file()))
        .collect()
}

fn remove_cgroups(name: &str) {
    for hierarchy in hierarchies() {
        remove_folders(&hierarchy.join(name));
    }
}

/// Those of runs that were killed.
fn remove_old_cgroups() {
    for hierarchy in hierarchies() {
        of_killed_runs(&hierarchy).iter().for_each(|cgroup| remove_folders(cgroup));
    }
}

/// What is called after a run ([`name_of_run`]) that is there no more, in a folder.
pub(super) fn of_killed_runs(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_orphan = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let owner = name.strip_prefix(PREFIX).and_then(|pid| pid.parse::<u32>().ok());
        owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    };
    entries.map(|entry| entry.path()).filter(is_orphan).collect()
}

/// What folders and cgroups of this run are called.
pub(super) fn name_of_run() -> String {
    format!("{PREFIX}{}", std::process::id())
}

/// Cgroups go from the leaves.
fn remove_folders(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_folders(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}
