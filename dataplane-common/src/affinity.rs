//! Session affinity: which endpoint a client had last (S1).

use crate::Addr;
use bytemuck::{Pod, Zeroable};

/// Key of `affinity`: a client and a service port. 24 bytes.
///
/// A client is an address before translation. For sockets of pods, which have no address yet when they connect, it is
/// the cookie of their network namespace. The node itself is its primary address, on either path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct AffinityKey {
    client: Addr,
    service: u32,
    by_cookie: u32,
}

impl AffinityKey {
    /// A client by its address.
    #[inline(always)]
    pub const fn address(client: Addr, service: u32) -> Self {
        Self { client, service, by_cookie: 0 }
    }

    /// A client by the cookie of its network namespace.
    #[inline(always)]
    pub const fn namespace(cookie: u64, service: u32) -> Self {
        Self { client: Addr::from_words([cookie, 0]), service, by_cookie: 1 }
    }

    /// The client, if it is told by its address; else the cookie in its place.
    pub const fn client(&self) -> &Addr {
        &self.client
    }

    /// The key of the same client of another service port.
    #[must_use]
    pub const fn of_service(self, service: u32) -> Self {
        Self { service, ..self }
    }

    /// Id of the service port.
    pub const fn service(&self) -> u32 {
        self.service
    }
}

/// Value of `affinity`. Two words, each whole by itself: the endpoint changes seldom, the time with each new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Affinity {
    /// The endpoint.
    pub choice: Choice,
    /// When the client's last flow began, in nanoseconds of the coarse monotonic clock.
    pub last_used: u64,
}

/// A backend as it was when it was chosen; the value of `socket_choices` as well. One word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(8))]
pub struct Choice {
    /// Its id.
    pub backend: u32,
    /// The generation that the id had.
    pub generation: u32,
}
