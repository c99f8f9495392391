//! Service ports: one entry each, however many addresses lead to it.

use bytemuck::{Pod, Zeroable};

/// A run of `count` consecutive entries of the `slots` table, from `base` on. One aligned word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct EndpointSet {
    base: u32,
    count: u32,
}

impl EndpointSet {
    /// The set without endpoints.
    pub const EMPTY: Self = Self { base: 0, count: 0 };

    /// The slots `base .. base + count`.
    pub const fn new(base: u32, count: u32) -> Self {
        Self { base, count }
    }

    /// The first slot.
    #[inline(always)]
    pub const fn base(self) -> u32 {
        self.base
    }

    /// How many slots.
    #[inline(always)]
    pub const fn count(self) -> u32 {
        self.count
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

/// A service port: value of the `services` array, indexed by its id. 24 bytes.
///
/// The three words change independently of each other; each alone is consistent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Service {
    /// The cluster set (T1, T4).
    pub cluster: EndpointSet,
    /// The local set (T3, T4).
    pub local: EndpointSet,
    /// Policies and timeouts.
    pub policy: Policy,
}
