//! Second tries (L5): what an endpoint refuses comes once more, as its client sent it, and goes to another.

use super::flows::{Flow, Phase, Sender, Tuple};
use super::outcome::{Alternative, Outcome, Then};
use super::wire::{self, ETHERNET, Headers, Quote, TCP, UDP, flag};
use super::{Model, Place};
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// How often a flow gets another endpoint, where its Service says nothing of it.
const TRIES: usize = 3;

/// How a flow was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refusal {
    /// It was silent: TCP.
    Silence,
    /// By a TCP reset.
    Reset,
    /// There is no way: TCP.
    Unreachable,
    /// An ICMP error about a datagram of UDP.
    Datagram,
}

/// What a flow began with, and where it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// Where its first packet was met.
    pub place: Place,
    /// That packet; empty until it was sent.
    pub frame: Vec<u8>,
    /// The endpoints that it had.
    pub endpoints: BTreeSet<SocketAddr>,
    /// How often it got another.
    pub tries: usize,
    /// Why it is about to leave the one that it has.
    pub refused: Option<Refusal>,
    /// The cluster has not changed since it began.
    pub sure: bool,
}

impl Tried {
    /// Of a flow that begins with this packet at one of several endpoints; `None` where it stays.
    pub(super) fn begun(
        place: Place,
        headers: &Headers,
        several: bool,
        to: SocketAddr,
        before: Option<&Flow>,
    ) -> Option<Self> {
        let before = before.and_then(|flow| flow.tried.as_ref());
        let mut endpoints = before.map(|tried| tried.endpoints.clone()).unwrap_or_default();
        endpoints.insert(to);
        let tries = before.map_or(0, |tried| tried.tries + 1);
        let sure = before.is_none_or(|tried| tried.sure);
        (several && can_be_moved(headers) && !headers.is_tagged()).then_some(Self {
            place: if place == Place::Early { Place::FromNetwork } else { place },
            frame: Vec::new(),
            endpoints,
            tries,
            refused: None,
            sure,
        })
    }

    fn number(&self) -> Option<u32> {
        let headers = wire::parse(&self.frame, false)?;
        headers.tcp.map(|(_, seq, _)| seq.wrapping_add(1))
    }
}

/// A SYN without data, or a datagram, without options of IP.
fn can_be_moved(headers: &Headers) -> bool {
    let plain = headers.l4 - headers.l3 == if headers.is_v6() { 40 } else { 20 };
    let bare = headers.opens() && headers.data == 0 && headers.flags() & flag::FIN == 0;
    plain && (headers.proto == UDP || headers.proto == TCP && bare)
}

/// Whether nothing was heard of a flow's endpoint, and there are tries left.
fn is_open(flow: &Flow) -> bool {
    let unanswered = flow.phase == Phase::HalfOpen { answered: None };
    unanswered && flow.tried.as_ref().is_some_and(|tried| tried.tries < TRIES && !tried.frame.is_empty())
}

/// Why a client's packet is given to another endpoint. Whether one that is silent was so for long enough only a clock can tell.
pub(super) fn moves(flow: &Flow, headers: &Headers) -> Option<Refusal> {
    let refused = flow.tried.as_ref().and_then(|tried| tried.refused);
    let refused = refused.or_else(|| (headers.proto == TCP).then_some(Refusal::Silence))?;
    let same = headers.proto == UDP || flow.client_said == super::flows::Said::by(headers);
    (is_open(flow) && can_be_moved(headers) && same).then_some(refused)
}

/// Whether an endpoint's packet is the answer that a second try was made for.
pub(super) fn rescues(flow: &Flow, sender: Sender, headers: &Headers) -> bool {
    let answers = headers.proto == UDP || headers.accepts();
    let unanswered = flow.phase == Phase::HalfOpen { answered: None };
    sender == Sender::Endpoint
        && answers
        && unanswered
        && flow.tried.as_ref().is_some_and(|tried| tried.tries > 0)
}

impl Model {
    /// A TCP reset that answers a flow's SYN.
    pub(super) fn refused_by_reset(
        &self,
        flow: &Flow,
        sender: Sender,
        headers: &Headers,
    ) -> Option<Alternative> {
        let (flags, _, ack) = headers.tcp?;
        let both = flag::RST | flag::ACK;
        let refuses = sender == Sender::Endpoint && flags & both == both;
        if !refuses || !is_open(flow) || !self.is_number(flow, ack) {
            return None;
        }
        self.again(flow, Refusal::Reset, segment(flow)?)
    }

    fn is_number(&self, flow: &Flow, ack: u32) -> bool {
        flow.tried.as_ref().and_then(Tried::number) == Some(ack) && flow.client_said.ends_at(ack)
    }

    /// An ICMP error about what a flow began with.
    pub(super) fn refused_by_error(
        &self,
        place: Place,
        frame: &[u8],
        headers: &Headers,
        quote: &Quote,
    ) -> Option<Alternative> {
        let key = Tuple { src: quote.dst, dst: quote.src, proto: quote.proto };
        let end = headers.end().min(frame.len());
        let word = frame.get(headers.l4..headers.l4 + 2)?;
        let (no_way, port) = match (headers.is_v6(), word) {
            (false, [3, 0 | 1]) | (true, [1, 0 | 3]) => (true, false),
            (false, [3, 3]) | (true, [1, 4]) => (false, true),
            _ => return None,
        };
        let before = self.moved.get(&key).filter(|_| quote.proto == UDP);
        let (known, sender) = match self.flows.find(key) {
            Some(found) => found,
            None => (before?, Sender::Endpoint),
        };
        if sender != Sender::Endpoint || !super::packets::is_translated_at(known, sender, place) {
            return None;
        }
        if quote.proto == TCP {
            let seq = frame.get(quote.l4 + 4..quote.l4 + 8).filter(|_| quote.l4 + 8 <= end)?;
            let number = (wire::number(seq) as u32).wrapping_add(1);
            let refused = no_way && is_open(known) && self.is_number(known, number);
            return if refused { self.again(known, Refusal::Unreachable, segment(known)?) } else { None };
        }
        if quote.proto != UDP || !(no_way || port && headers.src.ip() == key.src.ip()) {
            return None;
        }
        let (client, _) = self.flows.find(known.client)?;
        let datagram = datagram(client, frame, headers, quote, end)?;
        if client.translated.dst == key.src {
            return if is_open(client) { self.again(client, Refusal::Datagram, datagram) } else { None };
        }
        // It follows what was refused before.
        let place = client.tried.as_ref()?.place;
        Some(Alternative::new(Outcome::Again(place, datagram)))
    }

    fn again(&self, flow: &Flow, refusal: Refusal, frame: Vec<u8>) -> Option<Alternative> {
        let place = flow.tried.as_ref()?.place;
        let then = Then::Refused(flow.client, refusal);
        Some(Alternative { then, ..Alternative::new(Outcome::Again(place, frame)) })
    }
}

/// The SYN of a flow, with a right checksum.
fn segment(flow: &Flow) -> Option<Vec<u8>> {
    let frame = &flow.tried.as_ref()?.frame;
    let headers = wire::parse(frame, false)?;
    let mut again = frame.get(..headers.end())?.to_vec();
    sum(&mut again, &headers, 16);
    Some(again)
}

/// The datagram that an error quotes, if it is all there, as the flow's client sent it.
fn datagram(flow: &Flow, frame: &[u8], error: &Headers, quote: &Quote, end: usize) -> Option<Vec<u8>> {
    let first = &flow.tried.as_ref()?.frame;
    let plain = if error.is_v6() { 40 } else { 20 };
    let length = wire::number(frame.get(quote.l3 + if error.is_v6() { 4 } else { 2 }..)?.get(..2)?);
    let length = if error.is_v6() { length + 40 } else { length };
    let whole = quote.l4 - quote.l3 == plain && quote.l3 + length <= end && length > plain + 8;
    // A fragment is not all of it.
    let cut_up = !error.is_v6() && wire::number(&frame[quote.l3 + 6..quote.l3 + 8]) & 0x3fff != 0;
    if !whole || cut_up || first.is_empty() {
        return None;
    }
    let mut again = first.get(..ETHERNET + plain + 8)?.to_vec();
    again.extend(&frame[quote.l4 + 8..quote.l3 + length]);
    let behind = (length - plain) as u16;
    again[ETHERNET + plain + 4..ETHERNET + plain + 6].copy_from_slice(&behind.to_be_bytes());
    if error.is_v6() {
        again[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&behind.to_be_bytes());
    } else {
        again[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&(length as u16).to_be_bytes());
        again[ETHERNET + 4..ETHERNET + 8].copy_from_slice(&frame[quote.l3 + 4..quote.l3 + 8]);
        wire::sum_header(&mut again);
    }
    let at = ETHERNET + plain + 6;
    again[at..at + 2].fill(0);
    if frame[quote.l4 + 6..quote.l4 + 8] != [0, 0] {
        let headers = wire::parse(&again, false)?;
        sum(&mut again, &headers, 6);
        if again[at..at + 2] == [0, 0] {
            again[at..at + 2].fill(0xff);
        }
    }
    Some(again)
}

/// Writes the checksum of a whole packet, whose field is so far behind its transport header.
fn sum(frame: &mut [u8], headers: &Headers, field: usize) {
    let at = headers.l4 + field;
    frame[at..at + 2].fill(0);
    let sum = wire::checksum(headers, &frame[headers.l4..]);
    frame[at..at + 2].copy_from_slice(&sum);
}
