//! Choosing one endpoint of a set.

use crate::maps::{BACKENDS, ROUNDS, SLOTS};
use crate::{atomic, count};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use dataplane_common::affinity::Choice;
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

impl Chosen {
    /// The backend, as it was when it was chosen.
    #[inline(always)]
    pub const fn choice(&self) -> Choice {
        Choice { backend: self.id, generation: self.status.generation() }
    }
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
        Algorithm::Random | Algorithm::Maglev | Algorithm::SourceHash | Algorithm::LeastConnections => {
            scaled(number, set.count())
        }
    }
}

/// A number from all of `u32` made one of `0 .. count`: the upper half of the product is uniform there, without a division.
#[inline(always)]
const fn scaled(number: u32, count: u32) -> u32 {
    ((number as u64 * count as u64) >> 32) as u32
}

/// Of two slots of a set that is not empty, the one whose endpoint has fewer open connections for its weight; of two that are equal the
/// first (L2). So where nothing is open each has its share. The slots are never the same where there are two.
#[inline(always)]
pub fn lighter(set: EndpointSet, Number(first): Number, Number(second): Number) -> u32 {
    let count = set.count();
    let one = scaled(first, count);
    let behind = one + 1 + scaled(second, count.saturating_sub(1));
    let other = if behind < count { behind } else { behind - count };
    let ((open, weight), (others, others_weight)) = (load(set, one), load(set, other));
    if others * weight < open * others_weight { other } else { one }
}

/// How many open connections the endpoint in a slot has, and its weight, which is 1 where it has none.
#[inline(always)]
fn load(set: EndpointSet, place: u32) -> (u64, u64) {
    let Some(id) = SLOTS.get(set.base() + place) else { return (0, 1) };
    // SAFETY: array elements stay; one aligned field.
    let weight = BACKENDS.get_ptr(*id).map_or(1, |backend| unsafe { (*backend).weight() });
    (count::open(*id) as u64, if weight == 0 { 1 } else { weight as u64 })
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

/// Another number that nobody knows before, from one.
#[inline(always)]
pub fn after(Number(first): Number) -> Number {
    Number((mix([first as u64], 0) >> 32) as u32)
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
