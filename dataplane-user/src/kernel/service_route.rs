//! Routes of Portolan's own for what the node itself sends to Services: a device, and a route for each service range that leads
//! to it. The node's routes may lead anywhere or nowhere; with these its packets meet a program in any case (P9).
//!
//! The device is one end of a veth pair, which every kernel has. It has no address and asks for no neighbour; the program at its
//! egress takes every packet, so that the other end never sees one. The route names the node's own source address, for the kernel
//! would take that of any other device. Nothing here touches a route or a device that somebody else made.
#![expect(clippy::wildcard_enum_match_arm, reason = "netlink's enums are not ours and grow with the kernel")]

use super::links::LinksError;
use super::rtnetlink_dump;
use futures::StreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_core::ErrorMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The device that the routes lead to.
pub const DEVICE: &str = "portolan0";
/// Its other end, which nothing reaches.
pub const PEER: &str = "portolan1";
/// `rtm_protocol` of the routes, by which they are told from everybody else's: a number that no routing daemon has.
pub const PROTOCOL: u8 = 86;
/// The device's MTU while no interface says how long packets may be.
const DEFAULT_MTU: u32 = 1_500;
/// With less, an interface has no IPv6 (RFC 8200, 5).
const LEAST_MTU: u32 = 1_280;

/// What went wrong with the routes.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// No socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused.
    #[error("cannot {what}: {source}. Is CAP_NET_ADMIN missing?")]
    Refused {
        /// What was tried.
        what: String,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// The kernel did not list its routes.
    #[error(transparent)]
    List(#[from] LinksError),
    /// The name is taken.
    #[error("there is an interface {DEVICE} that is no veth: remove it, or use --service-route=off")]
    Foreign,
    /// Somebody else has a route for the same range.
    #[error(
        "there is a route for the service range {0} already, which is not Portolan's: what the node itself sends to Services goes \
         there. Remove it, or use --service-route=off"
    )]
    Taken(IpNet),
}

fn refused(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> RouteError {
    let what = what.into();
    move |source| RouteError::Refused { what, source }
}

/// What the routes have to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The service ranges, each with the node's source address of its family.
    pub ranges: BTreeSet<(IpNet, IpAddr)>,
    /// The device's MTU in bytes, that of the uplink with the smallest; 0: unknown.
    pub mtu: u32,
}

/// The routes as they are kept.
#[derive(Debug)]
pub struct ServiceRoutes {
    handle: Handle,
    /// The ranges that have a route by this process.
    kept: BTreeSet<(IpNet, IpAddr)>,
    /// An earlier process's routes were looked for.
    looked: bool,
}

impl ServiceRoutes {
    /// Nothing yet.
    ///
    /// # Errors
    /// If there is no netlink socket.
    pub fn open() -> Result<Self, RouteError> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle, kept: BTreeSet::new(), looked: false })
    }

    /// Makes the routes to the device that are missing and removes what is not wanted any more. Tells the ranges whose route was
    /// there and had gone. The device must have its program: what comes to it otherwise is lost.
    ///
    /// # Errors
    /// The first thing that could not be done; the rest was tried nevertheless.
    pub async fn ensure(&mut self, device: u32, wanted: &Wanted) -> Result<Vec<IpNet>, RouteError> {
        if !std::mem::replace(&mut self.looked, true) {
            self.remove_stale(device, wanted).await?;
        }
        let gone: Vec<_> = self.kept.difference(&wanted.ranges).copied().collect();
        for (range, source) in gone {
            self.delete(device, range).await?;
            self.kept.remove(&(range, source));
        }
        let (mut restored, mut failed) = (Vec::new(), Ok(()));
        for &(range, source) in &wanted.ranges {
            match self.route(device, range, source).await {
                Ok(false) => {}
                Ok(true) if self.kept.contains(&(range, source)) => restored.push(range),
                Ok(true) => {}
                Err(error) => {
                    failed = failed.and(Err(error));
                    continue;
                }
            }
            self.kept.insert((range, source));
        }
        failed.map(|()| restored)
    }

    /// Makes the device unless it is there, and has it up with this MTU; gives its index.
    ///
    /// # Errors
    /// If the kernel refuses, or the name is taken.
    pub async fn device(&self, mtu: u32) -> Result<u32, RouteError> {
        let mtu = if mtu == 0 { DEFAULT_MTU } else { mtu.max(LEAST_MTU) };
        let link = match link(&self.handle, DEVICE).await? {
            Some(link) => link,
            None => self.make().await?,
        };
        if !is_veth(&link) {
            return Err(RouteError::Foreign);
        }
        let index = link.header.index;
        let has = link.attributes.contains(&LinkAttribute::Mtu(mtu));
        let up = link.header.flags.contains(LinkFlags::Up);
        if !(has && up) {
            let change = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
            let changed = self.handle.link().set(change).execute().await;
            changed.map_err(refused(format!("set up the interface {DEVICE}")))?;
        }
        Ok(index)
    }

    /// Makes the pair: without neighbours to ask for, and without addresses of its own.
    async fn make(&self) -> Result<LinkMessage, RouteError> {
        let made = self.handle.link().add(LinkVeth::new(DEVICE, PEER).build()).execute().await;
        made.map_err(refused(format!("make the interface {DEVICE}")))?;
        for name in [DEVICE, PEER] {
            let without_addresses = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
            let change = LinkUnspec::new_with_name(name)
                .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![without_addresses]));
            match self.handle.link().set(change.build()).execute().await {
                // A kernel without IPv6 gives it none.
                Err(error) if code(&error) == Some(-libc::EAFNOSUPPORT) => {}
                result => result.map_err(refused(format!("keep addresses off the interface {name}")))?,
            }
            let up = LinkUnspec::new_with_name(name).arp(false).up().build();
            let set = self.handle.link().set(up).execute().await;
            set.map_err(refused(format!("set up the interface {name}")))?;
        }
        link(&self.handle, DEVICE).await?.ok_or(RouteError::Foreign)
    }

    /// Whether the route had to be made.
    async fn route(&self, device: u32, range: IpNet, source: IpAddr) -> Result<bool, RouteError> {
        if is_ours(&self.lookup(range).await, device, range, source) {
            return Ok(false);
        }
        // One of another source or to an earlier device would be in its way.
        self.delete(device, range).await?;
        match self.handle.route().add(message(device, range, Some(source))).execute().await {
            Ok(()) => Ok(true),
            Err(error) if code(&error) == Some(-libc::EEXIST) => Err(RouteError::Taken(range)),
            Err(error) => Err(refused(format!("add a route for {range} by {DEVICE}"))(error)),
        }
    }

    /// The route by which the kernel would send to the range's first address, which is nobody's.
    async fn lookup(&self, range: IpNet) -> Option<RouteMessage> {
        let mut question = match range {
            IpNet::V4(range) => {
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(range.network(), 32).build()
            }
            IpNet::V6(range) => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(range.network(), 128).build()
            }
        };
        question.header.flags |= RouteFlags::FibMatch;
        let answers = self.handle.route().get(question).execute();
        let mut answers = std::pin::pin!(answers);
        answers.next().await?.ok()
    }

    /// Removes Portolan's route for a range; none is no error.
    async fn delete(&self, device: u32, range: IpNet) -> Result<(), RouteError> {
        match self.handle.route().del(message(device, range, None)).execute().await {
            Ok(()) => Ok(()),
            Err(error) if code(&error) == Some(-libc::ESRCH) => Ok(()),
            Err(error) => Err(refused(format!("remove the route for {range} by {DEVICE}"))(error)),
        }
    }

    /// Removes the routes of an earlier process that are not wanted any more.
    async fn remove_stale(&self, device: u32, wanted: &Wanted) -> Result<(), RouteError> {
        let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let mut stale = BTreeSet::new();
        for question in [v4, v6] {
            let is_wanted = |range: &IpNet| wanted.ranges.iter().any(|(wanted, _)| wanted == range);
            let take = |answer| {
                if let RouteNetlinkMessage::NewRoute(route) = answer {
                    stale.extend(own_range(&route, device).filter(|range| !is_wanted(range)));
                }
            };
            rtnetlink_dump::each(&self.handle, "routes", RouteNetlinkMessage::GetRoute(question), take)
                .await?;
        }
        for range in stale {
            self.delete(device, range).await?;
        }
        Ok(())
    }
}

/// Makes the device unless it is there.
///
/// # Errors
/// If the kernel refuses, or the name is taken.
pub async fn make_device() -> Result<u32, RouteError> {
    ServiceRoutes::open()?.device(0).await
}

/// Removes the device, and the routes with it. Whether it was there.
///
/// # Errors
/// If the kernel refuses.
pub async fn remove(handle: &Handle) -> Result<bool, RouteError> {
    match link(handle, DEVICE).await? {
        Some(link) if is_veth(&link) => {
            let removed = handle.link().del(link.header.index).execute().await;
            removed.map_err(refused(format!("remove the interface {DEVICE}")))?;
            Ok(true)
        }
        Some(_) | None => Ok(false),
    }
}

/// The interface of this name.
async fn link(handle: &Handle, name: &str) -> Result<Option<LinkMessage>, RouteError> {
    let links = handle.link().get().match_name(name).execute();
    let mut links = std::pin::pin!(links);
    match links.next().await {
        None => Ok(None),
        Some(Ok(link)) => Ok(Some(link)),
        Some(Err(error)) if code(&error) == Some(-libc::ENODEV) => Ok(None),
        Some(Err(error)) => Err(refused(format!("look up the interface {name}"))(error)),
    }
}

fn is_veth(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Veth)))
    })
}

fn code(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(ErrorMessage { code: Some(code), .. }) => Some(code.get()),
        _ => None,
    }
}

/// The route for a range; without a source, as what is to be removed.
fn message(device: u32, range: IpNet, source: Option<IpAddr>) -> RouteMessage {
    let scope = if source.is_some() { RouteScope::Link } else { RouteScope::NoWhere };
    match range {
        IpNet::V4(range) => {
            let route = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(range.network(), range.prefix_len())
                .output_interface(device)
                .protocol(RouteProtocol::Other(PROTOCOL))
                .scope(scope);
            match source {
                Some(IpAddr::V4(source)) => route.pref_source(source).build(),
                Some(IpAddr::V6(_)) | None => route.build(),
            }
        }
        IpNet::V6(range) => {
            let route = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(range.network(), range.prefix_len())
                .output_interface(device)
                .protocol(RouteProtocol::Other(PROTOCOL));
            match source {
                Some(IpAddr::V6(source)) => route.pref_source(source).build(),
                Some(IpAddr::V4(_)) | None => route.build(),
            }
        }
    }
}

/// Whether the kernel's answer is the route that is wanted.
fn is_ours(answer: &Option<RouteMessage>, device: u32, range: IpNet, source: IpAddr) -> bool {
    let Some(route) = answer else { return false };
    own_range(route, device) == Some(range)
        && route.attributes.contains(&RouteAttribute::PrefSource(source.into()))
}

/// The range of one of Portolan's routes.
fn own_range(route: &RouteMessage, device: u32) -> Option<IpNet> {
    if route.header.protocol != RouteProtocol::Other(PROTOCOL)
        || route.header.table != RouteHeader::RT_TABLE_MAIN
        || route.header.kind != RouteType::Unicast
        || !route.attributes.contains(&RouteAttribute::Oif(device))
    {
        return None;
    }
    let network = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(network)) => Some(IpAddr::V4(*network)),
        RouteAttribute::Destination(RouteAddress::Inet6(network)) => Some(IpAddr::V6(*network)),
        _ => None,
    })?;
    IpNet::new(network, route.header.destination_prefix_length).ok()
}
