//! Routes for packets that leave past the host's stack.

use crate::frame::Frame;
use crate::parse::Packet;
use crate::service::{node, node_address};
use crate::verdict::Way;
use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
    BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNREACHABLE,
    BPF_FIB_LKUP_RET_UNSUPP_LWT, BPF_FIB_LOOKUP_SRC, bpf_fib_lookup,
};
use aya_ebpf::helpers::bpf_fib_lookup as helper;
use aya_ebpf::helpers::generated::bpf_check_mtu;
use dataplane_common::Addr;
use dataplane_common::drop::Reason;
use dataplane_common::node::Node;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// Index of the loopback interface in every network namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// What the route lookup said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// There is a way.
    Via,
    /// The destination is the node itself.
    Local,
    /// The packet is longer than the way takes; `way.mtu` says how long it may be.
    TooBig,
    /// There is no way, as the kernel would tell the sender.
    Unreachable,
    /// There is no way.
    None(Reason),
}

/// The direction of a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The packet came in on the frame's interface.
    Received,
    /// The node itself sends it.
    Sent,
}

/// The kernel's route to `dst` for the packet in `frame` (`bpf_fib_lookup`).
///
/// The length is checked against the MTU, by segment where the packet will be segmented. What a router must not
/// forward, the lookup refuses. [`Route::Via`] fills `way`.
#[inline(always)]
pub fn route<F: Frame>(
    frame: &F,
    packet: &Packet,
    dst: &Addr,
    origin: Origin,
    fib: &mut bpf_fib_lookup,
    way: &mut Way,
) -> Route {
    let node = node();
    let family = if dst.is_v4() { AF_INET } else { AF_INET6 };
    let ([a, b], [c, d]) = (packet.src_port.bytes(), packet.dst_port.bytes());
    let [low, high] = wire_length(frame, packet).to_ne_bytes();
    // What the node itself sends has come in nowhere: the kernel looks it up as if from loopback. (With `BPF_FIB_LOOKUP_OUTPUT`
    // the interface would be the only one that the packet may leave by.)
    let ifindex = if origin == Origin::Sent { LOOPBACK } else { frame.ifindex() };
    let ([s0, s1, s2, s3], [d0, d1, d2, d3]) = (words(&packet.src), words(dst));
    let head = [[family, packet.proto, a, b], [c, d, low, high]].map(u32::from_ne_bytes);
    // No flow label and no table; the link-layer addresses are the kernel's to write.
    write(fib, [head[0], head[1], ifindex, 0, s0, s1, s2, s3, d0, d1, d2, d3, 0, 0, 0, 0]);
    let mut flags = 0;
    if node.is_some_and(|node| node.has(Node::FIB_SOURCE)) {
        flags |= BPF_FIB_LOOKUP_SRC;
    }
    // SAFETY: the context is the program's own; the parameters live for the whole call.
    let result = unsafe { helper(frame.context(), fib, size_of::<bpf_fib_lookup>() as i32, flags) };
    match u32::try_from(result).unwrap_or(u32::MAX) {
        code @ (BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH) => {
            way.ifindex = fib.ifindex;
            way.resolved = code == BPF_FIB_LKUP_RET_SUCCESS;
            // SAFETY: as below. The kernel says the MTU of a way that is wide enough, too (Linux 5.12).
            way.mtu = unsafe { fib.__bindgen_anon_1.mtu_result };
            (way.destination_mac, way.source_mac) = (fib.dmac, fib.smac);
            // SAFETY: all members of the unions are plain numbers, written above or by the kernel.
            // An IPv4 route may have an IPv6 next hop (RFC 8950): the lookup says of which family it is.
            way.neighbour = address(fib.family == AF_INET, unsafe { fib.__bindgen_anon_4.ipv6_dst });
            way.source = match node {
                Some(node) if !node.has(Node::FIB_SOURCE) => *primary(node, dst),
                // SAFETY: as above.
                _ => address(dst.is_v4(), unsafe { fib.__bindgen_anon_3.ipv6_src }),
            };
            Route::Via
        }
        // What is not forwarded is the node's own, or there is no route at all: the kernel says the same of both.
        BPF_FIB_LKUP_RET_NOT_FWDED if node_address(dst).is_some() => Route::Local,
        BPF_FIB_LKUP_RET_NOT_FWDED | BPF_FIB_LKUP_RET_UNREACHABLE => Route::Unreachable,
        BPF_FIB_LKUP_RET_FRAG_NEEDED => {
            // SAFETY: as above.
            way.mtu = unsafe { fib.__bindgen_anon_1.mtu_result };
            Route::TooBig
        }
        BPF_FIB_LKUP_RET_FWD_DISABLED => Route::None(Reason::ForwardingDisabled),
        BPF_FIB_LKUP_RET_UNSUPP_LWT => Route::None(Reason::UnsupportedRoute),
        _ => Route::None(Reason::NoRoute),
    }
}

/// The MTU of the interface that the packet in `frame` came in on, in bytes; 0 if the kernel does not say. `fib` is scratch.
#[inline(always)]
pub fn mtu_of_arrival<F: Frame>(frame: &F, fib: &mut bpf_fib_lookup) -> u32 {
    let mtu: *mut u32 = (&raw mut *fib).cast();
    // SAFETY: the context is the program's own; the number lies in the parameters, which are aligned as their words are.
    unsafe {
        mtu.write_volatile(0);
        // What it says of this packet is not asked.
        let _ = bpf_check_mtu(frame.context(), frame.ifindex(), mtu, 0, 0);
        mtu.read_volatile()
    }
}

/// Writes the parameters of a lookup, word by word: the compiler would make a call of a plain copy, which writes byte by byte.
#[inline(always)]
fn write(fib: &mut bpf_fib_lookup, words: [u32; FIB_WORDS]) {
    let first: *mut u32 = (&raw mut *fib).cast();
    let mut at = 0;
    while at < FIB_WORDS {
        // SAFETY: within the parameters, which are aligned as their words are (asserted below).
        unsafe { first.add(at).write_volatile(words[at]) };
        at += 1;
    }
}

const FIB_WORDS: usize = 16;
const _: () = assert!(
    size_of::<bpf_fib_lookup>() == FIB_WORDS * size_of::<u32>()
        && align_of::<bpf_fib_lookup>() == align_of::<u32>()
);

/// The node's primary address of the family of `dst`.
#[inline(always)]
pub fn primary<'a>(node: &'a Node, dst: &Addr) -> &'a Addr {
    if dst.is_v4() { &node.primary_v4 } else { &node.primary_v6 }
}

/// Network-layer bytes of the longest packet that will be on the wire.
#[inline(always)]
fn wire_length<F: Frame>(frame: &F, packet: &Packet) -> u16 {
    // What the kernel says of a packet whose segments are cut already, each as long as its way took (SCTP): `GSO_BY_FRAGS`.
    const CUT_ALREADY: u32 = 0xffff;
    let segment = frame.segment_size();
    let length = if segment == CUT_ALREADY {
        0
    } else if segment == 0 {
        packet.length
    } else {
        segment + packet.network_header() - jumbo_header(packet) + packet.transport_header()
    };
    if length > u16::MAX as u32 { u16::MAX } else { length as u16 }
}

/// Bytes of the hop-by-hop header that the kernel itself gives to a segment train longer than an IPv6 header can say ("BIG TCP",
/// Linux 5.19 to 6.19) and takes away from its segments.
#[inline(always)]
fn jumbo_header(packet: &Packet) -> u32 {
    const JUMBO: u32 = 8;
    const IPV6_HEADER: u32 = 40;
    let longest = u16::MAX as u32 + IPV6_HEADER;
    let has_one = !packet.is_v4() && packet.length > longest && packet.network_header() > IPV6_HEADER;
    if has_one { JUMBO } else { 0 }
}

/// An address as the parameters of helpers hold it: IPv4 in the first word.
#[inline(always)]
pub fn words(addr: &Addr) -> [u32; 4] {
    if addr.is_v4() {
        return [u32::from_ne_bytes(addr.v4_octets()), 0, 0, 0];
    }
    bytemuck::cast(*addr.bytes())
}

#[inline(always)]
fn address(v4: bool, words: [u32; 4]) -> Addr {
    if v4 {
        return Addr::from_v4(words[0].to_ne_bytes());
    }
    Addr::from_bytes(bytemuck::cast(words))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::sample;
    use crate::parse::{parse, tcp};

    #[test]
    fn the_header_that_the_kernel_gives_to_a_long_train_is_on_no_wire() {
        // Behind the network header: what follows, no more words, a jumbo payload of four bytes (RFC 2675).
        let mut frame = sample::Family::V6.tcp(tcp::ACK, b"");
        frame.bytes.splice(54..54, [6, 0, 0xc2, 4, 0, 1, 0, 0]);
        (frame.bytes[19], frame.bytes[20]) = (frame.bytes[19] + 8, 0);
        let mut packet = crate::parse::Packet::EMPTY;
        assert!(parse(&mut frame, &mut packet));
        assert_eq!((packet.network_header(), jumbo_header(&packet)), (48, 0), "one of the sender's own");
        packet.length = 100_000;
        assert_eq!(jumbo_header(&packet), 8);
        assert!(parse(&mut sample::Family::V6.tcp(tcp::ACK, b""), &mut packet));
        packet.length = 100_000;
        assert_eq!(jumbo_header(&packet), 0, "none is there");
    }
}
