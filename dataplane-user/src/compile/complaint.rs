//! What an object got wrong: material for a log line, an Event and a metric (Z5). Telling is the agent's part.

use crate::model::Reference;
use std::fmt;

/// Why part of an object was not programmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ComplaintReason {
    /// An endpoint's address is one that no pod can have (Z2).
    BadEndpointAddress,
    /// An address that must not be programmed as ClusterIP, LB IP or external IP (Z1).
    RefusedAddress,
    /// Another Service has the address, port and protocol (Z1).
    AddressConflict,
    /// A port number out of range, or a port given twice.
    BadPort,
    /// An affinity timeout out of range (S1).
    BadAffinityTimeout,
    /// An annotation asks for an algorithm that there is not (L1).
    BadAlgorithm,
    /// Weights that cannot be read, or are not used (L3).
    BadWeights,
    /// A number of second tries that is none (L5).
    BadRetry,
    /// All endpoints have the weight 0 (L4).
    AllWeightsZero,
    /// More service ranges than the node's table takes (P13).
    TooManyServiceRanges,
    /// More addresses on the node's interfaces than there is room for (P17).
    TooManyNodeAddresses,
}

impl ComplaintReason {
    /// All reasons.
    pub const ALL: &'static [Self] = &[
        Self::BadEndpointAddress,
        Self::RefusedAddress,
        Self::AddressConflict,
        Self::BadPort,
        Self::BadAffinityTimeout,
        Self::BadAlgorithm,
        Self::BadWeights,
        Self::BadRetry,
        Self::AllWeightsZero,
        Self::TooManyServiceRanges,
        Self::TooManyNodeAddresses,
    ];

    /// Name for Events and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::BadEndpointAddress => "BadEndpointAddress",
            Self::RefusedAddress => "RefusedAddress",
            Self::AddressConflict => "AddressConflict",
            Self::BadPort => "BadPort",
            Self::BadAffinityTimeout => "BadAffinityTimeout",
            Self::BadAlgorithm => "BadAlgorithm",
            Self::BadWeights => "BadWeights",
            Self::BadRetry => "BadRetry",
            Self::AllWeightsZero => "AllWeightsZero",
            Self::TooManyServiceRanges => "TooManyServiceRanges",
            Self::TooManyNodeAddresses => "TooManyNodeAddresses",
        }
    }
}

/// One complaint about one object. Everything else of the object is programmed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Complaint {
    /// The object it is about, on which an Event makes sense: for a slice its Service, and the text names the slice.
    pub object: Reference,
    /// Why.
    pub reason: ComplaintReason,
    /// What was found, what was done about it, and what to check.
    pub text: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.object, self.reason.label(), self.text)
    }
}
