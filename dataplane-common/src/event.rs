//! Events of flows, for whoever watches: a ring that programs write and any number of readers follow, each at a pace of its own.
//!
//! A writer takes the next turn, then the slot of that turn, and says the turn in it last. So a reader knows of each record whether it
//! is the one that it waits for, and of each turn that it has missed. Nobody waits for a reader.

use crate::drop::Reason;
use crate::flow::{Flow, FlowKey};
use crate::node::Prefix;
use crate::{Addr, Port};
use bytemuck::{Pod, Zeroable};

/// Slots of the ring, in 288 KiB: a reader that looks every 20 ms misses nothing up to 100,000 events a second.
pub const EVENTS: usize = 2_048;

/// How many readers at once may ask for the packets of flows.
pub const MARKS: usize = 4;

/// What happened. The number is in [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EventKind {
    /// A flow began.
    Begun = 1,
    /// A flow that was known began anew at another endpoint, for the event's reason.
    Moved = 2,
    /// The client has proved that it saw an answer (C4).
    Established = 3,
    /// A packet, or a call of `connect`, was refused.
    Refused = 4,
    /// A packet was dropped.
    Dropped = 5,
    /// A flow ended.
    Ended = 6,
    /// A packet of a marked flow passed a hook.
    Packet = 7,
}

impl EventKind {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::Begun,
        Self::Moved,
        Self::Established,
        Self::Refused,
        Self::Dropped,
        Self::Ended,
        Self::Packet,
    ];
}

/// Where it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Place {
    /// The agent's sweep of the flows.
    Sweep = 0,
    /// XDP of an uplink.
    Xdp = 1,
    /// tc, from the network.
    UplinkIn = 2,
    /// tc, to the network.
    UplinkOut = 3,
    /// tc, from a pod.
    PodIn = 4,
    /// tc, to a pod.
    PodOut = 5,
    /// A socket's `connect`.
    Connect = 6,
    /// A socket's `sendmsg`.
    Sendmsg = 7,
    /// Whatever hook another flow began or ended at, which got the room.
    Room = 8,
}

impl Place {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::Sweep,
        Self::Xdp,
        Self::UplinkIn,
        Self::UplinkOut,
        Self::PodIn,
        Self::PodOut,
        Self::Connect,
        Self::Sendmsg,
        Self::Room,
    ];
}

/// How a flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Ended {
    /// Both ends closed it.
    Closed = 1,
    /// It was reset.
    Reset = 2,
    /// Its endpoint refused it.
    Refused = 3,
    /// Nothing was seen of it for its time, or its other half was gone.
    Idle = 4,
    /// It was not established, and another got its name among those that are not (C4).
    Displaced = 5,
}

impl Ended {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Closed, Self::Reset, Self::Refused, Self::Idle, Self::Displaced];
}

/// What happened, as one word: kind, reason (0: none) and way to end (0: none). The place is added where it is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct What(u32);

impl What {
    /// Nothing.
    pub const NOTHING: Self = Self(0);
    const PLACE_SHIFT: u32 = 8;
    const REASON_SHIFT: u32 = 16;
    const ENDED_SHIFT: u32 = 24;

    /// A kind alone.
    #[inline(always)]
    pub const fn of(kind: EventKind) -> Self {
        Self(kind as u32)
    }

    /// A kind for a reason.
    #[inline(always)]
    pub const fn because(kind: EventKind, reason: Reason) -> Self {
        Self(kind as u32 | (reason as u32) << Self::REASON_SHIFT)
    }

    /// A flow that gets another endpoint, by the number of the reason.
    #[inline(always)]
    pub const fn moved(number: u32) -> Self {
        Self(EventKind::Moved as u32 | number << Self::REASON_SHIFT)
    }

    /// An end.
    #[inline(always)]
    pub const fn ended(how: Ended) -> Self {
        Self(EventKind::Ended as u32 | (how as u32) << Self::ENDED_SHIFT)
    }

    /// At a place.
    #[inline(always)]
    #[must_use]
    pub const fn at(self, place: Place) -> Self {
        Self(self.0 | (place as u32) << Self::PLACE_SHIFT)
    }

    /// Whether it is anything.
    #[inline(always)]
    pub const fn is_nothing(self) -> bool {
        self.0 == 0
    }

    /// Whether it is of this kind.
    #[inline(always)]
    pub const fn is(self, kind: EventKind) -> bool {
        self.0 & 0xff == kind as u32
    }

    /// Its kind, if it is one.
    pub fn kind(self) -> Option<EventKind> {
        EventKind::ALL.into_iter().find(|kind| self.is(*kind))
    }

    /// Its place, if it is one.
    pub fn place(self) -> Option<Place> {
        Place::ALL.get((self.0 >> Self::PLACE_SHIFT & 0xff) as usize).copied()
    }

    /// Its reason, if it has one.
    pub fn reason(self) -> Option<Reason> {
        Reason::try_from((self.0 >> Self::REASON_SHIFT) as u8).ok()
    }

    /// How the flow ended, if it did.
    pub fn end(self) -> Option<Ended> {
        let number = (self.0 >> Self::ENDED_SHIFT) as u8;
        Ended::ALL.into_iter().find(|how| *how as u8 == number)
    }
}

/// A record of the ring: value of `events`. 144 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Event {
    /// The turn in which it was written; 0: nothing yet. Record `n` is in slot `n` modulo [`EVENTS`].
    pub turn: u64,
    /// When, in nanoseconds of the monotonic clock.
    pub time: u64,
    /// The five-tuple of the packet as it came. Of a socket: port 0, and the address by which the node calls, or none.
    pub key: FlowKey,
    /// Its source after translation. This and what follows down to the packets is of a flow only: of what was refused or dropped it
    /// says nothing.
    pub src: Addr,
    /// Its destination after translation.
    pub dst: Addr,
    /// Port of the source after translation.
    pub src_port: Port,
    /// Port of the destination after translation.
    pub dst_port: Port,
    /// Index of the interface; 0 of a socket and of the sweep.
    pub interface: u32,
    /// Id of the service port.
    pub service: u32,
    /// Id of the backend.
    pub backend: u32,
    /// Of a flow that ended: bytes from the client.
    pub bytes_in: u64,
    /// Bytes from the endpoint.
    pub bytes_out: u64,
    /// Packets from the client, modulo 2^32.
    pub packets_in: u32,
    /// Packets from the endpoint, modulo 2^32.
    pub packets_out: u32,
    /// What happened, and where.
    pub what: What,
    /// Flags of the packet's half of the flow.
    pub flags: u16,
    /// Flags of TCP, or the type of the first chunk of SCTP.
    pub transport_flags: u16,
    /// Bytes of the packet, from the network header on.
    pub length: u32,
    /// TCP sequence number of the packet.
    pub sequence: u32,
}

impl Event {
    /// In [`Event::turn`]: somebody is about to write the record.
    pub const BUSY: u64 = 1 << 63;

    /// Whether the packet was the endpoint's.
    pub const fn is_reply(&self) -> bool {
        self.flags & Flow::REPLY != 0
    }
}

/// Flows whose packets a reader wants. 48 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Mark {
    /// Up to when, as [`Watch::until`].
    pub until: u64,
    /// Id of the service port; 0: any.
    pub service: u32,
    spare: u32,
    /// Where clients are.
    pub client: Prefix,
}

impl Mark {
    /// The flows of clients in a range to a service port; 0: to any.
    pub const fn new(until: u64, client: Prefix, service: u32) -> Self {
        Self { until, service, spare: 0, client }
    }

    /// Whether a flow of this client and service port is meant, at this moment. Without branches.
    #[inline(always)]
    pub fn fits(&self, now: u64, client: &Addr, service: u32) -> bool {
        let ([a, b], [m, n], [x, y]) = (self.client.addr.words(), self.client.mask.words(), client.words());
        let elsewhere = (x & m) ^ a | (y & n) ^ b;
        let other = if self.service == 0 { 0 } else { u64::from(self.service ^ service) };
        (elsewhere | other) == 0 && self.until > now
    }
}

/// Whether anybody watches: the only element of `watch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Watch {
    /// Up to when events are told, in nanoseconds of the coarse monotonic clock; 0: nobody watches. Readers put it off as long as
    /// they live, so it ends with the last of them, however that ended.
    pub until: u64,
    /// The same of the packets of marked flows.
    pub packets_until: u64,
    spare: [u64; 6],
    /// The last turn that was taken.
    pub head: u64,
    /// How many packets may be told still; as a signed number. Readers refill it.
    pub packets: u64,
    /// Packets that were not told for it.
    pub missed: u64,
    spare_two: [u64; 5],
    /// Which flows are marked as they begin.
    pub marks: [Mark; MARKS],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_comes_back_from_its_word() {
        for kind in EventKind::ALL {
            for place in Place::ALL {
                let what = What::because(kind, Reason::NoEndpoints).at(place);
                assert_eq!((what.kind(), what.place()), (Some(kind), Some(place)));
                assert_eq!((what.reason(), what.end()), (Some(Reason::NoEndpoints), None));
            }
        }
        for how in Ended::ALL {
            let what = What::ended(how).at(Place::PodIn);
            assert_eq!((what.kind(), what.end(), what.reason()), (Some(EventKind::Ended), Some(how), None));
        }
        assert_eq!(What::NOTHING.kind(), None);
    }

    #[test]
    fn a_mark_fits_its_clients_and_its_service_as_long_as_it_holds() {
        let addr = |text: &str| Addr::from(text.parse::<core::net::IpAddr>().unwrap());
        let mark = Mark::new(10, Prefix::new(addr("10.1.0.0"), 96 + 16), 7);
        assert!(mark.fits(9, &addr("10.1.2.3"), 7));
        assert!(!mark.fits(10, &addr("10.1.2.3"), 7) && !mark.fits(9, &addr("10.2.0.1"), 7));
        assert!(!mark.fits(9, &addr("10.1.2.3"), 8));
        let all = Mark::new(10, Prefix::new(addr("::"), 0), 0);
        assert!(all.fits(9, &addr("fd00::1"), 8) && all.fits(0, &addr("1.2.3.4"), 1));
        assert!(!Mark::zeroed().fits(0, &addr("::"), 0));
    }
}
