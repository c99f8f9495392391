//! The targets B1 to B13, what measurements say of them, and the one line that each comes to. No I/O.

use serde::{Deserialize, Serialize};
use std::fmt;

/// How many targets there are: B1 to B13.
pub const TARGETS: u8 = 13;

/// Something measured several times: the median, and the extremes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// The middle one.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Ratio {
    /// Of values as they are; `None` without any.
    pub fn among(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { median, min, max })
    }

    /// Of one leg over another round by round; `None` if there is no round in which both were measured.
    pub fn of(leg: &[Option<f64>], other: &[Option<f64>]) -> Option<Self> {
        let both = leg.iter().zip(other).filter_map(|(leg, other)| leg.zip(*other));
        Self::among(both.filter(|(_, other)| *other > 0.0).map(|(leg, other)| leg / other))
    }

    /// A number that is the same however often it is measured.
    pub fn exactly(value: f64) -> Self {
        Self { median: value, min: value, max: value }
    }
}

/// A number with as many digits as tell something.
pub fn digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        ..10.0 => format!("{value:.3}"),
        10.0..1_000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}..{}]", digits(self.median), digits(self.min), digits(self.max))
    }
}

/// What became of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is met.
    Met,
    /// Something that it needs did not run.
    NotRun,
    /// It is missed.
    Missed,
}

impl Verdict {
    /// As it is printed.
    pub fn word(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::NotRun => "not-run",
            Self::Missed => "missed",
        }
    }
}

/// Which side of a limit is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// The value must not be less.
    AtLeast,
    /// The value must not be more.
    AtMost,
}

/// What a target asks of one value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// Which side is good.
    pub bound: Bound,
    /// The limit itself.
    pub value: f64,
    /// In what, such as `ms`, or what it is a multiple of.
    pub unit: String,
}

impl Limit {
    /// Not less than this.
    pub fn at_least(value: f64, unit: &str) -> Self {
        Self { bound: Bound::AtLeast, value, unit: unit.into() }
    }

    /// Not more than this.
    pub fn at_most(value: f64, unit: &str) -> Self {
        Self { bound: Bound::AtMost, value, unit: unit.into() }
    }

    /// Whether a value keeps to it.
    pub fn holds(&self, value: f64) -> bool {
        match self.bound {
            Bound::AtLeast => value >= self.value,
            Bound::AtMost => value <= self.value,
        }
    }

    /// How far a value is on the good side, as a part of the limit; negative on the bad one.
    fn margin(&self, value: f64) -> f64 {
        match self.bound {
            Bound::AtLeast => value / self.value - 1.0,
            Bound::AtMost => 1.0 - value / self.value,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.bound {
            Bound::AtLeast => ">=",
            Bound::AtMost => "<=",
        };
        write!(f, "{sign} {} {}", self.value, self.unit)
    }
}

/// What one measurement says of a target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// Its number, such as `B1`.
    pub target: String,
    /// What was measured, or is compared with what.
    pub what: String,
    /// What came out.
    pub value: Option<Ratio>,
    /// What is asked.
    pub limit: Limit,
    /// Whether it is met.
    pub verdict: Verdict,
}

impl Judgement {
    /// Judges by the median.
    pub fn new(target: &str, what: impl Into<String>, value: Option<Ratio>, limit: Limit) -> Self {
        let verdict = match value {
            Some(value) if limit.holds(value.median) => Verdict::Met,
            Some(_) => Verdict::Missed,
            None => Verdict::NotRun,
        };
        Self { target: target.into(), what: what.into(), value, limit, verdict }
    }

    /// Whether it was measured and is not what it should be.
    pub fn is_missed(&self) -> bool {
        self.verdict == Verdict::Missed
    }

    /// The same, of a run that proves nothing.
    #[must_use]
    pub fn voided(mut self) -> Self {
        self.verdict = Verdict::NotRun;
        self
    }

    fn margin(&self) -> f64 {
        self.value.map_or(f64::INFINITY, |value| self.limit.margin(value.median))
    }
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, what, limit, verdict, .. } = self;
        let value = self.value.map_or_else(|| "-".into(), |value| value.to_string());
        write!(f, "{target:<3} {:<7} {value:<24} {limit}: {what}", verdict.word())
    }
}

/// One line per target: of all that was measured for it, what is closest to its limit or farthest beyond.
///
/// A target is missed if one of its parts is, else not run if one was not.
pub fn lines(judgements: &[Judgement]) -> Vec<String> {
    (1..=TARGETS)
        .map(|number| {
            let target = format!("B{number}");
            let parts: Vec<_> = judgements.iter().filter(|part| part.target == target).collect();
            let Some(verdict) = parts.iter().map(|part| part.verdict).max() else {
                return format!("{target} {} - nothing was measured", Verdict::NotRun.word());
            };
            let met = parts.iter().filter(|part| part.verdict == Verdict::Met).count();
            let of_verdict = parts.iter().filter(|part| part.verdict == verdict);
            let Some(worst) = of_verdict.min_by(|a, b| a.margin().total_cmp(&b.margin())) else {
                return String::new();
            };
            let value = worst.value.map_or_else(|| "-".into(), |value| value.to_string());
            let Judgement { limit, what, .. } = worst;
            format!("{target} {} {value} {limit}: {what} ({met} of {} met)", verdict.word(), parts.len())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_the_median_of_the_rounds() {
        let some = |rates: &[f64]| rates.iter().copied().map(Some).collect::<Vec<_>>();
        let ratio = Ratio::of(&some(&[1.0, 4.0, 3.0]), &some(&[2.0, 2.0, 2.0])).unwrap();
        assert_eq!(ratio, Ratio { median: 1.5, min: 0.5, max: 2.0 });
        let ratio = Ratio::of(&[Some(1.0), None], &some(&[2.0, 2.0])).unwrap();
        assert_eq!(ratio.median, 0.5);
        assert_eq!(Ratio::of(&[None], &[Some(1.0)]), None);
        assert_eq!(Ratio::of(&[Some(1.0)], &[Some(0.0)]), None);
        assert_eq!(Ratio::among([1.0, 2.0]).unwrap().median, 1.5);
    }

    #[test]
    fn a_target_has_one_line_and_its_worst_part_decides() {
        let part = |value: Option<f64>, limit: Limit| {
            Judgement::new("B1", "this over that", value.map(Ratio::exactly), limit)
        };
        let all = [
            part(Some(1.5), Limit::at_least(0.98, "x")),
            part(Some(1.0), Limit::at_least(0.98, "x")),
            part(None, Limit::at_least(1.2, "x")),
            Judgement::new("B8", "a program", Some(Ratio::exactly(90.0)), Limit::at_most(84.0, "")),
        ];
        let told = lines(&all);
        assert_eq!(told.len(), 13);
        assert_eq!(told[0], "B1 not-run - >= 1.2 x: this over that (2 of 3 met)");
        assert!(told[1].starts_with("B2 not-run"));
        assert!(told[7].starts_with("B8 missed 90.0 [90.0..90.0] <= 84"), "{}", told[7]);
        assert!(lines(&all[..2])[0].starts_with("B1 met 1.000 "), "{}", lines(&all[..2])[0]);
    }

    #[test]
    fn numbers_have_the_digits_that_tell_something() {
        let all = [0.0, 0.5, 9.999, 12.34, 1234.5].map(digits);
        assert_eq!(all, ["0", "0.500", "9.999", "12.3", "1234"]);
    }
}
