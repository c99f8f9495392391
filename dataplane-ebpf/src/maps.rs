//! The maps, as `dataplane_common::tables` says them. Their element counts are defaults: the agent may load others.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, SkStorage};
use aya_ebpf::macros::btf_map;
use dataplane_common::tables::{self, Table};

macro_rules! maps {
    ($($static:ident: $kind:ident = $name:literal, $table:ident;)+) => {
        $(
            #[doc = concat!("The map `", $name, "`.")]
            #[btf_map(name = $name)]
            pub static $static: maps!(@type $kind, tables::$table) = <maps!(@type $kind, tables::$table)>::new();
        )+

        #[cfg(test)]
        const NAMES: &[(&str, &str)] = &[$(($name, <tables::$table as Table>::NAME),)+];
    };
    (@type Array, $table:ty) => { Array<<$table as Table>::Value, { <$table as Table>::CAPACITY }> };
    (@type MappedArray, $table:ty) => {
        Array<<$table as Table>::Value, { <$table as Table>::CAPACITY }, { BPF_F_MMAPABLE as usize }>
    };
    (@type SkStorage, $table:ty) => { SkStorage<<$table as Table>::Value> };
    (@type PerCpuArray, $table:ty) => { PerCpuArray<<$table as Table>::Value, { <$table as Table>::CAPACITY }> };
    (@type HashMap, $table:ty) => {
        HashMap<<$table as Table>::Key, <$table as Table>::Value, { <$table as Table>::CAPACITY }>
    };
    (@type HashMapByEntry, $table:ty) => {
        HashMap<
            <$table as Table>::Key,
            <$table as Table>::Value,
            { <$table as Table>::CAPACITY },
            { BPF_F_NO_PREALLOC as usize },
        >
    };
    (@type LruHashMap, $table:ty) => {
        LruHashMap<<$table as Table>::Key, <$table as Table>::Value, { <$table as Table>::CAPACITY }>
    };
    // Its key has the number of bits before the data that they are of.
    (@type LpmTrie, $table:ty) => {
        LpmTrie<
            [u8; size_of::<<$table as Table>::Key>() - size_of::<u32>()],
            <$table as Table>::Value,
            { <$table as Table>::CAPACITY },
        >
    };
}

maps! {
    NODE: MappedArray = "node", Nodes;
    NODE_ADDRS: HashMapByEntry = "node_addrs", NodeAddrs;
    FILTER: Array = "filter", Filter;
    CALLERS: MappedArray = "callers", Callers;
    FRONTENDS: HashMapByEntry = "frontends", Frontends;
    SERVICES: MappedArray = "services", Services;
    SOURCE_RANGES: LpmTrie = "source_ranges", SourceRanges;
    SLOTS: Array = "slots", Slots;
    BACKENDS: MappedArray = "backends", Backends;
    FLOWS: HashMapByEntry = "flows", Flows;
    HALF_OPEN: Array = "half_open", HalfOpen;
    CLOSING: Array = "closing", Closing;
    TURNS: Array = "turns", Turns;
    PORT_TURN: PerCpuArray = "port_turn", PortTurns;
    OUTGOINGS: LruHashMap = "outgoing", Outgoings;
    UPLINKS: LruHashMap = "uplinks", Uplinks;
    AFFINITIES: LruHashMap = "affinity", Affinities;
    NEWCOMERS: LruHashMap = "affinity_new", Newcomers;
    FRAGMENTS: LruHashMap = "fragments", Fragments;
    KEPT: Array = "kept", Kept;
    MOVED: LruHashMap = "moved", Moved;
    SERVICE_TRIES: HashMapByEntry = "service_tries", ServiceTries;
    SERVICE_TRAFFIC: Array = "service_traffic", ServiceTraffic;
    BACKEND_TRAFFIC: Array = "backend_traffic", BackendTraffic;
    OPEN: MappedArray = "open", OpenCounts;
    REASONS: PerCpuArray = "reasons", Reasons;
    WATCH: MappedArray = "watch", Watches;
    EVENTS: MappedArray = "events", Events;
    ANSWERS: PerCpuArray = "answers", Answers;
    ROUNDS: Array = "rounds", Rounds;
    SCRATCH: PerCpuArray = "scratch", Scratch;
    SOCKET_NAMES: SkStorage = "socket_names", SocketNames;
    SOCKET_PEERS: LruHashMap = "socket_peers", SocketPeers;
    SOCKET_CHOICES: LruHashMap = "socket_choices", SocketChoices;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever writes to a map names it in front of one of these.
    #[test]
    fn programs_write_to_no_table_that_they_only_read() {
        const WRITES: [&str; 5] = ["get_ptr_mut", "insert", "remove", "push", "pop"];
        let read_only =
            ["NODE", "NODE_ADDRS", "FILTER", "FRONTENDS", "SERVICES", "SOURCE_RANGES", "SLOTS", "BACKENDS"];
        assert_eq!(read_only.len(), tables::READ_ONLY.len());
        let mut folders = std::vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
        let mut seen = 0;
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let text = std::fs::read_to_string(&path).unwrap();
                for name in read_only {
                    for write in WRITES {
                        let call = std::format!("{name}.{write}(");
                        let found = text.match_indices(&call);
                        let own = found.filter(|(at, _)| {
                            !text[..*at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                        });
                        assert_eq!(own.count(), 0, "{call} in {}", path.display());
                    }
                    seen += text.matches(&std::format!("{name}.")).count();
                }
            }
        }
        assert!(seen >= read_only.len(), "the names are no longer those of the maps");
    }

    #[test]
    fn every_table_has_its_map_under_its_own_name() {
        assert!(NAMES.iter().all(|(map, table)| map == table));
        assert_eq!(NAMES.len(), tables::ALL.len());
    }
}
