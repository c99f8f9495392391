//! Section 8 of the contract: which of its endpoints a flow gets.

use super::Model;
use super::cluster::{PortId, ServicePort};
use super::flows::{Flow, Phase, Tuple};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::Endpoint;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// Annotations of a Service that name an algorithm, the first that is there counts (L1).
const ALGORITHM: [&str; 4] = [
    "service.portolan.dev/lb-algorithm",
    "service.cilium.io/lb-algorithm",
    "kube-router.io/service.scheduler",
    "loxilb.io/epselect",
];
/// The annotation of L3.
const WEIGHTS: &str = "service.portolan.dev/weights";

/// What decides which endpoint a flow gets (L2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// Nothing that a packet shows: chance, or a turn.
    #[default]
    Any,
    /// The five-tuple.
    Tuple,
    /// The client's address.
    Client,
    /// Chance, and what is open.
    Open,
}

impl Algorithm {
    /// L1.
    pub(super) fn of(service: &Service) -> Self {
        let annotations = service.metadata.annotations.clone().unwrap_or_default();
        let word = ALGORITHM.iter().find_map(|name| annotations.get(*name)).map(String::as_str);
        match word {
            Some("maglev" | "hash") => Self::Tuple,
            Some("source-hash" | "sh" | "mh" | "persist") => Self::Client,
            Some("least-connections" | "lc" | "wlc" | "sed" | "nq" | "twos") => Self::Open,
            Some(_) | None => Self::Any,
        }
    }
}

/// The weights that a Service gives (L3).
#[derive(Clone, Debug, Default)]
pub(super) struct Weights(BTreeMap<String, u16>);

impl Weights {
    pub(super) fn of_service(service: &Service) -> Self {
        let text = service.metadata.annotations.as_ref().and_then(|annotations| annotations.get(WEIGHTS));
        Self(text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default())
    }

    /// The weight of an endpoint.
    pub(super) fn of(&self, endpoint: &Endpoint, ip: IpAddr) -> u16 {
        let pod = endpoint.target_ref.as_ref().and_then(|target| target.name.clone());
        let words = [
            Some(ip.to_string()),
            pod,
            endpoint.node_name.as_ref().map(|node| format!("node={node}")),
            endpoint.zone.as_ref().map(|zone| format!("zone={zone}")),
            Some("*".to_owned()),
        ];
        words.into_iter().flatten().find_map(|word| self.0.get(&word).copied()).unwrap_or(1)
    }
}

/// Who chooses from what, where that alone decides: what is hashed, the service port, its endpoints and their weights.
pub type Question = (Vec<SocketAddr>, PortId, Algorithm, BTreeMap<SocketAddr, u16>);

/// What was answered to the same question before: the same again (L2).
#[derive(Clone, Debug, Default)]
pub(super) struct Answers(BTreeMap<Question, BTreeSet<SocketAddr>>);

impl Answers {
    /// What is asked for a client of these endpoints; `None` where nothing that can be seen decides.
    pub(super) fn question(
        port: &ServicePort,
        (src, dst): (SocketAddr, SocketAddr),
        client: IpAddr,
        endpoints: &BTreeSet<SocketAddr>,
    ) -> Option<Question> {
        let hashed = match port.algorithm {
            Algorithm::Any | Algorithm::Open => return None,
            Algorithm::Tuple => vec![src, dst],
            Algorithm::Client => vec![SocketAddr::new(client, 0)],
        };
        let weight = |at: &SocketAddr| (*at, port.sets.weights.get(at).copied().unwrap_or(1));
        Some((hashed, port.id.clone(), port.algorithm, endpoints.iter().map(weight).collect()))
    }

    /// Which of these it can be.
    pub(super) fn narrow(
        &self,
        question: Option<&Question>,
        endpoints: &BTreeSet<SocketAddr>,
    ) -> BTreeSet<SocketAddr> {
        question.and_then(|question| self.0.get(question)).unwrap_or(endpoints).clone()
    }

    /// It was one of these.
    pub(super) fn remember(&mut self, question: &Question, chosen: &BTreeSet<SocketAddr>) {
        self.0.insert(question.clone(), chosen.clone());
    }
}

impl Model {
    /// Which of a set's endpoints least-connections can choose for a flow of this client (L2). Each may be one of the two that are drawn; but
    /// the one that has more open than every other is never the lighter of two. Where weights differ, it may be drawn twice.
    pub(super) fn lighter(
        &self,
        port: &ServicePort,
        client: Tuple,
        endpoints: BTreeSet<SocketAddr>,
    ) -> BTreeSet<SocketAddr> {
        let weights: BTreeSet<_> =
            endpoints.iter().map(|at| port.sets.weights.get(at).copied().unwrap_or(1)).collect();
        if port.algorithm != Algorithm::Open || endpoints.len() < 2 || weights.len() > 1 {
            return endpoints;
        }
        // What an endpoint had before it was gone for a while it may have lost: at least, and at most.
        let open = |at: &SocketAddr| {
            let here = |flow: &&Flow| {
                flow.port == port.id && flow.translated.dst == *at && flow.phase != Phase::Closing
            };
            let others: Vec<_> =
                self.flows.iter().filter(here).filter(|flow| flow.client != client).collect();
            let gone = others.iter().filter(|flow| flow.endpoint_gone).count();
            let all = others.len();
            (all - gone, all)
        };
        let counts: Vec<_> = endpoints.iter().map(|at| (*at, open(at))).collect();
        let heaviest = counts
            .iter()
            .find(|(at, (least, _))| counts.iter().all(|(other, (_, most))| other == at || most < least));
        let heaviest = heaviest.map(|(at, _)| *at);
        endpoints.into_iter().filter(|at| Some(*at) != heaviest).collect()
    }
}
