//! One agent for each network namespace. Two with pin folders of their own would not see each other, and harm each other all
//! the same: both give out the same translated source ports, replace each other's clsact filters, and take each other's
//! snapshot for a stranger's.

use super::pins::ENDING;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::{Duration, Instant};

/// An abstract address of Unix sockets, which a network namespace has once, and which is free again when its process ends.
const NAME: &str = "portolan-agent";

/// Why this agent must not run.
#[derive(Debug, thiserror::Error)]
pub enum AloneError {
    /// There is one.
    #[error(
        "another Portolan agent serves this network namespace by another --bpffs: they would give out the same source ports \
         and replace each other's programs. `ss -xlp src @{NAME}` names it: stop it, or run this one elsewhere"
    )]
    Taken,
    /// Nobody can tell.
    #[error("cannot tell whether another Portolan agent serves this network namespace: {0}")]
    Socket(#[from] io::Error),
}

/// This process has the network namespace as long as it holds this.
#[derive(Debug)]
pub struct Alone(#[expect(dead_code, reason = "it is held, not used")] UnixListener);

/// Takes the network namespace that the process is in. One that is just ending is waited for.
///
/// # Errors
/// If another agent has it.
pub fn claim() -> Result<Alone, AloneError> {
    claim_as(NAME, ENDING)
}

fn claim_as(name: &str, patience: Duration) -> Result<Alone, AloneError> {
    let address = SocketAddr::from_abstract_name(name)?;
    let begun = Instant::now();
    loop {
        match UnixListener::bind_addr(&address) {
            Ok(socket) => return Ok(Alone(socket)),
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => return Err(error.into()),
            Err(_) if begun.elapsed() >= patience => return Err(AloneError::Taken),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_told_and_one_that_ends_makes_room() {
        let name = format!("portolan-test-{}", std::process::id());
        let first = claim_as(&name, Duration::ZERO).unwrap();
        let error = claim_as(&name, Duration::ZERO).unwrap_err().to_string();
        assert!(error.starts_with("another Portolan agent serves this network namespace"), "{error}");
        let ending = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(first);
        });
        claim_as(&name, Duration::from_secs(10)).unwrap();
        ending.join().unwrap();
    }
}
