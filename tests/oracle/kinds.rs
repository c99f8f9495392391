//! What kinds of cases were met: a generator that no longer draws one must not pass for a model that agrees.

use dataplane_tests::oracle::outcome::Exit;
use dataplane_tests::oracle::wire::{self, Flaw, Headers};
use dataplane_tests::oracle::{Alternative, Outcome, Place, Then, Why};
use std::collections::BTreeMap;

/// How often each kind was met.
#[derive(Debug, Default)]
pub(crate) struct Kinds(BTreeMap<&'static str, usize>);

/// Each kind, and how often it must be met in 100,000 packets: about half of what it is.
const LEAST: &[(&str, usize)] = &[
    ("IPv4 options carried along", 178),
    ("IPv6 extension headers followed", 291),
    ("SCTP over IPv4 translated", 505),
    ("SCTP over IPv6 translated", 424),
    ("TCP over IPv4 translated", 992),
    ("TCP over IPv6 translated", 1085),
    ("UDP over IPv4 translated", 1074),
    ("UDP over IPv6 translated", 937),
    ("a state with unreadable objects", 135),
    ("bad source", 233),
    ("client bound to its endpoint", 54),
    ("closed port", 560),
    ("cluster IP from outside", 300),
    ("datagram that chose anew", 18),
    ("early fragment dropped", 312),
    ("error about nobody's packet, or elsewhere", 1821),
    ("error translated, IPv4", 171),
    ("error translated, IPv6", 107),
    ("first fragment translated, IPv4", 34),
    ("first fragment translated, IPv6", 32),
    ("flow begun", 1184),
    ("handed up", 77),
    ("later fragment translated, IPv4", 36),
    ("later fragment translated, IPv6", 33),
    ("led by a hash", 150),
    ("least open", 22),
    ("left to another proxy", 299),
    ("left to tc behind VLAN tags", 140),
    ("left to netfilter to masquerade", 300),
    ("loopback from the network", 167),
    ("no endpoints", 5953),
    ("no local endpoints", 283),
    ("no route", 15),
    ("orphan fragment dropped", 119),
    ("passed, IPv4", 16467),
    ("passed, IPv6", 16011),
    ("refused and turned round, TCP", 7),
    ("refused and turned round, UDP", 53),
    ("refused and given to another", 27),
    ("rescued by a second try", 3),
    ("sent on", 1710),
    ("source not allowed", 182),
    ("time to live ended", 23),
    ("too big", 3),
    ("too many extension headers, or a source route", 82),
    ("translated behind VLAN tags", 27),
    ("translated by XDP", 567),
    ("two flows with one reply", 1),
    ("unknown service", 1559),
];

impl Kinds {
    pub(crate) fn count(&mut self, kind: &'static str) {
        *self.0.entry(kind).or_default() += 1;
    }

    /// Panics if in so many packets a kind was met too seldom.
    pub(crate) fn assert_met(&self, packets: usize) {
        for (kind, count) in &self.0 {
            println!("  {count:>6} times {kind}");
        }
        for (kind, least) in LEAST {
            let least = least * packets / 100_000;
            let count = self.0.get(kind).copied().unwrap_or(0);
            assert!(count >= least, "{kind} was met {count} times, should be {least}: the generator lost it");
        }
    }
}

/// Counts a packet by its kinds.
pub(crate) fn of(place: Place, headers: &Headers, alternative: &Alternative, kinds: &mut Kinds) {
    let outcome = &alternative.outcome;
    let translated = matches!(outcome, Outcome::Translated(..) | Outcome::Begun { .. });
    let masqueraded = matches!(
        outcome,
        Outcome::Translated(_, Exit::Masqueraded) | Outcome::Begun { exit: Exit::Masqueraded, .. }
    );
    let family = if headers.is_v6() { "IPv6" } else { "IPv4" };
    let (v4, v6) = (!headers.is_v6() && translated, headers.is_v6() && translated);
    let proto = headers.proto;
    let later = headers.flaw == Some(Flaw::Fragment);
    let first = headers.fragment.is_some_and(|fragment| fragment.first);
    let behind = headers.l4 - headers.l3 > if headers.is_v6() { 40 } else { 20 };
    let is_again = matches!(outcome, Outcome::Again(..));
    let quotes_udp = headers.quote.is_some_and(|quote| quote.proto == wire::UDP);
    let is = |why: Why| *outcome == Outcome::Drop(why);
    let was = [
        (v4 && proto == wire::TCP, "TCP over IPv4 translated"),
        (v4 && proto == wire::UDP, "UDP over IPv4 translated"),
        (v4 && proto == wire::SCTP, "SCTP over IPv4 translated"),
        (v6 && proto == wire::TCP, "TCP over IPv6 translated"),
        (v6 && proto == wire::UDP, "UDP over IPv6 translated"),
        (v6 && proto == wire::SCTP, "SCTP over IPv6 translated"),
        (v4 && behind && !later, "IPv4 options carried along"),
        (v6 && behind && !later && !first, "IPv6 extension headers followed"),
        (is(Why::Flawed(Flaw::Extensions)), "too many extension headers, or a source route"),
        (headers.is_tagged() && translated, "translated behind VLAN tags"),
        (headers.is_tagged() && *outcome == Outcome::LeftToTc, "left to tc behind VLAN tags"),
        (v4 && first, "first fragment translated, IPv4"),
        (v6 && first, "first fragment translated, IPv6"),
        (v4 && later, "later fragment translated, IPv4"),
        (v6 && later, "later fragment translated, IPv6"),
        (is(Why::Flawed(Flaw::Fragment)), "early fragment dropped"),
        (is(Why::OrphanFragment), "orphan fragment dropped"),
        (headers.quote.is_some() && v4, "error translated, IPv4"),
        (headers.quote.is_some() && v6, "error translated, IPv6"),
        (headers.quote.is_some() && !translated, "error about nobody's packet, or elsewhere"),
        (is(Why::Unanswerable), "error or fragment that must not be answered"),
        (is(Why::SourceNotAllowed), "source not allowed"),
        (is_again && !quotes_udp, "refused and turned round, TCP"),
        (is_again && quotes_udp, "refused and turned round, UDP"),
        (alternative.moved.is_some(), "refused and given to another"),
        (alternative.rescued, "rescued by a second try"),
        (alternative.left, "left to another proxy"),
        (alternative.others, "of others at a node port"),
        (is(Why::StrayAnswer), "stray answer dropped"),
        (alternative.bound, "client bound to its endpoint"),
        (alternative.is_hashed(), "led by a hash"),
        (alternative.spared, "least open"),
        (alternative.rebalanced, "datagram that chose anew"),
        (alternative.collided, "two flows with one reply"),
        (matches!(outcome, Outcome::Reject(Why::NoEndpoints, _)), "no endpoints"),
        (matches!(outcome, Outcome::Reject(Why::ClosedPort, _)), "closed port"),
        (matches!(outcome, Outcome::Reject(Why::TooBig, _)), "too big"),
        (matches!(outcome, Outcome::Reject(Why::TtlExceeded, _)), "time to live ended"),
        (is(Why::NoLocalEndpoints), "no local endpoints"),
        (is(Why::ClusterIpFromOutside), "cluster IP from outside"),
        (is(Why::UnknownService), "unknown service"),
        (is(Why::Loopback), "loopback from the network"),
        (is(Why::BadSource), "bad source"),
        (is(Why::NoRoute), "link-local client forwarded nowhere"),
        (matches!(outcome, Outcome::Reject(Why::Unreachable, _)), "no route"),
        (matches!(outcome, Outcome::Translated(_, Exit::HandUp(_))), "handed up"),
        (masqueraded, "left to netfilter to masquerade"),
        (matches!(outcome, Outcome::Translated(_, Exit::Forward)), "sent on"),
        (place == Place::Early && translated, "translated by XDP"),
        (*outcome == Outcome::Pass && family == "IPv4", "passed, IPv4"),
        (*outcome == Outcome::Pass && family == "IPv6", "passed, IPv6"),
        (matches!(alternative.then, Then::Begin(_)), "flow begun"),
    ];
    was.into_iter().filter(|(was, _)| *was).for_each(|(_, kind)| kinds.count(kind));
}
