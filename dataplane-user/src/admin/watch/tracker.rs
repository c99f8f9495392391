//! When flows began and were established: what an event itself does not say, a reader knows that has followed the flow from its first
//! packet.

use dataplane_common::event::{Event, EventKind};
use dataplane_common::{Addr, Port};
use std::collections::HashMap;

/// How many flows are kept in mind. With more the oldest half is forgotten: of those it is not told how long they took.
const MOST: usize = 1 << 16;

/// What a flow is known by: the client, and what it called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ends {
    pub(super) client: (Addr, Port),
    pub(super) frontend: (Addr, Port),
    pub(super) proto: u8,
}

/// The moments of a flow, in nanoseconds of the monotonic clock.
#[derive(Clone, Copy, Debug)]
struct Moments {
    begun: u64,
    established: Option<u64>,
}

/// How long a flow took, in nanoseconds, as far as that is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Times {
    pub(super) handshake: Option<u64>,
    pub(super) lasted: Option<u64>,
}

/// The flows that were seen to begin.
#[derive(Debug, Default)]
pub(super) struct Tracker(HashMap<Ends, Moments>);

impl Tracker {
    /// Notes an event of a flow. What is known of its times by then.
    pub(super) fn follow(&mut self, kind: EventKind, ends: Ends, event: &Event) -> Times {
        match kind {
            EventKind::Begun => {
                self.make_room();
                self.0.insert(ends, Moments { begun: event.time, established: None });
                Times::default()
            }
            // The client waits from its first packet on.
            EventKind::Moved | EventKind::Refused | EventKind::Dropped | EventKind::Packet => {
                Times::default()
            }
            EventKind::Established => {
                let Some(known) = self.0.get_mut(&ends) else { return Times::default() };
                known.established = Some(event.time);
                Times { handshake: Some(event.time.saturating_sub(known.begun)), lasted: None }
            }
            EventKind::Ended => {
                let Some(known) = self.0.remove(&ends) else { return Times::default() };
                let since = |moment: u64| moment.saturating_sub(known.begun);
                Times { handshake: known.established.map(since), lasted: Some(since(event.time)) }
            }
        }
    }

    fn make_room(&mut self) {
        if self.0.len() < MOST {
            return;
        }
        let mut begun: Vec<_> = self.0.values().map(|moments| moments.begun).collect();
        let (_, middle, _) = begun.select_nth_unstable(MOST / 2);
        let middle = *middle;
        self.0.retain(|_, moments| moments.begun > middle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable as _;

    fn ends(port: u16) -> Ends {
        let addr = Addr::from_v4([10, 0, 0, 1]);
        Ends { client: (addr, Port::new(port)), frontend: (addr, Port::new(80)), proto: 6 }
    }

    fn at(time: u64) -> Event {
        Event { time, ..Event::zeroed() }
    }

    #[test]
    fn times_are_told_of_flows_that_were_seen_to_begin() {
        let mut tracker = Tracker::default();
        tracker.follow(EventKind::Begun, ends(1), &at(1_000));
        tracker.follow(EventKind::Moved, ends(1), &at(2_000));
        let established = tracker.follow(EventKind::Established, ends(1), &at(5_000));
        assert_eq!(established, Times { handshake: Some(4_000), lasted: None });
        let ended = tracker.follow(EventKind::Ended, ends(1), &at(9_000));
        assert_eq!(ended, Times { handshake: Some(4_000), lasted: Some(8_000) });
        assert_eq!(tracker.follow(EventKind::Ended, ends(1), &at(9_000)), Times::default());
        assert_eq!(tracker.follow(EventKind::Established, ends(2), &at(9_000)), Times::default());
    }

    #[test]
    fn the_oldest_are_forgotten_where_there_are_too_many() {
        let mut tracker = Tracker::default();
        for number in 0..=MOST as u64 {
            let mut ends = ends(number as u16);
            ends.proto = (number >> 16) as u8;
            tracker.follow(EventKind::Begun, ends, &at(number));
        }
        assert!(tracker.0.len() <= MOST / 2 + 1, "{}", tracker.0.len());
        assert_eq!(tracker.follow(EventKind::Ended, Ends { proto: 0, ..ends(1) }, &at(9)), Times::default());
    }
}
