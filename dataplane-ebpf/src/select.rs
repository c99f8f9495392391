//! Choosing one endpoint of a set.

use crate::atomic;
use crate::maps::{BACKENDS, ROUNDS, SLOTS};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::drop::Reason;
use dataplane_common::hash::mix;
use dataplane_common::service::{Algorithm, EndpointSet};
use dataplane_common::{Addr, Port, read_word};

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

/// A number by which one of a set is chosen, from all of `u32`: by turns, whose turn it is; else what is drawn or hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Number(pub u32);

/// The slot of a set that is not empty to which a number leads, counted from its base.
#[inline(always)]
pub fn place(set: EndpointSet, algorithm: Algorithm, Number(number): Number) -> u32 {
    match algorithm {
        Algorithm::RoundRobin => number % set.count().max(1),
        // The upper half of the product is uniform in 0 .. count, without a division.
        Algorithm::Random | Algorithm::Maglev | Algorithm::SourceHash => {
            ((number as u64 * set.count() as u64) >> 32) as u32
        }
    }
}

/// The endpoint in a slot of a set.
///
/// # Errors
/// [`Reason::CorruptTable`] if the slot leads nowhere.
#[inline(always)]
pub fn at(set: EndpointSet, place: u32) -> Result<Chosen, Reason> {
    let id = *SLOTS.get(set.base() + place).ok_or(Reason::CorruptTable)?;
    backend(id).ok_or(Reason::CorruptTable)
}

/// A number that nobody knows before.
#[inline(always)]
pub fn random() -> Number {
    // SAFETY: a helper without arguments.
    Number(unsafe { bpf_get_prandom_u32() })
}

/// The number of a client at this address, the same on all nodes (L2).
#[inline(always)]
pub fn of_client(addr: &Addr, seed: u64) -> Number {
    Number((mix(addr.words(), seed) >> 32) as u32)
}

/// The next turn of a service port (L2). Who takes none in the end must give it back.
#[inline(always)]
pub fn turn(service: u32) -> Number {
    let Some(round) = ROUNDS.get_ptr_mut(service) else { return Number(0) };
    // SAFETY: a word of a map, aligned, valid until the program ends.
    Number(unsafe { atomic::fetch_add(round, 1) } as u32)
}

/// Gives a turn back: the flow has not begun.
#[inline(always)]
pub fn give_back(service: u32) {
    if let Some(round) = ROUNDS.get_ptr_mut(service) {
        // SAFETY: a word of a map, aligned, valid until the program ends.
        unsafe { atomic::fetch_add(round, u64::MAX) };
    }
}

/// The backend with an id. Written only while no slot holds the id, so its address cannot change under the reader.
#[inline(always)]
pub fn backend(id: u32) -> Option<Chosen> {
    let backend = BACKENDS.get_ptr(id)?;
    // SAFETY: array elements stay; the status comes first.
    let (status, backend): (BackendStatus, &Backend) = unsafe { (read_word(backend.cast()), &*backend) };
    if status.generation() == 0 {
        return None;
    }
    Some(Chosen { addr: *backend.addr(), port: backend.port(), id, status })
}

/// Generation and state of the backend with an id.
#[inline(always)]
pub fn status(id: u32) -> BackendStatus {
    owner(id).0
}

/// Generation and state of the backend with an id, and the id of its service port: the one that it had at that generation or
/// at a later one.
#[inline(always)]
pub fn owner(id: u32) -> (BackendStatus, u32) {
    let Some(backend) = BACKENDS.get_ptr(id) else { return (BackendStatus::default(), 0) };
    // SAFETY: array elements stay; the status comes first.
    unsafe { (read_word(backend.cast::<BackendStatus>()), (*backend).service()) }
}
