//! What must be known of an uplink to hand packets up on it.

use bytemuck::{Pod, Zeroable};

/// The link-layer address of an uplink: value of the `uplinks` table. One aligned word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Uplink {
    mac: [u8; 6],
    _zero: [u8; 2],
}

impl Uplink {
    /// The uplink with this address; all zero if its packets have no link-layer header.
    pub const fn new(mac: [u8; 6]) -> Self {
        Self { mac, _zero: [0; 2] }
    }

    /// The address.
    #[inline(always)]
    pub const fn mac(&self) -> [u8; 6] {
        self.mac
    }
}
