//! The annotations that the contract reads. Those of the project have one prefix; all others are passed over without being kept.

use crate::model::{ANNOTATION_PREFIX as PREFIX, ChoiceAnnotations};
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;

/// When a controller saw the change that it wrote into a slice.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// An algorithm, behind [`PREFIX`] (L1).
const ALGORITHM: &str = "lb-algorithm";
/// Weights, behind [`PREFIX`] (L3).
const WEIGHTS: &str = "weights";
/// Second tries, behind [`PREFIX`] (L5).
const RETRY: &str = "retry";
/// The weight of a slice's endpoints, in Cilium's word (L3).
const SLICE_WEIGHT: &str = "service.cilium.io/weight";
/// Algorithms in the words of others: of two that are there the first counts (L1).
const ALIASES: [&str; 3] =
    ["service.cilium.io/lb-algorithm", "kube-router.io/service.scheduler", "loxilb.io/epselect"];

/// The annotations of an object, as written.
#[derive(Clone, Debug, Default)]
pub(super) struct Annotations {
    pub(super) trigger_time: Option<String>,
    pub(super) weights: Option<String>,
    pub(super) retry: Option<String>,
    pub(super) slice_weight: Option<String>,
    algorithm: Option<String>,
    aliases: [Option<String>; ALIASES.len()],
}

impl Annotations {
    /// What they ask of the choice of an endpoint, the project's own before those of others (L1).
    pub(super) fn choice(&self) -> Option<Box<ChoiceAnnotations>> {
        let own =
            self.algorithm.as_deref().map(|value| (format!("{PREFIX}{ALGORITHM}").into(), value.into()));
        let alias = || {
            let written = ALIASES.iter().zip(&self.aliases);
            written.filter_map(|(name, value)| Some(((*name).into(), value.as_deref()?.into()))).next()
        };
        let choice = ChoiceAnnotations {
            algorithm: own.or_else(alias),
            weights: self.weights.as_deref().map(Into::into),
            retry: self.retry.as_deref().map(Into::into),
        };
        (choice != ChoiceAnnotations::default()).then(|| Box::new(choice))
    }

    fn field(&mut self, key: Key) -> Option<&mut Option<String>> {
        Some(match key {
            Key::TriggerTime => &mut self.trigger_time,
            Key::Algorithm => &mut self.algorithm,
            Key::Weights => &mut self.weights,
            Key::Retry => &mut self.retry,
            Key::SliceWeight => &mut self.slice_weight,
            Key::Alias(at) => self.aliases.get_mut(at)?,
            Key::Other => return None,
        })
    }
}

/// The name of an annotation.
#[derive(Clone, Copy)]
enum Key {
    TriggerTime,
    Algorithm,
    Weights,
    Retry,
    SliceWeight,
    Alias(usize),
    Other,
}

impl Key {
    fn of(name: &str) -> Self {
        match (name.strip_prefix(PREFIX), name) {
            (Some(ALGORITHM), _) => Self::Algorithm,
            (Some(WEIGHTS), _) => Self::Weights,
            (Some(RETRY), _) => Self::Retry,
            (None, TRIGGER_TIME) => Self::TriggerTime,
            (None, SLICE_WEIGHT) => Self::SliceWeight,
            (Some(_) | None, _) => {
                ALIASES.iter().position(|alias| *alias == name).map_or(Self::Other, Self::Alias)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl Visitor<'_> for Names {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of an annotation")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Key, E> {
                Ok(Key::of(name))
            }
        }
        deserializer.deserialize_identifier(Names)
    }
}

impl<'de> Deserialize<'de> for Annotations {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Annotations;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("annotations")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Annotations, A::Error> {
                let mut annotations = Annotations::default();
                while let Some(key) = map.next_key::<Key>()? {
                    match annotations.field(key) {
                        Some(field) => *field = map.next_value()?,
                        None => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(annotations)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
