//! Loops whose body the verifier walks once, however often it runs.

use core::ffi::c_void;

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// With the next step.
    Next,
    /// No further.
    Done,
}

/// A loop's body and what it works on.
pub trait Steps {
    /// One step, the first with index 0.
    fn step(&mut self, index: u32) -> Step;
}

/// Takes at most `limit` steps (`bpf_loop`).
#[inline(always)]
pub fn repeat<S: Steps>(limit: u32, steps: &mut S) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the callback has the signature that the helper calls, and `steps` outlives the call.
    unsafe {
        aya_ebpf::helpers::bpf_loop(limit, call::<S> as *mut c_void, (&raw mut *steps).cast(), 0);
    }
    #[cfg(not(target_arch = "bpf"))]
    for index in 0..limit {
        // SAFETY: as above.
        if unsafe { call::<S>(index, (&raw mut *steps).cast()) } != 0 {
            break;
        }
    }
}

/// What the helper calls: 1 ends the loop.
unsafe extern "C" fn call<S: Steps>(index: u32, steps: *mut c_void) -> i64 {
    // SAFETY: `repeat` passes what outlives the loop.
    let steps = unsafe { &mut *steps.cast::<S>() };
    (steps.step(index) == Step::Done) as i64
}
