//! What the programs cannot do yet. The oracle knows the whole contract; where a gap is listed, it allows what the programs
//! do instead, or random cases leave the matter out. A gap goes from this list with the change that closes it.

/// Something the contract asks for that is not there yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gap {
    /// `loadBalancerSourceRanges` (S2).
    SourceRanges,
    /// `sessionAffinity: ClientIP` (S1): any endpoint may be chosen.
    Affinity,
    /// IPv6 packets pass as they came.
    Ipv6,
    /// SCTP packets (S6).
    Sctp,
    /// Fragments (P20): random cases leave them out.
    Fragments,
    /// IP options and VLAN tags (P21): a packet with options to a Service is dropped.
    Options,
    /// ICMP errors about translated flows (P19): random cases leave them out.
    IcmpErrors,
}

/// The gaps there are.
pub const GAPS: &[Gap] =
    &[Gap::SourceRanges, Gap::Affinity, Gap::Ipv6, Gap::Sctp, Gap::Fragments, Gap::Options, Gap::IcmpErrors];

/// Whether a gap is still open.
pub fn is_open(gap: Gap) -> bool {
    GAPS.contains(&gap)
}
