//! The emulated machine: boots a kernel, shows what it says, and is ended after a time.

use anyhow::{Context, Result, bail};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long one machine may take from its start to its end.
const TIME_LIMIT: Duration = Duration::from_secs(20 * 60);
/// What `init` says first; before it, the firmware paints the screen.
const BOOTED: &str = "portolan-vm: booted";

/// What a machine said, line by line, from the moment it was up.
#[derive(Debug)]
pub(crate) struct Console(Vec<String>);

impl Console {
    pub(crate) fn lines(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Whether some line holds these words.
    pub(crate) fn says(&self, words: &str) -> bool {
        self.lines().any(|line| line.contains(words))
    }
}

/// Processors of a machine.
pub(crate) const PROCESSORS: usize = 2;

/// Boots the kernel and follows it until it powers off. There could be so many processors ("possible CPUs"); two are there.
pub(crate) fn boot(kernel: &Path, initramfs: &Path, possible: usize) -> Result<Console> {
    let mut child = start(kernel, initramfs, possible)?;
    let (sender, lines) = mpsc::channel();
    let output = child.0.stdout.take().context("no console")?;
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    });
    let end = Instant::now() + TIME_LIMIT;
    let (mut console, mut before) = (Console(Vec::new()), Vec::new());
    loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) if console.0.is_empty() && !line.contains(BOOTED) => before.push(line),
            Ok(line) => {
                // Past libtest's capture: a tour that takes minutes is watched as it goes.
                writeln!(io::stdout(), "{line}")?;
                console.0.push(line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("the machine was not done after {} minutes", TIME_LIMIT.as_secs() / 60)
            }
        }
    }
    if console.0.is_empty() {
        bail!("the machine did not boot: {}\n{}", child.0.wait()?, before.join("\n"));
    }
    Ok(console)
}

/// A process that does not outlive its owner.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(kernel: &Path, initramfs: &Path, possible: usize) -> Result<Owned> {
    let mut command = Command::new("qemu-system-x86_64");
    // Emulation, because it is everywhere: where machines are rented there is seldom anything else.
    command.args(["-accel", "tcg", "-cpu", "max", "-m", "2048", "-nic", "none", "-no-reboot"]);
    command.arg("-smp").arg(format!("{PROCESSORS},maxcpus={possible}"));
    command.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    command.args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
    let child = command.spawn().context(
        "cannot run qemu-system-x86_64: `apt-get install --no-install-recommends qemu-system-x86`",
    )?;
    Ok(Owned(child))
}
