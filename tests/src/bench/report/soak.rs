//! What grows over time.

use super::{Page, row};
use crate::bench::plot::{Axis, Line, lines};
use crate::bench::record::Record;
use crate::bench::target::{Ratio, digits};
use crate::soak::Measured;

pub(super) fn write(page: &mut Page, record: &Record<Measured>) {
    let Some(last) = record.measured.samples.last() else { return };
    page.heading("Drift");
    let [made, failed] = last.calls;
    page.paragraph(&format!(
        "{} minutes of churn (Services, endpoints, pods and interfaces come and go, the API server is cut off, silent or has forgotten \
         everything every minute), commit {}: {} changes; {made} calls of a Service that nothing happened to, {failed} of which failed. \
         Before each of the {} samples everything was taken away again. Medians of the second quarter of the samples and of the last:",
        digits(last.at / 60.0),
        record.machine.short_commit(),
        last.changes,
        record.measured.samples.len(),
    ));
    let mut rows = vec![row(["what the agent holds", "early on", "at the end"])];
    rows.extend(record.measured.rows().into_iter().map(Vec::from));
    page.table(&rows);
    let faults = record.measured.faults();
    page.paragraph(&if faults.is_empty() {
        "Nothing grew.".to_owned()
    } else {
        format!("**Not as it should be**: {}.", faults.join("; "))
    });
    let line = |(name, points): (&str, Vec<(f64, f64)>)| Line {
        label: name.into(),
        points: points.into_iter().map(|(at, value)| (at, Ratio::exactly(value))).collect(),
        ours: true,
    };
    let all: Vec<_> = record.measured.lines().into_iter().map(line).collect();
    let title = "What an agent holds under churn, as a share of its largest value, over minutes";
    page.plot("soak", title, lines(title, Axis::Even, &all));
}
