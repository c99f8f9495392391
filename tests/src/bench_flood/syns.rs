//! A flood of SYNs from all CPUs, each from an address and port of its own, and who means it meanwhile.

use super::PATIENCE;
use crate::lab::layout::End::{Here, There};
use crate::lab::layout::On::{Uplink, Vpn};
use crate::lab::layout::Target::{ClusterIp, NodePort};
use crate::lab::layout::{Proxy, Raised, Target, Who};
use crate::lab::{Client, Family, Stream};
use crate::load::flood;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Before anything is counted.
const WARM_UP: Duration = Duration::from_secs(1);

/// What a flood did with one proxy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Syns {
    /// Who served.
    pub proxy: Proxy,
    /// Seconds of it.
    pub seconds: f64,
    /// SYNs that nobody meant.
    pub sent: u64,
    /// Connections that were established before, and how many of them gave no answer after.
    pub streams: usize,
    /// How many of them gave no answer after it.
    pub lost: usize,
    /// Half-open flows at its end; of Portolan only.
    pub half_open: Option<usize>,
    /// Who was served meanwhile.
    pub honest: Vec<Honest>,
}

/// A kind of client that means it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Honest {
    /// Who calls what.
    pub who: String,
    /// Connections, or questions, that were answered.
    pub good: u64,
    /// Those that were not, in five seconds.
    pub failed: u64,
}

/// Who means it: by how many threads, from where, to what, and whether by UDP.
const HONEST: [(&str, usize, Who, Target, bool); 5] = [
    ("TCP, a pod to a ClusterIP, endpoint elsewhere", 1, Who::Pod, ClusterIp(There), false),
    (
        "TCP, a client outside to a node port, endpoint elsewhere",
        1,
        Who::Client,
        NodePort(There, Uplink),
        false,
    ),
    ("TCP, a client 200 ms away to a node port, endpoint here", 8, Who::Vpn, NodePort(Here, Vpn), false),
    ("UDP, a pod to a ClusterIP, endpoint elsewhere", 1, Who::Pod, ClusterIp(There), true),
    (
        "UDP, a client outside to a node port, endpoint elsewhere",
        1,
        Who::Client,
        NodePort(There, Uplink),
        true,
    ),
];

impl Syns {
    /// For people.
    pub(super) fn lines(&self) -> Vec<String> {
        let Self { proxy, seconds, sent, streams, lost, half_open, honest } = self;
        let per_second = *sent as f64 / seconds;
        let half_open =
            half_open.map_or_else(String::new, |number| format!(", {number} half-open flows at its end"));
        let mut lines = vec![format!(
            "{}: a flood of {per_second:.0} SYNs/s for {seconds:.0} s: {lost} of {streams} connections lost{half_open}",
            proxy.name()
        )];
        lines.extend(honest.iter().map(|Honest { who, good, failed }| {
            format!("    {who}: {:.1}/s served, {failed} of {} failed", *good as f64 / seconds, good + failed)
        }));
        lines
    }
}

/// Floods the node port of the endpoint elsewhere.
pub(super) fn measure(raised: &Raised, proxy: Proxy, time: Duration, streams: usize) -> Result<Syns> {
    let mut established = establish(raised, streams)?;
    let target = raised.address(NodePort(There, Uplink), Family::V4);
    let cpus = std::thread::available_parallelism().map_or(2, usize::from).max(2);
    let raws =
        raised.place(Who::Client)?.sockets(Family::V4.domain(), libc::SOCK_RAW, libc::IPPROTO_RAW, cpus)?;
    let (end, counting, sent) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(0));
    let counters: [[AtomicU64; 2]; HONEST.len()] = Default::default();
    let seconds = std::thread::scope(|scope| {
        for (part, raw) in raws.iter().enumerate() {
            let (end, counting, sent) = (&end, &counting, &sent);
            scope.spawn(move || {
                flood(raw, target, (part, cpus), end, |bytes| {
                    // Its own network may be out of buffers: then it is not sent.
                    if bytes.is_ok() && counting.load(Ordering::Relaxed) {
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                })
            });
        }
        for ((_, threads, who, to, by_udp), counters) in HONEST.iter().zip(&counters) {
            let (client, to) = (raised.client(*who)?.timeout(PATIENCE), raised.address(*to, Family::V4));
            for _ in 0..*threads {
                let (client, end, counting) = (client.clone(), &end, &counting);
                scope.spawn(move || call(&client, to, *by_udp, end, counting, counters));
            }
        }
        std::thread::sleep(WARM_UP);
        counting.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        std::thread::sleep(time);
        counting.store(false, Ordering::Relaxed);
        let seconds = begun.elapsed().as_secs_f64();
        end.store(true, Ordering::Relaxed);
        anyhow::Ok(seconds)
    })?;
    let half_open = (proxy == Proxy::Portolan).then(|| half_open(raised)).transpose()?;
    let lost = established.iter_mut().map(|stream| stream.ask()).filter(|answer| answer.is_err()).count();
    let honest = HONEST.iter().zip(&counters).map(|((who, ..), [good, failed])| Honest {
        who: (*who).into(),
        good: good.load(Ordering::Relaxed),
        failed: failed.load(Ordering::Relaxed),
    });
    Ok(Syns { proxy, seconds, sent: sent.into_inner(), streams, lost, half_open, honest: honest.collect() })
}

/// Connections of a pod and of a client outside, which have answered.
fn establish(raised: &Raised, count: usize) -> Result<Vec<Stream>> {
    let mut all = Vec::with_capacity(count);
    for (who, to) in [(Who::Pod, ClusterIp(There)), (Who::Client, NodePort(There, Uplink))] {
        let client: Client = raised.client(who)?;
        let streams = client.connect_many(raised.address(to, Family::V4), count / 2);
        all.extend(streams.map_err(|failure| anyhow!("{who:?}: {failure}"))?);
    }
    for stream in &mut all {
        stream.ask().map_err(|failure| anyhow!("a connection before the flood: {failure}"))?;
    }
    Ok(all)
}

/// Calls again and again, and counts what comes to its end in the time.
fn call(
    client: &Client,
    to: SocketAddr,
    by_udp: bool,
    end: &AtomicBool,
    counting: &AtomicBool,
    [good, failed]: &[AtomicU64; 2],
) {
    while !end.load(Ordering::Relaxed) {
        let answer = if by_udp { client.udp(to) } else { client.tcp(to) };
        if counting.load(Ordering::Relaxed) {
            let counter = if answer.is_ok() { good } else { failed };
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Half-open flows of the node at this moment.
fn half_open(raised: &Raised) -> Result<usize> {
    let flows = raised.lab.node(0).portolan(&["flows"]).context("portolan flows")?;
    Ok(flows.lines().filter(|line| line.contains("half-open")).count())
}
