//! What a measurement leaves behind: what was measured, on what, and what it says of the targets. Reports read nothing else.

use super::target::Judgement;
use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

/// The folder of the records, in the source tree that this program was built from.
pub const RECORDS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/records");

/// Where something was measured, and what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// The CPU's name.
    pub cpu: String,
    /// How many there are.
    pub cpus: usize,
    /// The commit that was built, with `+` if there was more.
    pub commit: String,
    /// Versions of the programs.
    pub versions: BTreeMap<String, String>,
}

/// What a program prints, for its version.
pub fn output(program: impl AsRef<Path>, arguments: &[&str]) -> String {
    let output = Command::new(program.as_ref()).args(arguments).output();
    output
        .map_or_else(|_| "missing".into(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The commit of the source tree, with `+` if there is more than it has.
pub fn commit() -> String {
    let workspace = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let git = |arguments: &[&str]| output("git", &[&["-C", workspace], arguments].concat());
    // New records are no change of what is measured.
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", ".", ":!benches", ":!docs"]);
    git(&["rev-parse", "HEAD"]) + if changed.is_empty() { "" } else { "+" }
}

/// The kernel's release.
pub fn kernel() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

impl Machine {
    /// The commit in short, for a sentence.
    pub fn short_commit(&self) -> &str {
        self.commit.get(..12).unwrap_or(&self.commit)
    }

    /// This machine, with the versions of the programs that took part.
    pub fn here(versions: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let mut versions: BTreeMap<String, String> =
            versions.into_iter().map(|(program, version)| (program.to_owned(), version)).collect();
        versions.insert("portolan".into(), env!("CARGO_PKG_VERSION").into());
        Self {
            kernel: kernel(),
            cpu: cpu.map_or_else(|| "unknown".into(), |(_, name)| name.to_owned()),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            commit: commit(),
            versions,
        }
    }
}

/// A run of one kind of measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record<T> {
    /// What kind: the first part of the file's name.
    pub kind: String,
    /// Seconds since 1970.
    pub time: u64,
    /// Where.
    pub machine: Machine,
    /// Whether the programs were built with optimization.
    pub optimized: bool,
    /// Whether less was measured than the method asks for.
    pub quick: bool,
    /// Whether all that was planned was measured.
    pub complete: bool,
    /// What a reader has to know.
    pub notes: Vec<String>,
    /// What it says of the targets.
    pub targets: Vec<Judgement>,
    /// Why the run proves nothing; empty if it does.
    pub void: Vec<String>,
    /// What was measured.
    pub measured: T,
}

impl<T> Record<T> {
    /// A record that begins now.
    pub fn new(kind: &str, machine: Machine, quick: bool, measured: T) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            kind: kind.into(),
            time: now.as_secs(),
            machine,
            optimized: !cfg!(debug_assertions),
            quick,
            complete: false,
            notes: Vec::new(),
            targets: Vec::new(),
            void: Vec::new(),
            measured,
        }
    }

    /// Prints what it says of the targets, and what speaks against it.
    pub fn print(&self) {
        println!();
        self.targets.iter().for_each(|target| println!("{target}"));
        self.void.iter().for_each(|reason| println!("VOID: {reason}"));
        if self.quick {
            println!("quick: less than the method asks for");
        }
        if !self.optimized {
            println!("built without optimization: the figures are too bad");
        }
    }

    /// Whether it proves something, and no target is missed.
    pub fn is_good(&self) -> bool {
        self.void.is_empty() && !self.targets.iter().any(Judgement::is_missed)
    }
}

impl<T: Serialize> Record<T> {
    /// All that was planned was measured: prints what it says of the targets, and writes it to the folder.
    ///
    /// # Errors
    /// As [`Record::write`].
    pub fn finish(mut self, folder: &Path) -> Result<Self> {
        self.complete = true;
        self.print();
        println!("record: {}", self.write(folder)?.display());
        Ok(self)
    }

    /// Writes it to the folder, in the place of what it was before if it has been written already.
    ///
    /// # Errors
    /// If the folder cannot be written.
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let file = folder.join(format!("{}-{}.json", self.kind, self.time));
        let text = serde_json::to_string_pretty(self)? + "\n";
        // A run that is cut short leaves the old text or the new one.
        let new = file.with_extension("new");
        fs::write(&new, text).with_context(|| new.display().to_string())?;
        fs::rename(&new, &file).with_context(|| file.display().to_string())?;
        Ok(file)
    }
}

/// The records of one kind in a folder, the newest first.
///
/// # Errors
/// If one of them cannot be read: a report that leaves it out would mislead.
pub fn read<T: DeserializeOwned>(folder: &Path, kind: &str) -> Result<Vec<Record<T>>> {
    let mut records = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let of_kind = name.strip_prefix(kind).and_then(|rest| rest.strip_prefix('-')?.strip_suffix(".json"));
        if of_kind.is_none_or(|time| time.parse::<u64>().is_err()) {
            continue;
        }
        let text = fs::read_to_string(entry.path()).with_context(|| name.clone())?;
        let record: Record<T> = serde_json::from_str(&text)
            .with_context(|| format!("{} is no record of this version: remove it", entry.path().display()))?;
        records.push(record);
    }
    records.sort_by_key(|record| std::cmp::Reverse(record.time));
    Ok(records)
}

/// The newest record of one kind that is complete and of an optimized build; without one, the newest of a run that was cut short.
///
/// # Errors
/// As [`read`].
pub fn newest<T: DeserializeOwned>(folder: &Path, kind: &str) -> Result<Option<Record<T>>> {
    let mut records = read(folder, kind)?;
    records.retain(|record| record.optimized);
    let complete = records.iter().position(|record: &Record<T>| record.complete);
    Ok(records.into_iter().nth(complete.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_complete_record_is_found() {
        let folder = std::env::temp_dir().join(format!("portolan-records-{}", std::process::id()));
        for (time, complete) in [(7, true), (30, true), (100, false)] {
            let mut record = Record::new("net", Machine::here([]), true, time * 10);
            (record.time, record.complete, record.optimized) = (time, complete, true);
            record.write(&folder).unwrap();
        }
        fs::write(folder.join("netx-200.json"), "{}").unwrap();
        fs::write(folder.join("net-200.json.bak"), "{}").unwrap();
        let found = newest::<u64>(&folder, "net").unwrap();
        let mut record = Record::new("other", Machine::here([]), true, 50);
        record.optimized = true;
        record.write(&folder).unwrap();
        let cut_short = newest::<u64>(&folder, "other").unwrap();
        let all = read::<u64>(&folder, "net").unwrap();
        fs::write(folder.join("net-300.json"), "{}").unwrap();
        let broken = newest::<u64>(&folder, "net");
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found.unwrap().measured, 300);
        assert_eq!(cut_short.unwrap().measured, 50);
        assert_eq!(all.iter().map(|record| record.time).collect::<Vec<_>>(), [100, 30, 7]);
        assert!(broken.is_err());
    }
}
