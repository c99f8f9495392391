//! The page for people.

use super::super::columns::short_time;
use super::kernel::{KernelStatus, TableFill};
use super::{StatusPage, Verdict};
use crate::status::{AgentStatus, age};
use std::fmt::Write as _;
use std::time::SystemTime;

/// How many of the fullest tables are shown unless all are wanted.
const FULLEST: usize = 4;

impl StatusPage {
    /// `wide`: all tables, all interfaces, and each kind of objects.
    pub(super) fn text(&self, now: SystemTime, wide: bool) -> String {
        let mut text = String::new();
        let head = match self.verdict {
            Verdict::Well => "all is well",
            Verdict::Warning => "serves, with something to look at",
            Verdict::Failing => "does not serve as it should",
        };
        let node = self.agent.as_ref().map_or(String::new(), |agent| format!("{}: ", agent.node));
        let _ = writeln!(text, "{} {node}{head}", self.verdict.mark());
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<13}  {value}");
        };
        match &self.agent {
            Some(agent) => of_agent(agent, now, wide, &mut line),
            None => line("Agent", format!("none answers; this is portolan {}", self.version)),
        }
        match &self.kernel {
            Some(kernel) => of_kernel(kernel, self.agent.as_ref(), wide, &mut line),
            None => line("Kernel", "holds nothing of Portolan".to_owned()),
        }
        let others = &self.other_proxies;
        line("Other proxies", if others.is_empty() { "no trace".to_owned() } else { others.join(", ") });
        for finding in &self.findings {
            let _ = writeln!(text, "{} {}", finding.verdict.mark(), finding.text);
        }
        text
    }
}

fn ago(moment: Option<&String>, now: SystemTime) -> Option<String> {
    Some(short_time(age(moment?, now)?))
}

fn of_agent(agent: &AgentStatus, now: SystemTime, wide: bool, line: &mut impl FnMut(&str, String)) {
    let since = ago(agent.started.as_ref(), now).unwrap_or_else(|| "?".to_owned());
    line("Agent", format!("{}, process {}, for {since}", agent.version, agent.pid));
    let watches = || agent.source.watches.iter().filter(|watch| !watch.unavailable);
    // The youngest of the connections, and the last word of any.
    let connected = watches().map(|watch| watch.connected_since.as_ref()).collect::<Option<Vec<_>>>();
    let connected = connected.and_then(|all| all.into_iter().max());
    let heard = watches().filter_map(|watch| watch.last_heard.as_ref()).max();
    let followed = match ago(connected, now) {
        Some(time) => format!("followed for {time}"),
        None if watches().next().is_none() || agent.source.place.starts_with('/') => "followed".to_owned(),
        None => "not followed now".to_owned(),
    };
    let heard = ago(heard, now).map_or(String::new(), |time| format!(", last heard {time} ago"));
    line("Objects", format!("{}: {followed}{heard}", agent.source.place));
    if wide {
        for watch in &agent.source.watches {
            let state = match (&watch.error, &watch.connected_since) {
                _ if watch.unavailable => "not offered".to_owned(),
                (Some(error), _) => error.clone(),
                (None, Some(since)) => format!("since {since}"),
                (None, None) => "read".to_owned(),
            };
            line("", format!("{} {state}, {} errors", watch.kind, watch.errors));
        }
    }
    let synced = ago(agent.synced.as_ref(), now).unwrap_or_else(|| "?".to_owned());
    let (pending, waiting) = (agent.pending_changes, agent.waiting_services);
    line("Sync", format!("{synced} ago; {pending} changes pending, {waiting} Services wait for room"));
    match ago(agent.snapshot.kept.as_ref(), now) {
        _ if agent.snapshot.served => line("Snapshot", "served".to_owned()),
        Some(time) => line("Snapshot", format!("kept {time} ago")),
        None => line("Snapshot", "none kept yet".to_owned()),
    }
}

fn of_kernel(
    kernel: &KernelStatus,
    agent: Option<&AgentStatus>,
    wide: bool,
    line: &mut impl FnMut(&str, String),
) {
    let KernelStatus { service_ports, frontends, endpoints, .. } = kernel;
    line("Services", format!("{service_ports} service ports, {frontends} frontends, {endpoints} endpoints"));
    let mut tables: Vec<_> = kernel.tables.iter().collect();
    tables.sort_by_key(|fill| std::cmp::Reverse((fill.part(), fill.entries)));
    tables.truncate(if wide { usize::MAX } else { FULLEST });
    let fill = |fill: &&TableFill| {
        format!("{} {} of {} ({} %)", fill.table, fill.entries, fill.capacity, fill.part())
    };
    line("Tables", tables.iter().map(fill).collect::<Vec<_>>().join(" · "));
    let uplinks = agent.iter().flat_map(|agent| &agent.interfaces).filter(|it| it.role == "uplink");
    let uplinks: Vec<_> = uplinks.map(|it| format!("{} ({})", it.interface, it.reason)).collect();
    if let Some(agent) = agent {
        line("Interfaces", format!("{}; {} of pods", uplinks.join(", "), agent.pod_interfaces));
    }
    if wide || agent.is_none() {
        for (interface, programs) in &kernel.interfaces {
            line("", format!("{interface}: {}", programs.join(" ")));
        }
    }
    let sockets = if kernel.sockets.is_empty() { "no hooks".to_owned() } else { kernel.sockets.join(" ") };
    line("Sockets", sockets);
    if kernel.taking_over {
        line("Take-over", format!("{} TCP connections are left to another proxy", kernel.connections_left));
    }
    let reasons: Vec<_> = kernel.reasons.iter().map(|row| format!("{} {}", row.reason, row.count)).collect();
    line("Reasons", if reasons.is_empty() { "none occurred".to_owned() } else { reasons.join(" · ") });
}
