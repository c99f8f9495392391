//! Closing sockets whose endpoint went: the node's own UDP sockets that are connected to one of its node ports.
//!
//! Such a socket was sent to its endpoint when it was connected, and no packet of it passes a program that could choose
//! anew (C1). It is closed with `SOCK_DESTROY` (kernel commit c1e64e298b8c), so that the program behind it sees an error
//! and connects again. Never touches a socket that the hooks did not translate.

use super::maps::{Entries, Map, MapError};
use super::netlink;
use bytemuck::cast;
use dataplane_common::backend::BackendStatus;
use dataplane_common::tables::{Backends, SocketPeers};
use dataplane_common::{Addr, Port, Protocol};
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkPayload};
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_UDP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use std::collections::HashSet;
use std::io;
use thiserror::Error;

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
    let netlink = netlink::connect(NETLINK_SOCK_DIAG)?;
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

/// The ids of this namespace's connected UDP sockets of one family.
fn connected(netlink: &Socket, family: u8) -> io::Result<Vec<SocketId>> {
    let flags = NLM_F_REQUEST | NLM_F_DUMP;
    netlink::send(netlink, flags, request(family, SocketId::new_v4()))?;
    let mut ids = Vec::new();
    loop {
        for message in netlink::receive::<SockDiagMessage>(netlink)? {
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
    netlink::send(netlink, NLM_F_REQUEST | NLM_F_ACK, SockDiagDestroy::new(request(family, id)))?;
    for message in netlink::receive::<SockDiagMessage>(netlink)? {
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
