//! `docs/benchmarks.md` and its plots, from the newest records. No figure is written here.

mod agent;
mod choose;
mod paths;
mod programs;
mod soak;
mod tries;

use super::plot::Bar;
use super::record::Record;
use super::target::{self, Judgement, Ratio, Verdict, digits};
use super::{KINDS, judgements, newest};
use anyhow::{Context, Result};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// A page and its plots by file name.
#[derive(Debug, Default)]
struct Page {
    text: String,
    plots: Vec<(String, String)>,
}

impl Page {
    fn heading(&mut self, text: &str) {
        let _ = write!(self.text, "\n## {text}\n\n");
    }

    fn paragraph(&mut self, text: &str) {
        let _ = write!(self.text, "{text}\n\n");
    }

    /// A table whose first row is the head.
    fn table(&mut self, rows: &[Vec<String>]) {
        for (index, row) in rows.iter().enumerate() {
            let _ = writeln!(self.text, "| {} |", row.join(" | "));
            if index == 0 {
                let _ = writeln!(self.text, "|{}", "---|".repeat(row.len()));
            }
        }
        self.text.push('\n');
    }

    fn plot(&mut self, name: &str, title: &str, svg: String) {
        let _ = write!(self.text, "![{title}](benchmarks/{name}.svg)\n\n");
        self.plots.push((format!("{name}.svg"), svg));
    }
}

/// A row of a table.
fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// Why targets are missed where they are, as far as that is known.
const REASONS: &[(&str, &str)] = &[
    (
        "B1",
        "By the socket hooks no packet is translated, but each passes the programs of four interfaces; the call that connects \
         chooses the endpoint, and what it called is kept with the socket and goes with it. By packet, a short connection pays for \
         a whole life: both its directions are entered and removed again, and each packet is rewritten. Client and server \
         keep both CPUs busy, so all of it is missed there; the tables below say how much the programs themselves take. How much hooks that do nothing cost \
         already is said with each case below, where it was measured.",
    ),
    (
        "B2",
        "As B1, without the life of flows: what remains is the programs' part of each packet, beside plain routing, which has none. \
         How much of it hooks that do nothing cost already is said with each case below, where it was measured.",
    ),
    (
        "B4",
        "A proxy that costs nothing would be as much faster than kube-proxy as plain routing is, which is said with each case \
         below; where that is less than what is asked, nothing can reach it on this machine. Of that, Portolan loses what \
         its programs take: the life of a flow, as B1 by packet, and a route lookup of each packet where the endpoint is \
         elsewhere. Native XDP on veth copies each packet, and its driver works off its packets in batches.",
    ),
    (
        "B5",
        "Portolan does not touch what a bulk stream is slowed by: its segments pass each program as one packet of up to 64 KiB. \
         What is missed is less than the two legs of plain routing differ from round to round.",
    ),
    (
        "B10",
        "With a real API server the change is timed while three agents, two kube-proxies and the API server share two CPUs, and the \
         percentile is that of few changes: the slowest of them has waited for a CPU. The writes alone are measured from recorded \
         tables, without them.",
    ),
    (
        "B11",
        "The agent, the sender of the updates, client and server share two CPUs that client and server alone keep busy: \
         what the agent takes for the updates, connections lose.",
    ),
    (
        "B12",
        "Part of it is the program itself: pages of its file that the agent has mapped. It lets go of them after each sweep, and \
         what it runs comes back from the page cache, where kube-proxy's pages count as its own for as long as it runs. The rest is the \
         objects, each once, and the mirror of the tables, from which a change is told.",
    ),
    (
        "B13",
        "`flows` alone takes the most: an entry of a hash map costs more than its key and value. Counters are per CPU, so \
         they grow with the number of CPUs.",
    ),
];

/// What this machine cannot tell, and how to measure again.
const LIMITS: &str = "\
- The network is veth: there is no NIC, no interrupt steering, no native XDP of a driver. XDP on veth copies packets that \
  a driver would hand over as they are, so it can lose here what it wins on a NIC.
- Client and server have a CPU each where there are only two: agents, kube-proxy and the API server share them.
- The rivals' connection tracking keeps what has ended for 1 s instead of 120 s, in their namespaces only: its table \
  would fill here within seconds.";

const REPEAT: &str = "\
```
cargo xtask bench --quick      # the main ratios; without --quick, what the method asks for
cargo xtask bench --resume     # goes on with a run that was cut short
cargo xtask bench choose       # who waits how long where one endpoint is slow
cargo xtask bench tries        # who is served where endpoints refuse or are silent, and at what price
cargo xtask bench counts       # a million flows: is what is open counted right?
cargo xtask bench soak         # two hours of churn: does anything grow?
cargo xtask bench targets      # one line per target, from the newest records
cargo xtask bench report       # writes this page and its plots from the newest records
```

As root, on a machine that does nothing else. Legs are measured in turn, round by round, each round beginning with another \
leg, and each is divided by plain routing of the same round; given are the median of the rounds and, in brackets, the \
smallest and the largest. A run whose two legs of plain routing differ by more than 5 % is void. \
[CONTRIBUTING.md](../CONTRIBUTING.md) has the single parts.";

/// Writes the page and its plots.
///
/// # Errors
/// If a record cannot be read, or a file not be written.
pub fn write(records: &Path, docs: &Path) -> Result<PathBuf> {
    let page = page(records)?;
    let plots = docs.join("benchmarks");
    fs::create_dir_all(&plots).with_context(|| plots.display().to_string())?;
    for old in fs::read_dir(&plots)?.flatten() {
        fs::remove_file(old.path()).with_context(|| old.path().display().to_string())?;
    }
    for (name, svg) in &page.plots {
        fs::write(plots.join(name), svg).with_context(|| name.clone())?;
    }
    let file = docs.join("benchmarks.md");
    fs::write(&file, page.text.trim_end().to_owned() + "\n").with_context(|| file.display().to_string())?;
    Ok(file)
}

fn page(records: &Path) -> Result<Page> {
    let mut page = Page::default();
    page.paragraph("# Benchmarks");
    page.paragraph(
        "Written by `cargo xtask bench report` from the records in `benches/records`; changes by hand would be lost.",
    );
    let all = judgements(records)?;
    targets(&mut page, &all);
    runs(&mut page, records)?;
    if let Some(record) = newest(records, crate::bench_net::KIND)? {
        paths::write(&mut page, &record);
    }
    if let Some(record) = newest(records, crate::bench_prog::KIND)? {
        programs::write(&mut page, &record);
    }
    agent::write(
        &mut page,
        newest(records, crate::bench_sync::KIND)?,
        newest(records, crate::bench_agent::KIND)?,
    );
    if let Some(record) = newest(records, crate::bench_choose::KIND)? {
        choose::write(&mut page, &record);
    }
    if let Some(record) = newest(records, crate::bench_tries::KIND)? {
        tries::write(&mut page, &record);
    }
    if let Some(record) = newest(records, crate::bench_counts::KIND)? {
        tries::write_counts(&mut page, &record);
    }
    if let Some(record) = newest(records, crate::soak::KIND)? {
        soak::write(&mut page, &record);
    }
    page.heading("What this machine cannot tell");
    page.paragraph(LIMITS);
    page.heading("How to repeat it");
    page.paragraph(REPEAT);
    Ok(page)
}

fn value(value: Option<Ratio>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

fn targets(page: &mut Page, all: &[Judgement]) {
    page.heading("Targets");
    page.paragraph("```\n$ cargo xtask bench targets");
    page.text.truncate(page.text.trim_end().len());
    page.text.push('\n');
    target::lines(all).iter().for_each(|line| {
        let _ = writeln!(page.text, "{line}");
    });
    page.paragraph("```");
    page.paragraph("Every part of every target:");
    let mut rows = vec![row(["target", "", "measured", "asked", "what"])];
    for part in all {
        let verdict = match part.verdict {
            Verdict::Met => "met",
            Verdict::NotRun => "not run",
            Verdict::Missed => "**missed**",
        };
        rows.push(row([&part.target, verdict, &value(part.value), &part.limit.to_string(), &part.what]));
    }
    page.table(&rows);
    let missed = |target: &str| all.iter().any(|part| part.target == target && part.is_missed());
    for (target, why) in REASONS.iter().filter(|(target, _)| missed(target)) {
        page.paragraph(&format!("{target} is missed: {why}"));
    }
}

fn runs(page: &mut Page, records: &Path) -> Result<()> {
    page.heading("Runs");
    let mut rows = vec![row(["record", "when (UTC)", "kernel", "CPU", "commit", ""])];
    let mut notes = Vec::new();
    for kind in KINDS {
        let Some(record) = newest::<Value>(records, kind)? else {
            rows.push(row([kind, "not measured", "", "", "", ""]));
            continue;
        };
        let Record { machine, time, .. } = &record;
        let when =
            Timestamp::from_second(*time as i64).map_or_else(|_| time.to_string(), |time| time.to_string());
        let mut remarks = Vec::new();
        if record.quick {
            remarks.push("less than the method asks for".to_owned());
        }
        if !record.complete {
            remarks.push("cut short: what was measured until then".to_owned());
        }
        if !record.void.is_empty() {
            remarks.push(format!("**VOID**: {}", record.void.join("; ")));
        }
        let versions: Vec<_> =
            machine.versions.iter().map(|(program, version)| format!("{program} {version}")).collect();
        remarks.push(versions.join(", "));
        let cpu = format!("{} x {}", machine.cpus, machine.cpu);
        let commit: String =
            machine.commit.chars().take(12).chain(machine.commit.chars().filter(|c| *c == '+')).collect();
        rows.push(row([
            &format!("{kind}-{time}"),
            &when,
            &machine.kernel,
            &cpu,
            &commit,
            &remarks.join(". "),
        ]));
        notes.extend(record.notes.iter().map(|note| format!("- {kind}: {note}")));
    }
    page.table(&rows);
    page.paragraph(&notes.join("\n"));
    Ok(())
}

/// A bar of a plot.
fn bar(label: impl Into<String>, value: Ratio, ours: bool) -> Bar {
    Bar { label: label.into(), value, ours }
}
