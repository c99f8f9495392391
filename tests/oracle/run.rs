//! Runs a case through the real programs and the oracle, and says where they disagree.

use crate::objects;
use crate::script::{Script, Step};
use crate::universe::is_pod;
use dataplane_common::counter::Traffic;
use dataplane_common::drop::Reason;
use dataplane_tests::oracle::wire::{self, Headers, Segment};
use dataplane_tests::oracle::{Alternative, Flow, Model, Place, Way};
use dataplane_tests::packet::{Hook, NodeFacts, Verdict, World};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::verdict::{Seen, fits};

/// Hooks that one packet may pass one after the other.
const LONGEST_WALK: usize = 4;

/// The programs, ready for one case after the other.
pub(crate) struct Bench {
    pub(crate) world: World,
    now: Instant,
    /// Traffic of services and backends when the cluster last changed.
    before: [Traffic; 2],
    /// Packets that were compared.
    pub(crate) packets: usize,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let sizes =
            [("backends", 2_048), ("backend_traffic", 2_048), ("services", 512), ("service_traffic", 512)];
        let world = World::with("", 0, &sizes).unwrap_or_else(|error| panic!("{error:#}"));
        Self { world, now: Instant::now(), before: [Traffic::default(); 2], packets: 0 }
    }

    /// Runs a case; the error is the first disagreement.
    pub(crate) fn run(&mut self, script: &Script) -> Result<(), String> {
        let facts = script.flags.facts();
        // Nothing of the case before is left.
        self.world.forget_flows().map_err(|error| format!("{error:#}"))?;
        self.bring("", &facts)?;
        let first = script.states.first().ok_or("no state")?;
        let model = Model::new(script.flags.node(), first);
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

    pub(crate) fn bring(&mut self, yaml: &str, facts: &NodeFacts) -> Result<(), String> {
        // So much later that nothing rests any more.
        self.now += Duration::from_secs(10);
        let errors = self.world.bring(yaml, facts, self.now).map_err(|error| format!("{error:#}"))?;
        if errors.is_empty() { Ok(()) } else { Err(format!("manifests: {errors:?}")) }
    }
}

/// A case under way.
struct Case<'a> {
    bench: &'a mut Bench,
    facts: NodeFacts,
    model: Model,
    /// With which tuple the packet of an id arrived at an endpoint, and its protocol.
    arrived: BTreeMap<usize, (SocketAddr, SocketAddr, u8)>,
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
                let cluster = &script.states[*number];
                self.bench.bring(&objects::manifests(cluster), &self.facts)?;
                self.model.change(cluster);
                (self.expected, self.possible) = (Traffic::default(), Traffic::default());
                self.remember_traffic()
            }
            Step::Send { id, place, segment } => {
                if let Some(headers) = self.walk(*place, segment.frame())? {
                    self.arrived.insert(*id, (headers.src, headers.dst, headers.proto));
                }
                Ok(())
            }
            Step::Reply { to, early, flags, seq, ack, data } => {
                let Some(&(src, dst, proto)) = self.arrived.get(to) else { return Ok(()) };
                let segment = Segment {
                    src: dst,
                    dst: src,
                    proto,
                    flags: *flags,
                    seq: *seq,
                    ack: *ack,
                    ttl: 64,
                    data: vec![7; *data],
                    summed: true,
                };
                let place = if is_pod(dst.ip()) {
                    Place::FromPod
                } else if self.model.node().has(dst.ip()) {
                    if is_pod(src.ip()) { Place::ToPod } else { Place::ToNetwork }
                } else if *early {
                    Place::Early
                } else {
                    Place::FromNetwork
                };
                self.walk(place, segment.frame()).map(drop)
            }
        }
    }

    /// Takes a frame from hook to hook as a node would. Its headers where it arrived, if it did.
    fn walk(&mut self, mut place: Place, mut frame: Vec<u8>) -> Result<Option<Headers>, String> {
        for _ in 0..LONGEST_WALK {
            let (verdict, out) = self.compare(place, &frame)?;
            let headers = wire::parse(&out);
            match verdict {
                Verdict::Drop => return Ok(None),
                // Past the stack: an answer, or translated and on its way.
                Verdict::Redirect | Verdict::Tx => return Ok(headers.filter(|h| h.proto != wire::ICMP)),
                Verdict::Pass => {}
            }
            frame = out;
            let Some(headers) = headers else { return Ok(None) };
            let node = self.model.node();
            place = match place {
                Place::Early => Place::FromNetwork,
                Place::ToNetwork | Place::ToPod => return Ok(Some(headers)),
                Place::FromNetwork | Place::FromPod => match node.way(headers.dst.ip()) {
                    Way::Here | Way::None => return Ok(Some(headers)),
                    Way::Out { .. } if is_pod(headers.dst.ip()) => Place::ToPod,
                    Way::Out { .. } => Place::ToNetwork,
                },
            };
        }
        Ok(None)
    }

    /// One packet at one hook, by the programs and by the oracle.
    fn compare(&mut self, place: Place, frame: &[u8]) -> Result<(Verdict, Vec<u8>), String> {
        self.bench.packets += 1;
        let world = &self.bench.world;
        let before = reasons(world)?;
        let (verdict, out) =
            world.send_uncounted(hook(place), frame).map_err(|error| format!("{error:#}"))?;
        let after = reasons(world)?;
        let moved = after.iter().filter_map(|(reason, count)| {
            let more = count - before.get(reason).copied().unwrap_or(0);
            (more != 0).then_some((*reason, more))
        });
        let seen = Seen { place, frame, verdict, out: &out, moved: moved.collect() };
        let headers = wire::parse(frame);
        let alternatives = self.model.expect(place, frame);
        let mut complaints = Vec::new();
        for alternative in &alternatives {
            match fits(&self.model, alternative, headers.as_ref(), &seen) {
                Ok(source) => {
                    self.count(alternative, headers.as_ref());
                    self.model.accept(headers.as_ref(), alternative, source);
                    return Ok((verdict, out));
                }
                Err(complaint) => complaints.push(format!("{:?}: {complaint}", alternative.outcome)),
            }
        }
        let allowed = complaints.iter().map(|complaint| format!("\n  {complaint}")).collect::<String>();
        Err(format!("at {place:?} {seen}\nallowed was:{allowed}"))
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
