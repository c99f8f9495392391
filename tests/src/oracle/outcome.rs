//! What may become of a packet.

use super::Place;
use super::again::Refusal;
use super::choice::Question;
use super::cluster::PortId;
use super::flows::{Flow, Sender, Tuple};
use super::wire::{Flaw, Rewrite};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// Why a packet is dropped or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Why {
    /// P1.
    NoEndpoints,
    /// P2, P3.
    NoLocalEndpoints,
    /// P10.
    ClusterIpFromOutside,
    /// P13, a ClusterIP.
    ClosedPort,
    /// P13, an address of a service range.
    UnknownService,
    /// Z3, first half.
    Loopback,
    /// Z3, second half.
    BadSource,
    /// It cannot be translated whole (P20, P21).
    Flawed(Flaw),
    /// A TCP reset, or SCTP's ABORT, that belongs to no flow.
    StrayReset,
    /// S2.
    SourceNotAllowed,
    /// P22: a SYN-ACK, or what is of SCTP and opens nothing, that belongs to no flow.
    StrayAnswer,
    /// P20: its first fragment was refused or dropped.
    OrphanFragment,
    /// P19, P20: it cannot be sent on, and must not be answered.
    Unanswerable,
    /// There is no way for a client of the link.
    NoRoute,
    /// P23: there is no way to the endpoint, and the sender is told.
    Unreachable,
    /// Its time to live ended here.
    TtlExceeded,
    /// It is longer than the way takes.
    TooBig,
    /// P12: no source port was found.
    PortsExhausted,
}

/// What tells a sender no.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A TCP reset.
    Reset,
    /// ICMP (or ICMPv6) port unreachable, from the address that was called.
    PortUnreachable,
    /// Net unreachable (ICMPv6: no route), from an address of the node.
    NoRoute,
    /// Time exceeded, from an address of the node.
    TimeExceeded,
    /// Fragmentation needed, or packet too big, with the bytes that the way takes.
    TooBig(usize),
}

/// Where a translated source comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSource {
    /// The client's own.
    Kept,
    /// This address, with a port of the range (P12).
    Port(IpAddr),
}

/// How a translated packet leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// On to the host's stack.
    Stack,
    /// The same, marked: netfilter translates its source where it leaves.
    Masqueraded,
    /// Past it, routed.
    Forward,
    /// Up the stack as if it had come in on the uplink, with this link-layer destination.
    HandUp([u8; 6]),
}

/// What may become of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// On, byte for byte as it came.
    Pass,
    /// The same; XDP cannot finish it and leaves it to tc.
    LeftToTc,
    /// Silence.
    Drop(Why),
    /// An answer in its place.
    Reject(Why, Answer),
    /// Translated by a flow that is known.
    Translated(Rewrite, Exit),
    /// It refuses what a client sent (L5): in its place that comes once more here, byte for byte.
    Again(Place, Vec<u8>),
    /// Translated by a flow that begins with it.
    Begun {
        /// The endpoint.
        to: SocketAddr,
        /// What becomes of the source.
        source: NewSource,
        /// Whether the time to live falls.
        ttl_falls: bool,
        /// How it leaves.
        exit: Exit,
    },
}

/// What is remembered if an alternative turns out to be the one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing new.
    Nothing,
    /// This flow begins; its translated tuple is to be completed by the source that was seen.
    Begin(Box<Flow>),
    /// The flow of this client was used, by whom.
    Used(Tuple, Sender),
    /// The endpoint of this client's flow has refused it.
    Refused(Tuple, Refusal),
    /// A packet without ports went its way.
    Followed(Tuple, Sender),
}

/// One thing that may happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alternative {
    /// What.
    pub outcome: Outcome,
    /// What it means for flows.
    pub then: Then,
    /// A flow that is over before that.
    pub ends: Option<Tuple>,
    /// A UDP flow left its endpoint (C1).
    pub rebalanced: bool,
    /// The flow gets another endpoint than those that refused it (L5).
    pub moved: Option<Refusal>,
    /// Another endpoint than its first answers it.
    pub rescued: bool,
    /// The flow that leaves its endpoint.
    pub leaves: Option<Box<Flow>>,
    /// Two flows would have had the same reply: a source port was translated that would else have been kept.
    pub collided: bool,
    /// S1 left less of a choice than the endpoint set.
    pub bound: bool,
    /// The endpoint that has most open was no choice (L2).
    pub spared: bool,
    /// The packet is left to another proxy.
    pub left: bool,
    /// P22: the packet is of somebody else's connection.
    pub others: bool,
    /// P22: this would answer it, and whether that is certainly remembered.
    pub notes: Option<(Tuple, bool)>,
    /// The client that comes back to this service port gets one of these again (S1).
    pub remembers: Option<(IpAddr, PortId, BTreeSet<SocketAddr>)>,
    /// Whoever asks the same again gets one of these again (L2).
    pub answers: Option<(Question, BTreeSet<SocketAddr>)>,
}

impl Alternative {
    /// The client of the flow that was used.
    pub fn used(&self) -> Option<Tuple> {
        match &self.then {
            Then::Used(client, _) | Then::Followed(client, _) => Some(*client),
            Then::Nothing | Then::Begin(_) | Then::Refused(..) => None,
        }
    }

    /// A hash leads to the endpoint, and one only.
    pub fn is_hashed(&self) -> bool {
        self.answers.as_ref().is_some_and(|((.., weights), chosen)| chosen.len() == 1 && weights.len() > 1)
    }

    pub(super) fn new(outcome: Outcome) -> Self {
        Self {
            outcome,
            then: Then::Nothing,
            ends: None,
            rebalanced: false,
            moved: None,
            rescued: false,
            leaves: None,
            collided: false,
            bound: false,
            spared: false,
            left: false,
            others: false,
            notes: None,
            remembers: None,
            answers: None,
        }
    }
}
