//! Second tries: a connection whose endpoint is silent gets another (L5). It has carried no data, so that it can be moved.

use super::{Walk, draw, life};
use crate::flow;
use crate::frame::Frame;
use crate::maps::SLOTS;
use crate::repeat::{Step, Steps, repeat};
use crate::scratch::{Opening, Scratch};
use crate::select::{self, Number};
use crate::service::{self, Endpoints};
use dataplane_common::Protocol;
use dataplane_common::flow::{Attempt, Flow, Stage};
use dataplane_common::service::{Algorithm, EndpointSet, Policy};

/// Eighths of a tick for which an endpoint may be silent: no stack repeats a SYN earlier, and a network that doubles packets is quicker.
const PATIENCE: u32 = 4;

/// How many slots are looked at for an endpoint that was not tried: a set in which one has a thousand times the weight of all others is
/// none to choose from.
const LOOKED_AT: u32 = 1_024;

impl<F: Frame> Walk<'_, F> {
    /// Whether a client's packet is a SYN that comes again because its endpoint is silent, and may be given to another.
    #[inline(always)]
    pub(super) fn tries_again(&self, stage: Stage, service: u32) -> bool {
        let (packet, flow) = (&self.s.packet, &self.s.flow);
        let plain = if packet.is_v4() { 20 } else { 40 };
        let segment = life::numbers(packet);
        // Without data: a SYN uses one number.
        let same = segment == flow.numbers && segment.end == packet.seq.wrapping_add(1);
        let unanswered = stage == Stage::HalfOpen && !flow.has(Flow::ANSWERED);
        let is_plain = packet.proto == Protocol::Tcp as u8 && packet.network_header() == plain;
        if !(unanswered && is_plain && same && flow.attempt().age(flow::moment()) >= PATIENCE) {
            return false;
        }
        service::has_others(service, flow.attempt().tries())
    }

    /// Finds an endpoint for a flow that was tried before.
    #[inline(never)]
    pub(super) fn look_for_another(&mut self) {
        let Scratch {
            opening: Opening { endpoints: Endpoints { set, .. }, .. }, tried, attempt, key, ..
        } = &mut *self.s;
        let begin = select::place(*set, Algorithm::Random, Number(draw(key, 0, 0)));
        search(set, begin, *attempt, tried);
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
    (tried.found, tried.place) = (1, begin);
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
            tried.place = place;
            return Step::Done;
        }
        if let Some(known) = tried.backends.get_mut(tried.found as usize) {
            *known = backend;
        }
        tried.found += 1;
        Step::Next
    }
}
