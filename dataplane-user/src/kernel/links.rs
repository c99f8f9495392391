//! The node's interfaces, addresses and default routes, followed live over netlink; and which interfaces are uplinks and
//! which lead to pods.
//!
//! Who asks always gets the newest state; what came and went in between is nobody's business. If the kernel dropped
//! messages because this side was slow, everything is read anew.
#![expect(clippy::wildcard_enum_match_arm, reason = "netlink's enums are not ours and grow with the kernel")]

use super::rtnetlink_dump;
use super::service_route::{DEVICE, PEER};
use crate::pattern::Pattern;
use futures::StreamExt as _;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};
use rtnetlink::sys::AsyncSocket as _;
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::time::Duration;
use std::{fmt, io};
use tokio::sync::watch;

/// Room for messages that wait to be read: some thousand interfaces changing at once.
const RECEIVE_BUFFER: libc::c_int = 4 << 20;
/// Wait before netlink is tried again.
const RETRY: Duration = Duration::from_secs(1);
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
    /// Whether it is one end of a veth pair.
    pub veth: bool,
    /// Whether it is the loopback interface.
    pub loopback: bool,
    /// Whether its packets have an Ethernet header; some tunnels' do not.
    pub ethernet: bool,
}

/// The node's interfaces, addresses and default routes at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// The interfaces by index.
    pub links: BTreeMap<u32, Interface>,
    /// The addresses of each interface, by its index, in the kernel's order.
    pub addresses: BTreeMap<u32, Vec<IpAddr>>,
    /// Indexes of the interfaces of the default routes, of both families.
    pub default_routes: BTreeSet<u32>,
}

/// What an interface is to the dataplane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// It leads to the network.
    Uplink,
    /// It leads to a pod.
    Pod,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uplink => "uplink",
            Self::Pod => "pod interface",
        })
    }
}

/// How the operator chose the interfaces; an empty list leaves the choice to the rules.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// `--uplink`.
    pub uplinks: Vec<Pattern>,
    /// `--pod-interface`.
    pub pods: Vec<Pattern>,
}

impl Interfaces {
    /// The role of each interface that has one. An uplink is never a pod interface, and `lo` is neither.
    pub fn roles(&self, choice: &Choice) -> BTreeMap<u32, Role> {
        let named = |patterns: &[Pattern], name: &str| patterns.iter().any(|pattern| pattern.matches(name));
        let role = |index: u32, link: &Interface| {
            let uplink = match choice.uplinks.as_slice() {
                _ if link.name == DEVICE => true,
                [] => self.default_routes.contains(&index),
                patterns => named(patterns, &link.name),
            };
            let pod = match choice.pods.as_slice() {
                [] => link.veth && link.name != PEER,
                patterns => named(patterns, &link.name),
            };
            match (link.loopback, uplink, pod) {
                (true, ..) | (_, false, false) => None,
                (_, true, _) => Some(Role::Uplink),
                (_, false, true) => Some(Role::Pod),
            }
        };
        self.links.iter().filter_map(|(index, link)| Some((*index, role(*index, link)?))).collect()
    }

    /// The node's own addresses, loopback included, those of the uplinks first: where nothing else says which is the
    /// node's primary address, it is the first.
    pub fn own_addresses(&self, roles: &BTreeMap<u32, Role>) -> Vec<IpAddr> {
        let uplink = |index: &u32| roles.get(index) == Some(&Role::Uplink);
        let (uplinks, others): (Vec<_>, Vec<_>) = self.addresses.iter().partition(|(index, _)| uplink(index));
        let mut seen = BTreeSet::new();
        uplinks
            .into_iter()
            .chain(others)
            .flat_map(|(_, addresses)| addresses)
            .copied()
            .filter(|address| seen.insert(*address))
            .collect()
    }

    /// A node whose last default route goes keeps its uplinks: the route may be about to be replaced, and flows go on.
    fn set_default_routes(&mut self, routes: BTreeSet<u32>) {
        if routes.is_empty() {
            let links = &self.links;
            self.default_routes.retain(|index| links.contains_key(index));
        } else {
            self.default_routes = routes;
        }
    }

    fn add(&mut self, index: u32, address: IpAddr) {
        let addresses = self.addresses.entry(index).or_default();
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }

    /// What of this one message is news, and whether the default routes must be read again.
    fn apply(&mut self, message: RouteNetlinkMessage) -> News {
        match message {
            RouteNetlinkMessage::NewLink(message) => {
                if let Some((index, link)) = interface(&message) {
                    self.links.insert(index, link);
                }
                News::Seen
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
                if self.default_routes.contains(&index) { News::Routes } else { News::Seen }
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
                News::Seen
            }
            RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message)
                if is_default(&message) =>
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
    /// The default routes must be read again: a route's message does not tell what it replaced.
    Routes,
    /// Messages were lost: all must be read again.
    Lost,
}

fn interface(message: &LinkMessage) -> Option<(u32, Interface)> {
    // Messages of the bridge family tell of ports, not of interfaces.
    if message.header.interface_family != rtnetlink::packet_route::AddressFamily::Unspec {
        return None;
    }
    let layer = message.header.link_layer_type;
    let mut link = Interface {
        name: String::new(),
        veth: false,
        loopback: layer == LinkLayerType::Loopback,
        ethernet: matches!(layer, LinkLayerType::Ether | LinkLayerType::Loopback),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::LinkInfo(infos) => {
                link.veth = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)));
            }
            _ => {}
        }
    }
    Some((message.header.index, link))
}

fn address(message: &AddressMessage) -> Option<(u32, IpAddr)> {
    // IFA_LOCAL is the own address; where there is none (IPv6 without a peer), IFA_ADDRESS is.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let any = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    Some((message.header.index, local.or(any)?))
}

fn is_default(message: &RouteMessage) -> bool {
    message.header.destination_prefix_length == 0
        && message.header.kind == RouteType::Unicast
        && message.header.table == RouteHeader::RT_TABLE_MAIN
}

fn route_interfaces(message: &RouteMessage) -> BTreeSet<u32> {
    let mut indexes = BTreeSet::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => {
                indexes.insert(*index);
            }
            RouteAttribute::MultiPath(hops) => indexes.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    indexes
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
    interfaces.default_routes = default_routes(handle).await?;
    Ok(interfaces)
}

async fn default_routes(handle: &Handle) -> Result<BTreeSet<u32>, LinksError> {
    let v4 = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let mut indexes = BTreeSet::new();
    for question in [v4, v6].map(RouteNetlinkMessage::GetRoute) {
        let take = |message| match message {
            RouteNetlinkMessage::NewRoute(route) if is_default(&route) => {
                indexes.extend(route_interfaces(&route));
            }
            _ => {}
        };
        rtnetlink_dump::each(handle, "routes", question, take).await?;
    }
    Ok(indexes)
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
        Ok(Self { handle, messages, now })
    }

    /// Waits for messages, takes in all there are, and publishes what came of them.
    async fn next(&mut self, sender: &watch::Sender<Interfaces>) -> Result<(), LinksError> {
        let first = self.messages.next().await.ok_or(LinksError::Closed)?;
        let mut news = self.take_in(first.0);
        while let Ok((message, _)) = self.messages.try_recv() {
            news = news.max(self.take_in(message));
        }
        match news {
            News::Seen => {}
            News::Routes => {
                let routes = default_routes(&self.handle).await?;
                self.now.set_default_routes(routes);
            }
            News::Lost => return Err(LinksError::Lost),
        }
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

    fn interfaces(links: &[(u32, &str, bool)], default_routes: &[u32]) -> Interfaces {
        let link = |name: &str, veth| Interface {
            name: name.to_owned(),
            veth,
            loopback: name == "lo",
            ethernet: true,
        };
        Interfaces {
            links: links.iter().map(|(index, name, veth)| (*index, link(name, *veth))).collect(),
            addresses: BTreeMap::new(),
            default_routes: default_routes.iter().copied().collect(),
        }
    }

    fn patterns(patterns: &[&str]) -> Vec<Pattern> {
        patterns.iter().map(|pattern| pattern.parse().unwrap()).collect()
    }

    #[test]
    fn uplinks_are_the_interfaces_of_the_default_routes_and_pods_are_behind_veths() {
        let node = interfaces(
            &[(1, "lo", false), (2, "eth0", false), (3, "eth1", false), (7, "veth12", true)],
            &[2],
        );
        let roles = node.roles(&Choice::default());
        assert_eq!(roles, BTreeMap::from([(2, Role::Uplink), (7, Role::Pod)]));
    }

    #[test]
    fn an_uplink_that_is_a_veth_is_no_pod_interface() {
        let node = interfaces(&[(2, "eth0", true), (7, "veth12", true)], &[2]);
        assert_eq!(node.roles(&Choice::default())[&2], Role::Uplink);
        let choice = Choice { uplinks: patterns(&["veth*"]), pods: patterns(&["veth*"]) };
        assert_eq!(node.roles(&choice), BTreeMap::from([(7, Role::Uplink)]));
    }

    #[test]
    fn patterns_replace_the_rules() {
        let node = interfaces(&[(2, "eth0", false), (3, "wg0", false), (7, "cali12", true)], &[2]);
        let choice = Choice { uplinks: patterns(&["wg*"]), pods: patterns(&["cali*"]) };
        assert_eq!(node.roles(&choice), BTreeMap::from([(3, Role::Uplink), (7, Role::Pod)]));
    }

    #[test]
    fn loopback_has_no_role_whatever_the_patterns_say() {
        let node = interfaces(&[(1, "lo", false)], &[1]);
        let choice = Choice { uplinks: patterns(&["*"]), pods: patterns(&["*"]) };
        assert!(node.roles(&choice).is_empty());
    }

    #[test]
    fn an_interface_that_goes_takes_its_addresses_along() {
        let mut node = interfaces(&[(2, "eth0", false), (3, "eth1", false)], &[]);
        let own: IpAddr = "192.0.2.1".parse().unwrap();
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
        let mut node = interfaces(&[(2, "eth0", false), (3, "veth1", true)], &[2]);
        let gone = |index| {
            let mut message = LinkMessage::default();
            message.header.index = index;
            RouteNetlinkMessage::DelLink(message)
        };
        assert_eq!(node.apply(gone(3)), News::Seen);
        assert_eq!(node.apply(gone(2)), News::Routes);
    }

    #[test]
    fn the_addresses_of_uplinks_come_first_and_each_once() {
        let mut node = interfaces(&[(1, "lo", false), (2, "docker0", false), (3, "eth0", false)], &[3]);
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (index, address) in [(1, "127.0.0.1"), (2, "172.17.0.1"), (3, "192.0.2.7"), (3, "127.0.0.1")] {
            node.add(index, ip(address));
        }
        let own = node.own_addresses(&node.roles(&Choice::default()));
        assert_eq!(own, [ip("192.0.2.7"), ip("127.0.0.1"), ip("172.17.0.1")]);
    }

    #[test]
    fn an_uplink_stays_one_while_there_is_no_default_route() {
        let mut node = interfaces(&[(2, "eth0", true), (3, "eth1", true)], &[2]);
        node.set_default_routes(BTreeSet::new());
        assert_eq!(node.roles(&Choice::default())[&2], Role::Uplink);
        node.set_default_routes([3].into());
        assert_eq!(node.roles(&Choice::default()), BTreeMap::from([(2, Role::Pod), (3, Role::Uplink)]));
    }

    #[test]
    fn a_port_that_leaves_its_bridge_is_still_there() {
        let mut node = interfaces(&[(2, "veth1", true)], &[]);
        let mut left = LinkMessage::default();
        left.header.index = 2;
        left.header.interface_family = rtnetlink::packet_route::AddressFamily::Bridge;
        node.apply(RouteNetlinkMessage::DelLink(left));
        assert_eq!(node.links.len(), 1);
    }

    #[test]
    fn a_route_over_several_next_hops_names_all_their_interfaces() {
        use rtnetlink::packet_route::route::RouteNextHop;
        let hop = |index| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = index;
            hop
        };
        let mut route = RouteMessage::default();
        route.attributes.push(RouteAttribute::MultiPath(vec![hop(2), hop(3)]));
        assert_eq!(route_interfaces(&route), [2, 3].into());
    }

    #[test]
    fn the_namespace_has_a_cookie() {
        assert_ne!(netns_cookie().unwrap(), 0);
    }
}
