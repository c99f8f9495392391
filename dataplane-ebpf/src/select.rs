//! Choosing one endpoint of a set.

use crate::maps::{BACKENDS, SLOTS};
use crate::repeat::{Step, Steps, repeat};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use dataplane_common::backend::{Backend, BackendStatus};
use dataplane_common::drop::Reason;
use dataplane_common::service::EndpointSet;
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

/// One endpoint of a set that is not empty, each as likely as any other.
///
/// # Errors
/// [`Reason::CorruptTable`] if a slot leads nowhere.
#[inline(always)]
pub fn select(set: EndpointSet) -> Result<Chosen, Reason> {
    // SAFETY: a helper without arguments.
    by(set, unsafe { bpf_get_prandom_u32() })
}

/// The endpoint of a set that is not empty to which a number from all of `u32` leads.
///
/// # Errors
/// As [`select`].
#[inline(always)]
pub fn by(set: EndpointSet, number: u32) -> Result<Chosen, Reason> {
    // The upper half of the product is uniform in 0 .. count, without a division.
    let index = set.base() + ((number as u64 * set.count() as u64) >> 32) as u32;
    let id = *SLOTS.get(index).ok_or(Reason::CorruptTable)?;
    backend(id).ok_or(Reason::CorruptTable)
}

/// A search for an id in a set, as its steps see it: the slots `low .. high` may hold it.
struct IdSearch {
    low: u32,
    high: u32,
    id: u32,
    found: bool,
}

/// Whether the set holds the backend with this id. The slots of a set are in the order of their ids.
#[inline(always)]
pub fn contains(set: EndpointSet, id: u32) -> bool {
    let mut search =
        IdSearch { low: set.base(), high: set.base().saturating_add(set.count()), id, found: false };
    repeat(SEARCH_STEPS, &mut search);
    search.found
}

/// Steps that find an id among as many slots as a table can have.
const SEARCH_STEPS: u32 = u32::BITS + 1;

impl Steps for IdSearch {
    fn step(&mut self, _index: u32) -> Step {
        if self.low >= self.high {
            return Step::Done;
        }
        let middle = self.low + (self.high - self.low) / 2;
        let Some(id) = SLOTS.get(middle) else { return Step::Done };
        if *id < self.id {
            self.low = middle + 1;
        } else if *id > self.id {
            self.high = middle;
        } else {
            self.found = true;
            return Step::Done;
        }
        Step::Next
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
    // SAFETY: array elements stay; the status comes first.
    BACKENDS.get_ptr(id).map_or(BackendStatus::default(), |backend| unsafe { read_word(backend.cast()) })
}
