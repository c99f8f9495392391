//! How full the tables are, and a warning before one is full.

use super::family::{TABLE_CAPACITY, TABLE_ENTRIES, TABLE_NEARLY_FULL, Text};
use dataplane_common::tables::{Closing, SocketChoices, SocketPeers, Table as _, Uplinks};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// From this part of its room on, in per cent, a table is nearly full.
const HIGH: usize = 90;
/// Below this part it is so no longer.
const LOW: usize = 80;

/// Tables from which nothing is removed but by what is newer: sooner or later they are full of what is of no use any more,
/// and that says nothing.
const ALWAYS_FULL: [&str; 4] = [SocketPeers::NAME, SocketChoices::NAME, Uplinks::NAME, Closing::NAME];

#[derive(Clone, Copy, Debug, Default)]
struct Table {
    entries: usize,
    capacity: usize,
    nearly_full: bool,
}

/// How full the tables are, as far as somebody counted.
#[derive(Debug, Default)]
pub struct Fill {
    tables: Mutex<BTreeMap<&'static str, Table>>,
}

impl Fill {
    fn tables(&self) -> MutexGuard<'_, BTreeMap<&'static str, Table>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A table has so many entries. A warning, if it has just become nearly full.
    pub fn set(&self, name: &'static str, entries: usize, capacity: usize) -> Option<String> {
        let mut tables = self.tables();
        let table = tables.entry(name).or_default();
        let part = entries.saturating_mul(100).checked_div(capacity).unwrap_or_default();
        let was = table.nearly_full;
        let nearly_full = !ALWAYS_FULL.contains(&name) && (part >= HIGH || (was && part >= LOW));
        *table = Table { entries, capacity, nearly_full };
        (table.nearly_full && !was).then(|| {
            format!(
                "the table {name} is {part} % full, {entries} of {capacity} entries: make room with {}",
                flag(name)
            )
        })
    }

    /// Tables that nobody counts tell their room only.
    pub(super) fn write(&self, text: &mut Text, rooms: &[(&'static str, usize)]) {
        let tables = self.tables();
        text.head(&TABLE_ENTRIES);
        for (name, table) in tables.iter() {
            text.sample(&TABLE_ENTRIES, &[name], table.entries);
        }
        let mut capacities: BTreeMap<_, _> = rooms.iter().copied().collect();
        capacities.extend(tables.iter().map(|(name, table)| (*name, table.capacity)));
        text.head(&TABLE_CAPACITY);
        for (name, capacity) in capacities {
            text.sample(&TABLE_CAPACITY, &[name], capacity);
        }
        text.head(&TABLE_NEARLY_FULL);
        for (name, table) in tables.iter() {
            text.sample(&TABLE_NEARLY_FULL, &[name], u8::from(table.nearly_full));
        }
    }
}

fn flag(table: &str) -> String {
    match table {
        "flows" => "--max-flows".to_owned(),
        _ => format!("--map-size {table}=N"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// H3
    #[test]
    fn a_table_is_warned_of_once_before_it_is_full() {
        let fill = Fill::default();
        assert_eq!(fill.set("flows", 899, 1000), None);
        let warning = fill.set("flows", 900, 1000).unwrap();
        assert!(warning.contains("90 % full, 900 of 1000") && warning.contains("--max-flows"), "{warning}");
        assert_eq!(fill.set("flows", 950, 1000), None);
        assert_eq!(fill.set("flows", 820, 1000), None, "still told");
        assert_eq!(fill.set("flows", 920, 1000), None);
        assert_eq!(fill.set("flows", 700, 1000), None);
        assert!(fill.set("flows", 1000, 1000).is_some());
        assert!(fill.set("frontends", 10, 10).unwrap().contains("--map-size frontends=N"));
    }

    /// H3
    #[test]
    fn a_table_that_is_always_full_is_not_warned_of() {
        let fill = Fill::default();
        assert_eq!(fill.set("socket_peers", 16_384, 16_384), None);
        let mut text = Text::default();
        fill.write(&mut text, &[]);
        let text = text.into_string();
        assert!(text.contains("portolan_table_entries{table=\"socket_peers\"} 16384"), "{text}");
        assert!(text.contains("portolan_table_nearly_full{table=\"socket_peers\"} 0"), "{text}");
    }

    /// H3
    #[test]
    fn entries_and_room_are_told_by_table() {
        let fill = Fill::default();
        fill.set("frontends", 95, 100);
        let mut text = Text::default();
        fill.write(&mut text, &[("frontends", 100), ("socket_peers", 7)]);
        let text = text.into_string();
        for line in [
            "portolan_table_entries{table=\"frontends\"} 95",
            "portolan_table_capacity{table=\"frontends\"} 100",
            "portolan_table_capacity{table=\"socket_peers\"} 7",
            "portolan_table_nearly_full{table=\"frontends\"} 1",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
    }
}
