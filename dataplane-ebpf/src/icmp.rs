//! ICMP errors about translated packets (P19): the packet that they quote becomes again what its sender knows.
//!
//! An error is a packet of the flow in the direction opposite to the packet it quotes, and its addresses become what that
//! direction's become. All checksums change by what they cover, so that a wrong one stays wrong.

use crate::frame::{Frame, Refused};
use crate::nat::{self, Rewrite};
use crate::scratch::Scratch;
use dataplane_common::Protocol;
use dataplane_common::checksum::{Sum, update};

/// Offset of the checksum in an ICMP header.
const CHECKSUM: u32 = 2;

/// By how much sums changed: of the error's own addresses, of the quoted addresses, of all quoted bytes.
///
/// It belongs into the walk's working memory, where the verifier does not tell apart what came of the families.
#[derive(Clone, Copy)]
pub struct Changes {
    pub(crate) outer: u64,
    addresses: u64,
    quote: u64,
}

/// Translates what the error `packet` quotes. `flow` is the direction in which the error goes,
/// `changes.outer` by how much the sum of its own addresses changed.
///
/// # Errors
/// [`Refused`]: the packet may be half changed and must be dropped.
#[inline(always)]
pub fn requote<F: Frame>(frame: &mut F, s: &mut Scratch) -> Result<(), Refused> {
    requote_network(frame, s)?;
    requote_transport(frame, s)?;
    // The checksum of ICMPv6 covers the addresses, that of ICMP does not (RFC 4443 section 2.3, RFC 792).
    let covered = if s.packet.is_v4() { 0 } else { s.changes.outer };
    let at = s.packet.l4() + CHECKSUM;
    let field = frame.read::<2>(at).ok_or(Refused)?;
    frame.write_counted(at, &update(field, Sum(s.changes.quote + covered)))
}

/// Turns the quoted network header round: what the flow's packets become in one direction, the quoted one was in the other.
#[inline(never)]
fn requote_network<F: Frame>(frame: &mut F, s: &mut Scratch) -> Result<(), Refused> {
    let original = Rewrite {
        src: s.flow.dst,
        dst: s.flow.src,
        src_port: s.flow.dst_port,
        dst_port: s.flow.src_port,
        ttl: s.quoted.ttl,
    };
    s.changes.addresses = nat::apply_to_network(frame, &s.quoted, &original)?.0;
    Ok(())
}

/// The same with what is there of the quoted transport header.
#[inline(never)]
fn requote_transport<F: Frame>(frame: &mut F, s: &mut Scratch) -> Result<(), Refused> {
    let quoted = &s.quoted;
    let ([a, b], [c, d]) = (s.flow.dst_port.bytes(), s.flow.src_port.bytes());
    frame.write_counted(quoted.l4(), &[a, b, c, d])?;
    let ports =
        Sum::default().minus(&quoted.src_port.bytes()).minus(&quoted.dst_port.bytes()).plus(&[a, b, c, d]);
    // The header checksum of IPv4 makes up for the addresses.
    s.changes.quote = ports.0 + if s.packet.is_v4() { 0 } else { s.changes.addresses };
    // Often eight bytes of the transport header are all that is quoted, and no checksum is among those of TCP. The CRC32c of
    // SCTP is nothing that a receiver of errors could verify: it looks at the tag (RFC 9260 section 10).
    let at = quoted.checksum_offset();
    if quoted.proto != Protocol::Sctp as u8 && at + 2 <= s.packet.l3() + s.packet.length {
        let old = frame.read::<2>(at).ok_or(Refused)?;
        let new = transport_checksum(old, Sum(s.changes.addresses + ports.0), quoted.proto);
        s.changes.quote = Sum(s.changes.quote).minus(&old).plus(&new).0;
        frame.write_counted(at, &new)?;
    }
    Ok(())
}

/// A transport checksum after what it covers changed. In UDP zero means none, and stays (RFC 768).
#[inline(always)]
fn transport_checksum(old: [u8; 2], covered: Sum, proto: u8) -> [u8; 2] {
    let udp = proto == Protocol::Udp as u8;
    if udp && old == [0; 2] {
        return old;
    }
    let new = update(old, covered);
    if udp && new == [0; 2] { [0xff; 2] } else { new }
}
