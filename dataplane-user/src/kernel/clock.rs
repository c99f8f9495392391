//! The kernel's coarse clock, as the programs write it into flows: a program that returns it, run now and then.

use super::bpf::{TestRun, prog_test_run};
use super::object::{Object, ObjectError};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Name of the program that returns the tick.
const PROGRAM: &str = "clock";
/// The fastest clock there is (1000 Hz), taken until this one has been watched for a while: nothing looks older than it is.
const FASTEST_TICKS_PER_SECOND: f64 = 1_000.0 / (1 << dataplane_common::flow::TICK_SHIFT) as f64;
/// How long it is watched before its speed is known well enough.
const WATCHED: Duration = Duration::from_secs(60);

/// The clock.
#[derive(Debug)]
pub struct Clock {
    program: OwnedFd,
    first: (u32, Instant),
    last: Mutex<u32>,
}

impl Clock {
    /// The clock of the programs of `object`.
    ///
    /// # Errors
    /// If its program cannot be loaded or run.
    pub fn new(object: &mut Object) -> Result<Self, ObjectError> {
        object.load(PROGRAM)?;
        let failed = |source| ObjectError::Refused { what: format!("a run of {PROGRAM}"), source };
        let program = object.program(PROGRAM)?.try_clone_to_owned().map_err(failed)?;
        let tick = run(&program).map_err(failed)?;
        Ok(Self { program, first: (tick, Instant::now()), last: Mutex::new(tick) })
    }

    /// The tick now. If the program cannot be run, the last one that was seen: nothing looks older than it is.
    pub fn tick(&self) -> u32 {
        let mut last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match run(&self.program) {
            Ok(tick) => *last = tick,
            Err(error) => tracing::debug!("cannot read the kernel's clock: {error}"),
        }
        *last
    }

    /// How many ticks there are in a second on this kernel.
    pub fn ticks_per_second(&self) -> f64 {
        let (tick, then) = self.first;
        let elapsed = then.elapsed();
        if elapsed < WATCHED {
            return FASTEST_TICKS_PER_SECOND;
        }
        let ticks = dataplane_common::flow::ticks_between(tick, self.tick());
        (f64::from(ticks) / elapsed.as_secs_f64()).max(f64::MIN_POSITIVE)
    }
}

fn run(program: &OwnedFd) -> io::Result<u32> {
    let packet = [0; 64];
    let result = prog_test_run(program.as_fd(), &TestRun { data: &packet, ..TestRun::default() })?;
    // The program gives the low 32 bits of jiffies.
    Ok(dataplane_common::flow::tick(result.retval))
}
