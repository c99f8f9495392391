//! What becomes of a packet.

use dataplane_common::Addr;
use dataplane_common::drop::Reason;

/// What the walk decided. Whatever it wrote is complete: a packet is never passed on half changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours, or translated and left to the host's stack.
    Pass,
    /// Silence, counted.
    Drop(Reason),
    /// Past the stack to the neighbour of the walk's [`Way`]; the frame holds the translated packet.
    Forward,
    /// Up to the stack as if it had come in on the interface of the walk's [`Way`].
    HandUp,
    /// Tell the sender no, with a RST or an ICMP error that fits the reason.
    Refuse(Reason),
    /// XDP cannot finish the packet: it passes unwritten, and tc does the work.
    LeaveToTc,
    /// Out by the interface of the walk's [`Way`], as what the node itself sends: it meets what is met there.
    SendOut,
    /// Not decided: the packet refuses what began its flow, which goes to another endpoint (L5). Never the end of a walk.
    Turn,
    /// Not decided: the packet belongs to no flow yet. Never the end of a walk.
    Begin,
    /// The frame holds an answer (RST or ICMP) for whoever sent the packet.
    Answer,
}

/// How a translated packet leaves the hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// To the host's stack.
    Stack,
    /// Past the stack, by the walk's way.
    Forward,
    /// Up the stack, as if it had come in on the interface of the walk's way.
    HandUp,
}

impl Exit {
    /// The verdict on a packet that was written.
    #[inline(always)]
    pub const fn verdict(self) -> Verdict {
        match self {
            Self::Stack => Verdict::Pass,
            Self::Forward => Verdict::Forward,
            Self::HandUp => Verdict::HandUp,
        }
    }

    /// The exit that leads to a verdict.
    ///
    /// # Errors
    /// The verdict, if it is not on a packet that leaves.
    #[inline(always)]
    pub const fn of(verdict: Verdict) -> Result<Self, Verdict> {
        match verdict {
            Verdict::Pass => Ok(Self::Stack),
            Verdict::Forward => Ok(Self::Forward),
            Verdict::HandUp => Ok(Self::HandUp),
            Verdict::Drop(_) | Verdict::Refuse(_) | Verdict::Answer => Err(verdict),
            Verdict::Begin | Verdict::Turn | Verdict::SendOut | Verdict::LeaveToTc => Err(verdict),
        }
    }
}

/// A verdict as one number, for the border of a function that is not inlined: the payload of an enum is undefined where
/// a variant has none, and the verifier refuses to pass on what nobody wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Code(u32);

impl Code {
    /// [`Verdict::Begin`].
    pub const BEGIN: Self = Self(Self::BEGIN_TAG);
    /// [`Verdict::Turn`].
    pub const TURN: Self = Self(Self::TURN_TAG);
    /// [`Verdict::Answer`].
    pub const ANSWER: Self = Self(Self::ANSWER_TAG);

    const PASS_TAG: u32 = 0;
    const FORWARD_TAG: u32 = 1;
    const HAND_UP_TAG: u32 = 2;
    const ANSWER_TAG: u32 = 3;
    const LEAVE_TO_TC_TAG: u32 = 4;
    const BEGIN_TAG: u32 = 5;
    const DROP_TAG: u32 = 6;
    const REFUSE_TAG: u32 = 7;
    const SEND_OUT_TAG: u32 = 8;
    const TURN_TAG: u32 = 9;
    const TAG_BITS: u32 = 8;

    /// The verdict. A number that stands for none is a drop, named as what it would be: a mistake.
    #[inline(always)]
    pub fn verdict(self) -> Verdict {
        let reason = Reason::from_number((self.0 >> Self::TAG_BITS) as u8);
        match self.0 & ((1 << Self::TAG_BITS) - 1) {
            Self::PASS_TAG => Verdict::Pass,
            Self::FORWARD_TAG => Verdict::Forward,
            Self::HAND_UP_TAG => Verdict::HandUp,
            Self::ANSWER_TAG => Verdict::Answer,
            Self::LEAVE_TO_TC_TAG => Verdict::LeaveToTc,
            Self::BEGIN_TAG => Verdict::Begin,
            Self::REFUSE_TAG => Verdict::Refuse(reason),
            Self::SEND_OUT_TAG => Verdict::SendOut,
            Self::TURN_TAG => Verdict::Turn,
            _ => Verdict::Drop(reason),
        }
    }
}

impl From<Verdict> for Code {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        Self(match verdict {
            Verdict::Pass => Self::PASS_TAG,
            Verdict::Forward => Self::FORWARD_TAG,
            Verdict::HandUp => Self::HAND_UP_TAG,
            Verdict::Answer => Self::ANSWER_TAG,
            Verdict::LeaveToTc => Self::LEAVE_TO_TC_TAG,
            Verdict::Begin => Self::BEGIN_TAG,
            Verdict::SendOut => Self::SEND_OUT_TAG,
            Verdict::Turn => Self::TURN_TAG,
            Verdict::Drop(reason) => Self::DROP_TAG | (reason as u32) << Self::TAG_BITS,
            Verdict::Refuse(reason) => Self::REFUSE_TAG | (reason as u32) << Self::TAG_BITS,
        })
    }
}

/// Where a packet goes past the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Index of the interface.
    pub ifindex: u32,
    /// Whether `destination_mac` and `source_mac` are those of a known neighbour.
    pub resolved: bool,
    /// Where the packet is too long for the way: the way's MTU in bytes.
    pub mtu: u16,
    /// Link-layer address of the neighbour, or of the interface that a packet is handed up on.
    pub destination_mac: [u8; 6],
    /// Link-layer address of the exit interface.
    pub source_mac: [u8; 6],
    /// The neighbour: a gateway, or the destination itself.
    pub neighbour: Addr,
    /// The address that the kernel would send from.
    pub source: Addr,
}
