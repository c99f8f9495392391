//! Gives pinned maps more room: a new map beside the old one takes over what the old one holds, then its pin.
//!
//! While the programs are exchanged, old ones still write flows to the old map: those are carried over afterwards; but the names
//! that they gave meanwhile in a ring that has more room now are lost, and such a flow goes when it is idle. A map is never made
//! smaller, for what it holds might not fit.

use super::bpf::{self, MapFd};
use super::object::ObjectError;
use super::pins::Pins;
use dataplane_common::tables::{self, Table as _, TableKind};
use std::io;
use std::path::PathBuf;

/// A map that gets more room.
#[derive(Debug)]
pub(super) struct Enlarged {
    name: &'static str,
    old: MapFd,
}

/// The tables that programs write on their own.
const WRITTEN_BY_PROGRAMS: [&str; 8] = [
    tables::Flows::NAME,
    tables::Outgoings::NAME,
    tables::Uplinks::NAME,
    tables::Affinities::NAME,
    tables::Newcomers::NAME,
    tables::Fragments::NAME,
    tables::SocketPeers::NAME,
    tables::SocketChoices::NAME,
];

/// Where the new map is pinned until it holds what the old one does.
pub(super) fn new_pin(pins: &Pins, name: &str) -> PathBuf {
    pins.map(&format!("{name}-new"))
}

impl Enlarged {
    /// The map `old` is to be replaced by a larger one, made at [`new_pin`].
    pub(super) fn new(name: &'static str, old: MapFd) -> Self {
        Self { name, old }
    }

    /// Copies all and lets the new map have the pin.
    pub(super) fn take_over(&self, pins: &Pins) -> Result<(), ObjectError> {
        let failed = |source| ObjectError::Enlarge { name: self.name, source };
        let (from, to) = (new_pin(pins, self.name), pins.map(self.name));
        let new = MapFd::open(&from).map_err(failed)?;
        let copied = copy(&self.old, &new, bpf::ANY).map_err(failed)?;
        std::fs::rename(&from, &to).map_err(failed)?;
        tracing::info!(
            "map {} has room for {} entries instead of {}; {copied} were copied",
            self.name,
            new.shape().max_entries,
            self.old.shape().max_entries
        );
        Ok(())
    }

    /// Copies what programs wrote to the old map since.
    pub(super) fn carry_over(&self, pins: &Pins) {
        if !WRITTEN_BY_PROGRAMS.contains(&self.name) {
            return;
        }
        let copied = MapFd::open(&pins.map(self.name)).and_then(|new| copy(&self.old, &new, bpf::NO_EXIST));
        match copied {
            Ok(copied) => tracing::debug!("{copied} more entries of map {} were copied", self.name),
            Err(error) => tracing::warn!("map {}: some entries were not carried over: {error}", self.name),
        }
    }
}

/// Copies entry by entry. A hash table that changes meanwhile may begin again at its first
/// key, but not for ever.
fn copy(from: &MapFd, to: &MapFd, flags: u64) -> io::Result<usize> {
    let shape = from.shape();
    let is_array =
        [TableKind::Array, TableKind::PerCpuArray].map(super::maps::map_type).contains(&shape.map_type);
    let mut value = vec![0; from.copied_size()];
    let mut next = vec![0; shape.key_size];
    let mut key: Option<Vec<u8>> = None;
    let mut copied = 0;
    for _ in 0..shape.max_entries.saturating_mul(2) {
        if !from.next_key(key.as_deref(), &mut next)? {
            break;
        }
        if from.lookup(&next, &mut value)? && !(is_array && value.iter().all(|byte| *byte == 0)) {
            match to.update(&next, &value, flags) {
                Ok(()) => copied += 1,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        key = Some(next.clone());
    }
    Ok(copied)
}
