//! The search for a translated source port (P12).

use crate::flow::{self, Claim, Ending};
use crate::maps::PORT_TURN;
use crate::repeat::{Step, Steps, repeat};
use crate::scratch::Scratch;
use crate::service;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use dataplane_common::Port;
use dataplane_common::flow::PortTurn;

/// How many steps a search for a translated source port takes (P12). At least every other one tries a port: with nine of
/// ten taken, all of these are once in 10^11 searches. A search that is in vain costs some tens of microseconds.
const PORT_STEPS: u32 = 512;

/// How many of them go on where the last search stopped, in an order that was drawn once. So a port comes again when all others
/// have been, and what it was of is over, if it does not last, and nothing of it on its way any more: clients that connect again
/// and again leave more of those than there are ports. The other steps are scattered: what lasts and began together lies together
/// in turn.
const IN_TURN: u32 = 16;

/// The search for a translated source port, as its steps see it.
struct PortSearch<'a> {
    scratch: &'a mut Scratch,
    first: u32,
    range: u32,
    mask: u32,
    turn: PortTurn,
    claim: Claim,
}

/// Claims a translated source port, one of few tries in turn or else of many at random (P12).
#[inline(always)]
pub(super) fn claim(scratch: &mut Scratch) -> Claim {
    let (Some(node), Some(turn)) = (service::node(), PORT_TURN.get_ptr_mut(0)) else {
        return Claim::Taken;
    };
    let (first, last) = (node.first_port as u32, node.last_port as u32);
    if last < first {
        return Claim::Taken;
    }
    let range = last - first + 1;
    let mut mask = range - 1;
    mask |= mask >> 1;
    mask |= mask >> 2;
    mask |= mask >> 4;
    mask |= mask >> 8;
    // SAFETY: array elements stay. Two CPUs may take the same turn: one of them finds the port taken.
    let mut begun = unsafe { turn.read_volatile() };
    if begun.number == 0 {
        begun.order = random();
    }
    let mut search = PortSearch { scratch, first, range, mask, turn: begun, claim: Claim::Taken };
    repeat(PORT_STEPS, &mut search);
    // SAFETY: as above.
    unsafe { turn.write_volatile(PortTurn { number: search.turn.number, ..begun }) };
    search.claim
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_get_prandom_u32() }
}

impl Steps for PortSearch<'_> {
    fn step(&mut self, index: u32) -> Step {
        if index == IN_TURN {
            self.turn.order = random();
        }
        let offset = self.turn.place(self.mask);
        self.turn.number = self.turn.number.wrapping_add(1);
        if offset >= self.range {
            return Step::Next;
        }
        let Scratch { key, flow, reply, .. } = &mut *self.scratch;
        flow.src_port = Port::new((self.first + offset) as u16);
        self.claim = flow::claim(key, flow, reply, Ending::Over);
        if self.claim == Claim::Taken { Step::Next } else { Step::Done }
    }
}
