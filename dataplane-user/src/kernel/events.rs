//! The ring of events in this process's memory ([`dataplane_common::event`]): readers follow it, each at a pace of its own, and keep the
//! programs telling as long as they live; the agent's sweep writes to it what it removes.

use super::mapped::MappedWords;
use super::maps::{KernelMaps, MapError};
use bytemuck::Zeroable as _;
use dataplane_common::event::{EVENTS, Event, MARKS, Mark, Watch};
use dataplane_common::node::Prefix;
use dataplane_common::tables::{Events, Table as _, Watches};
use std::io;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

/// For how long programs go on telling after a reader was last heard of.
pub const LEASE: Duration = Duration::from_secs(3);

/// How many packets of marked flows are told until a reader fills this up again, which it does as often as it renews its lease.
const PACKETS: u64 = 1_000;

/// How long a reader waits for a record that is about to be written, before it counts as lost.
const PATIENCE: Duration = Duration::from_millis(100);

/// Words of a record.
const WORDS: usize = size_of::<Event>() / size_of::<u64>();

/// The ring, and the word that switches it on.
#[derive(Debug)]
pub struct EventRing {
    watch: MappedWords,
    events: MappedWords,
}

/// The coarse monotonic clock, in nanoseconds: the programs' own for all that lasts.
fn coarse() -> u64 {
    nanoseconds(libc::CLOCK_MONOTONIC_COARSE)
}

/// The end of a lease that begins now, on that clock.
fn lease_end() -> u64 {
    coarse() + LEASE.as_nanos() as u64
}

/// The clock by which events have their time, in nanoseconds.
pub fn now() -> u64 {
    nanoseconds(libc::CLOCK_MONOTONIC)
}

fn nanoseconds(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is as long as the kernel expects and outlives the call, which cannot fail for these clocks.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

const fn word(offset: usize) -> usize {
    offset / size_of::<u64>()
}

impl EventRing {
    /// Maps the tables.
    ///
    /// # Errors
    /// The kernel's, or [`MapError::Call`] if the ring has fewer slots than programs write to.
    pub fn open(maps: &KernelMaps) -> Result<Self, MapError> {
        let (watch, events) = (maps.map::<Watches>()?, maps.map::<Events>()?);
        if events.capacity() < EVENTS {
            let source = io::Error::from(io::ErrorKind::InvalidData);
            return Err(MapError::Call { verb: "map", name: Events::NAME, source });
        }
        Ok(Self { watch: MappedWords::map(&watch)?, events: MappedWords::map(&events)? })
    }

    fn watch(&self, offset: usize) -> &AtomicU64 {
        &self.watch.words()[word(offset)]
    }

    /// Whether anybody watches.
    pub fn is_on(&self) -> bool {
        self.watch(offset_of!(Watch, until)).load(Ordering::Relaxed) > coarse()
    }

    /// The last turn that was taken.
    pub fn head(&self) -> u64 {
        self.watch(offset_of!(Watch, head)).load(Ordering::Acquire)
    }

    /// Has programs tell events for [`LEASE`] from now.
    pub fn renew(&self) {
        self.watch(offset_of!(Watch, until)).fetch_max(lease_end(), Ordering::SeqCst);
    }

    fn slot(&self, turn: u64) -> &[AtomicU64] {
        let at = (turn % EVENTS as u64) as usize * WORDS;
        &self.events.words()[at..at + WORDS]
    }

    /// Writes a record, as programs do; its turn is the next. It is lost where somebody else has the slot.
    pub fn write(&self, event: &Event) {
        let turn = self.watch(offset_of!(Watch, head)).fetch_add(1, Ordering::SeqCst) + 1;
        let slot = self.slot(turn);
        let had = slot[0].load(Ordering::SeqCst);
        let is_taken = had < turn
            && slot[0].compare_exchange(had, Event::BUSY | turn, Ordering::SeqCst, Ordering::Relaxed).is_ok();
        if !is_taken {
            return;
        }
        let words: [u64; WORDS] = bytemuck::must_cast(*event);
        for (to, from) in slot.iter().zip(words).skip(1) {
            to.store(from, Ordering::Relaxed);
        }
        slot[0].store(turn, Ordering::Release);
    }

    /// What is in the slot of a turn.
    fn read(&self, turn: u64) -> Slot {
        let slot = self.slot(turn);
        let seen = slot[0].load(Ordering::Acquire);
        if seen != turn {
            return if seen & !Event::BUSY > turn { Slot::Overwritten } else { Slot::Unwritten };
        }
        let mut words = [0; WORDS];
        for (to, from) in words.iter_mut().zip(slot) {
            *to = from.load(Ordering::Relaxed);
        }
        fence(Ordering::Acquire);
        if slot[0].load(Ordering::Relaxed) != turn {
            return Slot::Overwritten;
        }
        Slot::Written(bytemuck::must_cast(words))
    }
}

/// What is found where a record should be.
enum Slot {
    Written(Event),
    /// It is about to be written, or its writer found no room for it.
    Unwritten,
    /// A later one is there.
    Overwritten,
}

/// What a reader gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// A record.
    Event(Event),
    /// So many were lost here: the reader was too slow, or writers met in one slot.
    Lost(u64),
}

/// A reader: how far it has come.
#[derive(Debug)]
pub struct Reader {
    ring: EventRing,
    next: u64,
    waits_since: Option<Instant>,
    mark: Option<OwnMark>,
    missed: u64,
}

/// The mark of a reader that wants packets.
#[derive(Debug)]
struct OwnMark {
    client: Prefix,
    service: u32,
    place: Option<usize>,
}

/// All marks are other readers'.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoMark;

impl Reader {
    /// Begins with what is told from now on.
    pub fn new(ring: EventRing) -> Self {
        ring.renew();
        let (next, missed) = (ring.head() + 1, ring.watch(offset_of!(Watch, missed)).load(Ordering::Relaxed));
        Self { ring, next, waits_since: None, mark: None, missed }
    }

    /// Wants the packets of flows that begin from now on, of clients in a range, to a service port or (0) to any.
    ///
    /// # Errors
    /// If there are as many readers who want packets as there is room for.
    pub fn want_packets(&mut self, client: Prefix, service: u32) -> Result<(), NoMark> {
        self.mark = Some(OwnMark { client, service, place: None });
        self.renew()
    }

    /// Goes on watching. To be called more often than each [`LEASE`].
    ///
    /// # Errors
    /// If the mark of this reader was lost, and no other is to be had.
    pub fn renew(&mut self) -> Result<(), NoMark> {
        self.ring.renew();
        let Some(mark) = &mut self.mark else { return Ok(()) };
        let until = lease_end();
        mark.place = mark.place.filter(|place| self.ring.holds(*place, mark));
        if mark.place.is_none() {
            mark.place = Some(self.ring.take_mark(mark).ok_or(NoMark)?);
        }
        if let Some(place) = mark.place {
            self.ring.mark_word(place, offset_of!(Mark, until)).store(until, Ordering::SeqCst);
        }
        self.ring.watch(offset_of!(Watch, packets)).store(PACKETS, Ordering::SeqCst);
        self.ring.watch(offset_of!(Watch, packets_until)).fetch_max(until, Ordering::SeqCst);
        Ok(())
    }

    /// Packets that were not told because there were more than 1,000 between two renewals, since this was last asked.
    pub fn missed_packets(&mut self) -> u64 {
        let missed = self.ring.watch(offset_of!(Watch, missed)).load(Ordering::Relaxed);
        missed.wrapping_sub(std::mem::replace(&mut self.missed, missed))
    }

    /// Calls `tell` with all that there is.
    pub fn read(&mut self, mut tell: impl FnMut(Told)) {
        let head = self.ring.head();
        let oldest = (head + 1).saturating_sub(EVENTS as u64);
        if self.next < oldest {
            tell(Told::Lost(oldest - self.next));
            self.next = oldest;
        }
        while self.next <= head {
            match self.ring.read(self.next) {
                Slot::Written(event) => tell(Told::Event(event)),
                Slot::Overwritten => tell(Told::Lost(1)),
                Slot::Unwritten => {
                    let since = *self.waits_since.get_or_insert_with(Instant::now);
                    if since.elapsed() < PATIENCE {
                        return;
                    }
                    tell(Told::Lost(1));
                }
            }
            self.waits_since = None;
            self.next += 1;
        }
    }
}

impl EventRing {
    fn mark_word(&self, place: usize, offset: usize) -> &AtomicU64 {
        self.watch(offset_of!(Watch, marks) + place * size_of::<Mark>() + offset)
    }

    /// Whether a mark is this reader's still: two who take one at the same moment may both think so.
    fn holds(&self, place: usize, mark: &OwnMark) -> bool {
        let wanted: [u64; 6] = bytemuck::must_cast(Mark::new(0, mark.client, mark.service));
        (1..wanted.len())
            .all(|at| self.mark_word(place, at * size_of::<u64>()).load(Ordering::SeqCst) == wanted[at])
    }

    /// Takes a mark whose reader is gone. It holds for nothing until its time is written.
    fn take_mark(&self, mark: &OwnMark) -> Option<usize> {
        let now = coarse();
        let wanted: [u64; 6] = bytemuck::must_cast(Mark::new(0, mark.client, mark.service));
        (0..MARKS).find(|&place| {
            let until = self.mark_word(place, 0);
            let had = until.load(Ordering::SeqCst);
            let taken =
                had < now && until.compare_exchange(had, now, Ordering::SeqCst, Ordering::Relaxed).is_ok();
            if taken {
                for (at, word) in wanted.iter().enumerate().skip(1) {
                    self.mark_word(place, at * size_of::<u64>()).store(*word, Ordering::SeqCst);
                }
            }
            taken
        })
    }
}

/// A record of something that the agent does, at this moment.
pub fn record() -> Event {
    Event { time: now(), ..Event::zeroed() }
}
