//! What `/proc` says of the agent itself, under the names that Prometheus' clients give it.

use super::family::{CPU_SECONDS, OPEN_FDS, RESIDENT, Text};
use std::fs;

/// Ticks per second of the times in `/proc`, on all architectures (`USER_HZ`).
const USER_HZ: f64 = 100.0;

/// What cannot be read is left out.
pub(super) fn write(text: &mut Text) {
    if let Some(seconds) = cpu_seconds() {
        text.single(&CPU_SECONDS, seconds);
    }
    if let Some(bytes) = resident() {
        text.single(&RESIDENT, bytes);
    }
    if let Ok(fds) = fs::read_dir("/proc/self/fd") {
        // One of them is of this very look.
        text.single(&OPEN_FDS, fds.count().saturating_sub(1));
    }
}

fn cpu_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // Behind the name, which may hold anything, utime and stime are the 12th and 13th field.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / USER_HZ)
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
        assert!(text.into_string().contains("\nprocess_open_fds "));
    }
}
