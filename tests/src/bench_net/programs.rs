//! What Portolan's programs take of an operation, by the kernel's own clock (`BPF_ENABLE_STATS`).

use anyhow::Result;
use aya::programs::loaded_programs;
use aya::sys::{Stats, enable_stats};
use dataplane_user::kernel::bpf::program_runs;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, OwnedFd};

/// What one program took. The kernel reads its clock before and after each run, and part of that is in the time.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProgramShare {
    /// Its name.
    pub program: String,
    /// How often it ran for an operation.
    pub runs: f64,
    /// Nanoseconds of a run.
    pub nanoseconds: f64,
}

impl ProgramShare {
    /// Nanoseconds of an operation.
    pub(crate) fn per_operation(&self) -> f64 {
        self.runs * self.nanoseconds
    }
}

/// Runs and nanoseconds of programs since they were loaded, by id.
type Totals = BTreeMap<u32, (String, [u64; 2])>;

/// A count under way: of all programs in the kernel, so nothing but the leg in question may be busy.
pub(super) struct Count {
    before: Totals,
    _enabled: OwnedFd,
}

impl Count {
    pub(super) fn begin() -> Result<Self> {
        let _enabled = enable_stats(Stats::RunTime)?;
        Ok(Self { before: totals()?, _enabled })
    }

    /// The programs that ran for at least one in a thousand of `operations`, the most expensive first.
    pub(super) fn end(self, operations: u64) -> Result<Vec<ProgramShare>> {
        Ok(shares(&self.before, totals()?, operations))
    }
}

fn shares(before: &Totals, after: Totals, operations: u64) -> Vec<ProgramShare> {
    let mut by_name = BTreeMap::<String, [u64; 2]>::new();
    for (id, (name, [runs, time])) in after {
        let [runs_before, time_before] = before.get(&id).map_or([0; 2], |(_, before)| *before);
        let [all_runs, all_time] = by_name.entry(name).or_default();
        *all_runs += runs - runs_before;
        *all_time += time - time_before;
    }
    let operations = operations.max(1);
    by_name.retain(|_, [runs, _]| *runs * 1_000 >= operations);
    let mut shares: Vec<_> = by_name
        .into_iter()
        .map(|(program, [runs, time])| ProgramShare {
            program,
            runs: runs as f64 / operations as f64,
            nanoseconds: time as f64 / runs as f64,
        })
        .collect();
    shares.sort_by(|a, b| b.per_operation().total_cmp(&a.per_operation()));
    shares
}

fn totals() -> Result<Totals> {
    let mut totals = Totals::new();
    for program in loaded_programs() {
        let program = program?;
        // One that is gone by now has nothing to say.
        let Ok(fd) = program.fd() else { continue };
        let (runs, time) = program_runs(fd.as_fd())?;
        let name = program.name_as_str().unwrap_or_default().to_owned();
        totals.insert(program.id(), (name, [runs, time]));
    }
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ran_meanwhile_is_shared_among_the_operations() {
        let totals = |rows: &[(u32, &str, [u64; 2])]| -> Totals {
            rows.iter().map(|(id, name, counts)| (*id, ((*name).to_owned(), *counts))).collect()
        };
        let before = totals(&[(1, "in", [100, 5_000]), (2, "out", [7, 7]), (4, "idle", [9, 9])]);
        // A program that is loaded twice, one that was loaded meanwhile, and one that did nothing.
        let after = totals(&[
            (1, "in", [1_100, 105_000]),
            (2, "out", [2_007, 80_007]),
            (3, "in", [1_000, 300_000]),
            (4, "idle", [9, 9]),
        ]);
        let shares = shares(&before, after, 1_000);
        let rows: Vec<_> = shares.iter().map(|s| (s.program.as_str(), s.runs, s.nanoseconds)).collect();
        assert_eq!(rows, [("in", 2.0, 200.0), ("out", 2.0, 40.0)]);
        assert_eq!(shares[0].per_operation(), 400.0);
    }
}
