//! `connect(2)`, again and again, and nothing else: what a socket hook costs.

use super::pin;
use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Calls for UDP that are timed as one: a single one is too short for the clock.
const UDP_CALLS: u32 = 16;
/// The shortest and the longest time of a call that is told from others, in nanoseconds.
const CALL: [u64; 2] = [10, 60_000_000_000];

/// One run of it.
#[derive(Clone, Debug, clap::Args)]
pub struct Connect {
    /// The server's address and port.
    #[arg(long)]
    pub to: SocketAddr,
    /// Seconds that are measured.
    #[arg(long, default_value_t = 1.0)]
    pub seconds: f64,
    /// One UDP socket, connected anew each time; else a TCP connection, closed at once.
    #[arg(long)]
    pub udp: bool,
    /// The CPU of the client.
    #[arg(long)]
    pub cpu: Option<usize>,
}

/// What it measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectOutcome {
    /// Calls.
    pub done: u64,
    /// Nanoseconds of the middle call. What interrupts some of them says nothing of a hook.
    pub nanoseconds: u64,
}

impl Connect {
    /// Runs it to its end.
    ///
    /// # Errors
    /// If a connection is refused.
    pub fn run(&self) -> Result<ConnectOutcome> {
        ensure!(self.seconds > 0.0 && self.seconds <= 600.0, "--seconds must be above 0 and at most 600");
        self.cpu.map_or(Ok(()), pin)?;
        let datagrams =
            self.udp.then(|| Socket::new(Domain::for_address(self.to), Type::DGRAM, None)).transpose()?;
        let (calls, length) = (if self.udp { UDP_CALLS } else { 1 }, Duration::from_secs_f64(self.seconds));
        let [shortest, longest] = CALL;
        let mut nanoseconds = Histogram::<u64>::new_with_bounds(shortest, longest, 3)?;
        let begun = Instant::now();
        while begun.elapsed() < length {
            let took = match &datagrams {
                Some(socket) => self.connect_again(socket),
                None => self.connect_and_reset(),
            };
            let took = took.with_context(|| self.to.to_string())? / calls;
            nanoseconds.saturating_record(took.as_nanos().try_into().unwrap_or(u64::MAX));
        }
        let done = nanoseconds.len() * u64::from(calls);
        Ok(ConnectOutcome { done, nanoseconds: nanoseconds.value_at_quantile(0.5) })
    }

    /// How long the calls of one sample took.
    fn connect_again(&self, socket: &Socket) -> io::Result<Duration> {
        let (to, begun) = (self.to.into(), Instant::now());
        (0..UDP_CALLS).try_for_each(|_| socket.connect(&to))?;
        Ok(begun.elapsed())
    }

    /// How long the call took. Closes with a reset, so that no port waits.
    fn connect_and_reset(&self) -> io::Result<Duration> {
        let (to, socket) = (self.to.into(), Socket::new(Domain::for_address(self.to), Type::STREAM, None)?);
        socket.set_linger(Some(Duration::ZERO))?;
        let begun = Instant::now();
        socket.connect(&to)?;
        Ok(begun.elapsed())
    }
}

/// A server of connections that nobody speaks on. It looks for them now and then, so no connection wakes it, and none pays
/// for that; and it has room for many more than can come meanwhile: where there is no room, the client's kernel tries again
/// after a second.
#[derive(Clone, Debug, clap::Args)]
pub struct ConnectServer {
    /// The port.
    #[arg(long, default_value_t = 7000)]
    pub port: u16,
    /// The CPU of the server.
    #[arg(long)]
    pub cpu: Option<usize>,
}

impl ConnectServer {
    /// Connections that have room at once; `net.core.somaxconn` allows as many.
    const ROOM: i32 = 4096;
    /// How often it looks for them.
    const PERIOD: Duration = Duration::from_millis(5);

    /// Accepts and closes until the process ends; calls `listening` when it begins.
    ///
    /// # Errors
    /// If the port is taken, or the kernel refuses connections.
    pub fn serve(&self, address: IpAddr, listening: impl FnOnce()) -> Result<()> {
        self.cpu.map_or(Ok(()), pin)?;
        let here = SocketAddr::from((address, self.port));
        let listener = Socket::new(Domain::for_address(here), Type::STREAM, None)?;
        listener.set_reuse_address(true)?;
        listener.set_nonblocking(true)?;
        listener.bind(&here.into()).with_context(|| here.to_string())?;
        listener.listen(Self::ROOM)?;
        listening();
        loop {
            match listener.accept() {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Self::PERIOD),
                Err(error) => return Err(error).context("accepting connections"),
            }
        }
    }
}
