//! The two ends of what is to be explained, from what somebody wrote.

use super::super::AdminError;
use super::super::names::Names;
use super::{Addr, Client, ExplainArgs, Frontends, Protocol, Role, Whereabouts};
use crate::kernel::maps::{KernelMaps, MapError};
use dataplane_common::Port;
use dataplane_common::frontend::{Frontend, FrontendKey, FrontendKind};
use dataplane_common::node::NodeAddress;
use dataplane_common::tables::{NodeAddrs, Nodes};
use std::net::{IpAddr, SocketAddr};

/// Who calls whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    /// Port 0: any.
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) protocol: Protocol,
    pub(super) client: Client,
}

/// What was written for the called end.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Called {
    /// An address, and a port if there is one.
    Address(IpAddr, Option<u16>),
    /// A node port of this node.
    Node(u16),
    /// A Service, and the name of a port if there is one.
    Service(String, Option<String>),
}

fn parse_called(text: &str) -> Result<Called, AdminError> {
    let wrong = || {
        AdminError::End(format!(
            "`{text}` is neither an address such as 10.96.0.1:443, a Service such as default/kubernetes:https, nor a node port such \
             as node:30080"
        ))
    };
    if let Ok(end) = text.parse::<SocketAddr>() {
        return Ok(Called::Address(end.ip(), Some(end.port())));
    }
    if let Ok(ip) = text.trim_matches(['[', ']']).parse::<IpAddr>() {
        return Ok(Called::Address(ip, None));
    }
    if let Some(port) = text.strip_prefix("node:") {
        return port.parse().map(Called::Node).map_err(|_| wrong());
    }
    let (name, port) = match text.strip_prefix("svc:").unwrap_or(text).split_once(':') {
        Some((name, port)) => (name, Some(port.to_owned())),
        None => (text.strip_prefix("svc:").unwrap_or(text), None),
    };
    match name.split('/').collect::<Vec<_>>()[..] {
        [namespace, service] if !namespace.is_empty() && !service.is_empty() => {
            Ok(Called::Service(name.to_owned(), port))
        }
        _ => Err(wrong()),
    }
}

impl Ends {
    pub(super) async fn find(
        args: &ExplainArgs,
        maps: &KernelMaps,
        names: &Names,
        whereabouts: &Whereabouts,
    ) -> Result<Self, AdminError> {
        let called = parse_called(&args.to)?;
        let family = parse_from(&args.from)?.map(|from| from.is_ipv6());
        let primary = |ipv6: bool| -> Result<IpAddr, AdminError> {
            let node = maps.map::<Nodes>()?.get(&0)?.unwrap_or(bytemuck::Zeroable::zeroed());
            let address = if ipv6 { node.primary_v6 } else { node.primary_v4 };
            let family = if ipv6 { "IPv6" } else { "IPv4" };
            if address.is_unspecified() {
                return Err(AdminError::End(format!("this node has no {family} address")));
            }
            Ok(address.to_ip())
        };
        let (to, known) = match called {
            Called::Service(name, port) => {
                let (to, protocol) =
                    service_address(maps, names, &name, port.as_deref(), family, args.protocol)?;
                (to, Some(protocol))
            }
            Called::Node(port) => (SocketAddr::new(primary(family == Some(true))?, port), None),
            Called::Address(ip, port) => address(maps, ip, port, args.protocol)?,
        };
        let protocol = match args.protocol.or(known) {
            Some(protocol) => protocol,
            None => protocol_at(maps, to)?,
        };
        let from = match parse_from(&args.from)? {
            Some(from) => from,
            None => {
                let source = whereabouts
                    .way(to.ip())
                    .await
                    .ok()
                    .and_then(|way| way.source)
                    .filter(|it| *it != to.ip());
                SocketAddr::new(source.map_or_else(|| primary(to.is_ipv6()), Ok)?, 0)
            }
        };
        if from.is_ipv6() != to.is_ipv6() {
            return Err(AdminError::End(format!("{} and {to} are of two IP families", from.ip())));
        }
        let client = client(maps, from.ip(), whereabouts).await?;
        Ok(Self { from, to, protocol, client })
    }
}

/// An address, with a port or without; none: the node itself.
fn parse_from(text: &str) -> Result<Option<SocketAddr>, AdminError> {
    if text == "node" {
        return Ok(None);
    }
    let text = text.strip_prefix("pod:").unwrap_or(text);
    let plain = || text.trim_matches(['[', ']']).parse::<IpAddr>().map(|ip| SocketAddr::new(ip, 0));
    text.parse().or_else(|_| plain()).map(Some).map_err(|_| {
        AdminError::End(format!(
            "`{text}` is neither an address, with a port or without, nor `node`. `kubectl get pod --output wide` tells a pod's address"
        ))
    })
}

async fn client(maps: &KernelMaps, from: IpAddr, whereabouts: &Whereabouts) -> Result<Client, AdminError> {
    if maps.map::<NodeAddrs>()?.get(&from.into())?.is_some() {
        return Ok(Client::Node);
    }
    Ok(match whereabouts.meeting(from).await?.role {
        Role::Pod => Client::Pod,
        Role::Uplink => Client::Outside,
    })
}

/// The frontend of an address, port and protocol, as the programs look it up: a node port answers at the node's addresses.
pub(in crate::admin) fn frontend(
    maps: &KernelMaps,
    to: SocketAddr,
    protocol: Protocol,
) -> Result<Option<Frontend>, MapError> {
    let frontends = maps.map::<Frontends>()?;
    let addr = Addr::from(to.ip());
    let key = |addr| FrontendKey::new(addr, Port::new(to.port()), protocol.number());
    if let Some(frontend) = frontends.get(&key(addr))? {
        return Ok(Some(frontend));
    }
    let own = maps.map::<NodeAddrs>()?.get(&addr)?;
    if !own.is_some_and(|own| own.has(NodeAddress::NODE_PORTS)) {
        return Ok(None);
    }
    frontends.get(&key(if addr.is_v4() { Addr::from_v4([0; 4]) } else { Addr::UNSPECIFIED }))
}

/// The protocol by which an address and port are served; TCP if by none, or by several.
fn protocol_at(maps: &KernelMaps, to: SocketAddr) -> Result<Protocol, AdminError> {
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
        if frontend(maps, to, protocol)?.is_some() {
            return Ok(protocol);
        }
    }
    Ok(Protocol::Tcp)
}

/// An address that somebody wrote, with the only port it has if none was written.
fn address(
    maps: &KernelMaps,
    ip: IpAddr,
    port: Option<u16>,
    protocol: Option<Protocol>,
) -> Result<(SocketAddr, Option<Protocol>), AdminError> {
    if let Some(port) = port {
        return Ok((SocketAddr::new(ip, port), None));
    }
    let mut ports = Vec::new();
    maps.map::<Frontends>()?.visit(|key, values| {
        let serves = values.iter().any(|value| value.service() != 0);
        if serves && key.addr().to_ip() == ip && protocol.is_none_or(|it| it.number() == key.proto()) {
            ports.push((key.port().number(), key.proto()));
        }
    })?;
    match ports[..] {
        [(port, proto)] => Ok((SocketAddr::new(ip, port), Protocol::try_from(proto).ok())),
        [] => Err(AdminError::End(format!("no Service has {ip}: write a port behind it"))),
        _ => Err(AdminError::End(format!(
            "{ip} has {} ports: write the one that is meant behind it",
            ports.len()
        ))),
    }
}

/// The ClusterIP and port of a Service by its name.
fn service_address(
    maps: &KernelMaps,
    names: &Names,
    service: &str,
    port: Option<&str>,
    ipv6: Option<bool>,
    protocol: Option<Protocol>,
) -> Result<(SocketAddr, Protocol), AdminError> {
    let mut found = Vec::new();
    maps.map::<Frontends>()?.visit(|key, values| {
        for value in values.iter().filter(|value| value.kind() == Ok(FrontendKind::ClusterIp)) {
            let name = names.name(value.service());
            let (object, port_name) = name.split_once(':').unwrap_or((&name, ""));
            let number = key.port().number();
            let is_port = port.is_none_or(|port| port == port_name || port == number.to_string());
            let is_family = ipv6.is_none_or(|ipv6| ipv6 != key.addr().is_v4());
            if object == service
                && is_port
                && is_family
                && protocol.is_none_or(|it| it.number() == key.proto())
            {
                found.push((SocketAddr::new(key.addr().to_ip(), number), key.proto()));
            }
        }
    })?;
    found.sort();
    let tell = |(to, proto): &(SocketAddr, u8)| match Protocol::try_from(*proto) {
        Ok(protocol) => Ok((*to, protocol)),
        Err(proto) => Err(AdminError::End(format!("{service} has a port of the protocol {proto}"))),
    };
    let first_family = found.first().map(|(to, _)| to.is_ipv6());
    found.retain(|(to, _)| Some(to.is_ipv6()) == first_family);
    match &found[..] {
        [one] => tell(one),
        [] => Err(AdminError::End(format!(
            "the kernel has no ClusterIP of the Service {service} with such a port: `portolan services` lists what there is"
        ))),
        several => {
            let all: Vec<_> = several.iter().map(|(to, _)| to.to_string()).collect();
            Err(AdminError::End(format!(
                "{service} has several ports ({}): write the one that is meant",
                all.join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_called_is_an_address_a_service_or_a_node_port() {
        let called = |text: &str| parse_called(text).unwrap();
        assert_eq!(called("10.96.0.1:443"), Called::Address("10.96.0.1".parse().unwrap(), Some(443)));
        assert_eq!(called("[fd00::1]:443"), Called::Address("fd00::1".parse().unwrap(), Some(443)));
        assert_eq!(called("fd00::1"), Called::Address("fd00::1".parse().unwrap(), None));
        assert_eq!(called("node:30080"), Called::Node(30_080));
        assert_eq!(
            called("svc:shop/web:http"),
            Called::Service("shop/web".to_owned(), Some("http".to_owned()))
        );
        assert_eq!(called("shop/web"), Called::Service("shop/web".to_owned(), None));
        for wrong in ["web", "node:web", "/web", "a/b/c"] {
            assert!(parse_called(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn who_calls_is_an_address_or_the_node() {
        let from = |text: &str| parse_from(text).unwrap().map(|from| from.to_string());
        assert_eq!(from("node"), None);
        assert_eq!(from("pod:10.244.0.7").as_deref(), Some("10.244.0.7:0"));
        assert_eq!(from("[fd00::7]:4000").as_deref(), Some("[fd00::7]:4000"));
        assert!(parse_from("cart-7f9c4").is_err());
    }
}
