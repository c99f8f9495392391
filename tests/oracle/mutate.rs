//! Packets that are broken: cut short, with lengths that lie, bits flipped, headers nested. Whatever comes, what leaves is
//! what came, a rewrite of nothing but what a rewrite owns, or an answer; and the counters add up.

use crate::random::Random;
use crate::run::{Bench, hook, reasons};
use crate::script::{self, Step};
use crate::shape::Shape;
use dataplane_common::drop::{Disposition, Reason};
use dataplane_tests::oracle::wire::{self, ETHERNET, Flaw, Headers, ICMP, Rewrite, Segment};
use dataplane_tests::oracle::{Cluster, Place};
use dataplane_tests::packet::Verdict;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// Broken packets made of each whole one.
const OF_EACH: usize = 40;
/// Packets after which the counters are read. If they do not add up, the case runs again and they are read after each.
const BATCH: usize = 24;

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It left as it came.
    Passed,
    /// It left translated.
    Translated,
    /// Its sender was told no.
    Rejected,
    /// It is gone.
    Dropped,
}

/// Sends the packets of a random case and broken ones made of them; how many, or what is wrong.
pub(crate) fn run(bench: &mut Bench, seed: u64) -> Result<usize, String> {
    run_in_batches(bench, seed, BATCH).map_err(|error| match run_in_batches(bench, seed, 1) {
        Ok(_) => format!("{error}\n(not so when the counters are read after each packet)"),
        Err(precise) => precise,
    })
}

fn run_in_batches(bench: &mut Bench, seed: u64, batch: usize) -> Result<usize, String> {
    let mut random = Random::new(seed);
    let script = script::random(&mut random);
    let facts = script.flags.facts();
    bench.clear(&facts)?;
    bench.bring(&script.states[0], &facts)?;
    let own = endpoints(&script.states[0].cluster);
    let mut books = Books::open(bench, batch)?;
    for step in &script.steps {
        let Step::Send { place, segment, shape, .. } = step else { continue };
        let whole = whole(segment, shape);
        for number in 0..=OF_EACH {
            let mut frame = whole[number % whole.len()].clone();
            // Each whole one once, then broken ones.
            let damages = if number < whole.len() { 0 } else { 1 + random.below(3) };
            (0..damages).for_each(|_| damage(&mut random, &mut frame));
            books.send(bench, *place, frame, &own)?;
        }
    }
    books.close(bench)
}

/// The frames that broken ones are made of: the packet in its shape, and an error about its answer.
fn whole(segment: &Segment, shape: &Shape) -> Vec<Vec<u8>> {
    let mut frames = shape.frames(&segment.frame());
    let answer = Segment { src: segment.dst, dst: segment.src, ..segment.clone() }.frame();
    if let Some(headers) = wire::parse(&answer, false) {
        let kind = if headers.is_v6() { [1, 4] } else { [3, 3] };
        // Most errors go to whoever asked; this one goes to the Service.
        let error = wire::error_about(&answer, &headers, segment.src.ip(), kind, 0, 64);
        frames.push(error);
    }
    frames
}

/// In = passed + translated + rejected + dropped: each packet was one of these, and as many are counted.
struct Books {
    batch: usize,
    /// The packets since the counters were read, for people.
    since: Vec<String>,
    dropped: u64,
    rejected: u64,
    translated: u64,
    reasons: BTreeMap<Reason, u64>,
    packets: u64,
    traffic: [u64; 2],
    sent: usize,
}

impl Books {
    fn open(bench: &Bench, batch: usize) -> Result<Self, String> {
        Ok(Self {
            batch,
            since: Vec::new(),
            dropped: 0,
            rejected: 0,
            translated: 0,
            reasons: reasons(&bench.world)?,
            packets: packets(bench)?,
            traffic: traffic(bench)?,
            sent: 0,
        })
    }

    /// Sends a frame, and enters what came of it.
    fn send(
        &mut self,
        bench: &Bench,
        place: Place,
        frame: Vec<u8>,
        own: &BTreeSet<SocketAddr>,
    ) -> Result<(), String> {
        let (verdict, out, _) = bench
            .world
            .send_uncounted(hook(place), &frame)
            .map_err(|error| format!("{error:#}: {frame:02x?}"))?;
        self.sent += 1;
        let told = || format!("at {place:?}: {verdict:?}\n  in  {frame:02x?}\n  out {out:02x?}");
        let mut fate = fate(place, &frame, verdict, &out).map_err(|error| format!("{error}\n{}", told()))?;
        if fate == Fate::Passed && may_be_translated_to_itself(place, &frame, own) {
            // Where a Service's address is its endpoint's own, a translation changes nothing: only the counters tell it.
            match packets(bench)? - self.packets - self.translated {
                0 => {}
                1 => fate = Fate::Translated,
                more => return Err(format!("{more} packets more are counted than left\n{}", told())),
            }
        }
        match fate {
            Fate::Passed => {}
            Fate::Translated => self.translated += 1,
            Fate::Rejected => self.rejected += 1,
            Fate::Dropped => self.dropped += 1,
        }
        self.since.push(told());
        if self.since.len() >= self.batch { self.balance(bench) } else { Ok(()) }
    }

    /// Holds the counters of reasons against what was seen since they were read.
    fn balance(&mut self, bench: &Bench) -> Result<(), String> {
        let now = reasons(&bench.world)?;
        let moved = |wanted| {
            let of_kind = now.iter().filter(|(reason, _)| reason.disposition() == wanted);
            of_kind.map(|(reason, count)| count - self.reasons.get(reason).unwrap_or(&0)).sum::<u64>()
        };
        let (dropped, rejected) = (moved(Disposition::Dropped), moved(Disposition::Rejected));
        if (dropped, rejected) != (self.dropped, self.rejected) {
            return Err(format!(
                "{} packets were dropped and {} refused; counted are {dropped} and {rejected}\n{}",
                self.dropped,
                self.rejected,
                self.since.join("\n")
            ));
        }
        (self.reasons, self.dropped, self.rejected) = (now, 0, 0);
        self.since.clear();
        Ok(())
    }

    fn close(mut self, bench: &Bench) -> Result<usize, String> {
        self.balance(bench)?;
        for (now, before) in traffic(bench)?.iter().zip(&self.traffic) {
            if now - before != self.translated {
                return Err(format!(
                    "{} packets were translated, {} are counted",
                    self.translated,
                    now - before
                ));
            }
        }
        Ok(self.sent)
    }
}

/// Packets that all service ports have counted.
fn packets(bench: &Bench) -> Result<u64, String> {
    bench.world.packets().map_err(|error| format!("{error:#}"))
}

/// The same, and those of all backends.
fn traffic(bench: &Bench) -> Result<[u64; 2], String> {
    let traffic = bench.world.traffic().map_err(|error| format!("{error:#}"))?;
    Ok(traffic.map(|traffic| traffic.packets_in + traffic.packets_out))
}

/// Where all endpoints listen.
fn endpoints(cluster: &Cluster) -> BTreeSet<SocketAddr> {
    let mut all = BTreeSet::new();
    for slice in &cluster.slices {
        let ports = slice.ports.iter().flatten().filter_map(|port| u16::try_from(port.port?).ok());
        let addresses = slice.endpoints.iter().flatten().flat_map(|endpoint| &endpoint.addresses);
        let addresses: Vec<IpAddr> = addresses.filter_map(|address| address.parse().ok()).collect();
        all.extend(ports.flat_map(|port| addresses.iter().map(move |ip| SocketAddr::new(*ip, port))));
    }
    all
}

/// Whether a packet comes from or goes to where an endpoint listens. What has no ports may be of any.
fn may_be_translated_to_itself(place: Place, frame: &[u8], own: &BTreeSet<SocketAddr>) -> bool {
    let is_own = |at: SocketAddr| {
        own.contains(&at) || at.port() == 0 && own.iter().any(|endpoint| endpoint.ip() == at.ip())
    };
    wire::parse(frame, place == Place::Early)
        .is_some_and(|headers| is_own(headers.src) || is_own(headers.dst))
}

/// One kind of damage.
fn damage(random: &mut Random, frame: &mut Vec<u8>) {
    let v6 = frame[ETHERNET] >> 4 == 6;
    let header = if v6 { 40 } else { 20 };
    let at = random.below(frame.len());
    let set = |frame: &mut Vec<u8>, field: usize, byte: u8| {
        frame.get_mut(field).into_iter().for_each(|old| *old = byte);
    };
    let byte = random.next() as u8;
    match random.below(10) {
        // Cut short.
        0 => frame.truncate(ETHERNET + random.below(frame.len() - ETHERNET)),
        // The header's length and version, total length, fragment bits, protocol.
        1 => {
            let field = random.of(if v6 { &[0, 4, 5, 6, 6, 7] } else { &[0, 2, 3, 6, 7, 9] });
            set(frame, ETHERNET + field, byte);
        }
        // What a transport header, an extension header or a quoted packet says of itself.
        2 => {
            let field = random.of(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 16, 17, 28, 29, 48, 49]);
            set(frame, ETHERNET + header + field, byte);
        }
        // A header inside a header.
        3 if frame.len() < 400 => {
            let header: Vec<u8> = frame[ETHERNET..].iter().copied().take(header).collect();
            frame.splice(ETHERNET..ETHERNET, header);
        }
        // Options that are there, with or without the length that says so.
        4 if !v6 && frame.len() > ETHERNET + 20 => {
            frame[ETHERNET] = 0x45 + random.below(4) as u8;
            frame.splice(ETHERNET + 20..ETHERNET + 20, [1, 1, 1, 1]);
        }
        // An extension header, where the length does not know of it.
        4 if v6 && frame.len() > ETHERNET + 40 => {
            let next = std::mem::replace(&mut frame[ETHERNET + 6], random.of(&[0, 43, 44, 60]));
            let rest = [random.below(3) as u8, byte & 1, 0, 0, 0, 0, byte];
            frame.splice(ETHERNET + 40..ETHERNET + 40, [&[next][..], &rest].concat());
        }
        5 => frame.extend((0..random.below(9)).map(|_| 0xaa)),
        6 => drop(frame.splice(12..12, [0x81, 0, 0, byte])),
        _ => frame[at] ^= 1 << random.below(8),
    }
    // The kernel takes no test packet that is shorter than the header its Ethernet type promises.
    let least = if frame[12..14] == [0x86, 0xdd] { 40 } else { 20 };
    frame.resize(frame.len().max(ETHERNET + least), 0);
}

/// What became of a packet; the error is what is wrong with what left.
fn fate(place: Place, frame: &[u8], verdict: Verdict, out: &[u8]) -> Result<Fate, String> {
    match verdict {
        Verdict::Drop => return Ok(Fate::Dropped),
        Verdict::Pass if out == frame => return Ok(Fate::Passed),
        Verdict::Pass | Verdict::Redirect | Verdict::Tx => {}
    }
    let tags = place == Place::Early;
    let after = wire::parse(out, tags).ok_or("what left is no packet")?;
    let headers = wire::parse(frame, tags).ok_or("what came is no packet, and was changed")?;
    let error = match is_rewrite(place, frame, &headers, verdict, out, &after) {
        Ok(()) => return Ok(Fate::Translated),
        Err(error) => error,
    };
    let right = || wire::header_sum_is_right(out, &after) && wire::transport_sum_is_right(out, &after);
    if verdict == Verdict::Redirect && after.dst.ip() == headers.src.ip() && right() {
        return Ok(Fate::Rejected);
    }
    Err(error)
}

/// Nothing but addresses, ports, time to live and checksums changed, and a checksum is as right as it was.
fn is_rewrite(
    place: Place,
    frame: &[u8],
    headers: &Headers,
    verdict: Verdict,
    out: &[u8],
    after: &Headers,
) -> Result<(), String> {
    let ttl_falls = after.ttl != headers.ttl;
    if ttl_falls && verdict == Verdict::Pass {
        return Err("the time to live fell".to_owned());
    }
    match headers.flaw {
        None | Some(Flaw::Fragment) => {}
        Some(Flaw::Protocol) if headers.quote.is_some() => {}
        Some(flaw) => return Err(format!("it has a flaw ({flaw:?}), and was changed")),
    }
    let quote = after.quote.map(|quote| (quote.src, quote.dst));
    if quote.is_some() != headers.quote.is_some() {
        return Err("what it quotes is no packet any more".to_owned());
    }
    let rewrite = Rewrite { src: after.src, dst: after.dst, ttl_falls, quote };
    let mut wanted = wire::rewritten(frame, headers, &rewrite);
    if verdict != Verdict::Pass && (place == Place::Early || wanted.get(6..) == out.get(6..)) {
        // A next hop, or the uplink that a packet is handed up on.
        wanted.splice(..12, out[..12].iter().copied());
    }
    // Zero has two forms; a checksum that was wrong may end in either.
    for at in checksums(headers) {
        let (Some(a), Some(b)) = (wanted.get(at..at + 2), out.get(at..at + 2)) else { continue };
        let zero = |bytes: &[u8]| bytes == [0, 0] || bytes == [0xff, 0xff];
        if zero(a) && zero(b) {
            wanted.splice(at..at + 2, out[at..at + 2].iter().copied());
        }
    }
    if wanted == out { Ok(()) } else { Err(format!("a rewrite would be\n      {wanted:02x?}")) }
}

/// Where checksums are that a rewrite changes.
fn checksums(headers: &Headers) -> Vec<usize> {
    const OF_HEADER: usize = 10;
    let mut all = vec![headers.checksum_at()];
    if !headers.is_v6() {
        all.push(headers.l3 + OF_HEADER);
    }
    if let Some(quote) = headers.quote {
        all.push(quote.checksum_at());
        if headers.proto == ICMP {
            all.push(quote.l3 + OF_HEADER);
        }
    }
    all
}
