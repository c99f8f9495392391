//! Floods: honest clients and established connections while all CPUs send SYNs that nobody means (B16), and questions by UDP through
//! a node port to one endpoint on another node, as many as a resolver gets (B17). Portolan beside the real kube-proxy.

mod questions;
mod syns;

pub use questions::Questions;
pub use syns::{Honest, Syns};

use crate::bench::record::{Machine, RECORDS, Record};
use crate::bench::target::{Judgement, Limit, Ratio};
use crate::lab;
use crate::lab::layout::{Layout, PLAIN, Proxy, Who};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// The kind of its records.
pub const KIND: &str = "flood";

/// B16: a part of what the rival's clients make.
const HONEST_LIMIT: f64 = 0.5;
/// B16: half-open flows that there is room for.
const HALF_OPEN_LIMIT: f64 = 131_072.0;
/// B17: questions in a second.
const QUESTIONS_LIMIT: f64 = 10_000.0;
/// For how long it is flooded; a record of less is a short one.
const SECONDS: f64 = 60.0;
/// How long a proxy may take to serve.
const START: Duration = Duration::from_secs(120);
/// How long an honest client waits.
const PATIENCE: Duration = Duration::from_secs(5);

/// Two nodes; a client far away comes in by a VPN that ends on the first, with a round trip of 200 ms.
static LAYOUT: Layout = Layout {
    name: "flood",
    about: "a node that is flooded, with a client far away",
    second: &[Who::Node, Who::Vpn],
    vpn_delay_ms: 100,
    ..PLAIN
};

/// How long, and beside whom.
#[derive(Clone, Debug, clap::Args)]
pub struct FloodArgs {
    /// Seconds of each flood.
    #[arg(long, default_value_t = SECONDS)]
    pub seconds: f64,
    /// Connections that are established before.
    #[arg(long, default_value_t = 1_000)]
    pub streams: usize,
    /// Questions by UDP in a second.
    #[arg(long, default_value_t = 10_000)]
    pub rate: u32,
    /// Portolan alone, without kube-proxy.
    #[arg(long)]
    pub alone: bool,
    /// The folder that the record is written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// All that was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Under a flood of SYNs, by proxy.
    pub syns: Vec<Syns>,
    /// Questions by UDP, by proxy.
    pub questions: Vec<Questions>,
}

/// Floods, prints, and writes the record.
///
/// # Errors
/// If a laboratory or a proxy fails. What went wrong under a flood is in the record.
pub fn run(args: &FloodArgs) -> Result<Record<Measured>> {
    lab::on_signal_exit_with(130);
    let proxies: &[Proxy] = if args.alone { &[Proxy::Portolan] } else { &[Proxy::Portolan, Proxy::Nftables] };
    let measured = measure(args, proxies, |line| println!("{line}"))?;
    let mut record = Record::new(KIND, Machine::here([]), args.seconds < SECONDS || args.alone, measured);
    record.targets = judge(&record.measured);
    record.notes = vec![
        "The flood, the honest clients, the endpoints and the kernel's work for all of them share the same CPUs.".into(),
        format!("A connection or a question counts as failed after {} s.", PATIENCE.as_secs()),
    ];
    record.finish(&args.records)
}

/// Measures every proxy in a laboratory of its own.
///
/// # Errors
/// As [`run`].
pub fn measure(args: &FloodArgs, proxies: &[Proxy], tell: impl Fn(&str)) -> Result<Measured> {
    let (mut measured, time) = (Measured::default(), Duration::from_secs_f64(args.seconds));
    for proxy in proxies {
        let raised = LAYOUT.raise()?;
        let _serving = raised.start(*proxy, START)?;
        let syns = syns::measure(&raised, *proxy, time, args.streams)?;
        syns.lines().iter().for_each(|line| tell(line));
        measured.syns.push(syns);
    }
    for proxy in proxies {
        let raised = LAYOUT.raise()?;
        let _serving = raised.start(*proxy, START)?;
        let questions = questions::measure(&raised, *proxy, time, args.rate)?;
        tell(&questions.line());
        measured.questions.push(questions);
    }
    Ok(measured)
}

fn judge(measured: &Measured) -> Vec<Judgement> {
    let mut all = Vec::new();
    let of = |proxy| measured.syns.iter().find(|syns| syns.proxy == proxy);
    if let Some(own) = of(Proxy::Portolan) {
        for honest in &own.honest {
            let rival =
                of(Proxy::Nftables).and_then(|rival| rival.honest.iter().find(|at| at.who == honest.who));
            let ratio = rival.filter(|rival| rival.good > 0);
            let ratio = ratio.map(|rival| Ratio::exactly(honest.good as f64 / rival.good as f64));
            let limit = Limit::at_least(HONEST_LIMIT, "x kube-proxy nftables");
            all.push(Judgement::new(
                "B16",
                format!("served under a flood of SYNs: {}", honest.who),
                ratio,
                limit,
            ));
        }
        let lost = Ratio::exactly(own.lost as f64);
        let what = "established connections that the flood broke";
        all.push(Judgement::new("B16", what, Some(lost), Limit::at_most(0.0, "")));
        let what = "half-open flows under the flood";
        let half_open = own.half_open.map(|number| Ratio::exactly(number as f64));
        all.push(Judgement::new("B16", what, half_open, Limit::at_most(HALF_OPEN_LIMIT, "flows")));
    }
    if let Some(own) = measured.questions.iter().find(|questions| questions.proxy == Proxy::Portolan) {
        let rate = Ratio::exactly(own.good as f64 / own.seconds);
        // The last of them are on their way when the time is over.
        let limit = Limit::at_least(0.999 * QUESTIONS_LIMIT, "questions answered in a second");
        all.push(Judgement::new(
            "B17",
            "by UDP, through a node port to one endpoint elsewhere",
            Some(rate),
            limit,
        ));
        let failed = Ratio::exactly(own.failed as f64);
        all.push(Judgement::new("B17", "of these failed", Some(failed), Limit::at_most(0.0, "")));
    }
    all
}
