//! Removes idle flows, always both directions together (C4), and tells which filter bits flows still need.
//!
//! The kernel moves flows from table to table by itself and needs no agent for it; a long absence of the agent costs room,
//! not correctness. A sweep never removes a flow one of whose directions is not idle, and reads no clock: the caller
//! gives the kernel's tick.

use crate::kernel::maps::MapError;
use crate::sync::{LingeringBits, Maps};
use dataplane_common::Protocol;
use dataplane_common::flow::{Flow, FlowKey, ticks_between};
use dataplane_common::tables::{Closing, Established, HalfOpen, Table};
use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher as _;
use std::time::Duration;

/// After how long without a packet in either direction a flow is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleTimes {
    /// Established TCP and SCTP.
    pub established: Duration,
    /// TCP and SCTP of which one end closed.
    pub half_closed: Duration,
    /// UDP that was answered.
    pub udp: Duration,
    /// UDP that was not.
    pub udp_unanswered: Duration,
    /// A handshake that does not come to its end.
    pub half_open: Duration,
    /// After the end of a flow, for packets that are late.
    pub closing: Duration,
}

impl Default for IdleTimes {
    fn default() -> Self {
        Self {
            established: Duration::from_secs(24 * 3_600),
            half_closed: Duration::from_secs(3_600),
            udp: Duration::from_secs(180),
            udp_unanswered: Duration::from_secs(30),
            half_open: Duration::from_secs(60),
            closing: Duration::from_secs(60),
        }
    }
}

/// A direction without its partner is removed only when it is older: the partner may just be on its way.
const ALONE: Duration = Duration::from_secs(5);

/// The kernel's clock, as the programs write it into flows.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The tick now ([`dataplane_common::flow::tick`]).
    pub now: u32,
    /// Ticks in a second; about one at 250 Hz.
    pub ticks_per_second: f64,
}

impl Clock {
    /// How long ago a tick was. A flow that was written after the clock was read has no age.
    pub fn since(&self, tick: u32) -> Duration {
        let ticks = ticks_between(tick, self.now);
        let ticks = if ticks > ticks_between(self.now, tick) { 0 } else { ticks };
        Duration::from_secs_f64(f64::from(ticks) / self.ticks_per_second)
    }
}

/// What a sweep came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries that remain, two for each flow.
    pub entries: usize,
    /// Entries that were removed because both directions were idle.
    pub idle: usize,
    /// Entries that were removed because their partner is gone.
    pub alone: usize,
}

impl std::ops::AddAssign for Swept {
    fn add_assign(&mut self, other: Self) {
        self.entries += other.entries;
        self.idle += other.idle;
        self.alone += other.alone;
    }
}

/// What became of each table in a sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Flows whose handshake is not complete.
    pub half_open: Swept,
    /// Flows that both ends confirmed.
    pub established: Swept,
    /// Flows that ended.
    pub closing: Swept,
}

/// Sweeps all flow tables once. Of `bits`, those remain that no flow needs: they can be cleared.
///
/// `now` is asked for the kernel's tick before each table. The tables are read in the order in which flows move through
/// them, so that none is missed.
///
/// # Errors
/// If a table cannot be read or written.
pub fn sweep<M: Maps>(
    maps: &M,
    times: &IdleTimes,
    now: impl Fn() -> u32,
    ticks_per_second: f64,
    bits: &mut LingeringBits,
) -> Result<Sweep, MapError> {
    let clock = || Clock { now: now(), ticks_per_second };
    let closing = |_: u8, _: u16| times.closing;
    Ok(Sweep {
        half_open: sweep_table::<HalfOpen, M>(maps, clock(), |p, f| times.half_open(p, f), bits)?,
        established: sweep_table::<Established, M>(maps, clock(), |p, f| times.established(p, f), bits)?,
        closing: sweep_table::<Closing, M>(maps, clock(), closing, bits)?,
    })
}

impl IdleTimes {
    /// For a flow in `half_open`, by its protocol and the flags of both directions.
    fn half_open(&self, proto: u8, flags: u16) -> Duration {
        match Protocol::try_from(proto) {
            Ok(Protocol::Udp) if flags & Flow::ANSWERED == 0 => self.udp_unanswered,
            Ok(Protocol::Tcp | Protocol::Udp | Protocol::Sctp) | Err(_) => self.half_open,
        }
    }

    /// For a flow in `established`.
    fn established(&self, proto: u8, flags: u16) -> Duration {
        match Protocol::try_from(proto) {
            Ok(Protocol::Udp) => self.udp,
            // Two FINs at the same moment may each have missed the other.
            Ok(Protocol::Tcp | Protocol::Sctp)
                if flags & Flow::CLIENT_FIN != 0 && flags & Flow::ENDPOINT_FIN != 0 =>
            {
                self.closing
            }
            Ok(Protocol::Tcp | Protocol::Sctp) if flags & (Flow::CLIENT_FIN | Flow::ENDPOINT_FIN) != 0 => {
                self.half_closed
            }
            Ok(Protocol::Tcp | Protocol::Sctp) | Err(_) => self.established,
        }
    }
}

/// What is kept of an entry that may have to go.
struct Candidate {
    partner: FlowKey,
    flags: u16,
    age: Duration,
}

/// The entries of one table as far as a sweep needs them.
struct Census {
    /// Hashes of all keys: enough to see whether a partner may be there.
    present: HashSet<u64>,
    candidates: HashMap<FlowKey, Candidate>,
    hasher: RandomState,
}

impl Census {
    /// Reads a table. A candidate is old enough to be alone; what is younger stays in any case.
    fn of<T, M>(maps: &M, clock: Clock, bits: &mut LingeringBits) -> Result<Self, MapError>
    where
        T: Table<Key = FlowKey, Value = Flow>,
        M: Maps,
    {
        let (mut present, mut candidates) = (HashSet::new(), HashMap::new());
        let hasher = RandomState::new();
        maps.visit::<T>(|key, flow| {
            bits.keep_for(&key);
            present.insert(hasher.hash_one(key));
            let age = clock.since(flow.last_seen);
            if age >= ALONE {
                let candidate = Candidate { partner: flow.partner(key.proto()), flags: flow.flags(), age };
                candidates.insert(key, candidate);
            }
        })?;
        Ok(Self { present, candidates, hasher })
    }
}

fn sweep_table<T, M>(
    maps: &M,
    clock: Clock,
    limit: impl Fn(u8, u16) -> Duration,
    bits: &mut LingeringBits,
) -> Result<Swept, MapError>
where
    T: Table<Key = FlowKey, Value = Flow>,
    M: Maps,
{
    let census = Census::of::<T, M>(maps, clock, bits)?;
    let (mut idle, mut alone) = (Vec::new(), Vec::new());
    for (key, candidate) in &census.candidates {
        if let Some(partner) = census.candidates.get(&candidate.partner) {
            // Both directions say the same of themselves, so both are found here.
            let limit = limit(key.proto(), candidate.flags | partner.flags);
            if candidate.age.min(partner.age) >= limit {
                idle.push(*key);
            }
        } else if !census.present.contains(&census.hasher.hash_one(candidate.partner))
            && maps.get::<T>(&candidate.partner)?.is_none()
        {
            alone.push(*key);
        }
    }
    let swept = Swept { idle: maps.remove::<T>(&idle)?, alone: maps.remove::<T>(&alone)?, entries: 0 };
    Ok(Swept { entries: census.present.len().saturating_sub(swept.idle + swept.alone), ..swept })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::MemoryMaps;
    use dataplane_common::{Addr, Port};

    const CLIENT: Addr = Addr::from_v4([10, 0, 0, 9]);
    const CLUSTER_IP: Addr = Addr::from_v4([10, 96, 0, 1]);
    const ENDPOINT: Addr = Addr::from_v4([10, 244, 0, 5]);
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const NOW: u32 = 100_000;

    /// Both directions of the flow from this client port, last seen so many seconds ago.
    fn flow(port: u16, proto: u8, ages: [u32; 2], flags: u16) -> [(FlowKey, Flow); 2] {
        let port = Port::new(port);
        let key = FlowKey::new(CLIENT, port, CLUSTER_IP, Port::new(80), proto);
        let mut forward = Flow::with_flags(flags);
        (forward.src, forward.src_port, forward.dst, forward.dst_port) =
            (CLIENT, port, ENDPOINT, Port::new(8080));
        let mut reply = Flow::with_flags(flags | Flow::REPLY);
        (reply.src, reply.src_port, reply.dst, reply.dst_port) = (CLUSTER_IP, Port::new(80), CLIENT, port);
        [forward.last_seen, reply.last_seen] = ages.map(|age| NOW - age);
        [(key, forward), (forward.partner(proto), reply)]
    }

    fn swept(maps: &MemoryMaps) -> Sweep {
        sweep(maps, &IdleTimes::default(), || NOW, 1.0, &mut LingeringBits::default()).unwrap()
    }

    /// C4
    #[test]
    fn a_flow_is_idle_when_both_directions_are() {
        let maps = MemoryMaps::default();
        maps.write::<Established>(&flow(1, TCP, [86_399, 90_000], 0)).unwrap();
        maps.write::<Established>(&flow(2, TCP, [90_000, 86_400], 0)).unwrap();
        assert_eq!(swept(&maps).established, Swept { entries: 2, idle: 2, alone: 0 });
        assert!(maps.get::<Established>(&flow(1, TCP, [0, 0], 0)[0].0).unwrap().is_some());
    }

    #[test]
    fn each_state_has_its_own_idle_time() {
        let maps = MemoryMaps::default();
        let idle_after = |age: u32, proto, flags| {
            let entries = flow(1, proto, [age, age], flags);
            maps.write::<Established>(&entries).unwrap();
            let idle = swept(&maps).established.idle > 0;
            maps.remove::<Established>(&entries.map(|(key, _)| key)).unwrap();
            idle
        };
        assert!(!idle_after(3_599, TCP, Flow::CLIENT_FIN) && idle_after(3_600, TCP, Flow::CLIENT_FIN));
        let both = Flow::CLIENT_FIN | Flow::ENDPOINT_FIN;
        assert!(!idle_after(59, TCP, both) && idle_after(60, TCP, both));
        assert!(!idle_after(3_600, TCP, 0));
        assert!(!idle_after(179, UDP, Flow::ANSWERED) && idle_after(180, UDP, Flow::ANSWERED));
        maps.write::<HalfOpen>(&flow(1, UDP, [30, 30], 0)).unwrap();
        maps.write::<HalfOpen>(&flow(2, UDP, [30, 30], Flow::ANSWERED)).unwrap();
        maps.write::<HalfOpen>(&flow(3, TCP, [59, 59], 0)).unwrap();
        maps.write::<Closing>(&flow(4, TCP, [60, 61], 0)).unwrap();
        let sweep = swept(&maps);
        assert_eq!(sweep.half_open, Swept { entries: 4, idle: 2, alone: 0 });
        assert_eq!(sweep.closing, Swept { entries: 0, idle: 2, alone: 0 });
    }

    /// C4
    #[test]
    fn a_direction_whose_partner_is_gone_is_removed() {
        let maps = MemoryMaps::default();
        maps.write::<HalfOpen>(&flow(1, TCP, [5, 5], 0)[..1]).unwrap();
        maps.write::<HalfOpen>(&flow(2, TCP, [4, 4], 0)[1..]).unwrap();
        maps.write::<HalfOpen>(&flow(3, TCP, [5, 0], 0)).unwrap();
        assert_eq!(swept(&maps).half_open, Swept { entries: 3, idle: 0, alone: 1 });
    }

    #[test]
    fn a_flow_seen_after_the_clock_was_read_is_not_idle() {
        let clock = Clock { now: 5, ticks_per_second: 0.5 };
        assert_eq!(clock.since(6), Duration::ZERO);
        assert_eq!(clock.since(0), Duration::from_secs(10));
        assert_eq!(clock.since(dataplane_common::flow::TICK_MASK), Duration::from_secs(12));
    }
}
