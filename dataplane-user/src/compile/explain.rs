//! Why each endpoint of a Service is in its sets or not, for people: what [`super::endpoints`] decides, put into words.

use super::Context;
use super::endpoints::{self, Candidate, Candidates, Needs};
use super::selection::{Defaults, Selection};
use crate::model::{self, EndpointSlice, Service};
use crate::status::endpoints::{EndpointFacts, PortEndpoints};
use std::sync::Arc;

/// The endpoints of a Service by port and IP family, as this node sees them. A port without any in a family is left out.
pub fn explain(service: &Service, slices: &[EndpointSlice], context: &Context) -> Vec<PortEndpoints> {
    let weights = Selection::of(service.choice.as_deref(), Defaults::default(), |_, _| {}).weights;
    let mut told = Vec::new();
    for port in &service.ports {
        for ipv6 in [false, true] {
            let candidates = endpoints::candidates(slices, port, ipv6, &weights);
            if !candidates.is_empty() {
                let (port, protocol) = (port.name.to_string(), port.protocol.to_string());
                told.push(PortEndpoints { port, protocol, ipv6, endpoints: facts(&candidates, context) });
            }
        }
    }
    told
}

fn facts(candidates: &Candidates<'_>, context: &Context) -> Vec<EndpointFacts> {
    let sets = endpoints::select(candidates, Needs { cluster: true, local: true }, context);
    let all = |key| sets.cluster.contains(key);
    let any_ready = candidates.values().any(|endpoint| endpoint.ready);
    let local_ready = candidates.values().any(|it| it.ready && endpoints::is_local(it, context));
    let by_nodes =
        candidates.iter().any(|(key, it)| all(key) && it.ready && it.for_nodes.contains(&context.node_name))
            && candidates.values().filter(|it| it.ready).all(|it| !it.for_nodes.is_empty());
    let fact = |(key, endpoint): (&super::Endpoint, &Candidate<'_>)| EndpointFacts {
        address: key.addr.to_string(),
        port: key.port.number(),
        node: endpoint.node.as_deref().map(str::to_owned),
        ready: endpoint.ready,
        serving: endpoint.serving,
        terminating: endpoint.terminating,
        zones: endpoint.for_zones.iter().map(|zone| zone.to_string()).collect(),
        not_in_cluster_set: (!sets.cluster.contains(key))
            .then(|| unfit(endpoint, any_ready, "").unwrap_or_else(|| left_out(endpoint, by_nodes, context))),
        not_in_local_set: (!sets.local.contains(key)).then(|| elsewhere(endpoint, local_ready, context)),
    };
    candidates.iter().map(fact).collect()
}

/// Why an endpoint takes part nowhere, whatever its place.
fn unfit(endpoint: &model::Endpoint, others_are_ready: bool, place: &str) -> Option<String> {
    match endpoint {
        _ if endpoint.ready => None,
        _ if endpoint.terminating && !endpoint.serving => {
            Some("terminating, and serves no more (T5)".to_owned())
        }
        _ if !endpoint.terminating => Some("not ready (T)".to_owned()),
        _ if others_are_ready => Some(format!("terminating, and others{place} are ready (T)")),
        _ => None,
    }
}

fn left_out(candidate: &Candidate<'_>, by_nodes: bool, context: &Context) -> String {
    if candidate.weight == 0 { NO_WEIGHT.to_owned() } else { hint(candidate, by_nodes, context) }
}

/// Why an endpoint takes part nowhere that could.
const NO_WEIGHT: &str = "its weight is 0 (L4)";

fn hint(endpoint: &model::Endpoint, by_nodes: bool, context: &Context) -> String {
    let list = |names: &[Arc<str>]| names.iter().map(|name| &**name).collect::<Vec<_>>().join(", ");
    if by_nodes {
        return format!("its hint names {}, not this node (T1)", list(&endpoint.for_nodes));
    }
    let here = context.zone.as_deref().unwrap_or("none");
    format!("its hint is for zone {}, this node is in {here} (T1)", list(&endpoint.for_zones))
}

fn elsewhere(endpoint: &Candidate<'_>, local_ready: bool, context: &Context) -> String {
    if !endpoints::is_local(endpoint, context) {
        return format!("is on {}", endpoint.node.as_deref().unwrap_or("no node"));
    }
    unfit(endpoint, local_ready, " on this node").unwrap_or_else(|| NO_WEIGHT.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Endpoint;
    use crate::model::samples::{draining, endpoint, service, slice};

    fn context() -> Context {
        Context { node_name: "here".into(), zone: Some("a".into()), ..Context::default() }
    }

    fn told(endpoints: Vec<Endpoint>) -> Vec<EndpointFacts> {
        let mut ports = explain(&service("web"), &[slice("web-1", "web", endpoints)], &context());
        assert_eq!(ports.len(), 1);
        ports.remove(0).endpoints
    }

    fn why(endpoints: Vec<Endpoint>) -> Vec<Option<String>> {
        told(endpoints).into_iter().map(|endpoint| endpoint.not_in_cluster_set).collect()
    }

    /// T1
    #[test]
    fn an_endpoint_for_another_zone_or_node_is_told_so() {
        let zone = |zone: &str, at| Endpoint { for_zones: [zone.into()].into(), ..endpoint(at, "there") };
        let text = "its hint is for zone b, this node is in a (T1)".to_owned();
        assert_eq!(why(vec![zone("a", "10.1.0.1"), zone("b", "10.1.0.2")]), [None, Some(text)]);
        let node = |node: &str, at| Endpoint { for_nodes: [node.into()].into(), ..zone("a", at) };
        let text = "its hint names there, not this node (T1)".to_owned();
        assert_eq!(why(vec![node("here", "10.1.0.1"), node("there", "10.1.0.2")]), [None, Some(text)]);
    }

    /// T5
    #[test]
    fn an_endpoint_that_is_not_ready_or_goes_is_told_so() {
        let unready = Endpoint { ready: false, ..endpoint("10.1.0.2", "here") };
        let gone = Endpoint { serving: false, ..draining("10.1.0.3", "here") };
        let all = vec![endpoint("10.1.0.1", "there"), unready, gone, draining("10.1.0.4", "here")];
        let texts = [
            "not ready (T)",
            "terminating, and serves no more (T5)",
            "terminating, and others are ready (T)",
        ];
        let expected: Vec<_> = [None].into_iter().chain(texts.map(|text| Some(text.to_owned()))).collect();
        assert_eq!(why(all.clone()), expected);
        let local: Vec<_> = told(all).into_iter().map(|endpoint| endpoint.not_in_local_set).collect();
        assert_eq!(local[0].as_deref(), Some("is on there"));
        assert_eq!(local[3], None, "it is the last on this node");
    }

    /// T1 to T5: whatever the endpoints are, each that is in no set is told why in words that fit it.
    #[test]
    fn every_endpoint_is_in_a_set_or_has_a_reason() {
        let mut all = Vec::new();
        for bits in 0..64_u8 {
            let has = |bit: u8| bits & 1 << bit != 0;
            let (node, zone) = (if has(3) { "here" } else { "there" }, if has(4) { "a" } else { "b" });
            let mut one = endpoint(&format!("10.1.0.{bits}"), node);
            (one.ready, one.serving, one.terminating) = (has(0), has(1), has(2));
            one.for_zones = if has(5) { [zone.into()].into() } else { Vec::new().into() };
            all.push(one);
        }
        for first in 0..all.len() {
            for second in 0..all.len() {
                for fact in
                    told(vec![all[first].clone(), all[second].clone()].into_iter().collect::<Vec<_>>())
                {
                    let reason = fact.not_in_cluster_set.unwrap_or_default();
                    assert!(!reason.contains("hint") || fact.ready && !fact.zones.is_empty(), "{reason}");
                    assert!(!reason.contains("not ready") || !fact.ready && !fact.terminating, "{reason}");
                    assert_ne!(fact.not_in_local_set.as_deref(), Some("not in the local set"));
                }
            }
        }
    }
}
