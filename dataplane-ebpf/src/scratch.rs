//! Working memory of a walk: one element per CPU, because the stack of an eBPF program has 512 bytes only.
//!
//! Programs at XDP and tc run with bottom halves disabled and do not nest, so an element has one user at a time. The
//! socket hooks run in preemptible process context and must not use it.

use crate::flow::{Claim, Ending};
use crate::icmp::Changes;
use crate::interest::Interest;
use crate::maps::SCRATCH;
use crate::parse::Packet;
use crate::path::{End, Summed, Tried};
use crate::reject::Refusal;
use crate::service::{Endpoints, Source};
use crate::verdict::{Code, Exit, Way};
use aya_ebpf::bindings::bpf_fib_lookup;
use dataplane_common::crc32c::Product;
use dataplane_common::event::What;
use dataplane_common::flow::{Attempt, Flow, FlowKey};
use dataplane_common::kept::Kept;
use dataplane_common::node::SourceRule;

/// What a walk knows.
///
/// All zero is a valid value: that is how the kernel makes the element.
#[derive(Clone, Copy)]
pub struct Scratch {
    /// The packet's headers.
    pub packet: Packet,
    /// If it is an ICMP error: the headers it quotes.
    pub quoted: Packet,
    /// By how much its translation changes sums.
    pub changes: Changes,
    /// Its five-tuple.
    pub key: FlowKey,
    /// The flow that was found, or the client's half of the one that begins.
    pub flow: Flow,
    /// The verdict on its packet.
    code: Code,
    /// How it may concern us.
    interest: Interest,
    /// How it ends by this packet.
    pub end: End,
    /// What whoever watches is told where one begins.
    pub told: What,
    /// The endpoint's half of the flow that begins.
    pub reply: Flow,
    /// What came of the attempt to enter it.
    pub claim: Claim,
    /// Which flows it may end.
    pub ending: Ending,
    /// What the flow that begins has to choose from.
    pub opening: Opening,
    /// How it comes to its endpoint.
    pub attempt: Attempt,
    /// The tick at which it begins.
    pub now: u32,
    /// The turn in which it is named among the half-open.
    pub turn: u64,
    /// Why it leaves the endpoint that it had: the number of a reason; 0: it had none.
    pub moved: u32,
    /// The ids of the endpoints that were tried.
    pub tried: Tried,
    /// The keys of its reply, and of another flow that has it.
    pub keys: [FlowKey; 2],
    /// How its first packet leaves.
    pub exit: Exit,
    /// The packet by which the flow of a refusal began, and by which it begins again.
    pub kept: Kept,
    /// The sum of a datagram.
    pub sum: Summed,
    /// What the checksum of SCTP changes by, being taken. Here it adds nothing to the stack.
    pub product: Product,
    /// What tells its sender no.
    pub refusal: Refusal,
    /// Parameters of a route lookup.
    pub fib: bpf_fib_lookup,
    /// Where the packet goes past the stack.
    pub way: Way,
}

/// A flow that may begin.
///
/// All zero is a valid value.
#[derive(Clone, Copy)]
pub struct Opening {
    /// The endpoints that its client may have; not empty.
    pub endpoints: Endpoints,
    /// Id of the service port.
    pub service: u32,
    /// For how long its client comes back to the same endpoint; 0: not at all (S1).
    pub affinity_seconds: u32,
    /// Where its client is.
    pub source: Source,
    /// What becomes of the client's address.
    pub rule: SourceRule,
    /// Whether it may get another endpoint if its first does not answer (L5).
    pub retries: bool,
}

impl Scratch {
    /// Gives back what it was given, in a way that makes all verdicts look the same to the verifier: it walks what follows once.
    #[inline(always)]
    pub fn through_memory(&mut self, code: Code) -> Code {
        through(&mut self.code, code)
    }

    /// The same of what a packet may be.
    #[inline(always)]
    pub fn interest_through_memory(&mut self, interest: Interest) -> Interest {
        through(&mut self.interest, interest)
    }

    /// The same of how it leaves.
    #[inline(always)]
    pub fn exit_through_memory(&mut self, exit: Exit) -> Exit {
        through(&mut self.exit, exit)
    }
}

/// Writes a value to memory of which the verifier knows nothing, and reads it back.
#[inline(always)]
fn through<T: Copy>(memory: &mut T, value: T) -> T {
    let at = &raw mut *memory;
    // SAFETY: a reference is valid for both.
    unsafe {
        at.write_volatile(value);
        at.read_volatile()
    }
}

const _: () = assert!(size_of::<Scratch>() <= size_of::<[u64; 128]>() && align_of::<Scratch>() <= 8);

/// This CPU's working memory.
#[inline(always)]
pub fn get() -> Option<&'static mut Scratch> {
    // SAFETY: the element is large enough and aligned (asserted above), it holds zeros or what an earlier walk left, and
    // nobody else uses it while this program runs on this CPU.
    SCRATCH.get_ptr_mut(0).map(|element| unsafe { &mut *element.cast::<Scratch>() })
}
