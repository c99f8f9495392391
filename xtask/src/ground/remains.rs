//! What there is where tests run, so that what they leave can be told.

use super::mounts;
use anyhow::{Context as _, Result};
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// How long what a test program started may take to end after it.
const ENDING: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);
/// Where an agent keeps its snapshot if nobody says another folder.
const STATE: &str = "/var/lib/portolan";
/// What mount(8) and umount(8) make the first time they run.
const OF_MOUNT: &str = "/run/mount";

/// Things that are there, as words for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Remains(BTreeSet<String>);

impl Remains {
    /// Looks at everything.
    pub(super) fn look(temporary: &Path) -> Result<Self> {
        let mut found = Self::of_files(temporary);
        for folder in ["/run", "/sys/fs/bpf"] {
            let files = entries(Path::new(folder)).filter(|path| path != Path::new(OF_MOUNT));
            found.0.extend(files.map(|path| format!("file {}", path.display())));
        }
        for folder in ["/tmp", "/var/lib", "/etc"] {
            let ours = entries(Path::new(folder)).filter(|path| is_ours(path));
            found.0.extend(ours.map(|path| format!("file {}", path.display())));
        }
        found.0.extend(entries(Path::new(STATE)).map(|path| format!("file {}", path.display())));
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
        found.0.extend(mounts.lines().filter_map(mount));
        found.0.extend(lines("ip", &["-oneline", "link", "show"])?.filter_map(|line| interface(&line)));
        found.0.extend(lines("tc", &["qdisc", "show"])?.map(|line| format!("qdisc: {line}")));
        found.0.extend(lines("nft", &["list", "tables"])?.map(|line| format!("nftables: {line}")));
        if let Some(root) = mounts::cgroup2() {
            found.0.extend(cgroups(&root).iter().skip(1).map(|path| format!("cgroup {}", path.display())));
        }
        found.0.extend(processes().iter().map(|pid| format!("process {}", describe(*pid))));
        Ok(found)
    }

    /// Looks at the temporary files alone.
    pub(super) fn of_files(temporary: &Path) -> Self {
        Self(entries(temporary).map(|path| format!("file {}", path.display())).collect())
    }

    /// What was not there before.
    pub(super) fn since(mut self, before: &Self) -> Self {
        self.0.retain(|thing| !before.0.contains(thing));
        self
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Whether it is a file of Portolan's, other than the folder of a run.
fn is_ours(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.starts_with("portolan") && !name.starts_with(super::NAME)
}

/// A line of `/proc/self/mountinfo` in short: `mount /run/x (tmpfs)`.
fn mount(line: &str) -> Option<String> {
    let (mount, file_system) = line.split_once(" - ")?;
    Some(format!("mount {} ({})", mount.split(' ').nth(4)?, file_system.split(' ').next()?))
}

/// The name in a line of `ip -oneline link show`.
fn interface(line: &str) -> Option<String> {
    Some(format!("interface {}", line.split(": ").nth(1)?))
}

fn lines(program: &str, arguments: &[&str]) -> Result<std::vec::IntoIter<String>> {
    let output = Command::new(program).args(arguments).output().with_context(|| program.to_owned())?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().map(str::to_owned).collect::<Vec<_>>().into_iter())
}

/// A cgroup and all below it.
fn cgroups(root: &Path) -> Vec<PathBuf> {
    let mut all = vec![root.to_owned()];
    all.extend(entries(root).filter(|path| path.is_dir()).flat_map(|path| cgroups(&path)));
    all
}

/// Removes a cgroup and all below it.
pub(super) fn remove_cgroups(root: &Path) {
    for cgroup in cgroups(root).iter().rev() {
        let _ = fs::remove_dir(cgroup);
    }
}

/// All processes of this cgroup namespace but this one; none where its root is that of the whole machine, which has no events.
fn processes() -> BTreeSet<u32> {
    let root = mounts::cgroup2().filter(|root| root.join("cgroup.events").exists());
    let members = root
        .iter()
        .flat_map(|root| cgroups(root))
        .filter_map(|cgroup| fs::read_to_string(cgroup.join("cgroup.procs")).ok());
    let mut all: BTreeSet<u32> = members
        .flat_map(|text| text.lines().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect();
    // 0 is a process of another PID namespace.
    all.retain(|pid| *pid != 0 && *pid != std::process::id());
    all
}

fn describe(pid: u32) -> String {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    format!("{pid} ({})", String::from_utf8_lossy(&command).replace('\0', " ").trim())
}

/// Waits until the processes that are ending have ended.
pub(super) fn wait_for_processes() {
    let begun = Instant::now();
    while !processes().is_empty() && begun.elapsed() < ENDING {
        std::thread::sleep(POLL);
    }
}

/// Waits until nobody is in a cgroup any more.
pub(super) fn wait_for_silence(cgroup: &Path) {
    let events = cgroup.join("cgroup.events");
    let populated = || fs::read_to_string(&events).is_ok_and(|text| text.contains("populated 1"));
    let begun = Instant::now();
    while populated() && begun.elapsed() < ENDING {
        std::thread::sleep(POLL);
    }
}

/// Ends those that are left.
pub(super) fn end_processes() {
    let begun = Instant::now();
    while begun.elapsed() < ENDING {
        let left = processes();
        if left.is_empty() {
            return;
        }
        for pid in left {
            // SAFETY: a system call; the process is in a cgroup that this one made.
            if unsafe { libc::kill(pid as libc::pid_t, libc::SIGKILL) } != 0 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::ESRCH) {
                    println!("cannot end {}: {error}", describe(pid));
                }
            }
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_not_there_before_is_left() {
        let remains = |things: &[&str]| Remains(things.iter().map(|&thing| thing.to_owned()).collect());
        let (before, after) =
            (remains(&["file /run/a", "file /run/b"]), remains(&["file /run/b", "file /run/c"]));
        let left = after.since(&before);
        assert_eq!(left.iter().collect::<Vec<_>>(), ["file /run/c"]);
        assert!(!left.is_empty() && before.clone().since(&before).is_empty());
    }

    #[test]
    fn folders_of_other_runs_are_none_of_what_is_left() {
        for (path, ours) in [
            ("/tmp/portolan-kernel-7", true),
            ("/var/lib/portolan", true),
            ("/tmp/portolan-test-7-1", false),
            ("/tmp/other", false),
        ] {
            assert_eq!(is_ours(Path::new(path)), ours, "{path}");
        }
    }

    #[test]
    fn a_mount_is_told_by_its_place_and_its_kind() {
        let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mount(line).as_deref(), Some("mount /mnt2 (ext3)"));
        assert_eq!(interface("2: lo: <LOOPBACK> mtu 65536").as_deref(), Some("interface lo"));
    }
}
