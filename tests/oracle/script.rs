//! A case: how the agent was started, what the cluster is at each time, and what is sent. Plain data, so that it can be
//! made smaller.

use crate::objects;
use crate::random::Random;
use crate::universe::{FAR, Flags, NOBODY, NODE, NODE_PORTS, OUTSIDE, PODS, PORTS, is_pod};
use dataplane_tests::oracle::wire::{Segment, TCP, UDP, flag};
use dataplane_tests::oracle::{Cluster, Place};
use std::net::{IpAddr, SocketAddr};

/// Packets of a case before its walks through further hooks are counted.
const PACKETS: usize = 150;
/// The endpoint's first sequence number in a script.
const ISS: u32 = 5_000;

/// A whole case.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) flags: Flags,
    pub(crate) states: Vec<Cluster>,
    pub(crate) steps: Vec<Step>,
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
    },
    /// Whoever got the packet `to` answers it; nothing is sent if nobody got it.
    Reply { to: usize, early: bool, flags: u8, seq: u32, ack: u32, data: usize },
}

/// Draws a case.
pub(crate) fn random(random: &mut Random) -> Script {
    let flags = Flags::random(random);
    let mut states = vec![objects::cluster(random)];
    for _ in 0..random.below(3) {
        states.push(objects::later(random, states.last().expect("there is a first")));
    }
    let mut author = Author { steps: vec![Step::State(0)], next_id: 0, destinations: destinations(&states) };
    let mut clients = Vec::new();
    for number in 0..states.len() {
        if number > 0 {
            author.steps.push(Step::State(number));
        }
        while author.steps.len() < PACKETS * (number + 1) / states.len() {
            match random.below(10) {
                0..=5 => clients.push(author.conversation(random)),
                6 | 7 if !clients.is_empty() => {
                    let client = clients[random.below(clients.len())].clone();
                    author.resume(random, &client);
                }
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
        let addresses =
            spec.cluster_ip.into_iter().chain(spec.external_ips.into_iter().flatten()).chain(ingress);
        let addresses: Vec<IpAddr> = addresses.filter_map(|text| text.parse().ok()).collect();
        for port in spec.ports.iter().flatten() {
            let proto = if port.protocol.as_deref() == Some("UDP") { UDP } else { TCP };
            all.extend(addresses.iter().map(|ip| (*ip, port.port as u16, proto)));
            for node in NODE.iter().filter(|_| port.node_port.is_some()) {
                all.push((node.parse().unwrap(), port.node_port.unwrap_or(0) as u16, proto));
            }
        }
    }
    all
}

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
        (SocketAddr::new(ip, port), random.of(&[TCP, UDP]))
    }

    /// Somebody who calls, and where the call is met.
    fn client(&self, random: &mut Random) -> Client {
        let (dst, proto) = self.destination(random);
        // Few ports, so that tuples meet again.
        let port = 40_000 + random.below(12) as u16;
        let own = NODE.iter().any(|node| node.parse() == Ok(dst.ip())) || dst.ip().is_loopback();
        let (ip, place) = match random.below(10) {
            0..=3 => (random.of(&PODS), Place::FromPod),
            // What the node sends to itself leaves by no uplink.
            4 if !own => (random.of(&NODE), Place::ToNetwork),
            _ => (random.of(&OUTSIDE), random.of(&[Place::FromNetwork, Place::FromNetwork, Place::Early])),
        };
        Client { place, src: SocketAddr::new(ip.parse().unwrap(), port), dst, proto }
    }

    fn send(&mut self, random: &mut Random, client: &Client, flags: u8, ack: u32) -> usize {
        let data = if random.chance(5) { 1_400 } else { random.below(9) };
        let segment = Segment {
            src: client.src,
            dst: client.dst,
            proto: client.proto,
            flags,
            seq: 1_000,
            ack: if flags & flag::ACK == 0 { 0 } else { ack },
            ttl: if random.chance(3) { random.of(&[0, 1, 2]) } else { 64 },
            data: vec![random.next() as u8; data],
            summed: !random.chance(10),
        };
        let id = self.next_id;
        self.next_id += 1;
        self.steps.push(Step::Send { id, place: client.place, segment });
        id
    }

    fn reply(&mut self, random: &mut Random, to: usize, flags: u8) {
        let data = random.below(9);
        self.steps.push(Step::Reply { to, early: random.chance(40), flags, seq: ISS, ack: 1_001, data });
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
        for (from_client, flags) in script.into_iter().take(random.below(script.len() + 1)) {
            if random.chance(8) {
                continue;
            }
            let flags = if random.chance(6) { random_flags(random) } else { flags };
            if from_client {
                let ack = if random.chance(90) { ISS + 1 + random.below(70) as u32 } else { 900_000_000 };
                self.send(random, &client, flags, ack);
            } else {
                self.reply(random, first, flags);
            }
        }
        client
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
            self.reply(random, id, flags);
        }
    }

    /// A packet from anybody to anywhere, met anywhere.
    fn stray(&mut self, random: &mut Random) {
        let mut client = self.client(random);
        let from = match random.below(5) {
            0 => random.of(&NOBODY),
            1 => random.of(&FAR),
            2 => random.of(&NODE),
            _ => random.of(&PODS),
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
            && !NODE.contains(&client.dst.ip().to_string().as_str())
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
