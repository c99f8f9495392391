//! Drift: an agent under churn for hours, and what it holds meanwhile. Services, endpoints, pods, interfaces and the API server
//! come and go; now and then the churn pauses, everything is as it was in the beginning, and what the agent holds is counted. What
//! is more at the end than early on has grown.

mod churn;
mod held;

use crate::bench::record::{Machine, RECORDS, Record};
use crate::bench::target::Ratio;
use crate::lab;
use anyhow::{Result, ensure};
use churn::Scene;
pub use held::Held;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The kind of its records.
pub const KIND: &str = "soak";

/// Samples without which nothing can be said: a quarter of them is compared with another.
const FEWEST: usize = 8;

/// How long, and how often it is looked.
#[derive(Clone, Debug, clap::Args)]
pub struct SoakArgs {
    /// Minutes of churn.
    #[arg(long, default_value_t = 120.0)]
    pub minutes: f64,
    /// Samples, evenly over that time.
    #[arg(long, default_value_t = 120)]
    pub samples: usize,
    /// The folder that the record is written to.
    #[arg(long, default_value = RECORDS)]
    pub records: PathBuf,
}

/// What was held at one moment, and what happened until then.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds since the beginning.
    pub at: f64,
    /// What the agent holds.
    pub held: Held,
    /// Milliseconds until a new Service was in the kernel.
    pub lag_ms: f64,
    /// Changes of objects, pods and interfaces until then.
    pub changes: u64,
    /// Calls of the one Service that nothing happens to, and how many of them failed.
    pub calls: [u64; 2],
}

/// All that was seen.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Measured {
    /// In the order of time.
    pub samples: Vec<Sample>,
}

/// Something that may grow: its name, how to read it off a sample, and how much of it is no growth: a share, and a number beside.
struct Series {
    name: &'static str,
    unit: &'static str,
    value: fn(&Sample) -> f64,
    share: f64,
    slack: f64,
}

/// Memory that an allocator keeps wavers; numbers of things do not.
const SERIES: [Series; 6] = [
    Series {
        name: "resident memory",
        unit: "KiB",
        value: |s| s.held.resident_kib as f64,
        share: 0.05,
        slack: 1_024.0,
    },
    Series { name: "open files", unit: "", value: |s| s.held.open_files as f64, share: 0.0, slack: 2.0 },
    Series { name: "threads", unit: "", value: |s| s.held.threads as f64, share: 0.0, slack: 2.0 },
    Series {
        name: "memory of maps and programs",
        unit: "KiB",
        value: |s| s.held.kernel_kib as f64,
        share: 0.05,
        slack: 1_024.0,
    },
    Series { name: "pins", unit: "", value: |s| s.held.pins as f64, share: 0.0, slack: 0.0 },
    Series { name: "change to kernel", unit: "ms", value: |s| s.lag_ms, share: 1.0, slack: 50.0 },
];

/// Median early on and at the end: the second quarter of the samples (the first fills caches) and the last.
fn ends(samples: &[Sample], value: fn(&Sample) -> f64) -> Option<[f64; 2]> {
    let quarter = samples.len() / 4;
    let median = |part: &[Sample]| Ratio::among(part.iter().map(value)).map(|ratio| ratio.median);
    let early = median(samples.get(quarter..2 * quarter)?)?;
    let late = median(samples.get(samples.len() - quarter..)?)?;
    Some([early, late])
}

impl Measured {
    /// What has grown, in words, and what failed. Nothing if all is well.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.samples.len() < FEWEST {
            faults.push(format!("{} samples say nothing", self.samples.len()));
            return faults;
        }
        for Series { name, unit, value, share, slack } in &SERIES {
            let Some([early, late]) = ends(&self.samples, *value) else { continue };
            if late > early * (1.0 + share) + slack {
                faults.push(format!("{name} grew from {early:.0} to {late:.0} {unit}"));
            }
        }
        if let Some(Sample { calls: [made, failed], .. }) = self.samples.last() {
            if *failed > 0 {
                faults.push(format!("{failed} of {made} calls failed"));
            } else if *made == 0 {
                faults.push("nobody called".into());
            }
        }
        faults
    }

    /// A line for each series: its median early on and at the end.
    pub fn rows(&self) -> Vec<[String; 3]> {
        let row = |series: &Series| {
            let [early, late] = ends(&self.samples, series.value)?;
            let name = if series.unit.is_empty() {
                series.name.into()
            } else {
                format!("{}, {}", series.name, series.unit)
            };
            Some([name, format!("{early:.0}"), format!("{late:.0}")])
        };
        SERIES.iter().filter_map(row).collect()
    }

    /// Each series as points over minutes, for a plot, as shares of its largest value.
    pub fn lines(&self) -> Vec<(&'static str, Vec<(f64, f64)>)> {
        let line = |series: &Series| {
            let most = self.samples.iter().map(series.value).fold(f64::MIN_POSITIVE, f64::max);
            let points = self.samples.iter().map(|sample| (sample.at / 60.0, (series.value)(sample) / most));
            (series.name, points.collect())
        };
        SERIES.iter().map(line).collect()
    }
}

/// Raises a laboratory, has everything come and go in it for that time, and looks.
///
/// # Errors
/// If the laboratory fails. What grew is in [`Measured::faults`].
pub fn soak(time: Duration, samples: usize, mut tell: impl FnMut(&Sample)) -> Result<Measured> {
    ensure!(samples >= FEWEST, "at least {FEWEST} samples");
    let scene = Scene::raise()?;
    let begun = Instant::now();
    let mut measured = Measured::default();
    scene.under_calls(|calls| {
        for number in 1..=samples {
            scene.churn_until(begun + time.mul_f64(number as f64 / samples as f64))?;
            let lag_ms = scene.settle()?.as_secs_f64() * 1e3;
            let held = Held::by(&scene.agent()?, &scene.pins())?;
            let at = begun.elapsed().as_secs_f64();
            let sample = Sample { at, held, lag_ms, changes: scene.changes(), calls: calls.counts() };
            tell(&sample);
            measured.samples.push(sample);
        }
        Ok(())
    })?;
    Ok(measured)
}

/// The verb: soaks, prints and writes the record.
///
/// # Errors
/// As [`soak`].
pub fn run(args: &SoakArgs) -> Result<Record<Measured>> {
    lab::on_signal_exit_with(130);
    let print = |sample: &Sample| {
        let Held { resident_kib, open_files, threads, kernel_kib, pins } = sample.held;
        println!(
            "{:6.1} min: {resident_kib} KiB resident, {open_files} files, {threads} threads, {kernel_kib} KiB in the kernel, {pins} \
             pins, {:.0} ms; {} changes, {} calls, {} failed",
            sample.at / 60.0,
            sample.lag_ms,
            sample.changes,
            sample.calls[0],
            sample.calls[1]
        );
    };
    let measured = soak(Duration::from_secs_f64(args.minutes * 60.0), args.samples, print)?;
    let mut record = Record::new(KIND, Machine::here([]), args.minutes < 120.0, measured);
    record.void = record.measured.faults();
    record.finish(&args.records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(number: u64, pins: u64, resident_kib: u64) -> Sample {
        let held = Held { resident_kib, open_files: 60, threads: 9, kernel_kib: 30_000, pins };
        Sample { at: number as f64 * 60.0, held, lag_ms: 3.0, changes: number * 100, calls: [number, 0] }
    }

    #[test]
    fn what_is_more_at_the_end_than_early_on_has_grown() {
        let steady = Measured { samples: (0..16).map(|n| sample(n, 40, 20_000 + n % 3 * 100)).collect() };
        assert_eq!(steady.faults(), [] as [String; 0]);
        let one_pin_each = Measured { samples: (0..16).map(|n| sample(n, 40 + n, 20_000)).collect() };
        assert_eq!(one_pin_each.faults(), ["pins grew from 46 to 54 "]);
        let leak = Measured { samples: (0..16).map(|n| sample(n, 40, 20_000 + n * 500)).collect() };
        assert_eq!(leak.faults().len(), 1);
        // What fills in the beginning and then stays is no growth.
        let filled =
            Measured { samples: (0..16).map(|n| sample(n, 40, 20_000 + n.min(3) * 5_000)).collect() };
        assert_eq!(filled.faults(), [] as [String; 0]);
    }

    #[test]
    fn a_call_that_failed_is_a_fault_and_so_is_none() {
        let with =
            |calls| Measured { samples: (0..8).map(|n| Sample { calls, ..sample(n, 40, 20_000) }).collect() };
        assert_eq!(with([50, 1]).faults(), ["1 of 50 calls failed"]);
        assert_eq!(with([0, 0]).faults(), ["nobody called"]);
        assert_eq!(Measured::default().faults(), ["0 samples say nothing"]);
    }
}
