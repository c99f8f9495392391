//! `portolan take-over`: the TCP connections that are left to another proxy (C5).

use super::columns::{self, Row, short_time};
use super::names::Names;
use crate::kernel::conntrack::{self, ConntrackError, Translated};
use crate::kernel::maps::KernelMaps;
use dataplane_common::node::Node;
use dataplane_common::tables::{Frontends, Nodes};
use serde::Serialize;

/// How the take-over is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TakeOverPage {
    /// Whether connections are left to another proxy.
    pub taking_over: bool,
    /// Those that are; none if it is over.
    pub connections: Vec<TranslatedRow>,
}

/// A connection that netfilter translates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TranslatedRow {
    /// The client's address and port.
    pub client: String,
    /// What it called.
    pub frontend: String,
    /// Who answers.
    pub endpoint: String,
    /// The service port: `namespace/name:port`, or `#id` if the name is not known.
    pub service: String,
    /// As conntrack calls it.
    pub state: &'static str,
    /// Seconds after which conntrack forgets it if nothing comes.
    pub expires_seconds: u32,
}

impl Row for TranslatedRow {
    const HEADINGS: &'static [&'static str] =
        &["CLIENT", "FRONTEND", "ENDPOINT", "SERVICE", "STATE", "EXPIRES"];

    fn cells(&self) -> Vec<String> {
        let texts = [&self.client, &self.frontend, &self.endpoint, &self.service].map(Clone::clone);
        let rest = [self.state.to_owned(), short_time(self.expires_seconds.into())];
        texts.into_iter().chain(rest).collect()
    }
}

/// Names of the kernel's states of a TCP connection, by their numbers (`enum tcp_conntrack`).
const STATES: [&str; 9] = [
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
];

pub(super) fn page(maps: &KernelMaps, names: &Names) -> Result<TakeOverPage, ConntrackError> {
    let node = maps.map::<Nodes>()?.get(&0)?;
    let taking_over = node.is_some_and(|node| node.has(Node::TAKES_OVER));
    let found = if taking_over { conntrack::tcp_to(&maps.map::<Frontends>()?)? } else { Vec::new() };
    let mut connections: Vec<_> = found.iter().map(|connection| row(connection, names)).collect();
    connections.sort_by(|a, b| (&a.service, &a.client).cmp(&(&b.service, &b.client)));
    Ok(TakeOverPage { taking_over, connections })
}

fn row(connection: &Translated, names: &Names) -> TranslatedRow {
    TranslatedRow {
        client: connection.client.to_string(),
        frontend: connection.called.to_string(),
        endpoint: connection.endpoint.to_string(),
        service: names.name(connection.service),
        state: STATES.get(usize::from(connection.state)).copied().unwrap_or("?"),
        expires_seconds: connection.expires,
    }
}

impl TakeOverPage {
    /// What it means, and the connections as columns.
    pub(super) fn text(&self) -> String {
        match (self.taking_over, self.connections.len()) {
            (false, _) => "No connection is left to another proxy.\n".to_owned(),
            (true, 0) => {
                "No connection is left to another proxy; the agent ends the take-over when it looks next.\n"
                    .to_owned()
            }
            (true, count) => {
                let table = columns::table(&self.connections);
                format!(
                    "{count} TCP connections are left to another proxy's rules until they end; all others are served here.\n\n{table}"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C5
    #[test]
    fn connections_that_are_left_are_named_with_their_service() {
        let connection = Translated {
            client: "10.244.0.2:39076".parse().unwrap(),
            called: "10.96.0.1:443".parse().unwrap(),
            endpoint: "172.18.0.3:6443".parse().unwrap(),
            answered: "10.244.0.2:39076".parse().unwrap(),
            service: 7,
            state: 3,
            expires: 86_364,
        };
        let page = TakeOverPage { taking_over: true, connections: vec![row(&connection, &Names::default())] };
        let expected = "\
1 TCP connections are left to another proxy's rules until they end; all others are served here.

CLIENT             FRONTEND        ENDPOINT          SERVICE   STATE         EXPIRES
10.244.0.2:39076   10.96.0.1:443   172.18.0.3:6443   #7        ESTABLISHED   23h59m
";
        assert_eq!(page.text(), expected);
        let over = TakeOverPage { taking_over: false, connections: Vec::new() };
        assert_eq!(over.text(), "No connection is left to another proxy.\n");
    }
}
