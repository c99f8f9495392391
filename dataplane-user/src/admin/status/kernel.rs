//! What the kernel holds, counted.

use super::super::drops::{self, DropRow};
use super::super::names::Names;
use super::super::take_over;
use super::{AdminError, Verdict};
use crate::kernel::link::interface_name;
use crate::kernel::maps::{KernelMaps, MapError};
use crate::kernel::pins::Pins;
use dataplane_common::backend::BackendStatus;
use dataplane_common::tables::{
    self, Backends, Frontends, LAYOUT, Services, Slots, SocketChoices, SocketPeers, Table as _, TableKind,
};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// From this part of its room on, in per cent, a table is worth a word.
const NEARLY_FULL: usize = 90;

/// The kernel, at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct KernelStatus {
    /// The version of the maps' layout.
    pub layout: &'static str,
    /// Other layouts of which there are maps: an upgrade is not complete.
    pub other_layouts: Vec<String>,
    /// Service ports, IPv4 and IPv6 counted apart.
    pub service_ports: usize,
    /// Addresses and ports that lead to one.
    pub frontends: usize,
    /// Endpoints of service ports.
    pub endpoints: usize,
    /// The tables of which somebody counts entries.
    pub tables: Vec<TableFill>,
    /// Programs on interfaces, by interface.
    pub interfaces: BTreeMap<String, Vec<String>>,
    /// Programs on sockets.
    pub sockets: Vec<String>,
    /// Whether TCP connections are left to another proxy (C5).
    pub taking_over: bool,
    /// How many are.
    pub connections_left: usize,
    /// The reasons that occurred since the maps were made.
    pub reasons: Vec<DropRow>,
}

/// How full a table is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TableFill {
    /// The table.
    pub table: &'static str,
    /// Its entries.
    pub entries: usize,
    /// How many there is room for.
    pub capacity: usize,
}

impl TableFill {
    /// In per cent.
    pub(super) fn part(&self) -> usize {
        self.entries.saturating_mul(100).checked_div(self.capacity).unwrap_or_default()
    }

    /// Whether it soon has no room for what is new. What only remembers forgets the oldest.
    fn is_short(&self) -> bool {
        let kind = tables::ALL.iter().find(|(name, ..)| *name == self.table).map(|(_, kind, _)| *kind);
        let forgets =
            kind == Some(TableKind::LruHash) || matches!(self.table, SocketPeers::NAME | SocketChoices::NAME);
        !forgets && self.part() >= NEARLY_FULL
    }
}

impl KernelStatus {
    /// What is pinned in a folder; none if nothing is.
    pub(super) fn look(bpffs: &Path, names: &Names) -> Result<Option<Self>, AdminError> {
        let maps = match KernelMaps::open(&bpffs.join(LAYOUT)) {
            Ok(maps) => maps,
            Err(MapError::Nothing { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let pins = Pins::new(bpffs);
        let (interfaces, sockets) = sort_links(pins.pinned_links()?);
        let take_over = take_over::page(&maps, names)?;
        let tables = count(&maps)?;
        let entries = |name| tables.iter().find(|fill| fill.table == name).map_or(0, |fill| fill.entries);
        let mut reasons = drops::rows(&maps)?;
        reasons.retain(|row| row.count > 0);
        Ok(Some(Self {
            layout: LAYOUT,
            other_layouts: pins.other_layouts()?,
            service_ports: entries(Services::NAME),
            frontends: entries(Frontends::NAME),
            endpoints: entries(Backends::NAME),
            interfaces,
            sockets,
            taking_over: take_over.taking_over,
            connections_left: take_over.connections.len(),
            reasons,
            tables,
        }))
    }

    /// What of it somebody should know.
    pub(super) fn findings(&self, find: &mut impl FnMut(Verdict, String)) {
        for fill in self.tables.iter().filter(|fill| fill.is_short()) {
            let TableFill { table, entries, capacity } = fill;
            find(
                Verdict::Warning,
                format!(
                    "the table {table} has {entries} of {capacity} entries: --map-size or --max-flows makes room"
                ),
            );
        }
        if !self.other_layouts.is_empty() {
            let others = self.other_layouts.join(", ");
            find(
                Verdict::Warning,
                format!(
                    "there are maps of another version too ({others}): an upgrade, or its way back, is not complete"
                ),
            );
        }
    }
}

/// Programs on interfaces by the interface's name, and programs on sockets, from the names of their pins.
fn sort_links(links: Vec<String>) -> (BTreeMap<String, Vec<String>>, Vec<String>) {
    let (mut interfaces, mut sockets) = (BTreeMap::<_, Vec<_>>::new(), Vec::new());
    for link in links {
        match link.rsplit_once('-').and_then(|(program, index)| Some((program, index.parse::<u32>().ok()?))) {
            Some((program, index)) => {
                let interface = interface_name(index).unwrap_or_else(|| format!("#{index} (gone)"));
                interfaces.entry(interface).or_default().push(program.to_owned());
            }
            None => sockets.push(link),
        }
    }
    (interfaces, sockets)
}

/// Entries of the tables whose entries come and go. Of arrays, what is in use.
fn count(maps: &KernelMaps) -> Result<Vec<TableFill>, MapError> {
    let mut fills = Vec::new();
    for (name, kind, _) in tables::ALL {
        let entries = match kind {
            TableKind::Hash | TableKind::HashByEntry | TableKind::LruHash => Some(maps.count(name)?),
            TableKind::Array | TableKind::MappedArray => in_use(maps, name)?,
            TableKind::PerCpuArray | TableKind::LpmTrie | TableKind::SkStorage => None,
        };
        let capacity = maps.iter().find(|(other, _)| other == name).map(|(_, map)| map.shape().max_entries);
        if let Some((entries, capacity)) = entries.zip(capacity) {
            fills.push(TableFill { table: name, entries, capacity });
        }
    }
    Ok(fills)
}

/// How many elements of an array are in use, if that can be told.
fn in_use(maps: &KernelMaps, name: &str) -> Result<Option<usize>, MapError> {
    let mut used = 0;
    match name {
        Services::NAME => {
            let mut ids = BTreeSet::new();
            maps.map::<Frontends>()?.visit(|_, values| ids.extend(values.iter().map(|it| it.service())))?;
            ids.remove(&0);
            used = ids.len();
        }
        Backends::NAME => maps.map::<Backends>()?.visit(|_, values| {
            used += values.iter().filter(|it| it.status().has(BackendStatus::SERVING)).count();
        })?,
        Slots::NAME => maps.map::<Services>()?.visit(|_, values| {
            let sets = values.iter().flat_map(|service| [service.cluster, service.local]);
            used += sets.map(|set| set.count() as usize).sum::<usize>();
        })?,
        _ => return Ok(None),
    }
    Ok(Some(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_told_by_interface_and_those_of_sockets_apart() {
        let links = ["connect4", "tc_pod_in-1", "tc_pod_out-1", "tc_uplink_in-4000000"].map(str::to_owned);
        let (interfaces, sockets) = sort_links(links.into());
        assert_eq!(interfaces["lo"], ["tc_pod_in", "tc_pod_out"]);
        assert_eq!(interfaces["#4000000 (gone)"], ["tc_uplink_in"]);
        assert_eq!(sockets, ["connect4"]);
    }

    #[test]
    fn a_table_that_forgets_the_oldest_is_never_short_of_room() {
        let fill = |table, entries| TableFill { table, entries, capacity: 10 };
        assert!(fill("frontends", 9).is_short() && !fill("frontends", 8).is_short());
        assert!(!fill("affinity", 10).is_short());
    }
}
