//! Packets that are broken: cut short, with lengths that lie, bits flipped, headers nested. Whatever comes, what leaves is
//! what came, a rewrite of nothing but what a rewrite owns, or an answer; and the counters add up.

use crate::objects;
use crate::random::Random;
use crate::run::{Bench, hook, reasons};
use crate::script::{self, Step};
use dataplane_common::drop::{Disposition, Reason};
use dataplane_tests::oracle::wire::{self, ETHERNET, Flaw, Headers, Rewrite};
use dataplane_tests::oracle::{Cluster, Place};
use dataplane_tests::packet::Verdict;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// Broken packets made of each whole one.
const OF_EACH: usize = 40;

/// Sends the packets of a random case and broken ones made of them; how many, or what is wrong.
pub(crate) fn run(bench: &mut Bench, seed: u64) -> Result<usize, String> {
    let mut random = Random::new(seed);
    let script = script::random(&mut random);
    let facts = script.flags.facts();
    bench.world.forget_flows().map_err(|error| format!("{error:#}"))?;
    bench.bring("", &facts)?;
    bench.bring(&objects::manifests(&script.states[0]), &facts)?;
    let traffic = |bench: &Bench| bench.world.traffic().map_err(|error| format!("{error:#}"));
    let (before, mut translated, mut sent) = (traffic(bench)?, 0, 0);
    let total =
        |bench: &Bench| traffic(bench).map(|[services, _]| services.packets_in + services.packets_out);
    let own = endpoints(&script.states[0]);
    let mut counted = reasons(&bench.world)?;
    for step in &script.steps {
        let Step::Send { place, segment, .. } = step else { continue };
        for number in 0..=OF_EACH {
            let mut frame = segment.frame();
            for _ in 0..number.min(1 + random.below(3)) {
                damage(&mut random, &mut frame);
            }
            // Where a Service's address is its endpoint's own, a translation changes nothing: only the counters tell it.
            let invisible = wire::parse(&frame).filter(|headers| {
                // A fragment after the first has no ports, and may be one of any of them.
                let later = headers.flaw == Some(Flaw::Fragment) && headers.dst.port() == 0;
                let is_own = |at: SocketAddr| {
                    own.contains(&at) || later && own.iter().any(|endpoint| endpoint.ip() == at.ip())
                };
                is_own(headers.src) || is_own(headers.dst)
            });
            let known = invisible.is_some().then(|| total(bench)).transpose()?;
            let (verdict, out) = bench
                .world
                .send_uncounted(hook(*place), &frame)
                .map_err(|error| format!("{error:#}: {frame:02x?}"))?;
            let now = reasons(&bench.world)?;
            let moved = now.iter().filter(|(reason, count)| counted.get(reason) != Some(count));
            let moved: BTreeMap<_, _> =
                moved.map(|(reason, count)| (*reason, count - counted.get(reason).unwrap_or(&0))).collect();
            counted = now;
            sent += 1;
            let rewrite = check(*place, &frame, verdict, &out, &moved).map_err(|error| {
                format!("{error}\nat {place:?}: {verdict:?}, {moved:?}\n  in  {frame:02x?}\n  out {out:02x?}")
            })?;
            translated += u64::from(rewrite);
            if let Some(known) = known.filter(|_| verdict == Verdict::Pass && out == frame) {
                translated += (total(bench)? - known).min(1);
            }
        }
    }
    // In = passed + translated + rejected + dropped: each packet was one of these, and as many are counted.
    for (now, before) in traffic(bench)?.iter().zip(&before) {
        let counted = now.packets_in + now.packets_out - before.packets_in - before.packets_out;
        if counted != translated {
            return Err(format!("{translated} packets were translated, {counted} are counted"));
        }
    }
    Ok(sent)
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

/// One kind of damage.
fn damage(random: &mut Random, frame: &mut Vec<u8>) {
    let at = random.below(frame.len());
    match random.below(8) {
        // Cut short.
        0 => frame.truncate(ETHERNET + random.below(frame.len() - ETHERNET)),
        // The header's length and version, total length, fragment bits, protocol.
        1 => {
            let field = ETHERNET + random.of(&[0, 2, 3, 6, 7, 9]);
            if let Some(byte) = frame.get_mut(field) {
                *byte = random.next() as u8;
            }
        }
        // What a transport header says of itself.
        2 => {
            let field = ETHERNET + 20 + random.of(&[4, 5, 6, 7, 12, 13, 16, 17]);
            if let Some(byte) = frame.get_mut(field) {
                *byte = random.next() as u8;
            }
        }
        // A header inside a header.
        3 if frame.len() < 400 => {
            let header: Vec<u8> = frame[ETHERNET..].iter().copied().take(20).collect();
            frame.splice(ETHERNET..ETHERNET, header);
        }
        // Options that are there, with or without the length that says so.
        4 if frame.len() > ETHERNET + 20 => {
            frame[ETHERNET] = 0x45 + random.below(4) as u8;
            frame.splice(ETHERNET + 20..ETHERNET + 20, [1, 1, 1, 1]);
        }
        5 => frame.extend((0..random.below(9)).map(|_| 0xaa)),
        _ => frame[at] ^= 1 << random.below(8),
    }
    // The kernel takes no test packet that is shorter than the header its Ethernet type promises.
    let least = if frame[12..14] == [0x86, 0xdd] { 40 } else { 20 };
    frame.resize(frame.len().max(ETHERNET + least), 0);
}

/// Whether it was translated; the error is what is wrong.
fn check(
    place: Place,
    frame: &[u8],
    verdict: Verdict,
    out: &[u8],
    moved: &BTreeMap<Reason, u64>,
) -> Result<bool, String> {
    let count = |wanted| {
        moved.iter().filter(|(reason, _)| reason.disposition() == wanted).map(|(_, count)| count).sum::<u64>()
    };
    let (dropped, rejected) = (count(Disposition::Dropped), count(Disposition::Rejected));
    let expected = match verdict {
        Verdict::Drop => (1, 0),
        Verdict::Pass => (0, 0),
        Verdict::Redirect | Verdict::Tx => (0, rejected.min(1)),
    };
    if (dropped, rejected) != expected {
        return Err(format!("{dropped} drops and {rejected} refusals are counted"));
    }
    if verdict == Verdict::Drop || verdict == Verdict::Pass && out == frame {
        return Ok(false);
    }
    let after = wire::parse(out).ok_or("what left is no packet")?;
    if rejected == 1 {
        let right = wire::header_sum_is_right(out) && wire::transport_sum_is_right(out, &after);
        return if right { Ok(false) } else { Err("an answer with a wrong checksum".to_owned()) };
    }
    let headers = wire::parse(frame).ok_or("what came is no packet, and was translated")?;
    is_rewrite(place, frame, &headers, verdict, out, &after).map(|()| true)
}

/// IP protocol number of SCTP.
const SCTP: u8 = 132;

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
    if headers.proto == SCTP {
        return is_sctp_rewrite(frame, headers, out, after);
    }
    let rewrite = Rewrite { src: after.src, dst: after.dst, ttl_falls };
    let mut wanted = wire::rewritten(frame, headers, &rewrite);
    if verdict != Verdict::Pass && (place == Place::Early || wanted[6..] == out[6..]) {
        // A next hop, or the uplink that a packet is handed up on.
        wanted.splice(..12, out[..12].iter().copied());
    }
    // Zero has two forms; a checksum that was wrong may end in either.
    for at in [ETHERNET + 10, headers.checksum_at()] {
        let (Some(a), Some(b)) = (wanted.get(at..at + 2), out.get(at..at + 2)) else { continue };
        let zero = |bytes: &[u8]| bytes == [0, 0] || bytes == [0xff, 0xff];
        if zero(a) && zero(b) {
            wanted.splice(at..at + 2, out[at..at + 2].iter().copied());
        }
    }
    if wanted == out { Ok(()) } else { Err(format!("a rewrite would be\n      {wanted:02x?}")) }
}

/// The same of SCTP, whose CRC32c covers the ports (S6): behind those nothing but the CRC changed, which errs as it did.
fn is_sctp_rewrite(frame: &[u8], headers: &Headers, out: &[u8], after: &Headers) -> Result<(), String> {
    const CRC: std::ops::Range<usize> = 8..12;
    let parts = |bytes: &[u8], headers: &Headers| {
        let (at, before) = if bytes[ETHERNET] >> 4 == 4 { (ETHERNET + 2, 0) } else { (ETHERNET + 4, 40) };
        let length = before + usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]));
        let mut packet = bytes[headers.l4..ETHERNET + length].to_vec();
        let stated = u32::from_le_bytes([packet[8], packet[9], packet[10], packet[11]]);
        packet[CRC].fill(0);
        let error = stated ^ dataplane_tests::packet::build::crc32c(&packet);
        (packet[4..].to_vec(), bytes[ETHERNET + length..].to_vec(), error)
    };
    let right = frame.len() == out.len() && parts(frame, headers) == parts(out, after);
    if right { Ok(()) } else { Err("SCTP was changed otherwise".to_owned()) }
}
