//! The node's interfaces, addresses and what their routes do, followed live over netlink. What each is to the dataplane is
//! [`super::roles`]' part.
//!
//! Who asks always gets the newest state; what came and went in between is nobody's business. If the kernel dropped
//! messages because this side was slow, everything is read anew.
#![expect(clippy::wildcard_enum_match_arm, reason = "netlink's enums are not ours and grow with the kernel")]

use super::roles::{Kind, LinkLayer, Routes};
use super::rtnetlink_dump;
use futures::StreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::sys::AsyncSocket as _;
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Room for messages that wait to be read: some thousand interfaces changing at once.
const RECEIVE_BUFFER: libc::c_int = 4 << 20;
/// Wait before netlink is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// `RT_TABLE_LOCAL` of linux/rtnetlink.h.
const LOCAL_TABLE: u8 = 255;
/// Routes that change together are read together.
const ROUTES_SETTLE: Duration = Duration::from_millis(20);
/// `SO_NETNS_COOKIE` of linux/socket.h (Linux 5.14).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// What went wrong with netlink.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// No socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// A question was not answered.
    #[error("the kernel did not list its {what}: {source}")]
    Dump {
        /// What was asked for.
        what: &'static str,
        /// The kernel's answer.
        source: rtnetlink::Error,
    },
    /// The kernel had more to tell than this side read.
    #[error("netlink messages were lost")]
    Lost,
    /// The socket is closed.
    #[error("the netlink socket was closed")]
    Closed,
}

/// One interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// What it does for others.
    pub kind: Kind,
    /// What is in front of its packets.
    pub layer: LinkLayer,
    /// The index of the interface that it is a port of.
    pub master: Option<u32>,
    /// The index of the interface of this node that it is made on, as a VLAN is.
    pub lower: Option<u32>,
    /// Bytes of the longest packet that it sends; 0 if the kernel did not say.
    pub mtu: u32,
}

impl Interface {
    /// Whether its packets have an Ethernet header; some tunnels' do not.
    pub fn is_ethernet(&self) -> bool {
        self.layer == LinkLayer::Ethernet
    }
}

/// The node's interfaces, addresses and routes at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// The interfaces by index.
    pub links: BTreeMap<u32, Interface>,
    /// The addresses of each interface with their prefix, by its index, in the kernel's order.
    pub addresses: BTreeMap<u32, Vec<IpNet>>,
    /// What the routes by each interface do, of both families, by its index.
    pub routes: BTreeMap<u32, Routes>,
}

impl Interfaces {
    /// A node whose last default route goes keeps those it had: it may be about to be replaced, and flows go on.
    fn set_routes(&mut self, mut routes: BTreeMap<u32, Routes>) {
        if !routes.values().any(|routes| routes.default) {
            let had = self.routes.iter().filter(|(_, routes)| routes.default).map(|(index, _)| *index);
            for index in had.filter(|index| self.links.contains_key(index)) {
                routes.entry(index).or_default().default = true;
            }
        }
        self.routes = routes;
    }

    fn add(&mut self, index: u32, address: IpNet) {
        let addresses = self.addresses.entry(index).or_default();
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }

    /// Routes by an interface may have gone with what changed there.
    fn silent_routes(&self, index: u32) -> News {
        if self.routes.contains_key(&index) { News::Routes } else { News::Seen }
    }

    /// What of this one message is news, and whether the routes must be read again: some go with links and addresses, in silence.
    fn apply(&mut self, message: RouteNetlinkMessage) -> News {
        match message {
            RouteNetlinkMessage::NewLink(message) => {
                if let Some((index, link)) = interface(&message) {
                    self.links.insert(index, link);
                }
                self.silent_routes(message.header.index)
            }
            RouteNetlinkMessage::DelLink(message) => {
                // A bridge port leaves its bridge by a message of the bridge's family: the interface stays.
                if message.header.interface_family != rtnetlink::packet_route::AddressFamily::Unspec {
                    return News::Seen;
                }
                let index = message.header.index;
                self.links.remove(&index);
                self.addresses.remove(&index);
                // Routes by it went with it, and of those of IPv4 nothing is told. A node may have a million others.
                self.silent_routes(index)
            }
            RouteNetlinkMessage::NewAddress(message) => {
                if let Some((index, address)) = address(&message) {
                    self.add(index, address);
                }
                News::Seen
            }
            RouteNetlinkMessage::DelAddress(message) => {
                if let Some((index, address)) = address(&message)
                    && let Some(addresses) = self.addresses.get_mut(&index)
                {
                    addresses.retain(|known| *known != address);
                }
                self.silent_routes(message.header.index)
            }
            RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message)
                if route(&message).is_some() =>
            {
                News::Routes
            }
            _ => News::Seen,
        }
    }
}

/// What has to follow a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum News {
    /// Nothing.
    Seen,
    /// The routes must be read again: a route's message does not tell what it replaced.
    Routes,
    /// Messages were lost: all must be read again.
    Lost,
}

fn interface(message: &LinkMessage) -> Option<(u32, Interface)> {
    // Messages of the bridge family tell of ports, not of interfaces.
    if message.header.interface_family != rtnetlink::packet_route::AddressFamily::Unspec {
        return None;
    }
    let mut link = Interface {
        name: String::new(),
        kind: Kind::Device,
        layer: layer(message.header.link_layer_type),
        master: None,
        lower: None,
        mtu: 0,
    };
    let mut elsewhere = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|index| *index != 0),
            LinkAttribute::Link(index) => link.lower = Some(*index).filter(|index| *index != 0),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::LinkInfo(infos) => link.kind = kind(infos),
            _ => {}
        }
    }
    // Of a pair it is the other end, and it may be of another namespace.
    if elsewhere || link.kind == Kind::Pair {
        link.lower = None;
    }
    Some((message.header.index, link))
}

fn kind(infos: &[LinkInfo]) -> Kind {
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match kind {
        Some(InfoKind::Veth | InfoKind::Netkit) => Kind::Pair,
        Some(InfoKind::Tun | InfoKind::MacVlan | InfoKind::MacVtap | InfoKind::IpVlan | InfoKind::IpVtap) => {
            Kind::Guest
        }
        Some(InfoKind::Bridge) => Kind::Bridge,
        Some(InfoKind::Dummy | InfoKind::Ifb) => Kind::Dummy,
        Some(InfoKind::Vrf) => Kind::Vrf,
        Some(InfoKind::Other(name)) if name == "openvswitch" => Kind::Switch,
        _ => Kind::Device,
    }
}

/// Devices without a link-layer header have none at their hooks either, whatever they put in front of packets later.
fn layer(kind: LinkLayerType) -> LinkLayer {
    match kind {
        LinkLayerType::Loopback => LinkLayer::Loopback,
        LinkLayerType::Ether => LinkLayer::Ethernet,
        LinkLayerType::None
        | LinkLayerType::Ppp
        | LinkLayerType::Rawip
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre
        | LinkLayerType::Ip6gre => LinkLayer::None,
        _ => LinkLayer::Unknown,
    }
}

fn address(message: &AddressMessage) -> Option<(u32, IpNet)> {
    // IFA_LOCAL is the own address; where there is none (IPv6 without a peer), IFA_ADDRESS is.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let any = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    let net = IpNet::new(local.or(any)?, message.header.prefix_len).ok()?;
    Some((message.header.index, net))
}

/// What a route does, and by which interfaces. The local table tells of the node's own addresses, and the kernel makes a route
/// for each address: both say nothing that the addresses do not.
fn route(message: &RouteMessage) -> Option<(BTreeSet<u32>, Routes)> {
    let header = &message.header;
    if header.kind != RouteType::Unicast
        || header.table == LOCAL_TABLE
        || header.protocol == RouteProtocol::Kernel
    {
        return None;
    }
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    let bits = header.destination_prefix_length;
    let (mut indexes, mut direct) = (BTreeSet::new(), true);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => {
                indexes.insert(*index);
            }
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => direct = false,
            RouteAttribute::MultiPath(hops) => {
                indexes.extend(hops.iter().map(|hop| hop.interface_index));
                direct = false;
            }
            _ => {}
        }
    }
    let routes = match destination {
        None if bits == 0 && header.table == RouteHeader::RT_TABLE_MAIN => {
            Routes { default: true, ..Routes::default() }
        }
        Some(IpAddr::V4(ip)) if ip.is_link_local() || ip.is_multicast() => return None,
        Some(IpAddr::V6(ip)) if ip.is_unicast_link_local() || ip.is_multicast() => return None,
        Some(ip) if direct && bits == if ip.is_ipv4() { 32 } else { 128 } => {
            Routes { host: true, ..Routes::default() }
        }
        None | Some(_) => Routes { other: true, ..Routes::default() },
    };
    Some((indexes, routes))
}

pub(super) async fn dump(handle: &Handle) -> Result<Interfaces, LinksError> {
    let mut interfaces = Interfaces::default();
    let links = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let mut take = |message| {
        interfaces.apply(message);
    };
    rtnetlink_dump::each(handle, "interfaces", links, &mut take).await?;
    let addresses = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    rtnetlink_dump::each(handle, "addresses", addresses, take).await?;
    interfaces.routes = routes(handle).await?;
    Ok(interfaces)
}

/// The interfaces as they are now, for who has no connection to netlink.
///
/// # Errors
/// If the kernel does not list them.
pub async fn look() -> Result<Interfaces, LinksError> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let interfaces = dump(&handle).await;
    connection.abort();
    interfaces
}

/// The interfaces as they are now.
///
/// # Errors
/// If the kernel does not list them.
pub async fn now(handle: &Handle) -> Result<Interfaces, LinksError> {
    dump(handle).await
}

/// What the routes of all tables do. There may be very many: each is forgotten once it is read.
async fn routes(handle: &Handle) -> Result<BTreeMap<u32, Routes>, LinksError> {
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let mut found: BTreeMap<u32, Routes> = BTreeMap::new();
    for question in [v4, v6].map(RouteNetlinkMessage::GetRoute) {
        let take = |message| {
            if let RouteNetlinkMessage::NewRoute(message) = message
                && let Some((indexes, does)) = route(&message)
            {
                indexes.into_iter().for_each(|index| found.entry(index).or_default().add(does));
            }
        };
        rtnetlink_dump::each(handle, "routes", question, take).await?;
    }
    Ok(found)
}

/// Follows the kernel until nobody listens. Returns when the first state is there.
///
/// # Errors
/// If netlink does not answer at all; later failures are logged, and all is read anew.
pub async fn follow() -> Result<watch::Receiver<Interfaces>, LinksError> {
    let mut stream = Stream::open().await?;
    let (sender, receiver) = watch::channel(stream.now.clone());
    tokio::spawn(async move {
        loop {
            let Err(error) = stream.next(&sender).await else {
                if sender.is_closed() {
                    return;
                }
                continue;
            };
            tracing::warn!("{error}; reading interfaces and addresses anew");
            // What still waits in the old one is older than what is read now, and some of it was overtaken by what was lost.
            stream = loop {
                match Stream::open().await {
                    Ok(stream) => break stream,
                    Err(error) => tracing::warn!("{error}"),
                }
                tokio::time::sleep(RETRY).await;
            };
            publish(&sender, &stream.now);
        }
    });
    Ok(receiver)
}

type Messages = futures::channel::mpsc::UnboundedReceiver<(
    NetlinkMessage<RouteNetlinkMessage>,
    rtnetlink::sys::SocketAddr,
)>;

/// An open subscription, and what is known by it.
struct Stream {
    handle: Handle,
    messages: Messages,
    now: Interfaces,
    /// When the routes are to be read again, if they are.
    routes_due: Option<Instant>,
    /// Not before.
    routes_rest: Instant,
}

impl Stream {
    /// Subscribes first and reads then, so that nothing falls in between.
    async fn open() -> Result<Self, LinksError> {
        let (mut subscription, _, messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])?;
        rtnetlink_dump::make_room(subscription.socket_mut().socket_mut(), RECEIVE_BUFFER)?;
        tokio::spawn(subscription);
        let (mut questions, handle, _) = rtnetlink::new_connection()?;
        // The end of a dump tells whether it was interrupted.
        questions.set_forward_done(true);
        tokio::spawn(questions);
        let now = dump(&handle).await?;
        Ok(Self { handle, messages, now, routes_due: None, routes_rest: Instant::now() })
    }

    /// Waits for messages, takes in all there are, and publishes what came of them. Links and addresses are told at once, for a new
    /// pod waits for its programs; routes follow.
    async fn next(&mut self, sender: &watch::Sender<Interfaces>) -> Result<(), LinksError> {
        let due = self.routes_due.unwrap_or_else(far_away);
        let mut news = match tokio::time::timeout_at(due, self.messages.next()).await {
            Ok(first) => self.take_in(first.ok_or(LinksError::Closed)?.0),
            Err(_) => return self.read_routes(sender).await,
        };
        while let Ok((message, _)) = self.messages.try_recv() {
            news = news.max(self.take_in(message));
        }
        match news {
            News::Seen => {}
            News::Routes => {
                self.routes_due.get_or_insert(self.routes_rest.max(Instant::now() + ROUTES_SETTLE));
            }
            News::Lost => return Err(LinksError::Lost),
        }
        publish(sender, &self.now);
        Ok(())
    }

    /// Reads the routes again, and rests ten times as long as that took: a router's tables may be long, and never still.
    async fn read_routes(&mut self, sender: &watch::Sender<Interfaces>) -> Result<(), LinksError> {
        let begun = Instant::now();
        self.routes_due = None;
        let routes = routes(&self.handle).await?;
        self.now.set_routes(routes);
        self.routes_rest = Instant::now() + begun.elapsed() * 10;
        publish(sender, &self.now);
        Ok(())
    }

    fn take_in(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) -> News {
        match message.payload {
            NetlinkPayload::InnerMessage(message) => self.now.apply(message),
            NetlinkPayload::Overrun(_) | NetlinkPayload::Error(_) => News::Lost,
            _ => News::Seen,
        }
    }
}

/// A moment that nobody waits for.
fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(24 * 60 * 60)
}

fn publish(sender: &watch::Sender<Interfaces>, now: &Interfaces) {
    sender.send_if_modified(|known| {
        let changed = known != now;
        if changed {
            known.clone_from(now);
        }
        changed
    });
}

/// The cookie of the network namespace that this process is in.
///
/// # Errors
/// If the kernel has no `SO_NETNS_COOKIE`.
pub fn netns_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option is eight bytes long, and `cookie` outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_route::route::RouteNextHop;

    fn interfaces(names: &[(u32, &str)]) -> Interfaces {
        let link = |name: &str| Interface {
            name: name.to_owned(),
            kind: Kind::Device,
            layer: LinkLayer::Ethernet,
            master: None,
            lower: None,
            mtu: 1_500,
        };
        Interfaces {
            links: names.iter().map(|(index, name)| (*index, link(name))).collect(),
            ..Interfaces::default()
        }
    }

    #[test]
    fn an_interface_that_goes_takes_its_addresses_along() {
        let mut node = interfaces(&[(2, "eth0"), (3, "eth1")]);
        let own: IpNet = "192.0.2.1/24".parse().unwrap();
        node.add(2, own);
        node.add(3, own);
        let mut gone = LinkMessage::default();
        gone.header.index = 2;
        assert_eq!(node.apply(RouteNetlinkMessage::DelLink(gone)), News::Seen, "no default route went by it");
        assert_eq!(node.links.len(), 1);
        assert_eq!(node.addresses, BTreeMap::from([(3, vec![own])]));
    }

    #[test]
    fn routes_are_read_again_when_an_interface_of_theirs_goes() {
        let mut node = interfaces(&[(2, "eth0"), (3, "veth1")]);
        node.set_routes(BTreeMap::from([(2, Routes { other: true, ..Routes::default() })]));
        let gone = |index| {
            let mut message = LinkMessage::default();
            message.header.index = index;
            RouteNetlinkMessage::DelLink(message)
        };
        assert_eq!(node.apply(gone(3)), News::Seen);
        assert_eq!(node.apply(gone(2)), News::Routes);
    }

    #[test]
    fn a_node_keeps_its_default_routes_while_there_is_none() {
        let default = |indexes: &[u32]| -> BTreeMap<u32, Routes> {
            let default = Routes { default: true, ..Routes::default() };
            indexes.iter().map(|index| (*index, default)).collect()
        };
        let mut node = interfaces(&[(2, "eth0"), (3, "eth1")]);
        node.set_routes(default(&[2]));
        node.set_routes(BTreeMap::new());
        assert_eq!(node.routes, default(&[2]));
        node.set_routes(default(&[3]));
        assert_eq!(node.routes, default(&[3]));
    }

    #[test]
    fn a_port_that_leaves_its_bridge_is_still_there() {
        let mut node = interfaces(&[(2, "veth1")]);
        let mut left = LinkMessage::default();
        left.header.index = 2;
        left.header.interface_family = rtnetlink::packet_route::AddressFamily::Bridge;
        node.apply(RouteNetlinkMessage::DelLink(left));
        assert_eq!(node.links.len(), 1);
    }

    /// A unicast route of the main table that somebody made.
    fn made(attributes: Vec<RouteAttribute>, bits: u8) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.kind = RouteType::Unicast;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.destination_prefix_length = bits;
        message.attributes = attributes;
        message
    }

    fn to(ip: &str) -> RouteAttribute {
        RouteAttribute::Destination(ip.parse::<IpAddr>().unwrap().into())
    }

    fn via() -> RouteAttribute {
        RouteAttribute::Gateway("192.0.2.1".parse::<IpAddr>().unwrap().into())
    }

    #[test]
    fn a_route_tells_what_it_does() {
        let by_2 = || RouteAttribute::Oif(2);
        let does = |attributes, bits| route(&made(attributes, bits)).map(|(_, routes)| routes);
        let [default, host, other] = [(true, false, false), (false, true, false), (false, false, true)]
            .map(|(default, host, other)| Some(Routes { default, host, other }));
        assert_eq!(does(vec![by_2(), via()], 0), default);
        assert_eq!(does(vec![by_2(), to("10.244.1.5")], 32), host);
        assert_eq!(does(vec![by_2(), to("fd00::5")], 128), host);
        assert_eq!(does(vec![by_2(), to("10.244.2.0"), via()], 32), other);
        assert_eq!(does(vec![by_2(), to("fd00::")], 64), other);
        assert_eq!(does(vec![by_2(), to("fe80::")], 64), None);
        assert_eq!(does(vec![by_2(), to("169.254.0.0")], 16), None);
    }

    #[test]
    fn a_default_route_of_another_table_is_one_of_many() {
        let mut message = made(vec![RouteAttribute::Oif(2), via()], 0);
        message.header.table = 2;
        assert_eq!(route(&message).unwrap().1, Routes { other: true, ..Routes::default() });
    }

    #[test]
    fn routes_that_addresses_make_say_nothing() {
        let mut local = made(vec![RouteAttribute::Oif(2), to("192.0.2.1")], 32);
        local.header.table = LOCAL_TABLE;
        assert_eq!(route(&local), None);
        let mut connected = made(vec![RouteAttribute::Oif(2), to("192.0.2.0")], 24);
        connected.header.protocol = RouteProtocol::Kernel;
        assert_eq!(route(&connected), None);
    }

    #[test]
    fn a_route_over_several_next_hops_names_all_their_interfaces() {
        let hop = |index| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = index;
            hop
        };
        let message = made(vec![RouteAttribute::MultiPath(vec![hop(2), hop(3)])], 0);
        assert_eq!(route(&message).unwrap().0, [2, 3].into());
    }

    #[test]
    fn the_namespace_has_a_cookie() {
        assert_ne!(netns_cookie().unwrap(), 0);
    }
}
