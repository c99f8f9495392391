//! The kernel's coarse clock, as the programs write it into flows: a program that returns it, run now and then.

use super::bpf::{TestRun, prog_test_run};
use super::object::{Object, ObjectError};
use dataplane_common::flow::{TICK_SHIFT, tick_shift};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Mutex;
use std::time::Duration;

/// Name of the program that returns the tick.
const PROGRAM: &str = "clock";

/// The clock.
#[derive(Debug)]
pub struct Clock {
    program: OwnedFd,
    last: Mutex<u32>,
    tick_length: Duration,
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
        let tick_length = tick_length(jiffy().map_err(failed)?);
        Ok(Self { program, last: Mutex::new(tick), tick_length })
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

    /// The time from one tick to the next on this kernel.
    pub fn tick_length(&self) -> Duration {
        self.tick_length
    }
}

/// The time from one tick to the next, where a jiffy lasts so long.
pub fn tick_length(jiffy: Duration) -> Duration {
    jiffy.saturating_mul(1 << shift(jiffy))
}

/// How many jiffies a tick has, as the logarithm to the base of two, where a jiffy lasts so long.
pub fn shift(jiffy: Duration) -> u32 {
    let in_a_second = Duration::from_secs(1).as_nanos().checked_div(jiffy.as_nanos()).unwrap_or_default();
    tick_shift(u32::try_from(in_a_second).unwrap_or(u32::MAX))
}

/// The same on this kernel; that of 250 Hz if it does not tell.
pub fn own_shift() -> u32 {
    jiffy().map_or(TICK_SHIFT, shift)
}

/// How long a jiffy lasts: the resolution of the coarse clocks, which is 1/`CONFIG_HZ` by definition (`KTIME_LOW_RES` in
/// `kernel/time/posix-timers.c`). The ticks themselves cannot tell: they wrap.
///
/// # Errors
/// The kernel's.
pub fn jiffy() -> io::Result<Duration> {
    let mut resolution = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `resolution` is as long as the kernel expects and outlives the call.
    if unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut resolution) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let whole = u64::try_from(resolution.tv_sec).ok().zip(u32::try_from(resolution.tv_nsec).ok());
    let jiffy = whole.map(|(seconds, nanoseconds)| Duration::new(seconds, nanoseconds));
    jiffy.filter(|jiffy| !jiffy.is_zero()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn run(program: &OwnedFd) -> io::Result<u32> {
    let packet = [0; 64];
    let result = prog_test_run(program.as_fd(), &TestRun { data: &packet, ..TestRun::default() })?;
    Ok(result.retval)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jiffy_is_as_long_as_a_kernel_can_have_it() {
        let rates = [100, 250, 300, 1_000].map(|hz| Duration::from_nanos((1_000_000_000 + hz / 2) / hz));
        let jiffy = jiffy().unwrap();
        assert!(rates.contains(&jiffy), "{jiffy:?}");
    }
}
