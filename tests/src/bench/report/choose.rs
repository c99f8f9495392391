//! Who waits how long where one endpoint is slow.

use super::{Page, row};
use crate::bench::record::Record;
use crate::bench_choose::Measured;

pub(super) fn write(page: &mut Page, record: &Record<Measured>) {
    let Measured { clients, rate, work_ms: [quick, slow], legs } = &record.measured;
    page.heading("The choice of an endpoint");
    page.paragraph(&format!(
        "Two endpoints answer one connection after the other, one within {quick} ms and one within {slow} ms; {rate} clients come in a second, \
         {clients} for each line, all in one laboratory. Commit {}. How long half of them waited, and 99 of 100, and how many each \
         endpoint served:",
        record.machine.short_commit(),
    ));
    let mut rows = vec![row(["who chooses", "p50, ms", "p99, ms", "served by"])];
    for leg in legs {
        let ms = |value: f64| format!("{value:.0}");
        rows.push(row([&leg.name, &ms(leg.p50_ms), &ms(leg.p99_ms), &leg.shares()]));
    }
    page.table(&rows);
}
