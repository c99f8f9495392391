//! Second tries (L5): a connection whose endpoint is silent or refuses it gets another. It has carried no data, so that it can be moved;
//! of a datagram that is refused the refusal quotes all. What refuses is turned into what it refuses, as the client sent it, and that
//! comes once more where the client's packets are met. So it meets all that they meet, and XDP and tc, families, routes and source
//! translation need no second way.

use super::{Walk, draw, life};
use crate::frame::{ETHERNET, Frame};
use crate::maps::{MOVED, SLOTS};
use crate::parse::{Obstacle, tcp};
use crate::repeat::{Step, Steps, repeat};
use crate::scratch::{Opening, Scratch};
use crate::select::{self, Number};
use crate::service::{self, Endpoints};
use crate::verdict::{Code, Verdict};
use crate::{count, flow, kept, limit, reject};
use aya_ebpf::bindings::BPF_ANY;
use dataplane_common::Protocol;
use dataplane_common::checksum::Sum;
use dataplane_common::drop::Reason;
use dataplane_common::flow::{Attempt, Flow, Stage};
use dataplane_common::kept::Kept;
use dataplane_common::service::{Algorithm, EndpointSet, Policy};

/// Eighths of a tick for which an endpoint may be silent: no stack repeats a SYN earlier, and a network that doubles packets is quicker.
const PATIENCE: u32 = 4;

/// How many slots are looked at for an endpoint that was not tried: a set in which one has a thousand times the weight of all others is
/// none to choose from.
const LOOKED_AT: u32 = 1_024;

/// How many bytes of a datagram are summed in a step.
const SUMMED: usize = 64;

/// A datagram that an ICMP error quotes has no more of these steps: it is not longer than the largest packet.
const SUMS: u32 = 1 << 10;

impl<F: Frame> Walk<'_, F> {
    /// Whether the packet may begin a flow that can be moved: a TCP SYN without data, or a datagram of UDP, and without IP options.
    #[inline(always)]
    pub(super) fn can_be_moved(&self) -> bool {
        let packet = &self.s.packet;
        let is_plain = packet.network_header() == packet.plain_header();
        // Without data a SYN uses one number.
        let is_bare = packet.opens() && life::numbers(packet).end == packet.seq.wrapping_add(1);
        let (is_tcp, is_udp) = (packet.proto == Protocol::Tcp as u8, packet.proto == Protocol::Udp as u8);
        is_plain && (is_tcp && is_bare || is_udp)
    }

    /// The number of the reason for which a client's packet of a known flow is given to another endpoint: it comes again because its
    /// endpoint is silent or has refused it. 0: it is not.
    #[inline(always)]
    pub(super) fn tries_again(&self, stage: Stage) -> u32 {
        let (packet, flow) = (&self.s.packet, &self.s.flow);
        if stage != Stage::HalfOpen || flow.kept == 0 || flow.has(Flow::ANSWERED) || !self.can_be_moved() {
            return 0;
        }
        let refused = kept::refused(flow.kept) as u32;
        let is_tcp = packet.proto == Protocol::Tcp as u8;
        let is_silent = is_tcp && flow.attempt().age(flow::moment()) >= PATIENCE;
        let same = !is_tcp || life::numbers(packet) == flow.numbers;
        if !same || service::tries(flow.service) <= flow.attempt().tries() {
            return 0;
        }
        if refused == 0 && is_silent { Reason::MovedSilent as u32 } else { refused }
    }

    /// A flow is about to leave its endpoint. What else that refuses of a flow of UDP shall find its client: a second question may be on
    /// its way already.
    #[inline(never)]
    pub(super) fn note_moved(&mut self) {
        let Scratch { key, flow, reply, keys: [partner, _], .. } = &mut *self.s;
        if key.proto() != Protocol::Udp as u8 {
            return;
        }
        *partner = flow.partner(key.proto());
        if flow::lookup(partner, reply).is_some() {
            let _ = MOVED.insert(&*partner, &*reply, BPF_ANY as u64);
        }
    }

    /// Whether an endpoint's packet refuses the SYN of its client, which goes to another endpoint instead.
    #[inline(always)]
    pub(super) fn is_refused_by_reset(&mut self) -> bool {
        let packet = &self.s.packet;
        let both = tcp::RST | tcp::ACK;
        packet.tcp(both, both) && self.turns(packet.ack, Reason::MovedRefused as u32)
    }

    /// Whether an ICMP error, whose quote was read, says that what a client sent has not reached its endpoint, so that it goes to another.
    /// The walk's flow is the endpoint's half then.
    #[inline(never)]
    pub(super) fn is_refused_by_error(&mut self) -> bool {
        // Or the compiler would hand over what it reads first, pointers into the packet, in halves.
        let this = core::hint::black_box(self);
        let word = this.word();
        if !this.moves(word) || !this.is_of_flow() || !this.applies() || !this.s.flow.has(Flow::REPLY) {
            return false;
        }
        // Of UDP there is no number.
        let number = this.frame.read::<4>(this.s.quoted.l4() + 4).map_or(0, u32::from_be_bytes);
        let reason = this.s.moved;
        this.turns(number.wrapping_add(1), reason)
    }

    /// The number of the reason for which a flow gets another endpoint when this ICMP error is about its first packet: there is no way, or
    /// the endpoint itself says that nobody reads datagrams there. 0: none. What a firewall says for TCP (port unreachable, prohibited) is
    /// its word, and is passed on.
    #[inline(always)]
    fn word(&mut self) -> u32 {
        const UNREACHABLE: u8 = 3;
        const UNREACHABLE_V6: u8 = 1;
        let (packet, quoted) = (&self.s.packet, &self.s.quoted);
        let Some([kind, code]) = self.frame.read::<2>(packet.l4()) else { return 0 };
        // By code: no way (net, host; ICMPv6: no route, address), and port unreachable.
        let (is_unreachable, no_way, port) =
            if packet.is_v4() { (kind == UNREACHABLE, 0b11, 3) } else { (kind == UNREACHABLE_V6, 0b1001, 4) };
        if !is_unreachable || code > 4 {
            return 0;
        }
        let no_way = no_way >> code & 1 != 0;
        let end = packet.l3() + packet.length;
        if quoted.proto == Protocol::Tcp as u8 {
            // As far as its number.
            let is_there = quoted.l4() + 8 <= end;
            return if no_way && is_there { Reason::MovedUnreachable as u32 } else { 0 };
        }
        // All of it, and nothing but it: what is quoted in part cannot be sent again.
        let is_whole = quoted.obstacle == Obstacle::None
            && quoted.l3() + quoted.length <= end
            && quoted.network_header() == quoted.plain_header()
            && quoted.length > quoted.plain_header() + UDP_HEADER;
        let is_word = no_way || code == port && packet.src == self.s.key.src;
        if quoted.proto == Protocol::Udp as u8 && is_word && is_whole { Reason::MovedUdp as u32 } else { 0 }
    }

    /// Whether there is a flow with the walk's key, or was before it got another endpoint: a second question may be refused after that.
    #[inline(always)]
    fn is_of_flow(&mut self) -> bool {
        if flow::lookup(&self.s.key, &mut self.s.flow).is_some() {
            return true;
        }
        let Some(half) = MOVED.get_ptr(&self.s.key) else { return false };
        // SAFETY: an element of a map, valid until the program ends. One that is used again meanwhile is of another endpoint: its check
        // tells.
        unsafe { self.s.flow.copy_from(half) };
        self.s.flow.check == self.s.key.check()
    }

    /// Whether the endpoint's half of a flow, which is the walk's, is of one that can go to another endpoint: nothing was answered, its
    /// first packet is kept, and there are tries left. `number`: what a refusal of TCP says of it, the number behind the SYN's.
    #[inline(never)]
    fn turns(&mut self, number: u32, reason: u32) -> bool {
        let Scratch { key, flow, reply: client, keys: [client_key, _], kept, .. } = &mut *self.s;
        *client_key = flow.partner(key.proto());
        if flow::lookup(client_key, client).is_none() || !kept::recall(client.kept, kept) {
            return false;
        }
        // A question to the endpoint that its flow had before: it follows to the next.
        let is_moved =
            key.proto() == Protocol::Udp as u8 && (client.dst, client.dst_port) != (key.src, key.src_port);
        if is_moved {
            return limit::allows_turn(client.service);
        }
        let open = client.stage() == Stage::HalfOpen && !client.has(Flow::ANSWERED);
        // A client that has begun anew with another number is not to send the old one.
        let kept_seq =
            if key.src.is_v4() { sequence::<IPV4_HEADER>(kept) } else { sequence::<IPV6_HEADER>(kept) };
        let is_syns = number == client.numbers.end && number == kept_seq.wrapping_add(1);
        let is_its = key.proto() == Protocol::Udp as u8 || is_syns;
        if !open || !is_its || service::tries(client.service) <= client.attempt().tries() {
            return false;
        }
        if !limit::allows_turn(client.service) {
            count::reason(Reason::TriesLimited);
            return false;
        }
        kept::note_refused(client.kept, reason as u8);
        true
    }

    /// The verdict on a packet of a flow. One that refuses what began it is turned round.
    #[inline(always)]
    pub(super) fn turned(&mut self, code: Code) -> Verdict {
        if code == Code::TURN { self.turn_round().verdict() } else { code.verdict() }
    }

    /// Notes why a flow gets another endpoint, by the number of the reason; whether it does.
    #[inline(always)]
    pub(super) fn moves(&mut self, number: u32) -> bool {
        let moved = &raw mut self.s.moved;
        // SAFETY: an own field. Through memory, so that the verifier walks what follows once.
        unsafe {
            moved.write_volatile(number);
            moved.read_volatile() != 0
        }
    }

    /// Turns the frame, which refuses what a client sent, into that, and has it come once more to where the client's packets are met: the
    /// walk there gives it to another endpoint.
    #[inline(never)]
    pub(super) fn turn_round(&mut self) -> Code {
        if F::LEAVES_TO_TC {
            return Verdict::LeaveToTc.into();
        }
        let is_udp = self.s.key.proto() == Protocol::Udp as u8;
        let written = if is_udp { self.datagram_again() } else { self.segment_again() };
        let Scratch { packet, kept, way, .. } = &mut *self.s;
        if written == WRITTEN && packet.l3() == ETHERNET && self.frame.write::<12>(0, &kept.link).is_err() {
            return Verdict::Drop(Reason::WriteFailed).into();
        }
        let [a, b, c, d, e, f, g, h, i, j, k, l] = kept.link;
        way.ifindex = kept.ifindex;
        (way.destination_mac, way.source_mac) = ([a, b, c, d, e, f], [g, h, i, j, k, l]);
        let verdict = if written != WRITTEN {
            Verdict::Drop(Reason::WriteFailed)
        } else if kept.sent != 0 {
            Verdict::SendOut
        } else {
            Verdict::HandUp
        };
        verdict.into()
    }

    /// Writes the SYN that was kept in the place of what refuses it, with a checksum of its own: the client may have left that to the
    /// device.
    #[inline(never)]
    fn segment_again(&mut self) -> u32 {
        let packet = &self.s.packet;
        let partial =
            packet.proto == Protocol::Tcp as u8 && self.frame.checksum_is_partial(packet.checksum_offset());
        let v4 = packet.is_v4();
        if v4 { self.segment::<{ IPV4_HEADER }>(partial) } else { self.segment::<{ IPV6_HEADER }>(partial) }
    }

    #[inline(always)]
    fn segment<const HEADER: usize>(&mut self, partial: bool) -> u32 {
        const LONGEST: usize = 60;
        const CHECKSUM: usize = 16;
        let Scratch { packet, flow, kept, .. } = &mut *self.s;
        let transport = (kept.length as u32).wrapping_sub(HEADER as u32) & LONGEST as u32;
        if self.frame.resize(packet.l3() + HEADER as u32 + transport).is_err() {
            return !WRITTEN;
        }
        let bytes = &mut kept.packet;
        [bytes[HEADER + CHECKSUM], bytes[HEADER + CHECKSUM + 1]] = [0; 2];
        let pseudo = reject::pseudo_header(&flow.dst, &flow.src, Protocol::Tcp as u8, transport as usize);
        // Behind the segment there are zeros.
        let sum = pseudo.plus(&bytes[HEADER..HEADER + LONGEST]);
        let checksum = if partial { pseudo.fold().to_ne_bytes() } else { sum.checksum() };
        [bytes[HEADER + CHECKSUM], bytes[HEADER + CHECKSUM + 1]] = checksum;
        // SAFETY: not more bytes than there are.
        let stored = unsafe { self.frame.store(packet.l3(), HEADER as u32 + transport, bytes.as_ptr()) };
        if stored.is_ok() { WRITTEN } else { !WRITTEN }
    }

    /// Makes the frame of the datagram that it quotes, as the client has sent it, with a checksum of its own: the one that is quoted may
    /// be none yet.
    #[inline(never)]
    fn datagram_again(&mut self) -> u32 {
        let v4 = self.s.packet.is_v4();
        if v4 { self.datagram::<{ IPV4_HEADER }>() } else { self.datagram::<{ IPV6_HEADER }>() }
    }

    #[inline(always)]
    fn datagram<const HEADER: usize>(&mut self) -> u32 {
        const UDP: usize = UDP_HEADER as usize;
        let Scratch { packet, quoted, flow, kept, sum, .. } = &mut *self.s;
        let (l3, length) = (packet.l3(), quoted.length & u16::MAX as u32);
        let (Some(id), Some(sent_sum)) =
            (self.frame.read::<4>(quoted.l3() + 4), self.frame.read::<2>(quoted.l4() + 6))
        else {
            return !WRITTEN;
        };
        let cut = quoted.l3() - l3;
        if self.frame.cut(cut).is_err() || self.frame.resize(l3 + length).is_err() {
            return !WRITTEN;
        }
        let behind = length.wrapping_sub(HEADER as u32);
        let bytes = &mut kept.packet;
        [bytes[HEADER + 4], bytes[HEADER + 5]] = (behind as u16).to_be_bytes();
        [bytes[HEADER + 6], bytes[HEADER + 7]] = [0; 2];
        if HEADER == IPV4_HEADER {
            [bytes[2], bytes[3]] = (length as u16).to_be_bytes();
            [bytes[4], bytes[5], bytes[6], bytes[7]] = id;
            [bytes[10], bytes[11]] = [0; 2];
            [bytes[10], bytes[11]] = Sum::default().plus(&bytes[..IPV4_HEADER]).checksum();
        } else {
            [bytes[4], bytes[5]] = (behind as u16).to_be_bytes();
        }
        if sent_sum != [0; 2] {
            let headers = reject::pseudo_header(&flow.dst, &flow.src, Protocol::Udp as u8, behind as usize)
                .plus(&bytes[HEADER..HEADER + UDP]);
            sum.begin(headers, l3 + (HEADER + UDP) as u32, l3 + length);
            repeat(SUMS, &mut Summing { frame: &mut *self.frame, sum: &mut *sum });
            let checksum = sum.sum.checksum();
            // Zero would say that there is none.
            let checksum = if checksum == [0; 2] { [0xff; 2] } else { checksum };
            [bytes[HEADER + 6], bytes[HEADER + 7]] = checksum;
        }
        // SAFETY: not more bytes than there are.
        let stored = unsafe { self.frame.store(l3, (HEADER + UDP) as u32, bytes.as_ptr()) };
        if stored.is_ok() { WRITTEN } else { !WRITTEN }
    }

    /// Finds an endpoint for a flow that was tried before.
    #[inline(never)]
    pub(super) fn look_for_another(&mut self) {
        let Scratch {
            opening: Opening { endpoints: Endpoints { set, .. }, service, .. },
            tried,
            attempt,
            moved,
            key,
            ..
        } = &mut *self.s;
        let begin = select::place(*set, Algorithm::Random, Number(draw(key, 0, 0)));
        search(set, begin, *attempt, tried);
        if tried.is_new != 0 {
            count::moved(*service, *moved);
        }
    }
}

/// The sequence number of a TCP segment that was kept.
#[inline(always)]
fn sequence<const HEADER: usize>(kept: &Kept) -> u32 {
    const SEQUENCE: usize = 4;
    let at = HEADER + SEQUENCE;
    let [a, b, c, d] = [kept.packet[at], kept.packet[at + 1], kept.packet[at + 2], kept.packet[at + 3]];
    u32::from_be_bytes([a, b, c, d])
}

/// What the functions that write say of it: a number, for their border.
const WRITTEN: u32 = 0;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const UDP_HEADER: u32 = 8;

/// The sum of a datagram's data, some bytes after the others. In the walk's working memory.
///
/// All zero is a valid value.
#[derive(Clone, Copy)]
pub struct Summed {
    sum: Sum,
    /// Where the next bytes are, and where the last end.
    at: u32,
    end: u32,
    bytes: [u8; SUMMED],
}

impl Summed {
    #[inline(always)]
    fn begin(&mut self, sum: Sum, at: u32, end: u32) {
        (self.sum, self.at, self.end) = (sum, at, end);
    }
}

/// The way through a datagram.
struct Summing<'a, F> {
    frame: &'a mut F,
    sum: &'a mut Summed,
}

impl<F: Frame> Steps for Summing<'_, F> {
    fn step(&mut self, _index: u32) -> Step {
        let Summed { sum, at, end, bytes } = &mut *self.sum;
        let left = end.wrapping_sub(*at);
        if left == 0 || *at > *end {
            return Step::Done;
        }
        let length = if left < SUMMED as u32 { left } else { SUMMED as u32 };
        *bytes = [0; SUMMED];
        // So written, the verifier sees that it is one byte or more, and not more than there is room for.
        let length = (length.wrapping_sub(1) & (SUMMED as u32 - 1)) + 1;
        // SAFETY: see above.
        if unsafe { self.frame.copy(*at, length, bytes.as_mut_ptr()) }.is_err() {
            return Step::Done;
        }
        *sum = sum.plus(&*bytes);
        *at += length;
        Step::Next
    }
}

impl Tried {
    /// The place of another.
    #[inline(always)]
    pub const fn place(&self) -> u32 {
        self.place
    }
}

/// The endpoints that a flow was given to, and the search for another. In the walk's working memory, of which the verifier knows
/// nothing: so it walks a step once, and not for each number that these may have.
///
/// All zero is a valid value.
#[derive(Clone, Copy)]
pub struct Tried {
    /// Their backends; those that are not found yet are as the first.
    backends: [u32; Policy::MOST_TRIES as usize + 1],
    /// How many of them are found.
    found: u32,
    /// The place of another.
    place: u32,
    /// 1 if there is one.
    is_new: u32,
}

/// The search, as its steps see it.
struct Search<'a> {
    set: EndpointSet,
    begin: u32,
    /// How many were tried before.
    before: u32,
    tried: &'a mut Tried,
}

/// Looks in a set that is not empty for an endpoint for a flow that was tried before. A flow goes through the set from a place on,
/// but for the endpoint that it began with: so it comes to none twice, and nothing but its first need be remembered. Where there is no
/// other, it is the place where that began.
#[inline(always)]
fn search(set: &EndpointSet, begin: u32, attempt: Attempt, tried: &mut Tried) {
    let mut at = 0;
    while at < tried.backends.len() {
        tried.backends[at] = attempt.backend();
        at += 1;
    }
    (tried.found, tried.place, tried.is_new) = (1, begin, 0);
    let mut search = Search { set: *set, begin, before: attempt.tries(), tried };
    repeat(LOOKED_AT, &mut search);
}

impl Steps for Search<'_> {
    fn step(&mut self, index: u32) -> Step {
        let Self { set, begin, before, tried } = self;
        if index >= set.count() {
            return Step::Done;
        }
        let place = (*begin + index) % set.count().max(1);
        let Some(id) = SLOTS.get(set.base() + place) else { return Step::Done };
        let backend = Attempt::first(*id).backend();
        // Without branches, which the verifier would walk in every combination.
        let (mut is_new, mut at) = (1, 0);
        while at < tried.backends.len() {
            let differs = (tried.backends[at] ^ backend) as u64;
            is_new &= (differs | differs.wrapping_neg()) >> 63;
            at += 1;
        }
        if is_new == 0 {
            return Step::Next;
        }
        if tried.found >= *before {
            (tried.place, tried.is_new) = (place, 1);
            return Step::Done;
        }
        if let Some(known) = tried.backends.get_mut(tried.found as usize) {
            *known = backend;
        }
        tried.found += 1;
        Step::Next
    }
}
