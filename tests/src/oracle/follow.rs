//! What has no ports of its own and follows a flow: ICMP errors by what they quote (P19), fragments by the first of their
//! datagram (P20).

use super::flows::{Flow, Sender, Tuple};
use super::outcome::{Alternative, Exit, Outcome, Then, Why};
use super::packets::Client;
use super::wire::{Flaw, Headers, Quote};
use super::{Model, Place};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What tells a datagram from others: where it goes, its identification, and with IPv4 its protocol.
type Datagram = (IpAddr, IpAddr, u32, u8);

/// What may be known of the datagrams that come in fragments: the ports that the first one said, or nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Fragments(BTreeMap<Datagram, Vec<Option<Tuple>>>);

fn datagram(headers: &Headers) -> Datagram {
    let proto = if headers.is_v6() { 0 } else { headers.proto };
    (headers.src.ip(), headers.dst.ip(), headers.fragment.map_or(0, |fragment| fragment.id), proto)
}

impl Fragments {
    /// What may be known of the datagram of a fragment.
    fn of(&self, headers: &Headers) -> Vec<Option<Tuple>> {
        self.0.get(&datagram(headers)).cloned().unwrap_or(vec![None])
    }

    /// A first fragment came by. That of somebody else's datagram may be remembered or not: it makes no difference.
    pub(super) fn note(&mut self, headers: &Headers, outcome: &Outcome) {
        if headers.flaw.is_some() || !headers.fragment.is_some_and(|fragment| fragment.first) {
            return;
        }
        let known = Some(Tuple::of(headers));
        match outcome {
            Outcome::Drop(Why::Loopback) => {}
            Outcome::Pass | Outcome::Drop(Why::UnknownService) => {
                drop(self.0.insert(datagram(headers), vec![None, known]));
            }
            Outcome::Drop(_)
            | Outcome::LeftToTc
            | Outcome::Reject(..)
            | Outcome::Translated(..)
            | Outcome::Again(..)
            | Outcome::Begun { .. } => drop(self.0.insert(datagram(headers), vec![known])),
        }
    }
}

impl Model {
    /// A fragment after the first.
    pub(super) fn later_fragment(&self, place: Place, headers: &Headers) -> Vec<Alternative> {
        let known = self.fragments.of(headers);
        known.into_iter().flat_map(|tuple| self.fragment_of(place, headers, tuple)).collect()
    }

    fn fragment_of(&self, place: Place, headers: &Headers, tuple: Option<Tuple>) -> Vec<Alternative> {
        let Some(tuple) = tuple else {
            return self.unreadable(place, headers, Flaw::Fragment);
        };
        if let Some((flow, sender)) = self.flows.find(tuple) {
            return vec![self.following(place, headers, flow, sender)];
        }
        // Its first fragment was refused or dropped.
        let ours = self.state.is_closed(headers.dst.ip(), &self.node)
            || self.state.frontend(tuple.dst, tuple.proto, &self.node).is_some();
        let nobodys = Alternative::new(self.nobodys(place, headers));
        let orphan = Alternative::new(Outcome::Drop(Why::OrphanFragment));
        // P22.
        let answers = self.outgoing.get(&tuple).filter(|_| self.node.has(headers.dst.ip()));
        match answers {
            _ if !ours || self.client(place, headers).is_none() => vec![nobodys],
            Some(true) => vec![nobodys],
            Some(false) => vec![nobodys, orphan],
            None => vec![orphan],
        }
    }

    /// A packet whose port cannot be told (P20, P21). What is a Service's alone is never forwarded untranslated. That an
    /// address was a Service's, and has no flow any more, may be noticed sooner or later.
    pub(super) fn unreadable(&self, place: Place, headers: &Headers, flaw: Flaw) -> Vec<Alternative> {
        let to = headers.dst.ip();
        let passed = Alternative::new(self.nobodys(place, headers));
        let dropped = Alternative::new(Outcome::Drop(Why::Flawed(flaw)));
        if self.client(place, headers).is_none() || self.node.has(to) {
            return vec![passed];
        }
        if flaw == Flaw::Fragment && !headers.may_have_ports() && !self.state.is_closed(to, &self.node) {
            return vec![passed];
        }
        let lives = self.flows.iter().any(|flow| flow.client.dst.ip() == to);
        if lives || self.state.is_services(to) {
            return vec![dropped];
        }
        if self.lately.contains(&to) { vec![passed, dropped] } else { vec![passed] }
    }

    /// An ICMP error about a packet; `None` if that is of no flow, or nobody's to complain about.
    pub(super) fn error_about(&self, place: Place, headers: &Headers, quote: &Quote) -> Option<Alternative> {
        if quote.src.ip() != headers.dst.ip() {
            return None;
        }
        let back = Tuple { src: quote.dst, dst: quote.src, proto: quote.proto };
        let (flow, sender) = self.flows.find(back)?;
        let mut alternative = self.following(place, headers, flow, sender);
        if let Outcome::Translated(rewrite, exit) = &mut alternative.outcome {
            rewrite.quote = Some((rewrite.dst, rewrite.src));
            // Routers on the way speak in their own name, where that can reach the sender.
            if headers.src.ip() != back.src.ip() && *exit != Exit::Forward {
                rewrite.src = headers.src;
                if place.is_way_in() && *exit != Exit::Masqueraded {
                    *exit = Exit::Stack;
                }
            }
        }
        Some(alternative)
    }

    /// A packet that goes the way of a flow. It is never answered by an ICMP error.
    fn following(&self, place: Place, headers: &Headers, flow: &Flow, sender: Sender) -> Alternative {
        if !super::packets::is_translated_at(flow, sender, place) {
            return Alternative::new(Outcome::Pass);
        }
        match self.continued(place, headers, flow, sender) {
            Outcome::Reject(..) => Alternative::new(Outcome::Drop(Why::Unanswerable)),
            outcome @ Outcome::Translated(..) => {
                Alternative { then: Then::Followed(flow.client, sender), ..Alternative::new(outcome) }
            }
            outcome @ (Outcome::Pass
            | Outcome::LeftToTc
            | Outcome::Drop(_)
            | Outcome::Again(..)
            | Outcome::Begun { .. }) => Alternative::new(outcome),
        }
    }

    /// Who sends a packet that is met here for the first time; `None` if it met its translation where it came in.
    pub(super) fn client(&self, place: Place, headers: &Headers) -> Option<Client> {
        match place {
            // P18: loopback is the node's own.
            Place::FromPod if headers.dst.ip().is_loopback() => None,
            Place::FromPod => Some(Client::Pod),
            Place::Early | Place::FromNetwork => Some(Client::Outside),
            Place::ToNetwork if self.node.has(headers.src.ip()) => Some(Client::Node),
            Place::ToNetwork | Place::ToPod => None,
        }
    }
}
