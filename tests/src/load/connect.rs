//! `connect(2)`, again and again, and nothing else: what a socket hook costs.

use super::pin;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Calls between two looks at the clock.
const BETWEEN_LOOKS: u32 = 16;

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
    /// Calls per second.
    pub per_second: f64,
}

impl Connect {
    /// Runs it to its end.
    ///
    /// # Errors
    /// If a connection is refused.
    pub fn run(&self) -> Result<ConnectOutcome> {
        ensure!(self.seconds > 0.0 && self.seconds <= 600.0, "--seconds must be above 0 and at most 600");
        self.cpu.map_or(Ok(()), pin)?;
        let any: SocketAddr = match self.to {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let datagrams = self.udp.then(|| UdpSocket::bind(any)).transpose()?;
        let (begun, mut done) = (Instant::now(), 0);
        let length = Duration::from_secs_f64(self.seconds);
        while begun.elapsed() < length {
            for _ in 0..BETWEEN_LOOKS {
                match &datagrams {
                    Some(socket) => socket.connect(self.to),
                    None => connect_and_reset(self.to),
                }
                .with_context(|| self.to.to_string())?;
            }
            done += u64::from(BETWEEN_LOOKS);
        }
        Ok(ConnectOutcome { done, per_second: done as f64 / begun.elapsed().as_secs_f64() })
    }
}

/// Closes with a reset, so that no port waits.
fn connect_and_reset(to: SocketAddr) -> std::io::Result<()> {
    let stream = TcpStream::connect(to)?;
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: the kernel reads a `linger` that outlives the call, on a descriptor that is open.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
