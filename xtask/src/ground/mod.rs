//! Where tests run: namespaces of their own that look like a machine on which nothing of Portolan ever ran, and at the end a look
//! at what is left there.
//!
//! The mount, network and cgroup namespaces of a run begin with no BPF file system, nothing of Portolan's or of `ip netns` in
//! `/run`, an empty folder for temporary files, one interface, and no cgroup. So no test can lean on what an earlier one left or
//! another program does; and as nobody else is in there, whatever is there in the end was left by this run. A BPF program, map or
//! link is held by a process, a pin, a cgroup or an interface: of none of these may one be left.
//!
//! This runs in a process between `cargo xtask` and the tests, because namespaces are a thread's own and cannot be left again.

mod mounts;
mod remains;

use crate::command::CommandLine;
use crate::setup::is_root;
use crate::summary::Summary;
use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use remains::Remains;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU32, Ordering};

/// How the names of folders and cgroups of runs begin; the process id of `cargo xtask` and a number follow.
const NAME: &str = "portolan-test-";

/// What a machine has before the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Ground {
    /// Nothing.
    Fresh,
    /// A BPF file system, and what a laboratory that was killed has left.
    Used,
}

impl Ground {
    const fn name(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Used => "used",
        }
    }
}

/// The folder and the cgroup of one run, removed with this.
#[derive(Debug)]
pub(crate) struct Run {
    name: String,
}

impl Run {
    /// Names the run, and removes what runs left whose `cargo xtask` was killed.
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        for parent in [std::env::temp_dir()].into_iter().chain(mounts::cgroup2()) {
            for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let Some(pid) = name.strip_prefix(NAME).and_then(|rest| rest.split('-').next()) else {
                    continue;
                };
                if !Path::new("/proc").join(pid).exists() {
                    drop(Self { name });
                }
            }
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Self { name: format!("{NAME}{}-{number}", std::process::id()) }
    }

    /// Ends what still runs inside.
    pub(crate) fn end(&self) {
        let Some(cgroup) = mounts::cgroup2().map(|root| root.join(&self.name)) else { return };
        if fs::write(cgroup.join("cgroup.kill"), "1").is_ok() {
            remains::wait_for_silence(&cgroup);
        }
    }

    /// The command inside.
    pub(crate) fn wrap(
        &self,
        command: CommandLine,
        ground: Ground,
        own_network: bool,
    ) -> Result<CommandLine> {
        let program = std::env::current_exe().context("cannot tell where this program lies")?;
        let mut outer = vec![program.display().to_string()];
        outer.extend(["alone", "--name", &self.name, "--ground", ground.name()].map(str::to_owned));
        outer.extend((!own_network).then(|| "--network".to_owned()));
        outer.push("--".into());
        Ok(command.within(outer))
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.end();
        let _ = fs::remove_dir_all(folder(&self.name));
        if let Some(root) = mounts::cgroup2() {
            remains::remove_cgroups(&root.join(&self.name));
        }
    }
}

fn folder(name: &str) -> PathBuf {
    std::env::temp_dir().join(name)
}

/// The verb behind [`Run::wrap`]: runs a command inside, and then reports what is left as a test of its own.
pub(crate) fn alone(name: &str, ground: Ground, network: bool, command: &[OsString]) -> Result<ExitCode> {
    let (program, arguments) = command.split_first().context("no command")?;
    let folder = folder(name);
    let temporary = folder.join("tmp");
    fs::create_dir_all(&temporary).with_context(|| temporary.display().to_string())?;
    // As /tmp is: anybody's.
    for folder in [&folder, &temporary] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o1777))?;
    }
    let mut child = Command::new(program);
    child.args(arguments).env("TMPDIR", &temporary);
    if !is_root() {
        // Tiers for which nobody needs to be root touch nothing but files.
        let status = child.status().with_context(|| program.to_string_lossy().into_owned())?;
        return Ok(report(&Remains::of_files(&temporary)).unwrap_or(code(status)));
    }
    enter(name, &folder, network)?;
    if ground == Ground::Used {
        use_up()?;
    }
    if !network {
        child.env("CARGO_NET_OFFLINE", "true");
    }
    let before = Remains::look(&temporary)?;
    let status = child.status().with_context(|| program.to_string_lossy().into_owned())?;
    remains::wait_for_processes();
    let left = Remains::look(&temporary)?.since(&before);
    remains::end_processes();
    Ok(report(&left).unwrap_or(code(status)))
}

fn code(status: std::process::ExitStatus) -> ExitCode {
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
}

/// Tells what is left as libtest tells of a failed test; gives the exit status if something is.
fn report(left: &Remains) -> Option<ExitCode> {
    let mut out = io::stdout().lock();
    let result = if left.is_empty() { "ok" } else { "FAILED" };
    let _ = writeln!(out, "\ntest nothing_is_left_behind ... {result}");
    for thing in left.iter() {
        let _ = writeln!(out, "    left behind: {thing}");
    }
    if !left.is_empty() {
        let _ = writeln!(out, "\n{}", Summary::ONE_FAILURE.closing_line());
    }
    (!left.is_empty()).then_some(ExitCode::FAILURE)
}

/// Goes where a fresh machine is.
fn enter(name: &str, folder: &Path, network: bool) -> Result<()> {
    let cgroup = mounts::cgroup2();
    if let Some(cgroup) = cgroup.as_ref().map(|root| root.join(name)) {
        fs::create_dir_all(&cgroup).with_context(|| cgroup.display().to_string())?;
        fs::write(cgroup.join("cgroup.procs"), "0").context("cannot enter a cgroup of its own")?;
    }
    let of_network = if network { 0 } else { libc::CLONE_NEWNET };
    // SAFETY: a system call without pointers; this process has one thread.
    if unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWCGROUP | of_network) } != 0 {
        bail!("no namespaces for the tests: {}", io::Error::last_os_error());
    }
    let own = fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
    if cgroup.is_some() && !own.lines().any(|line| line == "0::/") {
        bail!("the tests' cgroup is not the first of its namespace: {own}");
    }
    mounts::keep_to_oneself()?;
    mounts::remove_bpffs()?;
    mounts::renew_run(&folder.join("run"))?;
    if let Some(root) = cgroup {
        mounts::renew_cgroup2(&root)?;
    }
    limit_open_files()?;
    if !network {
        run("ip", &["link", "set", "lo", "up"])?;
    }
    Ok(())
}

/// What most machines begin with.
const OPEN_FILES: libc::rlim_t = 1_024;

/// No test leans on a machine that allows more.
fn limit_open_files() -> Result<()> {
    // SAFETY: all zero is a valid `rlimit`, which outlives both calls.
    let done = unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        let got = libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max.min(OPEN_FILES);
        got == 0 && libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
    };
    if done { Ok(()) } else { Err(io::Error::last_os_error()).context("cannot limit open files") }
}

/// The lab that was killed: its process id is none that a machine gives out.
const KILLED: &str = "pl-999999999-1";

/// Leaves what a machine may have from before.
fn use_up() -> Result<()> {
    mounts::mount("bpf", "bpf", Path::new("/sys/fs/bpf"))?;
    for folder in [
        "/sys/fs/bpf/portolan".into(),
        "/run/portolan/sys-fs-bpf-portolan".into(),
        format!("/run/portolan-lab/{KILLED}/places"),
        format!("/run/portolan-lab/.{KILLED}"),
    ] {
        fs::create_dir_all(&folder).with_context(|| folder.clone())?;
    }
    fs::write("/run/portolan/sys-fs-bpf-portolan/names.json", "{\"1\":\"default/gone:http\"}")?;
    fs::write(format!("/run/portolan-lab/{KILLED}/owner"), "999999999 1\n")?;
    File::create("/run/portolan-lab/lock")?;
    if let Some(root) = mounts::cgroup2() {
        fs::create_dir_all(root.join("portolan-lab").join(KILLED).join("node-1/agent"))?;
    }
    run("ip", &["netns", "add", &format!("{KILLED}-node-1")])
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    CommandLine::new(program).args(arguments).run()
}
