//! Rings of names: which flows are half-open, and which are closing. Whoever begins or ends a flow gives it a name in the slot whose
//! turn it is, and the flow that had the slot goes, if it is of that stage still. So there are never more flows of a stage than its
//! ring has slots, and packets under way, whatever the number of CPUs: a flow without a name does not stay.
//!
//! A slot is changed by whoever has set [`Name::BUSY`] in it, so a name is never mixed of two.

use crate::atomic;
use crate::flow;
use crate::maps::{CLOSING, FLOWS, HALF_OPEN, TURNS};
use crate::repeat::{Step, Steps, repeat};
use core::marker::PhantomData;
use dataplane_common::flow::{Flow, FlowKey, Name, RingTurns, Stage};
use dataplane_common::tables::{self, Table as _};

/// How many slots `half_open` and `closing` have. The agent writes it before it loads the programs.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata")]
static HALF_OPEN_ROOM: u32 = tables::HalfOpen::CAPACITY as u32;
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata")]
static CLOSING_ROOM: u32 = tables::Closing::CAPACITY as u32;

/// A ring.
pub trait Ring {
    /// Its element of `turns`.
    const TURNS: u32;
    /// The stage of the flows that it names.
    const STAGE: Stage;
    /// Whether more of them than one go where room is made.
    const ALL_GO: bool;

    /// How many slots it has.
    fn room() -> u32;

    /// A slot.
    fn slot(index: u32) -> Option<*mut Name>;

    /// Whether a flow that it names is left alone, if the next names tell of one that can go.
    fn spares(flow: &Flow, proto: u8) -> bool;
}

/// The ring `half_open`.
pub enum HalfOpenRing {}

impl Ring for HalfOpenRing {
    const TURNS: u32 = RingTurns::HALF_OPEN;
    const STAGE: Stage = Stage::HalfOpen;
    const ALL_GO: bool = false;

    #[inline(always)]
    fn room() -> u32 {
        // SAFETY: a valid static. Volatile, because the agent changes what the compiler sees.
        unsafe { (&raw const HALF_OPEN_ROOM).read_volatile() }
    }

    #[inline(always)]
    fn slot(index: u32) -> Option<*mut Name> {
        HALF_OPEN.get_ptr_mut(index)
    }

    #[inline(always)]
    fn spares(flow: &Flow, proto: u8) -> bool {
        flow::waits(flow) && !flow::is_answered_question(flow, proto)
    }
}

/// The ring `closing`.
pub enum ClosingRing {}

impl Ring for ClosingRing {
    const TURNS: u32 = RingTurns::CLOSING;
    const STAGE: Stage = Stage::Closing;
    const ALL_GO: bool = true;

    #[inline(always)]
    fn room() -> u32 {
        // SAFETY: as above.
        unsafe { (&raw const CLOSING_ROOM).read_volatile() }
    }

    #[inline(always)]
    fn slot(index: u32) -> Option<*mut Name> {
        CLOSING.get_ptr_mut(index)
    }

    #[inline(always)]
    fn spares(_flow: &Flow, _proto: u8) -> bool {
        false
    }
}

/// How many names are looked at for one that need not be spared: most often the first is of a flow that is further by now, or went.
const LOOKED_AT: u32 = 4;

/// How many slots are tried, if other CPUs have theirs at this moment: a whole round of the ring later, or earlier.
const TRIED: u32 = LOOKED_AT + 4;

/// Gives out the next turn.
#[inline(always)]
pub fn next<R: Ring>() -> u64 {
    let Some(turns) = TURNS.get_ptr_mut(R::TURNS) else { return 0 };
    // SAFETY: an element of an array, which stays.
    unsafe { atomic::fetch_add(&raw mut (*turns).head, 1) + 1 }
}

/// Gives the flow with this key a name, in this turn if its slot can be had, and takes the slot's flow away. The turn, which the flow
/// must say; 0 if no name is to be had: the flow must not stay then.
#[inline(never)]
pub fn name<R: Ring>(key: &FlowKey, turn: u64) -> u32 {
    let mut naming = Naming::<R> { key, first: turn, given: 0, ring: PhantomData };
    repeat(TRIED, &mut naming);
    naming.given
}

/// The search for a slot.
struct Naming<'a, R> {
    key: &'a FlowKey,
    first: u64,
    given: u32,
    ring: PhantomData<R>,
}

impl<R: Ring> Naming<'_, R> {
    /// The turn to look at in a step: the first, those that follow it, the first again, and then others.
    #[inline(always)]
    fn turn(&mut self, index: u32) -> u64 {
        if index > LOOKED_AT {
            self.first = next::<R>();
        }
        if index < LOOKED_AT { self.first + index as u64 } else { self.first }
    }
}

impl<R: Ring> Steps for Naming<'_, R> {
    fn step(&mut self, index: u32) -> Step {
        let turn = self.turn(index);
        let Some(slot) = slot::<R>(turn) else { return Step::Done };
        // SAFETY: an element of an array, which stays; aligned words. The key is written by whoever has the slot.
        unsafe {
            let had = (&raw const (*slot).turn).read_volatile();
            if index < LOOKED_AT && spares::<R>(slot, had) || turn as u32 == 0 || !take(slot, had) {
                return Step::Next;
            }
            evict::<R>(&raw const (*slot).key, had);
            (&raw mut (*slot).key).write_volatile(*self.key);
            atomic::publish(&raw mut (*slot).turn, turn);
            if turn != self.first
                && let Some(turns) = TURNS.get_ptr_mut(R::TURNS)
            {
                // Those that were looked at and spared have had their turn.
                atomic::compare_exchange(&raw mut (*turns).head, self.first, turn);
            }
        }
        self.given = turn as u32;
        Step::Done
    }
}

/// Takes away flows that a ring names, the oldest first: one or all of some names. Whether any went.
#[inline(never)]
pub fn clear<R: Ring>() -> bool {
    let mut clearance = Clearance::<R> { made: false, ring: PhantomData };
    repeat(CLEARED, &mut clearance);
    clearance.made
}

/// How many names are looked at to make room.
const CLEARED: u32 = 64;

/// The search for flows that can go.
struct Clearance<R> {
    made: bool,
    ring: PhantomData<R>,
}

impl<R: Ring> Steps for Clearance<R> {
    fn step(&mut self, _index: u32) -> Step {
        let Some(turns) = TURNS.get_ptr_mut(R::TURNS) else { return Step::Done };
        // SAFETY: elements of arrays, which stay; aligned words.
        unsafe {
            let head = (&raw const (*turns).head).read_volatile();
            let tail = (&raw const (*turns).tail).read_volatile();
            let turn = tail.max(head.saturating_sub(R::room() as u64)) + 1;
            if turn > head {
                return Step::Done;
            }
            // Whoever moves it on has the turn.
            if atomic::compare_exchange(&raw mut (*turns).tail, tail, turn) != tail {
                return Step::Next;
            }
            let Some(slot) = slot::<R>(turn) else { return Step::Done };
            let had = (&raw const (*slot).turn).read_volatile();
            if had == 0 || !take(slot, had) {
                return Step::Next;
            }
            let gone = evict::<R>(&raw const (*slot).key, had);
            atomic::publish(&raw mut (*slot).turn, 0);
            if !gone {
                return Step::Next;
            }
        }
        self.made = true;
        if R::ALL_GO { Step::Next } else { Step::Done }
    }
}

#[inline(always)]
fn slot<R: Ring>(turn: u64) -> Option<*mut Name> {
    let room = R::room();
    if room == 0 {
        return None;
    }
    R::slot((turn % room as u64) as u32)
}

/// Takes a slot, if it is as it was seen and nobody has it.
///
/// # Safety
/// `slot` must be one of a ring.
#[inline(always)]
unsafe fn take(slot: *mut Name, seen: u64) -> bool {
    // SAFETY: the caller promises it.
    unsafe {
        seen & Name::BUSY == 0
            && atomic::compare_exchange(&raw mut (*slot).turn, seen, seen | Name::BUSY) == seen
    }
}

/// Whether a slot names a flow that is to be spared. If the name changes meanwhile, the slot cannot be taken as it was seen.
///
/// # Safety
/// As [`take`].
#[inline(always)]
unsafe fn spares<R: Ring>(slot: *const Name, turn: u64) -> bool {
    // SAFETY: the caller promises it.
    let key = unsafe { &(*slot).key };
    let Some(flow) = FLOWS.get_ptr(key) else { return false };
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
    let flow: &Flow = unsafe { &*flow };
    flow.stage() == R::STAGE && flow.turn == turn as u32 && R::spares(flow, key.proto())
}

/// Removes the flow that has this name, if it is of the ring's stage still. Whether it was.
///
/// # Safety
/// `key` must be of a slot that was taken.
#[inline(always)]
unsafe fn evict<R: Ring>(key: *const FlowKey, turn: u64) -> bool {
    // SAFETY: the caller promises it.
    let key = unsafe { &*key };
    let Some(entry) = FLOWS.get_ptr(key) else { return false };
    // SAFETY: an element of a map, valid until the program ends; each field is one aligned read.
    let flow: &Flow = unsafe { &*entry };
    let named = flow.stage() == R::STAGE && flow.turn == turn as u32;
    // SAFETY: an element of the map.
    named && unsafe { flow::remove_live(key, entry) }
}
