//! What `/proc` says of the agent itself, under the names that Prometheus' clients give it.

use super::family::{CPU_SECONDS, MAX_FDS, OPEN_FDS, RESIDENT, START_TIME, Text};
use std::fs;

/// Ticks per second of the times in `/proc`, on all architectures (`USER_HZ`).
const USER_HZ: f64 = 100.0;

/// What cannot be read is left out.
pub(super) fn write(text: &mut Text) {
    if let Some(seconds) = cpu_seconds() {
        text.single(&CPU_SECONDS, seconds);
    }
    if let Some(seconds) = start_time() {
        text.single(&START_TIME, seconds);
    }
    if let Some(bytes) = resident() {
        text.single(&RESIDENT, bytes);
    }
    if let Ok(fds) = fs::read_dir("/proc/self/fd") {
        // One of them is of this very look.
        text.single(&OPEN_FDS, fds.count().saturating_sub(1));
    }
    if let Some(fds) = max_fds() {
        text.single(&MAX_FDS, fds);
    }
}

/// A field of `/proc/self/stat` in seconds, counted from the first one behind the name, which may hold anything.
fn stat(field: usize) -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let ticks: f64 = stat.rsplit_once(')')?.1.split_whitespace().nth(field)?.parse().ok()?;
    Some(ticks / USER_HZ)
}

/// `utime` and `stime`.
fn cpu_seconds() -> Option<f64> {
    Some(stat(11)? + stat(12)?)
}

/// In seconds since 1970: `starttime` counts from the boot, whose moment is `btime`.
fn start_time() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(boot + stat(19)?)
}

/// `RLIMIT_NOFILE`, the soft limit.
fn max_fds() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_knows_its_own_size() {
        assert!(resident().unwrap() > 1 << 20);
        assert!(cpu_seconds().unwrap() >= 0.0);
        let mut text = Text::default();
        write(&mut text);
        let text = text.into_string();
        assert!(text.contains("\nprocess_open_fds ") && text.contains("\nprocess_max_fds "), "{text}");
        let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let age = now.as_secs_f64() - start_time().unwrap();
        assert!((-2.0..3_600.0).contains(&age), "the tests began {age} s ago");
    }
}
