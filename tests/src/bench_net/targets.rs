//! The targets B1 to B5, judged from what was measured. No I/O.

use super::{Case, Leg, Series, Way};
use crate::load::Mode;
use serde::{Deserialize, Serialize};

/// A ratio of two legs: the median of the rounds, and the extremes.
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
    /// Round by round; `None` if there is no round in which both were measured.
    pub fn of(leg: &[Option<f64>], other: &[Option<f64>]) -> Option<Self> {
        let both = leg.iter().zip(other).filter_map(|(leg, other)| leg.zip(*other));
        let mut ratios: Vec<f64> =
            both.filter(|(_, other)| *other > 0.0).map(|(leg, other)| leg / other).collect();
        ratios.sort_by(f64::total_cmp);
        let (min, max) = (*ratios.first()?, *ratios.last()?);
        let middle = ratios.len() / 2;
        let median = if ratios.len() % 2 == 1 {
            ratios[middle]
        } else {
            f64::midpoint(ratios[middle - 1], ratios[middle])
        };
        Some(Self { median, min, max })
    }
}

impl std::fmt::Display for Ratio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.3} [{:.3}..{:.3}]", self.median, self.min, self.max)
    }
}

/// What became of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is met.
    Met,
    /// It is missed.
    Missed,
    /// Something that it needs did not run.
    NotRun,
}

/// One target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// Its number, such as `B1`.
    pub target: String,
    /// What is compared with what.
    pub what: String,
    /// The ratio.
    pub ratio: Option<Ratio>,
    /// The least that meets it.
    pub at_least: f64,
    /// Whether it does.
    pub verdict: Verdict,
}

impl std::fmt::Display for Judgement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = match self.verdict {
            Verdict::Met => "met",
            Verdict::Missed => "MISSED",
            Verdict::NotRun => "not-run",
        };
        let ratio = self.ratio.map_or_else(|| "-".into(), |ratio| ratio.to_string());
        write!(f, "{} {verdict:<7} {ratio:<22} >= {:.2}  {}", self.target, self.at_least, self.what)
    }
}

/// A/A: outside of this the run is void.
const SAME: std::ops::RangeInclusive<f64> = 0.95..=1.05;

/// The ratios of the second direct leg to the first that are not what they should be.
pub(super) fn void(series: &[Series]) -> Vec<String> {
    let again = series.iter().filter(|series| series.leg == Leg::DirectAgain);
    again
        .filter_map(|again| {
            let ratio = ratio(series, again.case, Leg::DirectAgain, Leg::Direct);
            match ratio {
                Some(ratio) if SAME.contains(&ratio.median) => None,
                Some(ratio) => Some(format!("{}: direct over direct is {ratio}", again.case)),
                None => Some(format!("{}: direct did not run", again.case)),
            }
        })
        .collect()
}

fn ratio(series: &[Series], case: Case, leg: Leg, other: Leg) -> Option<Ratio> {
    let rates =
        |leg| series.iter().find(|series| series.case == case && series.leg == leg).map(Series::rates);
    Ratio::of(&rates(leg)?, &rates(other)?)
}

/// Every target that this benchmark measures. `largest` is the largest size that was planned, `main` the one of all cases.
pub(super) fn judge(series: &[Series], smallest: usize, main: usize, largest: usize) -> Vec<Judgement> {
    let mut all = Vec::new();
    let mut push = |target: &str, what: String, ratio: Option<Ratio>, at_least: f64| {
        let verdict = match ratio {
            Some(ratio) if ratio.median >= at_least => Verdict::Met,
            Some(_) => Verdict::Missed,
            None => Verdict::NotRun,
        };
        all.push(Judgement { target: target.into(), what, ratio, at_least, verdict });
    };
    let mut compare = |target: &str, case: Case, leg: Leg, other: Leg, at_least: f64| {
        let what = format!("{} over {}: {case}", leg.name(), other.name());
        push(target, what, ratio(series, case, leg, other), at_least);
    };
    let case = |way, mode, services| Case { way, mode, services };
    let connect = |services| case(Way::ClusterIp, Mode::ConnectRequestClose, services);
    let (nftables, iptables) = (Leg::KubeProxyNftables, Leg::KubeProxyIptables);
    let ours = [(Leg::PortolanSocket, 0.98), (Leg::PortolanPacket, 0.93)];
    for (leg, beside_direct) in ours {
        compare("B1", connect(10_000), leg, Leg::Direct, beside_direct);
        compare("B1", connect(1_000), leg, nftables, 1.20);
        compare("B1", connect(10_000), leg, iptables, 1.80);
    }
    for mode in [Mode::TcpRequestResponse, Mode::UdpRequestResponse] {
        for (leg, _) in ours {
            compare("B2", case(Way::ClusterIp, mode, main), leg, Leg::Direct, 0.98);
            compare("B2", case(Way::ClusterIp, mode, main), leg, nftables, 1.12);
        }
    }
    compare("B4", case(Way::NodePort, Mode::ConnectRequestClose, main), Leg::PortolanPacket, nftables, 1.30);
    for (leg, _) in ours {
        compare("B5", case(Way::ClusterIp, Mode::Bulk, main), leg, Leg::Direct, 0.97);
    }
    for (leg, _) in ours {
        let what = format!("{} at {largest} Services over {smallest}, each over direct", leg.name());
        push("B3", what, growth(series, leg, connect(largest), connect(smallest)), 0.97);
    }
    all.sort_by(|a, b| a.target.cmp(&b.target));
    all
}

/// How a leg's ratio to direct changes from one size to another, round by round.
fn growth(series: &[Series], leg: Leg, to: Case, from: Case) -> Option<Ratio> {
    let relative = |case| {
        let rates =
            |leg| series.iter().find(|series| series.case == case && series.leg == leg).map(Series::rates);
        let (rates, direct) = (rates(leg)?, rates(Leg::Direct)?);
        let pairs = rates.into_iter().zip(direct);
        Some(
            pairs
                .map(|(rate, direct)| rate.zip(direct).map(|(rate, direct)| rate / direct))
                .collect::<Vec<_>>(),
        )
    };
    Ratio::of(&relative(to)?, &relative(from)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONNECT: Case = Case { way: Way::ClusterIp, mode: Mode::ConnectRequestClose, services: 10_000 };

    fn series(case: Case, leg: Leg, rates: &[f64]) -> Series {
        let mut series = Series::new(case, leg);
        for rate in rates {
            series.enter(Ok(crate::load::Outcome {
                mode: case.mode,
                flows: 1,
                seconds: 1.0,
                done: *rate as u64,
                per_second: *rate,
                failed: 0,
                latency: None,
            }));
        }
        series
    }

    #[test]
    fn a_ratio_is_the_median_of_the_rounds() {
        let some = |rates: &[f64]| rates.iter().copied().map(Some).collect::<Vec<_>>();
        let ratio = Ratio::of(&some(&[1.0, 4.0, 3.0]), &some(&[2.0, 2.0, 2.0])).unwrap();
        assert_eq!(ratio, Ratio { median: 1.5, min: 0.5, max: 2.0 });
        let ratio = Ratio::of(&[Some(1.0), None], &some(&[2.0, 2.0])).unwrap();
        assert_eq!(ratio.median, 0.5);
        assert_eq!(Ratio::of(&[None], &[Some(1.0)]), None);
        assert_eq!(Ratio::of(&[Some(1.0)], &[Some(0.0)]), None);
    }

    #[test]
    fn a_target_is_met_missed_or_not_run() {
        let measured = [
            series(CONNECT, Leg::Direct, &[100.0, 110.0]),
            series(CONNECT, Leg::PortolanSocket, &[99.0, 110.0]),
            series(CONNECT, Leg::PortolanPacket, &[90.0, 90.0]),
        ];
        let judged = judge(&measured, 10, 1_000, 30_000);
        let of = |start: &str| judged.iter().find(|j| j.what.starts_with(start)).unwrap().verdict;
        assert_eq!(of("portolan-socket over direct"), Verdict::Met);
        assert_eq!(of("portolan-packet over direct"), Verdict::Missed);
        assert_eq!(of("portolan-socket over kube-proxy-iptables"), Verdict::NotRun);
        for target in ["B1", "B2", "B3", "B4", "B5"] {
            assert!(judged.iter().any(|j| j.target == target), "{target}");
        }
    }

    #[test]
    fn a_run_whose_direct_legs_differ_is_void() {
        let direct = series(CONNECT, Leg::Direct, &[100.0]);
        assert!(void(&[direct.clone(), series(CONNECT, Leg::DirectAgain, &[104.0])]).is_empty());
        assert_eq!(void(&[direct.clone(), series(CONNECT, Leg::DirectAgain, &[94.0])]).len(), 1);
        assert_eq!(void(&[direct, series(CONNECT, Leg::DirectAgain, &[])]).len(), 1);
    }
}
