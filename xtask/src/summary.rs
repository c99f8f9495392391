//! Counting tests by what libtest prints.

use std::fmt;
use std::ops::AddAssign;

/// How the tests of some programs ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    /// Marked `#[ignore]`: nobody ran them, so they count as failed in the end.
    pub(crate) ignored: u32,
}

impl Summary {
    /// One thing that failed without being a test, such as a program that does not compile.
    pub(crate) const ONE_FAILURE: Self = Self { passed: 0, failed: 1, ignored: 0 };

    /// What a line says, if it is the closing line of one test program:
    /// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`.
    pub(crate) fn of_line(line: &str) -> Option<Self> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let count = |word: &str| {
            let part = counts.split("; ").find_map(|part| part.trim().strip_suffix(word))?;
            part.trim().parse().ok()
        };
        Some(Self { passed: count("passed")?, failed: count("failed")?, ignored: count("ignored")? })
    }

    /// The closing line of a test program with these tests.
    pub(crate) fn closing_line(self) -> String {
        let result = if self.failed == 0 { "ok" } else { "FAILED" };
        let Self { passed, failed, ignored } = self;
        format!("test result: {result}. {passed} passed; {failed} failed; {ignored} ignored")
    }

    /// How many tests there were.
    pub(crate) fn tests(&self) -> u32 {
        self.passed + self.failed + self.ignored
    }

    /// Whether all is well: tests were run, and all of them passed.
    pub(crate) fn is_good(&self) -> bool {
        self.passed > 0 && self.failed == 0 && self.ignored == 0
    }
}

impl AddAssign for Summary {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed + self.ignored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closing_line_of_a_test_program_is_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.10s";
        assert_eq!(Summary::of_line(line), Some(Summary { passed: 12, failed: 3, ignored: 1 }));
        assert_eq!(Summary::of_line("test t ... ok"), None);
        let summary = Summary { passed: 2, failed: 1, ignored: 4 };
        assert_eq!(Summary::of_line(&summary.closing_line()), Some(summary));
        assert_eq!(Summary::of_line("test result: nonsense"), None);
    }

    #[test]
    fn a_test_that_nobody_ran_is_not_good() {
        assert!(!Summary { passed: 5, failed: 0, ignored: 1 }.is_good());
        assert!(!Summary::default().is_good());
        assert!(Summary { passed: 1, ..Summary::default() }.is_good());
        assert_eq!(Summary { passed: 5, failed: 1, ignored: 1 }.to_string(), "5 passed, 2 failed");
    }
}
