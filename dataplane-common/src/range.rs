//! Source ranges: who may call the restricted addresses of a service port (S2).

use crate::Addr;
use bytemuck::{Pod, Zeroable};

/// Key of `source_ranges`, a table of longest prefixes: a service port and a range of addresses. 24 bytes.
///
/// The number of bits that count comes first, as the kernel wants it; they begin with those of the service port's id, all
/// of which count always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct SourceRangeKey {
    bits: u32,
    service: u32,
    addr: Addr,
}

impl SourceRangeKey {
    /// In place of a service port's id: who may call node ports (S2).
    pub const NODE_PORTS: u32 = 0;
    /// In place of a service port's id: who may call no Service from outside (S2).
    pub const DENIED: u32 = u32::MAX;

    /// The value of every entry: what is in the table is allowed.
    pub const ALLOWED: u32 = 1;

    const SERVICE_BITS: u32 = u32::BITS;
    const ADDRESS_BITS: u32 = 128;

    /// The range of `bits` leading bits of the 128 of `addr` (an IPv4 range's length plus 96), for the service port with
    /// this id. What the other bits are does not matter, except to who compares keys.
    #[inline(always)]
    pub const fn new(service: u32, addr: Addr, bits: u32) -> Self {
        Self { bits: Self::SERVICE_BITS + bits, service, addr }
    }

    /// The key that finds whatever range of the service port holds `addr`.
    #[inline(always)]
    pub const fn one(service: u32, addr: Addr) -> Self {
        Self::new(service, addr, Self::ADDRESS_BITS)
    }

    /// Whether the range is the node's own, and no service port's.
    pub const fn is_of_node(&self) -> bool {
        self.service == Self::NODE_PORTS || self.service == Self::DENIED
    }

    /// Id of the service port.
    pub const fn service(&self) -> u32 {
        self.service
    }

    /// First address of the range.
    pub const fn addr(&self) -> &Addr {
        &self.addr
    }

    /// How many leading bits of the address count, of 128.
    pub const fn bits(&self) -> u32 {
        self.bits.saturating_sub(Self::SERVICE_BITS)
    }
}
