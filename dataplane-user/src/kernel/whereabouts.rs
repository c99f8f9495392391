//! Where a packet from an address meets the dataplane on this node: which interface leads there, and which programs it has. Asks the
//! kernel, and changes nothing.
#![expect(clippy::wildcard_enum_match_arm, reason = "netlink's enums are not ours and grow with the kernel")]

use super::hook::{Hook, SOCKET_HOOKS};
use super::links::{self, LinksError};
use super::pins::{PinError, Pins};
use super::roles::{Choice, Role};
use super::service_route;
use futures::TryStreamExt as _;
use rtnetlink::Handle;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{LinkAttribute, LinkLayerType};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum WhereaboutsError {
    /// No socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel did not list its interfaces.
    #[error(transparent)]
    Links(#[from] LinksError),
    /// The pin folder.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// The kernel knows no way.
    #[error("this node has no route to {to}: {source}")]
    Route {
        /// Where to.
        to: IpAddr,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// An interface that there is not, or without programs.
    #[error("{0}")]
    Interface(String),
}

/// A way out of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// The interface.
    pub interface: String,
    /// Its index.
    pub index: u32,
    /// The next hop, if it is not the destination itself.
    pub gateway: Option<IpAddr>,
    /// The address that the node would send from.
    pub source: Option<IpAddr>,
    /// It ends at this node.
    pub local: bool,
}

/// An interface at which a packet meets a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meeting {
    /// Its name.
    pub interface: String,
    /// Its index.
    pub index: u32,
    /// The program that sees it there.
    pub program: &'static str,
    /// What the interface is.
    pub role: Role,
    /// Its link-layer address, if its packets have one.
    pub link: Option<[u8; 6]>,
    /// XDP sees what comes in there first.
    pub xdp: bool,
}

/// Asks the kernel about this network namespace.
#[derive(Debug)]
pub struct Whereabouts {
    handle: Handle,
    /// What the interfaces with programs are.
    roles: BTreeMap<u32, Role>,
    /// Those with XDP.
    xdp: BTreeSet<u32>,
    /// Socket hooks.
    sockets: BTreeSet<&'static str>,
}

impl Whereabouts {
    /// The interfaces of the programs that are pinned; where none are (before Linux 6.6), those that an agent without flags takes.
    ///
    /// # Errors
    /// If netlink or the folder cannot be read.
    pub async fn open(pins: &Pins) -> Result<Self, WhereaboutsError> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        let pinned = pins.pinned_links()?;
        let xdp = pinned.iter().filter_map(|name| name.strip_prefix(Hook::XdpUplink.program()));
        let xdp = xdp.filter_map(|rest| rest.strip_prefix('-')?.parse().ok()).collect();
        let sockets = SOCKET_HOOKS.iter().map(|hook| hook.program);
        let sockets = sockets.filter(|program| pinned.iter().any(|name| name == program)).collect();
        let mut roles: BTreeMap<_, _> = pinned.iter().filter_map(|name| role_of(name)).collect();
        if roles.is_empty() {
            roles = links::now(&handle).await?.roles(&Choice::default());
        }
        Ok(Self { handle, roles, xdp, sockets })
    }

    /// The hook that sees a socket of that IP family connect, if it is there.
    pub fn connect_hook(&self, ipv6: bool) -> Option<&'static str> {
        self.sockets.get(if ipv6 { "connect6" } else { "connect4" }).copied()
    }

    /// The way from here to an address.
    ///
    /// # Errors
    /// If there is none.
    pub async fn way(&self, to: IpAddr) -> Result<Way, WhereaboutsError> {
        let failed = |source| WhereaboutsError::Route { to, source };
        let mut request = RouteMessage::default();
        let (family, bits, destination) = match to {
            IpAddr::V4(ip) => (AddressFamily::Inet, 32, RouteAddress::Inet(ip)),
            IpAddr::V6(ip) => (AddressFamily::Inet6, 128, RouteAddress::Inet6(ip)),
        };
        (request.header.address_family, request.header.destination_prefix_length) = (family, bits);
        request.attributes.push(RouteAttribute::Destination(destination));
        let routes: Vec<_> =
            self.handle.route().get(request).execute().try_collect().await.map_err(failed)?;
        let route = routes
            .first()
            .ok_or_else(|| WhereaboutsError::Interface(format!("this node has no route to {to}")))?;
        let (mut index, mut gateway, mut source) = (0, None, None);
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(oif) => index = *oif,
                RouteAttribute::Gateway(address) => gateway = ip(address),
                RouteAttribute::PrefSource(address) => source = ip(address),
                _ => {}
            }
        }
        let local = route.header.kind == RouteType::Local;
        Ok(Way {
            interface: super::link::interface_name(index).unwrap_or_default(),
            index,
            gateway,
            source,
            local,
        })
    }

    /// Where packets from an address come in.
    ///
    /// # Errors
    /// If the interface has no programs.
    pub async fn meeting(&self, from: IpAddr) -> Result<Meeting, WhereaboutsError> {
        let way = self.way(from).await?;
        let index = match self.roles.get(&way.index) {
            Some(_) => way.index,
            // Of a bridge the ports are served. Programs do not ask which of them it is.
            None => self.served_port(way.index).await?.ok_or_else(|| {
                let interface = &way.interface;
                WhereaboutsError::Interface(format!(
                    "{from} is behind {interface}, which has no program of Portolan: `portolan status -o wide` tells why"
                ))
            })?,
        };
        self.at(index).await
    }

    /// Where what the node itself sends to an address leaves.
    ///
    /// # Errors
    /// If the kernel does not tell of the interface.
    pub async fn leaving(&self, to: IpAddr) -> Result<Meeting, WhereaboutsError> {
        let way = self.way(to).await?;
        let mut meeting = match self.roles.get(&way.index) {
            Some(Role::Uplink) => self.at(way.index).await?,
            // Its own address, or a route that leads elsewhere: what goes there by packet meets the programs of the road.
            Some(Role::Pod) | None => {
                let road = self.handle.link().get().match_name(service_route::DEVICE.to_owned()).execute();
                let road: Vec<_> = road.try_collect().await.unwrap_or_default();
                let uplink =
                    self.roles.iter().find(|(_, role)| **role == Role::Uplink).map(|(index, _)| *index);
                let index = road.first().map(|link| link.header.index).or(uplink);
                let none = || WhereaboutsError::Interface("this node has no uplink with programs".to_owned());
                self.at(index.ok_or_else(none)?).await?
            }
        };
        let hooks = Hook::of(Role::Uplink, meeting.link.is_some());
        meeting.program =
            hooks.into_iter().find(|hook| hook.is_egress()).map_or(meeting.program, Hook::program);
        // It sees nothing that leaves.
        meeting.xdp = false;
        Ok(meeting)
    }

    async fn at(&self, index: u32) -> Result<Meeting, WhereaboutsError> {
        let links = self.handle.link().get().match_index(index).execute();
        let gone =
            |source: rtnetlink::Error| WhereaboutsError::Interface(format!("interface {index}: {source}"));
        let links: Vec<_> = links.try_collect().await.map_err(gone)?;
        let (mut interface, mut link, mut ethernet) = (format!("#{index}"), [0; 6], false);
        for message in &links {
            ethernet = message.header.link_layer_type == LinkLayerType::Ether;
            for attribute in &message.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => interface.clone_from(name),
                    LinkAttribute::Address(address) => {
                        link = address.as_slice().try_into().unwrap_or_default()
                    }
                    _ => {}
                }
            }
        }
        let role = self.roles.get(&index).copied().unwrap_or(Role::Uplink);
        let hooks = Hook::of(role, ethernet);
        let program = hooks.into_iter().find(|hook| !hook.is_egress()).map_or("", Hook::program);
        let (link, xdp) = (ethernet.then_some(link), self.xdp.contains(&index));
        Ok(Meeting { interface, index, program, role, link, xdp })
    }

    /// A port of a bridge that has programs.
    async fn served_port(&self, bridge: u32) -> Result<Option<u32>, WhereaboutsError> {
        let interfaces = links::now(&self.handle).await?;
        let ports = interfaces.links.iter().filter(|(_, link)| link.master == Some(bridge));
        Ok(ports.map(|(index, _)| *index).find(|index| self.roles.contains_key(index)))
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// The interface and its role, from the name of a pin.
fn role_of(pin: &str) -> Option<(u32, Role)> {
    let (program, index) = pin.rsplit_once('-')?;
    let role = match Hook::ALL.into_iter().find(|hook| hook.program() == program)? {
        Hook::PodIn | Hook::PodOut => Role::Pod,
        Hook::XdpUplink | Hook::UplinkIn | Hook::UplinkOut => Role::Uplink,
        Hook::BareUplinkIn | Hook::BareUplinkOut => Role::Uplink,
    };
    Some((index.parse().ok()?, role))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_tells_the_role_of_its_interface() {
        assert_eq!(role_of("tc_pod_in-7"), Some((7, Role::Pod)));
        assert_eq!(role_of("tc_bare_out-8"), Some((8, Role::Uplink)));
        assert_eq!(role_of("connect4"), None);
    }
}
