//! A server that sets the pace: it answers each request when a known time has passed. Whatever the client is, it is told the
//! same, so two load tools that measure rightly measure the same here, however much work a request is to them.
//!
//! A thread for each connection: the kernel's timers wake them. Waits are spread evenly, so that requests do not come in
//! herds, and the middle one and the 99th of 100 are known.

use super::{ANSWER, CLOSING_ANSWER, REQUEST};
use anyhow::{Context, Result};
use socket2::SockRef;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// The shortest and the longest wait. They are long enough that the clients' CPU has little to do; and the longest is less than
/// twice the mean: beyond that wrk adds to its latencies what others would have met meanwhile, which the load tool does not.
const WAITS: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(15)];

/// How long a server waits before so many of 100 of its answers at most.
pub fn wait_at(percent: f64) -> Duration {
    let [shortest, longest] = WAITS;
    shortest + (longest - shortest).mul_f64(percent / 100.0)
}

/// A server that listens.
pub struct PacedServer {
    staying: TcpListener,
    closing: TcpListener,
}

impl PacedServer {
    /// Listens on `first`, where connections stay, and on the port after it, where each ends with its answer.
    ///
    /// # Errors
    /// If a port is taken.
    pub fn bind(address: IpAddr, first: u16) -> Result<Self> {
        let listen =
            |port: u16| TcpListener::bind((address, port)).with_context(|| format!("TCP port {port}"));
        Ok(Self { staying: listen(first)?, closing: listen(first + 1)? })
    }

    /// Serves until the process ends.
    ///
    /// # Errors
    /// If the kernel refuses connections.
    pub fn serve(self) -> Result<()> {
        let Self { staying, closing } = self;
        let stays = thread::spawn(move || accept(&staying, stay));
        accept(&closing, answer_and_close)?;
        stays.join().map_err(|_| anyhow::anyhow!("a server's thread is gone"))?
    }
}

/// Gives each connection a thread, and its number.
fn accept(listener: &TcpListener, serve: fn(TcpStream, u64) -> std::io::Result<()>) -> Result<()> {
    for number in 0.. {
        let (stream, _) = listener.accept().context("accepting connections")?;
        stream.set_nodelay(true)?;
        // A client that goes away ends its thread.
        thread::spawn(move || serve(stream, number));
    }
    Ok(())
}

fn stay(mut stream: TcpStream, connection: u64) -> std::io::Result<()> {
    for request in 0.. {
        wait_for_request(&mut stream, connection * CONNECTION_STEP + request)?;
        stream.write_all(ANSWER)?;
    }
    Ok(())
}

/// Answer and end are one segment, so the client never closes first, and its port waits for nothing.
fn answer_and_close(mut stream: TcpStream, connection: u64) -> std::io::Result<()> {
    wait_for_request(&mut stream, connection)?;
    SockRef::from(&stream).send_with_flags(CLOSING_ANSWER, libc::MSG_MORE).map(drop)
}

/// What keeps the waits of connections apart that begin together.
const CONNECTION_STEP: u64 = 7_919;

fn wait_for_request(stream: &mut TcpStream, number: u64) -> std::io::Result<()> {
    stream.read_exact(&mut [0; REQUEST])?;
    let read = Instant::now();
    thread::sleep((read + wait(number)).saturating_duration_since(Instant::now()));
    Ok(())
}

/// The wait before answer number `number`: multiples of the golden section are spread evenly, however many are taken.
fn wait(number: u64) -> Duration {
    const GOLDEN_SECTION: f64 = 0.618_033_988_749_894_9;
    wait_at((number as f64 * GOLDEN_SECTION).fract() * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_spread_evenly() {
        for connection in [0, 1, 31] {
            let waits = (0..1_000).map(|request| wait(connection * CONNECTION_STEP + request));
            let mut waits: Vec<_> = waits.collect();
            waits.sort();
            for (rank, percent) in [(10, 1.0), (500, 50.0), (990, 99.0)] {
                let off = waits[rank].abs_diff(wait_at(percent));
                assert!(off < Duration::from_micros(100), "{percent}: {:?}", waits[rank]);
            }
        }
    }
}
