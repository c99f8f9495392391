//! What the agent takes.

use super::{Page, digits, row};
use crate::bench::record::Record;
use crate::bench::target::Ratio;
use crate::bench_agent;
use crate::bench_sync::{self, Durations};

pub(super) fn write(
    page: &mut Page,
    sync: Option<Record<bench_sync::Measured>>,
    agent: Option<Record<bench_agent::Measured>>,
) {
    if sync.is_none() && agent.is_none() {
        return;
    }
    page.heading("Agent");
    let mut rows = vec![row(["what", "median ms", "p99", "min", "max", "bpf() calls"])];
    let mut add = |what: String, ms: &Durations, calls: Option<u64>| {
        let calls = calls.map_or_else(|| "-".into(), |calls| calls.to_string());
        let [median, p99, min, max] = [ms.median, ms.p99, ms.min, ms.max].map(digits);
        rows.push(row([&what, &median, &p99, &min, &max, &calls]));
    };
    if let Some(Record { measured, .. }) = &sync {
        let size = format!("{} Services x {}", measured.services, measured.endpoints);
        add(format!("cold start from tables, {size}"), &measured.cold_start, Some(measured.cold_start_calls));
        add(format!("restart, {size}"), &measured.restart, None);
        for run in &measured.changes {
            add(format!("one endpoint of {} Services", run.services), &run.milliseconds, Some(run.calls));
        }
    }
    if let Some(Record { measured, .. }) = &agent {
        let size = format!("{} Services x {}", measured.services, measured.endpoints);
        add(format!("cold start from recorded events, {size}"), &measured.cold_start_ms, None);
        add(format!("the same, from the start of the process, {size}"), &measured.ready_ms, None);
        if let Some(lag) = &measured.churn.lag_ms {
            let what = format!("event to kernel at {} updates per second", measured.updates_per_second);
            add(what, lag, None);
        }
    }
    page.table(&rows);
    if let Some(Record { measured, .. }) = &agent {
        churn(page, measured);
    }
}

fn churn(page: &mut Page, measured: &bench_agent::Measured) {
    let churn = &measured.churn;
    let memory = |kib: Option<&u64>| kib.map_or_else(|| "-".into(), |kib| digits(*kib as f64 / 1024.0));
    let per_update = churn.agent_cpu_seconds * 1e6 / (churn.updates.max(1) as f64);
    let busy = Ratio::of(&measured.busy, &measured.quiet);
    page.paragraph(&format!(
        "{} endpoint updates in {} s: the agent took {} us of CPU for each. Its resident memory went from {} to {} MiB. \
         Connections to a Service meanwhile, over those while nothing changes: {}.",
        churn.updates,
        digits(churn.seconds),
        digits(per_update),
        memory(measured.resident_kib.first()),
        memory(measured.resident_kib.last()),
        super::value(busy)
    ));
}
