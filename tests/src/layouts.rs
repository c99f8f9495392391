//! `cargo xtask layouts`: every layout of a node with Portolan and with the real kube-proxy in its place, side by side.

use crate::bench::record::commit;
use crate::lab;
use crate::lab::layout::{LAYOUTS, Layout, Proxy};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the results are kept, from which the page is written.
const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/layouts.json");
/// The page.
const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/layouts.md");

/// Which layouts, and who serves.
#[derive(Clone, Debug, clap::Args)]
pub struct LayoutsArgs {
    /// The layouts to raise; all that this kernel can make unless told.
    names: Vec<String>,
    /// Who serves beside Portolan: kube-proxy in a mode. May be given twice.
    #[arg(long = "peer", value_enum)]
    peers: Vec<Proxy>,
    /// Keep the results in `benches/layouts.json`, and write `docs/layouts.md` from it.
    #[arg(long)]
    write: bool,
    /// Seconds that an answer may take; the proxy itself may take so many minutes to be ready.
    #[arg(long, default_value_t = 1)]
    patience: u64,
    /// Print each result as a line that `--read` knows, too.
    #[arg(long)]
    lines: bool,
    /// Raise nothing: take the results from the lines in this file, such as what the tier `vm` printed.
    #[arg(long, value_name = "FILE")]
    read: Option<PathBuf>,
    /// List the layouts and what they need of the kernel.
    #[arg(long)]
    list: bool,
    /// Only those that need something of the kernel that not every kernel has.
    #[arg(long)]
    special: bool,
}

/// What the line of a result begins with.
const LINE: &str = "portolan-layout: ";

/// How one layout went with one proxy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Outcome {
    layout: String,
    proxy: Proxy,
    /// How many questions went as they must.
    good: usize,
    /// A line for each that did not.
    wrong: Vec<String>,
    kernel: String,
    commit: String,
}

/// Results by layout and proxy.
type Results = BTreeMap<String, BTreeMap<Proxy, Outcome>>;

/// Raises them. Good if Portolan answers whatever must be answered and is nowhere behind a peer.
pub fn run(args: &LayoutsArgs) -> Result<bool> {
    let chosen = chosen(args)?;
    if args.list {
        chosen.iter().for_each(|layout| println!("{:<46} {}{}", layout.name, layout.about, needs(layout)));
        return Ok(true);
    }
    lab::on_signal_exit_with(130);
    let proxies: BTreeSet<_> = [Proxy::Portolan].into_iter().chain(args.peers.iter().copied()).collect();
    let mut results = read(Path::new(RECORD))?;
    let mut good = true;
    let mut keep = |result: Outcome| {
        let proxy = result.proxy;
        println!("{:<46} {:<20} {}", result.layout, proxy.name(), result.line());
        result.wrong.iter().for_each(|line| println!("    {line}"));
        good &= proxy != Proxy::Portolan || result.wrong.is_empty();
        results.entry(result.layout.clone()).or_default().insert(proxy, result);
    };
    match &args.read {
        Some(file) => {
            let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
            for line in text.lines().filter_map(|line| line.strip_prefix(LINE)) {
                // A machine that has no tree cannot say what it is built from.
                keep(Outcome { commit: commit(), ..serde_json::from_str(line)? });
            }
        }
        None => {
            for layout in chosen {
                for proxy in &proxies {
                    let result = outcome(layout, *proxy, args.patience).with_context(|| layout.name)?;
                    if args.lines {
                        println!("{LINE}{}", serde_json::to_string(&result)?);
                    }
                    keep(result);
                }
            }
        }
    }
    if args.write {
        fs::write(RECORD, serde_json::to_string_pretty(&results)? + "\n").context(RECORD)?;
        fs::write(PAGE, page(&results)).context(PAGE)?;
        println!("{PAGE}");
    }
    Ok(good)
}

fn chosen(args: &LayoutsArgs) -> Result<Vec<&'static Layout>> {
    for name in &args.names {
        ensure!(LAYOUTS.iter().any(|layout| layout.name == name), "there is no layout {name}: see --list");
    }
    let named = |layout: &&Layout| args.names.iter().any(|name| name == layout.name);
    let special = |layout: &&Layout| args.list || layout.needs.is_empty() != args.special;
    let all = LAYOUTS.iter();
    Ok(if args.names.is_empty() { all.filter(special).collect() } else { all.filter(named).collect() })
}

fn needs(layout: &Layout) -> String {
    if layout.needs.is_empty() { String::new() } else { format!(" (needs {})", layout.needs.join(", ")) }
}

fn outcome(layout: &'static Layout, proxy: Proxy, patience: u64) -> Result<Outcome> {
    let raised = layout.raise()?;
    let _serving = raised.start(proxy, Duration::from_secs(60 * patience))?;
    let wrong = raised.wrong(Duration::from_secs(patience))?;
    let good = layout.questions() - wrong.len();
    Ok(Outcome { layout: layout.name.into(), proxy, good, wrong, kernel: kernel()?, commit: commit() })
}

fn kernel() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

impl Outcome {
    fn line(&self) -> String {
        let all = self.good + self.wrong.len();
        if self.wrong.is_empty() {
            format!("good, {all} of {all}")
        } else {
            format!("{} of {all}", self.good)
        }
    }
}

fn read(path: &Path) -> Result<Results> {
    if !path.is_file() {
        return Ok(Results::new());
    }
    serde_json::from_str(&fs::read_to_string(path)?).with_context(|| path.display().to_string())
}

fn page(results: &Results) -> String {
    let mut text = String::from(
        "# Layouts of nodes\n\nWritten by `cargo xtask layouts --peer nftables --peer iptables --write`; changes by hand would be lost.\n\n\
         Each is a laboratory of two nodes whose interfaces and routes are as people have them. Clients outside, the node and its pods\n\
         ask Services over IPv4 and IPv6, TCP and UDP; how many of the questions went as they must is in the table. Portolan and\n\
         kube-proxy have their default flags, but where a line names one; by its own, kube-proxy's mode nftables serves node ports at the\n\
         node's primary addresses alone. What must be answered is what the table in `tests/src/lab/layout/table.rs` says. What needs more of\n\
         the kernel than this machine's has is tried by `cargo xtask test vm`, on Debian's newest kernel and without kube-proxy.\n\n| layout | ",
    );
    text += &Proxy::ALL.map(Proxy::name).join(" | ");
    text += " |\n|---|---|---|---|\n";
    for layout in LAYOUTS {
        let cell = |proxy| match results.get(layout.name).and_then(|by| by.get(&proxy)) {
            Some(outcome) => outcome.line(),
            None => "not run".to_owned(),
        };
        let cells = Proxy::ALL.map(cell).join(" | ");
        let _ = writeln!(text, "| {}{} | {cells} |", layout.about, needs(layout));
    }
    let outcomes = || results.values().flat_map(BTreeMap::values);
    let of = |what: fn(&Outcome) -> &str| {
        let all: BTreeSet<_> = outcomes().map(what).filter(|word| !word.is_empty()).collect();
        all.into_iter().collect::<Vec<_>>().join(", ")
    };
    let _ = writeln!(text, "\nLinux {}; commit {}.", of(|it| &it.kernel), of(|it| &it.commit));
    for layout in LAYOUTS {
        for (proxy, outcome) in results.get(layout.name).into_iter().flatten() {
            if !outcome.wrong.is_empty() {
                let _ = writeln!(text, "\n{}, {}:\n", layout.about, proxy.name());
                outcome.wrong.iter().for_each(|line| text += &format!("    {line}\n"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_of_the_record_and_portolan_is_nowhere_behind() {
        let results = read(Path::new(RECORD)).unwrap();
        assert_eq!(
            fs::read_to_string(PAGE).unwrap(),
            page(&results),
            "`cargo xtask layouts --write` writes it"
        );
        for (name, by) in &results {
            let good = |proxy| by.get(&proxy).map_or(0, |outcome: &Outcome| outcome.good);
            let best = [Proxy::Nftables, Proxy::Iptables].map(good).into_iter().max().unwrap();
            assert!(good(Proxy::Portolan) >= best, "{name}");
        }
    }
}
