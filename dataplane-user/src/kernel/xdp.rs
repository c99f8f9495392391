//! XDP on uplinks: whether, and in which mode. Where it is not, tc does the same work.

use super::hook::Hook;
use super::netlink;
use super::probe;
use crate::config::XdpMode;
use netlink_packet_core::{NLM_F_REQUEST, NetlinkPayload};
use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use std::io;

// linux/if_link.h.
const GENERIC: u32 = 1 << 1;
const NATIVE: u32 = 1 << 2;

/// Drivers that run XDP without giving up segmentation and checksum offloads. veth and virtio are not among them.
const DRIVERS: &[&str] = &["bnxt_en", "i40e", "ice", "igb", "igc", "ixgbe", "mlx5_core"];

/// Drivers of devices that hand on what came in by another interface, wrapped or not: XDP is there, if anywhere.
const SECOND_HAND_DRIVERS: &[&str] = &[
    "802.1Q VLAN Support",
    "bareudp",
    "bridge",
    "dummy",
    "geneve",
    "gre",
    "ip6_gre",
    "ip6tnl",
    "ipip",
    "ipvlan",
    "macvlan",
    "tun",
    "vxlan",
];

/// The flag of the mode on an uplink that has Ethernet headers; `None` where tc does the work. `more` names further drivers for
/// which `auto` means native.
pub(super) fn mode(wanted: XdpMode, interface: &str, more: &[String]) -> Option<u32> {
    let driver = || probe::driver(interface).ok();
    let second_hand = || driver().is_some_and(|driver| SECOND_HAND_DRIVERS.contains(&driver.as_str()));
    match wanted {
        XdpMode::Off => None,
        XdpMode::Native | XdpMode::Generic if second_hand() => None,
        XdpMode::Native => Some(NATIVE),
        XdpMode::Generic => Some(GENERIC),
        XdpMode::Auto => {
            let driver = driver()?;
            (DRIVERS.contains(&driver.as_str()) || more.contains(&driver)).then_some(NATIVE)
        }
    }
}

/// The program of a mode.
pub(super) const fn program(mode: XdpMode) -> &'static str {
    match mode {
        XdpMode::Auto | XdpMode::Native | XdpMode::Off => Hook::XdpUplink.program(),
        XdpMode::Generic => "xdp_generic",
    }
}

/// The flag of the mode in which the interface with this index runs the program with this id; `None` if it does not, or in the
/// device itself.
///
/// # Errors
/// If netlink does not answer.
pub(super) fn mode_of(index: u32, program: u32) -> io::Result<Option<u32>> {
    let socket = netlink::connect(NETLINK_ROUTE)?;
    let mut request = LinkMessage::default();
    request.header.index = index;
    netlink::send(&socket, NLM_F_REQUEST, RouteNetlinkMessage::GetLink(request))?;
    for message in netlink::receive::<RouteNetlinkMessage>(&socket)? {
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) = message {
            return Ok(mode_in(&link, program));
        } else if let NetlinkPayload::Error(error) = message {
            return Err(error.to_io());
        }
    }
    Ok(None)
}

/// Programs of both modes have names of their own where both run, else there is one name and the mode.
fn mode_in(link: &LinkMessage, program: u32) -> Option<u32> {
    let xdp = link
        .attributes
        .iter()
        .find_map(|attribute| if let LinkAttribute::Xdp(xdp) = attribute { Some(xdp) } else { None })?;
    if xdp.contains(&LinkXdp::DrvProgId(program)) {
        Some(NATIVE)
    } else if xdp.contains(&LinkXdp::SkbProgId(program)) {
        Some(GENERIC)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_that_of_the_own_program() {
        let mut link = LinkMessage::default();
        assert_eq!(mode_in(&link, 7), None);
        link.attributes =
            vec![LinkAttribute::Xdp(vec![LinkXdp::ProgId(7), LinkXdp::DrvProgId(7), LinkXdp::SkbProgId(8)])];
        assert_eq!([7, 8, 9].map(|program| mode_in(&link, program)), [Some(NATIVE), Some(GENERIC), None]);
    }
}
