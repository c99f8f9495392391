//! Frontends: the addresses and ports that clients call, each leading to one service port.

use crate::{Addr, Port};
use bytemuck::{Pod, Zeroable};

/// Where a packet is going. 24 bytes.
///
/// A node port has the address [`Addr::UNSPECIFIED`] of its family (`::ffff:0.0.0.0` or `::`): whether the packet's
/// destination is a node port address is asked of the `node_addrs` table. A ClusterIP as such, for the ports that no
/// Service has (P13), has port [`Port::ANY`] and protocol 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
#[repr(C)]
pub struct FrontendKey {
    addr: Addr,
    port: Port,
    proto: u16,
    _zero: u32,
}

impl FrontendKey {
    /// The key of one address, port and protocol number.
    #[inline(always)]
    pub const fn new(addr: Addr, port: Port, proto: u8) -> Self {
        let ([a, b], [c, d]) = (addr.words(), port.bytes());
        let [p, q] = (proto as u16).to_ne_bytes();
        // In whole words, as the hash of the key will read it.
        bytemuck::must_cast([a, b, u64::from_ne_bytes([c, d, p, q, 0, 0, 0, 0])])
    }

    /// The key of an address whatever the port.
    #[inline(always)]
    pub const fn any_port(addr: Addr) -> Self {
        Self::new(addr, Port::ANY, 0)
    }

    /// The address.
    #[inline(always)]
    pub const fn addr(&self) -> &Addr {
        &self.addr
    }

    /// The port.
    #[inline(always)]
    pub const fn port(&self) -> Port {
        self.port
    }

    /// The IP protocol number; 0 together with [`Port::ANY`].
    #[inline(always)]
    pub const fn proto(&self) -> u8 {
        self.proto as u8
    }
}

/// What kind of address a frontend is: it decides which policy applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIp = 1,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancerIp = 2,
    /// `spec.externalIPs`.
    ExternalIp = 3,
    /// `spec.ports[].nodePort`.
    NodePort = 4,
    /// A ClusterIP on a port that no Service has: reject (P13). Leads to no service.
    ClosedPort = 5,
}

impl TryFrom<u8> for FrontendKind {
    type Error = u8;

    #[inline(always)]
    fn try_from(number: u8) -> Result<Self, u8> {
        match number {
            1 => Ok(Self::ClusterIp),
            2 => Ok(Self::LoadBalancerIp),
            3 => Ok(Self::ExternalIp),
            4 => Ok(Self::NodePort),
            5 => Ok(Self::ClosedPort),
            other => Err(other),
        }
    }
}

/// What a frontend leads to. One aligned word, so that a reader never sees half of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Frontend {
    service: u32,
    kind: u8,
    _zero: [u8; 3],
}

impl Frontend {
    /// A frontend of this kind for the service port with this id.
    pub const fn new(service: u32, kind: FrontendKind) -> Self {
        Self { service, kind: kind as u8, _zero: [0; 3] }
    }

    /// Id of the service port: the index into `services`.
    #[inline(always)]
    pub const fn service(self) -> u32 {
        self.service
    }

    /// The kind of address.
    ///
    /// # Errors
    /// The number itself, if it is no kind that this version knows.
    #[inline(always)]
    pub fn kind(self) -> Result<FrontendKind, u8> {
        self.kind.try_into()
    }
}
