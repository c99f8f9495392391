//! Brings what programs count in flows to the totals of Services and endpoints: by a program, for only an atomic exchange takes each
//! packet once. And has a program count off flows that the agent is about to remove, which takes each once as well.

use super::bpf::{TestRun, prog_test_run};
use super::object::{Object, ObjectError};
use dataplane_common::flow::FlowKey;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

/// Names of the programs.
const FOLD: &str = "fold";
const END: &str = "end";

/// How many keys it takes at once: a test packet fits into a page, beside the kernel's own part of it.
const NAMED: usize = 64;

/// The programs.
#[derive(Debug)]
pub struct Fold {
    fold: OwnedFd,
    end: OwnedFd,
}

impl Fold {
    /// Those of `object`.
    ///
    /// # Errors
    /// If one cannot be loaded.
    pub fn new(object: &mut Object) -> Result<Self, ObjectError> {
        let mut program = |name| {
            object.load(name)?;
            let failed = |source| ObjectError::Refused { what: format!("a run of {name}"), source };
            object.program(name)?.try_clone_to_owned().map_err(failed)
        };
        Ok(Self { fold: program(FOLD)?, end: program(END)? })
    }

    /// Adds what was counted in these halves of flows to the totals.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fold(&self, keys: &[FlowKey]) -> io::Result<()> {
        run(&self.fold, keys)
    }

    /// The same, and counts the flows off that these are halves of: they are about to be removed.
    ///
    /// # Errors
    /// The kernel's.
    pub fn end(&self, keys: &[FlowKey]) -> io::Result<()> {
        run(&self.end, keys)
    }
}

fn run(program: &OwnedFd, keys: &[FlowKey]) -> io::Result<()> {
    for keys in keys.chunks(NAMED) {
        let run = TestRun { data: bytemuck::cast_slice(keys), ..TestRun::default() };
        prog_test_run(program.as_fd(), &run)?;
    }
    Ok(())
}
