//! The node's conntrack: connections that netfilter rules translate, such as those of another proxy.

use super::maps::{Map, MapError};
use super::netlink;
use dataplane_common::flow::FlowKey;
use dataplane_common::frontend::FrontendKey;
use dataplane_common::tables::Frontends;
use dataplane_common::{Addr, Port, Protocol};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkPayload};
use netlink_packet_netfilter::conntrack::{
    self, ConntrackAttribute, ConntrackMessage, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Status, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use std::io;
use std::net::SocketAddr;
use std::ops::{ControlFlow, RangeInclusive};
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

impl ConntrackError {
    /// Whether another look comes to the same: the kernel has no conntrack, or does not tell of it. nfnetlink(7) of kernels
    /// without the module `nf_conntrack_netlink` says `EINVAL`.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Map(_) => false,
            Self::Netlink(error) => matches!(
                error.raw_os_error(),
                Some(
                    libc::EINVAL
                        | libc::EOPNOTSUPP
                        | libc::EPROTONOSUPPORT
                        | libc::EAFNOSUPPORT
                        | libc::EPERM
                )
            ),
        }
    }
}

/// A TCP connection to a Service whose destination netfilter translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated {
    /// Who called.
    pub client: SocketAddr,
    /// What was called: an address and port of a Service.
    pub called: SocketAddr,
    /// Who answers.
    pub endpoint: SocketAddr,
    /// Whom it answers: the client, or an address and port of the node's where the source is translated too.
    pub answered: SocketAddr,
    /// The service port, by its id.
    pub service: u32,
    /// How far it is, after the kernel's `TCP_CONNTRACK_*`.
    pub state: u8,
    /// Seconds after which conntrack forgets it if nothing comes.
    pub expires: u32,
}

/// Whether conntrack of this network namespace has a TCP connection to one of these frontends, whose destination it translates.
///
/// # Errors
/// [`ConntrackError`].
pub fn translates_tcp_to(frontends: &Map<Frontends>) -> Result<bool, ConntrackError> {
    let mut found = false;
    each_tcp_to(frontends, |_| {
        found = true;
        ControlFlow::Break(())
    })?;
    Ok(found)
}

/// The TCP connections to these frontends whose destination conntrack of this network namespace translates.
///
/// # Errors
/// [`ConntrackError`].
pub fn tcp_to(frontends: &Map<Frontends>) -> Result<Vec<Translated>, ConntrackError> {
    let mut all = Vec::new();
    each_tcp_to(frontends, |connection| {
        all.push(connection);
        ControlFlow::Continue(())
    })?;
    Ok(all)
}

/// The answers' five-tuples of all TCP connections of this network namespace whose destination and source conntrack translates, the
/// source to one of these ports: what a flow must not have as its replies.
///
/// # Errors
/// [`ConntrackError`].
pub fn answers_to(ports: &[RangeInclusive<u16>]) -> Result<Vec<FlowKey>, ConntrackError> {
    let mut all = Vec::new();
    each_tcp(|Translated { client, endpoint, answered, .. }| {
        if answered != client && ports.iter().any(|ports| ports.contains(&answered.port())) {
            let [from, to] = [endpoint, answered].map(|end| (end.ip().into(), Port::new(end.port())));
            all.push(FlowKey::new(from.0, from.1, to.0, to.1, Protocol::Tcp as u8));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(all)
}

fn each_tcp_to(
    frontends: &Map<Frontends>,
    mut tell: impl FnMut(Translated) -> ControlFlow<()>,
) -> Result<(), ConntrackError> {
    each_tcp(|connection| {
        Ok(match service(frontends, connection.called)? {
            Some(service) => tell(Translated { service, ..connection }),
            None => ControlFlow::Continue(()),
        })
    })
}

/// The TCP connections whose destination is translated, of service ports that are not known yet.
fn each_tcp(
    mut tell: impl FnMut(Translated) -> Result<ControlFlow<()>, ConntrackError>,
) -> Result<(), ConntrackError> {
    let netlink = netlink::connect(NETLINK_NETFILTER)?;
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
    let request = NetfilterMessage::new(header, ConntrackMessage::Get(Vec::new()));
    netlink::send(&netlink, NLM_F_REQUEST | NLM_F_DUMP, request)?;
    loop {
        for message in netlink::receive::<NetfilterMessage>(&netlink)? {
            if let NetlinkPayload::InnerMessage(message) = message {
                if let Some(connection) = translated(&message.inner)
                    && tell(connection)?.is_break()
                {
                    return Ok(());
                }
            } else if let NetlinkPayload::Error(error) = message {
                return Err(error.to_io().into());
            } else if let NetlinkPayload::Done(_) = message {
                return Ok(());
            }
        }
    }
}

/// The service port that has this address and port, or that node port.
fn service(frontends: &Map<Frontends>, called: SocketAddr) -> Result<Option<u32>, MapError> {
    let any = if called.is_ipv4() { Addr::from_v4([0; 4]) } else { Addr::UNSPECIFIED };
    for addr in [called.ip().into(), any] {
        let key = FrontendKey::new(addr, Port::new(called.port()), Protocol::Tcp as u8);
        if let Some(frontend) = frontends.get(&key)? {
            return Ok(Some(frontend.service()));
        }
    }
    Ok(None)
}

/// A TCP connection whose destination is translated, of a service port that is not known yet.
fn translated(message: &NetfilterMessageInner) -> Option<Translated> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = message else { return None };
    let (mut original, mut reply, mut state, mut expires, mut is_translated) = (None, None, 0, 0, false);
    for attribute in attributes {
        if let ConntrackAttribute::CtaStatus(status) = attribute {
            is_translated = status.contains(Status::DstNat);
        } else if let ConntrackAttribute::CtaTupleOrig(tuples) = attribute {
            original = tcp_ends(tuples);
        } else if let ConntrackAttribute::CtaTupleReply(tuples) = attribute {
            reply = tcp_ends(tuples);
        } else if let ConntrackAttribute::CtaTimeout(seconds) = attribute {
            expires = *seconds;
        } else if let ConntrackAttribute::CtaProtoInfo(parts) = attribute {
            state = parts.iter().find_map(tcp_state).unwrap_or_default();
        }
    }
    let ((client, called), (endpoint, answered)) = (original?, reply?);
    is_translated.then_some(Translated { client, called, endpoint, answered, service: 0, state, expires })
}

fn tcp_state(part: &ProtoInfo) -> Option<u8> {
    let ProtoInfo::TCP(parts) = part else { return None };
    parts.iter().find_map(|part| if let ProtoInfoTCP::State(state) = part { Some(*state) } else { None })
}

/// Source and destination of a tuple of TCP.
fn tcp_ends(tuples: &[Tuple]) -> Option<(SocketAddr, SocketAddr)> {
    let (mut ips, mut ports, mut is_tcp) = ([None; 2], [None; 2], false);
    for tuple in tuples {
        if let Tuple::Ip(parts) = tuple {
            for part in parts {
                if let IPTuple::SourceAddress(source) = part {
                    ips[0] = Some(*source);
                } else if let IPTuple::DestinationAddress(destination) = part {
                    ips[1] = Some(*destination);
                }
            }
        } else if let Tuple::Proto(parts) = tuple {
            for part in parts {
                if let ProtoTuple::SourcePort(source) = part {
                    ports[0] = Some(*source);
                } else if let ProtoTuple::DestinationPort(destination) = part {
                    ports[1] = Some(*destination);
                } else if let ProtoTuple::Protocol(protocol) = part {
                    is_tcp = *protocol == conntrack::Protocol::Tcp;
                }
            }
        }
    }
    is_tcp.then_some((SocketAddr::new(ips[0]?, ports[0]?), SocketAddr::new(ips[1]?, ports[1]?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    fn ends(source: &str, destination: &str) -> Vec<Tuple> {
        let [source, destination] = [source, destination].map(|end| end.parse::<SocketAddr>().unwrap());
        let (from, to): (IpAddr, IpAddr) = (source.ip(), destination.ip());
        vec![
            Tuple::Ip(vec![IPTuple::SourceAddress(from), IPTuple::DestinationAddress(to)]),
            Tuple::Proto(vec![
                ProtoTuple::Protocol(conntrack::Protocol::Tcp),
                ProtoTuple::SourcePort(source.port()),
                ProtoTuple::DestinationPort(destination.port()),
            ]),
        ]
    }

    fn message(status: Status) -> NetfilterMessageInner {
        NetfilterMessageInner::Conntrack(ConntrackMessage::New(vec![
            ConntrackAttribute::CtaTupleOrig(ends("10.244.0.2:39076", "10.96.0.1:443")),
            ConntrackAttribute::CtaTupleReply(ends("172.18.0.3:6443", "10.244.0.2:39076")),
            ConntrackAttribute::CtaStatus(status),
            ConntrackAttribute::CtaTimeout(86_364),
            ConntrackAttribute::CtaProtoInfo(vec![ProtoInfo::TCP(vec![ProtoInfoTCP::State(3)])]),
        ]))
    }

    /// C5
    #[test]
    fn a_translated_connection_is_told_with_both_its_ends() {
        let expected = Translated {
            client: "10.244.0.2:39076".parse().unwrap(),
            called: "10.96.0.1:443".parse().unwrap(),
            endpoint: "172.18.0.3:6443".parse().unwrap(),
            answered: "10.244.0.2:39076".parse().unwrap(),
            service: 0,
            state: 3,
            expires: 86_364,
        };
        assert_eq!(translated(&message(Status::Assured | Status::DstNat)), Some(expected));
        assert_eq!(translated(&message(Status::Assured)), None, "its destination is what was called");
    }

    /// C5
    #[test]
    fn only_a_kernel_without_conntrack_ends_the_search() {
        let is_final = |error: io::Error| ConntrackError::from(error).is_final();
        for passing in [libc::EINTR, libc::ENOBUFS, libc::ENOMEM, libc::EMFILE, libc::EAGAIN] {
            assert!(!is_final(io::Error::from_raw_os_error(passing)), "{passing}");
        }
        assert!(!is_final(io::ErrorKind::TimedOut.into()));
        assert!(is_final(io::Error::from_raw_os_error(libc::EINVAL)));
        assert!(is_final(io::Error::from_raw_os_error(libc::EPROTONOSUPPORT)));
    }
}
