//! What a process holds: memory, files, threads, and what it has the kernel keep.

use crate::bench_net::resident_kib;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What is held at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Resident memory in KiB.
    pub resident_kib: u64,
    /// Open file descriptors.
    pub open_files: u64,
    /// Threads.
    pub threads: u64,
    /// Memory of the BPF maps and programs that it has open, in KiB, as the kernel accounts it.
    pub kernel_kib: u64,
    /// Pinned maps, programs and links.
    pub pins: u64,
}

impl Held {
    /// By the process with this id and below this pin folder.
    pub(super) fn by(pid: &u32, pins: &Path) -> Result<Self> {
        let process = Path::new("/proc").join(pid.to_string());
        let count = |folder: &str| -> Result<u64> {
            let path = process.join(folder);
            Ok(fs::read_dir(&path).with_context(|| path.display().to_string())?.count() as u64)
        };
        Ok(Self {
            resident_kib: resident_kib(*pid).context("the agent has ended")?,
            open_files: count("fd")?,
            threads: count("task")?,
            kernel_kib: kernel_bytes(&process)? / 1_024,
            pins: files(pins),
        })
    }
}

/// Bytes of the maps and programs, each once however often it is open.
fn kernel_bytes(process: &Path) -> Result<u64> {
    let mut objects = BTreeMap::new();
    for entry in fs::read_dir(process.join("fdinfo"))?.flatten() {
        // A descriptor may be closed by now.
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        objects.extend(bpf_object(&text));
    }
    Ok(objects.values().sum())
}

/// What `/proc/PID/fdinfo` says of a map or program: which it is, and its bytes.
fn bpf_object(text: &str) -> Option<((&'static str, u64), u64)> {
    let field = |name: &str| -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
    };
    let id = ["map_id", "prog_id"].into_iter().find_map(|name| Some((name, field(name)?)))?;
    Some((id, field("memlock")?))
}

/// How many files there are below a folder.
fn files(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_told_by_its_number_and_its_bytes() {
        let map = "pos:\t0\nflags:\t02000002\nmap_type:\t1\nmax_entries:\t64\nmemlock:\t8192\nmap_id:\t7\nfrozen:\t0\n";
        assert_eq!(bpf_object(map), Some((("map_id", 7), 8_192)));
        let program = "prog_type:\t3\nprog_tag:\tabc\nmemlock:\t4096\nprog_id:\t9\n";
        assert_eq!(bpf_object(program), Some((("prog_id", 9), 4_096)));
        assert_eq!(bpf_object("pos:\t0\nflags:\t02\n"), None);
    }
}
