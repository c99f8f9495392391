//! Section 5 of the contract: what is remembered of flows. Both directions of a flow live and die together (C4).

use super::again::{Refusal, Tried};
use super::cluster::{PortId, State};
use super::wire::{Headers, Rewrite, UDP, chunk, flag};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// How far beyond the number that the SYN-ACK promised a client's acknowledgement may lie and still prove that it saw it.
const PROOF_WINDOW: u32 = 1 << 16;

/// From where to where, by which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    /// Source.
    pub src: SocketAddr,
    /// Destination.
    pub dst: SocketAddr,
    /// IP protocol number.
    pub proto: u8,
}

impl Tuple {
    /// A packet's.
    pub const fn of(headers: &Headers) -> Self {
        Self { src: headers.src, dst: headers.dst, proto: headers.proto }
    }

    /// The opposite direction.
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self { src: self.dst, dst: self.src, proto: self.proto }
    }
}

/// How far a flow is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The client has not yet proved that it saw an answer.
    HalfOpen {
        /// The endpoint answered; with TCP, the number that the client will acknowledge.
        answered: Option<u32>,
    },
    /// Both ends know of it.
    Established {
        /// The client sent a FIN.
        client_fin: bool,
        /// The endpoint sent a FIN.
        endpoint_fin: bool,
    },
    /// It ended or was reset.
    Closing,
}

/// What the TCP segments of one end have said: the number behind the last that it used, and what it has acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Said {
    end: Option<u32>,
    acked: Option<u32>,
}

/// How far a segment may be from those before it.
const NEAR: i32 = 1 << 21;

impl Said {
    /// By a segment.
    pub(super) fn by(headers: &Headers) -> Self {
        let Some((flags, seq, ack)) = headers.tcp else { return Self::default() };
        let used =
            headers.data as u32 + u32::from(flags & flag::SYN != 0) + u32::from(flags & flag::FIN != 0);
        let acked = (flags & flag::ACK != 0 && ack != 0).then_some(ack);
        Self { end: Some(seq.wrapping_add(used)), acked }
    }

    /// Whether the next number is this one.
    pub(super) fn ends_at(&self, number: u32) -> bool {
        self.end == Some(number)
    }

    fn admits(&self, segment: Self) -> bool {
        let near = |before: Option<u32>, now: Option<u32>| {
            before
                .zip(now)
                .is_none_or(|(before, now)| (-NEAR..NEAR).contains(&(now.wrapping_sub(before) as i32)))
        };
        near(self.end, segment.end) && near(self.acked, segment.acked)
    }

    fn then(&self, segment: Self) -> Self {
        let later = |before: Option<u32>, now: Option<u32>| match (before, now) {
            (Some(before), Some(now)) if (now.wrapping_sub(before) as i32) <= 0 => Some(before),
            (before, now) => now.or(before),
        };
        Self { end: later(self.end, segment.end), acked: later(self.acked, segment.acked) }
    }
}

/// A flow from a client to an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The client's packets as they arrive.
    pub client: Tuple,
    /// The client's packets as they leave.
    pub translated: Tuple,
    /// The service port.
    pub port: PortId,
    /// The endpoint is on this node.
    pub local: bool,
    /// The source was translated too.
    pub source_translated: bool,
    /// Netfilter translates it.
    pub masqueraded: bool,
    /// The client is this node itself: the link-layer address that its packets came from.
    pub node_client: Option<[u8; 6]>,
    /// How far it is.
    pub phase: Phase,
    /// What the client's segments of TCP have said.
    pub client_said: Said,
    /// The same of the endpoint's.
    pub endpoint_said: Said,
    /// What it began with, and where it was; `None` where it stays (L5).
    pub tried: Option<Tried>,
    /// Its endpoint was missing or did not serve at some moment since it began.
    pub endpoint_gone: bool,
}

/// Who sent a packet of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The client.
    Client,
    /// The endpoint.
    Endpoint,
}

impl Flow {
    /// The endpoint's packets as they arrive.
    pub const fn reply(&self) -> Tuple {
        self.translated.reversed()
    }

    /// What a packet of this flow becomes.
    pub const fn rewrite(&self, sender: Sender, ttl_falls: bool) -> Rewrite {
        match sender {
            Sender::Client => {
                Rewrite { src: self.translated.src, dst: self.translated.dst, ttl_falls, quote: None }
            }
            Sender::Endpoint => {
                Rewrite { src: self.client.dst, dst: self.client.src, ttl_falls, quote: None }
            }
        }
    }

    /// The phase after a packet that was translated; `None` if the flow is over and leaves nothing behind.
    pub(super) fn after(&self, sender: Sender, headers: &Headers) -> Option<Phase> {
        match self.phase {
            Phase::HalfOpen { answered } => self.half_open_after(sender, headers, answered),
            Phase::Established { client_fin, endpoint_fin } if headers.proto != UDP => {
                let fin = headers.flags() & (flag::FIN | flag::RST) == flag::FIN
                    && self.admits(sender, headers)
                    || headers.has_chunk(chunk::SHUTDOWN)
                    || headers.has_chunk(chunk::SHUTDOWN_ACK);
                let client_fin = client_fin || fin && sender == Sender::Client;
                let endpoint_fin = endpoint_fin || fin && sender == Sender::Endpoint;
                let ended = self.is_reset(sender, headers) || headers.has_chunk(chunk::SHUTDOWN_COMPLETE);
                let over = ended || client_fin && endpoint_fin;
                Some(if over { Phase::Closing } else { Phase::Established { client_fin, endpoint_fin } })
            }
            phase @ (Phase::Established { .. } | Phase::Closing) => Some(phase),
        }
    }

    const fn said(&self, sender: Sender) -> (Said, Said) {
        match sender {
            Sender::Client => (self.client_said, self.endpoint_said),
            Sender::Endpoint => (self.endpoint_said, self.client_said),
        }
    }

    fn admits(&self, sender: Sender, headers: &Headers) -> bool {
        self.said(sender).0.admits(Said::by(headers))
    }

    /// C4: whether it ends the flow at once: a reset of TCP has the number that its receiver waits for, or the one after its sender's
    /// last, or it answers a SYN.
    fn is_reset(&self, sender: Sender, headers: &Headers) -> bool {
        let Some((_, seq, _)) = headers.tcp else { return headers.resets() };
        let ((own, other), segment) = (self.said(sender), Said::by(headers));
        let refuses = matches!(self.phase, Phase::HalfOpen { .. })
            && segment.acked.is_some()
            && segment.acked == other.end;
        let unknown = own.end.is_none() && other.end.is_none();
        headers.resets() && (other.acked == Some(seq) || own.end == Some(seq) || refuses || unknown)
    }

    /// Follows the numbers of both ends' segments.
    pub(super) fn hear(&mut self, sender: Sender, headers: &Headers) {
        let half_open = matches!(self.phase, Phase::HalfOpen { .. });
        let segment = Said::by(headers);
        if half_open && sender == Sender::Client && headers.is_tcp_with(flag::SYN) {
            self.client_said = segment;
        } else if half_open && sender == Sender::Endpoint && headers.is_tcp_with(flag::SYN | flag::ACK) {
            self.endpoint_said = segment;
            let seq = headers.tcp.map(|(_, seq, _)| seq.wrapping_add(1));
            self.client_said = Said { end: segment.acked, acked: seq };
        } else if headers.flags() & (flag::SYN | flag::RST) == 0 && self.admits(sender, headers) {
            match sender {
                Sender::Client => self.client_said = self.client_said.then(segment),
                Sender::Endpoint => self.endpoint_said = self.endpoint_said.then(segment),
            }
        }
    }

    fn half_open_after(&self, sender: Sender, headers: &Headers, answered: Option<u32>) -> Option<Phase> {
        let established = |client_fin| Some(Phase::Established { client_fin, endpoint_fin: false });
        if headers.proto == UDP {
            return match (sender, answered) {
                (Sender::Endpoint, _) => Some(Phase::HalfOpen { answered: Some(0) }),
                (Sender::Client, Some(_)) => established(false),
                (Sender::Client, None) => Some(self.phase),
            };
        }
        if self.is_reset(sender, headers) {
            // A connection that was refused or given up.
            return None;
        }
        // Picked up in its middle: the endpoint goes on.
        if sender == Sender::Endpoint
            && headers.is_tcp_with(flag::ACK)
            && answered.is_none()
            && self.client_said.acked.is_some()
        {
            return Some(Phase::HalfOpen { answered: headers.tcp.map(|(_, seq, _)| seq) });
        }
        // What the endpoint promises, and what proves that the client saw it: a number, or SCTP's tag.
        let (promise, proof) = match (headers.tcp, headers.sctp) {
            (Some((_, seq, ack)), _) => (
                headers.is_tcp_with(flag::SYN | flag::ACK).then(|| seq.wrapping_add(1)),
                answered.is_some_and(|promised| {
                    headers.is_tcp_with(flag::ACK) && ack.wrapping_sub(promised) < PROOF_WINDOW
                }),
            ),
            (None, Some((_, tag, asked))) => {
                (headers.has_chunk(chunk::INIT_ACK).then_some(asked), answered == Some(tag))
            }
            (None, None) => (None, false),
        };
        match (sender, promise) {
            (Sender::Endpoint, Some(promise)) => Some(Phase::HalfOpen { answered: Some(promise) }),
            (Sender::Client, _) if proof => established(headers.flags() & flag::FIN != 0),
            (Sender::Endpoint | Sender::Client, _) => Some(self.phase),
        }
    }
}

/// The flows that live, by the client's tuple.
#[derive(Clone, Debug, Default)]
pub(super) struct Flows {
    by_client: BTreeMap<Tuple, Flow>,
    by_reply: BTreeMap<Tuple, Tuple>,
}

impl Flows {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Flow> {
        self.by_client.values()
    }

    /// The flow that a packet belongs to, and who sent it.
    pub(super) fn find(&self, tuple: Tuple) -> Option<(&Flow, Sender)> {
        if let Some(flow) = self.by_client.get(&tuple) {
            return Some((flow, Sender::Client));
        }
        let client = self.by_reply.get(&tuple)?;
        Some((&self.by_client[client], Sender::Endpoint))
    }

    /// The flow whose endpoint's packets have this tuple.
    pub(super) fn with_reply(&self, reply: Tuple) -> Option<&Flow> {
        self.by_reply.get(&reply).map(|client| &self.by_client[client])
    }

    /// Enters a flow. One that it displaces is gone as a whole.
    pub(super) fn insert(&mut self, flow: Flow) {
        self.remove(flow.client);
        if let Some(client) = self.by_reply.get(&flow.reply()).copied() {
            self.remove(client);
        }
        self.by_reply.insert(flow.reply(), flow.client);
        self.by_client.insert(flow.client, flow);
    }

    pub(super) fn remove(&mut self, client: Tuple) {
        if let Some(flow) = self.by_client.remove(&client) {
            self.by_reply.remove(&flow.reply());
        }
    }

    /// A packet of a flow was translated.
    pub(super) fn used(&mut self, client: Tuple, sender: Sender, headers: &Headers) {
        let Some(flow) = self.by_client.get_mut(&client) else { return };
        let phase = flow.after(sender, headers);
        flow.hear(sender, headers);
        self.set_phase(client, phase);
    }

    /// The endpoint of a client's flow has refused it.
    pub(super) fn refused(&mut self, client: Tuple, refusal: Refusal) {
        if let Some(tried) = self.by_client.get_mut(&client).and_then(|flow| flow.tried.as_mut()) {
            tried.refused = Some(refusal);
        }
    }

    fn set_phase(&mut self, client: Tuple, phase: Option<Phase>) {
        match (phase, self.by_client.get_mut(&client)) {
            (Some(phase), Some(flow)) => flow.phase = phase,
            (None, Some(_)) => self.remove(client),
            (_, None) => {}
        }
    }

    /// Notes which endpoints no longer serve. One that comes back does not get its flows back.
    pub(super) fn endpoints_changed(&mut self, state: &State) {
        for flow in self.by_client.values_mut() {
            let port = state.ports.iter().find(|port| port.id == flow.port);
            let usable = port.and_then(|port| port.sets.usable.get(&flow.translated.dst));
            flow.endpoint_gone |= usable.is_none();
            flow.tried.iter_mut().for_each(|tried| tried.sure = false);
        }
    }
}
