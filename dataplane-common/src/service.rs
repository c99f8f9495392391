//! Service ports: one entry each, however many addresses lead to it.

use bytemuck::{Pod, Zeroable};

/// How one endpoint of a set is chosen for a new flow (L2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Algorithm {
    /// Each slot is as likely as any other.
    #[default]
    Random = 0,
    /// The slots take turns.
    RoundRobin = 1,
    /// The hash of the five-tuple leads to a slot.
    Maglev = 2,
    /// The hash of the client's address leads to a slot.
    SourceHash = 3,
    /// Of two slots that are drawn, the one whose endpoint has fewer open connections for its weight.
    LeastConnections = 4,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Random, Self::RoundRobin, Self::LeastConnections, Self::Maglev, Self::SourceHash];

    /// Its name, as annotations and flags have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::Maglev => "maglev",
            Self::SourceHash => "source-hash",
            Self::LeastConnections => "least-connections",
        }
    }
}

/// A number that stands for no algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownAlgorithm;

impl TryFrom<u8> for Algorithm {
    type Error = UnknownAlgorithm;

    #[inline(always)]
    fn try_from(number: u8) -> Result<Self, UnknownAlgorithm> {
        match number {
            0 => Ok(Self::Random),
            1 => Ok(Self::RoundRobin),
            2 => Ok(Self::Maglev),
            3 => Ok(Self::SourceHash),
            4 => Ok(Self::LeastConnections),
            5.. => Err(UnknownAlgorithm),
        }
    }
}

/// A run of consecutive entries of the `slots` table, from `base` on, and how one of them is chosen: a run is laid out for its
/// algorithm, so both lie in one aligned word. An endpoint's weight is how many of the slots are its.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct EndpointSet {
    base: u32,
    /// How many slots, and in the upper bits the number of the algorithm.
    shape: u32,
}

impl EndpointSet {
    /// The set without endpoints.
    pub const EMPTY: Self = Self::new(0, 0);

    /// More slots than a table has.
    const COUNT: u32 = (1 << 27) - 1;
    /// They are of more endpoints than one.
    const SEVERAL: u32 = 1 << 27;
    const ALGORITHM_SHIFT: u32 = 28;

    /// The slots `base .. base + count`, chosen at random.
    pub const fn new(base: u32, count: u32) -> Self {
        Self { base, shape: if count > Self::COUNT { Self::COUNT } else { count } }
    }

    /// The same slots, chosen by another algorithm.
    #[must_use]
    pub const fn with_algorithm(self, algorithm: Algorithm) -> Self {
        Self {
            base: self.base,
            shape: self.shape & (Self::COUNT | Self::SEVERAL) | (algorithm as u32) << Self::ALGORITHM_SHIFT,
        }
    }

    /// The same slots, of more endpoints than one or not: only from several can another be chosen (L5).
    #[must_use]
    pub const fn of_several(self, several: bool) -> Self {
        let shape = self.shape & !Self::SEVERAL;
        Self { base: self.base, shape: if several { shape | Self::SEVERAL } else { shape } }
    }

    /// Whether the slots are of more endpoints than one.
    #[inline(always)]
    pub const fn has_several(self) -> bool {
        self.shape & Self::SEVERAL != 0
    }

    /// How a slot is chosen.
    ///
    /// # Errors
    /// [`UnknownAlgorithm`] if the word is none that this version writes.
    #[inline(always)]
    pub fn algorithm(self) -> Result<Algorithm, UnknownAlgorithm> {
        Algorithm::try_from((self.shape >> Self::ALGORITHM_SHIFT) as u8)
    }

    /// The first slot.
    #[inline(always)]
    pub const fn base(self) -> u32 {
        self.base
    }

    /// How many slots.
    #[inline(always)]
    pub const fn count(self) -> u32 {
        self.shape & Self::COUNT
    }
}

/// How the sets of a service port are used. One aligned word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Policy {
    flags: u32,
    affinity_seconds: u32,
}

impl Policy {
    /// `internalTrafficPolicy: Local`.
    pub const INTERNAL_LOCAL: u32 = 1 << 0;
    /// `externalTrafficPolicy: Local`.
    pub const EXTERNAL_LOCAL: u32 = 1 << 1;
    /// The port has an endpoint somewhere (*has any* of the contract): an empty set then means drop, not reject.
    pub const HAS_ENDPOINTS: u32 = 1 << 2;
    /// LB IPs are for the sources in `source_ranges` only (S2).
    pub const SOURCE_RANGES: u32 = 1 << 3;

    /// A second try was asked for: connections go by packet, where there is one (L6).
    pub const BY_PACKET: u32 = 1 << 4;
    /// How often a flow whose endpoint is silent may be given another (L5): at most [`Policy::MOST_TRIES`].
    const TRIES_SHIFT: u32 = 8;
    /// More tries than a client waits for.
    pub const MOST_TRIES: u32 = 7;

    /// The same policy with so many second tries.
    #[must_use]
    pub const fn with_tries(self, tries: u32) -> Self {
        let tries = if tries > Self::MOST_TRIES { Self::MOST_TRIES } else { tries };
        let others = self.flags & !(Self::MOST_TRIES << Self::TRIES_SHIFT);
        Self { flags: others | tries << Self::TRIES_SHIFT, ..self }
    }

    /// How many second tries there are (L5).
    #[inline(always)]
    pub const fn tries(self) -> u32 {
        self.flags >> Self::TRIES_SHIFT & Self::MOST_TRIES
    }

    /// From the flags above and the affinity timeout in seconds (0: no affinity).
    pub const fn new(flags: u32, affinity_seconds: u32) -> Self {
        Self { flags, affinity_seconds }
    }

    /// Whether all bits of `flag` are set.
    #[inline(always)]
    pub const fn has(self, flag: u32) -> bool {
        self.flags & flag == flag
    }

    /// The flags.
    #[inline(always)]
    pub const fn flags(self) -> u32 {
        self.flags
    }

    /// Timeout of `sessionAffinity: ClientIP` in seconds; 0 without affinity.
    #[inline(always)]
    pub const fn affinity_seconds(self) -> u32 {
        self.affinity_seconds
    }
}

/// A service port: value of the `services` array, indexed by its id. 40 bytes.
///
/// The words change independently of each other; each alone is consistent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Service {
    /// The cluster set (T1, T4).
    pub cluster: EndpointSet,
    /// The local set (T3, T4).
    pub local: EndpointSet,
    /// Policies and timeouts.
    pub policy: Policy,
    /// What its hashes begin with: the same on all nodes, and as long as the Service lives (L2).
    pub seed: u64,
    spare: u64,
}

impl Service {
    /// A service port with these sets.
    pub const fn new(cluster: EndpointSet, local: EndpointSet, policy: Policy, seed: u64) -> Self {
        Self { cluster, local, policy, seed, spare: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_says_how_it_is_chosen_beside_its_slots() {
        for algorithm in Algorithm::ALL {
            let set = EndpointSet::new(7, 65_537).with_algorithm(algorithm);
            assert_eq!((set.base(), set.count(), set.algorithm()), (7, 65_537, Ok(algorithm)));
            assert_eq!(set.with_algorithm(Algorithm::Random), EndpointSet::new(7, 65_537));
            let several = set.of_several(true);
            assert_eq!((several.base(), several.count(), several.algorithm()), (7, 65_537, Ok(algorithm)));
            assert!(several.has_several() && !set.has_several() && several.of_several(false) == set);
            assert!(several.with_algorithm(Algorithm::Random).has_several());
        }
        let other: EndpointSet = bytemuck::must_cast([7_u32, 0xf000_0001]);
        assert_eq!((other.count(), other.algorithm()), (1, Err(UnknownAlgorithm)));
    }
}
