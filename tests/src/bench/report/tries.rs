//! Who is served where endpoints fail, and whether what is open is counted right.

use super::{Page, row};
use crate::bench::record::Record;
use crate::{bench_counts, bench_tries};

pub(super) fn write(page: &mut Page, record: &Record<bench_tries::Measured>) {
    page.heading("Second tries");
    page.paragraph(&format!(
        "Services with five endpoints: all serve; two refuse; two refuse and one is silent. Clients come to these by turns, in one laboratory \
         with one node of each dataplane. Commit {}. How many were served, refused, or heard nothing for three seconds, and within how many \
         milliseconds half of those who were served were served, and 99 of 100:",
        record.machine.short_commit(),
    ));
    let mut rows = vec![row(["who serves", "clients", "served", "refused", "silent", "p50, ms", "p99, ms"])];
    for leg in &record.measured.legs {
        let numbers = [leg.served, leg.refused, leg.silent].map(|number| number.to_string());
        let ms = [leg.p50_ms, leg.p99_ms].map(|value| format!("{value:.2}"));
        let [served, refused, silent] = &numbers;
        rows.push(row([leg.proxy.name(), &leg.about(), served, refused, silent, &ms[0], &ms[1]]));
    }
    page.table(&rows);
    page.paragraph(
        "A Service all of whose endpoints refuse, as fast as the clients can: what each connection costs in packets to endpoints, for one of \
         the client's, and in CPU time, beside one to a Service without endpoints.",
    );
    let mut rows = vec![row([
        "who serves",
        "clients",
        "a second",
        "refused",
        "packets out",
        "CPU, us",
        "without endpoints, us",
    ])];
    for dead in &record.measured.dead {
        let refused = format!("{} of {}", dead.refused, dead.connects);
        rows.push(row([
            dead.proxy.name(),
            dead.caller.about(),
            &format!("{:.0}", f64::from(dead.connects) / dead.seconds),
            &refused,
            &format!("{:.2}", dead.packets),
            &format!("{:.0}", dead.cpu_us),
            &format!("{:.0}", dead.none_cpu_us),
        ]));
    }
    page.table(&rows);
    let notes: Vec<_> = record.notes.iter().map(|note| format!("- {note}")).collect();
    page.paragraph(&notes.join("\n"));
}

pub(super) fn write_counts(page: &mut Page, record: &Record<bench_counts::Measured>) {
    let bench_counts::Measured {
        flows, by_socket, kills, changes, moved, differences, drift, most_open, ..
    } = &record.measured;
    page.heading("What is open");
    page.paragraph(&format!(
        "{flows} flows that ended by FIN, by RST, refused, idle or displaced ({moved} times moved to another endpoint) and \
         {by_socket} connections by socket, while the agent was killed {kills} times and the algorithm changed {changes} times, commit {}: at \
         the ends of rounds, with up to {most_open} open, the counts differed from the flows and sockets that there were by {differences}, \
         and the agents had put {drift} right.",
        record.machine.short_commit(),
    ));
}
