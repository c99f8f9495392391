//! The explanation for people.

use super::{Client, Explanation};
use std::fmt::Write as _;

/// How many endpoints of each kind are named.
const NAMED: usize = 20;

impl Explanation {
    pub(super) fn text(&self) -> String {
        let mut text = format!("{} {} → {}\n", self.protocol, self.from, self.to);
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<10}  {value}");
        };
        let client = match self.client {
            Client::Pod => "a pod of this node",
            Client::Node => "this node itself",
            Client::Outside => "outside this node",
        };
        let xdp = if self.passed_by_xdp { ", to which XDP leaves it" } else { "" };
        line("client", format!("{client}, met at {} ({}{xdp})", self.interface, self.program));
        match &self.service {
            Some(service) => {
                line("address", format!("{} of {}", service.kind, service.name));
                let local = |local| if local { "Local" } else { "Cluster" };
                let affinity = match service.affinity_seconds {
                    0 => "no affinity".to_owned(),
                    seconds => format!("affinity to the client for {seconds} s"),
                };
                let policy = format!(
                    "internal {} · external {} · {affinity}",
                    local(service.internal_local),
                    local(service.external_local)
                );
                let algorithm = format!(" · algorithm {}", service.algorithm);
                let ranges = if service.source_ranges { " · only some sources" } else { "" };
                line("policy", format!("{policy}{algorithm}{ranges}"));
            }
            None => line("address", "no Service's".to_owned()),
        }
        self.endpoints(&mut line);
        if self.known_flow {
            line("flow", "there is one already, and it stays where it was entered".to_owned());
        }
        if let Some(way) = &self.way {
            let source = self.translated_source.as_ref();
            let source = source.map_or("kept".to_owned(), |source| format!("translated to {source}"));
            line("source", source);
            let stack = if self.past_stack { "past the host's stack" } else { "through the host's stack" };
            line("way", format!("{way}, {stack}"));
        }
        if let Some(hook) = self.socket_hook {
            line(
                "sockets",
                format!("{hook} chooses among the same endpoints when it connects, before there is a packet"),
            );
        }
        let _ = writeln!(text, "{} {}", self.verdict.mark(), self.conclusion);
        text
    }

    fn endpoints(&self, line: &mut impl FnMut(&str, String)) {
        let (takers, others): (Vec<_>, Vec<_>) = self.endpoints.iter().partition(|it| it.left_out.is_none());
        if self.service.is_some() {
            let all = self.endpoints.len();
            line("endpoints", format!("{} of {all} take part", takers.len()));
        }
        for (lines, kind) in [(takers, "takes part"), (others, "left out")] {
            for endpoint in lines.iter().take(NAMED) {
                let node = endpoint.node.as_ref().map_or(String::new(), |node| format!("  on {node}"));
                let why = match &endpoint.left_out {
                    Some(why) => format!("  {why}"),
                    None => format!("  chosen {} times, {} open", endpoint.chosen, endpoint.open),
                };
                line("", format!("{kind}  {}{node}{why}", endpoint.endpoint));
            }
            if lines.len() > NAMED {
                line("", format!("… and {} more: -o json has all", lines.len() - NAMED));
            }
        }
        if let Some(why) = &self.endpoints_unknown {
            line("", format!("of those that take no part the agent tells nothing: {why}"));
        }
    }
}
