//! Flows: what was decided for a connection, found by the five-tuple of each direction.

use crate::hash::mix;
use crate::{Addr, Port};
use bytemuck::{Pod, Zeroable};

/// The five-tuple of a packet as it arrives. 40 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct FlowKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub src_port: Port,
    /// Destination port.
    pub dst_port: Port,
    proto: u32,
}

impl FlowKey {
    /// The key of a packet from `src` to `dst`.
    #[inline(always)]
    pub const fn new(src: Addr, src_port: Port, dst: Addr, dst_port: Port, proto: u8) -> Self {
        let ([s0, s1], [d0, d1]) = (src.words(), dst.words());
        let ([a, b], [c, d]) = (src_port.bytes(), dst_port.bytes());
        // In whole words, as the hash of the key will read it.
        let [p0, p1, p2, p3] = (proto as u32).to_ne_bytes();
        bytemuck::must_cast([s0, s1, d0, d1, u64::from_ne_bytes([a, b, c, d, p0, p1, p2, p3])])
    }

    /// IP protocol number.
    #[inline(always)]
    pub const fn proto(&self) -> u8 {
        self.proto as u8
    }

    /// A number that tells this tuple from most others: [`Flow::check`] of its entry.
    #[inline(always)]
    pub fn check(&self) -> u16 {
        let ([_, src], [_, dst]) = (self.src.words(), self.dst.words());
        let [a, b] = self.src_port.bytes();
        let [c, d] = self.dst_port.bytes();
        let ports = u32::from_ne_bytes([a, b, c, d]) as u64;
        let mixed = (src ^ dst.rotate_left(17) ^ ports.rotate_left(7)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 48) as u16
    }

    /// A number from all of `u32`, the same for the same tuple and salt, and else as good as drawn.
    #[inline(always)]
    pub fn draw(&self, salt: u64) -> u32 {
        (mix(bytemuck::must_cast::<_, [u64; 5]>(*self), salt) >> 32) as u32
    }

    /// The key of the opposite direction.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self::new(self.dst, self.dst_port, self.src, self.src_port, self.proto())
    }
}

/// How far a flow is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Its handshake is not complete.
    HalfOpen,
    /// Both ends confirmed it.
    Established,
    /// It ended or was reset.
    Closing,
}

/// One direction of a flow: what its packets become. 96 bytes: with its key and what the kernel has beside them it fills a slab of 192.
///
/// Both directions are made and removed together (C4). The partner's key is [`Flow::partner`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Flow {
    /// [`FlowKey::check`] of the entry's key. The first field to be written when an element is used again, and the last
    /// to be read: if it still fits, all that was read before belongs to this flow.
    pub check: u16,
    flags: u16,
    /// Source port after translation.
    pub src_port: Port,
    /// Destination port after translation.
    pub dst_port: Port,
    /// Source address after translation.
    pub src: Addr,
    /// Destination address after translation.
    pub dst: Addr,
    /// Id of the backend, whose entry names the service port.
    pub backend: u32,
    /// The generation that the backend's id had.
    pub generation: u32,
    /// Tick of the last packet in this direction; see [`tick`].
    pub last_seen: u32,
    /// See [`Flow::attempt`], [`Flow::expected_ack`], [`Flow::answered_at`] and [`Flow::uplink`].
    pub detail: u32,
    /// In the client's half, while half-open or closing: the low bits of [`Name::turn`] of its name.
    pub turn: u32,
    /// In the client's half: [`Kept::turn`](crate::kept::Kept::turn) of its first packet; 0: that is not kept, and the flow stays where it
    /// is (L5).
    pub kept: u32,
    /// TCP: the numbers of this direction's segments.
    pub numbers: Numbers,
    /// What passed and is in no total yet.
    pub counted: Counted,
    /// Bytes that passed and are in the totals of Service and endpoint.
    pub bytes: u64,
    /// Id of the service port.
    pub service: u32,
    /// Packets, as `bytes`; modulo 2^32.
    pub packets: u32,
}

/// Packets and bytes that passed and are in no total yet. One word: one atomic addition counts a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Counted(u64);

impl Counted {
    /// Bits of the number of bytes.
    const BYTES: u32 = 44;

    /// One packet of so many bytes.
    #[inline(always)]
    pub const fn packet(bytes: u32) -> Self {
        Self(1 << Self::BYTES | bytes as u64)
    }

    /// As it lies in an entry.
    #[inline(always)]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// What a word of an entry says.
    #[inline(always)]
    pub const fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// How many packets.
    #[inline(always)]
    pub const fn packets(self) -> u64 {
        self.0 >> Self::BYTES
    }

    /// How many bytes.
    #[inline(always)]
    pub const fn bytes(self) -> u64 {
        self.0 & ((1 << Self::BYTES) - 1)
    }

    /// Whether nothing passed.
    #[inline(always)]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Whether it has to be added to the totals now: half of the packets that fit, of 2^25 bytes each, which is more than any has.
    #[inline(always)]
    pub const fn is_full(self) -> bool {
        self.0 >> (u64::BITS - 1) != 0
    }
}

/// What the segments of one end of a TCP connection have said; all zero: nothing yet. One word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Numbers {
    /// The sequence number behind the last that it used.
    pub end: u32,
    /// What it has acknowledged; 0: nothing yet.
    pub ack: u32,
}

/// How far a segment may be from those before it: more than a network holds back.
const NEAR: u32 = 1 << 21;

impl Numbers {
    /// Whether anything was said.
    #[inline(always)]
    pub const fn is_known(self) -> bool {
        self.end | self.ack != 0
    }

    /// Whether a segment with these numbers can be of the same end: who guesses them comes as near once in a million times.
    #[inline(always)]
    pub const fn is_near(self, segment: Self) -> bool {
        const fn near(a: u32, b: u32) -> bool {
            b.wrapping_sub(a).wrapping_add(NEAR) < 2 * NEAR
        }
        let acks = self.ack == 0 || segment.ack == 0 || near(self.ack, segment.ack);
        !self.is_known() || near(self.end, segment.end) && acks
    }

    /// After a segment with these numbers.
    #[inline(always)]
    #[must_use]
    pub const fn after(self, segment: Self) -> Self {
        const fn later(a: u32, b: u32) -> u32 {
            if (b.wrapping_sub(a) as i32) > 0 { b } else { a }
        }
        if !self.is_known() {
            return segment;
        }
        let ack = match (self.ack, segment.ack) {
            (known, 0) => known,
            (0, said) => said,
            (known, said) => later(known, said),
        };
        Self { end: later(self.end, segment.end), ack }
    }

    /// Whether a reset of this end is believed (RFC 5961, 3): it has the number that `peer` waits for, or that comes after this end's
    /// last, or answers the SYN of a connection that nobody has accepted. Of a connection of which nothing is known, each is.
    #[inline(always)]
    pub const fn resets(self, peer: Self, seq: u32, ack: u32, is_half_open: bool) -> bool {
        let expected = peer.ack != 0 && seq == peer.ack;
        let next = self.is_known() && seq == self.end;
        let refuses = is_half_open && ack != 0 && ack == peer.end;
        expected || next || refuses || !self.is_known() && !peer.is_known()
    }
}

/// How a flow of TCP or UDP that was not answered yet got its endpoint: [`Flow::detail`] of the client's half (L5). One word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Attempt(u32);

impl Attempt {
    const TRIES: u32 = (1 << 3) - 1;
    const BACKEND_SHIFT: u32 = 3;
    const BACKEND: u32 = (1 << 17) - 1;
    const MOMENT_SHIFT: u32 = 20;

    /// The first, at the backend with this id.
    #[inline(always)]
    pub const fn first(backend: u32) -> Self {
        Self((backend & Self::BACKEND) << Self::BACKEND_SHIFT)
    }

    /// From the word.
    #[inline(always)]
    pub const fn of(word: u32) -> Self {
        Self(word)
    }

    /// The word, at a moment in eighths of a tick.
    #[inline(always)]
    pub const fn at(self, moment: u32) -> u32 {
        (self.0 & ((1 << Self::MOMENT_SHIFT) - 1)) | (moment << Self::MOMENT_SHIFT)
    }

    /// How many there were before.
    #[inline(always)]
    pub const fn tries(self) -> u32 {
        self.0 & Self::TRIES
    }

    /// The backend of the first: the lower bits of its id, which are all of them where there are not more than there is room for by
    /// default.
    #[inline(always)]
    pub const fn backend(self) -> u32 {
        self.0 >> Self::BACKEND_SHIFT & Self::BACKEND
    }

    /// The next. There are no more than fit.
    #[inline(always)]
    #[must_use]
    pub const fn next(self) -> Self {
        Self(if self.tries() < Self::TRIES { self.0 + 1 } else { self.0 })
    }

    /// How many eighths of a tick have passed since, modulo 512 ticks.
    #[inline(always)]
    pub const fn age(self, moment: u32) -> u32 {
        moment.wrapping_sub(self.0 >> Self::MOMENT_SHIFT) & ((1 << (u32::BITS - Self::MOMENT_SHIFT)) - 1)
    }
}

/// A slot of the rings `half_open` and `closing`: the name of a flow. 48 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Name {
    /// The turn in which the name was given; 0: the slot is free. The flow says the same, or the name is another's: of a flow that
    /// is further by now, or went.
    pub turn: u64,
    /// Key of the client's half.
    pub key: FlowKey,
}

impl Name {
    /// In [`Name::turn`]: somebody is about to change the name.
    pub const BUSY: u64 = 1 << 63;
}

/// Value of `turns`: how far a ring has come. A cache line, 64 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct RingTurns {
    /// The last turn in which a name was given. The name of turn `n` is in slot `n` modulo the ring's room.
    pub head: u64,
    /// The last turn whose name was taken away to make room in `flows`.
    pub tail: u64,
    spare: [u64; 6],
}

impl RingTurns {
    /// Element of the ring `half_open`.
    pub const HALF_OPEN: u32 = 0;
    /// Element of the ring `closing`.
    pub const CLOSING: u32 = 1;
}

/// Value of `port_turn`: how far a CPU has given out the translated source ports. 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct PortTurn {
    /// What the order of the round was drawn to be; 0: nothing yet.
    pub order: u64,
    /// The turn.
    pub number: u64,
}

impl PortTurn {
    /// Which of the numbers up to `mask`, one less than a power of two up to 2^16, has this turn: each has one in a round, for
    /// every step here can be undone. Who has seen some of them does not know the next, as long as it does not try all orders.
    #[inline(always)]
    pub const fn place(&self, mask: u32) -> u32 {
        let (first, second) = (self.order as u32, (self.order >> 32) as u32);
        let spread = (self.number as u32).wrapping_mul(first | 1).wrapping_add(first >> 16) & mask;
        let mixed = (spread ^ spread >> 5).wrapping_mul(second | 1).wrapping_add(second >> 16) & mask;
        mixed ^ mixed >> 7
    }
}

/// A tick is 2^shift jiffies, about a second: so it is where a second has 250 of them. "Last seen" is written when the tick changed.
pub const TICK_SHIFT: u32 = 8;

/// The shift by which a tick is the nearest to a second where one has so many jiffies: 0.85 s at 300 Hz, 1.02 s at 250 and 1000 Hz,
/// 1.28 s at 100 Hz.
pub const fn tick_shift(jiffies_in_a_second: u32) -> u32 {
    let number = if jiffies_in_a_second == 0 { 1 } else { jiffies_in_a_second as u64 };
    // The power of two below, or the one above where that is nearer.
    let below = number.ilog2();
    if number - (1 << below) <= (2 << below) - number { below } else { below + 1 }
}

/// Ticks count modulo 2^24.
pub const TICK_MASK: u32 = (1 << 24) - 1;

/// The tick of a moment, from all bits of jiffies.
#[inline(always)]
pub const fn tick(jiffies: u64, shift: u32) -> u32 {
    (jiffies >> shift) as u32 & TICK_MASK
}

/// How many ticks passed from `earlier` to `now`.
#[inline(always)]
pub const fn ticks_between(earlier: u32, now: u32) -> u32 {
    now.wrapping_sub(earlier) & TICK_MASK
}

/// By how many ticks something can be after the moment at which the clock was read: hours, far longer than a sweep lasts.
const AHEAD: u32 = 1 << 16;

/// How many ticks passed since `earlier`; none if it is after `now`, as what is written meanwhile may be. What is older than
/// 2^24 ticks less 2^16 (165 days at 300 Hz, and more at other rates) looks younger than it is.
#[inline(always)]
pub const fn ticks_since(earlier: u32, now: u32) -> u32 {
    if ticks_between(now, earlier) < AHEAD { 0 } else { ticks_between(earlier, now) }
}

impl Flow {
    /// This entry translates the endpoint's packets, not the client's.
    pub const REPLY: u16 = 1 << 0;
    /// The source is translated as well: both directions are rewritten at ingress and leave at once.
    pub const SOURCE_TRANSLATED: u16 = 1 << 1;
    /// The client is the node itself: replies are handed up as if they had come in on [`Flow::uplink`].
    pub const NODE_CLIENT: u16 = 1 << 2;
    /// The client sent a FIN.
    pub const CLIENT_FIN: u16 = 1 << 3;
    /// The endpoint sent a FIN.
    pub const ENDPOINT_FIN: u16 = 1 << 4;
    /// The endpoint answered: a TCP SYN-ACK, or any UDP datagram.
    pub const ANSWERED: u16 = 1 << 5;
    /// [`Flow::expected_ack`] is set.
    pub const ACK_KNOWN: u16 = 1 << 6;
    /// The last end to send a FIN sent it in this direction: only its acknowledgement is still to come.
    pub const LAST_FIN: u16 = 1 << 7;
    /// The flow is over: the last FIN was acknowledged, or it was reset.
    pub const OVER: u16 = 1 << 8;
    /// Both ends confirmed the flow.
    pub const CONFIRMED: u16 = 1 << 9;
    /// The flow ended or was reset.
    pub const CLOSING: u16 = 1 << 10;
    /// In the client's half: its packets are marked, so that netfilter translates their source as they leave for the endpoint.
    pub const MASQUERADED: u16 = 1 << 12;
    /// In the client's half: its packets are marked, so that netfilter notes that mark of their connection.
    pub const NOTED: u16 = 1 << 13;
    /// Its client comes back to the endpoint (S1): that is remembered for good when the flow is established.
    pub const AFFINE: u16 = 1 << 14;
    /// Whoever watches is told of each of its packets.
    pub const WATCHED: u16 = 1 << 15;

    /// In the client's half: its backend counts it among those that are open. Whoever takes the flag away counts it off.
    pub const COUNTED_OPEN: u16 = 1 << 11;

    /// An entry with these flags that says nothing else yet.
    #[inline(always)]
    pub fn with_flags(flags: u16) -> Self {
        Self { flags, ..Self::zeroed() }
    }

    /// Words of eight bytes that it takes.
    const WORDS: usize = size_of::<Self>() / size_of::<u64>();

    /// Makes it one with these flags and nothing else, word by word.
    #[inline(always)]
    pub fn become_empty(&mut self, flags: u16) {
        let words: &mut [u64; Self::WORDS] = bytemuck::must_cast_mut(self);
        let mut at = 0;
        while at < Self::WORDS {
            // SAFETY: a reference is valid for writes. Volatile, because the compiler would make a call that writes byte by byte.
            unsafe { (&raw mut words[at]).write_volatile(0) };
            at += 1;
        }
        self.flags = flags;
    }

    /// Copies what `entry` points to, word by word.
    ///
    /// # Safety
    /// `entry` must be valid for reads. It may change meanwhile: [`Flow::check`] tells.
    #[inline(always)]
    pub unsafe fn copy_from(&mut self, entry: *const Self) {
        let words: &mut [u64; Self::WORDS] = bytemuck::must_cast_mut(self);
        let mut at = 0;
        while at < Self::WORDS {
            // SAFETY: the caller promises it; a flow has the size and the alignment of its words. Volatile, because the
            // compiler would make a call of a plain copy, which copies byte by byte.
            words[at] = unsafe { entry.cast::<u64>().add(at).read_volatile() };
            at += 1;
        }
    }

    /// Whether all bits of `flag` are set.
    #[inline(always)]
    pub const fn has(&self, flag: u16) -> bool {
        self.flags & flag == flag
    }

    /// Whether any bit of `flags` is set.
    #[inline(always)]
    pub const fn has_any(&self, flags: u16) -> bool {
        self.flags & flags != 0
    }

    /// All that passed in this direction, as packets and bytes; packets modulo 2^32 beyond what is not in the totals yet.
    pub const fn passed(&self) -> (u64, u64) {
        (self.packets as u64 + self.counted.packets(), self.bytes + self.counted.bytes())
    }

    /// How far the flow is. A flag is only ever set, but for [`Flow::COUNTED_OPEN`], so a flow never goes back.
    #[inline(always)]
    pub const fn stage(&self) -> Stage {
        if self.has(Self::CLOSING) {
            Stage::Closing
        } else if self.has(Self::CONFIRMED) {
            Stage::Established
        } else {
            Stage::HalfOpen
        }
    }

    /// The flags.
    #[inline(always)]
    pub const fn flags(&self) -> u16 {
        self.flags
    }

    /// The bits of `flag` as they lie in the first word of an entry.
    #[inline(always)]
    pub const fn in_first_word(flag: u16) -> u64 {
        let [low, high] = flag.to_ne_bytes();
        u64::from_ne_bytes([0, 0, low, high, 0, 0, 0, 0])
    }

    /// Sets the bits of `flag`.
    #[inline(always)]
    pub const fn set(&mut self, flag: u16) {
        self.flags |= flag;
    }

    /// Clears the bits of `flag`: of a flow that is not entered yet.
    #[inline(always)]
    pub const fn clear(&mut self, flag: u16) {
        self.flags &= !flag;
    }

    /// In the client's half of TCP and UDP, while half-open and before it is [`Flow::ANSWERED`]: how it got its endpoint.
    #[inline(always)]
    pub const fn attempt(&self) -> Attempt {
        Attempt::of(self.detail)
    }

    /// In the client's half, while half-open and [`Flow::ACK_KNOWN`]: the acknowledgement number by which the client proves
    /// that it saw the SYN-ACK, host order.
    #[inline(always)]
    pub const fn expected_ack(&self) -> u32 {
        self.detail
    }

    /// In the client's half of UDP, while half-open and [`Flow::ANSWERED`]: the tick of the first answer.
    #[inline(always)]
    pub const fn answered_at(&self) -> u32 {
        self.detail
    }

    /// In the endpoint's half, where the client is the node itself: index of the uplink whose egress the client's packets pass.
    #[inline(always)]
    pub const fn uplink(&self) -> u32 {
        self.detail
    }

    /// Key of the opposite direction: what the far end sends back, as it arrives.
    #[inline(always)]
    pub const fn partner(&self, proto: u8) -> FlowKey {
        FlowKey::new(self.dst, self.dst_port, self.src, self.src_port, proto)
    }
}

const _: () = assert!(core::mem::offset_of!(Flow, flags) == 2 && core::mem::offset_of!(Name, turn) == 0);
// The upper half of a word, so that an addition to it changes nothing else.
const _: () = assert!(core::mem::offset_of!(Flow, packets) % 8 == 4 && cfg!(target_endian = "little"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_on_and_take_nothing_far_away() {
        let said = Numbers { end: u32::MAX - 9, ack: 70 };
        assert_eq!(said.after(Numbers { end: 20, ack: 0 }), Numbers { end: 20, ack: 70 });
        assert_eq!(said.after(Numbers { end: u32::MAX - 99, ack: 69 }), said, "an old one");
        assert_eq!(Numbers::default().after(said), said);
        assert!(said.is_near(Numbers { end: 90, ack: u32::MAX }) && Numbers::default().is_near(said));
        assert!(
            !said.is_near(Numbers { end: NEAR, ack: 70 })
                && !said.is_near(Numbers { end: 9, ack: NEAR + 70 })
        );
        let peer = Numbers { end: 100, ack: 7 };
        assert!(said.resets(peer, 7, 0, false) && said.resets(peer, u32::MAX - 9, 0, false));
        assert!(!said.resets(peer, 8, 0, false) && !said.resets(peer, 0, 100, false));
        let (none, opened) = (Numbers::default(), Numbers { end: 100, ack: 0 });
        assert!(none.resets(opened, 0, 100, true) && !none.resets(opened, 0, 99, true));
        assert!(none.resets(none, 8, 0, false));
    }

    #[test]
    fn an_attempt_says_where_it_began_how_often_and_when() {
        let first = Attempt::first(70_000);
        let word = Attempt::of(first.next().next().at(4_097));
        assert_eq!((word.tries(), word.backend()), (2, 70_000));
        assert_eq!([4_097, 4_099, 1].map(|moment| word.age(moment)), [0, 2, 0]);
        let last = (0..9).fold(first, |attempt, _| attempt.next());
        assert_eq!((last.tries(), last.backend()), (7, 70_000));
    }

    #[test]
    fn a_flag_is_found_in_the_first_word() {
        let mut flow = Flow::with_flags(Flow::REPLY);
        let words: &mut [u64; 12] = bytemuck::must_cast_mut(&mut flow);
        words[0] |= Flow::in_first_word(Flow::CLOSING | Flow::OVER);
        assert_eq!(flow.flags(), Flow::REPLY | Flow::CLOSING | Flow::OVER);
        assert_eq!((flow.check, flow.src_port, flow.dst_port), (0, Port::new(0), Port::new(0)));
    }

    #[test]
    fn ticks_go_on_after_they_wrap() {
        assert_eq!(ticks_between(tick((1 << 32) - 1, TICK_SHIFT), tick(1 << 32, TICK_SHIFT)), 1);
        assert_eq!([100, 250, 300, 1_000].map(tick_shift), [7, TICK_SHIFT, 8, 10]);
        assert_eq!(ticks_between(5, 12), 7);
    }

    #[test]
    fn what_is_written_after_the_clock_was_read_has_no_age_and_what_is_weeks_old_has_one() {
        for now in [0, 7, TICK_MASK / 2, TICK_MASK] {
            let at = |ticks: u32| now.wrapping_add(ticks) & TICK_MASK;
            assert_eq!([0, 1, AHEAD - 1].map(|ticks| ticks_since(at(ticks), now)), [0; 3]);
            assert_eq!(ticks_since(at(AHEAD), now), TICK_MASK + 1 - AHEAD, "the oldest that can be told");
            assert_eq!(ticks_since(at(TICK_MASK), now), 1);
        }
    }

    #[test]
    fn each_port_has_one_turn_in_a_round() {
        for (order, bits) in [(0, 13), (0x9e37_79b1_7f4a_7c15, 13), (u64::MAX, 16), (1 << 63, 1), (7, 0)] {
            let mask = (1 << bits) - 1;
            let places = (0..=mask).map(|turn| PortTurn { order, number: turn.into() }.place(mask));
            let places: std::collections::BTreeSet<_> = places.collect();
            assert_eq!((places.len() as u32, places.last()), (mask + 1, Some(&mask)), "{order} {bits}");
        }
    }

    #[test]
    fn packets_and_bytes_are_counted_in_one_word() {
        let mut word = 0;
        for bytes in [40, 1_500, 512 << 10] {
            word += Counted::packet(bytes).word();
        }
        let counted = Counted::from_word(word);
        assert_eq!((counted.packets(), counted.bytes()), (3, 40 + 1_500 + (512 << 10)));
        assert!(!counted.is_zero() && !counted.is_full() && Counted::default().is_zero());
        let largest = Counted::packet(512 << 10);
        let almost = Counted::from_word(largest.word() * ((1 << 19) - 1));
        assert!(!almost.is_full() && Counted::from_word(almost.word() + largest.word()).is_full());
        // Packets that pass before it is added.
        let more = Counted::from_word(almost.word() + largest.word() * 1_000);
        assert_eq!((more.packets(), more.bytes()), ((1 << 19) + 999, ((1 << 19) + 999) * (512 << 10)));
    }

    #[test]
    fn the_partner_of_the_partner_is_the_flow_itself() {
        let (client, frontend) = (Addr::from_v4([10, 0, 0, 5]), Addr::from_v4([10, 96, 0, 1]));
        let endpoint = Addr::from_v4([10, 244, 1, 2]);
        let key = FlowKey::new(client, Port::new(40_000), frontend, Port::new(80), 6);
        let mut forward = Flow::with_flags(0);
        (forward.src, forward.src_port) = (client, Port::new(40_000));
        (forward.dst, forward.dst_port) = (endpoint, Port::new(8080));
        let mut reply = Flow::with_flags(Flow::REPLY);
        (reply.src, reply.src_port, reply.dst, reply.dst_port) =
            (key.dst, key.dst_port, key.src, key.src_port);
        assert_eq!(forward.partner(6), FlowKey::new(endpoint, Port::new(8080), client, Port::new(40_000), 6));
        assert_eq!(reply.partner(6), key);
    }
}
