//! The tiers of tests, from the cheapest to the one with a real control plane.
//!
//! A tier that cannot run on this machine fails; it is never skipped. Each tier's own output is shown as it comes. Each runs in
//! namespaces of its own ([`crate::ground`]), and what it leaves there is a failure.

use crate::busy::Busy;
use crate::command::{CommandLine, target_folder, workspace};
use crate::ground::{Ground, Run};
use crate::image::{self, Profile};
use crate::programs;
use crate::steps::{Steps, clock};
use crate::summary::Summary;
use anyhow::{Context as _, Result};
use clap::ValueEnum;
use std::fs;
use std::io::{self, BufRead as _, BufReader, IsTerminal as _, Write as _};
use std::process::{ChildStdout, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// How long one tier may take where nobody is there to press Ctrl-C.
const TIME_LIMIT: Duration = Duration::from_secs(45 * 60);

/// A kind of test. Each but `unit` is one test program of the package `dataplane-tests`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// Tests inside the crates, the eBPF programs' own code among them, on the host.
    Unit,
    /// Kubernetes objects in, tables out.
    Golden,
    /// One packet through one program, by `BPF_PROG_TEST_RUN`.
    Packet,
    /// What is the same at every run and must not grow: verified instructions, `bpf()` calls, bytes, allocations.
    Exact,
    /// Random cluster states and packets, by the real programs and by a model of the contract.
    Oracle,
    /// The agent's side of the kernel: maps, programs, links, netlink.
    Kernel,
    /// The laboratory itself.
    Lab,
    /// Real packets in a laboratory that reads manifests.
    Netns,
    /// Real packets in a laboratory with a real API server.
    Cluster,
    /// The tour on other kernels, emulated. Takes minutes: unless it is named, one tour each on the oldest and the newest.
    Vm,
    /// The tour in a Kubernetes cluster by kind. Runs only if it is named: it takes minutes, and up to half an hour the first time.
    Kind,
}

impl Tier {
    /// All of them, in the order they run.
    const ALL: [Self; 11] = [
        Self::Unit,
        Self::Golden,
        Self::Packet,
        Self::Exact,
        Self::Oracle,
        Self::Kernel,
        Self::Lab,
        Self::Netns,
        Self::Cluster,
        Self::Vm,
        Self::Kind,
    ];

    /// How many of them run if none is named: the last is left out.
    const UNASKED: usize = 10;

    /// Those that run once more where a machine has been used.
    const AGAIN: [Self; 2] = [Self::Kernel, Self::Lab];

    /// Its name on the command line, and of its test program.
    const fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Golden => "golden",
            Self::Packet => "packet",
            Self::Exact => "exact",
            Self::Oracle => "oracle",
            Self::Kernel => "kernel",
            Self::Lab => "lab",
            Self::Netns => "netns",
            Self::Cluster => "cluster",
            Self::Vm => "vm",
            Self::Kind => "kind",
        }
    }

    fn program(self) -> CommandLine {
        CommandLine::new("cargo test --locked --package dataplane-tests --test").arg(self.name())
    }

    fn commands(self, whole: bool) -> Vec<CommandLine> {
        match self {
            Self::Vm if !whole => vec![self.program().arg("--").arg("short::")],
            Self::Unit => vec![
                CommandLine::new("cargo test --locked --workspace --exclude dataplane-tests --no-fail-fast"),
                CommandLine::new("cargo test --locked --package dataplane-tests --lib --bins --no-fail-fast"),
            ],
            Self::Golden
            | Self::Packet
            | Self::Exact
            | Self::Oracle
            | Self::Kernel
            | Self::Lab
            | Self::Cluster
            | Self::Vm
            | Self::Kind => vec![self.program()],
            // Most of their time these tests wait: for silence, and for changes to arrive.
            Self::Netns => vec![self.program().variable("RUST_TEST_THREADS", "4")],
        }
    }
}

/// What runs as one step: a tier, or some again in another place.
struct Part {
    name: &'static str,
    ground: Ground,
    /// Whether it needs no network but its own.
    own_network: bool,
    /// Whether it runs where a machine is fresh. kind needs the machine's own Docker, and takes away what it makes by itself.
    apart: bool,
    commands: Vec<CommandLine>,
}

impl Part {
    fn of(tier: Tier, whole: bool) -> Self {
        // Downloads kernels.
        let own_network = tier != Tier::Vm;
        let apart = tier != Tier::Kind;
        Self { name: tier.name(), ground: Ground::Fresh, own_network, apart, commands: tier.commands(whole) }
    }

    /// The parts of a run: its tiers, and those again that depend most on what a machine has, where something is there already.
    fn all(named: &[Tier], filter: Option<&str>) -> Vec<Self> {
        let tiers = chosen(named);
        let whole = !named.is_empty() || filter.is_some();
        let mut parts: Vec<_> = tiers.iter().map(|tier| Self::of(*tier, whole)).collect();
        let again: Vec<_> = tiers.iter().filter(|tier| Tier::AGAIN.contains(tier)).collect();
        if !again.is_empty() {
            let commands = again.iter().flat_map(|tier| tier.commands(true)).collect();
            parts.push(Self { name: "used", ground: Ground::Used, own_network: true, apart: true, commands });
        }
        parts
    }

    /// What it is, for people.
    fn title(&self) -> String {
        match self.ground {
            Ground::Fresh => format!("the tier {}", self.name),
            Ground::Used => {
                let again = Tier::AGAIN.map(Tier::name).join(", ");
                format!("of {again} again what was asked for, where a killed laboratory has left its things")
            }
        }
    }
}

/// What is asked of the verb.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order<'a> {
    /// The tiers that are named.
    pub(crate) tiers: &'a [Tier],
    /// What the names of the tests contain.
    pub(crate) filter: Option<&'a str>,
    /// How many times each tier runs.
    pub(crate) repeat: u32,
    /// The node image of the tier `kind`.
    pub(crate) node_image: Option<&'a str>,
}

/// Tells the tier `kind` its node image.
const NODE_IMAGE: &str = "PORTOLAN_KIND_NODE_IMAGE";

impl Order<'_> {
    /// The steps of this verb beside the checks.
    pub(crate) fn steps(&self) -> usize {
        1 + Part::all(self.tiers, self.filter).len() * self.repeat as usize
    }

    /// Whether something else keeps the CPUs busy in this run, counted from 0: in the second half of several.
    const fn is_busy(&self, run: u32) -> bool {
        run >= self.repeat.div_ceil(2)
    }

    /// Which run it is, for people; nothing if there is only one.
    fn run(&self, run: u32) -> String {
        let busy = if self.is_busy(run) { ", on busy CPUs" } else { "" };
        if self.repeat == 1 { String::new() } else { format!(", run {} of {}{busy}", run + 1, self.repeat) }
    }
}

/// The tiers named, else all.
pub(crate) fn chosen(tiers: &[Tier]) -> &[Tier] {
    if tiers.is_empty() { &Tier::ALL[..Tier::UNASKED] } else { tiers }
}

/// The verb, after checks of which some may have failed. The last line is `N passed, N failed`.
pub(crate) fn test(order: &Order<'_>, failed_checks: &[&str], steps: &mut Steps) -> Result<ExitCode> {
    let tiers = chosen(order.tiers);
    let homeless = homeless_tests()?;
    let mut results = Vec::new();
    steps.begin("building all that the tests start");
    if let Err(error) = build(tiers) {
        println!("{error:#}");
        results.push(("build", Summary::ONE_FAILURE));
    } else {
        for part in Part::all(order.tiers, order.filter) {
            let mut all = Summary::default();
            for number in 0..order.repeat {
                steps.begin(part.title() + &order.run(number));
                let busy = order.is_busy(number).then(Busy::begin);
                all += run(&part, order)?;
                drop(busy);
            }
            results.push((part.name, all));
        }
    }
    let mut total = Summary::default();
    println!("\ntests by tier, {} after the start:", steps.elapsed());
    for (name, summary) in &results {
        let note = if summary.ignored > 0 { ", the ignored ones among these" } else { "" };
        println!("  {name:<8} {summary}{note}");
        total += *summary;
    }
    if order.tiers.is_empty() {
        println!("  kind     was not asked for: `cargo xtask test kind` makes a Kubernetes cluster for it");
    }
    for name in failed_checks {
        println!("  the check `{name}` failed: see above");
        total += Summary::ONE_FAILURE;
    }
    for name in &homeless {
        println!("  `{name}` of tests/Cargo.toml belongs to no tier: nobody runs it");
        total += Summary::ONE_FAILURE;
    }
    if total.tests() == 0 {
        println!("  no test is called so");
    }
    println!("{total}");
    Ok(if total.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Builds the tests of these tiers and what they start, as long as there is a network.
fn build(tiers: &[Tier]) -> Result<()> {
    programs::build_programs()?;
    for command in tiers.iter().filter(|tier| **tier == Tier::Unit).flat_map(|tier| tier.commands(true)) {
        command.arg("--no-run").run()?;
    }
    let names = tiers.iter().filter(|tier| **tier != Tier::Unit).map(|tier| tier.name());
    let tests = names
        .fold(CommandLine::new("cargo test --package dataplane-tests --no-run"), |command, name| {
            command.arg("--test").arg(name)
        });
    if tiers != [Tier::Unit] {
        tests.run()?;
    }
    if tiers.contains(&Tier::Cluster) {
        image::image(None, Profile::Debug)?;
        let lab = target_folder()?.join("portolan-lab");
        CommandLine::of(&lab).arg("prepare").run()?;
    }
    if tiers.contains(&Tier::Kind) {
        image::image(None, Profile::Debug)?;
        image::lab_image()?;
    }
    Ok(())
}

/// Runs the commands of one part.
fn run(part: &Part, order: &Order<'_>) -> Result<Summary> {
    let filter = order.filter;
    let start = Instant::now();
    let mut summary = Summary::default();
    for command in &part.commands {
        let command = match filter {
            Some(filter) => command.clone().arg("--").arg(filter),
            None => command.clone(),
        };
        let command = match order.node_image {
            Some(image) => command.variable(NODE_IMAGE, image),
            None => command,
        };
        summary += run_and_count(part, &command)?;
    }
    if summary.tests() == 0 && filter.is_none() {
        println!("`{}` ran no test: that counts as a failure", part.name);
        summary += Summary::ONE_FAILURE;
    }
    println!("=== {}: {summary} in {}", part.name, clock(start.elapsed()));
    Ok(summary)
}

/// Runs `cargo test` with its output shown, and counts. A program that dies without its closing line is one failure.
fn run_and_count(part: &Part, command: &CommandLine) -> Result<Summary> {
    println!("$ {command}");
    let place = part.apart.then(Run::new);
    let command = match &place {
        Some(place) => place.wrap(command.clone(), part.ground, part.own_network)?,
        None => command.clone(),
    };
    let command = limited(command);
    let mut process = command.command();
    let mut child =
        process.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run `{command}`"))?;
    let stdout = child.stdout.take().context("the test program has no standard output")?;
    let shown = std::thread::spawn(move || show_and_count(stdout));
    let status = child.wait().with_context(|| format!("cannot wait for `{command}`"))?;
    // Whoever still runs may hold the pipe open.
    if let Some(place) = place {
        place.end();
    }
    let mut summary = shown.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    if !status.success() && summary.failed == 0 {
        println!("`{command}` ended with {status}");
        summary += Summary::ONE_FAILURE;
    }
    Ok(summary)
}

fn show_and_count(stdout: ChildStdout) -> Result<Summary> {
    let mut summary = Summary::default();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("cannot read what the tests print")?;
        let mut out = io::stdout().lock();
        out.write_all(&line)
            .and_then(|()| out.write_all(b"\n"))
            .context("cannot show what the tests print")?;
        // A test that is in the middle of a line when it ends leaves its own words before the result.
        let text = String::from_utf8_lossy(&line);
        if let Some(at) = text.find("test result: ") {
            summary += Summary::of_line(&text[at..]).unwrap_or_default();
        }
    }
    Ok(summary)
}

/// The command, ended with all its children after the time limit unless somebody watches.
fn limited(command: CommandLine) -> CommandLine {
    if io::stdin().is_terminal() {
        return command;
    }
    command.within(["timeout", "--kill-after=60", &TIME_LIMIT.as_secs().to_string()].map(str::to_owned))
}

/// Test programs of `dataplane-tests` that are no tier.
fn homeless_tests() -> Result<Vec<String>> {
    let path = workspace().join("tests/Cargo.toml");
    let manifest = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let names = test_names(&manifest).into_iter();
    Ok(names.filter(|name| Tier::ALL.iter().all(|tier| tier.name() != name)).collect())
}

/// The names in the `[[test]]` tables of a manifest.
fn test_names(manifest: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut in_test = false;
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            in_test = line == "[[test]]";
        } else if in_test && let Some(("name", value)) = line.split_once('=').map(|(k, v)| (k.trim(), v)) {
            names.push(value.trim().trim_matches('"').to_owned());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_test_program_of_a_manifest_is_seen() {
        let manifest = "[package]\nname = \"x\"\n[[test]]\nname = \"golden\"\n\n[[bin]]\nname = \"b\"\n[[test]]\n\
                        test = false\nname=\"netns\"\n";
        assert_eq!(test_names(manifest), ["golden", "netns"]);
    }

    #[test]
    fn what_depends_on_the_machine_runs_again_where_it_was_used() {
        let names = |tiers: &[Tier]| Part::all(tiers, None).iter().map(|part| part.name).collect::<Vec<_>>();
        assert_eq!(names(&[Tier::Golden, Tier::Lab]), ["golden", "lab", "used"]);
        assert_eq!(names(&[Tier::Golden, Tier::Netns]), ["golden", "netns"]);
        assert_eq!(Part::all(&[], None).last().unwrap().commands.len(), Tier::AGAIN.len());
        let vm = |tiers: &[Tier]| Part::all(tiers, None).into_iter().find(|part| part.name == "vm").unwrap();
        assert!(vm(&[]).commands[0].to_string().ends_with("-- short::"));
        assert!(!vm(&[Tier::Vm]).commands[0].to_string().contains("short"));
    }

    #[test]
    fn kind_runs_only_where_it_is_named() {
        assert!(Tier::ALL[..Tier::UNASKED].iter().all(|tier| *tier != Tier::Kind));
        assert_eq!((Tier::ALL.len(), chosen(&[]).len()), (Tier::UNASKED + 1, Tier::UNASKED));
        assert_eq!(chosen(&[Tier::Kind]), [Tier::Kind]);
        let parts = Part::all(&[Tier::Kind], None);
        assert!(parts.len() == 1 && !parts[0].apart);
    }

    #[test]
    fn of_several_runs_the_second_half_is_on_busy_cpus() {
        let busy = |repeat| {
            let order = Order { tiers: &[], filter: None, repeat, node_image: None };
            (0..repeat).map(|run| order.is_busy(run)).collect::<Vec<_>>()
        };
        assert_eq!(busy(1), [false]);
        assert_eq!(busy(2), [false, true]);
        assert_eq!(busy(10), [[false; 5], [true; 5]].concat());
        assert_eq!(
            Order { tiers: &[], filter: None, repeat: 10, node_image: None }.run(9),
            ", run 10 of 10, on busy CPUs"
        );
        let ten = Order { tiers: &[Tier::Golden, Tier::Lab], filter: None, repeat: 10, node_image: None };
        assert_eq!(ten.steps(), 31, "the build, and of golden, lab and what is used ten each");
    }

    #[test]
    fn a_tier_is_named_on_the_command_line_as_its_test_program_is() {
        for tier in Tier::ALL {
            let value = tier.to_possible_value().unwrap();
            assert_eq!(value.get_name(), tier.name());
        }
    }
}
