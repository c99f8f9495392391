//! The ports at which the agent tells its health and its metrics, and who has them.

use super::CheckLine;
use std::fs;

/// Port and what it is for.
const PORTS: [(u16, &str); 2] = [(10_256, "health port"), (10_249, "metrics port")];

pub(super) fn look(agent: Option<u32>) -> Vec<CheckLine> {
    PORTS.iter().map(|(port, check)| one(*port, check, agent)).collect()
}

fn one(port: u16, check: &'static str, agent: Option<u32>) -> CheckLine {
    let sockets = listeners(port);
    if sockets.is_empty() {
        return CheckLine::well(check, format!("{port} is free"));
    }
    match holder(&sockets) {
        Some((pid, name)) if agent == Some(pid) || name == "portolan" => {
            CheckLine::well(check, format!("{port} is the agent's"))
        }
        Some((pid, name)) => CheckLine::failing(
            check,
            format!("{port} is taken by {name}, process {pid}"),
            "if that is kube-proxy, send it away first (docs/take-over.md); else another port by flag",
        ),
        // Another container's process cannot be seen from inside one.
        None if agent.is_some() => CheckLine::well(check, format!("{port} is taken, and an agent runs")),
        None => {
            CheckLine::failing(check, format!("{port} is taken"), "`ss -ltnp` on the node tells who has it")
        }
    }
}

/// The inodes of the sockets that listen at a port.
fn listeners(port: u16) -> Vec<u64> {
    let read = |table| fs::read_to_string(format!("/proc/self/net/{table}")).unwrap_or_default();
    let tables = ["tcp", "tcp6"].map(read);
    tables.iter().flat_map(|table| table.lines().filter_map(|line| listening(line, port))).collect()
}

/// The process that has one of these sockets, and its name.
fn holder(inodes: &[u64]) -> Option<(u32, String)> {
    processes().find(|(pid, _)| {
        let folder = format!("/proc/{pid}/fd");
        let mut links = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|it| fs::read_link(it.path()).ok());
        links.any(|link| inodes.iter().any(|inode| link.to_string_lossy() == format!("socket:[{inode}]")))
    })
}

/// The inode of a socket that listens at a port, from its line of `/proc/net/tcp`.
fn listening(line: &str, port: u16) -> Option<u64> {
    const LISTEN: &str = "0A";
    let fields: Vec<_> = line.split_whitespace().collect();
    let [local, state, inode] = [fields.get(1)?, fields.get(3)?, fields.get(9)?];
    let (_, number) = local.rsplit_once(':')?;
    let is_it = **state == *LISTEN && u16::from_str_radix(number, 16) == Ok(port);
    if is_it { inode.parse().ok() } else { None }
}

fn processes() -> impl Iterator<Item = (u32, String)> {
    let folders = fs::read_dir("/proc").into_iter().flatten().flatten();
    folders.filter_map(|folder| {
        let pid = folder.file_name().to_str()?.parse().ok()?;
        Some((pid, fs::read_to_string(folder.path().join("comm")).ok()?.trim().to_owned()))
    })
}

/// A process of this name in this network namespace.
pub(super) fn process_of(name: &str) -> Option<u32> {
    let own = fs::read_link("/proc/self/ns/net").ok()?;
    let here =
        |pid: u32| fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|namespace| namespace == own);
    processes().find(|(pid, other)| other == name && here(*pid)).map(|(pid, _)| pid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn who_listens_is_found_by_the_socket() {
        let line = "   0: 00000000:2810 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0";
        assert_eq!(listening(line, 10_256), Some(4_711));
        assert_eq!(listening(line, 80), None);
        assert_eq!(listening(&line.replace(" 0A ", " 01 "), 10_256), None);
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = holder(&listeners(socket.local_addr().unwrap().port())).unwrap();
        assert_eq!(found.0, std::process::id());
        drop(socket);
        assert_eq!(listeners(0), Vec::<u64>::new());
    }
}
