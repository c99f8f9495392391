//! The node's conntrack: connections that netfilter rules translate, such as those of another proxy.

use super::maps::{Map, MapError};
use super::netlink;
use dataplane_common::frontend::FrontendKey;
use dataplane_common::tables::Frontends;
use dataplane_common::{Addr, Port, Protocol};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkPayload};
use netlink_packet_netfilter::conntrack::{
    self, ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Status, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use std::io;
use std::net::SocketAddr;
use thiserror::Error;

/// Why nobody knows what conntrack holds.
#[derive(Debug, Error)]
pub enum ConntrackError {
    /// The table of frontends could not be read.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The kernel did not answer: it may have no conntrack.
    #[error("conntrack: {0}")]
    Netlink(#[from] io::Error),
}

/// Whether conntrack of this network namespace has a TCP connection to one of these frontends, whose destination it translates.
///
/// # Errors
/// [`ConntrackError`].
pub fn translates_tcp_to(frontends: &Map<Frontends>) -> Result<bool, ConntrackError> {
    let netlink = netlink::connect(NETLINK_NETFILTER)?;
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
    let request = NetfilterMessage::new(header, ConntrackMessage::Get(Vec::new()));
    netlink::send(&netlink, NLM_F_REQUEST | NLM_F_DUMP, request)?;
    loop {
        for message in netlink::receive::<NetfilterMessage>(&netlink)? {
            if let NetlinkPayload::InnerMessage(message) = message {
                if let Some(called) = translated(&message.inner)
                    && is_frontend(frontends, called)?
                {
                    return Ok(true);
                }
            } else if let NetlinkPayload::Error(error) = message {
                return Err(error.to_io().into());
            } else if let NetlinkPayload::Done(_) = message {
                return Ok(false);
            }
        }
    }
}

/// Whether a Service has that address and port, or that node port.
fn is_frontend(frontends: &Map<Frontends>, called: SocketAddr) -> Result<bool, MapError> {
    let any = if called.is_ipv4() { Addr::from_v4([0; 4]) } else { Addr::UNSPECIFIED };
    for addr in [called.ip().into(), any] {
        let key = FrontendKey::new(addr, Port::new(called.port()), Protocol::Tcp as u8);
        if frontends.get(&key)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What was called, if it is a TCP connection whose destination is translated.
fn translated(message: &NetfilterMessageInner) -> Option<SocketAddr> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = message else { return None };
    let status = attributes.iter().find_map(|attribute| {
        if let ConntrackAttribute::CtaStatus(status) = attribute { Some(status) } else { None }
    })?;
    let original = attributes.iter().find_map(|attribute| {
        if let ConntrackAttribute::CtaTupleOrig(tuples) = attribute { Some(tuples) } else { None }
    })?;
    if status.contains(Status::DstNat) { tcp_destination(original) } else { None }
}

/// The destination of a tuple of TCP.
fn tcp_destination(tuples: &[Tuple]) -> Option<SocketAddr> {
    let (mut ip, mut port, mut is_tcp) = (None, None, false);
    for tuple in tuples {
        if let Tuple::Ip(parts) = tuple {
            for part in parts {
                if let IPTuple::DestinationAddress(destination) = part {
                    ip = Some(*destination);
                }
            }
        } else if let Tuple::Proto(parts) = tuple {
            for part in parts {
                if let ProtoTuple::DestinationPort(destination) = part {
                    port = Some(*destination);
                } else if let ProtoTuple::Protocol(protocol) = part {
                    is_tcp = *protocol == conntrack::Protocol::Tcp;
                }
            }
        }
    }
    is_tcp.then_some(SocketAddr::new(ip?, port?))
}
