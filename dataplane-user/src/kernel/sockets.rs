//! Closing sockets whose endpoint went: the node's own UDP sockets that are connected to one of its node ports.
//!
//! Such a socket was sent to its endpoint when it was connected, and no packet of it passes a program that could choose
//! anew (C1). It is closed with `SOCK_DESTROY` (kernel commit c1e64e298b8c), so that the program behind it sees an error
//! and connects again. Never touches a socket that the hooks did not translate.

use super::maps::{Entries, Map, MapError};
use bytemuck::cast;
use dataplane_common::backend::BackendStatus;
use dataplane_common::tables::{Backends, SocketPeers};
use dataplane_common::{Addr, Port, Protocol};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_core::{NetlinkDeserializable, NetlinkSerializable};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr};
use std::collections::HashSet;
use std::io;
use std::time::Duration;
use thiserror::Error;

/// Room for one answer of the kernel, which packs a dump into pages.
const ANSWER: usize = 64 * 1024;
/// The kernel answers such a request at once.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why sockets could not be closed.
#[derive(Debug, Error)]
pub enum SocketError {
    /// A table could not be read.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The kernel did not answer. Its `CONFIG_INET_DIAG_DESTROY` and `CONFIG_INET_UDP_DIAG` are needed.
    #[error("the kernel did not close a socket whose endpoint is gone: {0}; does it have INET_DIAG_DESTROY?")]
    Netlink(#[from] io::Error),
}

/// Closes the connected UDP sockets whose endpoint no longer serves, and forgets what they called. How many.
///
/// # Errors
/// [`SocketError`]; those closed before stay closed.
pub fn close_orphans(peers: &Map<SocketPeers>, backends: &Map<Backends>) -> Result<usize, SocketError> {
    let orphans = orphans(peers, backends)?;
    if orphans.is_empty() {
        return Ok(0);
    }
    let wanted: HashSet<_> = orphans.iter().map(|(key, _)| (key.cookie, key.addr, key.port)).collect();
    let netlink = connect()?;
    let mut closed = 0;
    for family in [AF_INET, AF_INET6] {
        for id in connected(&netlink, family)? {
            let peer = (cast(id.cookie), Addr::from(id.destination_address), Port::new(id.destination_port));
            if wanted.contains(&peer) {
                destroy(&netlink, family, id)?;
                closed += 1;
            }
        }
    }
    let keys: Vec<_> = orphans.into_iter().map(|(key, _)| key).collect();
    peers.remove_batch(&keys)?;
    Ok(closed)
}

/// The entries of UDP sockets whose backend is another now, or serves no more.
fn orphans(peers: &Map<SocketPeers>, backends: &Map<Backends>) -> Result<Entries<SocketPeers>, MapError> {
    let mut entries = peers.entries()?;
    entries.retain(|(key, _)| key.proto() == Protocol::Udp.number());
    let mut orphans = Vec::new();
    for (key, peer) in entries {
        let status = backends.get(&peer.backend)?.map(|backend| backend.status()).unwrap_or_default();
        if status.generation() != peer.generation || !status.has(BackendStatus::SERVING) {
            orphans.push((key, peer));
        }
    }
    Ok(orphans)
}

fn connect() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// The ids of this namespace's connected UDP sockets of one family.
fn connected(netlink: &Socket, family: u8) -> io::Result<Vec<SocketId>> {
    let flags = NLM_F_REQUEST | NLM_F_DUMP;
    send(netlink, flags, request(family, SocketId::new_v4()))?;
    let mut ids = Vec::new();
    loop {
        for message in receive::<SockDiagMessage>(netlink)? {
            if let NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) = message {
                ids.push(response.header.socket_id);
            } else if let NetlinkPayload::Error(error) = message {
                return Err(error.to_io());
            } else if let NetlinkPayload::Done(_) = message {
                return Ok(ids);
            }
        }
    }
}

/// Closes one socket. One that closed by itself meanwhile is no error.
fn destroy(netlink: &Socket, family: u8, id: SocketId) -> io::Result<()> {
    send(netlink, NLM_F_REQUEST | NLM_F_ACK, SockDiagDestroy::new(request(family, id)))?;
    for message in receive::<SockDiagMessage>(netlink)? {
        if let NetlinkPayload::Error(error) = message
            && error.code.is_some()
            && error.to_io().raw_os_error() != Some(libc::ENOENT)
        {
            return Err(error.to_io());
        }
    }
    Ok(())
}

fn request(family: u8, socket_id: SocketId) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: IPPROTO_UDP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::ESTABLISHED,
        socket_id,
    })
}

fn send<M>(netlink: &Socket, flags: u16, message: M) -> io::Result<()>
where
    M: NetlinkSerializable + Into<NetlinkPayload<M>>,
{
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut message = NetlinkMessage::new(header, message.into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    netlink.send(&bytes, 0).map(drop)
}

/// The messages of one answer.
fn receive<M: NetlinkDeserializable>(netlink: &Socket) -> io::Result<Vec<NetlinkPayload<M>>> {
    wait_readable(netlink)?;
    let mut buffer = Vec::with_capacity(ANSWER);
    let length = netlink.recv(&mut buffer, 0)?;
    let mut rest = &buffer[..length];
    let mut messages = Vec::new();
    while !rest.is_empty() {
        let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
        // Each message is padded to four bytes.
        let length = (message.header.length as usize).next_multiple_of(4);
        rest = rest.get(length..).unwrap_or_default();
        messages.push(message.payload);
    }
    Ok(messages)
}

fn wait_readable(netlink: &Socket) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let mut poll = libc::pollfd { fd: netlink.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid `pollfd` for the whole call.
    match unsafe { libc::poll(&mut poll, 1, PATIENCE.as_millis() as i32) } {
        0 => Err(io::ErrorKind::TimedOut.into()),
        ready if ready < 0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
