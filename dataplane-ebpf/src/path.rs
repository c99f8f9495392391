//! The walk of a packet, the same at every hook: parse, filter, flow, service, select, route, claim, translate.

mod follow;
mod life;
mod port;
mod retry;

use crate::affinity;
use crate::count;
use crate::event;
use crate::flow::{self, Claim, Ending};
use crate::forward::{self, Origin, Route};
use crate::frame::Frame;
use crate::global::global;
use crate::parse::{ICMP, ICMPV6, Obstacle, Packet, parse};
use crate::reject::{self, IcmpError, Refusal};
use crate::ring::{self, HalfOpenRing};
use crate::scratch::{Opening, Scratch};
use crate::select::{self, Chosen, Number};
use crate::service::{self, Destination, Endpoints, Source};
use crate::verdict::{Code, Exit, Verdict, Way};
use crate::{interest, kept, limit, nat, outgoing, uplink};
use dataplane_common::affinity::AffinityKey;
use dataplane_common::backend::BackendStatus;
use dataplane_common::drop::Reason;
use dataplane_common::event::{EventKind, Place, What};
use dataplane_common::flow::{Attempt, Counted, Flow, FlowKey, Stage};
use dataplane_common::frontend::FrontendKind;
use dataplane_common::node::{Node, SourceCase, SourceRule};
use dataplane_common::service::{Algorithm, Policy};
use dataplane_common::{Addr, Protocol, read_word};
pub use life::End;
pub use retry::{Summed, Tried};

/// Where the packet is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// From the network.
    UplinkIngress,
    /// To the network.
    UplinkEgress,
    /// From a pod.
    PodIngress,
    /// To a pod.
    PodEgress,
}

impl Hook {
    /// Whether packets come in here.
    #[inline(always)]
    pub const fn is_ingress(self) -> bool {
        matches!(self, Self::UplinkIngress | Self::PodIngress)
    }
}

/// A walk under way.
struct Walk<'a, F> {
    frame: &'a mut F,
    hook: Hook,
    s: &'a mut Scratch,
}

/// Takes a packet through the dataplane. [`Verdict::Forward`] and [`Verdict::HandUp`] go by `scratch.way`. `log` is told
/// why a packet was dropped or refused.
#[inline(always)]
pub fn walk<F: Frame>(frame: &mut F, hook: Hook, scratch: &mut Scratch, log: impl Fn(Reason)) -> Verdict {
    let verdict = decide(frame, hook, scratch);
    match verdict {
        Verdict::Drop(reason) => {
            log(reason);
            count::reason(reason);
            let place = event::place(hook, F::LEAVES_TO_TC);
            event::tell(scratch, What::because(EventKind::Dropped, reason).at(place), frame.ifindex());
            verdict
        }
        Verdict::Refuse(_) | Verdict::LeaveToTc if F::LEAVES_TO_TC => {
            count::reason(Reason::XdpLeftToTc);
            Verdict::Pass
        }
        Verdict::Refuse(reason) => {
            log(reason);
            let answered = answer(frame, scratch, reason);
            let place = event::place(hook, F::LEAVES_TO_TC);
            event::tell(scratch, refused(answered, reason).at(place), frame.ifindex());
            if hook != Hook::UplinkIngress || answered != Code::ANSWER {
                return answered.verdict();
            }
            way_back(frame, scratch).verdict()
        }
        Verdict::Pass | Verdict::Forward | Verdict::HandUp | Verdict::SendOut | Verdict::Answer => verdict,
        Verdict::Begin | Verdict::Turn | Verdict::LeaveToTc => Verdict::Pass,
    }
}

/// What is told of a packet that was to be refused.
#[inline(always)]
fn refused(answered: Code, reason: Reason) -> What {
    match answered.verdict() {
        Verdict::Drop(silent) => What::because(EventKind::Dropped, silent),
        Verdict::Pass | Verdict::Forward | Verdict::HandUp | Verdict::SendOut | Verdict::Answer => {
            What::because(EventKind::Refused, reason)
        }
        Verdict::Refuse(_) | Verdict::LeaveToTc | Verdict::Turn | Verdict::Begin => {
            What::because(EventKind::Refused, reason)
        }
    }
}

#[inline(always)]
fn decide<F: Frame>(frame: &mut F, hook: Hook, scratch: &mut Scratch) -> Verdict {
    if !parse(frame, &mut scratch.packet) {
        return Verdict::Pass;
    }
    // From here on all families and lengths of headers look the same to the verifier: what was read is in memory, and in
    // no register.
    let scratch = core::hint::black_box(scratch);
    let packet = &scratch.packet;
    // Z3, first half: before anything else, whatever the destination.
    if hook == Hook::UplinkIngress && (packet.src.is_loopback() || packet.dst.is_loopback()) {
        return Verdict::Drop(Reason::Loopback);
    }
    // Z4: an interface that listens to all takes in what is for other hosts as well.
    if hook == Hook::UplinkIngress && frame.is_for_another_host() {
        return Verdict::Pass;
    }
    let mut walk = Walk { frame, hook, s: scratch };
    if walk.s.packet.obstacle != Obstacle::None {
        let followed = walk.with_obstacle();
        if followed != Code::BEGIN {
            return walk.turned(followed);
        }
    }
    let packet = &walk.s.packet;
    let interest = interest::of(packet, hook);
    if interest.none() {
        return not_ours(packet, hook);
    }
    let interest = walk.s.interest_through_memory(interest);
    let packet = &walk.s.packet;
    walk.s.key = FlowKey::new(packet.src, packet.src_port, packet.dst, packet.dst_port, packet.proto);
    // Functions of their own, one after the other, so that no one's stack adds to another's: 512 bytes are for a whole
    // chain of calls, and kernels before 6.8 round each function's share up to 32.
    let known = walk.known();
    if known != Code::BEGIN {
        let known = walk.end(known);
        return walk.turned(known);
    }
    if interest.reply && walk.may_be_of_others() {
        return Verdict::Drop(Reason::Undecided);
    }
    if interest.outgoing {
        outgoing::note(&walk.s.packet, &walk.s.key);
    }
    if interest.frontend {
        let admitted = walk.admit();
        if admitted != Code::BEGIN {
            return admitted.verdict();
        }
        let begun = walk.begin();
        return walk.settle(begun).verdict();
    }
    not_ours(&walk.s.packet, hook)
}

/// A packet to no Service's address. What must not leave the node is dropped here (P13), all else passes (Z4).
#[inline(always)]
fn not_ours(packet: &Packet, hook: Hook) -> Verdict {
    if hook == Hook::UplinkEgress && service::in_service_range(&packet.dst) {
        return Verdict::Drop(Reason::UnknownService);
    }
    Verdict::Pass
}

/// Turns the frame into what tells its sender no.
#[inline(never)]
fn answer<F: Frame>(frame: &mut F, scratch: &mut Scratch, reason: Reason) -> Code {
    let packet = &scratch.packet;
    let (error, refuses) = if reason == Reason::TtlExceeded {
        (IcmpError::TIME_EXCEEDED, false)
    } else if reason == Reason::TooBig {
        (IcmpError::too_big(scratch.way.mtu), false)
    } else if reason == Reason::Unreachable {
        (IcmpError::NO_ROUTE, false)
    } else {
        (IcmpError::PORT_UNREACHABLE, true)
    };
    let is_reset = refuses && packet.proto == Protocol::Tcp as u8;
    if !(if is_reset { limit::allows_reset() } else { limit::allows_icmp(&packet.src) }) {
        count::reason(Reason::AnswerLimited);
        return Verdict::Drop(Reason::AnswerLimited).into();
    }
    let written = if is_reset {
        reject::reset(frame, packet)
    } else {
        // A router's errors are in the node's own name; but to the node itself that would be a martian.
        let source = match service::node() {
            Some(node) if !refuses && service::node_address(&packet.src).is_none() => {
                forward::primary(node, &packet.dst)
            }
            Some(_) | None => &packet.dst,
        };
        // In memory, so that the verifier walks what follows once.
        scratch.refusal = Refusal { error, source: *source };
        reject::icmp(frame, packet, &scratch.refusal.source, scratch.refusal.error)
    };
    let (reason, verdict) = match written {
        Ok(()) => (reason, Verdict::Answer),
        Err(_) => (Reason::WriteFailed, Verdict::Drop(Reason::WriteFailed)),
    };
    count::reason(reason);
    verdict.into()
}

/// An answer goes the kernel's way to whoever is answered, which need not be the one that the question came.
#[inline(never)]
fn way_back<F: Frame>(frame: &F, scratch: &mut Scratch) -> Code {
    let Scratch { packet, fib, way, .. } = scratch;
    // The answer's own ends and length: rules of routing may ask for both.
    (packet.src, packet.dst) = (packet.dst, packet.src);
    (packet.src_port, packet.dst_port) = (packet.dst_port, packet.src_port);
    packet.length = frame.length() - packet.l3();
    let elsewhere = forward::route(frame, packet, &packet.dst, Origin::Sent, fib, way) == Route::Via
        && way.ifindex != frame.ifindex();
    if elsewhere { Verdict::Forward } else { Verdict::Answer }.into()
}

impl<F: Frame> Walk<'_, F> {
    /// A packet of a known flow; [`Verdict::Begin`] if there is none, or if it ended with this packet's arrival.
    #[inline(never)]
    fn known(&mut self) -> Code {
        self.continue_flow().into()
    }

    #[inline(always)]
    fn continue_flow(&mut self) -> Verdict {
        self.s.end = End::NONE;
        self.s.attempt = Attempt::default();
        self.s.told = What::of(EventKind::Begun);
        let Some(found) = flow::lookup(&self.s.key, &mut self.s.flow) else { return Verdict::Begin };
        if !self.applies() {
            return Verdict::Pass;
        }
        if let Some(reason) = self.obstacle() {
            return Verdict::Drop(reason);
        }
        let reply = self.s.flow.has(Flow::REPLY);
        let status = select::status(self.s.flow.backend);
        let stage = self.s.flow.stage();
        let known = status.generation() == self.s.flow.generation;
        let serving = known && status.has(BackendStatus::SERVING);
        let again = self.moves(if reply || !known { 0 } else { self.tries_again(stage) });
        if again {
            if F::LEAVES_TO_TC {
                // One of both decides it, and the other would begin the flow as if it were new.
                return Verdict::LeaveToTc;
            }
            self.s.attempt = self.s.flow.attempt().next();
            self.s.told = What::moved(self.s.moved);
            self.note_moved();
        }
        if again || self.answers_another(stage) || !reply && self.begins_anew(stage, serving) {
            if !again && self.s.packet.proto == Protocol::Udp as u8 {
                self.s.told = What::because(EventKind::Moved, Reason::Rebalanced);
            }
            flow::remove(&self.s.key, &self.s.flow);
            return Verdict::Begin;
        }
        if reply && stage == Stage::HalfOpen && self.is_refused_by_reset() {
            return if F::LEAVES_TO_TC { Verdict::LeaveToTc } else { Verdict::Turn };
        }
        let exit = match self.exit() {
            Ok(exit) => exit,
            Err(verdict) => return verdict,
        };
        found.touch(&self.s.flow);
        found.count(self.s.packet.length);
        let Scratch { key, packet, flow, keys: [peer, _], .. } = &mut *self.s;
        self.s.end = life::progress(key, found, packet, flow, peer);
        let exit = self.s.exit_through_memory(exit);
        self.send(exit)
    }

    /// Tells of a flow that is established or ends by a packet, and of the packets of one that is marked, and closes or removes what has
    /// ended. Gives the verdict on the packet back.
    #[inline(always)]
    fn end(&mut self, known: Code) -> Code {
        let known = self.s.through_memory(known);
        let watched = self.s.flow.has(Flow::WATCHED);
        if watched && self.s.end.what.is_nothing() {
            self.s.end.what = What::of(EventKind::Packet);
        }
        if !self.s.end.what.is_nothing() {
            event::tell(self.s, self.s.end.what.at(self.met_at()), self.frame.ifindex());
        }
        let Scratch { key, flow, keys: [partner, _], end: End { own, others, what }, .. } = &mut *self.s;
        if *own != 0 {
            flow::close(key, flow, partner, *own, *others);
        } else if *what == End::REFUSED.what {
            flow::remove(key, flow);
        }
        known
    }

    /// Where this walk is, as it is told.
    #[inline(always)]
    const fn met_at(&self) -> Place {
        event::place(self.hook, F::LEAVES_TO_TC)
    }

    /// Whether this hook is the one that translates this direction of the flow.
    #[inline(always)]
    fn applies(&self) -> bool {
        let flow = &self.s.flow;
        let ingress = self.hook.is_ingress();
        let from_node = self.hook == Hook::UplinkEgress;
        match (flow.has(Flow::REPLY), flow.has(Flow::NODE_CLIENT), flow.has(Flow::SOURCE_TRANSLATED)) {
            // The node as a client is translated where its packets leave.
            (false, true, _) => from_node,
            (false, false, _) => ingress,
            // The reply is addressed to the node and must not be delivered as it is.
            (true, true, false) => ingress,
            // The same; but an endpoint in the node's own network answers the frontend's address, and leaves.
            (true, _, true) => ingress || from_node,
            // The reply passes the stack with the endpoint's address and is restored where it leaves.
            (true, false, false) => !ingress,
        }
    }

    /// Whether a client's packet must choose an endpoint again although its flow is known.
    #[inline(always)]
    fn begins_anew(&self, stage: Stage, serving: bool) -> bool {
        let packet = &self.s.packet;
        if packet.proto != Protocol::Udp as u8 {
            // C2: an established connection is left alone; a new one on the same ports is not bound by the old.
            return packet.opens() && (!serving || stage == Stage::Closing);
        }
        // C1.
        if !serving {
            count::reason(Reason::Rebalanced);
        }
        !serving
    }

    /// Whether a packet accepts a connection that is not the flow's. One to the Service would have ended the flow as it began: the
    /// client has called the endpoint itself, from the port that it had for the flow, or somebody masquerades a connection by that
    /// port.
    #[inline(always)]
    fn answers_another(&self, stage: Stage) -> bool {
        stage == Stage::Closing && self.s.packet.accepts()
    }

    /// How a packet of the flow leaves this hook.
    ///
    /// # Errors
    /// The verdict that ends the walk: there is no way, or the sender must be told so.
    #[inline(always)]
    fn exit(&mut self) -> Result<Exit, Verdict> {
        let flow = &self.s.flow;
        let node_client = flow.has(Flow::NODE_CLIENT);
        if flow.has(Flow::REPLY) && node_client {
            if self.hook == Hook::UplinkIngress && self.frame.ifindex() == flow.uplink() {
                return Ok(Exit::Stack);
            }
            if F::LEAVES_TO_TC {
                return Err(Verdict::LeaveToTc);
            }
            (self.s.way.ifindex, self.s.way.destination_mac) = (flow.uplink(), uplink::mac(flow.uplink()));
            return Ok(Exit::HandUp);
        }
        if node_client || flow.has(Flow::SOURCE_TRANSLATED) {
            return self.routed_exit();
        }
        if F::LEAVES_TO_TC && flow.has_any(MARKED) {
            return Err(Verdict::LeaveToTc);
        }
        Ok(Exit::Stack)
    }

    /// How a packet leaves that does not go through the stack.
    ///
    /// # Errors
    /// As [`Walk::exit`].
    #[inline(always)]
    fn routed_exit(&mut self) -> Result<Exit, Verdict> {
        Exit::of(self.find_way().verdict())
    }

    /// Finds the way to the flow's destination past the stack, and the source address the kernel would use; gives the verdict that
    /// the way leads to.
    #[inline(never)]
    fn find_way(&mut self) -> Code {
        let Scratch { packet, flow, way, fib, .. } = &mut *self.s;
        let sent = self.hook == Hook::UplinkEgress;
        if !sent && packet.ttl <= 1 {
            return Verdict::Refuse(Reason::TtlExceeded).into();
        }
        // Nothing is forwarded from an address that means nothing beyond its link (RFC 4291, 2.5.6), and no route leads back to it.
        if packet.src.is_link_local_v6() && !(sent && service::node_address(&flow.dst).is_some()) {
            return Verdict::Drop(Reason::NoRoute).into();
        }
        let origin = if sent { Origin::Sent } else { Origin::Received };
        let verdict = match forward::route(self.frame, packet, &flow.dst, origin, fib, way) {
            Route::Via if F::LEAVES_TO_TC && !back_out(self.frame, packet, way) => Verdict::LeaveToTc,
            Route::Via => Verdict::Forward,
            Route::Local => {
                // The endpoint is in the node's own network. The node as its own client would meet a martian: its
                // packet must come from the frontend's address.
                way.source = packet.dst;
                // As if it had come in where it is about to leave.
                (way.ifindex, way.destination_mac) = (self.frame.ifindex(), self.frame.link_source());
                if sent { Verdict::HandUp } else { Verdict::Pass }
            }
            Route::TooBig => Verdict::Refuse(Reason::TooBig),
            Route::Unreachable => Verdict::Refuse(Reason::Unreachable),
            Route::None(reason) => Verdict::Drop(reason),
        };
        verdict.into()
    }

    /// Writes the translation and sends the packet on its way.
    #[inline(always)]
    fn send(&mut self, exit: Exit) -> Verdict {
        let is_routed = self.is_routed(exit);
        let Scratch { packet, flow, product, .. } = &mut *self.s;
        if nat::apply(self.frame, packet, &nat::plan(packet, flow, is_routed), product).is_err() {
            return Verdict::Drop(Reason::WriteFailed);
        }
        if F::LEAVES_TO_TC || !self.hook.is_ingress() {
            return exit.verdict();
        }
        self.leave(exit).verdict()
    }

    /// The verdict on a packet that was written; tells netfilter what the flow wants of it. Where bridges hand theirs to netfilter
    /// before tc, that knows it by its old addresses: what goes on to the stack enters anew, and meets the program once more, as
    /// somebody else's.
    #[inline(always)]
    fn leave(&mut self, exit: Exit) -> Code {
        let Some(node) = service::node() else { return exit.verdict().into() };
        // Without a branch: the verifier walks all that follows for each way there is.
        let flags = self.s.flow.flags();
        let bits = |flag: u16, mark: u32| mark & u32::from(flags & flag != 0).wrapping_neg();
        self.frame
            .mark(bits(Flow::MASQUERADED, node.masquerade_mark) | bits(Flow::NOTED, node.connection_mark));
        if self.hook == Hook::UplinkIngress && exit == Exit::Stack && node.has(Node::BRIDGE_NETFILTER) {
            self.s.way.ifindex = self.frame.ifindex();
            self.s.way.destination_mac = self.frame.link_destination();
            return Verdict::HandUp.into();
        }
        exit.verdict().into()
    }

    /// Whether the time to live falls: a router lowers it, not the sender itself.
    #[inline(always)]
    fn is_routed(&self, exit: Exit) -> bool {
        exit == Exit::Forward && self.hook.is_ingress()
    }

    /// Why a packet that is ours cannot be translated.
    #[inline(always)]
    fn obstacle(&self) -> Option<Reason> {
        match self.s.packet.obstacle {
            Obstacle::None => None,
            // Whoever comes here with one has met it before: it is not of TCP or UDP, or quotes nothing of ours.
            Obstacle::FirstFragment | Obstacle::LaterFragment | Obstacle::IcmpError => {
                Some(Reason::UnsupportedProtocol)
            }
            Obstacle::Extensions => Some(Reason::Extensions),
            Obstacle::Malformed => Some(Reason::Malformed),
            Obstacle::Protocol => Some(Reason::UnsupportedProtocol),
        }
    }

    /// A client's packet that belongs to no flow yet; [`Verdict::Begin`] if it may begin one, from the endpoints that are
    /// in the walk's working memory then.
    #[inline(never)]
    fn admit(&mut self) -> Code {
        self.find_endpoints().into()
    }

    #[inline(always)]
    fn find_endpoints(&mut self) -> Verdict {
        let packet = &self.s.packet;
        let source = match self.hook {
            // P18: loopback is the node's own processes' only.
            Hook::PodIngress if packet.dst.is_loopback() => return Verdict::Pass,
            Hook::PodIngress => Source::Pod,
            Hook::UplinkIngress => Source::Outside,
            Hook::UplinkEgress if service::node_address(&packet.src).is_some() => Source::Node,
            // Forwarded for somebody else: whatever it is, it met its translation where it came in.
            Hook::UplinkEgress | Hook::PodEgress => return not_ours(packet, self.hook),
        };
        let destination = match service::lookup(&packet.dst, packet.dst_port, packet.proto) {
            Ok(Some(destination)) => destination,
            Ok(None) if service::is_closed(&packet.dst) => return self.closed_port(),
            // P21: nobody can read its port; what is a Service's alone goes nowhere untranslated.
            Ok(None) if packet.obstacle == Obstacle::Extensions && interest::only_of_service(&packet.dst) => {
                return Verdict::Drop(Reason::Extensions);
            }
            Ok(None) => return not_ours(packet, self.hook),
            Err(reason) => return Verdict::Drop(reason),
        };
        if let Some(reason) = self.obstacle() {
            return Verdict::Drop(reason);
        }
        // Z3, second half.
        let src = &packet.src;
        let nobodys = src.is_multicast_or_broadcast() || src.is_unspecified() || src.is_loopback();
        if nobodys || *src == packet.dst {
            return Verdict::Drop(Reason::BadSource);
        }
        let set = |flag| service::node().is_some_and(|node| node.has(flag));
        if self.may_be_of_others() {
            return Verdict::Drop(Reason::Undecided);
        }
        // C5. What the node itself sends was translated before it came here.
        if source != Source::Node && packet.continues() && set(Node::TAKES_OVER) {
            return Verdict::Pass;
        }
        if let Some(verdict) = self.opens_nothing() {
            return verdict;
        }
        if source == Source::Outside && set(Node::DENIED_SOURCES) && service::denies(&packet.src) {
            return Verdict::Drop(Reason::SourceDenied);
        }
        let of_family = if packet.is_v4() { Node::NODE_PORT_SOURCES_V4 } else { Node::NODE_PORT_SOURCES_V6 };
        let at_node_port = source == Source::Outside && destination.kind == FrontendKind::NodePort;
        if at_node_port && set(of_family) && !service::allows_node_ports(&packet.src) {
            return Verdict::Drop(Reason::NodePortSource);
        }
        let inside_only = set(Node::CLUSTER_IP_INSIDE_ONLY);
        if inside_only && source == Source::Outside && destination.kind == FrontendKind::ClusterIp {
            return Verdict::Drop(Reason::ClusterIpFromOutside);
        }
        let policy = match service::policy(destination.service) {
            Ok(policy) => policy,
            Err(reason) => return Verdict::Drop(reason),
        };
        if service::restricts(destination, policy) && !service::allows(&destination, &packet.src) {
            return Verdict::Drop(Reason::SourceNotAllowed);
        }
        match service::endpoints(destination, source, policy) {
            Ok(endpoints) => {
                let (service, rule) = (destination.service, source_rule(destination, source, policy));
                let affinity_seconds = policy.affinity_seconds();
                let retries = policy.tries() != 0 && endpoints.set.has_several() && self.can_be_moved();
                self.s.opening = Opening { endpoints, service, affinity_seconds, source, rule, retries };
                Verdict::Begin
            }
            Err(Reason::NoEndpoints) => Verdict::Refuse(Reason::NoEndpoints),
            Err(reason) => Verdict::Drop(reason),
        }
    }

    /// Whether a packet of no flow may be of one that other programs have begun, while these take their place (C3). UDP may be as well,
    /// but nobody repeats it: to hold it back would only add to what is lost.
    #[inline(always)]
    fn may_be_of_others(&self) -> bool {
        let packet = &self.s.packet;
        let is_repeated = packet.continues() || packet.proto == Protocol::Sctp as u8 && !packet.opens();
        is_repeated && service::node().is_some_and(|node| node.holds_back(flow::now()))
    }

    /// What becomes of a packet that may not begin a flow (P22); `None` if it may.
    #[inline(always)]
    fn opens_nothing(&self) -> Option<Verdict> {
        let packet = &self.s.packet;
        if packet.opens() {
            return None;
        }
        let at_node = service::node_address(&packet.dst).is_some();
        if packet.resets() || packet.accepts() || packet.proto == Protocol::Sctp as u8 {
            // It is of a connection of somebody else, whom the node's stack knows.
            return Some(match packet.resets() {
                _ if at_node => Verdict::Pass,
                true => Verdict::Drop(Reason::StrayReset),
                false => Verdict::Drop(Reason::StrayAnswer),
            });
        }
        // What else is of a connection was picked up in its middle, if nobody here has it.
        let of_others = || {
            outgoing::is_answered_by(&self.s.key)
                || packet.proto == Protocol::Tcp as u8 && outgoing::has_socket(self.frame, packet)
        };
        (at_node && of_others()).then_some(Verdict::Pass)
    }

    /// A ClusterIP on a port that no Service has (P13).
    #[inline(always)]
    fn closed_port(&self) -> Verdict {
        let packet = &self.s.packet;
        let refusable = match packet.obstacle {
            Obstacle::None => !packet.resets(),
            // Another protocol gets the same answer, but never an error for what may be an error (RFC 1122, 3.2.2).
            Obstacle::Protocol => packet.proto != ICMP && packet.proto != ICMPV6,
            Obstacle::FirstFragment | Obstacle::LaterFragment | Obstacle::IcmpError => false,
            Obstacle::Extensions | Obstacle::Malformed => false,
        };
        if refusable {
            Verdict::Refuse(Reason::ClosedPort)
        } else {
            Verdict::Drop(self.obstacle().unwrap_or(Reason::StrayReset))
        }
    }

    /// Chooses an endpoint, enters the flow and sends its first packet. A flow whose packet could not be written has no name: it goes
    /// when it is idle.
    #[inline(never)]
    fn begin(&mut self) -> Code {
        self.s.turn = ring::next::<HalfOpenRing>();
        self.s.now = flow::now();
        if self.s.attempt.tries() != 0 {
            self.look_for_another();
        }
        if self.s.opening.retries {
            kept::keep(self.frame, &self.s.packet, self.s.turn as u32, self.hook == Hook::UplinkEgress);
        }
        let begun = self.new_flow();
        if F::LEAVES_TO_TC && matches!(begun, Verdict::LeaveToTc | Verdict::Refuse(_)) {
            // tc chooses for this packet, and the same: L2.
            let Opening { endpoints, service, .. } = &self.s.opening;
            if endpoints.set.algorithm() == Ok(Algorithm::RoundRobin) {
                select::give_back(*service);
            }
        }
        begun.into()
    }

    /// Names the flow that began, or makes room for the next where there was none. Not further down the chain of calls, where the
    /// stack has no room for it. Gives the verdict on the packet.
    #[inline(always)]
    fn settle(&mut self, begun: Code) -> Code {
        let begun = self.s.through_memory(begun);
        match begun.verdict() {
            Verdict::Pass | Verdict::Forward | Verdict::HandUp if !flow::wait(&self.s.key, self.s.turn) => {
                Verdict::Drop(Reason::FlowsFull).into()
            }
            Verdict::Drop(Reason::FlowsFull) => {
                flow::make_room();
                begun
            }
            Verdict::Pass | Verdict::Forward | Verdict::HandUp => {
                event::tell(self.s, self.s.told.at(self.met_at()), self.frame.ifindex());
                begun
            }
            Verdict::Drop(_) | Verdict::Refuse(_) | Verdict::Answer | Verdict::SendOut => begun,
            Verdict::Begin | Verdict::Turn | Verdict::LeaveToTc => begun,
        }
    }

    #[inline(always)]
    fn new_flow(&mut self) -> Verdict {
        let sent = self.hook == Hook::UplinkEgress;
        // In memory, so that the verifier walks the search for a port once, whatever exit was found.
        self.s.exit = Exit::Stack;
        let mut claimed = false;
        for attempt in 0..ENDPOINT_TRIES {
            let proposed = self.propose(attempt);
            if proposed != Code::BEGIN {
                return proposed.verdict();
            }
            if F::LEAVES_TO_TC && self.s.flow.has_any(MARKED) {
                return Verdict::LeaveToTc;
            }
            if sent || self.s.flow.has(Flow::SOURCE_TRANSLATED) {
                let way = self.find_way();
                self.s.exit = match Exit::of(self.by_stack_if_narrow(way).verdict()) {
                    Ok(exit) => exit,
                    Err(verdict) => return verdict,
                };
                if self.leaves_elsewhere() {
                    self.translate_source();
                }
            }
            if self.s.flow.has(Flow::SOURCE_TRANSLATED) {
                break;
            }
            interest::note_caller(&self.s.flow.src, self.s.packet.proto);
            // A client's own port that serves it again ends the flow that is closing.
            self.s.ending = Ending::CLOSING;
            flow::claim(self.s);
            claimed = self.s.claim != Claim::TAKEN;
            // Another endpoint may do. The node's own address and port may change, so it needs no other endpoint.
            if claimed || sent {
                break;
            }
        }
        if !claimed {
            if !self.s.flow.has(Flow::SOURCE_TRANSLATED) {
                // Another flow has the same reply. The client gets another port and keeps its address: policies are about addresses (P12).
                count::reason(Reason::ReplyCollision);
                if sent {
                    self.translate_source();
                }
            }
            self.claim_translated();
        }
        self.entered(self.s.claim)
    }

    /// Whether what the node itself sends leaves by another interface than the one that the kernel chose for the Service's
    /// address, and from another address than it has. With its own the answer would come another way, if at all (P9).
    #[inline(always)]
    fn leaves_elsewhere(&self) -> bool {
        self.hook == Hook::UplinkEgress
            && self.s.way.ifindex != self.frame.ifindex()
            && self.s.way.source != self.s.packet.src
    }

    /// Leaves the proposed flow to the stack, and its source to netfilter, if a router might have to cut up what its client sends: UDP
    /// of IPv4 that allows it, by a way that is narrower than the one it came (P4). What goes past the stack is never cut up.
    /// Gives the verdict that the flow's way leads to.
    #[inline(never)]
    fn by_stack_if_narrow(&mut self, way: Code) -> Code {
        let Scratch { packet, flow, reply, fib, way: Way { mtu, .. }, .. } = &mut *self.s;
        let found = matches!(way.verdict(), Verdict::Forward | Verdict::Refuse(Reason::TooBig));
        if !found || packet.proto != Protocol::Udp as u8 || !packet.is_v4() || !self.hook.is_ingress() {
            return way;
        }
        let masquerades = service::node().is_some_and(|node| node.masquerade_mark != 0);
        if !masquerades || !packet.may_be_cut(self.frame) {
            return way;
        }
        if u32::from(*mtu) >= forward::mtu_of_arrival(self.frame, fib) {
            return way;
        }
        if F::LEAVES_TO_TC {
            return Verdict::LeaveToTc.into();
        }
        flow.clear(Flow::SOURCE_TRANSLATED);
        reply.clear(Flow::SOURCE_TRANSLATED);
        flow.set(Flow::MASQUERADED);
        Verdict::Pass.into()
    }

    /// Has the proposed flow's source translated, whatever the policy says.
    #[inline(always)]
    fn translate_source(&mut self) {
        self.s.flow.set(Flow::SOURCE_TRANSLATED);
        self.s.reply.set(Flow::SOURCE_TRANSLATED);
    }

    /// Chooses an endpoint and proposes a flow to it; [`Verdict::Begin`] if there is one. Of one packet XDP and tc choose the
    /// same: if each drew for itself, what XDP can finish alone would have more than its share.
    #[inline(never)]
    fn propose(&mut self, attempt: u32) -> Code {
        let Opening { endpoints: Endpoints { set, member, .. }, service, affinity_seconds, source, .. } =
            self.s.opening;
        let chosen = if affinity_seconds == 0 {
            select::at(set, place(self.s, attempt))
        } else {
            let client = AffinityKey::address(*client_address(&self.s.packet.src, source), service);
            if self.s.attempt.tries() != 0 {
                affinity::another(set, self.s.tried.place(), &client)
            } else {
                affinity::select(set, member, || place(self.s, attempt), &client, affinity_seconds)
            }
        };
        match chosen {
            Ok(chosen) => {
                let change = self.source_change(&chosen);
                self.write_flow(source, &chosen, change);
                event::mark(self.s);
                Code::BEGIN
            }
            Err(reason) => Verdict::Drop(reason).into(),
        }
    }

    /// Whether the endpoint must see an address of this node instead of the client's, and who sees to that: flags of the flow
    /// (P4, P5, P9, P10, P11).
    #[inline(always)]
    fn source_change(&self, chosen: &Chosen) -> u16 {
        let rule = &self.s.opening.rule;
        if chosen.addr == self.s.packet.src {
            // P11: the endpoint is the client.
            Flow::SOURCE_TRANSLATED
        } else if service::node_address(&chosen.addr).is_some() {
            rule.at_node()
        } else {
            rule.in_pod(chosen.status.has(BackendStatus::LOCAL))
        }
    }

    /// Both halves of a new flow to the chosen endpoint, in the walk's working memory; the source is the client's still.
    #[inline(never)]
    fn write_flow(&mut self, source: Source, chosen: &Chosen, change: u16) {
        let Scratch { packet, flow, reply, opening, turn, now, attempt, .. } = &mut *self.s;
        let from_node = source == Source::Node;
        let flags = if from_node { Flow::NODE_CLIENT } else { 0 };
        flow.become_empty(flags | change & Flow::SOURCE_TRANSLATED);
        (flow.src, flow.src_port) = (packet.src, packet.src_port);
        (flow.dst, flow.dst_port) = (chosen.addr, chosen.port);
        (flow.backend, flow.generation) = (chosen.id, chosen.status.generation());
        flow.service = opening.service;
        flow.last_seen = *now;
        *reply = *flow;
        flow.set(change | Flow::COUNTED_OPEN);
        if opening.affinity_seconds != 0 {
            flow.set(Flow::AFFINE);
            reply.set(Flow::AFFINE);
        }
        flow.turn = *turn as u32;
        // Its first packet.
        flow.counted = Counted::packet(packet.length);
        if opening.retries {
            flow.kept = *turn as u32;
        }
        if packet.proto == Protocol::Tcp as u8 {
            flow.numbers = life::numbers(packet);
        }
        if packet.proto != Protocol::Sctp as u8 {
            let attempt = if attempt.tries() == 0 { Attempt::first(chosen.id) } else { *attempt };
            flow.detail = attempt.at(flow::moment());
        }
        if from_node {
            reply.detail = self.frame.ifindex();
            // The node's own packets carry the uplink's address as they leave.
            uplink::note(self.frame.ifindex(), self.frame.link_source());
        }
        reply.set(Flow::REPLY);
        (reply.src, reply.src_port) = (packet.dst, packet.dst_port);
        (reply.dst, reply.dst_port) = (packet.src, packet.src_port);
    }

    /// Enters the proposed flow with a translated source port, and with the address of its way where the source address is
    /// translated too. What came of it is in the working memory.
    #[inline(always)]
    fn claim_translated(&mut self) {
        if self.s.flow.has(Flow::SOURCE_TRANSLATED) {
            self.s.flow.src = self.s.way.source;
            interest::note_caller(&self.s.flow.src, self.s.packet.proto);
        }
        port::claim(self.s);
    }

    /// What becomes of the packet after the attempt to enter its flow.
    #[inline(always)]
    fn entered(&mut self, claim: Claim) -> Verdict {
        match claim {
            Claim::MADE => self.launch().verdict(),
            Claim::FULL => Verdict::Drop(Reason::FlowsFull),
            Claim::NO_MEMORY => Verdict::Drop(Reason::NoMemory),
            _ => Verdict::Drop(Reason::PortsExhausted),
        }
    }

    /// Sends the first packet of a flow that was entered.
    #[inline(never)]
    fn launch(&mut self) -> Code {
        count::new_flow(self.s.opening.service, self.s.flow.backend);
        count::begun(self.s.flow.backend);
        self.send(self.s.exit).into()
    }
}

global! {
    /// The slot of the set that is this flow's (L2). What is hashed is the same at each attempt: it is not sent elsewhere because a
    /// port is taken.
    fn place as path_place(scratch: const Scratch; attempt: u32) -> u32 {
        if scratch.attempt.tries() != 0 {
            return scratch.tried.place();
        }
        let Opening { endpoints: Endpoints { set, seed, .. }, service, source, .. } = &scratch.opening;
        // What an older agent or a newer one wrote and this version does not know is drawn.
        let algorithm = set.algorithm().unwrap_or_default();
        let number = match algorithm {
            Algorithm::Random => Number(draw(&scratch.key, scratch.now, attempt)),
            Algorithm::LeastConnections => {
                let first = Number(draw(&scratch.key, scratch.now, attempt));
                return select::lighter(*set, first, select::after(first));
            }
            Algorithm::RoundRobin => select::turn(*service),
            Algorithm::Maglev => Number(scratch.key.draw(*seed)),
            Algorithm::SourceHash => select::of_client(client_address(&scratch.packet.src, *source), *seed),
        };
        select::place(*set, algorithm, number)
    }
}

/// A number by which a flow with this key chooses its endpoint: whoever knows its own five-tuple must not know it.
#[inline(always)]
fn draw(key: &FlowKey, now: u32, attempt: u32) -> u32 {
    let secret = service::node().map_or(0, |node| node.secret);
    key.draw(secret ^ ((now as u64) << 32 | attempt as u64))
}

/// Whether XDP can send a packet on: by the interface it came in on, untagged, to a known neighbour. Any other may be a veth,
/// a tunnel or a VLAN, where what XDP redirects is lost or arrives as something else. And only if it was sent to that interface's
/// own address (Z4).
#[inline(always)]
fn back_out<F: Frame>(frame: &mut F, packet: &Packet, way: &Way) -> bool {
    let by_same = way.resolved && way.ifindex == frame.ifindex() && !frame.is_tagged(packet.l3());
    by_same && frame.link_destination() == way.source_mac
}

/// The rule by which a flow's source address is kept or translated (P4, P5, P7, P9, P10).
#[inline(always)]
fn source_rule(destination: Destination, source: Source, policy: Policy) -> SourceRule {
    let cluster_ip = destination.kind == FrontendKind::ClusterIp;
    let case = match source {
        Source::Pod if cluster_ip => SourceCase::PodToClusterIp,
        Source::Pod => SourceCase::Pod,
        Source::Node => SourceCase::Node,
        Source::Outside if cluster_ip => SourceCase::OutsideToClusterIp,
        Source::Outside if service::keeps_source(destination, source, policy) => SourceCase::OutsideLocal,
        Source::Outside => SourceCase::Outside,
    };
    // SAFETY: array elements stay; the rule of a case is one word.
    service::node().map_or(SourceRule::default(), |node| unsafe {
        read_word(&raw const node.source_rules[case as usize])
    })
}

/// The address by which a client is told from others (S1, L2): the node is one, whichever of its addresses it calls from.
#[inline(always)]
fn client_address(src: &Addr, source: Source) -> &Addr {
    match (source, service::node()) {
        (Source::Node, Some(node)) => forward::primary(node, src),
        (Source::Node, None) | (Source::Pod | Source::Outside, _) => src,
    }
}

/// The flags of a flow whose packets are marked.
const MARKED: u16 = Flow::MASQUERADED | Flow::NOTED;

/// How many endpoints are tried before the source port is translated to avoid a collision.
const ENDPOINT_TRIES: u32 = 3;
