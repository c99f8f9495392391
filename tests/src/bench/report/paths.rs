//! What the paths and the proxies come to.

use super::{Page, bar, digits, row};
use crate::bench::plot::{Axis, Line, bars, lines};
use crate::bench::target::Ratio;
use crate::bench_net::{Case, Leg, Measured, NetRecord, Series, Way};
use crate::load::Mode;

pub(super) fn write(page: &mut Page, record: &NetRecord) {
    let measured = &record.measured;
    page.heading("Paths");
    page.paragraph(
        "Operations per second (bulk: bytes), and their ratio to plain routing of the same round.",
    );
    let mut cases: Vec<Case> = measured.series.iter().map(|series| series.case).collect();
    cases.dedup();
    for (number, case) in cases.iter().enumerate() {
        let of_case: Vec<&Series> = measured.series.iter().filter(|series| series.case == *case).collect();
        page.paragraph(&format!("### {case}"));
        write_case(page, &of_case, &format!("paths-{}", number + 1), &case.to_string());
    }
    growth(page, measured);
    proxies(page, measured);
}

fn direct<'a>(of_case: &[&'a Series]) -> Option<&'a Series> {
    of_case.iter().copied().find(|series| series.leg == Leg::Direct)
}

fn ratio_to_direct(of_case: &[&Series], series: &Series) -> Option<Ratio> {
    Ratio::of(&series.rates(), &direct(of_case)?.rates())
}

fn write_case(page: &mut Page, of_case: &[&Series], plot: &str, title: &str) {
    let mut rows = vec![row(["leg", "per second", "ratio to direct", "p99 in us", "failed"])];
    let mut all = Vec::new();
    for series in of_case {
        let Some(rate) = Ratio::among(series.rates().into_iter().flatten()) else {
            let failure = series.failure.as_deref().unwrap_or("nothing was measured");
            let failure = failure.lines().next().unwrap_or_default();
            rows.push(row([series.leg.name(), "did not run", failure, "", ""]));
            continue;
        };
        let ratio = ratio_to_direct(of_case, series);
        let p99 = series.p99().map_or_else(|| "-".into(), |p99| digits(p99.median));
        let text = ratio.map_or_else(|| "-".into(), |ratio| ratio.to_string());
        rows.push(row([series.leg.name(), &digits(rate.median), &text, &p99, &series.failed().to_string()]));
        all.extend(ratio.map(|ratio| bar(series.leg.name(), ratio, series.leg.is_portolan())));
    }
    page.table(&rows);
    bound(page, of_case);
    programs(page, of_case);
    let title = format!("{title}: ratio to plain routing");
    page.plot(plot, &title, bars(&title, &all, Some(1.0)));
}

/// What a proxy that costs nothing would be beside the rivals, and what hooks leave of it.
fn bound(page: &mut Page, of_case: &[&Series]) {
    let rivals = of_case.iter().filter(|series| series.leg.is_rival());
    let beside: Vec<_> = rivals
        .filter_map(|rival| {
            let ratio = Ratio::of(&direct(of_case)?.rates(), &rival.rates())?;
            Some(format!("{ratio} x {}", rival.leg.name()))
        })
        .collect();
    let mut sentences = Vec::new();
    if !beside.is_empty() {
        sentences.push(format!("Plain routing itself is {}.", beside.join(" and ")));
    }
    let hooks = of_case.iter().find(|series| series.leg == Leg::EmptyHooks);
    if let Some(ratio) = hooks.and_then(|hooks| ratio_to_direct(of_case, hooks)) {
        let it = if beside.is_empty() { "plain routing" } else { "it" };
        sentences.push(format!("Hooks that do nothing leave {ratio} of {it}."));
    }
    if !sentences.is_empty() {
        page.paragraph(&sentences.join(" "));
    }
}

/// What Portolan's programs take of an operation, beside all that plain routing takes.
fn programs(page: &mut Page, of_case: &[&Series]) {
    let direct = direct(of_case).and_then(|direct| Ratio::among(direct.rates().into_iter().flatten()));
    let mut rows = vec![row(["leg", "program", "runs per operation", "ns per run", "us per operation"])];
    let mut sums = Vec::new();
    for series in of_case {
        for share in &series.programs {
            let us = digits(share.per_operation() / 1e3);
            let (runs, nanoseconds) = (digits(share.runs), digits(share.nanoseconds));
            rows.push(row([series.leg.name(), &format!("`{}`", share.program), &runs, &nanoseconds, &us]));
        }
        let Some((us, direct)) = series.in_programs().zip(direct) else { continue };
        // Client and server have a CPU each, and both are busy.
        let whole = 2e6 / direct.median;
        sums.push(format!("{} {} us of {}", series.leg.name(), digits(us), digits(whole)));
    }
    if rows.len() > 1 {
        page.paragraph(&format!(
            "Time in Portolan's programs, with part of the clock's own, beside the time of two CPUs that one operation by plain \
             routing takes: {}.",
            sums.join(", ")
        ));
        page.table(&rows);
    }
}

fn growth(page: &mut Page, measured: &Measured) {
    let mut all = Vec::new();
    for leg in Leg::ALL {
        let points: Vec<_> = measured
            .series
            .iter()
            .filter(|series| {
                let Case { way, mode, .. } = series.case;
                series.leg == leg && way == Way::ClusterIp && mode == Mode::ConnectRequestClose
            })
            .filter_map(|series| {
                let of_case: Vec<_> =
                    measured.series.iter().filter(|other| other.case == series.case).collect();
                Some((series.case.services as f64, ratio_to_direct(&of_case, series)?))
            })
            .collect();
        if points.len() > 1 {
            all.push(Line { label: leg.name().into(), points, ours: leg.is_portolan() });
        }
    }
    let title =
        "TCP connect-request-close to a ClusterIP over the number of Services: ratio to plain routing";
    page.paragraph("### By the number of Services");
    page.plot("growth", title, lines(title, Axis::Logarithmic, &all));
}

fn proxies(page: &mut Page, measured: &Measured) {
    page.heading("Proxies");
    page.paragraph(
        "From one real API server: the time until a proxy serves a number of Services after the last of them is in the API \
         server, its resident memory then, and the time of one endpoint's change from the request to the API server until a \
         client in a pod sees it.",
    );
    let mut rows =
        vec![row(["Services", "proxy", "serves them after", "resident", "a change: median", "p99", ""])];
    for load in &measured.loads {
        let cost =
            measured.proxies.iter().find(|cost| cost.leg == load.leg && cost.services == load.services);
        let failure = load.failure.as_ref().or_else(|| cost.and_then(|cost| cost.failure.as_ref()));
        let change = |of: fn(&crate::bench_sync::Durations) -> f64| {
            let change = cost.and_then(|cost| cost.change_ms.as_ref());
            change.map_or_else(|| "-".into(), |change| format!("{} ms", digits(of(change))))
        };
        let memory = cost.and_then(|cost| cost.resident_kib);
        let memory = memory.map_or_else(|| "-".into(), |kib| format!("{:.1} MiB", kib as f64 / 1024.0));
        rows.push(row([
            &load.services.to_string(),
            load.leg.name(),
            &format!("{:.1} s", load.seconds),
            &memory,
            &change(|change| change.median),
            &change(|change| change.p99),
            failure.map_or("", |failure| failure.lines().next().unwrap_or_default()),
        ]));
    }
    page.table(&rows);
    let memory: Vec<_> = measured
        .proxies
        .iter()
        .filter_map(|cost| {
            let label = format!("{}, {} Services", cost.leg.name(), cost.services);
            Some(bar(label, Ratio::exactly(cost.resident_kib? as f64 / 1024.0), cost.leg.is_portolan()))
        })
        .collect();
    let title = "Resident memory of the proxies in MiB";
    page.plot("memory", title, bars(title, &memory, None));
    for (cost, agent) in measured.proxies.iter().filter_map(|cost| Some((cost, cost.agent.as_ref()?))) {
        let ms = &agent.event_to_kernel_ms;
        page.paragraph(&format!(
            "Portolan's agent at {} Services, {} changes of one endpoint: from the event to the table in the kernel {} ms \
             (p99 {}, longest {}), {} `bpf()` calls each.",
            cost.services,
            agent.changes,
            digits(ms.median),
            digits(ms.p99),
            digits(ms.max),
            digits(agent.calls)
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: Case = Case { way: Way::ClusterIp, mode: Mode::ConnectRequestClose, services: 10 };

    fn said(legs: &[(Leg, &[f64])]) -> String {
        let all: Vec<_> = legs.iter().map(|(leg, rates)| Series::of_rates(CASE, *leg, rates)).collect();
        let mut page = Page::default();
        bound(&mut page, &all.iter().collect::<Vec<_>>());
        page.text
    }

    #[test]
    fn what_hooks_leave_is_said_where_it_was_measured() {
        let direct: (Leg, &[f64]) = (Leg::Direct, &[100.0, 200.0, 100.0]);
        let rival: (Leg, &[f64]) = (Leg::KubeProxyNftables, &[50.0, 100.0, 50.0]);
        let hooks: (Leg, &[f64]) = (Leg::EmptyHooks, &[97.0, 196.0, 99.0]);
        let plain = "Plain routing itself is 2.000 [2.000..2.000] x kube-proxy-nftables.";
        let leave = "Hooks that do nothing leave 0.980 [0.970..0.990] of";
        assert_eq!(said(&[direct, rival, hooks]), format!("{plain} {leave} it.\n\n"));
        assert_eq!(said(&[direct, rival]), format!("{plain}\n\n"));
        assert_eq!(said(&[direct, hooks]), format!("{leave} plain routing.\n\n"));
        assert_eq!(said(&[direct, rival, (Leg::EmptyHooks, &[])]), format!("{plain}\n\n"));
    }
}
