//! How a Service's endpoints are chosen: what its annotations ask for, over the node's defaults (L1, L3).

use super::complaint::ComplaintReason;
use crate::model::{self, ANNOTATION_PREFIX, ChoiceAnnotations, EndpointSlice, NameHash};
use dataplane_common::hash::{mix, mix_bytes};
use dataplane_common::service::{Algorithm, Policy};
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The weight of an endpoint that nothing gives one (L3).
const DEFAULT_WEIGHT: u16 = 1;

/// What a node's flags say where an annotation says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// `--lb-algorithm`.
    pub algorithm: Algorithm,
    /// `--lb-retry`.
    pub tries: u32,
}

impl Default for Defaults {
    fn default() -> Self {
        Self { algorithm: Algorithm::default(), tries: DEFAULT_TRIES }
    }
}

/// How many second tries a connection has where nobody asks for more or fewer (L5).
pub const DEFAULT_TRIES: u32 = 3;

/// How a Service's endpoints are chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selection {
    /// The algorithm.
    pub(super) algorithm: Algorithm,
    /// What each endpoint's weight is.
    pub(super) weights: Weights,
    /// How many second tries there are (L5).
    pub(super) tries: u32,
    /// The Service asks for them itself, so that its connections go by packet (L6).
    pub(super) by_packet: bool,
}

/// Weights, by what they are given to; the more exact word counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Weights {
    by_address: BTreeMap<IpAddr, u16>,
    by_pod: BTreeMap<NameHash, u16>,
    by_node: BTreeMap<Box<str>, u16>,
    by_zone: BTreeMap<NameHash, u16>,
    rest: Option<u16>,
}

/// A word that asks for an algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// It means this.
    Means(Algorithm),
    /// It means nothing here, and why.
    Nothing(&'static str),
}

/// All words that ask for an algorithm: the project's own first, then those of IPVS, which kube-proxy and kube-router have, and of
/// loxilb.
pub const WORDS: &[(&str, Word)] = {
    use Algorithm::{LeastConnections, Maglev, Random, RoundRobin, SourceHash};
    use Word::{Means, Nothing};
    /// Why what finds a cache's content again has no meaning behind a virtual address.
    const ONE_ADDRESS: Word =
        Nothing("it chooses by the address that is called, which is the same for all clients here");
    const NOT_YET: Word = Nothing("there is nothing like it here yet");
    &[
        ("random", Means(Random)),
        ("round-robin", Means(RoundRobin)),
        ("least-connections", Means(LeastConnections)),
        ("maglev", Means(Maglev)),
        ("source-hash", Means(SourceHash)),
        ("rr", Means(RoundRobin)),
        ("wrr", Means(RoundRobin)),
        ("sh", Means(SourceHash)),
        // It hashes the client's address, unless it is told to hash the port as well, which kube-proxy never does.
        ("mh", Means(SourceHash)),
        ("lc", Means(LeastConnections)),
        ("wlc", Means(LeastConnections)),
        ("sed", Means(LeastConnections)),
        ("nq", Means(LeastConnections)),
        // Of two that are drawn.
        ("twos", Means(LeastConnections)),
        ("hash", Means(Maglev)),
        ("persist", Means(SourceHash)),
        ("dh", ONE_ADDRESS),
        ("lblc", ONE_ADDRESS),
        ("lblcr", ONE_ADDRESS),
        ("fo", NOT_YET),
        ("ovf", NOT_YET),
        ("n2", NOT_YET),
        ("n3", NOT_YET),
    ]
};

/// The algorithm that a word asks for.
///
/// # Errors
/// Why it asks for none.
pub fn algorithm(word: &str) -> Result<Algorithm, String> {
    match WORDS.iter().find(|(known, _)| *known == word) {
        Some((_, Word::Means(algorithm))) => Ok(*algorithm),
        Some((_, Word::Nothing(why))) => Err((*why).to_owned()),
        None => {
            let known: Vec<_> = Algorithm::ALL.iter().map(|algorithm| algorithm.name()).collect();
            Err(format!("it is none of {}", known.join(", ")))
        }
    }
}

impl Selection {
    /// What a Service asks for. What cannot be understood is left out and complained about (Z5).
    pub(super) fn of(
        annotations: Option<&ChoiceAnnotations>,
        defaults: Defaults,
        mut complain: impl FnMut(ComplaintReason, String),
    ) -> Self {
        let mut selection = Self {
            algorithm: defaults.algorithm,
            weights: Weights::default(),
            tries: defaults.tries,
            by_packet: false,
        };
        let Some(annotations) = annotations else { return selection };
        if let Some((key, word)) = &annotations.algorithm {
            match algorithm(word) {
                Ok(algorithm) => selection.algorithm = algorithm,
                Err(why) => {
                    let used = defaults.algorithm.name();
                    complain(
                        ComplaintReason::BadAlgorithm,
                        format!("annotation {key} is \"{word}\": {why}; {used} is used"),
                    );
                }
            }
        }
        if let Some(text) = annotations.retry.as_deref() {
            match text.parse().ok().filter(|tries| *tries <= Policy::MOST_TRIES) {
                Some(tries) => (selection.tries, selection.by_packet) = (tries, tries > 0),
                None => {
                    let (most, used) = (Policy::MOST_TRIES, defaults.tries);
                    let name = format!("annotation {ANNOTATION_PREFIX}retry");
                    let text =
                        format!("{name} is \"{text}\", which is no number up to {most}; {used} is used");
                    complain(ComplaintReason::BadRetry, text);
                }
            }
        }
        match annotations.weights.as_deref().map(Weights::parse) {
            None => {}
            Some(Ok(weights)) => selection.weights = weights,
            Some(Err(why)) => {
                let text = format!("annotation {ANNOTATION_PREFIX}weights: {why}; all have one weight");
                complain(ComplaintReason::BadWeights, text);
            }
        }
        selection
    }
}

impl Weights {
    fn parse(text: &str) -> Result<Self, String> {
        let written: BTreeMap<String, Value> =
            serde_json::from_str(text).map_err(|error| format!("is no JSON object of weights: {error}"))?;
        let mut weights = Self::default();
        for (name, value) in written {
            let weight =
                weight_of(&value).ok_or_else(|| format!("\"{name}\": {value} is no weight (0 to 65535)"))?;
            if name == "*" {
                weights.rest = Some(weight);
            } else if let Some(zone) = name.strip_prefix("zone=") {
                weights.by_zone.insert(NameHash::of(zone), weight);
            } else if let Some(node) = name.strip_prefix("node=") {
                weights.by_node.insert(node.into(), weight);
            } else if let Ok(address) = name.parse() {
                weights.by_address.insert(address, weight);
            } else {
                let pod = name.strip_prefix("pod=").unwrap_or(&name);
                weights.by_pod.insert(NameHash::of(pod), weight);
            }
        }
        Ok(weights)
    }

    /// The weight of an endpoint of a slice: by its address, pod, node, zone, slice, in this order; else of the rest.
    pub(super) fn weight(&self, endpoint: &model::Endpoint, slice: Option<u16>) -> u16 {
        let by_node = || self.by_node.get(endpoint.node.as_deref()?);
        let named = self
            .by_address
            .get(&endpoint.address)
            .or_else(|| self.by_pod.get(&endpoint.pod))
            .or_else(by_node)
            .or_else(|| self.by_zone.get(&endpoint.zone));
        named.copied().or(slice).or(self.rest).unwrap_or(DEFAULT_WEIGHT)
    }
}

fn weight_of(value: &Value) -> Option<u16> {
    u16::try_from(value.as_u64()?).ok()
}

/// The weight that a slice gives its endpoints, in Cilium's word (L3).
///
/// # Errors
/// Why it gives none.
pub(super) fn slice_weight(slice: &EndpointSlice) -> Result<Option<u16>, String> {
    let Some(text) = slice.weight.as_deref() else { return Ok(None) };
    if slice.by_controller {
        return Err("its weight is not used: a controller moves endpoints from slice to slice".to_owned());
    }
    let weight =
        text.parse().map_err(|_| format!("its weight \"{text}\" is none (0 to 65535); 1 is used"))?;
    Ok(Some(weight))
}

/// The salts of what a seed is used for: two uses of one must not agree.
const SEED: u64 = 0x1d7c_05e9;
const ORDER: u64 = 0x6a09_e667;

/// What all nodes begin the hashes of a Service with: its UID, or its name where manifests give none (L2).
pub(super) fn seed(service: &model::Service) -> u64 {
    if service.uid.is_empty() {
        let namespace = mix_bytes(service.name.namespace.as_bytes(), SEED);
        return mix_bytes(service.name.name.as_bytes(), namespace);
    }
    mix_bytes(service.uid.as_bytes(), SEED)
}

/// What the turns of a Service on one node begin with (L2).
pub(super) fn order(seed: u64, node: &str) -> u64 {
    mix([seed, mix_bytes(node.as_bytes(), ORDER)], ORDER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::samples::{endpoint, service, slice};

    fn of(algorithm: Option<&str>, weights: Option<&str>) -> (Selection, Vec<String>) {
        let annotations = ChoiceAnnotations {
            algorithm: algorithm.map(|word| ("a/lb-algorithm".into(), word.into())),
            weights: weights.map(Into::into),
            retry: None,
        };
        let mut complaints = Vec::new();
        let defaults = Defaults { algorithm: Algorithm::RoundRobin, ..Defaults::default() };
        let selection = Selection::of(Some(&annotations), defaults, |_, text| complaints.push(text));
        (selection, complaints)
    }

    /// L1
    #[test]
    fn a_word_that_means_nothing_leaves_the_default_and_says_why() {
        assert_eq!(of(None, None).0.algorithm, Algorithm::RoundRobin, "the node's default");
        for (word, meaning) in WORDS {
            let (selection, complaints) = of(Some(word), None);
            match meaning {
                Word::Means(algorithm) => {
                    assert_eq!((selection.algorithm, complaints.len()), (*algorithm, 0))
                }
                Word::Nothing(why) => {
                    assert_eq!(selection.algorithm, Algorithm::RoundRobin);
                    let text = format!("annotation a/lb-algorithm is \"{word}\": {why}; round-robin is used");
                    assert_eq!(complaints, [text]);
                }
            }
        }
        let (selection, complaints) = of(Some("Maglev"), None);
        assert_eq!((selection.algorithm, complaints.len()), (Algorithm::RoundRobin, 1));
        assert!(
            complaints[0]
                .contains("it is none of random, round-robin, least-connections, maglev, source-hash")
        );
    }

    /// L5, L6
    #[test]
    fn a_number_of_tries_is_taken_and_what_is_none_is_told() {
        let of = |text: &str| {
            let annotations = ChoiceAnnotations { retry: Some(text.into()), ..ChoiceAnnotations::default() };
            let mut complaints = 0;
            let selection = Selection::of(Some(&annotations), Defaults::default(), |_, _| complaints += 1);
            (selection.tries, selection.by_packet, complaints)
        };
        assert_eq!([of("1"), of("0"), of("7")], [(1, true, 0), (0, false, 0), (7, true, 0)]);
        assert_eq!([of("8"), of("-1"), of("")], [(DEFAULT_TRIES, false, 1); 3]);
    }

    /// L3
    #[test]
    fn the_most_exact_word_gives_the_weight() {
        let text = r#"{"10.0.0.1": 1, "web-0": 2, "node=a": 3, "zone=z": 4, "*": 5}"#;
        let (selection, complaints) = of(None, Some(text));
        assert!(complaints.is_empty());
        let mut named = endpoint("10.0.0.1", "a");
        (named.pod, named.zone) = (NameHash::of("web-0"), NameHash::of("z"));
        let weight = |endpoint: &model::Endpoint, slice| selection.weights.weight(endpoint, slice);
        assert_eq!(weight(&named, Some(9)), 1);
        named.address = "10.0.0.2".parse().unwrap();
        assert_eq!(weight(&named, Some(9)), 2);
        named.pod = NameHash::of("web-1");
        assert_eq!(weight(&named, Some(9)), 3);
        named.node = Some("b".into());
        assert_eq!(weight(&named, Some(9)), 4);
        named.zone = NameHash::NONE;
        assert_eq!(weight(&named, Some(9)), 9);
        assert_eq!(weight(&named, None), 5);
        assert_eq!(Weights::default().weight(&named, None), 1);
    }

    /// L3
    #[test]
    fn weights_that_cannot_be_read_count_for_nothing() {
        for text in ["", "[]", r#"{"a": -1}"#, r#"{"a": 65536}"#, r#"{"a": "1"}"#, r#"{"a": 1.5}"#] {
            let (selection, complaints) = of(None, Some(text));
            assert_eq!((selection.weights, complaints.len()), (Weights::default(), 1), "{text}");
        }
        assert!(of(None, Some(r#"{"a": 65535, "b": 0}"#)).1.is_empty());
    }

    /// L3
    #[test]
    fn a_slice_gives_weights_only_where_nobody_moves_its_endpoints() {
        let written = EndpointSlice { weight: Some("70".into()), ..slice("s", "web", Vec::new()) };
        assert_eq!(slice_weight(&written), Ok(Some(70)));
        assert!(slice_weight(&EndpointSlice { by_controller: true, ..written.clone() }).is_err());
        assert!(slice_weight(&EndpointSlice { weight: Some("-1".into()), ..written }).is_err());
        assert_eq!(slice_weight(&slice("s", "web", Vec::new())), Ok(None));
    }

    /// L2
    #[test]
    fn nodes_agree_on_the_seed_of_a_service_and_differ_in_the_order() {
        let (a, b) = (service("a"), service("b"));
        assert_ne!(seed(&a), seed(&b));
        let with_uid = |uid: &str| seed(&model::Service { uid: uid.into(), ..a.clone() });
        assert_ne!(with_uid("1"), with_uid("2"));
        assert_eq!(with_uid("1"), seed(&model::Service { uid: "1".into(), ..b }));
        assert_ne!(order(7, "node-1"), order(7, "node-2"));
        assert_ne!(order(7, "node-1"), order(8, "node-1"));
    }
}
