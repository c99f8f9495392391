//! Brings what programs count in flows to the totals of Services and endpoints: by a program, for only an atomic exchange takes each
//! packet once.

use super::bpf::{TestRun, prog_test_run};
use super::object::{Object, ObjectError};
use dataplane_common::flow::FlowKey;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

/// Name of the program.
const PROGRAM: &str = "fold";

/// How many keys it takes at once: a test packet fits into a page, beside the kernel's own part of it.
const NAMED: usize = 64;

/// The program.
#[derive(Debug)]
pub struct Fold {
    program: OwnedFd,
}

impl Fold {
    /// That of `object`.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub fn new(object: &mut Object) -> Result<Self, ObjectError> {
        object.load(PROGRAM)?;
        let failed = |source| ObjectError::Refused { what: format!("a run of {PROGRAM}"), source };
        Ok(Self { program: object.program(PROGRAM)?.try_clone_to_owned().map_err(failed)? })
    }

    /// Adds what was counted in these halves of flows to the totals.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fold(&self, keys: &[FlowKey]) -> io::Result<()> {
        for keys in keys.chunks(NAMED) {
            let run = TestRun { data: bytemuck::cast_slice(keys), ..TestRun::default() };
            prog_test_run(self.program.as_fd(), &run)?;
        }
        Ok(())
    }
}
