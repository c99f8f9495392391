//! What the paths say of the targets B1 to B5, and the proxies of B10 and B12. No I/O.

use super::proxies;
use super::{Case, Leg, Measured, Series, Way};
use crate::bench::target::{Judgement, Limit, Ratio};
use crate::load::Mode;

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

/// Every target that this benchmark measures.
pub(super) fn judge(measured: &Measured) -> Vec<Judgement> {
    let Measured { plan, series, .. } = measured;
    let main = plan.main_size().unwrap_or_default();
    let mut all = Vec::new();
    let mut compare = |target: &str, case: Case, leg: Leg, other: Leg, at_least: f64| {
        let what = format!("{} over {}: {case}", leg.name(), other.name());
        let limit = Limit::at_least(at_least, &format!("x {}", other.name()));
        all.push(Judgement::new(target, what, ratio(series, case, leg, other), limit));
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
    for way in [Way::NodePort, Way::NodePortElsewhere] {
        for leg in [Leg::PortolanPacket, Leg::PortolanXdp] {
            compare("B4", case(way, Mode::ConnectRequestClose, main), leg, nftables, 1.30);
        }
    }
    for (leg, _) in ours {
        compare("B5", case(Way::ClusterIp, Mode::Bulk, main), leg, Leg::Direct, 0.97);
    }
    for (leg, _) in ours {
        let what = format!("{} at 30000 Services over 10, each over direct", leg.name());
        let growth = growth(series, leg, connect(30_000), connect(10));
        all.push(Judgement::new("B3", what, growth, Limit::at_least(0.97, "x at 10")));
    }
    all.extend(proxies::judge(&measured.proxies));
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
    use crate::bench::target::Verdict;
    use crate::bench_net::Plan;

    const CONNECT: Case = Case { way: Way::ClusterIp, mode: Mode::ConnectRequestClose, services: 10_000 };

    #[test]
    fn a_target_is_met_missed_or_not_run() {
        let measured = [
            Series::of_rates(CONNECT, Leg::Direct, &[100.0, 110.0]),
            Series::of_rates(CONNECT, Leg::PortolanSocket, &[99.0, 110.0]),
            Series::of_rates(CONNECT, Leg::PortolanPacket, &[90.0, 90.0]),
        ];
        let plan = Plan {
            quick: false,
            sizes: vec![10, 1_000, 10_000, 30_000],
            rounds: 2,
            seconds: 1.0,
            flows: 1,
            rivals_up_to: 0,
            changes: 1,
        };
        let judged = judge(&Measured { plan, loads: vec![], series: measured.into(), proxies: vec![] });
        let of = |start: &str| judged.iter().find(|j| j.what.starts_with(start)).unwrap().verdict;
        assert_eq!(of("portolan-socket over direct"), Verdict::Met);
        assert_eq!(of("portolan-packet over direct"), Verdict::Missed);
        assert_eq!(of("portolan-socket over kube-proxy-iptables"), Verdict::NotRun);
        for target in ["B1", "B2", "B3", "B4", "B5", "B10", "B12"] {
            assert!(judged.iter().any(|j| j.target == target), "{target}");
        }
    }

    #[test]
    fn a_run_whose_direct_legs_differ_is_void() {
        let direct = Series::of_rates(CONNECT, Leg::Direct, &[100.0]);
        assert!(void(&[direct.clone(), Series::of_rates(CONNECT, Leg::DirectAgain, &[104.0])]).is_empty());
        assert_eq!(void(&[direct.clone(), Series::of_rates(CONNECT, Leg::DirectAgain, &[94.0])]).len(), 1);
        assert_eq!(void(&[direct, Series::of_rates(CONNECT, Leg::DirectAgain, &[])]).len(), 1);
    }
}
