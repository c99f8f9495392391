//! Runs a case through the real programs and the oracle, and says where they disagree.

use crate::kinds::{self, Kinds};
use crate::script::{Script, State, Step};
use crate::shape::Shape;
use crate::universe::{Places, is_pod};
use dataplane_common::counter::Traffic;
use dataplane_common::drop::Reason;
use dataplane_common::flow::FlowKey;
use dataplane_common::{Addr, Port};
use dataplane_tests::oracle::wire::{self, Headers, Segment, TAG};
use dataplane_tests::oracle::{Alternative, Flow, Model, Outcome, Place, Way};
use dataplane_tests::packet::{Hook, NodeFacts, Verdict, World};
use dataplane_user::kernel::pins::Pins;
use dataplane_user::kernel::rehearsal::Rehearsal;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::verdict::{Seen, fits};

/// ICMP errors: type, code, and second word; the last is a mere echo reply.
const KINDS_V4: &[([u8; 2], u32)] =
    &[([3, 1], 0), ([3, 3], 0), ([3, 4], 1_280), ([11, 0], 0), ([12, 0], 0x1400_0000), ([0, 0], 0)];
/// The same of ICMPv6.
const KINDS_V6: &[([u8; 2], u32)] =
    &[([1, 0], 0), ([1, 4], 0), ([2, 0], 1_280), ([3, 0], 0), ([4, 0], 40), ([129, 0], 0)];

/// One packet in so many is rehearsed: it takes several times as long as the packet itself.
const REHEARSED: usize = 4;

/// Hooks that one packet may pass one after the other.
const LONGEST_WALK: usize = 8;

/// The programs, ready for one case after the other.
pub(crate) struct Bench {
    pub(crate) world: World,
    now: Instant,
    /// Traffic of services and backends when the cluster last changed.
    before: [Traffic; 2],
    /// Counters of the reasons after the last packet.
    reasons: BTreeMap<Reason, u64>,
    /// Packets that were compared.
    pub(crate) packets: usize,
    /// Of which kinds they were.
    pub(crate) kinds: Kinds,
    /// A second copy of the programs, by which `portolan explain` answers, and what it has answered.
    rehearsal: Option<Rehearsal>,
    pub(crate) rehearsed: usize,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let sizes = [
            ("backends", 2_048),
            ("backend_traffic", 2_048),
            ("open", 2_048),
            ("services", 256),
            ("service_traffic", 256),
            ("service_tries", 256),
            ("rounds", 256),
        ];
        let world = World::with("", 0, &sizes).unwrap_or_else(|error| panic!("{error:#}"));
        let reasons = reasons(&world).unwrap_or_else(|error| panic!("{error}"));
        Self {
            world,
            now: Instant::now(),
            before: [Traffic::default(); 2],
            reasons,
            packets: 0,
            kinds: Kinds::default(),
            rehearsal: None,
            rehearsed: 0,
        }
    }

    /// Has packets rehearsed before they are sent.
    pub(crate) fn rehearsing(mut self, pins: &Pins) -> Self {
        self.world.pin(pins).unwrap_or_else(|error| panic!("{error:#}"));
        self.rehearsal = Some(Rehearsal::open(pins).unwrap_or_else(|error| panic!("{error}")));
        self
    }

    /// Runs a case; the error is the first disagreement.
    pub(crate) fn run(&mut self, script: &Script) -> Result<(), String> {
        let facts = script.flags.facts();
        // Nothing of the case before is left.
        self.world.forget_flows().map_err(|error| format!("{error:#}"))?;
        self.clear(&facts)?;
        self.reasons = reasons(&self.world)?;
        let first = script.states.first().ok_or("no state")?;
        let model = Model::new(script.flags.node(), &first.cluster);
        let mut case = Case {
            bench: self,
            facts,
            model,
            arrived: BTreeMap::new(),
            expected: Traffic::default(),
            possible: Traffic::default(),
        };
        case.remember_traffic()?;
        for (number, step) in script.steps.iter().enumerate() {
            case.step(script, step).map_err(|error| format!("step {number}: {step:?}\n{error}"))?;
        }
        case.check_traffic()
    }

    /// Nothing of the case before is left.
    pub(crate) fn clear(&mut self, facts: &NodeFacts) -> Result<(), String> {
        self.world.forget_flows().map_err(|error| format!("{error:#}"))?;
        self.write("", facts, 0)
    }

    /// Writes the tables of a state. What cannot be read must be told, each once (Z5).
    pub(crate) fn bring(&mut self, state: &State, facts: &NodeFacts) -> Result<(), String> {
        self.write(&state.manifests(), facts, state.broken.len())
    }

    fn write(&mut self, yaml: &str, facts: &NodeFacts, broken: usize) -> Result<(), String> {
        // So much later that nothing rests any more.
        self.now += Duration::from_secs(10);
        let errors = self.world.bring(yaml, facts, self.now).map_err(|error| format!("{error:#}"))?;
        if errors.len() == broken {
            return Ok(());
        }
        Err(format!("{broken} documents cannot be read, but told is: {errors:#?}"))
    }
}

/// A case under way.
struct Case<'a> {
    bench: &'a mut Bench,
    facts: NodeFacts,
    model: Model,
    /// How the packet of an id arrived where it went, in its first fragment if it came in several.
    arrived: BTreeMap<usize, Vec<u8>>,
    /// What the traffic counters must have moved by.
    expected: Traffic,
    /// What they may count beside: packets of flows whose endpoint is gone count until its id is another's.
    possible: Traffic,
}

impl Case<'_> {
    fn step(&mut self, script: &Script, step: &Step) -> Result<(), String> {
        match step {
            Step::State(number) => {
                self.check_traffic()?;
                let state = &script.states[*number];
                self.bench.bring(state, &self.facts)?;
                self.model.change(&state.cluster);
                if !state.broken.is_empty() {
                    self.bench.kinds.count("a state with unreadable objects");
                }
                (self.expected, self.possible) = (Traffic::default(), Traffic::default());
                self.remember_traffic()
            }
            Step::Send { id, place, segment, shape } => self.send(*id, *place, segment, shape),
            Step::Reply { id, to, early, flags, seq, ack, data, shape } => {
                let Some(arrived) = self.arrived.get(to).and_then(|frame| wire::parse(frame, false)) else {
                    return Ok(());
                };
                let segment = Segment {
                    src: arrived.dst,
                    dst: arrived.src,
                    proto: arrived.proto,
                    flags: *flags,
                    seq: *seq,
                    ack: *ack,
                    ttl: 64,
                    data: vec![7; *data],
                    summed: true,
                };
                let place = self.place_of(arrived.dst, arrived.src, *early);
                self.send(*id, place, &segment, shape)
            }
            Step::Error { about, early, router, kind, quoted } => {
                let frame = self.arrived.get(about).cloned();
                let arrived = frame.and_then(|frame| Some((wire::parse(&frame, false)?, frame)));
                let Some((headers, frame)) = arrived else { return Ok(()) };
                let places = Places::of(headers.is_v6());
                let from = if *router { places.server.parse().unwrap() } else { headers.dst.ip() };
                let kinds = if headers.is_v6() { KINDS_V6 } else { KINDS_V4 };
                let (kind, word) = kinds[*kind % kinds.len()];
                let error = wire::error_about(&frame, &headers, from, kind, word, *quoted);
                let place = self.place_of(SocketAddr::new(from, 0), headers.src, *early);
                self.walk(place, error).map(drop)
            }
        }
    }

    /// Sends a packet in its shape, and remembers how it arrived.
    fn send(&mut self, id: usize, place: Place, segment: &Segment, shape: &Shape) -> Result<(), String> {
        for frame in shape.frames(&segment.frame()) {
            let arrived = self.walk(place, frame)?;
            if let Some(frame) = arrived
                && wire::parse(&frame, false).is_some_and(|headers| headers.flaw.is_none())
            {
                self.arrived.insert(id, frame);
            }
        }
        Ok(())
    }

    /// Where a packet from a host is met.
    fn place_of(&self, from: SocketAddr, to: SocketAddr, early: bool) -> Place {
        if is_pod(from.ip()) {
            Place::FromPod
        } else if self.model.node().has(from.ip()) {
            if is_pod(to.ip()) { Place::ToPod } else { Place::ToNetwork }
        } else if early {
            Place::Early
        } else {
            Place::FromNetwork
        }
    }

    /// Takes a frame from hook to hook as a node would. What arrived, if it did.
    fn walk(&mut self, mut place: Place, mut frame: Vec<u8>) -> Result<Option<Vec<u8>>, String> {
        for _ in 0..LONGEST_WALK {
            let (verdict, out, again) = self.compare(place, &frame)?;
            if let Some(to) = again {
                // What was refused comes once more, where its client's packets are met.
                (place, frame) = (to, out);
                continue;
            }
            let headers = wire::parse(&out, place == Place::Early);
            match verdict {
                Verdict::Drop => return Ok(None),
                // Past the stack: an answer, or translated and on its way.
                Verdict::Redirect | Verdict::Tx => return Ok(Some(out)),
                Verdict::Pass => {}
            }
            frame = out;
            let Some(headers) = headers else { return Ok(None) };
            if headers.is_tagged() {
                // From here on the kernel has the outer tag beside the packet.
                frame.drain(12..12 + TAG);
            }
            let node = self.model.node();
            place = match place {
                Place::Early => Place::FromNetwork,
                Place::ToNetwork | Place::ToPod => return Ok(Some(frame)),
                Place::FromNetwork | Place::FromPod => match node.way(headers.dst.ip()) {
                    Way::Here | Way::None => return Ok(Some(frame)),
                    Way::Out { .. } if is_pod(headers.dst.ip()) => Place::ToPod,
                    Way::Out { .. } => Place::ToNetwork,
                },
            };
        }
        Ok(None)
    }

    /// One packet at one hook, by the programs and by the oracle.
    fn compare(&mut self, place: Place, frame: &[u8]) -> Result<(Verdict, Vec<u8>, Option<Place>), String> {
        self.bench.packets += 1;
        self.rehearse(place, frame)?;
        let world = &self.bench.world;
        let (verdict, out, mark) =
            world.send_uncounted(hook(place), frame).map_err(|error| format!("{error:#}"))?;
        let after = reasons(world)?;
        let before = std::mem::replace(&mut self.bench.reasons, after);
        let moved = self.bench.reasons.iter().filter_map(|(reason, count)| {
            let more = count - before.get(reason).copied().unwrap_or(0);
            (more != 0).then_some((*reason, more))
        });
        let seen = Seen { place, frame, verdict, out: &out, mark, moved: moved.collect() };
        let headers = wire::parse(frame, place == Place::Early);
        let alternatives = self.model.expect(place, frame);
        let mut complaints = Vec::new();
        for alternative in &alternatives {
            match fits(&self.model, alternative, headers.as_ref(), &seen) {
                Ok(source) => {
                    self.count(alternative, headers.as_ref());
                    if let Some(headers) = &headers {
                        kinds::of(place, headers, alternative, &mut self.bench.kinds);
                    }
                    let again = match &alternative.outcome {
                        Outcome::Again(place, _) => Some(*place),
                        _ => None,
                    };
                    self.model.accept((place, frame), headers.as_ref(), alternative, source);
                    return Ok((verdict, out, again));
                }
                Err(complaint) => complaints.push(format!("{:?}: {complaint}", alternative.outcome)),
            }
        }
        let allowed = complaints.iter().map(|complaint| format!("\n  {complaint}")).collect::<String>();
        Err(format!("at {place:?} {seen}\nallowed was:{allowed}"))
    }

    /// What the second copy of the programs makes of a packet must be allowed as well: verdict, every byte, next hop, reasons. That
    /// it changes nothing shows when the packet itself comes, and in the counters.
    fn rehearse(&mut self, place: Place, frame: &[u8]) -> Result<(), String> {
        let Bench { rehearsal: Some(rehearsal), packets, rehearsed, world, .. } = &mut *self.bench else {
            return Ok(());
        };
        let Some(headers) = wire::parse(frame, false).filter(|it| it.flaw.is_none()) else {
            return Ok(());
        };
        let is_simple =
            matches!(headers.proto, 6 | 17 | 132) && headers.src.port() != 0 && headers.fragment.is_none();
        if !is_simple || *packets % REHEARSED != 0 {
            return Ok(());
        }
        let end = |end: SocketAddr| (Addr::from(end.ip()), Port::new(end.port()));
        let ((src, src_port), (dst, dst_port)) = (end(headers.src), end(headers.dst));
        let key = FlowKey::new(src, src_port, dst, dst_port, headers.proto);
        let rehearsed_now = world.rehearse(rehearsal, hook(place), frame, key);
        let (verdict, trial) = rehearsed_now.map_err(|error| format!("{error:#}"))?;
        *rehearsed += 1;
        let seen = Seen { place, frame, verdict, out: &trial.data, mark: trial.mark, moved: trial.moved };
        let alternatives = self.model.expect(place, frame);
        let allowed = alternatives.iter().any(|it| fits(&self.model, it, Some(&headers), &seen).is_ok());
        if allowed { Ok(()) } else { Err(format!("rehearsed at {place:?} {seen}, which is not allowed")) }
    }

    /// What the traffic counters must count of it.
    fn count(&mut self, alternative: &Alternative, headers: Option<&Headers>) {
        let bytes = headers.map_or(0, |headers| headers.length as u64);
        let gone = |flow: &Flow| Some(flow.client) == alternative.used() && flow.endpoint_gone;
        let counters = if self.model.flows().any(gone) { &mut self.possible } else { &mut self.expected };
        crate::verdict::count(alternative, bytes, counters);
    }

    fn remember_traffic(&mut self) -> Result<(), String> {
        let [services, backends] = self.bench.world.traffic().map_err(|error| format!("{error:#}"))?;
        self.bench.before = [services, backends];
        Ok(())
    }

    /// Since the last change of the cluster, both kinds of counter moved by what was translated.
    fn check_traffic(&mut self) -> Result<(), String> {
        let now = self.bench.world.traffic().map_err(|error| format!("{error:#}"))?;
        for ((now, before), whose) in now.iter().zip(&self.bench.before).zip(["services", "backends"]) {
            let (mut least, mut most) = (*before, *before);
            least += self.expected;
            most += self.expected;
            most += self.possible;
            let fields = |t: &Traffic| [t.packets_in, t.bytes_in, t.packets_out, t.bytes_out, t.new_flows];
            let (now, least, most) = (fields(now), fields(&least), fields(&most));
            if !(0..now.len()).all(|n| (least[n]..=most[n]).contains(&now[n])) {
                return Err(format!("traffic of {whose} is {now:?}, should be {least:?} to {most:?}"));
            }
        }
        Ok(())
    }
}

pub(crate) fn reasons(world: &World) -> Result<BTreeMap<Reason, u64>, String> {
    world.reasons().map(|reasons| reasons.into_iter().collect()).map_err(|error| format!("{error:#}"))
}

pub(crate) const fn hook(place: Place) -> Hook {
    match place {
        Place::Early => Hook::Xdp,
        Place::FromNetwork => Hook::UplinkIn,
        Place::ToNetwork => Hook::UplinkOut,
        Place::FromPod => Hook::PodIn,
        Place::ToPod => Hook::PodOut,
    }
}
