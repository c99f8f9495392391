//! Something else that keeps all CPUs busy, as on a machine that does other work beside the tests.

use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

/// One thread for each CPU that does nothing but take its time, until this is dropped.
#[derive(Debug)]
pub(crate) struct Busy {
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Busy {
    /// Begins.
    pub(crate) fn begin() -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let spin = |end: Arc<AtomicBool>| {
            while !end.load(Ordering::Relaxed) {
                spin_loop();
            }
        };
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..cpus).map(|_| {
            let end = end.clone();
            thread::spawn(move || spin(end))
        });
        Self { threads: threads.collect(), end }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It cannot fail: it only waits.
            let _ = thread.join();
        }
    }
}
