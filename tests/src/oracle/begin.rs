//! How a flow begins: to which endpoint, and with which source (P4 to P12, S1).

use super::again::Tried;
use super::choice::Answers;
use super::cluster::{Kind, ServicePort};
use super::flows::{Flow, Phase, Said, Tuple};
use super::outcome::{Alternative, Exit, NewSource, Outcome, Then};
use super::packets::Client;
use super::wire::Headers;
use super::{Model, Place, Way};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// What a flow that begins changes beside its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Nothing.
    Nothing,
    /// The source port.
    Port,
    /// The source address and port.
    Source,
}

/// What a flow that begins changes, and whether netfilter translates its source later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Changes {
    here: Change,
    masqueraded: bool,
}

impl Model {
    /// A flow to one of these endpoints.
    pub(super) fn begun(
        &self,
        (place, headers): (Place, &Headers),
        client: Client,
        (port, kind): (&ServicePort, Kind),
        endpoints: &BTreeSet<SocketAddr>,
        before: Option<&Flow>,
    ) -> Vec<Alternative> {
        let several = endpoints.len() > 1;
        // S1: the node is one client, whichever of its addresses it calls from.
        let src = headers.src.ip();
        let own = self.node.source(headers.is_v6()).filter(|_| client == Client::Node);
        let who = own.unwrap_or(src);
        let all = endpoints.len();
        let bound = self.affinities.narrow(who, port, endpoints);
        let question = Answers::question(port, (headers.src, headers.dst), who, endpoints)
            .filter(|_| bound.len() == all && before.is_none());
        let narrowed = self.answers.narrow(question.as_ref(), &bound);
        let is_bound = narrowed.len() < all;
        // L5: not one that was tried, whatever the algorithm and affinity say.
        let tried = before.and_then(|flow| flow.tried.as_ref());
        let others: BTreeSet<_> = endpoints
            .iter()
            .filter(|to| tried.is_none_or(|tried| !tried.endpoints.contains(to)))
            .copied()
            .collect();
        let endpoints = &match tried {
            // Affinity goes first.
            None if is_bound => narrowed,
            None => self.lighter(port, Tuple::of(headers), narrowed),
            Some(tried) if tried.sure && !others.is_empty() => others.clone(),
            Some(_) => endpoints.clone(),
        };
        let mut alternatives = Vec::new();
        let reply_of = |to| Tuple { src: to, dst: headers.src, proto: headers.proto };
        // Two flows of one client to one endpoint port, through two addresses, would have the same reply.
        let taken = |to: SocketAddr| {
            let other = self.flows.with_reply(reply_of(to));
            other.is_some_and(|other| other.client != Tuple::of(headers) && other.phase != Phase::Closing)
        };
        let changes = |to| self.changes(client, port, kind, headers, to);
        let collides = endpoints.iter().any(|to| taken(*to) && changes(*to).here == Change::Nothing);
        let begun_with = |to, changes: Changes| {
            let outcome = self.begin(place, headers, client, to, changes);
            let mut alternative = self.remembered(headers, client, port, to, outcome, who);
            alternative.answers = question.clone().map(|question| (question, BTreeSet::from([to])));
            if let Then::Begin(flow) = &mut alternative.then {
                flow.source_translated = changes.here == Change::Source;
                flow.masqueraded = changes.masqueraded;
                flow.tried = Tried::begun(place, headers, several, to, before);
            }
            alternative
        };
        for &to in endpoints {
            let changes = changes(to);
            if changes.here == Change::Source || !taken(to) {
                alternatives.push(begun_with(to, changes));
            }
            if collides && changes.here == Change::Nothing {
                // P12: of the node's own packets the address may change as well.
                let here = if client == Client::Node { Change::Source } else { Change::Port };
                alternatives
                    .push(Alternative { collided: true, ..begun_with(to, Changes { here, ..changes }) });
            }
        }
        let Some(tried) = tried else {
            alternatives.iter_mut().for_each(|alternative| {
                alternative.bound = is_bound;
                alternative.spared = !is_bound && endpoints.len() < all;
            });
            return alternatives;
        };
        // Whether there was another can be said as long as the set is the same.
        let counted = !tried.sure || !others.is_empty();
        let uncounted = alternatives.clone().into_iter().filter(|_| !tried.sure || others.is_empty());
        let moved = alternatives
            .into_iter()
            .filter(|_| counted)
            .map(|alternative| Alternative { moved: tried.refused, ..alternative });
        // What the client had before may still be what it has (S1).
        let mut all: Vec<_> = moved.chain(uncounted).collect();
        for alternative in &mut all {
            if let Some((_, _, had)) = &mut alternative.remembers {
                had.extend(bound.iter().copied());
            }
        }
        all
    }

    /// Whether the endpoint must see an address of this node in place of the client's, and who translates it (P4 to P7, P9 to P11).
    fn changes(
        &self,
        client: Client,
        port: &ServicePort,
        kind: Kind,
        headers: &Headers,
        to: SocketAddr,
    ) -> Changes {
        let kept = Changes { here: Change::Nothing, masqueraded: false };
        let translated = Changes { here: Change::Source, masqueraded: false };
        // P11.
        if to.ip() == headers.src.ip() {
            return translated;
        }
        let on_this_node = port.sets.usable.get(&to).copied().unwrap_or(false);
        let at_node = self.node.has(to.ip());
        let by_netfilter = Changes { here: Change::Nothing, masqueraded: self.node.masquerades };
        match (client, kind) {
            // P9.
            (Client::Pod, Kind::ClusterIp) if self.node.masquerade_all && !at_node => by_netfilter,
            // P5, P9, P4: the client is a pod of this node.
            (Client::Pod, _) => kept,
            // P6, P9: its source is an address of the node already. But a server in the node's own network must not see
            // its own address as its client's, and what leaves by another interface has the source that belongs there.
            (Client::Node, _) if at_node || self.leaves_elsewhere(headers, to) => translated,
            (Client::Node, _) => kept,
            // P10.
            (Client::Outside, Kind::ClusterIp) if on_this_node && !at_node && self.node.masquerades => {
                by_netfilter
            }
            (Client::Outside, Kind::ClusterIp) => translated,
            // P7.
            (Client::Outside, _) if port.external_local => kept,
            // P4. A server in the node's own network answers through the node anyway.
            (Client::Outside, _) if at_node => kept,
            (Client::Outside, _) if on_this_node => by_netfilter,
            (Client::Outside, _) => translated,
        }
    }

    /// Whether the node's own packet leaves by another interface than the uplink, where its source is not at home.
    fn leaves_elsewhere(&self, headers: &Headers, to: SocketAddr) -> bool {
        matches!(self.node.way(to.ip()), Way::Out { to_pod: true, .. })
            && self.node.source(headers.is_v6()) != Some(headers.src.ip())
    }

    /// The first packet of a flow to this endpoint.
    fn begin(
        &self,
        place: Place,
        headers: &Headers,
        client: Client,
        to: SocketAddr,
        Changes { here: change, masqueraded }: Changes,
    ) -> Outcome {
        if change != Change::Source && client != Client::Node {
            let kept = change == Change::Nothing;
            let source = if kept { NewSource::Kept } else { NewSource::Port(headers.src.ip()) };
            let exit = if masqueraded { Exit::Masqueraded } else { Exit::Stack };
            return Outcome::Begun { to, source, ttl_falls: false, exit };
        }
        let exit = match self.way_past_the_stack(place, headers, to.ip()) {
            Ok(exit) => exit,
            Err(outcome) => return outcome,
        };
        let source = match (change, self.node.way(to.ip())) {
            (Change::Nothing, _) => NewSource::Kept,
            (Change::Port, _) => NewSource::Port(headers.src.ip()),
            // From the node's own address to itself would be a martian: the Service's address stands in.
            (Change::Source, Way::Here) => NewSource::Port(headers.dst.ip()),
            (Change::Source, Way::Out { .. } | Way::None) => {
                NewSource::Port(self.node.source(headers.is_v6()).unwrap_or(headers.dst.ip()))
            }
        };
        let ttl_falls = exit == Exit::Forward && place != Place::ToNetwork;
        Outcome::Begun { to, source, ttl_falls, exit }
    }

    fn remembered(
        &self,
        headers: &Headers,
        client: Client,
        port: &ServicePort,
        to: SocketAddr,
        outcome: Outcome,
        who: IpAddr,
    ) -> Alternative {
        let entered = matches!(outcome, Outcome::Begun { .. });
        let flow = Flow {
            client: Tuple::of(headers),
            translated: Tuple { src: headers.src, dst: to, proto: headers.proto },
            port: port.id.clone(),
            local: port.sets.usable.get(&to).copied().unwrap_or(false),
            source_translated: false,
            masqueraded: false,
            node_client: (client == Client::Node).then_some(headers.link),
            phase: Phase::HalfOpen { answered: None },
            client_said: Said::by(headers),
            endpoint_said: Said::default(),
            tried: None,
            endpoint_gone: false,
        };
        let then = if entered { Then::Begin(Box::new(flow)) } else { Then::Nothing };
        let remembers = port.affinity.then(|| (who, port.id.clone(), BTreeSet::from([to])));
        Alternative { then, remembers, ..Alternative::new(outcome) }
    }
}
