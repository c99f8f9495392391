//! Section 3 of the contract: what happens to a packet.

use super::address::is_multicast_or_broadcast;
use super::cluster::{Kind, ServicePort};
use super::flows::{Flow, Phase, Sender, Tuple};
use super::wire::{self, Flaw, Headers, Rewrite, flag};
use super::{Model, Place, Way};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// Why a packet is dropped or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Why {
    /// P1.
    NoEndpoints,
    /// P2, P3.
    NoLocalEndpoints,
    /// P10.
    ClusterIpFromOutside,
    /// P13, a ClusterIP.
    ClosedPort,
    /// P13, an address of a service range.
    UnknownService,
    /// Z3, first half.
    Loopback,
    /// Z3, second half.
    BadSource,
    /// It cannot be translated whole (P20, P21).
    Flawed(Flaw),
    /// A TCP reset that belongs to no flow.
    StrayReset,
    /// There is no way to the endpoint.
    NoRoute,
    /// Its time to live ended here.
    TtlExceeded,
    /// It is longer than the way takes.
    TooBig,
    /// P12: no source port was found.
    PortsExhausted,
}

/// What tells a sender no.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A TCP reset.
    Reset,
    /// ICMP (or ICMPv6) port unreachable, from the address that was called.
    PortUnreachable,
    /// Time exceeded, from an address of the node.
    TimeExceeded,
    /// Fragmentation needed, or packet too big, with the bytes that the way takes.
    TooBig(usize),
}

/// Where a translated source comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSource {
    /// The client's own.
    Kept,
    /// This address, with a port of the range (P12).
    Port(IpAddr),
}

/// How a translated packet leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// On to the host's stack.
    Stack,
    /// Past it, routed.
    Forward,
    /// Up the stack as if it had come in on the uplink, with this link-layer destination.
    HandUp([u8; 6]),
}

/// What may become of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// On, byte for byte as it came.
    Pass,
    /// The same; XDP cannot finish it and leaves it to tc.
    LeftToTc,
    /// Silence.
    Drop(Why),
    /// An answer in its place.
    Reject(Why, Answer),
    /// Translated by a flow that is known.
    Translated(Rewrite, Exit),
    /// Translated by a flow that begins with it.
    Begun {
        /// The endpoint.
        to: SocketAddr,
        /// What becomes of the source.
        source: NewSource,
        /// Whether the time to live falls.
        ttl_falls: bool,
        /// How it leaves.
        exit: Exit,
    },
}

/// What is remembered if an alternative turns out to be the one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing new.
    Nothing,
    /// This flow begins; its translated tuple is to be completed by the source that was seen.
    Begin(Box<Flow>),
    /// The flow of this client was used, by whom.
    Used(Tuple, Sender),
}

/// One thing that may happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alternative {
    /// What.
    pub outcome: Outcome,
    /// What it means for flows.
    pub then: Then,
    /// A flow that is over before that.
    pub ends: Option<Tuple>,
    /// A UDP flow left its endpoint (C1).
    pub rebalanced: bool,
    /// Two flows would have had the same reply: a source was translated that would else have been kept.
    pub collided: bool,
}

impl Alternative {
    /// The client of the flow that was used.
    pub fn used(&self) -> Option<Tuple> {
        match &self.then {
            Then::Used(client, _) => Some(*client),
            Then::Nothing | Then::Begin(_) => None,
        }
    }

    fn new(outcome: Outcome) -> Self {
        Self { outcome, then: Then::Nothing, ends: None, rebalanced: false, collided: false }
    }
}

/// Who sends the first packet of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    /// A pod of this node.
    Pod,
    /// This node.
    Node,
    /// Anybody else.
    Outside,
}

impl Model {
    /// All that may become of a frame.
    pub fn expect(&self, place: Place, frame: &[u8]) -> Vec<Alternative> {
        let Some(headers) = wire::parse(frame) else { return vec![Alternative::new(Outcome::Pass)] };
        // Z3, first half.
        if place.is_from_network() && (headers.src.ip().is_loopback() || headers.dst.ip().is_loopback()) {
            return vec![Alternative::new(Outcome::Drop(Why::Loopback))];
        }
        let mut alternatives = match self.flows.find(Tuple::of(&headers)) {
            Some((flow, sender)) if headers.flaw.is_none() => {
                self.known(place, frame, &headers, flow, sender)
            }
            Some((flow, sender)) => self.known_but_flawed(place, &headers, flow, sender),
            None => self.first(place, frame, &headers),
        };
        if headers.cut {
            // Whether it was ours can no longer be said.
            alternatives.push(Alternative::new(Outcome::Pass));
            alternatives.push(Alternative::new(Outcome::Drop(Why::Flawed(Flaw::Lengths))));
        }
        if place != Place::Early {
            return alternatives;
        }
        let mut early = Vec::new();
        for alternative in alternatives {
            if self.leaves_to_tc(&alternative.outcome) {
                early.push(Alternative { outcome: Outcome::LeftToTc, then: Then::Nothing, ..alternative });
            } else {
                early.push(alternative);
            }
        }
        early
    }

    /// XDP answers nobody, cannot hand a packet up, and sends nothing to a pod: that it leaves to tc, unwritten.
    fn leaves_to_tc(&self, outcome: &Outcome) -> bool {
        match outcome {
            Outcome::Reject(..) | Outcome::Translated(_, Exit::HandUp(_)) => true,
            Outcome::Begun { exit: Exit::HandUp(_), .. } => true,
            Outcome::Translated(rewrite, Exit::Forward) => self.is_pod_here(rewrite.dst.ip()),
            Outcome::Begun { to, exit: Exit::Forward, .. } => self.is_pod_here(to.ip()),
            Outcome::Translated(_, Exit::Stack) | Outcome::Begun { exit: Exit::Stack, .. } => false,
            Outcome::Pass | Outcome::LeftToTc | Outcome::Drop(_) => false,
        }
    }

    fn is_pod_here(&self, ip: IpAddr) -> bool {
        matches!(self.node.way(ip), Way::Out { to_pod: true, .. })
    }

    /// A packet of a flow that is known.
    fn known(
        &self,
        place: Place,
        frame: &[u8],
        headers: &Headers,
        flow: &Flow,
        sender: Sender,
    ) -> Vec<Alternative> {
        if !is_translated_at(flow, sender, place) {
            return vec![Alternative::new(Outcome::Pass)];
        }
        if sender == Sender::Client && chooses_anew(flow, headers) {
            let mut alternatives = self.first(place, frame, headers);
            for alternative in &mut alternatives {
                alternative.ends = Some(flow.client);
                alternative.rebalanced = headers.tcp.is_none();
            }
            return alternatives;
        }
        let outcome = self.continued(place, headers, flow, sender);
        let then = match outcome {
            Outcome::Translated(..) => Then::Used(flow.client, sender),
            Outcome::Pass
            | Outcome::LeftToTc
            | Outcome::Drop(_)
            | Outcome::Reject(..)
            | Outcome::Begun { .. } => Then::Nothing,
        };
        vec![Alternative { then, ..Alternative::new(outcome) }]
    }

    fn known_but_flawed(
        &self,
        place: Place,
        headers: &Headers,
        flow: &Flow,
        sender: Sender,
    ) -> Vec<Alternative> {
        let Some(flaw) = headers.flaw.filter(|_| is_translated_at(flow, sender, place)) else {
            return vec![Alternative::new(Outcome::Pass)];
        };
        vec![Alternative::new(Outcome::Drop(Why::Flawed(flaw)))]
    }

    fn continued(&self, place: Place, headers: &Headers, flow: &Flow, sender: Sender) -> Outcome {
        if let (Sender::Endpoint, Some(link)) = (sender, flow.node_client) {
            let exit = if matches!(place, Place::FromNetwork | Place::Early) {
                Exit::Stack
            } else {
                Exit::HandUp(link)
            };
            return Outcome::Translated(flow.rewrite(sender, false), exit);
        }
        if flow.node_client.is_none() && !flow.source_translated {
            return Outcome::Translated(flow.rewrite(sender, false), Exit::Stack);
        }
        let to = flow.rewrite(sender, false).dst.ip();
        let link = flow.node_client.unwrap_or_default();
        match self.way_past_the_stack(place, headers, to, link) {
            Ok(exit) => {
                let ttl_falls = exit == Exit::Forward && place != Place::ToNetwork;
                Outcome::Translated(flow.rewrite(sender, ttl_falls), exit)
            }
            Err(outcome) => outcome,
        }
    }

    /// How a packet leaves that does not go through the stack; what becomes of it if it does not.
    fn way_past_the_stack(
        &self,
        place: Place,
        headers: &Headers,
        to: IpAddr,
        link: [u8; 6],
    ) -> Result<Exit, Outcome> {
        let sent = place == Place::ToNetwork;
        if !sent && headers.ttl <= 1 {
            return Err(Outcome::Reject(Why::TtlExceeded, Answer::TimeExceeded));
        }
        match self.node.way(to) {
            Way::Here => Ok(if sent { Exit::HandUp(link) } else { Exit::Stack }),
            Way::None => Err(Outcome::Drop(Why::NoRoute)),
            Way::Out { mtu, .. } if headers.length > mtu => {
                Err(Outcome::Reject(Why::TooBig, Answer::TooBig(mtu)))
            }
            Way::Out { .. } => Ok(Exit::Forward),
        }
    }

    /// A packet of no flow.
    fn first(&self, place: Place, frame: &[u8], headers: &Headers) -> Vec<Alternative> {
        let client = match place {
            Place::FromPod => Client::Pod,
            Place::Early | Place::FromNetwork => Client::Outside,
            Place::ToNetwork if self.node.has(headers.src.ip()) => Client::Node,
            Place::ToNetwork | Place::ToPod => return vec![Alternative::new(self.nobodys(place, headers))],
        };
        let frontend = self.state.frontend(headers.dst, headers.proto, &self.node);
        // The node's own node ports have no packet path: sockets serve them (P18).
        let frontend = frontend.filter(|(_, kind)| client != Client::Node || *kind != Kind::NodePort);
        let Some((port, kind)) = frontend else {
            return vec![Alternative::new(self.no_service(place, headers))];
        };
        if let Some(outcome) = self.refused(client, kind, headers) {
            return vec![Alternative::new(outcome)];
        }
        let endpoints = match chosen_from(port, kind, client) {
            Ok(endpoints) => endpoints,
            Err(Why::NoEndpoints) => {
                return vec![Alternative::new(Outcome::Reject(Why::NoEndpoints, refusal(headers)))];
            }
            Err(why) => return vec![Alternative::new(Outcome::Drop(why))],
        };
        self.begun(place, frame, headers, client, port, kind, endpoints)
    }

    /// A packet to no Service's address (Z4), and what must not leave the node (P13).
    fn nobodys(&self, place: Place, headers: &Headers) -> Outcome {
        let in_range = self.node.service_ranges.iter().any(|range| range.contains(headers.dst.ip()));
        if place == Place::ToNetwork && in_range {
            return Outcome::Drop(Why::UnknownService);
        }
        Outcome::Pass
    }

    /// An address and port that no Service has (P13).
    fn no_service(&self, place: Place, headers: &Headers) -> Outcome {
        let to = headers.dst.ip();
        if !self.state.cluster_ips.contains(&to) || self.node.has(to) {
            return self.nobodys(place, headers);
        }
        match headers.flaw {
            None if headers.flags() & flag::RST != 0 => Outcome::Drop(Why::StrayReset),
            None => Outcome::Reject(Why::ClosedPort, refusal(headers)),
            // RFC 1122: no error about what may be an error.
            Some(Flaw::Protocol) if headers.proto == wire::ICMP || headers.proto == wire::ICMPV6 => {
                Outcome::Drop(Why::Flawed(Flaw::Protocol))
            }
            Some(Flaw::Protocol) => Outcome::Reject(Why::ClosedPort, refusal(headers)),
            Some(flaw) => Outcome::Drop(Why::Flawed(flaw)),
        }
    }

    /// What a packet to a Service must not be.
    fn refused(&self, client: Client, kind: Kind, headers: &Headers) -> Option<Outcome> {
        let (src, dst) = (headers.src.ip(), headers.dst.ip());
        if let Some(flaw) = headers.flaw {
            return Some(Outcome::Drop(Why::Flawed(flaw)));
        }
        // Z3, second half.
        if is_multicast_or_broadcast(src) || src.is_unspecified() || src == dst {
            return Some(Outcome::Drop(Why::BadSource));
        }
        if headers.flags() & flag::RST != 0 {
            return Some(Outcome::Drop(Why::StrayReset));
        }
        // P10.
        if self.node.cluster_ip_inside_only && client == Client::Outside && kind == Kind::ClusterIp {
            return Some(Outcome::Drop(Why::ClusterIpFromOutside));
        }
        None
    }

    /// A flow to one of these endpoints.
    #[expect(clippy::too_many_arguments, reason = "the walk of a packet, as the contract tells it")]
    fn begun(
        &self,
        place: Place,
        frame: &[u8],
        headers: &Headers,
        client: Client,
        port: &ServicePort,
        kind: Kind,
        endpoints: &BTreeSet<SocketAddr>,
    ) -> Vec<Alternative> {
        let mut alternatives = Vec::new();
        let reply_of = |to| Tuple { src: to, dst: headers.src, proto: headers.proto };
        // Two flows of one client to one endpoint port, through two addresses, would have the same reply.
        let taken = |to: SocketAddr| {
            let other = self.flows.with_reply(reply_of(to));
            other.is_some_and(|other| other.client != Tuple::of(headers) && other.phase != Phase::Closing)
        };
        let collides = endpoints
            .iter()
            .any(|to| taken(*to) && !self.translates_source(client, port, kind, headers, *to));
        for &to in endpoints {
            let translates = self.translates_source(client, port, kind, headers, to);
            if translates || !taken(to) {
                let outcome = self.begin(place, headers, client, to, translates);
                alternatives.push(self.remembered(place, frame, headers, client, port, to, outcome));
            }
            if collides && !translates {
                let outcome = self.begin(place, headers, client, to, true);
                let mut alternative = self.remembered(place, frame, headers, client, port, to, outcome);
                alternative.collided = true;
                alternatives.push(alternative);
            }
        }
        alternatives
    }

    /// Whether the endpoint must see an address of this node in place of the client's (P4 to P7, P9 to P11).
    fn translates_source(
        &self,
        client: Client,
        port: &ServicePort,
        kind: Kind,
        headers: &Headers,
        to: SocketAddr,
    ) -> bool {
        // P11.
        if to.ip() == headers.src.ip() {
            return true;
        }
        let on_this_node = port.sets.usable.get(&to).copied().unwrap_or(false);
        match (client, kind) {
            // P5, P9, P4: the client is a pod of this node.
            (Client::Pod, _) => false,
            // P6, P9: its source is an address of the node already. But a server in the node's own network must not see
            // its own address as its client's.
            (Client::Node, _) => self.node.has(to.ip()),
            // P10.
            (Client::Outside, Kind::ClusterIp) => true,
            // P7.
            (Client::Outside, _) if port.external_local => false,
            // P4. A server in the node's own network answers through the node anyway.
            (Client::Outside, _) if self.node.has(to.ip()) => false,
            (Client::Outside, _) => self.node.masquerade_all || !on_this_node,
        }
    }

    /// The first packet of a flow to this endpoint.
    fn begin(
        &self,
        place: Place,
        headers: &Headers,
        client: Client,
        to: SocketAddr,
        translates: bool,
    ) -> Outcome {
        if !translates && client != Client::Node {
            return Outcome::Begun { to, source: NewSource::Kept, ttl_falls: false, exit: Exit::Stack };
        }
        let exit = match self.way_past_the_stack(place, headers, to.ip(), [0; 6]) {
            Ok(exit) => exit,
            Err(outcome) => return outcome,
        };
        let source = match (translates, self.node.way(to.ip())) {
            (false, _) => NewSource::Kept,
            // From the node's own address to itself would be a martian: the Service's address stands in.
            (true, Way::Here) => NewSource::Port(headers.dst.ip()),
            (true, Way::Out { .. } | Way::None) => {
                NewSource::Port(self.node.source(headers.is_v6()).unwrap_or(headers.dst.ip()))
            }
        };
        let ttl_falls = exit == Exit::Forward && place != Place::ToNetwork;
        Outcome::Begun { to, source, ttl_falls, exit }
    }

    #[expect(clippy::too_many_arguments, reason = "the walk of a packet, as the contract tells it")]
    fn remembered(
        &self,
        place: Place,
        frame: &[u8],
        headers: &Headers,
        client: Client,
        port: &ServicePort,
        to: SocketAddr,
        mut outcome: Outcome,
    ) -> Alternative {
        let mut link = [0; 6];
        link.copy_from_slice(&frame[6..12]);
        if let Outcome::Begun { exit: exit @ Exit::HandUp(_), .. } = &mut outcome {
            *exit = Exit::HandUp(link);
        }
        // The node's own flow is entered before its way is known: a packet that is too long for it does not end it.
        let entered = matches!(outcome, Outcome::Begun { .. })
            || client == Client::Node && place == Place::ToNetwork && !self.node.has(to.ip());
        let source_translated = matches!(outcome, Outcome::Begun { source: NewSource::Port(_), .. });
        let flow = Flow {
            client: Tuple::of(headers),
            translated: Tuple { src: headers.src, dst: to, proto: headers.proto },
            port: port.id.clone(),
            local: port.sets.usable.get(&to).copied().unwrap_or(false),
            source_translated,
            node_client: (client == Client::Node).then_some(link),
            phase: Phase::HalfOpen { answered: None },
            endpoint_gone: false,
        };
        let then = if entered { Then::Begin(Box::new(flow)) } else { Then::Nothing };
        Alternative { then, ..Alternative::new(outcome) }
    }

    /// Whether a flow that begins may have this source: nobody else's replies arrive there (P12).
    pub fn is_free(&self, source: SocketAddr, alternative: &Alternative) -> bool {
        let Then::Begin(flow) = &alternative.then else { return true };
        let reply = Tuple { src: flow.translated.dst, dst: source, proto: flow.client.proto };
        // A client's own port that serves it again ends the flow that is closing; a translated port can be any other.
        let ended = |other: &Flow| other.phase == Phase::Closing && !flow.source_translated;
        self.flows.with_reply(reply).is_none_or(|other| other.client == flow.client || ended(other))
    }

    /// This alternative happened; `source` is the source that the packet left with.
    pub fn accept(
        &mut self,
        headers: Option<&Headers>,
        alternative: &Alternative,
        source: Option<SocketAddr>,
    ) {
        if let Some(client) = alternative.ends {
            self.flows.remove(client);
        }
        match &alternative.then {
            Then::Nothing => {}
            Then::Begin(flow) => {
                let mut flow = (**flow).clone();
                flow.translated.src = source.unwrap_or(flow.translated.src);
                self.flows.insert(flow);
            }
            Then::Used(client, sender) => {
                let phase = self.flows.find(*client).zip(headers);
                let phase = phase.and_then(|((flow, _), headers)| flow.after(*sender, headers));
                self.flows.set_phase(*client, phase);
            }
        }
    }
}

/// Whether packets of this direction are translated where this one is. Where only the destination changes, the client's
/// are on the way in and the endpoint's on the way out, so that all that lies between sees one flow. Where the source
/// changes too, both are on the way in. What the node itself sends is met where it leaves.
fn is_translated_at(flow: &Flow, sender: Sender, place: Place) -> bool {
    let leaving = place == Place::ToNetwork;
    match (sender, flow.node_client.is_some(), flow.source_translated) {
        (Sender::Client, true, _) => leaving,
        (Sender::Client, false, _) => place.is_way_in(),
        // A server in the node's own network: its answer leaves as the question did.
        (Sender::Endpoint, true, true) => leaving,
        (Sender::Endpoint, true, false) => place.is_way_in(),
        (Sender::Endpoint, false, true) => place.is_way_in() || leaving,
        (Sender::Endpoint, false, false) => !place.is_way_in(),
    }
}

/// C1: a datagram whose endpoint is gone. C2: a connection goes on; only a new one on the same ports is not bound by it.
fn chooses_anew(flow: &Flow, headers: &Headers) -> bool {
    if headers.tcp.is_none() {
        return flow.endpoint_gone;
    }
    headers.is_tcp_with(flag::SYN) && (flow.endpoint_gone || flow.phase == Phase::Closing)
}

/// P1: TCP is reset, all else meets port unreachable.
fn refusal(headers: &Headers) -> Answer {
    if headers.proto == wire::TCP { Answer::Reset } else { Answer::PortUnreachable }
}

/// The endpoints that a client may have (P1 to P9).
fn chosen_from(port: &ServicePort, kind: Kind, client: Client) -> Result<&BTreeSet<SocketAddr>, Why> {
    let sets = &port.sets;
    // P1.
    if !sets.any {
        return Err(Why::NoEndpoints);
    }
    let local_only = match kind {
        Kind::ClusterIp => port.internal_local,
        // P5, P6, P7.
        Kind::LoadBalancerIp | Kind::ExternalIp | Kind::NodePort => {
            port.external_local && client == Client::Outside
        }
    };
    let set = if local_only { &sets.local } else { &sets.cluster };
    // P2, P3.
    if set.is_empty() { Err(Why::NoLocalEndpoints) } else { Ok(set) }
}
