//! What the socket hooks remember of the sockets whose destination they changed.

use crate::affinity::Choice;
use crate::{Addr, Port};
use bytemuck::{Pod, Zeroable};

/// Value of `socket_names`: the address that a program connected its TCP socket to, and the backend that counts the socket among what
/// is open. 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SocketName {
    /// The frontend's address.
    pub addr: Addr,
    /// The frontend's port; 0: the socket's destination is what the program asked for.
    pub port: Port,
    _zero: [u8; 6],
    /// The backend that counts it; all zero: none does.
    pub counted: Choice,
}

impl SocketName {
    /// The frontend `addr:port`; no backend counts it yet.
    #[inline(always)]
    pub const fn new(addr: Addr, port: Port) -> Self {
        let ([high, low], [a, b]) = (addr.words(), port.bytes());
        // In whole words: the compiler would make calls of what is not.
        bytemuck::must_cast([high, low, u64::from_ne_bytes([a, b, 0, 0, 0, 0, 0, 0]), 0])
    }
}

/// Key of `socket_peers`: a UDP socket and the endpoint it was sent to. 32 bytes.
///
/// A connected socket has one entry; an unconnected one has one for each endpoint it talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct SocketPeerKey {
    /// The socket's cookie.
    pub cookie: u64,
    /// The endpoint's address.
    pub addr: Addr,
    /// The endpoint's port.
    pub port: Port,
    proto: u16,
    _zero: u32,
}

impl SocketPeerKey {
    /// IP protocol number.
    pub const fn proto(&self) -> u8 {
        self.proto as u8
    }

    /// The key of one socket and one endpoint.
    #[inline(always)]
    pub const fn new(cookie: u64, addr: Addr, port: Port, proto: u8) -> Self {
        Self { cookie, addr, port, proto: proto as u16, _zero: 0 }
    }
}

/// Value of `socket_peers`: the address the program called. 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SocketPeer {
    /// The frontend's address.
    pub addr: Addr,
    /// Id of the service port.
    pub service: u32,
    /// Id of the backend.
    pub backend: u32,
    /// The generation the backend's id had.
    pub generation: u32,
    /// The frontend's port.
    pub port: Port,
    _zero: [u8; 2],
}

impl SocketPeer {
    /// The frontend `addr:port`, and what it was translated to.
    #[inline(always)]
    pub const fn new(addr: Addr, port: Port, service: u32, backend: u32, generation: u32) -> Self {
        Self { addr, service, backend, generation, port, _zero: [0; 2] }
    }
}

/// Key of `socket_choices`: an unconnected UDP socket and the service port it sends to. 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct SocketChoiceKey {
    /// The socket's cookie.
    pub cookie: u64,
    /// Id of the service port.
    pub service: u32,
    _zero: u32,
}

impl SocketChoiceKey {
    /// The key of one socket and one service port.
    #[inline(always)]
    pub const fn new(cookie: u64, service: u32) -> Self {
        Self { cookie, service, _zero: 0 }
    }
}
