//! Taking over from another proxy: the TCP connections that its netfilter rules translate are left to them until they end (C5).

use super::{JOB, Service};
use crate::kernel::conntrack::{self, ConntrackError};
use crate::kernel::maps::MapError;
use crate::sync::Maps;
use dataplane_common::node::Node;
use dataplane_common::tables::{Frontends, Nodes, Outgoings};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// Time between two looks at conntrack, which may be large.
const LOOK: Duration = Duration::from_secs(15);

/// What is known of another proxy's connections, as long as there may be some.
#[derive(Debug)]
pub(super) struct TakeOver {
    begun: Instant,
    /// `--take-over-limit`; zero: none.
    limit: Duration,
    looked: Option<Instant>,
    looking: Option<JoinHandle<Result<bool, ConntrackError>>>,
    /// Some were seen, and told of.
    seen: bool,
    /// A look failed, and that was told.
    failed: bool,
}

impl TakeOver {
    pub(super) fn new(begun: Instant, limit: Duration) -> Self {
        Self { begun, limit, looked: None, looking: None, seen: false, failed: false }
    }

    /// Whether those that live have had their time.
    fn is_out_of_time(&self, now: Instant) -> bool {
        !self.limit.is_zero() && now.duration_since(self.begun) >= self.limit
    }
}

/// Whether there may be some: no agent has written here before, or the last one still saw some.
///
/// # Errors
/// If the map cannot be read.
pub(in crate::agent) fn is_due(maps: &impl Maps) -> Result<bool, MapError> {
    let node = maps.get::<Nodes>(&0)?;
    Ok(node.is_none_or(|node| node.port_count == 0 || node.has(Node::TAKES_OVER)))
}

/// Notes what answers connections that netfilter translates to these source ports: no flow may have the same answers (P12).
///
/// # Errors
/// If conntrack does not tell them, or they cannot be written.
pub(in crate::agent) fn note_answers(
    maps: &impl Maps,
    ports: &[RangeInclusive<u16>],
) -> Result<(), ConntrackError> {
    // When they last left is not known, and is not asked for TCP.
    let noted: Vec<_> = conntrack::answers_to(ports)?.into_iter().map(|answer| (answer, 0)).collect();
    Ok(maps.write::<Outgoings>(&noted)?)
}

impl Service {
    /// Looks from time to time, beside the loop, and ends it when there are none.
    pub(super) async fn take_over(&mut self) {
        let Some(state) = &mut self.taking_over else { return };
        if state.is_out_of_time(Instant::now()) {
            tracing::warn!(
                "TCP connections are no longer left to another proxy: --take-over-limit has passed"
            );
            return self.end_take_over();
        }
        let due = state.looked.is_none_or(|looked| looked.elapsed() >= LOOK);
        match state.looking.take() {
            Some(looking) if !looking.is_finished() => state.looking = Some(looking),
            Some(looking) => {
                match looking.await {
                    Ok(Ok(true)) => {
                        if !std::mem::replace(&mut state.seen, true) {
                            tracing::info!(
                                "TCP connections that another proxy translates are left to it until they end"
                            );
                        }
                        return;
                    }
                    Ok(Ok(false)) if state.seen => {
                        tracing::info!("the last TCP connection that another proxy translated has ended");
                    }
                    Ok(Ok(false)) => {}
                    Ok(Err(error)) if error.is_final() => {
                        tracing::info!("no TCP connection is left to another proxy: {error}");
                    }
                    // Nobody knows: those that there may be are left to it until somebody does.
                    Ok(Err(error)) => {
                        if !std::mem::replace(&mut state.failed, true) {
                            tracing::warn!("looking again for another proxy's connections: {error}");
                        }
                        return;
                    }
                    Err(error) => return tracing::error!("looking for another proxy's connections: {error}"),
                }
                self.end_take_over();
            }
            // Before the programs see them all, the other proxy goes on making connections.
            None if due && self.health.is_attached() && self.hooks.is_none() => {
                state.looked = Some(Instant::now());
                let maps = self.dataplane.mirror().1.clone();
                let ports = self.dataplane.translated_ports();
                let beat = self.health.heartbeat().part("the look into conntrack", JOB);
                state.looking = Some(tokio::task::spawn_blocking(move || {
                    let _at_work = beat;
                    note_answers(&maps, &ports)?;
                    conntrack::translates_tcp_to(&maps.map::<Frontends>()?)
                }));
            }
            None => {}
        }
    }

    fn end_take_over(&mut self) {
        self.taking_over = None;
        self.metrics.taking_over.set(0);
        self.dataplane.end_take_over();
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::MemoryMaps;
    use bytemuck::Zeroable as _;

    /// C5
    #[test]
    fn connections_are_left_to_another_proxy_without_end_or_until_a_limit() {
        let (begun, day) = (Instant::now(), Duration::from_secs(86_400));
        assert!(!TakeOver::new(begun, Duration::ZERO).is_out_of_time(begun + 365 * day), "no limit");
        let limited = TakeOver::new(begun, day);
        assert!(!limited.is_out_of_time(begun + day - Duration::from_nanos(1)));
        assert!(limited.is_out_of_time(begun + day));
    }

    /// C5
    #[test]
    fn connections_are_taken_over_after_a_boot_and_until_they_have_ended() {
        let maps = MemoryMaps::default();
        assert!(is_due(&maps).unwrap(), "nothing was written yet");
        let written = |flags| Node { port_count: 1, flags, ..Node::zeroed() };
        maps.write::<Nodes>(&[(0, written(Node::TAKES_OVER | Node::FIB_SOURCE))]).unwrap();
        assert!(is_due(&maps).unwrap(), "the last agent saw some");
        maps.write::<Nodes>(&[(0, written(Node::FIB_SOURCE))]).unwrap();
        assert!(!is_due(&maps).unwrap(), "they have ended");
    }
}
