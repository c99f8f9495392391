//! The agent's socket on its own node: HTTP, as at the other ports, but that only root may ask.
//!
//! It lies in the folder of the names of Services, which only root may enter; a socket of an agent that was killed is replaced.
//! `curl --unix-socket … http://agent/status` asks it as well.

use crate::admin::names;
use crate::http::{LONGEST, Pages, answer};
use std::fs::{self, File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

/// How long the agent may take to answer before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many may ask at once. Root can ask more, and waits.
const CLIENTS: usize = 8;
/// Its name beside the names of Services.
const NAME: &str = "agent.sock";

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// Nobody listens.
    #[error("no agent answers at {path}: {source}. Does one run with this --bpffs, and is this root?")]
    Nobody {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It does not answer.
    #[error("the agent at {path} does not answer: {source}. `/livez` tells whether it hangs")]
    Silent {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It answered something else.
    #[error("the agent at {path} answered {what}: is it of another version?")]
    Strange {
        /// The socket.
        path: PathBuf,
        /// What.
        what: String,
    },
}

/// The socket of the agent that has this pin folder.
pub fn path(bpffs: &Path) -> PathBuf {
    names::path(bpffs).with_file_name(NAME)
}

/// The socket by a path that is short enough for an address, and what keeps that path alive.
fn short(path: &Path) -> io::Result<(PathBuf, File)> {
    let folder = File::open(path.parent().unwrap_or(Path::new("/")))?;
    Ok((PathBuf::from(format!("/proc/self/fd/{}/{NAME}", folder.as_raw_fd())), folder))
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    names::make_folder(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let (short, _folder) = short(path)?;
    let listener = UnixListener::bind(short)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers at the socket of a pin folder until the task is aborted. Without it an agent serves all the same, so what goes wrong is
/// a warning.
pub async fn serve(bpffs: PathBuf, pages: Pages) {
    let path = path(&bpffs);
    let listener = match listen(&path) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(
                "`portolan status` will not find this agent: no socket at {}: {error}",
                path.display()
            );
            return;
        }
    };
    let room = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let pages = pages.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    let _ = tokio::time::timeout(LONGEST, answer(stream, &*pages)).await;
                });
            }
            // Out of descriptors.
            Err(error) => {
                tracing::debug!("{error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Asks the agent of a pin folder for a page; its body, if it has that page.
///
/// # Errors
/// If no agent answers, or not with that page.
pub fn ask(bpffs: &Path, page: &str) -> Result<String, LocalError> {
    let path = path(bpffs);
    let text = exchange(&path, page)?;
    match parse(&text) {
        Some((200, body)) => Ok(body.to_owned()),
        Some((status, _)) => Err(LocalError::Strange { path, what: format!("{page} with {status}") }),
        None => Err(LocalError::Strange { path, what: "no HTTP".to_owned() }),
    }
}

fn exchange(path: &Path, page: &str) -> Result<String, LocalError> {
    let nobody = |source| LocalError::Nobody { path: path.to_owned(), source };
    let silent = |source| LocalError::Silent { path: path.to_owned(), source };
    let (short, _folder) = short(path).map_err(nobody)?;
    let mut stream = UnixStream::connect(short).map_err(nobody)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(silent)?;
    let request = format!("GET {page} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(silent)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(silent)?;
    Ok(text)
}

/// Status and body of an answer.
fn parse(text: &str) -> Option<(u16, &str)> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    Some((head.strip_prefix("HTTP/1.1 ")?.split(' ').next()?.parse().ok()?, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{Page, at_once};

    #[tokio::test]
    async fn root_asks_the_agent_by_its_socket() {
        let bpffs = std::env::temp_dir().join(format!("portolan-local-{}", std::process::id()));
        let folder = bpffs.join("a-folder-whose-name-is-too-long-for-the-address-of-a-socket-".repeat(3));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join(NAME);
        drop(std::os::unix::net::UnixListener::bind(short(&path).unwrap().0).unwrap());
        let listener = listen(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let pages = at_once(|page| match page {
            PAGE => Page::text(200, "it is well"),
            _ => Page::not_found(),
        });
        const PAGE: &str = "/status";
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                answer(stream, &*pages).await;
            }
        });
        let asked = path.clone();
        let answers =
            tokio::task::spawn_blocking(move || [PAGE, "/other"].map(|page| exchange(&asked, page)));
        let [known, other] = answers.await.unwrap().map(Result::unwrap);
        assert_eq!((parse(&known), parse(&other).unwrap().0), (Some((200, "it is well")), 404));
        fs::remove_dir_all(bpffs).unwrap();
        assert!(matches!(exchange(&path, PAGE), Err(LocalError::Nobody { .. })));
    }
}
