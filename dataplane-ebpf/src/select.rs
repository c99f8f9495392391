//! Choosing one endpoint of a set.

use crate::maps::{BACKENDS, SLOTS};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::drop::Reason;
use dataplane_common::service::EndpointSet;
use dataplane_common::{Addr, Port};

/// An endpoint that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Its address.
    pub addr: Addr,
    /// The port it listens on.
    pub port: Port,
    /// Its backend's id.
    pub id: u32,
    /// Generation and state.
    pub status: BackendStatus,
}

/// One endpoint of a set that is not empty, each as likely as any other.
///
/// # Errors
/// [`Reason::CorruptTable`] if a slot leads nowhere.
#[inline(always)]
pub fn select(set: EndpointSet) -> Result<Chosen, Reason> {
    // SAFETY: a helper without arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    // The upper half of the product is uniform in 0 .. count, without a division.
    let index = set.base() + ((random as u64 * set.count() as u64) >> 32) as u32;
    let id = *SLOTS.get(index).ok_or(Reason::CorruptTable)?;
    backend(id).ok_or(Reason::CorruptTable)
}

/// The backend with an id. Written only while no slot holds the id, so its address cannot change under the reader.
#[inline(always)]
pub fn backend(id: u32) -> Option<Chosen> {
    let backend = BACKENDS.get_ptr(id)?;
    // SAFETY: array elements stay; the status is one word.
    let backend: &Backend = unsafe { &*backend };
    let status = backend.status();
    if status.generation() == 0 {
        return None;
    }
    Some(Chosen { addr: *backend.addr(), port: backend.port(), id, status })
}

/// Generation and state of the backend with an id.
#[inline(always)]
pub fn status(id: u32) -> BackendStatus {
    match BACKENDS.get_ptr(id) {
        // SAFETY: array elements stay; the status, which comes first, is one word.
        Some(backend) => unsafe { backend.cast::<BackendStatus>().read_volatile() },
        None => BackendStatus::default(),
    }
}
