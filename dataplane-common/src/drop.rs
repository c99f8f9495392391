//! Why a packet or a connection was dropped, refused or left alone, and events an operator should see.

use core::fmt;

/// What became of the packets that a reason counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// Silence.
    Dropped,
    /// A TCP RST, an ICMP error, or `ECONNREFUSED`.
    Rejected,
    /// Nothing was lost; the operator may want to know.
    Noted,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $label:literal, $disposition:ident;)+) => {
        /// A named reason with its counter in the `reasons` per-CPU array, whose index is the number.
        ///
        /// A number is never given to another meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Reason { $($(#[doc = $doc])+ $name = $number,)+ }

        impl Reason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The reason with a number; [`Reason::CorruptTable`] for a number that is none.
            #[inline(always)]
            pub const fn from_number(number: u8) -> Self {
                match number { $($number => Self::$name,)+ _ => Self::CorruptTable }
            }

            /// Name for logs, metrics and the command line.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }

            /// What became of the packets.
            pub const fn disposition(self) -> Disposition {
                match self { $(Self::$name => Disposition::$disposition,)+ }
            }

            /// When it happens and what the operator can do.
            pub const fn help(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc,)+),)+ }
            }
        }
    };
}

reasons! {
    /// The Service has no endpoint at all (P1): check its selector and whether its pods are ready.
    NoEndpoints = 1, "no-endpoints", Rejected;
    /// The traffic policy is Local and this node has no endpoint of the Service (P2, P3): intended, or schedule one here.
    NoLocalEndpoints = 2, "no-local-endpoints", Dropped;
    /// A ClusterIP was called on a port its Service does not have (P13): check the client's port.
    ClosedPort = 3, "closed-port", Rejected;
    /// An address of the service ranges that no Service has was about to leave the node (P13): a stale address?
    UnknownService = 4, "unknown-service", Dropped;
    /// A packet from the network had a loopback address (Z3): somebody forges packets.
    Loopback = 5, "loopback", Dropped;
    /// A packet to a Service came from a multicast, broadcast or its own destination address (Z3).
    BadSource = 6, "bad-source", Dropped;
    /// A packet to a Service had more IPv6 extension headers than are followed (four, 128 bytes), or a source route that has not
    /// ended (P21).
    Extensions = 8, "extension-headers", Dropped;
    /// A packet to a Service was cut short or had a length that lies.
    Malformed = 9, "malformed", Dropped;
    /// All translated source ports that were tried are taken (P12): widen `--snat-ports`.
    PortsExhausted = 10, "ports-exhausted", Dropped;
    /// No route to the chosen endpoint that its sender would be told of: a black hole, or a client whose address is link-local.
    NoRoute = 11, "no-route", Dropped;
    /// The packet would have to be routed on, but forwarding is off on the interface it came in on: set `ip_forward`.
    ForwardingDisabled = 12, "forwarding-disabled", Dropped;
    /// The packet's time to live ended at this node; an ICMP time exceeded was sent.
    TtlExceeded = 13, "ttl-exceeded", Rejected;
    /// The packet is larger than the way to the endpoint takes; an ICMP fragmentation needed was sent.
    TooBig = 14, "too-big", Rejected;
    /// The table of flows was full: those that are closing or half-open make room for the next, or enlarge it with `--max-flows`.
    FlowsFull = 15, "flows-full", Dropped;
    /// The kernel refused to change the packet.
    WriteFailed = 16, "write-failed", Dropped;
    /// A ClusterIP was called from outside the cluster, which `--cluster-ip-from-outside=refuse` forbids (P10).
    ClusterIpFromOutside = 17, "cluster-ip-from-outside", Dropped;
    /// A table held something that this program does not understand: agent and programs are of different versions.
    CorruptTable = 18, "corrupt-table", Dropped;
    /// A UDP flow left an endpoint that no longer serves and chose another (C1).
    Rebalanced = 20, "rebalanced", Noted;
    /// XDP left a packet to tc unwritten: no neighbour entry yet, or an exit it cannot use.
    XdpLeftToTc = 21, "xdp-left-to-tc", Noted;
    /// A protocol the programs do not translate, to an address and port of a Service.
    UnsupportedProtocol = 22, "unsupported-protocol", Dropped;
    /// Two flows would have had the same reply; the new one got a translated source port (P12).
    ReplyCollision = 23, "reply-collision", Noted;
    /// A TCP reset (SCTP: an ABORT) to a Service's own address that belongs to no flow (P22).
    StrayReset = 24, "stray-reset", Dropped;
    /// The source is in none of the Service's `loadBalancerSourceRanges` (S2): intended, or add the client's range.
    SourceNotAllowed = 25, "source-not-allowed", Dropped;
    /// A fragment to a Service came before the first of its datagram, which alone says the port (P20): something reorders packets.
    EarlyFragment = 26, "early-fragment", Dropped;
    /// A fragment to a Service whose datagram has no flow: its first fragment was refused or dropped, and counted.
    OrphanFragment = 27, "orphan-fragment", Dropped;
    /// An ICMP error about a flow, or a fragment after the first, that could not be sent on (too long for the way, or its time to
    /// live ended) and that must not be answered by an ICMP error (RFC 1122 section 3.2.2).
    Unanswerable = 28, "unanswerable", Dropped;
    /// A TCP SYN-ACK, or what is of an SCTP association and opens none, to a Service's own address that belongs to no flow (P22).
    StrayAnswer = 29, "stray-answer", Dropped;
    /// The route to the endpoint has an encapsulation of its own (`ip route … encap`), which the way past the stack cannot give: let
    /// a tunnel device have it.
    UnsupportedRoute = 30, "unsupported-route", Dropped;
    /// No route to the chosen endpoint; an ICMP net unreachable was sent (P23): check the pod network's routes on this node.
    Unreachable = 31, "unreachable", Rejected;
    /// The kernel had no memory for a new flow, and nothing goes for it: see the limits of the agent's pod, to which flows count, and the
    /// node's memory.
    NoMemory = 32, "no-memory", Dropped;
    /// A packet would have been refused by a TCP reset or an ICMP error, but this CPU has given as many as it may: somebody floods a
    /// Service that has no endpoints, or asks too much.
    AnswerLimited = 33, "answer-limited", Dropped;
    /// A segment of a TCP connection (or of an SCTP association) of no flow came while an upgrade replaces the programs: the flow may be
    /// one that the programs before began, which is carried over in this moment. The sender repeats it.
    Undecided = 36, "undecided", Dropped;
    /// A node port was called from outside by a source that is in none of `--nodeport-source-ranges` (S2): intended, or add its range.
    NodePortSource = 40, "node-port-source", Dropped;
    /// A Service was called from outside by a source that `deniedSources` of `--sources-file` denies (S2).
    SourceDenied = 41, "source-denied", Dropped;
    /// A client repeated a SYN that its endpoint had not answered, and got another endpoint (L5): the first is dead, or overloaded.
    MovedSilent = 42, "moved-silent", Noted;
    /// An endpoint refused a connection by a reset, and the client got another endpoint instead (L5): nothing listens there.
    MovedRefused = 50, "moved-refused", Noted;
    /// There was no way to the endpoint of a connection (ICMP host or net unreachable), and the client got another endpoint (L5).
    MovedUnreachable = 51, "moved-unreachable", Noted;
    /// An endpoint refused a datagram (ICMP port, host or net unreachable), which was sent to another (L5): nothing listens there.
    MovedUdp = 52, "moved-udp", Noted;
    /// A flow that got another endpoint than its first was answered (L5): a second try that has helped.
    Rescued = 53, "rescued", Noted;
    /// A refusal went to the client although there are other endpoints, for more than 10,000 flows of the Service were given to others
    /// within a second (L5): most of its endpoints refuse.
    TriesLimited = 54, "tries-limited", Noted;
}

/// Length of the `reasons` array: one more than the largest number, rounded up for those to come.
pub const REASON_SLOTS: usize = 64;

impl TryFrom<u8> for Reason {
    type Error = u8;

    fn try_from(number: u8) -> Result<Self, u8> {
        Self::ALL.iter().copied().find(|reason| *reason as u8 == number).ok_or(number)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_slot_and_comes_back_from_its_number() {
        for &reason in Reason::ALL {
            assert!((reason as usize) < REASON_SLOTS);
            assert_eq!(Reason::try_from(reason as u8), Ok(reason));
            assert!(!reason.help().is_empty());
        }
        assert_eq!(Reason::try_from(0), Err(0));
    }
}
