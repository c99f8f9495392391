//! A case: how the agent was started, what the cluster is at each time, and what is sent. Plain data, so that it can be
//! made smaller.

use crate::objects;
use crate::random::Random;
use crate::shape::Shape;
use crate::universe::{Flags, NODE_PORTS, PORTS, Places, is_pod};
use crate::{broken, shape};
use dataplane_tests::oracle::wire::{ICMP, ICMPV6, SCTP, Segment, TCP, UDP, chunk, flag};
use dataplane_tests::oracle::{Cluster, Place};
use std::net::{IpAddr, SocketAddr};

/// Steps of a case before its walks through further hooks are counted.
const PACKETS: usize = 150;
/// The endpoint's first sequence number in a script.
const ISS: u32 = 5_000;

/// A whole case.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) flags: Flags,
    pub(crate) states: Vec<State>,
    pub(crate) steps: Vec<Step>,
}

/// What the API server holds: objects, and what is none.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) cluster: Cluster,
    pub(crate) broken: Vec<String>,
}

impl State {
    /// All of it as manifests.
    pub(crate) fn manifests(&self) -> String {
        objects::manifests(&self.cluster, &self.broken)
    }
}

/// One step.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// The cluster is this state now.
    State(usize),
    /// A packet is sent as it stands here.
    Send {
        /// By which replies name it.
        id: usize,
        place: Place,
        segment: Segment,
        shape: Shape,
    },
    /// Whoever got the packet `to` answers it; nothing is sent if nobody got it.
    Reply { id: usize, to: usize, early: bool, flags: u8, seq: u32, ack: u32, data: usize, shape: Shape },
    /// Whoever got the packet `about`, or a router on the way there, sends an ICMP error about it.
    Error { about: usize, early: bool, router: bool, kind: usize, quoted: usize },
}

/// Draws a case.
pub(crate) fn random(random: &mut Random) -> Script {
    let flags = Flags::random(random);
    let mut clusters = vec![objects::cluster(random)];
    for _ in 0..random.below(3) {
        clusters.push(objects::later(random, clusters.last().expect("there is a first")));
    }
    let mut author =
        Author { steps: vec![Step::State(0)], next_id: 0, destinations: destinations(&clusters) };
    let broken = |mut cluster: Cluster| State { broken: broken::some(random, &mut cluster), cluster };
    let states: Vec<State> = clusters.into_iter().map(broken).collect();
    let mut clients = Vec::new();
    for number in 0..states.len() {
        if number > 0 {
            author.steps.push(Step::State(number));
        }
        while author.steps.len() < PACKETS * (number + 1) / states.len() {
            match random.below(10) {
                0..=5 => clients.push(author.conversation(random)),
                6 | 7 if !clients.is_empty() => {
                    let mut client = clients[random.below(clients.len())].clone();
                    if random.chance(30) {
                        client.dst = author.next_to(&client);
                    }
                    author.resume(random, &client);
                }
                8 if random.chance(40) => author.outgoing(random),
                _ => author.stray(random),
            }
        }
    }
    Script { flags, states, steps: author.steps }
}

/// What the states say may be called, each with its port; and everything else.
fn destinations(states: &[Cluster]) -> Vec<(IpAddr, u16, u8)> {
    let mut all = Vec::new();
    for service in states.iter().flat_map(|state| &state.services) {
        let spec = service.spec.clone().unwrap_or_default();
        let status = service.status.clone().and_then(|status| status.load_balancer).unwrap_or_default();
        let ingress = status.ingress.into_iter().flatten().filter_map(|ingress| ingress.ip);
        let cluster_ips = spec.cluster_ips.unwrap_or_else(|| spec.cluster_ip.into_iter().collect());
        let addresses = cluster_ips.into_iter().chain(spec.external_ips.into_iter().flatten()).chain(ingress);
        let addresses: Vec<IpAddr> = addresses.filter_map(|text| text.parse().ok()).collect();
        for port in spec.ports.iter().flatten() {
            let proto = match port.protocol.as_deref() {
                Some("UDP") => UDP,
                Some("SCTP") => SCTP,
                Some(_) | None => TCP,
            };
            all.extend(addresses.iter().map(|ip| (*ip, port.port as u16, proto)));
            let families = [false, true].into_iter().filter(|_| port.node_port.is_some());
            for node in families.flat_map(|v6| Places::of(v6).node) {
                all.push((node.parse().unwrap(), port.node_port.unwrap_or(0) as u16, proto));
            }
        }
    }
    all
}

/// Bytes of data in a packet too long for a narrow way.
const LONG: usize = 1_400;

/// Bytes of data in the others, and in some of those: narrow ways are few.
const LENGTHS: [usize; 9] = [0, 1, 2, 3, 4, 5, 6, 7, LONG];

/// Writes steps.
struct Author {
    steps: Vec<Step>,
    next_id: usize,
    destinations: Vec<(IpAddr, u16, u8)>,
}

/// A client with its tuple, to be heard of again.
#[derive(Clone, Debug)]
struct Client {
    place: Place,
    src: SocketAddr,
    dst: SocketAddr,
    proto: u8,
}

impl Author {
    /// Somewhere to go: mostly what a Service has, else a near miss.
    fn destination(&self, random: &mut Random) -> (SocketAddr, u8) {
        if random.chance(88) && !self.destinations.is_empty() {
            let (ip, port, proto) = random.of(&self.destinations);
            return (SocketAddr::new(ip, port), proto);
        }
        let all = objects::destinations();
        let ip: IpAddr = all[random.below(all.len())].parse().unwrap();
        let port = if random.chance(50) { random.of(&PORTS) } else { random.of(&NODE_PORTS) };
        let ping = if ip.is_ipv6() { ICMPV6 } else { ICMP };
        (SocketAddr::new(ip, port), random.of(&[TCP, TCP, UDP, UDP, SCTP, ping]))
    }

    /// Another destination, next to this one in the list: mostly another address of the same service port.
    fn next_to(&self, client: &Client) -> SocketAddr {
        let dst = client.dst;
        // What the node sends to itself leaves by no uplink.
        let leaves = |ip: &IpAddr| {
            client.place != Place::ToNetwork || !Places::of(ip.is_ipv6()).has_node(&ip.to_string())
        };
        let fits = |(ip, _, proto): &(IpAddr, u16, u8)| {
            ip.is_ipv6() == dst.is_ipv6() && *proto == client.proto && leaves(ip)
        };
        let all: Vec<_> = self.destinations.iter().copied().filter(fits).collect();
        let at = all.iter().position(|(ip, port, _)| SocketAddr::new(*ip, *port) == dst);
        let next = at.and_then(|at| all.get(at + 1).or(all.first()));
        next.map_or(dst, |(ip, port, _)| SocketAddr::new(*ip, *port))
    }

    /// Somebody who calls, and where the call is met.
    fn client(&self, random: &mut Random) -> Client {
        let (dst, proto) = self.destination(random);
        // Few ports, so that tuples meet again.
        let port = 40_000 + random.below(12) as u16;
        let places = Places::of(dst.is_ipv6());
        let own = places.has_node(&dst.ip().to_string()) || dst.ip().is_loopback();
        let (ip, place) = match random.below(10) {
            0..=3 => (random.of(&places.pods), Place::FromPod),
            // What the node sends to itself leaves by no uplink.
            4 if !own => (random.of(&places.node), Place::ToNetwork),
            _ => (
                random.of(&places.outside),
                random.of(&[Place::FromNetwork, Place::FromNetwork, Place::Early]),
            ),
        };
        Client { place, src: SocketAddr::new(ip.parse().unwrap(), port), dst, proto }
    }

    fn send(&mut self, random: &mut Random, client: &Client, flags: u8, ack: u32) -> usize {
        let data = if random.chance(5) { LONG } else { random.of(&LENGTHS) };
        let sctp = client.proto == SCTP;
        let flags = if sctp { chunk_of(flags) } else { flags };
        // SCTP asks for the tag with which the other end was told to come.
        let (seq, ack) = match flags {
            chunk::INIT if sctp => (0, 1_001),
            _ if sctp => (ack, 1_001),
            // Of a reset the number counts: what the endpoint waits for, what comes next, and what somebody guesses.
            _ if flags & flag::RST != 0 => (random.of(&[1_001, 1_001, 1_001, 1_000, 77]), ack),
            _ => (1_000, if flags & flag::ACK == 0 { 0 } else { ack }),
        };
        let segment = Segment {
            src: client.src,
            dst: client.dst,
            proto: client.proto,
            flags,
            seq,
            ack,
            ttl: if random.chance(3) { random.of(&[0, 1, 2]) } else { 64 },
            data: vec![random.next() as u8; data],
            summed: !random.chance(10),
        };
        let id = self.id();
        let shape = shape::random(random, client.place == Place::Early);
        self.steps.push(Step::Send { id, place: client.place, segment, shape });
        if random.chance(8) {
            self.error(random, id);
        }
        id
    }

    fn id(&mut self) -> usize {
        self.next_id += 1;
        self.next_id
    }

    fn reply(&mut self, random: &mut Random, to: usize, proto: u8, flags: u8) {
        let (id, data) = (self.id(), random.below(9));
        let (flags, ack) = if proto == SCTP { (chunk_of(flags), ISS + 1) } else { (flags, 1_001) };
        let seq = match proto {
            SCTP => 1_001,
            _ if flags & flag::RST != 0 => random.of(&[ISS + 1, ISS + 1, ISS + 1, ISS + 9, 77]),
            _ => ISS,
        };
        let early = random.chance(40);
        let shape = shape::random(random, false);
        self.steps.push(Step::Reply { id, to, early, flags, seq, ack, data, shape });
        if random.chance(8) {
            self.error(random, id);
        }
    }

    fn error(&mut self, random: &mut Random, about: usize) {
        let quoted = random.of(&[24, 28, 48, 56, 64, 576]);
        let (early, router) = (random.chance(40), random.chance(40));
        self.steps.push(Step::Error { about, early, router, kind: random.below(7), quoted });
    }

    /// A client begins to talk, and perhaps goes on.
    fn conversation(&mut self, random: &mut Random) -> Client {
        let client = self.client(random);
        let first = self.send(random, &client, flag::SYN, 0);
        // How far it goes: SYN, SYN-ACK, ACK, data both ways, FINs.
        let script = [
            (false, flag::SYN | flag::ACK),
            (true, flag::ACK),
            (false, flag::ACK),
            (true, flag::ACK),
            (true, flag::FIN | flag::ACK),
            (false, flag::FIN | flag::ACK),
            (true, flag::ACK),
            (false, flag::ACK),
        ];
        if random.chance(20) {
            self.refusals(random, first, client.proto);
        }
        for (from_client, flags) in script.into_iter().take(random.below(script.len() + 1)) {
            if random.chance(8) {
                continue;
            }
            let flags = if random.chance(6) { random_flags(random) } else { flags };
            if from_client {
                let beyond = if client.proto == SCTP { 0 } else { random.below(70) as u32 };
                let ack = if random.chance(90) { ISS + 1 + beyond } else { 900_000_000 };
                self.send(random, &client, flags, ack);
            } else {
                self.reply(random, first, client.proto, flags);
            }
        }
        client
    }

    /// Endpoints refuse what a client begins with, one after the other.
    fn refusals(&mut self, random: &mut Random, first: usize, proto: u8) {
        /// Port unreachable in either list of errors.
        const PORT_UNREACHABLE: usize = 1;
        let mut to = first;
        for _ in 0..random.below(6) {
            if proto == UDP {
                let early = random.chance(20);
                let about = first;
                self.steps.push(Step::Error {
                    about,
                    early,
                    router: false,
                    kind: PORT_UNREACHABLE,
                    quoted: 576,
                });
            } else {
                self.reply(random, to, proto, flag::RST | flag::ACK);
                to = self.next_id;
            }
        }
    }

    /// A client that was heard before sends again: its next packet, or a new connection on its port.
    fn resume(&mut self, random: &mut Random, client: &Client) {
        let flags = if random.chance(40) {
            flag::SYN
        } else {
            random.of(&[flag::ACK, flag::FIN | flag::ACK, flag::RST])
        };
        let id = self.send(random, client, flags, ISS + 1);
        if random.chance(50) {
            let flags = random.of(&[flag::ACK, flag::SYN | flag::ACK, flag::RST, flag::FIN | flag::ACK]);
            self.reply(random, id, client.proto, flags);
        }
    }

    /// The node, or whoever is masqueraded, calls somebody from the number of a node port, and is answered.
    fn outgoing(&mut self, random: &mut Random) {
        let places = Places::of(random.chance(50));
        let theirs = if random.chance(30) { random.of(&places.pods) } else { random.of(&places.outside) };
        let theirs = SocketAddr::new(theirs.parse().unwrap(), 40_000 + random.below(12) as u16);
        let own = SocketAddr::new(random.of(&places.node).parse().unwrap(), random.of(&NODE_PORTS));
        let (out, back) = if is_pod(theirs.ip()) {
            (Place::ToPod, Place::FromPod)
        } else {
            (Place::ToNetwork, random.of(&[Place::FromNetwork, Place::Early]))
        };
        let proto = random.of(&[TCP, TCP, UDP, UDP, SCTP]);
        let flags = random.of(&[flag::SYN, flag::SYN, flag::ACK, flag::RST]);
        self.send(random, &Client { place: out, src: own, dst: theirs, proto }, flags, 77);
        let answers = Client { place: back, src: theirs, dst: own, proto };
        for flags in [flag::SYN | flag::ACK, flag::ACK, flag::FIN | flag::ACK, flag::RST] {
            if random.chance(60) {
                self.send(random, &answers, flags, ISS + 1);
            }
        }
    }

    /// A packet from anybody to anywhere, met anywhere.
    fn stray(&mut self, random: &mut Random) {
        let mut client = self.client(random);
        let places = Places::of(client.dst.is_ipv6());
        let from = match random.below(5) {
            0 => random.of(&places.nobody[..4]),
            1 => random.of(&places.far),
            2 => random.of(&places.node),
            _ => random.of(&places.pods),
        };
        client.src = SocketAddr::new(from.parse().unwrap(), random.of(&[8080, 9090, 40_000, 40_001]));
        if random.chance(20) {
            client.src = SocketAddr::new(client.dst.ip(), client.src.port());
        }
        client.place = if is_pod(client.src.ip()) {
            Place::FromPod
        } else {
            random.of(&[Place::FromNetwork, Place::Early, Place::ToPod, Place::FromPod])
        };
        if random.chance(15)
            && !client.dst.ip().is_loopback()
            && !places.has_node(&client.dst.ip().to_string())
        {
            client.place = Place::ToNetwork;
        }
        let flags = random_flags(random);
        self.send(random, &client, flags, 77);
    }
}

/// Any mix of the six old flags.
fn random_flags(random: &mut Random) -> u8 {
    random.below(64) as u8
}

/// What SCTP has for a mix of TCP's flags.
fn chunk_of(flags: u8) -> u8 {
    const SYN_ACK: u8 = flag::SYN | flag::ACK;
    const FIN_ACK: u8 = flag::FIN | flag::ACK;
    match flags {
        flag::SYN => chunk::INIT,
        SYN_ACK => chunk::INIT_ACK,
        flag::ACK => chunk::DATA,
        FIN_ACK => chunk::SHUTDOWN,
        flag::RST => chunk::ABORT,
        other => other % (chunk::SHUTDOWN_COMPLETE + 2),
    }
}
