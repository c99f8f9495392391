//! Whether what was seen is what the oracle allows: verdict, every byte, every counter.

use dataplane_common::counter::Traffic;
use dataplane_common::drop::Reason;
use dataplane_tests::oracle::outcome::{Exit, NewSource};
use dataplane_tests::oracle::wire::{self, ETHERNET, Flaw, Headers, Rewrite, flag};
use dataplane_tests::oracle::{Alternative, Answer, Model, Outcome, Place, Refusal, Sender, Then, Why};
use dataplane_tests::packet::{GATEWAY_MAC, Verdict};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

/// What the programs did with a frame.
pub(crate) struct Seen<'a> {
    pub(crate) place: Place,
    pub(crate) frame: &'a [u8],
    pub(crate) verdict: Verdict,
    pub(crate) out: &'a [u8],
    pub(crate) mark: u32,
    pub(crate) moved: BTreeMap<Reason, u64>,
}

impl fmt::Display for Seen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tuple = |frame| {
            wire::parse(frame, self.place == Place::Early)
                .map(|h| format!("{} → {} proto {}", h.src, h.dst, h.proto))
        };
        let none = || "no IP packet".to_owned();
        write!(
            f,
            "the programs made of {}: {:?}, {:?}, {}{}\n  in  {:02x?}\n  out {:02x?}",
            tuple(self.frame).unwrap_or_else(none),
            self.verdict,
            self.moved,
            tuple(self.out).unwrap_or_else(none),
            if self.out == self.frame { ", unchanged" } else { "" },
            self.frame,
            self.out,
        )
    }
}

/// The programs' name for what the contract says.
fn reason(why: Why) -> Reason {
    match why {
        Why::NoEndpoints => Reason::NoEndpoints,
        Why::NoLocalEndpoints => Reason::NoLocalEndpoints,
        Why::ClusterIpFromOutside => Reason::ClusterIpFromOutside,
        Why::ClosedPort => Reason::ClosedPort,
        Why::UnknownService => Reason::UnknownService,
        Why::Loopback => Reason::Loopback,
        Why::BadSource => Reason::BadSource,
        Why::Flawed(Flaw::Fragment) => Reason::EarlyFragment,
        Why::Flawed(Flaw::Extensions) => Reason::Extensions,
        Why::Flawed(Flaw::Lengths) => Reason::Malformed,
        Why::Flawed(Flaw::Protocol) => Reason::UnsupportedProtocol,
        Why::StrayReset => Reason::StrayReset,
        Why::SourceNotAllowed => Reason::SourceNotAllowed,
        Why::StrayAnswer => Reason::StrayAnswer,
        Why::OrphanFragment => Reason::OrphanFragment,
        Why::Unanswerable => Reason::Unanswerable,
        Why::NoRoute => Reason::NoRoute,
        Why::Unreachable => Reason::Unreachable,
        Why::TtlExceeded => Reason::TtlExceeded,
        Why::TooBig => Reason::TooBig,
        Why::PortsExhausted => Reason::PortsExhausted,
    }
}

/// Whether it is this alternative that was seen; the source of a flow that begins, or what differs.
pub(crate) fn fits(
    model: &Model,
    alternative: &Alternative,
    headers: Option<&Headers>,
    seen: &Seen<'_>,
) -> Result<Option<SocketAddr>, String> {
    let outcome = &alternative.outcome;
    let mut counters = BTreeMap::new();
    if alternative.rebalanced {
        counters.insert(Reason::Rebalanced, 1);
    }
    if let Some(why) = alternative.moved {
        let reason = match why {
            Refusal::Silence => Reason::MovedSilent,
            Refusal::Reset => Reason::MovedRefused,
            Refusal::Unreachable => Reason::MovedUnreachable,
            Refusal::Datagram => Reason::MovedUdp,
        };
        counters.insert(reason, 1);
    }
    if alternative.rescued {
        counters.insert(Reason::Rescued, 1);
    }
    if alternative.collided {
        counters.insert(Reason::ReplyCollision, 1);
    }
    let counted = match outcome {
        Outcome::Pass | Outcome::Translated(..) | Outcome::Begun { .. } | Outcome::Again(..) => None,
        Outcome::LeftToTc => Some(Reason::XdpLeftToTc),
        Outcome::Drop(why) | Outcome::Reject(why, _) => Some(reason(*why)),
    };
    counters.extend(counted.map(|reason| (reason, 1)));
    let masqueraded = matches!(
        outcome,
        Outcome::Translated(_, Exit::Masqueraded) | Outcome::Begun { exit: Exit::Masqueraded, .. }
    );
    let mark = if masqueraded { crate::universe::MARK } else { 0 };
    if seen.mark != mark {
        return Err(format!("the mark is {:#x}, and should be {mark:#x}", seen.mark));
    }
    if seen.moved != counters {
        return Err(format!("counters should be {counters:?}"));
    }
    match (outcome, headers) {
        (Outcome::Pass | Outcome::LeftToTc, _) => {
            verdict(seen, Verdict::Pass)?;
            same(seen, seen.frame, 0)
        }
        (Outcome::Again(_, wanted), _) => {
            verdict(seen, Verdict::Redirect)?;
            same(seen, wanted, 0)
        }
        (Outcome::Drop(_), _) => verdict(seen, Verdict::Drop),
        (Outcome::Reject(_, answer), Some(headers)) => {
            verdict(seen, Verdict::Redirect)?;
            check_answer(model, *answer, headers, seen)
        }
        (Outcome::Translated(rewrite, exit), Some(headers)) => translated(seen, headers, rewrite, *exit),
        (Outcome::Begun { to, source, ttl_falls, exit }, Some(headers)) => {
            let out = wire::parse(seen.out, seen.place == Place::Early).ok_or("what left is no packet")?;
            let src = match source {
                NewSource::Kept => headers.src,
                NewSource::Port(ip) => SocketAddr::new(*ip, out.src.port()),
            };
            translated(seen, headers, &Rewrite { src, dst: *to, ttl_falls: *ttl_falls, quote: None }, *exit)?;
            if *source != NewSource::Kept && !model.node().source_ports.contains(&src.port()) {
                return Err("the port is none of the range (P12)".to_owned());
            }
            if !model.is_free(src, alternative) {
                return Err("the reply is another flow's (P12)".to_owned());
            }
            return Ok(Some(src));
        }
        (Outcome::Reject(..) | Outcome::Translated(..) | Outcome::Begun { .. }, None) => {
            Err("what came is no packet".to_owned())
        }
    }
    .map(|()| None)
}

fn verdict(seen: &Seen<'_>, wanted: Verdict) -> Result<(), String> {
    if seen.verdict == wanted { Ok(()) } else { Err(format!("the verdict should be {wanted:?}")) }
}

/// Byte for byte from an offset on.
fn same(seen: &Seen<'_>, wanted: &[u8], from: usize) -> Result<(), String> {
    if seen.out.get(from..) == wanted.get(from..) {
        return Ok(());
    }
    Err(format!("what leaves should be\n      {wanted:02x?}"))
}

fn translated(seen: &Seen<'_>, headers: &Headers, rewrite: &Rewrite, exit: Exit) -> Result<(), String> {
    /// Both link-layer addresses.
    const LINK: usize = 12;
    let mut wanted = wire::rewritten(seen.frame, headers, rewrite);
    match (exit, seen.place) {
        (Exit::Stack | Exit::Masqueraded, _) => {
            verdict(seen, Verdict::Pass)?;
            same(seen, &wanted, 0)
        }
        (Exit::HandUp(link), _) => {
            verdict(seen, Verdict::Redirect)?;
            wanted[..6].copy_from_slice(&link);
            same(seen, &wanted, 0)
        }
        // XDP names the neighbour itself; all next hops of the runner's network have one link-layer address.
        (Exit::Forward, Place::Early) => {
            if seen.verdict != Verdict::Tx {
                verdict(seen, Verdict::Redirect)?;
            }
            same(seen, &wanted, LINK)?;
            let to_pod = crate::universe::is_pod(rewrite.dst.ip());
            if to_pod || seen.out[..6] == GATEWAY_MAC {
                Ok(())
            } else {
                Err("it should go to the gateway".to_owned())
            }
        }
        (Exit::Forward, _) => {
            verdict(seen, Verdict::Redirect)?;
            same(seen, &wanted, 0)
        }
    }
}

/// Whether what left is this answer to the sender of what came.
fn check_answer(model: &Model, answer: Answer, headers: &Headers, seen: &Seen<'_>) -> Result<(), String> {
    let out = wire::parse(seen.out, false).ok_or("the answer is no packet")?;
    let wrong = |what: &str| Err(format!("the answer's {what}"));
    let link = [&seen.frame[6..12], &seen.frame[..6]].concat();
    if seen.out[..12] != link {
        return wrong("link-layer addresses are not turned round");
    }
    if out.dst.ip() != headers.src.ip() {
        return wrong("destination is not the sender");
    }
    if !wire::header_sum_is_right(seen.out, &out) || out.ttl == 0 || seen.out.len() != out.end() {
        return wrong("IP header is wrong");
    }
    let from = match answer {
        Answer::Reset | Answer::PortUnreachable => Some(headers.dst.ip()),
        // To the node itself its own address would be a martian.
        Answer::TimeExceeded | Answer::TooBig(_) | Answer::NoRoute if model.node().has(headers.src.ip()) => {
            Some(headers.dst.ip())
        }
        Answer::TimeExceeded | Answer::TooBig(_) | Answer::NoRoute => model.node().source(headers.is_v6()),
    };
    if Some(out.src.ip()) != from {
        return wrong("source is wrong");
    }
    match answer {
        Answer::Reset => check_reset(headers, &out, seen),
        Answer::PortUnreachable => check_error(seen, &out, (3, 3), (1, 4), 0),
        Answer::NoRoute => check_error(seen, &out, (3, 0), (1, 0), 0),
        Answer::TimeExceeded => check_error(seen, &out, (11, 0), (3, 0), 0),
        Answer::TooBig(mtu) => check_error(seen, &out, (3, 4), (2, 0), mtu),
    }
}

/// RFC 9293 section 3.10.7.1.
fn check_reset(headers: &Headers, out: &Headers, seen: &Seen<'_>) -> Result<(), String> {
    let Some((flags, seq, ack)) = headers.tcp else { return Err("only TCP is reset".to_owned()) };
    let wanted = if flags & flag::ACK != 0 {
        (flag::RST, ack, 0)
    } else {
        let controls = u32::from(flags & flag::SYN != 0) + u32::from(flags & flag::FIN != 0);
        let heard = seq.wrapping_add(headers.data as u32).wrapping_add(controls);
        (flag::RST | flag::ACK, 0, heard)
    };
    if (out.src, out.dst, out.tcp) != (headers.dst, headers.src, Some(wanted)) {
        return Err(format!("the reset should say {wanted:?}"));
    }
    if out.flaw.is_some() || out.data != 0 || !wire::transport_sum_is_right(seen.out, out) {
        return Err("the reset is not whole".to_owned());
    }
    Ok(())
}

/// RFC 792, RFC 4443: type and code of each family, the second word, and a quotation of what came.
fn check_error(
    seen: &Seen<'_>,
    out: &Headers,
    v4: (u8, u8),
    v6: (u8, u8),
    word: usize,
) -> Result<(), String> {
    let ((kind, code), proto) = if out.is_v6() { (v6, wire::ICMPV6) } else { (v4, wire::ICMP) };
    let error = &seen.out[out.l4..];
    if out.proto != proto || error.len() < 8 || (error[0], error[1]) != (kind, code) {
        return Err(format!("the error should be of type {kind} and code {code}"));
    }
    if wire::number(&error[4..8]) != word {
        return Err(format!("the error should say {word}"));
    }
    // The IP header and at least eight bytes of what it carries.
    let least = if out.is_v6() { 48 } else { 28 };
    let quoted = &error[8..];
    if quoted.len() < least.min(seen.frame.len() - ETHERNET) || !seen.frame[ETHERNET..].starts_with(quoted) {
        return Err("the error does not quote what came".to_owned());
    }
    if wire::transport_sum_is_right(seen.out, out) { Ok(()) } else { Err("the error's checksum".to_owned()) }
}

/// What the traffic counters count of it.
pub(crate) fn count(alternative: &Alternative, bytes: u64, traffic: &mut Traffic) {
    let from_client = match (&alternative.outcome, &alternative.then) {
        (Outcome::Begun { .. }, _) => {
            traffic.new_flows += 1;
            true
        }
        (Outcome::Translated(..), Then::Used(_, sender) | Then::Followed(_, sender)) => {
            *sender == Sender::Client
        }
        _ => return,
    };
    if from_client {
        traffic.packets_in += 1;
        traffic.bytes_in += bytes;
    } else {
        traffic.packets_out += 1;
        traffic.bytes_out += bytes;
    }
}
