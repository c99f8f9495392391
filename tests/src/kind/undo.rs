//! What a run makes and takes away again: at its end, if it fails, and if a signal ends it.
//!
//! Whoever makes something says at once how it goes ([`later`]). All goes in the reverse order, once.

use crate::lab;
use anyhow::{Context as _, Result, ensure};
use std::io::Write as _;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

type Step = Box<dyn FnOnce() -> Result<()> + Send>;

static STEPS: Mutex<Vec<(String, Step)>> = Mutex::new(Vec::new());
/// The process that this one waits for.
static RUNNING: Mutex<Option<u32>> = Mutex::new(None);
/// How long a program that a signal interrupts may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes how something that was made goes away.
pub(super) fn later(what: impl Into<String>, step: impl FnOnce() -> Result<()> + Send + 'static) {
    lock(&STEPS).push((what.into(), Box::new(step)));
}

/// Takes away everything that was noted, and says what that was. What fails is told, and the rest goes all the same.
pub(super) fn all() -> bool {
    // Held to the end: whoever else comes to undo waits until it is done.
    let mut steps = lock(&STEPS);
    let mut good = true;
    while let Some((what, step)) = steps.pop() {
        println!("  {what}");
        if let Err(error) = step() {
            eprintln!("portolan-lab: {what}: {error:#}");
            good = false;
        }
    }
    good
}

/// From now on a signal takes everything away and ends the process.
pub(super) fn on_signals() {
    std::thread::spawn(|| {
        let status = lab::wait_for_signal();
        println!();
        interrupt();
        let good = all();
        std::process::exit(if good { status } else { 1 });
    });
}

/// Ends the program that is being waited for, so that it makes nothing that is being taken away.
fn interrupt() {
    let Some(pid) = *lock(&RUNNING) else { return };
    // SAFETY: a system call. The child is waited for only after it is no longer noted here, so the number is still its own.
    unsafe { libc::kill(pid as libc::pid_t, libc::SIGTERM) };
    let end = std::time::Instant::now() + PATIENCE;
    while lock(&RUNNING).is_some() && std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a program with its output shown.
pub(super) fn run(command: &mut Command) -> Result<()> {
    let name = told(command);
    let status = wait(command.stdin(Stdio::null()).spawn().with_context(|| name.clone())?)?.status;
    ensure!(status.success(), "{name}: {status}");
    Ok(())
}

/// Runs a program with a text on its standard input, and returns what it printed.
pub(super) fn output(command: &mut Command, input: &str) -> Result<String> {
    let name = told(command);
    let result = attempt(command, input)?;
    let text = String::from_utf8_lossy(&result.stdout).into_owned();
    let error = String::from_utf8_lossy(&result.stderr);
    ensure!(result.status.success(), "{name}: {}\n{text}{error}", result.status);
    Ok(text)
}

/// The same, whatever the exit status is.
pub(super) fn attempt(command: &mut Command, input: &str) -> Result<Output> {
    let name = told(command);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| name.clone())?;
    if let Some(mut stdin) = child.stdin.take() {
        // Who does not read it ends with an error of its own.
        let _ = stdin.write_all(input.as_bytes());
    }
    wait(child)
}

fn wait(child: Child) -> Result<Output> {
    *lock(&RUNNING) = Some(child.id());
    let output = child.wait_with_output();
    *lock(&RUNNING) = None;
    Ok(output?)
}

/// A command as a person would type it.
fn told(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
