//! What the programs cost.

use super::{Page, bar, digits, row};
use crate::bench::plot::bars;
use crate::bench::record::Record;
use crate::bench::target::Ratio;
use crate::bench_prog::Measured;

pub(super) fn write(page: &mut Page, record: &Record<Measured>) {
    let measured = &record.measured;
    page.heading("Programs");
    page.paragraph(&format!(
        "Nanoseconds per packet by `BPF_PROG_TEST_RUN`, median of {} samples of {} runs, and their ratio to a program that \
         does nothing.",
        measured.effort.samples, measured.effort.repeats
    ));
    let mut rows = vec![row(["program", "empty", "established flow", "ratio", "not ours", "ratio"])];
    let mut all = Vec::new();
    let ratio = |ratio: Option<Ratio>| ratio.map_or_else(|| "-".into(), |ratio| ratio.to_string());
    let families = measured
        .programs
        .iter()
        .map(|cost| ("", cost))
        .chain(measured.programs_ipv6.iter().map(|cost| (", IPv6", cost)));
    for (family, cost) in families {
        rows.push(row([
            &format!("`{}`{family}", cost.program),
            &digits(cost.empty),
            &digits(cost.established),
            &ratio(cost.established_ratio),
            &digits(cost.not_ours),
            &ratio(cost.not_ours_ratio),
        ]));
        for (what, value) in [("established flow", cost.established_ratio), ("not ours", cost.not_ours_ratio)]
        {
            all.extend(value.map(|value| bar(format!("{}{family}, {what}", cost.program), value, true)));
        }
    }
    page.table(&rows);
    let title = "Programs: times the empty program";
    page.plot("programs", title, bars(title, &all, None));
    page.paragraph(
        "Other packets, one run at a time (so with a cold processor, as the empty program beside them):",
    );
    let mut rows = vec![row(["program", "packet", "ns", "empty", "difference"])];
    for case in &measured.cases {
        rows.push(row([
            &format!("`{}`", case.program),
            &case.case,
            &digits(case.nanoseconds),
            &digits(case.empty),
            &digits(case.nanoseconds - case.empty),
        ]));
    }
    page.table(&rows);
    sizes(page, measured);
    page.paragraph("`connect(2)` with and without the socket hooks, by the time of the middle call:");
    let mut rows = vec![row(["what", "per second", "ratio to that without hooks"])];
    for connects in &measured.connects {
        rows.push(row([&connects.what, &digits(connects.per_second.median), &ratio(connects.ratio)]));
    }
    page.table(&rows);
    page.paragraph("XDP on veth with live frames:");
    let mut rows = vec![row(["program", "frames per second", "ratio"])];
    for frames in &measured.live_frames {
        rows.push(row([&frames.what, &digits(frames.per_second.median), &ratio(frames.ratio)]));
    }
    page.table(&rows);
}

fn sizes(page: &mut Page, measured: &Measured) {
    page.paragraph("Verified instructions and machine code:");
    let mut rows = vec![row(["program", "verified instructions", "bytes of machine code"])];
    for (program, verified) in &measured.verified {
        let bytes = measured.jited.get(program).map_or_else(|| "-".into(), u32::to_string);
        rows.push(row([&format!("`{program}`"), &verified.to_string(), &bytes]));
    }
    page.table(&rows);
    page.paragraph("Memory of the maps at their default sizes:");
    let mut rows = vec![row(["map", "KiB"])];
    let kib = |bytes: u64| digits(bytes as f64 / 1024.0);
    rows.extend(measured.map_memory.iter().map(|(map, bytes)| row([&format!("`{map}`"), &kib(*bytes)])));
    rows.push(row(["all", &kib(measured.map_memory.values().sum())]));
    page.table(&rows);
}
