//! The search for a translated source port (P12).

use crate::flow::{self, Claim, Ending};
use crate::maps::PORT_TURN;
use crate::repeat::{Step, Steps, repeat};
use crate::scratch::Scratch;
use crate::{outgoing, service};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use dataplane_common::Port;
use dataplane_common::flow::PortTurn;
use dataplane_common::node::Node;

/// How many steps a search for a translated source port takes (P12). More than every other one tries a port: with nine of ten
/// taken, all of these are once in 10^11 searches. A search that is in vain costs some tens of microseconds.
const PORT_STEPS: u32 = 512;

/// How many of them go on where the last search stopped, in an order that this CPU drew for the round: CPUs with the same order
/// would come to the same port at the same time. The other steps are scattered: what lasts and began together lies together in turn.
const IN_TURN: u32 = 16;

/// How many of them want a port of no flow at all. The later ones take one of a flow that is over: clients that connect again and
/// again leave more of those than there are ports. In turn it is one that this CPU has not given out in this round.
const UNUSED: u32 = 6;

/// From which step on a flow whose handshake makes no headway gives its port away as well, or a flood could keep them all. Where one
/// port in ten is to be had otherwise, one search in 800 comes here.
const LAST_RESORT: u32 = 64;

/// The search for a translated source port, as its steps see it.
struct PortSearch<'a> {
    scratch: &'a mut Scratch,
    node: &'a Node,
    mask: u32,
    turn: PortTurn,
}

/// Claims a translated source port, one of few tries in turn or else of many at random (P12). What came of it is in the working
/// memory.
#[inline(always)]
pub(super) fn claim(scratch: &mut Scratch) {
    scratch.claim = Claim::TAKEN;
    let (Some(node), Some(turn)) = (service::node(), PORT_TURN.get_ptr_mut(0)) else {
        return;
    };
    if node.port_count == 0 {
        return;
    }
    let mut mask = node.port_count - 1;
    mask |= mask >> 1;
    mask |= mask >> 2;
    mask |= mask >> 4;
    mask |= mask >> 8;
    // SAFETY: an element of this CPU alone.
    let mut begun = unsafe { turn.read_volatile() };
    if begun.order == 0 || begun.number > mask as u64 {
        begun = PortTurn { order: random(), number: 0 };
    }
    let mut search = PortSearch { scratch, node, mask, turn: begun };
    repeat(PORT_STEPS, &mut search);
    // SAFETY: as above.
    unsafe { turn.write_volatile(PortTurn { number: search.turn.number, ..begun }) };
}

#[inline(always)]
fn random() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { (bpf_get_prandom_u32() as u64) << 32 | bpf_get_prandom_u32() as u64 }
}

impl Steps for PortSearch<'_> {
    fn step(&mut self, index: u32) -> Step {
        if index == IN_TURN {
            self.turn.order = random();
        }
        let offset = self.turn.place(self.mask);
        self.turn.number = self.turn.number.wrapping_add(1);
        let port = self.node.port(offset);
        if port == 0 {
            return Step::Next;
        }
        let Scratch { key, flow, keys, ending, .. } = &mut *self.scratch;
        flow.src_port = Port::new(port);
        // Somebody else's connection by way of netfilter, whose answers would be taken for the flow's.
        keys[0] = flow.partner(key.proto());
        if outgoing::is_answered_by(&keys[0]) {
            return Step::Next;
        }
        // In memory, so that the verifier walks what follows once.
        let wanted = match index {
            0..UNUSED => Ending::NOTHING,
            UNUSED..LAST_RESORT => Ending::OVER,
            LAST_RESORT.. => Ending::IDLE,
        };
        // SAFETY: an own field.
        unsafe { (&raw mut *ending).write_volatile(wanted) };
        flow::claim(self.scratch);
        if self.scratch.claim == Claim::TAKEN { Step::Next } else { Step::Done }
    }
}
