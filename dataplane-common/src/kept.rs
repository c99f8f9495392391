//! Second tries (L5): the packet by which a flow began, kept as its client sent it until it is answered, and what became of such flows.

use bytemuck::{Pod, Zeroable};

/// The bytes of a packet that are kept, from its network header on: the headers of IPv6 and TCP with all options that fit into it.
pub const KEPT_BYTES: usize = 104;

/// Value of `kept`: the packet by which a flow began. 128 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Kept {
    /// What its flow says in [`crate::flow::Flow::kept`]; 0: nothing is kept. The last field to be written.
    pub turn: u32,
    /// Index of the interface at which it was met.
    pub ifindex: u32,
    /// Its link-layer addresses, the destination's first; all zero where there are none.
    pub link: [u8; 12],
    /// How many of its bytes are kept: all headers.
    pub length: u16,
    /// The number of the reason for which its flow is about to get another endpoint; 0: there is none.
    pub refused: u8,
    /// 1 where the node itself has sent it: it was met as it left.
    pub sent: u8,
    /// Its first bytes, from the network header on; zeros behind them.
    pub packet: [u8; KEPT_BYTES],
}

/// Value of `service_tries`: the second tries of a service port's flows. 48 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Tries {
    /// Flows that got another endpoint because theirs was silent.
    pub silent: u64,
    /// TCP: because it refused the connection.
    pub refused: u64,
    /// TCP: because there was no way to it.
    pub unreachable: u64,
    /// UDP: for either of the last two reasons.
    pub udp: u64,
    /// Flows with another endpoint than their first that were answered.
    pub rescued: u64,
    /// How many refusals were turned round within a tick, which is the upper half ([`Tries::turned`]).
    pub turned: u64,
}

impl Tries {
    /// [`Tries::turned`] of so many refusals in a tick.
    #[inline(always)]
    pub const fn in_tick(tick: u32, count: u32) -> u64 {
        (tick as u64) << u32::BITS | count as u64
    }

    /// All flows that got another endpoint.
    pub const fn moved(&self) -> u64 {
        self.silent + self.refused + self.unreachable + self.udp
    }
}

/// How many refusals of the flows of a service port are turned round in a tick. What is beyond that reaches the client.
pub const TURNED_IN_A_TICK: u32 = 10_000;
