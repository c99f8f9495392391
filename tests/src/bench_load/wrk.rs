//! wrk: how it is called, and what it prints.

use super::Found;
use crate::lab::Place;
use crate::load::REQUEST;
use anyhow::{Context, Result, ensure};
use std::net::SocketAddr;

pub(super) fn run(place: &Place, to: SocketAddr, flows: usize, seconds: u32) -> Result<Found> {
    // What wrk sends of itself, and a header that makes it as long as the load tool's request.
    let bare = format!("GET / HTTP/1.1\r\nHost: {to}\r\n\r\n").len();
    let header = format!("P: {}", "x".repeat(REQUEST.saturating_sub(bare + "P: \r\n".len())));
    let (flows, seconds, url) = (flows.to_string(), format!("{seconds}s"), format!("http://{to}/"));
    let words = ["-c", "0", "wrk", "-t", "1", "-c", &flows, "-d", &seconds, "-H", &header, "--latency", &url];
    read(&place.run("taskset", &words)?)
}

/// Requests per second and latencies of what wrk prints.
fn read(text: &str) -> Result<Found> {
    let field = |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim);
    ensure!(field("Socket errors:").is_none(), "connections of wrk failed: {text}");
    let per_second = field("Requests/sec:").and_then(|rate| rate.parse().ok());
    let [p50, p99] = ["50%", "99%"].map(|name| field(name).and_then(microseconds));
    let all = per_second.zip(p50).zip(p99);
    let ((per_second, p50), p99) = all.with_context(|| format!("not what wrk prints: {text}"))?;
    Ok(Found { per_second, p50, p99 })
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
        let text = "  Latency Distribution\n     50%  410.00us\n     75%    1.20ms\n     90%    1.40ms\n     99%    2.00ms\n\
                    Requests/sec:  71234.56\n";
        assert_eq!(read(text).unwrap(), Found { per_second: 71_234.56, p50: 410.0, p99: 2_000.0 });
        assert_eq!(microseconds("1.20ms"), Some(1_200.0));
        assert_eq!(microseconds("2.00s"), Some(2_000_000.0));
        assert!(read("unable to connect").is_err());
        let failed = format!("{text}  Socket errors: connect 3, read 0, write 0, timeout 0\n");
        assert!(read(&failed).is_err());
    }
}
