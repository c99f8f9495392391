//! The load tool held against wrk: keep-alive requests of 64 bytes and answers of 64 bytes between two pods, from the same
//! CPU to the same server, in turn.

use crate::bench::record::{Machine, RECORDS, Record, output};
use crate::bench::target::Ratio;
use crate::lab::{self, Options, Place, PodOptions, Process, at, program};
use crate::load::{Mode, Ports, REQUEST, parse};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// The kind of its records.
pub const KIND: &str = "load";

/// The first port of the server.
const PORT: u16 = 7000;
/// How far the two may differ.
const SAME: std::ops::RangeInclusive<f64> = 0.8..=1.25;

/// How much is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchLoadArgs {
    /// Rounds.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Seconds of each tool in a round.
    #[arg(long, default_value_t = 3)]
    pub seconds: u32,
    /// Connections at once.
    #[arg(long, default_value_t = 32)]
    pub flows: usize,
    /// The folder that the record is written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// All that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Connections at once.
    pub flows: usize,
    /// Requests per second by the load tool, and its median latency in microseconds, round by round.
    pub own: Vec<(f64, f64)>,
    /// The same by wrk.
    pub wrk: Vec<(f64, f64)>,
    /// Requests per second, the load tool's over wrk's.
    pub ratio: Option<Ratio>,
}

/// Measures both in turn, prints both and writes the record.
///
/// # Errors
/// If the laboratory cannot be raised, or wrk is not there.
pub fn run(args: &BenchLoadArgs) -> Result<Record<Measured>> {
    let lab = Options::default().nodes(1).create()?;
    lab::on_signal_exit_with(130);
    let caller = lab.add_pod("caller", 0, &PodOptions::client())?;
    let callee = lab.add_pod("callee", 0, &PodOptions::client())?;
    let mut command = callee.place().command(program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?)?;
    command.args(["serve", "--port", &PORT.to_string(), "--cpu", "1"]);
    let server = Process::start(&lab.logs(), "load-server", command)?;
    server.wait_for_line(Duration::from_secs(10), |line| line == "serving")?;
    let to = at(callee.address(), Ports::from(PORT).answer);
    let mut measured = Measured { flows: args.flows, own: Vec::new(), wrk: Vec::new(), ratio: None };
    for _ in 0..args.rounds.max(1) {
        measured.own.push(own(caller.place(), to, args)?);
        measured.wrk.push(wrk(caller.place(), to, args)?);
    }
    let rates = |of: &[(f64, f64)]| of.iter().map(|(rate, _)| Some(*rate)).collect::<Vec<_>>();
    measured.ratio = Ratio::of(&rates(&measured.own), &rates(&measured.wrk));
    let version = output("wrk", &["-v"]);
    let version = version.lines().next().unwrap_or_default().to_owned();
    let mut record = Record::new(KIND, Machine::here([("wrk", version)]), false, measured);
    record.complete = true;
    let ratio = record.measured.ratio;
    if ratio.is_none_or(|ratio| !SAME.contains(&ratio.median)) {
        record.void.push("the load tool and wrk do not measure the same".into());
    }
    print(&record.measured);
    record.print();
    println!("record: {}", record.write(&args.records)?.display());
    Ok(record)
}

fn print(measured: &Measured) {
    for (name, of) in [("portolan-load", &measured.own), ("wrk", &measured.wrk)] {
        let rate = Ratio::among(of.iter().map(|(rate, _)| *rate));
        let latency = Ratio::among(of.iter().map(|(_, latency)| *latency));
        if let Some((rate, latency)) = rate.zip(latency) {
            println!("{name:<14} {rate} requests/s, median latency {latency} us");
        }
    }
    if let Some(ratio) = measured.ratio {
        println!("portolan-load over wrk: {ratio}");
    }
}

fn own(place: &Place, to: SocketAddr, args: &BenchLoadArgs) -> Result<(f64, f64)> {
    let load = program("portolan-load", "PORTOLAN_LOAD_PROGRAM")?;
    let mode = serde_json::to_value(Mode::TcpRequestResponse)?;
    let (mode, to) = (mode.as_str().context("mode")?, to.to_string());
    let (flows, seconds) = (args.flows.to_string(), args.seconds.to_string());
    let words = ["run", "--mode", mode, "--to", &to, "--flows", &flows, "--seconds", &seconds, "--cpu", "0"];
    let outcome = parse(&place.run(load.to_str().context("path")?, &words)?)?;
    Ok((outcome.per_second, outcome.latency.context("no request was answered")?.p50))
}

fn wrk(place: &Place, to: SocketAddr, args: &BenchLoadArgs) -> Result<(f64, f64)> {
    // What wrk sends of itself, and a header that makes it as long as the load tool's request.
    let bare = format!("GET / HTTP/1.1\r\nHost: {to}\r\n\r\n").len();
    let header = format!("P: {}", "x".repeat(REQUEST.saturating_sub(bare + "P: \r\n".len())));
    let (flows, seconds, url) =
        (args.flows.to_string(), format!("{}s", args.seconds), format!("http://{to}/"));
    let words = ["-c", "0", "wrk", "-t", "1", "-c", &flows, "-d", &seconds, "-H", &header, "--latency", &url];
    read_wrk(&place.run("taskset", &words)?)
}

/// Requests per second and the median latency in microseconds of what wrk prints.
fn read_wrk(text: &str) -> Result<(f64, f64)> {
    let field = |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim);
    let rate = field("Requests/sec:").and_then(|rate| rate.parse().ok());
    let latency = field("50%").and_then(microseconds);
    rate.zip(latency).with_context(|| format!("not what wrk prints: {text}"))
}

/// A time as wrk prints it.
fn microseconds(text: &str) -> Option<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6)];
    units.iter().find_map(|(unit, factor)| Some(text.strip_suffix(unit)?.parse::<f64>().ok()? * factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_prints_is_read() {
        let text =
            "  Latency Distribution\n     50%  410.00us\n     75%    1.20ms\nRequests/sec:  71234.56\n";
        assert_eq!(read_wrk(text).unwrap(), (71_234.56, 410.0));
        assert_eq!(microseconds("1.20ms"), Some(1_200.0));
        assert_eq!(microseconds("2.00s"), Some(2_000_000.0));
        assert!(read_wrk("unable to connect").is_err());
    }
}
