//! How a flow begins: to which endpoint, and with which source (P4 to P12, S1).

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

impl Model {
    /// A flow to one of these endpoints.
    pub(super) fn begun(
        &self,
        place: Place,
        headers: &Headers,
        client: Client,
        port: &ServicePort,
        kind: Kind,
        endpoints: &BTreeSet<SocketAddr>,
    ) -> Vec<Alternative> {
        // S1: the node is one client, whichever of its addresses it calls from.
        let src = headers.src.ip();
        let own = self.node.source(headers.is_v6()).filter(|_| client == Client::Node);
        let who = own.unwrap_or(src);
        let all = endpoints.len();
        let endpoints = &self.affinities.narrow(who, port, endpoints);
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
        let begun_with = |to, change| {
            let outcome = self.begin(place, headers, client, to, change);
            let mut alternative = self.remembered(headers, client, port, to, outcome, who);
            if let Then::Begin(flow) = &mut alternative.then {
                flow.source_translated = change == Change::Source;
            }
            alternative
        };
        for &to in endpoints {
            let translates = self.translates_source(client, port, kind, headers, to);
            if translates || !taken(to) {
                let change = if translates { Change::Source } else { Change::Nothing };
                alternatives.push(begun_with(to, change));
            }
            if collides && !translates {
                // P12: of the node's own packets the address may change as well.
                let change = if client == Client::Node { Change::Source } else { Change::Port };
                alternatives.push(Alternative { collided: true, ..begun_with(to, change) });
            }
        }
        alternatives.iter_mut().for_each(|alternative| alternative.bound = endpoints.len() < all);
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
            // its own address as its client's, and what leaves by another interface has the source that belongs there.
            (Client::Node, _) => self.node.has(to.ip()) || self.leaves_elsewhere(headers, to),
            // P10.
            (Client::Outside, Kind::ClusterIp) => true,
            // P7.
            (Client::Outside, _) if port.external_local => false,
            // P4. A server in the node's own network answers through the node anyway.
            (Client::Outside, _) if self.node.has(to.ip()) => false,
            (Client::Outside, _) => self.node.masquerade_all || !on_this_node,
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
        change: Change,
    ) -> Outcome {
        if change != Change::Source && client != Client::Node {
            let kept = change == Change::Nothing;
            let source = if kept { NewSource::Kept } else { NewSource::Port(headers.src.ip()) };
            return Outcome::Begun { to, source, ttl_falls: false, exit: Exit::Stack };
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
            node_client: (client == Client::Node).then_some(headers.link),
            phase: Phase::HalfOpen { answered: None },
            client_said: Said::by(headers),
            endpoint_said: Said::default(),
            endpoint_gone: false,
        };
        let then = if entered { Then::Begin(Box::new(flow)) } else { Then::Nothing };
        let remembers = port.affinity.then(|| (who, port.id.clone(), BTreeSet::from([to])));
        Alternative { then, remembers, ..Alternative::new(outcome) }
    }
}
