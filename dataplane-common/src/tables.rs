//! Every map by name, with its key, its value, its kind and how many entries it has by default.
//!
//! Nothing else names a map. The default sizes hold 30,000 service ports with two addresses each, 120,000 endpoints and
//! 131,072 established flows; each can be changed by a flag of the agent.

use crate::Addr;
use crate::affinity::{Affinity, AffinityKey, Choice};
use crate::answers::ANSWER_RATES;
use crate::backend::Backend;
use crate::counter::{Open, Traffic};
use crate::drop::REASON_SLOTS;
use crate::event::{EVENTS, Event, Watch};
use crate::filter::{CALLER_CELLS, FILTER_WORDS};
use crate::flow::{Flow, FlowKey, Name, PortTurn, RingTurns};
use crate::fragment::{FragmentKey, FragmentPorts};
use crate::frontend::{Frontend, FrontendKey};
use crate::kept::{self, Tries};
use crate::node::{Node, NodeAddress};
use crate::range::SourceRangeKey;
use crate::service::Service;
use crate::socket::{SocketChoiceKey, SocketName, SocketPeer, SocketPeerKey};
use crate::uplink::Uplink;
use bytemuck::Pod;

/// Version of the layout of all maps: the folder of their pins below the agent's pin folder.
///
/// A change of a key, a value or the meaning of a field takes the next number.
pub const LAYOUT: &str = "v6";

/// The kinds of map that are used, after the kernel's `BPF_MAP_TYPE_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// `BPF_MAP_TYPE_ARRAY`.
    Array,
    /// The same, which the agent maps into its own memory (`BPF_F_MMAPABLE`).
    MappedArray,
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`.
    PerCpuArray,
    /// `BPF_MAP_TYPE_HASH`, all of whose memory is taken when it is made.
    Hash,
    /// The same, whose memory is taken by entry (`BPF_F_NO_PREALLOC`).
    HashByEntry,
    /// `BPF_MAP_TYPE_LRU_HASH`.
    LruHash,
    /// `BPF_MAP_TYPE_LPM_TRIE`: the key begins with the number of its bits that count.
    LpmTrie,
    /// `BPF_MAP_TYPE_SK_STORAGE`: a value that lives and ends with its socket. Bounded by no number of entries; the key is a
    /// descriptor of the socket.
    SkStorage,
}

/// One map: its name in the kernel and on bpffs, its types and its default size.
pub trait Table {
    /// Name of the map and of its pin.
    const NAME: &'static str;
    /// Its kind.
    const KIND: TableKind;
    /// Its default number of entries.
    const CAPACITY: usize;
    /// Its key; `u32` for arrays.
    type Key: Pod;
    /// Its value; of per-CPU arrays, that of one CPU.
    type Value: Pod;
}

/// How many established flows there is room for at least, unless a flag says otherwise; the agent gives more where there is memory.
pub const ESTABLISHED: usize = 131_072;

/// How many entries `flows` has where there is room for so many flows of each stage.
pub const fn flow_entries(established: usize, half_open: usize, closing: usize) -> usize {
    2 * (established + half_open + closing)
}

macro_rules! tables {
    ($($(#[doc = $doc:literal])+ $type:ident = $name:literal, $kind:ident<$key:ty, $value:ty>, $capacity:expr;)+) => {
        $(
            $(#[doc = $doc])+
            #[derive(Clone, Copy, Debug)]
            pub enum $type {}

            impl Table for $type {
                const NAME: &'static str = $name;
                const KIND: TableKind = TableKind::$kind;
                const CAPACITY: usize = $capacity;
                type Key = $key;
                type Value = $value;
            }
        )+

        /// Name, kind and default size of every table.
        pub const ALL: &[(&str, TableKind, usize)] = &[$(($name, TableKind::$kind, $capacity),)+];

        /// Name of every table, and the bytes of its key and of its value.
        pub const SIZES: &[(&str, usize, usize)] =
            &[$(($name, size_of::<$key>(), size_of::<$value>()),)+];
    };
}

tables! {
    /// The node's settings, one element.
    Nodes = "node", MappedArray<u32, Node>, 1;
    /// Addresses of this node.
    NodeAddrs = "node_addrs", HashByEntry<Addr, NodeAddress>, 10_240;
    /// The filter in front of the hash tables.
    Filter = "filter", Array<u32, u64>, FILTER_WORDS;
    /// When somebody last called a Service by packet: the filter of replies.
    Callers = "callers", MappedArray<u32, u64>, CALLER_CELLS;
    /// Address, port and protocol to service port. Memory is taken by entry.
    Frontends = "frontends", HashByEntry<FrontendKey, Frontend>, 65_536;
    /// Service ports by id. Id 0 is never given out.
    Services = "services", MappedArray<u32, Service>, 32_768;
    /// Who may call the restricted addresses of a service port. Memory is taken by entry.
    SourceRanges = "source_ranges", LpmTrie<SourceRangeKey, u32>, 65_536;
    /// Runs of backend ids: the endpoint sets.
    Slots = "slots", Array<u32, u32>, 262_144;
    /// Backends by id. Id 0 is never given out.
    Backends = "backends", MappedArray<u32, Backend>, 122_880;
    /// Flows, both directions: those that both ends confirmed, and those that are named in `half_open` and `closing`. Memory is taken
    /// by entry.
    Flows = "flows", HashByEntry<FlowKey, Flow>, flow_entries(ESTABLISHED, HalfOpen::CAPACITY, Closing::CAPACITY);
    /// A ring: the name of each flow whose handshake is not complete, and of some that are further.
    HalfOpen = "half_open", Array<u32, Name>, 131_072;
    /// A ring: the name of each flow that ended or was reset.
    Closing = "closing", Array<u32, Name>, 65_536;
    /// How far these two have come, one element each.
    Turns = "turns", Array<u32, RingTurns>, 2;
    /// How far a CPU has given out the translated source ports, one element.
    PortTurns = "port_turn", PerCpuArray<u32, PortTurn>, 1;
    /// What left the node from the number of one of its node ports and is of no flow: the five-tuple of its answers, and when the
    /// last of it left, in nanoseconds of the coarse monotonic clock.
    Outgoings = "outgoing", LruHash<FlowKey, u64>, 8_192;
    /// The link-layer addresses of the uplinks by which the node itself calls Services, by index.
    Uplinks = "uplinks", LruHash<u32, Uplink>, 128;
    /// The endpoint that each client of a service port with affinity had last, of those that have had a connection.
    Affinities = "affinity", LruHash<AffinityKey, Affinity>, 16_384;
    /// The same of clients of which no connection is complete: anybody can forge those.
    Newcomers = "affinity_new", LruHash<AffinityKey, Affinity>, 4_096;
    /// The ports of datagrams that come in fragments, from the first of them.
    Fragments = "fragments", LruHash<FragmentKey, FragmentPorts>, 8_192;
    /// Traffic per service port, but for what is counted in its flows still.
    ServiceTraffic = "service_traffic", Array<u32, Traffic>, 32_768;
    /// The same per backend.
    BackendTraffic = "backend_traffic", Array<u32, Traffic>, 122_880;
    /// How many flows and connected sockets of each backend are open (L2). The agent maps it: it counts off what it removes.
    OpenCounts = "open", MappedArray<u32, Open>, 122_880;
    /// The packets by which flows began, as long as they are not answered: by the turn in which they began.
    Kept = "kept", Array<u32, kept::Kept>, 2_048;
    /// The endpoint's half of each flow of UDP that lately got another endpoint, by its key: what else the first refuses finds its client.
    Moved = "moved", LruHash<FlowKey, Flow>, 256;
    /// Second tries per service port.
    ServiceTries = "service_tries", HashByEntry<u32, Tries>, 32_768;
    /// How often each reason occurred.
    Reasons = "reasons", PerCpuArray<u32, u64>, REASON_SLOTS;
    /// Whether anybody watches, one element.
    Watches = "watch", MappedArray<u32, Watch>, 1;
    /// What whoever watches is told: a ring.
    Events = "events", MappedArray<u32, Event>, EVENTS;
    /// How many answers that say no a CPU has given: the moments up to which they were given, in nanoseconds of the coarse monotonic
    /// clock.
    Answers = "answers", PerCpuArray<u32, u64>, ANSWER_RATES;
    /// How many flows of a service port have begun by turns: whose turn it is (L2).
    Rounds = "rounds", Array<u32, u64>, 32_768;
    /// Working memory of the walk, opaque: the stack of an eBPF program has 512 bytes only.
    Scratch = "scratch", PerCpuArray<u32, [u64; 128]>, 1;
    /// What programs called by TCP.
    SocketNames = "socket_names", SkStorage<i32, SocketName>, 0;
    /// What programs called by UDP, by socket and endpoint.
    SocketPeers = "socket_peers", LruHash<SocketPeerKey, SocketPeer>, 8_192;
    /// The endpoint an unconnected UDP socket keeps.
    SocketChoices = "socket_choices", LruHash<SocketChoiceKey, Choice>, 8_192;
}

/// The tables that programs only read: a second copy of the programs may have these and nothing else in common with those that
/// serve.
pub const READ_ONLY: &[&str] = &[
    Nodes::NAME,
    NodeAddrs::NAME,
    Filter::NAME,
    Frontends::NAME,
    Services::NAME,
    SourceRanges::NAME,
    Slots::NAME,
    Backends::NAME,
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_fit_the_kernel() {
        // BPF_OBJ_NAME_LEN is 16 with the closing zero.
        let names: HashSet<_> = ALL.iter().map(|(name, ..)| name).collect();
        assert_eq!(names.len(), ALL.len());
        assert!(names.iter().all(|name| name.len() <= 15));
    }

    #[test]
    fn whatever_must_agree_lies_in_one_word() {
        assert_eq!(size_of::<Frontend>(), 8);
        assert_eq!(size_of::<crate::service::EndpointSet>(), 8);
        assert_eq!(size_of::<crate::backend::BackendStatus>(), 8);
        assert_eq!(size_of::<Choice>(), 8);
        assert_eq!(size_of::<NodeAddress>(), 8);
        assert_eq!(size_of::<crate::flow::Numbers>(), 8);
        assert_eq!(size_of::<crate::flow::Counted>(), 8);
        assert_eq!(size_of::<crate::node::SourceRule>(), 8);
        assert_eq!(size_of::<PortTurn>(), 16);
        assert_eq!(size_of::<Uplink>(), 8);
        assert_eq!(size_of::<Open>(), 8);
        assert_eq!(size_of::<FragmentPorts>(), 8);
    }

    #[test]
    fn the_sizes_of_keys_and_values_are_the_documented_ones() {
        assert_eq!(size_of::<FrontendKey>(), 24);
        assert_eq!(size_of::<FlowKey>(), 40);
        assert_eq!(size_of::<Flow>(), 96);
        assert_eq!((size_of::<Event>(), size_of::<Watch>()), (144, 320));
        assert_eq!((size_of::<Name>(), size_of::<RingTurns>()), (48, 64));
        assert_eq!(size_of::<FragmentKey>(), 40);
        assert_eq!((size_of::<kept::Kept>(), size_of::<Tries>()), (128, 48));
        assert_eq!(size_of::<Service>(), 40);
        assert_eq!(size_of::<Backend>(), 32);
        assert_eq!(size_of::<Traffic>(), 40);
        assert_eq!(size_of::<SourceRangeKey>(), 24);
        assert_eq!((size_of::<AffinityKey>(), size_of::<Affinity>()), (24, 16));
    }
}
