//! The load tool held against wrk: requests of 64 bytes and answers of 64 bytes between two pods, from the same CPU to the
//! same server, in turn.
//!
//! Where the server sets the pace, a tool that counts and times rightly has no choice in what it finds: both must agree. Where
//! the client's own CPU sets it, what is compared is how much work each tool does for a request: wrk parses HTTP, and its
//! latencies leave out the time until it writes the next request. That is told, and not judged. Nor is the 99th of 100
//! latencies where a server has no rest: if one takes more than twice the mean, wrk counts those that others would have met
//! meanwhile, had they been sent, and the load tool only what was sent.

mod wrk;

use crate::bench::record::{Machine, RECORDS, Record, output};
use crate::bench::target::Ratio;
use crate::lab::{self, Options, Place, PodOptions, Process, at, program};
use crate::load::{Mode, Ports, WORK, parse, wait_at};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The kind of its records.
pub const KIND: &str = "load";

/// The first port of the server.
const PORT: u16 = 7000;
/// The first port of the server that waits.
const PACED_PORT: u16 = 7010;

/// Where the server waits.
const ALL_ALIKE: Limits = Limits { per_second: Some(0.05), p50: Some(0.05), p99: Some(0.1) };
/// Where the server's CPU has no rest.
const RATE_AND_MIDDLE_ALIKE: Limits = Limits { per_second: Some(0.05), p50: Some(0.1), p99: None };
/// Where the client's has none.
const NOT_JUDGED: Limits = Limits { per_second: None, p50: None, p99: None };

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchLoadArgs {
    /// Fewer and shorter rounds.
    #[arg(long)]
    pub quick: bool,
    /// Rounds (7; quick: 3).
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Seconds of each tool in a round (3; quick: 2).
    #[arg(long)]
    pub seconds: Option<u32>,
    /// Connections at once.
    #[arg(long, default_value_t = 32)]
    pub flows: usize,
    /// The folder that the record is written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// What one tool found in one round.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// Requests per second.
    pub per_second: f64,
    /// Microseconds of the middle request.
    pub p50: f64,
    /// Microseconds that 99 of 100 are shorter than.
    pub p99: f64,
}

/// How far the tools may differ, as parts of one; where nothing is said, as far as they like.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// In requests per second.
    pub per_second: Option<f64>,
    /// In the middle latency.
    pub p50: Option<f64>,
    /// In the one that 99 of 100 are shorter than.
    pub p99: Option<f64>,
}

/// Both tools against one server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// What sets the pace.
    pub what: String,
    /// How far they may differ.
    pub limits: Limits,
    /// The load tool, round by round.
    pub own: Vec<Found>,
    /// wrk, round by round.
    pub wrk: Vec<Found>,
}

/// All that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Connections at once.
    pub flows: usize,
    /// Seconds of each tool in a round.
    pub seconds: u32,
    /// Server by server.
    pub comparisons: Vec<Comparison>,
}

/// A server, and what the load tool does with it.
struct Server {
    what: String,
    limits: Limits,
    port: u16,
    mode: Mode,
}

fn servers() -> [Server; 4] {
    let [shortest, longest] = [0.0, 100.0].map(|percent| wait_at(percent).as_millis());
    let waits = format!("waits {shortest} to {longest} ms before each answer");
    let ports = Ports::from(PORT);
    let server = |what, limits, port, mode| Server { what, limits, port, mode };
    [
        server(format!("the server {waits}"), ALL_ALIKE, PACED_PORT, Mode::TcpRequestResponse),
        server(
            format!("the server {waits}, then closes the connection"),
            ALL_ALIKE,
            PACED_PORT + 1,
            Mode::ConnectRequestClose,
        ),
        server(
            format!("the server's CPU works {} us for each answer", WORK.as_micros()),
            RATE_AND_MIDDLE_ALIKE,
            ports.work,
            Mode::TcpRequestResponse,
        ),
        server("the client's CPU".into(), NOT_JUDGED, ports.answer, Mode::TcpRequestResponse),
    ]
}

/// Measures both in turn, prints both and writes the record.
///
/// # Errors
/// If the laboratory cannot be raised, or wrk is not there.
pub fn run(args: &BenchLoadArgs) -> Result<Record<Measured>> {
    let (rounds, seconds) = if args.quick { (3, 2) } else { (7, 3) };
    let (rounds, seconds) = (args.rounds.unwrap_or(rounds).max(1), args.seconds.unwrap_or(seconds).max(1));
    let comparisons = compare(args.flows, rounds, seconds)?;
    let version = output("wrk", &["-v"]);
    let version = version.lines().next().unwrap_or_default().to_owned();
    let measured = Measured { flows: args.flows, seconds, comparisons };
    let mut record = Record::new(KIND, Machine::here([("wrk", version)]), args.quick, measured);
    record.measured.comparisons.iter().for_each(print);
    record.void = record.measured.comparisons.iter().flat_map(Comparison::disagreements).collect();
    record.finish(&args.records)
}

/// Both tools against every server, in turn.
fn compare(flows: usize, rounds: usize, seconds: u32) -> Result<Vec<Comparison>> {
    let lab = Options::default().nodes(1).create()?;
    lab::on_signal_exit_with(130);
    let caller = lab.add_pod("caller", 0, &PodOptions::client())?;
    let callee = lab.add_pod("callee", 0, &PodOptions::client())?;
    // The server closes first, so its kernel would remember each connection for a minute.
    callee.place().sysctl("net/ipv4/tcp_max_tw_buckets", "0")?;
    let serve = |name: &str, verb: &str, port: u16| {
        let mut command = callee.place().command(program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?)?;
        command.args([verb, "--port", &port.to_string(), "--cpu", "1"]);
        let server = Process::start(&lab.logs(), name, command)?;
        server.wait_for_line(Duration::from_secs(10), |line| line == "serving")?;
        anyhow::Ok(server)
    };
    let _servers = [serve("load-server", "serve", PORT)?, serve("paced-server", "serve-paced", PACED_PORT)?];
    let mut comparisons: Vec<_> = servers().map(|server| (server.comparison(), server)).into();
    for _ in 0..rounds {
        for (comparison, server) in &mut comparisons {
            let to = at(callee.address(), server.port);
            comparison.own.push(own(caller.place(), to, server.mode, flows, seconds)?);
            comparison.wrk.push(wrk::run(caller.place(), to, flows, seconds)?);
        }
    }
    Ok(comparisons.into_iter().map(|(comparison, _)| comparison).collect())
}

fn own(place: &Place, to: SocketAddr, mode: Mode, flows: usize, seconds: u32) -> Result<Found> {
    let load = program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?;
    let mode = serde_json::to_value(mode)?;
    let (mode, to) = (mode.as_str().context("mode")?, to.to_string());
    let (flows, seconds) = (flows.to_string(), seconds.to_string());
    let words = ["run", "--mode", mode, "--to", &to, "--flows", &flows, "--seconds", &seconds, "--cpu", "0"];
    let outcome = parse(&place.run(load.to_str().context("path")?, &words)?)?;
    let latency = outcome.latency.context("no request was answered")?;
    Ok(Found { per_second: outcome.per_second, p50: latency.p50, p99: latency.p99 })
}

impl Server {
    fn comparison(&self) -> Comparison {
        let (what, limits) = (self.what.clone(), self.limits);
        Comparison { what, limits, own: Vec::new(), wrk: Vec::new() }
    }
}

/// What is compared, how it is read from what a tool found, and how far the tools may differ.
type Quantity = (&'static str, fn(&Found) -> f64, Option<f64>);

impl Comparison {
    fn quantities(&self) -> [Quantity; 3] {
        let Limits { per_second, p50, p99 } = self.limits;
        [
            ("requests/s", |found| found.per_second, per_second),
            ("p50 in us", |found| found.p50, p50),
            ("p99 in us", |found| found.p99, p99),
        ]
    }

    /// The load tool's over wrk's, round by round.
    fn ratio(&self, value: fn(&Found) -> f64) -> Option<Ratio> {
        let of = |tool: &[Found]| tool.iter().map(|found| Some(value(found))).collect::<Vec<_>>();
        Ratio::of(&of(&self.own), &of(&self.wrk))
    }

    /// In what the tools differ more than they may.
    fn disagreements(&self) -> Vec<String> {
        let differs = |(name, value, limit): Quantity| {
            let (limit, ratio) = (limit?, self.ratio(value));
            let same = ratio.is_some_and(|ratio| (ratio.median - 1.0).abs() <= limit);
            let ratio = ratio.map_or_else(|| "nothing".into(), |ratio| ratio.to_string());
            (!same).then(|| format!("{}: {name} of the load tool over those of wrk are {ratio}", self.what))
        };
        self.quantities().into_iter().filter_map(differs).collect()
    }
}

fn print(comparison: &Comparison) {
    println!("\nthe pace is set by: {}", comparison.what);
    println!("{:<12} {:<26} {:<26} ratio", "", "portolan-load", "wrk");
    for (name, value, limit) in comparison.quantities() {
        let among = |tool: &[Found]| {
            Ratio::among(tool.iter().map(value)).map_or_else(String::new, |ratio| ratio.to_string())
        };
        let ratio = comparison.ratio(value).map_or_else(String::new, |ratio| ratio.to_string());
        let asked = limit.map_or_else(|| ", not judged".into(), |limit| format!(", 1 +- {limit} is asked"));
        println!("{name:<12} {:<26} {:<26} {ratio}{asked}", among(&comparison.own), among(&comparison.wrk));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison(limits: Limits, own: Found, wrk: Found) -> Comparison {
        Comparison { what: "a server".into(), limits, own: vec![own; 3], wrk: vec![wrk; 3] }
    }

    #[test]
    fn tools_that_differ_make_a_run_void_where_the_server_sets_the_pace() {
        let wrk = Found { per_second: 15_000.0, p50: 2_000.0, p99: 3_000.0 };
        assert!(comparison(ALL_ALIKE, wrk, wrk).disagreements().is_empty());
        let slow_clock = Found { p50: 1_800.0, p99: 2_700.0, ..wrk };
        assert_eq!(comparison(ALL_ALIKE, slow_clock, wrk).disagreements().len(), 1);
        let counts_twice = Found { per_second: 30_000.0, ..wrk };
        assert!(comparison(ALL_ALIKE, counts_twice, wrk).disagreements()[0].contains("requests/s"));
        assert!(comparison(NOT_JUDGED, counts_twice, wrk).disagreements().is_empty());
        let unmeasured = Comparison { own: Vec::new(), ..comparison(ALL_ALIKE, wrk, wrk) };
        assert_eq!(unmeasured.disagreements().len(), 3);
    }
}
