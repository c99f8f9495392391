//! Backends: the endpoints of service ports.

use crate::{Addr, Port};
use bytemuck::{Pod, Zeroable};

/// What becomes of a backend. One aligned word, so that generation and state are read together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct BackendStatus {
    generation: u32,
    flags: u32,
}

impl BackendStatus {
    /// The endpoint is *serving*: flows to it go on. Without it a UDP flow chooses anew (C1).
    pub const SERVING: u32 = 1 << 0;
    /// The endpoint is on this node, whether in a pod's own network or in the node's.
    pub const LOCAL: u32 = 1 << 1;
    /// The cluster set holds it: new flows of that set may come to it.
    pub const IN_CLUSTER: u32 = 1 << 2;
    /// The local set holds it.
    pub const IN_LOCAL: u32 = 1 << 3;

    /// From the id's generation (how often the id was given out) and the flags above.
    pub const fn new(generation: u32, flags: u32) -> Self {
        Self { generation, flags }
    }

    /// How often this id was given out: a flow that remembers another number belongs to an endpoint that is gone.
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        self.generation
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
}

/// One endpoint of one service port: value of the `backends` array, indexed by its id. 32 bytes.
///
/// Written only while no slot holds its id; only `status` and `weight` change later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Backend {
    status: BackendStatus,
    addr: Addr,
    service: u32,
    port: Port,
    weight: u16,
}

impl Backend {
    /// The endpoint at `addr` and `port`, of the service port with id `service`, of weight 1.
    pub const fn new(status: BackendStatus, addr: Addr, port: Port, service: u32) -> Self {
        Self { status, addr, service, port, weight: 1 }
    }

    /// The same backend with another weight.
    #[must_use]
    pub const fn with_weight(mut self, weight: u16) -> Self {
        self.weight = weight;
        self
    }

    /// Its share of new flows, against that of the others of its service port (L3).
    #[inline(always)]
    pub const fn weight(&self) -> u16 {
        self.weight
    }

    /// Generation and state.
    #[inline(always)]
    pub const fn status(&self) -> BackendStatus {
        self.status
    }

    /// The same backend in another state.
    #[must_use]
    pub const fn with_status(mut self, status: BackendStatus) -> Self {
        self.status = status;
        self
    }

    /// Where the endpoint listens.
    #[inline(always)]
    pub const fn addr(&self) -> &Addr {
        &self.addr
    }

    /// The port it listens on.
    #[inline(always)]
    pub const fn port(&self) -> Port {
        self.port
    }

    /// Id of its service port.
    #[inline(always)]
    pub const fn service(&self) -> u32 {
        self.service
    }
}
