//! Section 3 of the contract: what happens to a packet.

use super::address::{Range, is_multicast_or_broadcast};
use super::again::Refusal;
use super::cluster::{Kind, ServicePort};
use super::flows::{Flow, Phase, Sender, Tuple};
use super::outcome::{Alternative, Answer, Exit, Outcome, Then, Why};
use super::wire::{self, Flaw, Headers};
use super::{Model, Place, Way, again};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// Who sends the first packet of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Client {
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
        let Some(headers) = wire::parse(frame, place == Place::Early) else {
            return vec![Alternative::new(Outcome::Pass)];
        };
        // Z3, first half.
        if place.is_from_network() && (headers.src.ip().is_loopback() || headers.dst.ip().is_loopback()) {
            return vec![Alternative::new(Outcome::Drop(Why::Loopback))];
        }
        let mut alternatives = self.expect_of(place, frame, &headers);
        if headers.cut {
            // Whether it was ours can no longer be said.
            alternatives.push(Alternative::new(self.nobodys(place, &headers)));
            alternatives.push(Alternative::new(Outcome::Drop(Why::Flawed(Flaw::Lengths))));
        }
        let notes = self.notes(place, &headers);
        alternatives.iter_mut().for_each(|alternative| alternative.notes = notes);
        if place == Place::Early {
            for alternative in &mut alternatives {
                if self.leaves_to_tc(&headers, &alternative.outcome) {
                    // What is masqueraded is left before its reply is looked at.
                    let masqueraded =
                        matches!(alternative.outcome, Outcome::Begun { exit: Exit::Masqueraded, .. });
                    alternative.collided &= !masqueraded;
                    (alternative.outcome, alternative.then) = (Outcome::LeftToTc, Then::Nothing);
                    alternative.rescued = false;
                }
            }
        }
        remember_all_that_look_the_same(&mut alternatives);
        alternatives
    }

    fn expect_of(&self, place: Place, frame: &[u8], headers: &Headers) -> Vec<Alternative> {
        if headers.flaw == Some(Flaw::Fragment) {
            return self.later_fragment(place, headers);
        }
        let refused = headers.quote.and_then(|quote| {
            let about_sender = quote.src.ip() == headers.dst.ip();
            self.refused_by_error(place, frame, headers, &quote).filter(|_| about_sender)
        });
        if let Some(refused) = refused {
            return vec![refused];
        }
        let about = headers.quote.and_then(|quote| self.error_about(place, headers, &quote));
        if let Some(about) = about {
            return vec![about];
        }
        match self.flows.find(Tuple::of(headers)) {
            Some((flow, sender)) if headers.flaw.is_none() => self.known(place, headers, flow, sender),
            Some((flow, sender)) => self.known_but_flawed(place, headers, flow, sender),
            None => self.first(place, headers),
        }
    }

    /// XDP answers nobody, cannot hand a packet up, and sends nothing to a pod, nor what has a VLAN tag: that it leaves to tc,
    /// unwritten, and with it the other fragments.
    fn leaves_to_tc(&self, headers: &Headers, outcome: &Outcome) -> bool {
        match outcome {
            Outcome::Again(..) => true,
            Outcome::Reject(..) | Outcome::Translated(_, Exit::HandUp(_) | Exit::Masqueraded) => true,
            Outcome::Begun { exit: Exit::HandUp(_) | Exit::Masqueraded, .. } => true,
            Outcome::Translated(rewrite, Exit::Forward) => {
                headers.is_tagged() || self.is_pod_here(rewrite.dst.ip())
            }
            Outcome::Begun { to, exit: Exit::Forward, .. } => {
                headers.is_tagged() || self.is_pod_here(to.ip())
            }
            Outcome::Translated(_, Exit::Stack) | Outcome::Begun { exit: Exit::Stack, .. } => false,
            Outcome::Drop(why) => *why == Why::OrphanFragment,
            Outcome::Pass | Outcome::LeftToTc => false,
        }
    }

    fn is_pod_here(&self, ip: IpAddr) -> bool {
        matches!(self.node.way(ip), Way::Out { to_pod: true, .. })
    }

    /// A packet of a flow that is known.
    fn known(&self, place: Place, headers: &Headers, flow: &Flow, sender: Sender) -> Vec<Alternative> {
        if !is_translated_at(flow, sender, place) {
            return vec![Alternative::new(Outcome::Pass)];
        }
        let refusal = again::moves(flow, headers).filter(|_| sender == Sender::Client);
        if let Some(refusal) = refusal {
            let mut leaving = flow.clone();
            leaving.tried.iter_mut().for_each(|tried| tried.refused = Some(refusal));
            let mut alternatives = if place == Place::Early {
                vec![Alternative::new(Outcome::LeftToTc)]
            } else {
                self.first_of(place, headers, Some(&leaving))
            };
            if place != Place::Early {
                for alternative in &mut alternatives {
                    alternative.ends = Some(flow.client);
                    alternative.leaves = Some(Box::new(flow.clone()));
                }
            }
            if flow.endpoint_gone || refusal == Refusal::Silence {
                // Its endpoint may be nobody any more, or have come back; or it has more time.
                let mut stays = flow.clone();
                stays.tried.iter_mut().for_each(|tried| tried.frame.clear());
                alternatives.extend(self.known(place, headers, &stays, sender));
            }
            return alternatives;
        }
        if let Some(refused) = self.refused_by_reset(flow, sender, headers) {
            return vec![refused];
        }
        if is_over(flow, sender, headers) {
            let mut alternatives = self.first(place, headers);
            for alternative in &mut alternatives {
                alternative.ends = Some(flow.client);
                alternative.rebalanced = headers.proto == wire::UDP;
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
            | Outcome::Again(..)
            | Outcome::Begun { .. } => Then::Nothing,
        };
        let rescued = matches!(outcome, Outcome::Translated(..)) && again::rescues(flow, sender, headers);
        vec![Alternative { then, rescued, ..Alternative::new(outcome) }]
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

    pub(super) fn continued(&self, place: Place, headers: &Headers, flow: &Flow, sender: Sender) -> Outcome {
        if let (Sender::Endpoint, Some(link)) = (sender, flow.node_client) {
            let exit = if matches!(place, Place::FromNetwork | Place::Early) {
                Exit::Stack
            } else {
                Exit::HandUp(link)
            };
            return Outcome::Translated(flow.rewrite(sender, false), exit);
        }
        if flow.node_client.is_none() && !flow.source_translated {
            let marked = flow.masqueraded && sender == Sender::Client;
            let exit = if marked { Exit::Masqueraded } else { Exit::Stack };
            return Outcome::Translated(flow.rewrite(sender, false), exit);
        }
        let to = flow.rewrite(sender, false).dst.ip();
        match self.way_past_the_stack(place, headers, to) {
            Ok(exit) => {
                let ttl_falls = exit == Exit::Forward && place != Place::ToNetwork;
                Outcome::Translated(flow.rewrite(sender, ttl_falls), exit)
            }
            Err(outcome) => outcome,
        }
    }

    /// How a packet leaves that does not go through the stack; what becomes of it if it does not.
    #[expect(clippy::result_large_err, reason = "an outcome is no error, and speed no matter")]
    pub(super) fn way_past_the_stack(
        &self,
        place: Place,
        headers: &Headers,
        to: IpAddr,
    ) -> Result<Exit, Outcome> {
        let sent = place == Place::ToNetwork;
        if !sent && headers.ttl <= 1 {
            return Err(Outcome::Reject(Why::TtlExceeded, Answer::TimeExceeded));
        }
        let is_of_link = |ip| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let way = self.node.way(to);
        // No router forwards what comes from there (RFC 4291, 2.5.6), and none leads back.
        if is_of_link(headers.src.ip()) && !(sent && way == Way::Here) {
            return Err(Outcome::Drop(Why::NoRoute));
        }
        match way {
            Way::Here => Ok(if sent { Exit::HandUp(headers.link) } else { Exit::Stack }),
            Way::None => Err(Outcome::Reject(Why::Unreachable, Answer::NoRoute)),
            Way::Out { mtu, .. } if headers.length > mtu => {
                Err(Outcome::Reject(Why::TooBig, Answer::TooBig(mtu)))
            }
            Way::Out { .. } => Ok(Exit::Forward),
        }
    }

    /// A packet of no flow.
    fn first(&self, place: Place, headers: &Headers) -> Vec<Alternative> {
        self.first_of(place, headers, None)
    }

    /// The same of a flow that leaves its endpoint.
    fn first_of(&self, place: Place, headers: &Headers, before: Option<&Flow>) -> Vec<Alternative> {
        let Some(client) = self.client(place, headers) else {
            return vec![Alternative::new(self.nobodys(place, headers))];
        };
        let frontend = self.state.frontend(headers.dst, headers.proto, &self.node);
        // The node's own node ports have no packet path: sockets serve them (P18).
        let frontend = frontend.filter(|(_, kind)| client != Client::Node || *kind != Kind::NodePort);
        if headers.flaw == Some(Flaw::Extensions) {
            return self.unreadable(place, headers, Flaw::Extensions);
        }
        let Some((port, kind)) = frontend else {
            return vec![Alternative::new(self.no_service(place, headers))];
        };
        if let Some(outcome) = self.refused(client, port, kind, headers) {
            let passes = outcome == Outcome::Pass;
            let left = passes && self.node.takes_over;
            return vec![Alternative { left, others: passes && !left, ..Alternative::new(outcome) }];
        }
        let mut alternatives = self.served((place, headers), client, port, kind, before);
        if self.answers_others(headers).is_some() {
            alternatives.push(Alternative { others: true, ..Alternative::new(Outcome::Pass) });
        }
        alternatives
    }

    /// A packet that may begin a flow.
    fn served(
        &self,
        (place, headers): (Place, &Headers),
        client: Client,
        port: &ServicePort,
        kind: Kind,
        before: Option<&Flow>,
    ) -> Vec<Alternative> {
        let endpoints = match chosen_from(port, kind, client) {
            Ok(endpoints) => endpoints,
            Err(Why::NoEndpoints) => {
                return vec![Alternative::new(Outcome::Reject(Why::NoEndpoints, refusal(headers)))];
            }
            Err(why) => return vec![Alternative::new(Outcome::Drop(why))],
        };
        self.begun((place, headers), client, (port, kind), endpoints, before)
    }

    /// A packet to no Service's address (Z4), and what must not leave the node (P13).
    pub(super) fn nobodys(&self, place: Place, headers: &Headers) -> Outcome {
        let in_range = self.node.service_ranges.iter().any(|range| range.contains(headers.dst.ip()));
        if place == Place::ToNetwork && in_range {
            return Outcome::Drop(Why::UnknownService);
        }
        Outcome::Pass
    }

    /// An address and port that no Service has (P13).
    fn no_service(&self, place: Place, headers: &Headers) -> Outcome {
        let to = headers.dst.ip();
        if !self.state.is_closed(to, &self.node) {
            return self.nobodys(place, headers);
        }
        match headers.flaw {
            None if headers.resets() => Outcome::Drop(Why::StrayReset),
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
    fn refused(&self, client: Client, port: &ServicePort, kind: Kind, headers: &Headers) -> Option<Outcome> {
        let (src, dst) = (headers.src.ip(), headers.dst.ip());
        if let Some(flaw) = headers.flaw {
            return Some(Outcome::Drop(Why::Flawed(flaw)));
        }
        // Z3, second half.
        let nobodys = is_multicast_or_broadcast(src) || src.is_unspecified() || src.is_loopback();
        if nobodys || src == dst {
            return Some(Outcome::Drop(Why::BadSource));
        }
        // C5.
        let continues = headers.proto == wire::TCP && !headers.opens();
        if self.node.takes_over && client != Client::Node && continues {
            return Some(Outcome::Pass);
        }
        if let Some(outcome) = self.begins_nothing(headers) {
            return Some(outcome);
        }
        // P10.
        if self.node.cluster_ip_inside_only && client == Client::Outside && kind == Kind::ClusterIp {
            return Some(Outcome::Drop(Why::ClusterIpFromOutside));
        }
        // S2.
        let restricted = match kind {
            Kind::LoadBalancerIp => true,
            Kind::ExternalIp | Kind::NodePort => self.node.source_ranges_everywhere,
            Kind::ClusterIp => false,
        };
        let allowed = |ranges: &Vec<Range>| ranges.iter().any(|range| range.contains(src));
        if restricted && !port.source_ranges.as_ref().is_none_or(allowed) {
            return Some(Outcome::Drop(Why::SourceNotAllowed));
        }
        None
    }

    /// P22: what becomes of a packet that certainly begins no flow.
    fn begins_nothing(&self, headers: &Headers) -> Option<Outcome> {
        let never = headers.resets() || headers.accepts() || headers.proto == wire::SCTP;
        if !headers.opens() && never {
            let why = if headers.resets() { Why::StrayReset } else { Why::StrayAnswer };
            let at_node = self.node.has(headers.dst.ip());
            return Some(if at_node { Outcome::Pass } else { Outcome::Drop(why) });
        }
        (self.answers_others(headers) == Some(true)).then_some(Outcome::Pass)
    }

    /// P22: whether a packet is of a connection that left the node from the port that it comes to; true if that is certain.
    fn answers_others(&self, headers: &Headers) -> Option<bool> {
        let asked = !headers.opens() && self.node.has(headers.dst.ip());
        self.outgoing.get(&Tuple::of(headers)).copied().filter(|_| asked)
    }

    /// P22: what answers a packet that leaves, if that is to be remembered; false if it may be forgotten.
    fn notes(&self, place: Place, headers: &Headers) -> Option<(Tuple, bool)> {
        let leaves = matches!(place, Place::ToNetwork | Place::ToPod) && self.node.has(headers.src.ip());
        let connects = [wire::TCP, wire::UDP].contains(&headers.proto) && !headers.resets();
        if !leaves || !connects || headers.flaw.is_some() {
            return None;
        }
        let tuple = Tuple::of(headers);
        let flow = self.flows.find(tuple).is_some_and(|(flow, sender)| !is_over(flow, sender, headers));
        if flow || self.flows.find(tuple.reversed()).is_some() {
            return None;
        }
        Some((tuple.reversed(), self.state.is_node_port(headers.src, headers.proto, &self.node)))
    }

    /// Whether a flow that begins may have this source: nobody else's replies arrive there (P12).
    pub fn is_free(&self, source: SocketAddr, alternative: &Alternative) -> bool {
        let Then::Begin(flow) = &alternative.then else { return true };
        let reply = Tuple { src: flow.translated.dst, dst: source, proto: flow.client.proto };
        // A client's own port that serves it again ends the flow that is closing; a translated port can be any other.
        let ended = |other: &Flow| other.phase == Phase::Closing && source == flow.client.src;
        self.flows.with_reply(reply).is_none_or(|other| other.client == flow.client || ended(other))
    }

    /// This alternative happened; `source` is the source that the packet left with.
    pub fn accept(
        &mut self,
        (_, frame): (Place, &[u8]),
        headers: Option<&Headers>,
        alternative: &Alternative,
        source: Option<SocketAddr>,
    ) {
        if let Some(flow) = alternative.leaves.as_ref().filter(|flow| flow.client.proto == wire::UDP) {
            self.moved.insert(flow.reply(), (**flow).clone());
        }
        if let Some(client) = alternative.ends {
            self.flows.remove(client);
        }
        if let Some((answer, certain)) = alternative.notes {
            *self.outgoing.entry(answer).or_insert(certain) |= certain;
        }
        if let Some((who, port, had)) = &alternative.remembers {
            self.affinities.remember(*who, port, had.clone());
        }
        if let Some((question, chosen)) = &alternative.answers {
            self.answers.remember(question, chosen);
        }
        if let Some(headers) = headers {
            self.fragments.note(headers, &alternative.outcome);
        }
        match &alternative.then {
            Then::Nothing | Then::Followed(..) => {}
            Then::Refused(client, refusal) => self.flows.refused(*client, *refusal),
            Then::Begin(flow) => {
                let mut flow = (**flow).clone();
                flow.translated.src = source.unwrap_or(flow.translated.src);
                if let Some(tried) = &mut flow.tried {
                    tried.frame = frame.to_vec();
                }
                self.flows.insert(flow);
            }
            Then::Used(client, sender) => {
                if let Some(headers) = headers {
                    self.flows.used(*client, *sender, headers);
                }
            }
        }
    }
}

/// Whether packets of this direction are translated where this one is. Where only the destination changes, the client's
/// are on the way in and the endpoint's on the way out, so that all that lies between sees one flow. Where the source
/// changes too, both are on the way in. What the node itself sends is met where it leaves.
pub(super) fn is_translated_at(flow: &Flow, sender: Sender, place: Place) -> bool {
    let leaving = place == Place::ToNetwork;
    match (sender, flow.node_client.is_some(), flow.source_translated) {
        (Sender::Client, true, _) => leaving,
        (Sender::Client, false, _) => place.is_way_in(),
        (Sender::Endpoint, true, false) => place.is_way_in(),
        // A server in the node's own network: its answer leaves as the question did.
        (Sender::Endpoint, _, true) => place.is_way_in() || leaving,
        (Sender::Endpoint, false, false) => !place.is_way_in(),
    }
}

/// C1: a datagram whose endpoint is gone. C2: a connection goes on; only a new one on the same ports is not bound by it.
fn chooses_anew(flow: &Flow, headers: &Headers) -> bool {
    if headers.proto == wire::UDP {
        return flow.endpoint_gone;
    }
    headers.opens() && (flow.endpoint_gone || flow.phase == Phase::Closing)
}

/// Whether a packet ends the flow that its tuple is of. C4: an end accepts a connection that nobody asked the Service for.
fn is_over(flow: &Flow, sender: Sender, headers: &Headers) -> bool {
    let accepts_another = flow.phase == Phase::Closing && headers.accepts();
    accepts_another || sender == Sender::Client && chooses_anew(flow, headers)
}

/// Where several endpoints lead to the same outcome, what was seen does not tell which one it was.
fn remember_all_that_look_the_same(alternatives: &mut [Alternative]) {
    let all: Vec<_> = alternatives
        .iter()
        .filter_map(|alternative| Some((alternative.outcome.clone(), alternative.remembers.clone()?.2)))
        .collect();
    let chosen: Vec<_> = alternatives
        .iter()
        .filter_map(|alternative| Some((alternative.outcome.clone(), alternative.answers.clone()?.1)))
        .collect();
    for Alternative { outcome, remembers, answers, .. } in alternatives {
        let same = |all: &[(Outcome, BTreeSet<SocketAddr>)]| {
            all.iter()
                .filter(|(other, _)| other == outcome)
                .flat_map(|(_, had)| had.clone())
                .collect::<Vec<_>>()
        };
        if let Some((_, _, had)) = remembers {
            had.extend(same(&all));
        }
        if let Some((_, had)) = answers {
            had.extend(same(&chosen));
        }
    }
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
