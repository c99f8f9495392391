//! Whether what is pinned outlasts the agent: a BPF file system ends with the last mount of it, and a mount ends with its
//! namespace. Where that namespace is the agent's or its container's own, a restart loses programs and flows.
//!
//! Another namespace cannot be looked into but through a process of it that this one may look at: the first of this process
//! namespace. What cannot be told counts as lasting.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// `PROC_PID_INIT_INO` of linux/proc_ns.h: the inode of the machine's own process namespace.
const MACHINE_PIDS: u64 = 0xefff_fffc;

/// What is known of a BPF file system and of where the agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    /// This agent has just mounted it.
    mounted: bool,
    /// The agent is not in a container's process namespace.
    machine: bool,
    /// What the first process of the process namespace has.
    first: First,
}

/// The first process, seen from the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    /// It is in the agent's mount namespace.
    Here,
    /// It is in another one, in which the file system is mounted too.
    Shares,
    /// It is in another one without it.
    Lacks,
    /// The agent may not look.
    Unknown,
}

/// Whether pins end with the agent, or with the container that it runs in.
///
/// `root` is a folder on the file system, `mounted` tells that this process has just mounted it.
pub fn is_private(root: &Path, mounted: bool) -> bool {
    let machine = fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == MACHINE_PIDS);
    let first = first(root).unwrap_or(First::Unknown);
    decide(Known { mounted, machine, first })
}

fn decide(known: Known) -> bool {
    match known.first {
        First::Shares => false,
        First::Lacks => true,
        // The namespace of a machine's first process is the machine's. A container's has what its runtime mounted from outside.
        First::Here | First::Unknown => known.mounted && !known.machine,
    }
}

fn first(root: &Path) -> io::Result<First> {
    let namespace = |process: &str| fs::metadata(format!("/proc/{process}/ns/mnt")).map(|file| file.ino());
    if namespace("1")? == namespace("self")? {
        return Ok(First::Here);
    }
    let device = fs::metadata(root)?.dev();
    let device = format!("{}:{}", libc::major(device), libc::minor(device));
    let mounts = fs::read_to_string("/proc/1/mountinfo")?;
    Ok(if has(&mounts, &device) { First::Shares } else { First::Lacks })
}

/// Whether a text of `/proc/PID/mountinfo` has a mount of a device (major:minor).
fn has(mounts: &str, device: &str) -> bool {
    mounts.lines().any(|line| line.split(' ').nth(2) == Some(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C3
    #[test]
    fn pins_are_private_if_nobody_else_has_their_file_system() {
        for mounted in [false, true] {
            for machine in [false, true] {
                let decide = |first| decide(Known { mounted, machine, first });
                assert!(decide(First::Lacks) && !decide(First::Shares));
                let in_container = mounted && !machine;
                assert_eq!([decide(First::Here), decide(First::Unknown)], [in_container; 2]);
            }
        }
    }

    #[test]
    fn a_file_system_is_found_by_its_device() {
        let mounts =
            "22 1 0:21 / /proc rw - proc proc rw\n40 22 0:33 / /sys/fs/bpf rw,nosuid - bpf bpf rw,mode=700\n";
        assert!(has(mounts, "0:33") && !has(mounts, "0:3") && !has("", "0:33"));
    }
}
