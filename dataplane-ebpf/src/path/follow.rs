//! Packets that are found by what another packet said: ICMP errors by the packet they quote (P19), fragments by the first of
//! their datagram (P20). They follow a flow, never begin one, and are never answered by an ICMP error.

use super::{Exit, Hook, Walk, not_ours};
use crate::count::{self, Direction};
use crate::frame::Frame;
use crate::parse::{self, Obstacle};
use crate::verdict::{Code, Verdict};
use crate::{flow, fragment, icmp, interest, nat, select, service};
use dataplane_common::drop::Reason;
use dataplane_common::flow::{Flow, FlowKey};

impl<F: Frame> Walk<'_, F> {
    /// A packet with an obstacle; [`Verdict::Begin`] if it goes the common way nevertheless.
    #[inline(always)]
    pub(super) fn with_obstacle(&mut self) -> Code {
        match self.s.packet.obstacle {
            Obstacle::FirstFragment => self.first_fragment(),
            Obstacle::LaterFragment => self.later_fragment(),
            Obstacle::IcmpError => self.icmp_error(),
            Obstacle::None | Obstacle::Extensions | Obstacle::Malformed | Obstacle::Protocol => Code::BEGIN,
        }
    }

    /// The first fragment of a datagram has the ports and the checksum, and goes the common way. If it may be ours, the
    /// others will ask for its ports, whatever becomes of it.
    #[inline(never)]
    fn first_fragment(&mut self) -> Code {
        let packet = &mut self.s.packet;
        packet.obstacle = Obstacle::None;
        if !interest::of(packet, self.hook).none() {
            fragment::note(packet);
        }
        Code::BEGIN
    }

    #[inline(never)]
    fn later_fragment(&mut self) -> Code {
        let packet = &mut self.s.packet;
        let Some(ports) = fragment::lookup(packet) else { return self.early_fragment().into() };
        (packet.src_port, packet.dst_port, packet.proto) = (ports.src_port, ports.dst_port, ports.proto());
        self.s.key = FlowKey::new(packet.src, packet.src_port, packet.dst, packet.dst_port, packet.proto);
        let followed = self.follow();
        if followed != Code::BEGIN {
            return followed;
        }
        self.orphan_fragment().into()
    }

    /// A fragment whose datagram is not known. What only Services have as their address is ours and cannot be translated;
    /// what may be anybody's passes (Z4): a fragment to the node itself goes up to its stack, never on.
    #[inline(always)]
    fn early_fragment(&self) -> Verdict {
        let packet = &self.s.packet;
        if self.is_from_client()
            && (interest::only_of_service(&packet.dst) || service::is_closed(&packet.dst))
        {
            return Verdict::Drop(Reason::EarlyFragment);
        }
        not_ours(packet, self.hook)
    }

    /// A fragment of a datagram that has no flow: it was refused or dropped, or is not ours.
    #[inline(always)]
    fn orphan_fragment(&self) -> Verdict {
        let packet = &self.s.packet;
        let serves = |packet: &parse::Packet| {
            !matches!(service::lookup(&packet.dst, packet.dst_port, packet.proto), Ok(None))
        };
        if self.is_from_client() && (serves(packet) || service::is_closed(&packet.dst)) {
            return Verdict::Drop(Reason::OrphanFragment);
        }
        not_ours(packet, self.hook)
    }

    /// Whether clients' packets are met at this hook for the first time.
    #[inline(always)]
    fn is_from_client(&self) -> bool {
        match self.hook {
            Hook::UplinkIngress | Hook::PodIngress => true,
            Hook::UplinkEgress => service::node_address(&self.s.packet.src).is_some(),
            Hook::PodEgress => false,
        }
    }

    /// An error is found by the opposite direction of what it quotes, and is addressed to the sender of that.
    #[inline(never)]
    fn icmp_error(&mut self) -> Code {
        let quoted = &mut self.s.quoted;
        if !parse::quoted(self.frame, &self.s.packet, quoted) || quoted.src != self.s.packet.dst {
            return Code::BEGIN;
        }
        self.s.key = FlowKey::new(quoted.dst, quoted.dst_port, quoted.src, quoted.src_port, quoted.proto);
        self.follow()
    }

    /// Sends the packet the way of the flow that is found by the walk's key; [`Verdict::Begin`] if there is none.
    #[inline(never)]
    fn follow(&mut self) -> Code {
        let Some(found) = flow::lookup(&self.s.key, &mut self.s.flow) else { return Code::BEGIN };
        if !self.applies() {
            return Verdict::Pass.into();
        }
        let exit = match self.exit() {
            Ok(exit) => exit,
            Err(Verdict::Refuse(_)) => return Verdict::Drop(Reason::Unanswerable).into(),
            Err(verdict) => return verdict.into(),
        };
        let flow = &self.s.flow;
        if select::status(flow.backend).generation() == flow.generation {
            let direction = if flow.has(Flow::REPLY) { Direction::Out } else { Direction::In };
            count::packet(flow.service, flow.backend, direction, self.s.packet.length);
        }
        if self.s.packet.obstacle == Obstacle::IcmpError {
            return self.translate_error(exit);
        }
        found.touch(flow);
        self.translate_fragment(exit)
    }

    #[inline(never)]
    fn translate_error(&mut self, exit: Exit) -> Code {
        let (packet, flow) = (&self.s.packet, &self.s.flow);
        let routed = self.is_routed(exit);
        // The far end speaks by the address under which it is known here. So does a router in between where the error is
        // sent on by this node itself: nobody believes it that router's address.
        let known_as = packet.src == self.s.key.src || exit == Exit::Forward;
        let src = if known_as { flow.src } else { packet.src };
        let written = icmp::apply(self.frame, self.s, src, routed);
        written.map_or(Verdict::Drop(Reason::WriteFailed), |()| exit.verdict()).into()
    }

    #[inline(never)]
    fn translate_fragment(&mut self, exit: Exit) -> Code {
        let (packet, flow) = (&self.s.packet, &self.s.flow);
        let rewrite = nat::plan(packet, flow, self.is_routed(exit));
        let written = nat::apply_to_network(self.frame, packet, &rewrite);
        written.map_or(Verdict::Drop(Reason::WriteFailed), |_| exit.verdict()).into()
    }
}
