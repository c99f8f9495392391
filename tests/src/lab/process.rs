//! A program that runs in a place of a lab, with its output in files of the lab's folder.

use super::place::Place;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A child process. It is killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: u32,
    child: Mutex<Child>,
    output: PathBuf,
    log: PathBuf,
}

impl Process {
    /// Starts a command (see [`Place::command`]); standard output goes to `FOLDER/NAME.out`, errors to `FOLDER/NAME.log`.
    pub fn start(folder: &Path, name: &str, mut command: Command) -> Result<Self> {
        let (output, log) = (folder.join(format!("{name}.out")), folder.join(format!("{name}.log")));
        let log_file = File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(File::create(&output)?).stderr(log_file);
        let child = command.spawn().with_context(|| format!("{:?}", command.get_program()))?;
        Ok(Self { name: name.into(), pid: child.id(), child: Mutex::new(child), output, log })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What it wrote to standard output.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// What it, and its predecessors of the same name, wrote to standard error.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Where [`Process::log`] is.
    pub fn log_file(&self) -> &Path {
        &self.log
    }

    /// Waits for a line of standard output that satisfies `found`.
    pub fn wait_for_line(&self, timeout: Duration, found: impl Fn(&str) -> bool) -> Result<String> {
        let end = Instant::now() + timeout;
        loop {
            let exited = self.exit_status();
            if let Some(line) = self.output().lines().find(|line| found(line)) {
                return Ok(line.to_owned());
            }
            if exited.is_some() || Instant::now() > end {
                let what = exited.map_or(format!("not ready after {timeout:?}"), |status| status.to_string());
                bail!("{}: {what}\n{}{}", self.name, self.output(), last_lines(&self.log(), 30));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its exit status, if it has ended.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.child().try_wait().ok().flatten()
    }

    /// Its exit status and what it wrote to standard error, if it has ended.
    pub fn epitaph(&self) -> Option<String> {
        self.exit_status().map(|status| format!("{status}\n{}", last_lines(&self.log(), 30)))
    }

    /// Sends it a signal, unless it has ended.
    pub fn signal(&self, signal: i32) {
        if self.exit_status().is_none() {
            // SAFETY: a system call on our own child, which has not been waited for.
            unsafe { libc::kill(self.pid as libc::pid_t, signal) };
        }
    }

    /// SIGTERM, then the time to end by itself; an error if it does not.
    pub fn terminate(&self, timeout: Duration) -> Result<ExitStatus> {
        self.signal(libc::SIGTERM);
        self.wait(timeout)
    }

    /// Waits for its end.
    pub fn wait(&self, timeout: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + timeout;
        loop {
            if let Some(status) = self.exit_status() {
                return Ok(status);
            }
            anyhow::ensure!(Instant::now() < end, "{} has not ended after {timeout:?}", self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&self) {
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The end of a text.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// A program of this workspace: taken from `variable`, else from where cargo puts it beside the running one.
pub fn program(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let running = std::env::current_exe()?;
    running
        .ancestors()
        .skip(1)
        .take(3)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("no program {name} beside {}: build it, or name it in {variable}", running.display())
        })
}

/// Copies a file to where anybody may run it as a program.
///
/// A process of its own writes the copy. Were it open for writing in this one, another thread might fork at that moment: until
/// that child has become another program it holds the file open too, and to run it fails with `ETXTBSY`.
pub fn install(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("install").arg("--mode=755").args([from, to]).status().context("install")?;
    anyhow::ensure!(status.success(), "install {} {}: {status}", from.display(), to.display());
    Ok(())
}

/// Lets this process, and those that it starts from now on, have as many files open as the machine allows: most begin with 1,024,
/// and there are tests with more connections than that.
pub(crate) fn open_many_files() {
    // SAFETY: all zero is a valid `rlimit`, which outlives both calls.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Appends a name to `Place` commands so that a lab's folder tells where things run.
pub(crate) fn record(folder: &Path, place: &Place) -> Result<()> {
    let resolver = place.resolver().map(|file| format!("{}\n", file.display())).unwrap_or_default();
    let text = format!("{}\n{}\n{resolver}", place.namespace(), place.cgroup().display());
    let file = folder.join("places").join(place.name());
    fs::write(&file, text).with_context(|| file.display().to_string())
}
