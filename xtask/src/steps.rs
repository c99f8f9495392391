//! Which step of how many runs, and since when: what whoever waits wants to know.

use std::fmt::Display;
use std::time::{Duration, Instant};

/// The steps of a verb that takes minutes.
#[derive(Debug)]
pub(crate) struct Steps {
    total: usize,
    begun: usize,
    start: Instant,
}

impl Steps {
    /// Of that many steps, none of which has begun.
    pub(crate) fn new(total: usize) -> Self {
        Self { total, begun: 0, start: Instant::now() }
    }

    /// Says that the next one begins.
    pub(crate) fn begin(&mut self, what: impl Display) {
        self.begun += 1;
        println!("\n=== {}", self.line(what, self.start.elapsed()));
    }

    /// How long all of them have taken so far, as minutes and seconds.
    pub(crate) fn elapsed(&self) -> String {
        clock(self.start.elapsed())
    }

    fn line(&self, what: impl Display, elapsed: Duration) -> String {
        format!("step {} of {}, after {}: {what}", self.begun, self.total, clock(elapsed))
    }
}

/// Minutes and seconds: `4:07`.
pub(crate) fn clock(time: Duration) -> String {
    format!("{}:{:02}", time.as_secs() / 60, time.as_secs() % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_told_with_its_number_and_the_time_since_the_start() {
        let mut steps = Steps::new(3);
        steps.begin("one");
        steps.begin("two");
        assert_eq!(steps.line("two", Duration::from_secs(247)), "step 2 of 3, after 4:07: two");
    }
}
