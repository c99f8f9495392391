//! The search for a translated source port (P12).

use crate::flow::{self, Claim, Ending};
use crate::repeat::{Step, Steps, repeat};
use crate::service;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use dataplane_common::Port;
use dataplane_common::flow::{Flow, FlowKey};

/// How many steps a search for a translated source port takes (P12). At least every other one tries a port: with nine of
/// ten taken, all of these are once in 10^11 searches. A search that is in vain costs some tens of microseconds.
const PORT_STEPS: u32 = 512;

/// How many of them must be of no flow at all. The later ones may be of a flow that is over: clients that connect again and
/// again leave more of those than there are ports.
const UNUSED_PORT_TRIES: u32 = 8;

/// The search for a translated source port, as its steps see it.
struct PortSearch<'a> {
    key: &'a FlowKey,
    flow: &'a mut Flow,
    reply: &'a mut Flow,
    first: u32,
    range: u32,
    mask: u32,
    offset: u32,
    factor: u32,
    addend: u32,
    tried: u32,
    claim: Claim,
}

/// Claims a translated source port: a random one, then others in a random order, a bounded number of them (P12).
#[inline(always)]
pub(super) fn claim(key: &FlowKey, flow: &mut Flow, reply: &mut Flow) -> Claim {
    let Some(node) = service::node() else { return Claim::Taken };
    let (first, last) = (node.first_port as u32, node.last_port as u32);
    if last < first {
        return Claim::Taken;
    }
    // SAFETY: a helper without arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    let range = last - first + 1;
    let mut mask = range - 1;
    mask |= mask >> 1;
    mask |= mask >> 2;
    mask |= mask >> 4;
    mask |= mask >> 8;
    // A congruential generator of full period (Hull and Dobell 1962): it comes to each number up to the mask once, those
    // outside of the range are passed over. A walk by strides would see but a part of a range that shares a factor with its
    // stride, and pile up in front of what is taken.
    let (factor, addend) = ((random >> 16) & !3 | 1, (random >> 5) | 1);
    let mut search = PortSearch {
        key,
        flow,
        reply,
        first,
        range,
        mask,
        offset: random & mask,
        factor,
        addend,
        tried: 0,
        claim: Claim::Taken,
    };
    repeat(PORT_STEPS, &mut search);
    search.claim
}

impl Steps for PortSearch<'_> {
    fn step(&mut self) -> Step {
        let offset = self.offset;
        self.offset = offset.wrapping_mul(self.factor).wrapping_add(self.addend) & self.mask;
        if offset >= self.range {
            return Step::Next;
        }
        self.flow.src_port = Port::new((self.first + offset) as u16);
        let ending = if self.tried < UNUSED_PORT_TRIES { Ending::Nothing } else { Ending::Over };
        self.claim = flow::claim(self.key, self.flow, self.reply, ending);
        self.tried += 1;
        if self.claim == Claim::Taken { Step::Next } else { Step::Done }
    }
}
