//! Services as this node has them: those that nobody answers for, and the API server's, called as any process here calls it.

use super::CheckLine;
use crate::admin::names::Names;
use crate::admin::services;
use crate::admin::{AdminError, ServiceRow};
use crate::kernel::maps::KernelMaps;
use dataplane_common::tables::LAYOUT;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

/// How many are named.
const NAMED: usize = 10;
/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// The Services that every cluster has, by which a call is tried: a connection is opened and closed.
const TRIED: [&str; 2] = ["default/kubernetes:https", "kube-system/kube-dns:dns-tcp"];

pub(super) fn look(bpffs: &Path) -> Result<Vec<CheckLine>, AdminError> {
    let maps = KernelMaps::open(&bpffs.join(LAYOUT))?;
    let rows = services::rows(&maps, &Names::read(bpffs))?;
    let mut lines = vec![without_endpoints(&rows)];
    lines.extend(TRIED.iter().filter_map(|name| rows.iter().find(|row| row.name == *name)).flat_map(called));
    Ok(lines)
}

fn without_endpoints(rows: &[ServiceRow]) -> CheckLine {
    const CHECK: &str = "endpoints";
    let empty: Vec<_> = rows.iter().filter(|row| !row.has_endpoints).map(|row| row.name.as_str()).collect();
    if empty.is_empty() {
        return CheckLine::well(CHECK, format!("each of {} service ports has one", rows.len()));
    }
    let mut names = empty[..empty.len().min(NAMED)].join(", ");
    if empty.len() > NAMED {
        names = format!("{names} and {} others", empty.len() - NAMED);
    }
    CheckLine::warning(
        CHECK,
        format!("{} of {} service ports have none: {names}", empty.len(), rows.len()),
        "look at selector and pods of the Service: it refuses every connection (P1)",
    )
}

/// Opens a connection to each ClusterIP.
fn called(row: &ServiceRow) -> Vec<CheckLine> {
    const CHECK: &str = "a connection";
    let addresses = row.addresses.iter().filter(|address| address.kind == "ClusterIP");
    let ends = addresses.filter_map(|it| Some(SocketAddr::new(it.address.parse::<IpAddr>().ok()?, it.port)));
    ends.map(|end| match TcpStream::connect_timeout(&end, PATIENCE) {
        Ok(stream) => {
            let peer = stream.peer_addr().map_or_else(|_| end.to_string(), |peer| peer.to_string());
            CheckLine::well(CHECK, format!("{} answers at {peer}", row.name))
        }
        Err(error) => CheckLine::failing(
            CHECK,
            format!("{} at {end}: {error}", row.name),
            format!("`portolan explain node {end}` tells why"),
        ),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::status::Verdict;
    use crate::admin::{TrafficRow, TriesRow};

    #[test]
    fn services_that_nobody_answers_for_are_named_and_not_all_of_many() {
        let row = |name: usize, has_endpoints| ServiceRow {
            id: 1,
            name: format!("default/s{name}"),
            protocol: "TCP".to_owned(),
            addresses: Vec::new(),
            cluster_endpoints: 0,
            local_endpoints: 0,
            has_endpoints,
            internal_local: false,
            external_local: false,
            affinity_seconds: 0,
            algorithm: "random",
            retry: 3,
            tries: TriesRow::default(),
            traffic: TrafficRow::default(),
        };
        assert_eq!(without_endpoints(&[row(0, true)]).verdict, Verdict::Well);
        let many: Vec<_> = (0..12).map(|name| row(name, false)).collect();
        let line = without_endpoints(&many);
        assert_eq!(line.verdict, Verdict::Warning);
        assert!(line.found.ends_with("default/s9 and 2 others"), "{}", line.found);
    }
}
