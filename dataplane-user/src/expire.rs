//! Removes idle flows, always both directions together (C4), and tells what of the filters flows still need.
//!
//! The kernel takes flows from stage to stage by itself and needs no agent for it; a long absence of the agent costs room,
//! not correctness. A sweep never removes a flow one of whose directions is not idle, and reads no clock: the caller
//! gives the kernel's tick.

use crate::kernel::callers::OldMarks;
use crate::kernel::maps::MapError;
use crate::sync::{LingeringBits, Maps};
use dataplane_common::Protocol;
use dataplane_common::flow::{Flow, FlowKey, Stage, ticks_since};
use dataplane_common::tables::Flows;
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::time::Duration;

/// After how long without a packet in either direction a flow is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdleTimes {
    /// Established TCP and SCTP.
    pub established: Duration,
    /// TCP and SCTP of which one end closed.
    pub half_closed: Duration,
    /// UDP of which both ends go on, or the endpoint alone.
    pub udp: Duration,
    /// A question by UDP that was answered.
    pub udp_answered: Duration,
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
            udp_answered: Duration::from_secs(10),
            udp_unanswered: Duration::from_secs(30),
            half_open: Duration::from_secs(60),
            closing: Duration::from_secs(60),
        }
    }
}

/// A direction without its partner is removed only when it is older: the partner may just be on its way.
const ALONE: Duration = Duration::from_secs(5);

/// The longest time after which a flow may be removed: what is older than 165 days may look younger than it is ([`ticks_since`]), and an
/// agent may be away for some days.
pub const LONGEST_IDLE: Duration = Duration::from_secs(40 * 24 * 3_600);

/// The kernel's clock, as the programs write it into flows.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The tick now ([`dataplane_common::flow::tick`]).
    pub now: u32,
    /// The time from one tick to the next; about a second.
    pub tick: Duration,
}

impl Clock {
    /// How long ago a tick was. A flow that was written after the clock was read has no age.
    pub fn since(&self, tick: u32) -> Duration {
        self.tick.saturating_mul(ticks_since(tick, self.now))
    }
}

/// What goes by what a sweep sees.
pub trait Accounts {
    /// Something was counted in these halves of flows, some at a time.
    fn fold(&mut self, keys: &[FlowKey]);

    /// An entry is in the table. Each flow of which nothing changes meanwhile is told once for each half.
    fn seen(&mut self, flow: &Flow);

    /// All entries have been seen, and none is removed yet.
    fn all_seen(&mut self);

    /// These halves of flows are idle; [`Accounts::ending`] is told of them next.
    fn idle(&mut self, keys: &[FlowKey]);

    /// These halves of flows are about to be removed.
    fn ending(&mut self, keys: &[FlowKey]);
}

/// Nobody keeps accounts.
impl Accounts for () {
    fn fold(&mut self, _: &[FlowKey]) {}

    fn seen(&mut self, _: &Flow) {}

    fn all_seen(&mut self) {}

    fn idle(&mut self, _: &[FlowKey]) {}

    fn ending(&mut self, _: &[FlowKey]) {}
}

/// What a sweep came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries that remain of flows whose handshake is not complete, two for each flow.
    pub half_open: usize,
    /// The same of flows that both ends confirmed.
    pub established: usize,
    /// The same of flows that ended.
    pub closing: usize,
    /// Entries that were removed because both directions were idle.
    pub idle: usize,
    /// Entries that were removed because their partner is gone.
    pub alone: usize,
}

impl Swept {
    /// All entries that remain.
    pub const fn entries(&self) -> usize {
        self.half_open + self.established + self.closing
    }

    const fn of_stage(&mut self, stage: Stage) -> &mut usize {
        match stage {
            Stage::HalfOpen => &mut self.half_open,
            Stage::Established => &mut self.established,
            Stage::Closing => &mut self.closing,
        }
    }
}

/// Sweeps the table of flows once. Of `bits` and `marks`, those remain that no flow needs: they can be cleared.
///
/// It walks the table twice, and holds two bytes for each entry that there is room for, and what it removes.
///
/// # Errors
/// If the table cannot be read or written.
pub fn sweep<M: Maps>(
    maps: &M,
    times: &IdleTimes,
    clock: Clock,
    bits: &mut LingeringBits,
    marks: &mut OldMarks,
    accounts: &mut impl Accounts,
) -> Result<Swept, MapError> {
    sweep_at_most(MOST, maps, times, clock, bits, marks, accounts)
}

/// How many keys are folded at once.
const FOLDED: usize = 1 << 10;

/// How many entries a sweep looks at closely, which may be idle or alone; those past that have their turn in the next.
const MOST: usize = 1 << 18;

fn sweep_at_most<M: Maps>(
    most: usize,
    maps: &M,
    times: &IdleTimes,
    clock: Clock,
    bits: &mut LingeringBits,
    marks: &mut OldMarks,
    accounts: &mut impl Accounts,
) -> Result<Swept, MapError> {
    let mut census = Census::of(maps, times, clock, bits, marks, most, accounts)?;
    accounts.all_seen();
    let idle = census.idle(maps, times, clock)?;
    let alone = census.alone(maps, clock, most)?;
    for (_, stage) in idle.iter().chain(&alone) {
        let count = census.remain.of_stage(*stage);
        *count = count.saturating_sub(1);
    }
    let keys = |entries: Vec<(FlowKey, Stage)>| entries.into_iter().map(|(key, _)| key).collect::<Vec<_>>();
    let (idle, alone) = (keys(idle), keys(alone));
    accounts.idle(&idle);
    let mut remove = |keys: &[FlowKey]| {
        accounts.ending(keys);
        maps.remove::<Flows>(keys)
    };
    let (idle, alone) = (remove(&idle)?, remove(&alone)?);
    Ok(Swept { idle, alone, ..census.remain })
}

impl IdleTimes {
    /// From this part of the table's room on, in per cent, flows that may be of nobody are forgotten sooner.
    const PRESSURE: usize = 70;
    /// Then UDP may rest for so long.
    const UDP_UNDER_PRESSURE: Duration = Duration::from_secs(30);
    /// And a connection of which one end closed.
    const HALF_CLOSED_UNDER_PRESSURE: Duration = Duration::from_secs(60);

    /// For a table with so many entries: the fuller it is, the sooner those flows go that one packet or two can begin. A connection that
    /// is established rests as long as ever.
    #[must_use]
    pub fn for_table(self, entries: usize, room: usize) -> Self {
        if entries.saturating_mul(100) < room.saturating_mul(Self::PRESSURE) {
            return self;
        }
        Self {
            udp: self.udp.min(Self::UDP_UNDER_PRESSURE),
            half_closed: self.half_closed.min(Self::HALF_CLOSED_UNDER_PRESSURE),
            ..self
        }
    }

    /// For a flow, by its protocol and the flags of both directions.
    fn limit(&self, proto: u8, flags: u16) -> Duration {
        let flow = Flow::with_flags(flags);
        let is_udp = proto == Protocol::Udp as u8;
        match flow.stage() {
            Stage::HalfOpen if is_udp && flow.has(Flow::ANSWERED) => self.udp_answered,
            Stage::HalfOpen if is_udp => self.udp_unanswered,
            Stage::HalfOpen => self.half_open,
            Stage::Established if is_udp => self.udp,
            // Two FINs at the same moment may each have missed the other.
            Stage::Established if flow.has(Flow::CLIENT_FIN | Flow::ENDPOINT_FIN) => self.closing,
            Stage::Established if flags & (Flow::CLIENT_FIN | Flow::ENDPOINT_FIN) != 0 => self.half_closed,
            Stage::Established => self.established,
            Stage::Closing => self.closing,
        }
    }

    /// The shortest time after which an entry with these flags may be idle, whatever its partner's are: where each has missed the
    /// other's FIN, both together have ended.
    fn least(&self, proto: u8, flags: u16) -> Duration {
        let own = self.limit(proto, flags);
        if flags & (Flow::CLIENT_FIN | Flow::ENDPOINT_FIN) != 0 { own.min(self.closing) } else { own }
    }
}

/// What is kept of an entry that may be idle.
struct Candidate {
    partner: FlowKey,
    flags: u16,
    age: Duration,
}

impl Candidate {
    fn of(key: &FlowKey, flow: &Flow, clock: Clock) -> Self {
        Self { partner: flow.partner(key.proto()), flags: flow.flags(), age: clock.since(flow.last_seen) }
    }
}

/// Which keys are in the table: what is not in here is not there; what is in here mostly is, but for one in sixteen at worst, each
/// time another one.
struct Present {
    bits: Vec<u64>,
    hasher: RandomState,
}

impl Present {
    /// Bits for each entry that there is room for.
    const BITS: usize = 16;

    fn with_room(entries: usize) -> Self {
        let words = (entries * Self::BITS).div_ceil(u64::BITS as usize).max(1);
        Self { bits: vec![0; words], hasher: RandomState::new() }
    }

    fn place(&self, key: &FlowKey) -> (usize, u64) {
        let hash = self.hasher.hash_one(key);
        let word = (hash >> 32) as usize % self.bits.len();
        (word, 1 << (hash % u64::from(u64::BITS)))
    }

    fn insert(&mut self, key: &FlowKey) {
        let (word, bit) = self.place(key);
        self.bits[word] |= bit;
    }

    fn may_have(&self, key: &FlowKey) -> bool {
        let (word, bit) = self.place(key);
        self.bits[word] & bit != 0
    }
}

/// The table as far as a sweep needs it.
struct Census {
    /// How many entries there are of each stage. One that is seen twice while the table changes counts twice.
    remain: Swept,
    present: Present,
    candidates: HashMap<FlowKey, Candidate>,
}

impl Census {
    /// Reads the table. What is no candidate has a partner that is one, or is not idle.
    fn of<M: Maps>(
        maps: &M,
        times: &IdleTimes,
        clock: Clock,
        bits: &mut LingeringBits,
        marks: &mut OldMarks,
        most: usize,
        accounts: &mut impl Accounts,
    ) -> Result<Self, MapError> {
        let mut present = Present::with_room(maps.capacity::<Flows>()?);
        let (mut candidates, mut remain) = (HashMap::new(), Swept::default());
        let mut counted = Vec::with_capacity(FOLDED);
        maps.visit::<Flows>(|key, flow| {
            if !flow.counted.is_zero() {
                counted.push(key);
                if counted.len() == FOLDED {
                    accounts.fold(&counted);
                    counted.clear();
                }
            }
            accounts.seen(&flow);
            bits.keep_for(&key);
            if flow.has(Flow::REPLY) {
                marks.keep_for(&key);
            }
            present.insert(&key);
            *remain.of_stage(flow.stage()) += 1;
            let candidate = Candidate::of(&key, &flow, clock);
            if candidate.age >= times.least(key.proto(), flow.flags()) && candidates.len() < most {
                candidates.insert(key, candidate);
            }
        })?;
        if !counted.is_empty() {
            accounts.fold(&counted);
        }
        Ok(Self { remain, present, candidates })
    }

    /// Both directions of the flows that are idle, and the stage that each says.
    fn idle<M: Maps>(
        &self,
        maps: &M,
        times: &IdleTimes,
        clock: Clock,
    ) -> Result<Vec<(FlowKey, Stage)>, MapError> {
        let mut idle = Vec::new();
        for (key, candidate) in &self.candidates {
            let read;
            let (partner, is_candidate) = match self.candidates.get(&candidate.partner) {
                Some(partner) => (partner, true),
                None => {
                    let Some(flow) = maps.get::<Flows>(&candidate.partner)? else { continue };
                    read = Candidate::of(&candidate.partner, &flow, clock);
                    (&read, false)
                }
            };
            if candidate.age.min(partner.age) < times.limit(key.proto(), candidate.flags | partner.flags) {
                continue;
            }
            idle.push((*key, Flow::with_flags(candidate.flags).stage()));
            // One that is a candidate comes to the same by itself.
            if !is_candidate {
                idle.push((candidate.partner, Flow::with_flags(partner.flags).stage()));
            }
        }
        Ok(idle)
    }

    /// Reads the table again: directions that are old enough and have no partner.
    fn alone<M: Maps>(&self, maps: &M, clock: Clock, most: usize) -> Result<Vec<(FlowKey, Stage)>, MapError> {
        let mut suspects = Vec::new();
        if self.remain.entries() > 0 {
            maps.visit::<Flows>(|key, flow| {
                let partner = flow.partner(key.proto());
                let is_old = clock.since(flow.last_seen) >= ALONE;
                if is_old && !self.present.may_have(&partner) && suspects.len() < most {
                    suspects.push((key, partner, flow.stage()));
                }
            })?;
        }
        let mut alone = Vec::new();
        for (key, partner, stage) in suspects {
            if maps.get::<Flows>(&partner)?.is_none() {
                alone.push((key, stage));
            }
        }
        Ok(alone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::MemoryMaps;
    use dataplane_common::flow::Counted;
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

    fn swept(maps: &MemoryMaps) -> Swept {
        let clock = Clock { now: NOW, tick: Duration::from_secs(1) };
        sweep(
            maps,
            &IdleTimes::default(),
            clock,
            &mut LingeringBits::default(),
            &mut OldMarks::default(),
            &mut (),
        )
        .unwrap()
    }

    /// What the accounts are told.
    #[derive(Default)]
    struct Told {
        folded: Vec<FlowKey>,
        seen: [usize; 2],
        idle: usize,
        ending: Vec<FlowKey>,
    }

    impl Accounts for Told {
        fn fold(&mut self, keys: &[FlowKey]) {
            self.folded.extend_from_slice(keys);
        }
        fn seen(&mut self, _: &Flow) {
            self.seen[0] += 1;
        }
        fn all_seen(&mut self) {
            assert!(self.ending.is_empty());
            self.seen[1] += 1;
        }
        fn idle(&mut self, keys: &[FlowKey]) {
            self.idle += keys.len();
        }
        fn ending(&mut self, keys: &[FlowKey]) {
            self.ending.extend_from_slice(keys);
        }
    }

    /// C4
    #[test]
    fn a_flow_is_idle_when_both_directions_are() {
        let maps = MemoryMaps::default();
        maps.write::<Flows>(&flow(1, TCP, [86_399, 90_000], Flow::CONFIRMED)).unwrap();
        maps.write::<Flows>(&flow(2, TCP, [90_000, 86_400], Flow::CONFIRMED)).unwrap();
        assert_eq!(swept(&maps), Swept { established: 2, idle: 2, ..Swept::default() });
        assert!(maps.get::<Flows>(&flow(1, TCP, [0, 0], 0)[0].0).unwrap().is_some());
    }

    #[test]
    fn each_stage_has_its_own_idle_time() {
        let maps = MemoryMaps::default();
        let assert_limit = |limit: u32, proto, flags| {
            for (age, idle) in [(limit - 1, 0), (limit, 2)] {
                let entries = flow(1, proto, [age, age], flags);
                maps.write::<Flows>(&entries).unwrap();
                assert_eq!(swept(&maps).idle, idle, "{proto}, flags {flags:#b}, {age} s");
                maps.remove::<Flows>(&entries.map(|(key, _)| key)).unwrap();
            }
        };
        let confirmed = Flow::CONFIRMED;
        let both = Flow::CLIENT_FIN | Flow::ENDPOINT_FIN;
        assert_limit(60, TCP, 0);
        assert_limit(86_400, TCP, confirmed);
        assert_limit(3_600, TCP, confirmed | Flow::CLIENT_FIN);
        assert_limit(3_600, TCP, confirmed | Flow::ENDPOINT_FIN);
        assert_limit(60, TCP, confirmed | both);
        assert_limit(60, TCP, confirmed | both | Flow::CLOSING);
        assert_limit(60, TCP, confirmed | Flow::CLOSING);
        assert_limit(30, UDP, 0);
        assert_limit(10, UDP, Flow::ANSWERED);
        assert_limit(180, UDP, confirmed | Flow::ANSWERED);
    }

    /// C4
    #[test]
    fn flows_that_rest_go_sooner_where_the_table_fills() {
        let times = IdleTimes::default();
        assert_eq!(times.for_table(699, 1_000), times);
        let pressed = times.for_table(700, 1_000);
        assert_eq!((pressed.udp.as_secs(), pressed.half_closed.as_secs()), (30, 60));
        assert_eq!(IdleTimes { udp: times.udp, half_closed: times.half_closed, ..pressed }, times);
        let short = IdleTimes { udp: Duration::from_secs(5), ..times };
        assert_eq!(short.for_table(1, 1).udp, short.udp);
    }

    /// A flag that only one direction has yet is of both.
    #[test]
    fn the_stage_of_a_flow_is_what_either_direction_says() {
        let maps = MemoryMaps::default();
        let [mut forward, reply] = flow(1, TCP, [60, 60], 0);
        forward.1.set(Flow::CONFIRMED);
        maps.write::<Flows>(&[forward, reply]).unwrap();
        assert_eq!(swept(&maps), Swept { half_open: 1, established: 1, ..Swept::default() });
    }

    /// C4: flags are set in both directions, one after the other.
    #[test]
    fn one_direction_that_is_idle_by_its_own_flags_takes_the_other_with_it() {
        let maps = MemoryMaps::default();
        let [mut forward, mut reply] = flow(1, TCP, [100, 100], Flow::CONFIRMED);
        forward.1.set(Flow::CLOSING);
        maps.write::<Flows>(&[forward, reply]).unwrap();
        assert_eq!(swept(&maps), Swept { idle: 2, ..Swept::default() });
        // Each missed the other's FIN.
        [forward, reply] = flow(2, TCP, [100, 100], Flow::CONFIRMED);
        forward.1.set(Flow::CLIENT_FIN);
        reply.1.set(Flow::ENDPOINT_FIN);
        maps.write::<Flows>(&[forward, reply]).unwrap();
        assert_eq!(swept(&maps), Swept { idle: 2, ..Swept::default() });
        // One of them was seen a moment ago.
        [forward, reply] = flow(3, TCP, [100, 10], Flow::CONFIRMED);
        forward.1.set(Flow::CLOSING);
        maps.write::<Flows>(&[forward, reply]).unwrap();
        assert_eq!(swept(&maps), Swept { established: 1, closing: 1, ..Swept::default() });
    }

    #[test]
    fn a_sweep_of_the_largest_table_holds_two_bytes_for_each_entry() {
        const ENTRIES: usize = 2 * 16_777_216;
        let present = Present::with_room(ENTRIES);
        assert_eq!(size_of_val(present.bits.as_slice()), 2 * ENTRIES);
    }

    #[test]
    fn what_is_in_a_table_is_known_and_most_of_what_is_not() {
        let key = |number: u32| {
            FlowKey::new(Addr::from_v4(number.to_be_bytes()), Port::new(1), CLIENT, Port::new(2), TCP)
        };
        let mut present = Present::with_room(1_000);
        (0..1_000).for_each(|number| present.insert(&key(number)));
        assert!((0..1_000).all(|number| present.may_have(&key(number))));
        let others = (1_000..11_000).filter(|number| present.may_have(&key(*number))).count();
        assert!(others < 1_000, "{others} of 10,000");
    }

    /// C4
    #[test]
    fn what_one_sweep_has_no_room_for_the_next_removes() {
        let maps = MemoryMaps::default();
        for port in 1..=10 {
            let entries = flow(port, UDP, [1_000, 1_000], 0);
            maps.write::<Flows>(if port > 6 { &entries[..1] } else { &entries }).unwrap();
        }
        let clock = Clock { now: NOW, tick: Duration::from_secs(1) };
        let (mut bits, mut marks) = (LingeringBits::default(), OldMarks::default());
        let mut sweeps = 0;
        let mut left = 16;
        while left > 0 {
            let swept = sweep_at_most(3, &maps, &IdleTimes::default(), clock, &mut bits, &mut marks, &mut ())
                .unwrap();
            assert!(swept.entries() < left && swept.idle <= 6 && swept.alone <= 3, "{swept:?}");
            (left, sweeps) = (swept.entries(), sweeps + 1);
        }
        assert!(sweeps > 1);
    }

    #[test]
    fn what_was_counted_in_a_flow_is_folded_and_the_flow_counted_off_before_it_goes() {
        let maps = MemoryMaps::default();
        let mut entries = flow(1, UDP, [1_000, 1_000], 0);
        entries[1].1.counted = Counted::packet(60);
        maps.write::<Flows>(&entries).unwrap();
        maps.write::<Flows>(&flow(2, UDP, [0, 0], 0)).unwrap();
        let clock = Clock { now: NOW, tick: Duration::from_secs(1) };
        let (mut bits, mut marks, mut told) =
            (LingeringBits::default(), OldMarks::default(), Told::default());
        let swept = sweep(&maps, &IdleTimes::default(), clock, &mut bits, &mut marks, &mut told).unwrap();
        assert_eq!((&told.folded, swept.idle), (&vec![entries[1].0], 2));
        told.ending.sort_unstable_by_key(|key| key.src != CLIENT);
        assert_eq!(told.idle, 2, "both halves of the idle one, and no other");
        assert_eq!((told.seen, told.ending), ([4, 1], entries.map(|(key, _)| key).to_vec()));
    }

    /// C4
    #[test]
    fn a_direction_whose_partner_is_gone_is_removed() {
        let maps = MemoryMaps::default();
        maps.write::<Flows>(&flow(1, TCP, [5, 5], 0)[..1]).unwrap();
        maps.write::<Flows>(&flow(2, TCP, [4, 4], 0)[1..]).unwrap();
        maps.write::<Flows>(&flow(3, TCP, [5, 0], 0)).unwrap();
        assert_eq!(swept(&maps), Swept { half_open: 3, alone: 1, ..Swept::default() });
    }

    /// What the clock says after so many jiffies since the start, at so many in a second.
    fn clock(jiffies: u64, hz: u64) -> Clock {
        let tick = crate::kernel::clock::tick_length(Duration::from_nanos(1_000_000_000 / hz));
        Clock { now: moment(jiffies, hz), tick }
    }

    /// What a program writes into a flow at that moment.
    fn moment(jiffies: u64, hz: u64) -> u32 {
        // Jiffies begin five minutes before their lower half wraps (`INITIAL_JIFFIES`).
        dataplane_common::flow::tick((1 << 32) - 300 * hz + jiffies, shift(hz))
    }

    fn shift(hz: u64) -> u32 {
        dataplane_common::flow::tick_shift(hz as u32)
    }

    /// Moments of a hundred years, in jiffies: around every wrap of the ticks, and between.
    fn a_century(hz: u64) -> impl Iterator<Item = u64> {
        const DAY: u64 = 24 * 3_600;
        let round = 1_u64 << (24 + shift(hz));
        let begun = (1 << 32) - 300 * hz;
        let wraps =
            (1..=(100 * 366 * DAY * hz) / round).map(move |wrap| (wrap * round).saturating_sub(begun));
        let around = [0, 1, 255, 256, 10 * hz, 60 * hz, 3_600 * hz, DAY * hz, 20 * DAY * hz];
        let sides = around.into_iter().flat_map(|after| [after as i64, -(after as i64)]);
        // An uptime of more than the longest idle time.
        let begin = 60 * DAY * hz;
        wraps
            .flat_map(move |wrap| sides.clone().filter_map(move |by| wrap.checked_add_signed(by)))
            .filter(move |at| *at > begin)
    }

    #[test]
    fn the_clock_is_right_for_a_hundred_years() {
        for hz in [100, 250, 300, 1_000] {
            for at in a_century(hz) {
                let clock = clock(at, hz);
                for seconds in [0, 1, 10, 30, 60, 3_600, 86_400, LONGEST_IDLE.as_secs(), 49 * 86_400] {
                    let told = clock.since(moment(at - seconds * hz, hz)).as_secs_f64();
                    let tick = clock.tick.as_secs_f64();
                    let allowed = tick + seconds as f64 * 1e-6;
                    assert!(
                        (told - seconds as f64).abs() <= allowed,
                        "{hz} Hz, {at}: {told} s, not {seconds}"
                    );
                }
                for seconds in [1, 15, 3_600] {
                    assert_eq!(clock.since(moment(at + seconds * hz, hz)), Duration::ZERO, "{hz} Hz, {at}");
                }
            }
        }
    }

    /// C4
    #[test]
    fn a_sweep_removes_what_is_idle_and_nothing_else_for_a_hundred_years() {
        for hz in [100, 250, 300, 1_000] {
            for at in a_century(hz) {
                let maps = MemoryMaps::with_capacities([("flows", 64)]);
                for (port, proto, seconds) in
                    [(1, TCP, 10), (2, TCP, 86_000), (3, UDP, 170), (4, TCP, 87_000), (5, UDP, 190)]
                {
                    let mut entries = flow(port, proto, [0, 0], Flow::CONFIRMED | Flow::ANSWERED);
                    entries.iter_mut().for_each(|(_, flow)| flow.last_seen = moment(at - seconds * hz, hz));
                    maps.write::<Flows>(&entries).unwrap();
                }
                let (mut bits, mut marks) = (LingeringBits::default(), OldMarks::default());
                let swept =
                    sweep(&maps, &IdleTimes::default(), clock(at, hz), &mut bits, &mut marks, &mut ())
                        .unwrap();
                assert_eq!(swept, Swept { established: 6, idle: 4, ..Swept::default() }, "{hz} Hz, {at}");
            }
        }
    }

    #[test]
    fn a_flow_seen_after_the_clock_was_read_is_not_idle() {
        let clock = Clock { now: 5, tick: Duration::from_secs(2) };
        assert_eq!(clock.since(6), Duration::ZERO);
        assert_eq!(clock.since(0), Duration::from_secs(10));
        assert_eq!(clock.since(dataplane_common::flow::TICK_MASK), Duration::from_secs(12));
    }
}
