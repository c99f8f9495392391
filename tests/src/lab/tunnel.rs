//! The tunnels between nodes: a VXLAN device as flannel's, and a TUN device, without Ethernet headers, whose packets a small
//! program carries in UDP.

use super::network::{self, Addresses, Family};
use super::place::Place;
use anyhow::{Context, Result, ensure};
use ipnet::IpNet;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The one VXLAN network of a lab, and its UDP port.
const VNI: u32 = 1;
const VXLAN_PORT: u16 = 4789;
/// The UDP port by which the programs at the TUN devices reach each other.
const TUN_PORT: u16 = 8472;
/// Headers around a packet: Ethernet, IPv4, UDP and VXLAN; IPv4 and UDP.
const VXLAN_OVERHEAD: u16 = 14 + 20 + 8 + 8;
const TUN_OVERHEAD: u16 = 20 + 8;
/// The size of the largest packets on the nodes' network.
pub(crate) const UPLINK_MTU: u16 = 1500;
/// The line that the program prints when its device is there.
pub(crate) const READY: &str = "carrying";

/// A kind of tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tunnel {
    Vxlan,
    Tun,
}

/// What a node knows of another.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    /// Counted from 1.
    pub(crate) number: u8,
    /// On the nodes' network.
    pub(crate) uplink: Addresses,
}

impl Tunnel {
    /// The device's name on every node.
    pub(crate) const fn device(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan0",
            Self::Tun => "tun0",
        }
    }

    /// The size of the packets that fit; pods have no larger ones.
    pub(crate) const fn mtu(self) -> u16 {
        match self {
            Self::Vxlan => UPLINK_MTU - VXLAN_OVERHEAD,
            Self::Tun => UPLINK_MTU - TUN_OVERHEAD,
        }
    }

    /// Makes the device of a node, with its addresses and the routes to the pods of the others.
    pub(crate) fn raise(self, place: &Place, own: &Peer, others: &[Peer]) -> Result<()> {
        let device = self.device();
        let mut lines = Vec::new();
        if self == Self::Vxlan {
            lines.push(format!(
                "link add {device} address {} type vxlan id {VNI} dstport {VXLAN_PORT} local {} dev eth0 nolearning",
                hardware_address(own.number),
                own.uplink.v4
            ));
        }
        lines.extend(
            network::tunnel_end(own.number)
                .each()
                .map(|(family, address)| network::address_on(device, family, address, family.bits())),
        );
        lines.push(format!("link set {device} mtu {} up", self.mtu()));
        lines.extend(others.iter().flat_map(|peer| self.routes(peer)));
        place.ip(&lines)?;
        if self == Self::Vxlan {
            for peer in others {
                let (mac, to) = (hardware_address(peer.number), peer.uplink.v4.to_string());
                place.run("bridge", &["fdb", "append", &mac, "dev", device, "dst", &to])?;
            }
        }
        Ok(())
    }

    fn routes(self, peer: &Peer) -> Vec<String> {
        let device = self.device();
        let addresses = network::tunnel_end(peer.number).each();
        let lines = addresses.flat_map(|(family, address)| {
            let range = network::pod_range(peer.number, family);
            match self {
                Self::Vxlan => vec![
                    format!(
                        "neigh add {address} lladdr {} dev {device} nud permanent",
                        hardware_address(peer.number)
                    ),
                    format!("route add {range} via {address} dev {device} onlink"),
                ],
                Self::Tun => vec![format!("route add {range} dev {device}")],
            }
        });
        lines.collect()
    }

    /// The program that carries the packets of the device, if it takes one.
    pub(crate) fn program(self, mut lab: Command, own: &Peer, others: &[Peer]) -> Option<Command> {
        if self == Self::Vxlan {
            return None;
        }
        lab.args(["carry", "--device", self.device(), "--listen"]);
        lab.arg(SocketAddr::new(own.uplink.v4.into(), TUN_PORT).to_string());
        for peer in others {
            for family in Family::BOTH {
                let range = network::pod_range(peer.number, family);
                lab.arg("--peer").arg(format!("{range}={}:{TUN_PORT}", peer.uplink.v4));
            }
        }
        Some(lab)
    }
}

/// The address of a node's VXLAN device: as flannel, every node knows those of the others.
fn hardware_address(node: u8) -> String {
    format!("02:70:6f:72:74:{node:02x}")
}

/// Carries the packets of a TUN device to other nodes, by the range that their destination lies in.
#[derive(Clone, Debug, clap::Args)]
pub struct Carrier {
    /// The device, made by this program and gone with it.
    #[arg(long)]
    device: String,
    /// Where packets from the other nodes arrive.
    #[arg(long)]
    listen: SocketAddr,
    /// A range of pods and where their node listens.
    #[arg(long, value_parser = peer, value_name = "CIDR=IP:PORT")]
    peer: Vec<(IpNet, SocketAddr)>,
    /// Milliseconds for which each packet to another node is held back: the length of the road.
    #[arg(long, default_value_t = 0)]
    delay: u64,
}

fn peer(text: &str) -> Result<(IpNet, SocketAddr)> {
    let (range, address) = text.split_once('=').context("there is no `=`")?;
    Ok((range.parse()?, address.parse()?))
}

/// Runs until it is ended.
pub fn carry(carrier: &Carrier) -> Result<()> {
    let socket = UdpSocket::bind(carrier.listen).with_context(|| carrier.listen.to_string())?;
    let mut device = open_tun(&carrier.device)?;
    println!("{READY}");
    std::thread::scope(|scope| {
        let (mut inside, outside) = (device.try_clone()?, &socket);
        scope.spawn(move || receive(outside, &mut inside));
        // A node that is gone answers with an ICMP error, which the next call reports.
        let go = |packet: &[u8], to| drop(outside.send_to(packet, to));
        if carrier.delay == 0 {
            return send(&mut device, &carrier.peer, go);
        }
        let delay = Duration::from_millis(carrier.delay);
        let (road, end) = mpsc::channel::<(Instant, Vec<u8>, SocketAddr)>();
        scope.spawn(move || {
            for (due, packet, to) in end {
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                go(&packet, to);
            }
        });
        let enter = |packet: &[u8], to| drop(road.send((Instant::now() + delay, packet.to_vec(), to)));
        send(&mut device, &carrier.peer, enter)
    })
}

/// From the device to the nodes. What is for nobody (router solicitations and the like) goes no further.
fn send(device: &mut File, peers: &[(IpNet, SocketAddr)], go: impl Fn(&[u8], SocketAddr)) -> Result<()> {
    let mut packet = [0; u16::MAX as usize];
    loop {
        let length = device.read(&mut packet)?;
        let packet = &packet[..length];
        let Some(destination) = destination(packet) else { continue };
        if let Some((_, to)) = peers.iter().find(|(range, _)| range.contains(&destination)) {
            go(packet, *to);
        }
    }
}

/// From the nodes to the device.
fn receive(socket: &UdpSocket, device: &mut File) {
    let mut packet = [0; u16::MAX as usize];
    loop {
        if let Ok((length, _)) = socket.recv_from(&mut packet) {
            // The device refuses what is no packet.
            let _ = device.write(&packet[..length]);
        }
    }
}

/// Where a packet goes.
fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?.into()),
        6 => Some(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?.into()),
        _ => None,
    }
}

/// Makes a TUN device in the namespace of the calling thread; it lives as long as the file is open.
fn open_tun(name: &str) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").context("/dev/net/tun")?;
    let text = CString::new(name)?;
    ensure!(text.as_bytes().len() < libc::IFNAMSIZ, "{name} is too long for an interface");
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(text.as_bytes()) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: `request` outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) };
    ensure!(result == 0, "the TUN device {name}: {}", io::Error::last_os_error());
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_goes_where_its_destination_is() {
        let mut four = [0; 20];
        four[0] = 0x45;
        four[16..].copy_from_slice(&[10, 244, 2, 5]);
        assert_eq!(destination(&four), Some("10.244.2.5".parse().unwrap()));
        let mut six = [0; 40];
        six[0] = 0x60;
        six[39] = 7;
        assert_eq!(destination(&six), Some("::7".parse().unwrap()));
        assert_eq!(destination(&six[..39]), None);
        assert_eq!(destination(&[]), None);
    }
}
