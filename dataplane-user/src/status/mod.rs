//! What the agent says of itself to whoever asks on the same node: `portolan status` shows it beside what the kernel holds.
//!
//! It goes over a socket that only root may open ([`local`]), as JSON. A field that an older agent does not have is its default,
//! and one that a newer agent has besides is not read: agent and command line may be of different versions.

pub mod endpoints;
pub mod local;

use serde::{Deserialize, Serialize};
use std::time::SystemTime;

/// The path of the page.
pub const PATH: &str = "/status";

/// The agent, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentStatus {
    /// Its version, with the revision.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// When it began.
    pub started: Option<String>,
    /// The Node that it serves.
    pub node: String,
    /// Why the node cannot serve what it was told (H2); none if it can.
    pub trouble: Option<String>,
    /// What somebody should look at although the node serves.
    pub warnings: Vec<String>,
    /// Whether the Node is there to stay (H1).
    pub node_eligible: bool,
    /// Parts that hang (H5).
    pub hanging: Vec<String>,
    /// Where the objects come from.
    pub source: Source,
    /// Changes of objects that are not in the kernel yet.
    pub pending_changes: u64,
    /// When tables last reached the kernel.
    pub synced: Option<String>,
    /// Services that wait for room in a table.
    pub waiting_services: u64,
    /// What objects get wrong and is not programmed, by the reason of its Event.
    pub complaints: Vec<Count>,
    /// The interfaces but for those of pods.
    pub interfaces: Vec<InterfaceStatus>,
    /// Interfaces to pods.
    pub pod_interfaces: u64,
    /// Programs that should be attached and are not.
    pub unattached_programs: usize,
    /// What is kept for a boot without an API server.
    pub snapshot: SnapshotStatus,
    /// Pins, and with them programs and flows, end with the agent.
    pub private_pins: bool,
}

/// Where the objects come from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Source {
    /// The API server, or the folder of manifests.
    pub place: String,
    /// How each kind of objects is followed.
    pub watches: Vec<WatchStatus>,
}

/// How one kind of objects is followed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatchStatus {
    /// The kind.
    pub kind: String,
    /// All of them were told once.
    pub listed: bool,
    /// Since when changes are followed without a failure; none if they are not.
    pub connected_since: Option<String>,
    /// When the source last said anything.
    pub last_heard: Option<String>,
    /// How often a list or a watch failed.
    pub errors: u64,
    /// What is wrong now.
    pub error: Option<String>,
    /// The source does not have this kind, and the agent does without.
    pub unavailable: bool,
}

/// An interface and what it is to the dataplane.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct InterfaceStatus {
    /// Its name.
    pub interface: String,
    /// `uplink` or `none`.
    pub role: String,
    /// Why.
    pub reason: String,
}

/// What is kept for a boot without an API server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SnapshotStatus {
    /// When this agent last wrote it.
    pub kept: Option<String>,
    /// It is served now, because the API server has not told everything.
    pub served: bool,
    /// How often it could not be written.
    pub errors: u64,
}

/// How often something is so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Count {
    /// What.
    pub reason: String,
    /// How often.
    pub count: u64,
}

/// A moment as Kubernetes writes it.
pub fn timestamp(time: SystemTime) -> Option<String> {
    jiff::Timestamp::try_from(time).ok().map(|time| format!("{time:.0}"))
}

/// A moment with microseconds.
pub fn timestamp_of(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).map_or_else(|_| String::new(), |time| format!("{time:.6}"))
}

/// How long ago a moment was that [`timestamp`] wrote, in seconds; none if it is no moment.
pub fn age(text: &str, now: SystemTime) -> Option<u64> {
    let then: jiff::Timestamp = text.parse().ok()?;
    let now = jiff::Timestamp::try_from(now).ok()?;
    Some(u64::try_from(now.as_second() - then.as_second()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_age_of_a_moment_comes_back_from_its_text() {
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let text = timestamp(then).unwrap();
        assert_eq!(text, "2001-09-09T01:46:40Z");
        assert_eq!(age(&text, then + Duration::from_secs(90)), Some(90));
        assert_eq!(age(&text, then - Duration::from_secs(90)), Some(0), "clocks are set back");
        assert_eq!(age("yesterday", then), None);
    }

    #[test]
    fn pages_of_other_versions_are_read_as_far_as_they_are_known() {
        let page: AgentStatus = serde_json::from_str(r#"{"version":"0.0.9","beyond":[1]}"#).unwrap();
        assert_eq!(page, AgentStatus { version: "0.0.9".to_owned(), ..AgentStatus::default() });
    }
}
