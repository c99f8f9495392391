//! Packets that are found by what another packet said: ICMP errors by the packet they quote (P19), fragments by the first of
//! their datagram (P20). They follow a flow, never begin one, and are never answered by an ICMP error.

use super::{Hook, Walk, not_ours};
use crate::frame::Frame;
use crate::parse::{self, Obstacle};
use crate::verdict::{Code, Exit, Verdict};
use crate::{flow, fragment, icmp, interest, nat, outgoing, service};
use dataplane_common::drop::Reason;
use dataplane_common::flow::FlowKey;

impl<F: Frame> Walk<'_, F> {
    /// A packet with an obstacle; [`Verdict::Begin`] if it goes the common way nevertheless.
    #[inline(always)]
    pub(super) fn with_obstacle(&mut self) -> Code {
        match self.s.packet.obstacle {
            Obstacle::FirstFragment => self.first_fragment(),
            Obstacle::LaterFragment | Obstacle::IcmpError => self.by_another(),
            Obstacle::None | Obstacle::Extensions | Obstacle::Malformed | Obstacle::Protocol => Code::BEGIN,
        }
    }

    /// A packet whose flow another packet tells. One way for both kinds, so that the verifier walks it once.
    #[inline(always)]
    fn by_another(&mut self) -> Code {
        let is_error = self.s.packet.obstacle == Obstacle::IcmpError;
        let named = if is_error { self.named_by_quote() } else { self.named_by_first_fragment() };
        if named && is_error && self.is_refused_by_error() {
            return if F::LEAVES_TO_TC { Verdict::LeaveToTc.into() } else { Code::TURN };
        }
        if named {
            let followed = self.follow();
            if followed != Code::BEGIN {
                return followed;
            }
        }
        if is_error { Code::BEGIN } else { self.lost_fragment(named) }
    }

    /// The first fragment of a datagram has the ports and the checksum, and goes the common way. If it may be ours, the
    /// others will ask for its ports, whatever becomes of it.
    #[inline(never)]
    fn first_fragment(&mut self) -> Code {
        let packet = &mut self.s.packet;
        packet.obstacle = Obstacle::None;
        if interest::of(packet, self.hook).none() {
            // An earlier datagram may have had the same identification.
            fragment::forget(packet);
        } else {
            fragment::note(packet);
        }
        Code::BEGIN
    }

    /// Takes key and ports of a fragment from what the first of its datagram left; false if that was not seen.
    #[inline(never)]
    fn named_by_first_fragment(&mut self) -> bool {
        let packet = &mut self.s.packet;
        let Some(ports) = fragment::lookup(packet) else { return false };
        (packet.src_port, packet.dst_port, packet.proto) = (ports.src_port, ports.dst_port, ports.proto());
        self.s.key = FlowKey::new(packet.src, packet.src_port, packet.dst, packet.dst_port, packet.proto);
        true
    }

    /// A fragment without a flow; `named`: its first one was seen.
    #[inline(never)]
    fn lost_fragment(&self, named: bool) -> Code {
        if named { self.orphan_fragment() } else { self.early_fragment() }.into()
    }

    /// A fragment whose datagram is not known. What only Services have as their address is ours and cannot be translated, if it
    /// may be of a protocol that Services have; what may be anybody's passes (Z4): a fragment to the node itself goes up to its
    /// stack, never on.
    #[inline(always)]
    fn early_fragment(&self) -> Verdict {
        let packet = &self.s.packet;
        if self.is_from_client()
            && (packet.may_have_ports() && interest::only_of_service(&packet.dst)
                || service::is_closed(&packet.dst))
        {
            return Verdict::Drop(Reason::EarlyFragment);
        }
        not_ours(packet, self.hook)
    }

    /// A fragment of a datagram that has no flow: it was refused or dropped, or is not ours. XDP may have left the first one to
    /// tc, which is not there yet.
    #[inline(always)]
    fn orphan_fragment(&self) -> Verdict {
        let packet = &self.s.packet;
        // P22: at a node's own address it may be an answer.
        let serves = |packet: &parse::Packet| {
            let answers =
                service::node_address(&packet.dst).is_some() && outgoing::is_answered_by(&self.s.key);
            !answers && !matches!(service::lookup(&packet.dst, packet.dst_port, packet.proto), Ok(None))
        };
        if self.is_from_client() && (serves(packet) || service::is_closed(&packet.dst)) {
            return if F::LEAVES_TO_TC { Verdict::LeaveToTc } else { Verdict::Drop(Reason::OrphanFragment) };
        }
        not_ours(packet, self.hook)
    }

    /// Whether clients' packets are met at this hook for the first time.
    #[inline(always)]
    fn is_from_client(&self) -> bool {
        match self.hook {
            Hook::UplinkIngress => true,
            // P18: loopback is the node's own.
            Hook::PodIngress => !self.s.packet.dst.is_loopback(),
            Hook::UplinkEgress => service::node_address(&self.s.packet.src).is_some(),
            Hook::PodEgress => false,
        }
    }

    /// Takes the key of an error from what it quotes: it goes in the opposite direction, to the sender of that. False if it
    /// quotes nothing that could be ours.
    #[inline(never)]
    fn named_by_quote(&mut self) -> bool {
        let quoted = &mut self.s.quoted;
        if !parse::quoted(self.frame, &self.s.packet, quoted) || quoted.src != self.s.packet.dst {
            return false;
        }
        self.s.key = FlowKey::new(quoted.dst, quoted.dst_port, quoted.src, quoted.src_port, quoted.proto);
        true
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
        found.count(self.s.packet.length);
        if self.s.packet.obstacle != Obstacle::IcmpError {
            found.touch(&self.s.flow);
        }
        let exit = self.s.exit_through_memory(exit);
        self.translate(exit)
    }

    /// Writes the translation of the network header, and of what an error quotes.
    #[inline(never)]
    fn translate(&mut self, mut exit: Exit) -> Code {
        let is_error = self.s.packet.obstacle == Obstacle::IcmpError;
        // The far end speaks by the address under which it is known here. So does a router in between where the error is
        // sent on by this node itself: nobody believes it that router's address.
        let in_own_name = is_error && self.s.packet.src != self.s.key.src && exit != Exit::Forward;
        if in_own_name && self.hook.is_ingress() {
            // That address has come in where it belongs.
            exit = Exit::Stack;
        }
        let (packet, flow) = (&self.s.packet, &self.s.flow);
        let mut rewrite = nat::plan(packet, flow, self.is_routed(exit));
        if in_own_name {
            rewrite.src = packet.src;
        }
        match nat::apply_to_network(self.frame, packet, &rewrite) {
            Ok(outer) => self.s.changes.outer = outer.0,
            Err(_) => return Verdict::Drop(Reason::WriteFailed).into(),
        }
        if is_error && icmp::requote(self.frame, self.s).is_err() {
            return Verdict::Drop(Reason::WriteFailed).into();
        }
        if F::LEAVES_TO_TC || !self.hook.is_ingress() {
            return exit.verdict().into();
        }
        self.leave(exit)
    }
}
