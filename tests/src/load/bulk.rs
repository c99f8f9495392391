//! Bulk streams: a thread for each flow, which writes as much as goes through.

use super::{Load, Tally};
use anyhow::Result;
use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Bytes of one write.
const WRITE: usize = 128 * 1024;
/// Nothing waits longer than this.
const PATIENCE: Duration = Duration::from_millis(500);

pub(super) fn run(load: &Load, tally: &mut Tally) -> Result<()> {
    let (from, until) = (tally.from, tally.until);
    std::thread::scope(|scope| {
        let flows: Vec<_> = (0..load.flows).map(|_| scope.spawn(|| stream(load, from, until))).collect();
        for flow in flows {
            match flow.join() {
                Ok(Ok(bytes)) => tally.done += bytes,
                Ok(Err(_)) | Err(_) => tally.failed += 1,
            }
        }
    });
    Ok(())
}

/// The bytes that the kernel took between the two times. Its buffers are as full at the one as at the other.
fn stream(load: &Load, from: Instant, until: Instant) -> std::io::Result<u64> {
    let mut stream = TcpStream::connect_timeout(&load.to, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let block = vec![b'b'; WRITE];
    let mut bytes = 0;
    loop {
        let written = stream.write(&block)?;
        let now = Instant::now();
        if now >= until {
            return Ok(bytes);
        }
        if now >= from {
            bytes += written as u64;
        }
    }
}
