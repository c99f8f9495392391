//! The load tool: many flows from one client on one CPU to a server of its own on another, for a fixed time.
//!
//! It measures the path, so both sides do as little as they can: one thread each, no allocation per operation, and requests
//! of [`REQUEST`] bytes. It never runs longer than it was told, whatever the other side does.

mod bulk;
mod client;
mod connect;
mod pace;
mod server;
mod syns;

pub use connect::{Connect, ConnectOutcome, ConnectServer};
pub use pace::{PacedServer, wait_at};
pub use server::{ANSWER, CLOSING_ANSWER, Ports, Server, WORK};
pub use syns::flood;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Bytes of a request and of its answer.
pub const REQUEST: usize = 64;

/// The longest a run may last.
const LONGEST: Duration = Duration::from_secs(600);

/// What a flow does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// TCP: connect, request, answer, close (by the server, as HTTP does).
    ConnectRequestClose,
    /// TCP: request and answer, again and again on one connection.
    TcpRequestResponse,
    /// UDP: request and answer, again and again from one socket.
    UdpRequestResponse,
    /// UDP: as many datagrams as go through, with [`WINDOW`] of each flow under way.
    Packets,
    /// TCP: as many bytes as go through.
    Bulk,
}

/// Datagrams of a flow that are under way at once.
pub const WINDOW: usize = 16;

/// One run.
#[derive(Clone, Debug, clap::Args)]
pub struct Load {
    /// What each flow does.
    #[arg(long, value_enum)]
    pub mode: Mode,
    /// The server's address and port.
    #[arg(long)]
    pub to: SocketAddr,
    /// Flows at once.
    #[arg(long, default_value_t = 32)]
    pub flows: usize,
    /// Seconds that are measured.
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// Seconds before them.
    #[arg(long, default_value_t = 0.2)]
    pub warm_up: f64,
    /// The CPU of the client.
    #[arg(long)]
    pub cpu: Option<usize>,
}

/// What a run measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// What each flow did.
    pub mode: Mode,
    /// Flows at once.
    pub flows: usize,
    /// Seconds that were measured.
    pub seconds: f64,
    /// Operations, or for a bulk stream bytes, in that time.
    pub done: u64,
    /// The same per second.
    pub per_second: f64,
    /// Operations that failed or were not answered in time, in the whole run.
    pub failed: u64,
    /// How long an operation took; missing for a bulk stream and for packets.
    pub latency: Option<Latency>,
}

/// Microseconds of an operation.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// The middle one.
    pub p50: f64,
    /// 90 of 100 were shorter.
    pub p90: f64,
    /// 99 of 100 were shorter.
    pub p99: f64,
    /// 999 of 1,000 were shorter.
    pub p999: f64,
    /// The longest.
    pub max: f64,
}

/// What is counted while a run lasts. Operations that end before `from` are warm-up.
pub(crate) struct Tally {
    from: Instant,
    until: Instant,
    done: u64,
    failed: u64,
    nanoseconds: Histogram<u64>,
}

impl Tally {
    fn new(load: &Load) -> Result<Self> {
        let from = Instant::now() + Duration::from_secs_f64(load.warm_up);
        // From 1 us to a minute, to three digits.
        let nanoseconds = Histogram::new_with_bounds(1_000, 60_000_000_000, 3)?;
        let until = from + Duration::from_secs_f64(load.seconds);
        Ok(Self { from, until, done: 0, failed: 0, nanoseconds })
    }

    /// One operation that began at `begun` has ended.
    fn count(&mut self, begun: Instant, now: Instant) {
        if now >= self.from && now < self.until {
            self.done += 1;
            let took = now.duration_since(begun).as_nanos().try_into().unwrap_or(u64::MAX);
            self.nanoseconds.saturating_record(took);
        }
    }

    fn latency(&self) -> Option<Latency> {
        let at = |quantile| self.nanoseconds.value_at_quantile(quantile) as f64 / 1e3;
        (!self.nanoseconds.is_empty()).then(|| Latency {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: self.nanoseconds.max() as f64 / 1e3,
        })
    }
}

impl Load {
    /// Runs it to its end.
    ///
    /// # Errors
    /// If it cannot begin. An operation that fails is counted instead.
    pub fn run(&self) -> Result<Outcome> {
        let longest = LONGEST.as_secs_f64();
        ensure!(
            self.seconds > 0.0 && self.seconds <= longest,
            "--seconds must be above 0 and at most {longest}"
        );
        ensure!((0.0..=longest).contains(&self.warm_up), "--warm-up must be 0 to {longest}");
        ensure!((1..=4096).contains(&self.flows), "--flows must be 1 to 4096");
        if let Some(cpu) = self.cpu {
            pin(cpu)?;
        }
        let mut tally = Tally::new(self)?;
        match self.mode {
            Mode::Bulk => bulk::run(self, &mut tally)?,
            Mode::ConnectRequestClose
            | Mode::TcpRequestResponse
            | Mode::UdpRequestResponse
            | Mode::Packets => {
                client::run(self, &mut tally)?;
            }
        }
        Ok(Outcome {
            mode: self.mode,
            flows: self.flows,
            seconds: self.seconds,
            done: tally.done,
            per_second: tally.done as f64 / self.seconds,
            failed: tally.failed,
            latency: tally.latency().filter(|_| self.mode != Mode::Packets),
        })
    }
}

/// Keeps the calling thread, and those it starts from then on, on one CPU.
///
/// # Errors
/// If there is no such CPU.
pub fn pin(cpu: usize) -> Result<()> {
    ensure!(cpu < libc::CPU_SETSIZE as usize, "there is no CPU {cpu}");
    // SAFETY: all zero is an empty set; the index was checked; the kernel reads the set while the call lasts.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    ensure!(result == 0, "CPU {cpu}: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Reads what `portolan-load run` printed.
///
/// # Errors
/// If it is something else.
pub fn parse(text: &str) -> Result<Outcome> {
    serde_json::from_str(text.trim()).with_context(|| format!("not the result of a load run: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Runs a load against a server on loopback.
    fn against_a_server(mode: Mode) -> Outcome {
        let mut server = Server::bind(Ipv4Addr::LOCALHOST.into(), None).unwrap();
        let port = server.ports().of(mode);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let serving = std::thread::spawn(move || server.serve(|| stopped.load(Ordering::Relaxed)));
        let to = (Ipv4Addr::LOCALHOST, port).into();
        let outcome = Load { mode, to, flows: 16, seconds: 0.2, warm_up: 0.05, cpu: None }.run().unwrap();
        stop.store(true, Ordering::Relaxed);
        serving.join().unwrap().unwrap();
        outcome
    }

    #[test]
    fn every_mode_counts_what_the_server_answers() {
        for mode in [Mode::ConnectRequestClose, Mode::TcpRequestResponse, Mode::UdpRequestResponse] {
            let outcome = against_a_server(mode);
            let latency = outcome.latency.unwrap();
            assert!(outcome.done > 16 && outcome.failed == 0, "{outcome:?}");
            assert!(
                0.0 < latency.p50 && latency.p50 <= latency.p99 && latency.p99 <= latency.max,
                "{latency:?}"
            );
        }
        let packets = against_a_server(Mode::Packets);
        assert!(packets.done > 100 && packets.failed == 0 && packets.latency.is_none(), "{packets:?}");
        let bulk = against_a_server(Mode::Bulk);
        assert!(bulk.done > 1_000_000 && bulk.latency.is_none(), "{bulk:?}");
    }

    #[test]
    fn a_run_ends_on_time_where_nobody_answers() {
        // A socket that never reads: requests are lost, and said to be.
        let silent = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = silent.local_addr().unwrap();
        let begun = Instant::now();
        let load =
            Load { mode: Mode::UdpRequestResponse, to, flows: 2, seconds: 0.7, warm_up: 0.0, cpu: None };
        let outcome = load.run().unwrap();
        assert!(outcome.done == 0 && outcome.failed >= 2, "{outcome:?}");
        assert!(begun.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn a_refused_connection_is_a_failure_and_not_the_end() {
        let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let load = Load {
            mode: Mode::ConnectRequestClose,
            to: free,
            flows: 2,
            seconds: 0.3,
            warm_up: 0.0,
            cpu: None,
        };
        let outcome = load.run().unwrap();
        assert!(outcome.done == 0 && outcome.failed > 0, "{outcome:?}");
    }

    #[test]
    fn the_answers_are_what_an_http_client_waits_for() {
        for (answer, closes) in [(ANSWER, false), (CLOSING_ANSWER, true)] {
            let text = std::str::from_utf8(answer).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 200 "));
            assert!(head.ends_with(&format!("Content-Length: {}", body.len())));
            assert_eq!(head.contains("Connection: close"), closes);
        }
    }

    #[test]
    fn a_result_is_read_as_it_was_printed() {
        let outcome = Outcome {
            mode: Mode::Bulk,
            flows: 4,
            seconds: 2.0,
            done: 10,
            per_second: 5.0,
            failed: 0,
            latency: None,
        };
        let text = serde_json::to_string(&outcome).unwrap();
        assert!(text.contains("\"bulk\""));
        assert_eq!(parse(&text).unwrap().done, 10);
        assert!(parse("ready").is_err());
    }
}
