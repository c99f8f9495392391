//! Entry points of Portolan's eBPF programs. On the host this is an empty program: only the library is tested there.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::EbpfContext;
    use aya_ebpf::bindings::TC_ACT_UNSPEC;
    use aya_ebpf::bindings::xdp_action::XDP_PASS;
    use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr, classifier, xdp};
    use aya_ebpf::programs::{SockAddrContext, SockContext, TcContext, XdpContext};
    use aya_log_ebpf::debug;
    use dataplane_common::drop::Reason;
    use dataplane_ebpf::connect::{self, Inet4, Inet6, PROCEED};
    use dataplane_ebpf::count;
    use dataplane_ebpf::flow;
    use dataplane_ebpf::frame::skb::SkbFrame;
    use dataplane_ebpf::frame::xdp::XdpFrame;
    use dataplane_ebpf::frame::{ETHERNET, Frame as _};
    use dataplane_ebpf::path::{Hook, walk};
    use dataplane_ebpf::scratch;

    #[inline(always)]
    fn tc<const LINK: u32>(ctx: &TcContext, hook: Hook) -> i32 {
        // SAFETY: the context the kernel handed to the program.
        let mut frame = unsafe { SkbFrame::<LINK>::new(ctx.skb.skb) };
        let Some(scratch) = scratch::get() else { return TC_ACT_UNSPEC };
        let verdict = walk(&mut frame, hook, scratch, |reason| log(ctx, reason));
        frame.finish(verdict, &scratch.way, hook.is_ingress())
    }

    /// Says at debug level why a packet was dropped or refused. Where that level is off the verifier removes the body.
    #[inline(never)]
    fn log<C: EbpfContext>(ctx: &C, reason: Reason) {
        debug!(ctx, "packet dropped or refused: reason {}", reason as u8);
    }

    #[inline(always)]
    fn uplink(ctx: &XdpContext) -> u32 {
        // SAFETY: the context the kernel handed to the program.
        let mut frame = unsafe { XdpFrame::new(ctx.ctx) };
        let Some(scratch) = scratch::get() else { return XDP_PASS };
        let verdict = walk(&mut frame, Hook::UplinkIngress, scratch, |reason| log(ctx, reason));
        frame.finish(verdict, &scratch.way, true) as u32
    }

    /// From the network, before a socket buffer exists. A packet may lie in several buffers, its headers in the first: so a driver
    /// keeps XDP where packets are longer than a page.
    #[xdp(frags)]
    pub(crate) fn xdp_uplink(ctx: XdpContext) -> u32 {
        uplink(&ctx)
    }

    /// The same in the stack, which brings a packet into one buffer for a program that says nothing of several, its headers with it.
    #[xdp]
    pub(crate) fn xdp_generic(ctx: XdpContext) -> u32 {
        uplink(&ctx)
    }

    /// From the network.
    #[classifier]
    pub(crate) fn tc_uplink_in(ctx: TcContext) -> i32 {
        tc::<ETHERNET>(&ctx, Hook::UplinkIngress)
    }

    /// To the network.
    #[classifier]
    pub(crate) fn tc_uplink_out(ctx: TcContext) -> i32 {
        tc::<ETHERNET>(&ctx, Hook::UplinkEgress)
    }

    /// From the network, on a device whose packets have no link-layer header.
    #[classifier]
    pub(crate) fn tc_bare_in(ctx: TcContext) -> i32 {
        tc::<0>(&ctx, Hook::UplinkIngress)
    }

    /// To the network, on such a device.
    #[classifier]
    pub(crate) fn tc_bare_out(ctx: TcContext) -> i32 {
        tc::<0>(&ctx, Hook::UplinkEgress)
    }

    /// From a pod.
    #[classifier]
    pub(crate) fn tc_pod_in(ctx: TcContext) -> i32 {
        tc::<ETHERNET>(&ctx, Hook::PodIngress)
    }

    /// To a pod.
    #[classifier]
    pub(crate) fn tc_pod_out(ctx: TcContext) -> i32 {
        tc::<ETHERNET>(&ctx, Hook::PodEgress)
    }

    /// Gives the tick, for the agent to read the programs' clock.
    #[classifier]
    pub(crate) fn clock(_ctx: TcContext) -> i32 {
        flow::now() as i32
    }

    /// Adds what was counted in flows to the totals: of those whose keys the agent names.
    #[classifier]
    pub(crate) fn fold(ctx: TcContext) -> i32 {
        count::fold_named::<false>(ctx.skb.skb);
        0
    }

    /// The same, of flows that the agent is about to remove: they are counted off.
    #[classifier]
    pub(crate) fn end(ctx: TcContext) -> i32 {
        count::fold_named::<true>(ctx.skb.skb);
        0
    }

    /// A socket is closed.
    #[cgroup_sock(sock_release)]
    pub(crate) fn sock_release(ctx: SockContext) -> i32 {
        connect::release(ctx.sock);
        PROCEED
    }

    /// Does nothing: what the others are measured against.
    #[classifier]
    pub(crate) fn tc_empty(_ctx: TcContext) -> i32 {
        TC_ACT_UNSPEC
    }

    /// Does nothing: what the others are measured against.
    #[xdp]
    pub(crate) fn xdp_empty(_ctx: XdpContext) -> u32 {
        XDP_PASS
    }

    macro_rules! socket_hooks {
        ($($name:ident: $handler:ident($family:ident);)+) => {
            $(
                #[doc = concat!("The hook of `", stringify!($name), "`.")]
                #[cgroup_sock_addr($name)]
                pub(crate) fn $name(ctx: SockAddrContext) -> i32 {
                    connect::$handler($family(ctx.sock_addr))
                }
            )+
        };
    }

    socket_hooks! {
        connect4: connect(Inet4);
        connect6: connect(Inet6);
        sendmsg4: send(Inet4);
        sendmsg6: send(Inet6);
        recvmsg4: receive(Inet4);
        recvmsg6: receive(Inet6);
        getpeername4: name(Inet4);
        getpeername6: name(Inet6);
    }
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The licence the kernel asks for before it offers its GPL-only helpers.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
