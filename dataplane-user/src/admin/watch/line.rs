//! One event as it is printed: data first, then a line for people.

use super::super::columns::short_time;
use crate::config::Output;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;

/// An event. Fields that do not apply are null.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventLine {
    /// When, as Kubernetes writes it, with microseconds.
    pub time: String,
    /// The node, where several are watched.
    pub node: Option<String>,
    /// `begun`, `moved`, `established`, `refused`, `dropped`, `ended`, `packet`; `lost`, `left-out` and `away` are about the watch itself.
    pub event: String,
    /// Where: `xdp`, `uplink-in`, `uplink-out`, `pod-in`, `pod-out`, `connect`, `sendmsg`; `sweep` of the
    /// agent, or `room` where another flow got this one's.
    pub hook: Option<String>,
    /// The interface there.
    pub interface: Option<String>,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: Option<String>,
    /// The client's address and port; of a socket that has no port yet the address, and of a pod's socket nothing.
    pub client: Option<String>,
    /// Its pod, as `namespace/name`, or `node` if it is this node.
    pub client_name: Option<String>,
    /// The service port: `namespace/name:port`.
    pub service: Option<String>,
    /// What the client called.
    pub frontend: Option<String>,
    /// Where its packets go.
    pub endpoint: Option<String>,
    /// The pod there, as `namespace/name`, or `node` if it is this node.
    pub endpoint_name: Option<String>,
    /// The source that the endpoint sees, if the programs translate it.
    pub translated_source: Option<String>,
    /// Why it was moved, refused or dropped, as `portolan drops` has it.
    pub reason: Option<String>,
    /// How it ended: `closed`, `reset`, `refused`, `idle` or `displaced`.
    pub end: Option<String>,
    /// Of a flow that ended: packets of the client.
    pub packets_in: Option<u64>,
    /// Their bytes.
    pub bytes_in: Option<u64>,
    /// Packets of the endpoint.
    pub packets_out: Option<u64>,
    /// Their bytes.
    pub bytes_out: Option<u64>,
    /// From its first packet to the client's proof that it saw an answer, if both were seen.
    pub handshake_microseconds: Option<u64>,
    /// From its first packet to its end, if both were seen.
    pub lasted_microseconds: Option<u64>,
    /// Of a packet: `client` or `endpoint`.
    pub sent_by: Option<String>,
    /// Its bytes, from the network header on.
    pub length: Option<u32>,
    /// Flags of TCP: `SYN,ACK`.
    pub tcp_flags: Option<String>,
    /// Its sequence number.
    pub sequence: Option<u32>,
    /// How many events were lost or left out.
    pub count: Option<u64>,
}

impl EventLine {
    /// One about the watch itself.
    pub(super) fn about(event: &str, time: String, count: u64) -> Self {
        Self { time, event: event.to_owned(), count: Some(count), ..Self::default() }
    }

    /// As it is printed, with a closing line break.
    ///
    /// # Errors
    /// If it cannot be written as JSON or YAML.
    pub(super) fn print(&self, output: Output) -> Result<String, super::AdminError> {
        Ok(match output {
            Output::Json => serde_json::to_string(self)? + "\n",
            Output::Yaml => format!("---\n{}", serde_saphyr::to_string(self)?),
            Output::Table => self.text(false),
            Output::Wide => self.text(true),
        })
    }

    fn text(&self, wide: bool) -> String {
        // The day is that of whoever reads it.
        let clock = self.time.split_once('T').map_or(&*self.time, |(_, clock)| clock.trim_end_matches('Z'));
        let mut text = clock.to_owned();
        if let Some(node) = &self.node {
            let _ = write!(text, " {node}");
        }
        if let Some(count) = self.count {
            let what = match self.event.as_str() {
                "lost" => "events were lost: more came than could be read",
                "left-out" => "events were left out: more than --rate shows, or than --packets tells",
                _ => "times the maps were not there",
            };
            let _ = writeln!(text, " … {count} {what}");
            return text;
        }
        let place = match (&self.hook, &self.interface) {
            (Some(hook), Some(interface)) => format!("{hook} {interface}"),
            (Some(hook), None) => hook.clone(),
            (None, _) => String::new(),
        };
        let _ = write!(text, " {:<11} {place:<22} {}", self.event, self.protocol.as_deref().unwrap_or("-"));
        let end = |address: &Option<String>, name: &Option<String>| match (address, name) {
            (Some(address), Some(name)) => format!("{name} ({address})"),
            (Some(address), None) => address.clone(),
            (None, Some(name)) => name.clone(),
            (None, None) => "a pod's socket".to_owned(),
        };
        let _ = write!(
            text,
            " {} → {}",
            end(&self.client, &self.client_name),
            end(&self.frontend, &self.service)
        );
        if self.endpoint.is_some() {
            let _ = write!(text, " → {}", end(&self.endpoint, &self.endpoint_name));
        }
        if let Some(source) = self.translated_source.as_ref().filter(|_| wide) {
            let _ = write!(text, " as {source}");
        }
        self.details(&mut text, wide);
        text.push('\n');
        text
    }

    fn details(&self, text: &mut String, wide: bool) {
        for what in [&self.end, &self.reason].into_iter().flatten() {
            let _ = write!(text, "  {what}");
        }
        if let (Some(packets_in), Some(bytes_in), Some(packets_out), Some(bytes_out)) =
            (self.packets_in, self.bytes_in, self.packets_out, self.bytes_out)
        {
            let _ = write!(
                text,
                "  in {packets_in} packets, {bytes_in} bytes, out {packets_out} packets, {bytes_out} bytes"
            );
        }
        if let Some(handshake) = self.handshake_microseconds {
            let _ = write!(text, "  handshake {}", time(handshake));
        }
        if let Some(lasted) = self.lasted_microseconds {
            let _ = write!(text, "  lasted {}", time(lasted));
        }
        if self.event == "packet" || wide {
            for part in [&self.sent_by, &self.tcp_flags].into_iter().flatten() {
                let _ = write!(text, "  {part}");
            }
            if let Some(length) = self.length {
                let _ = write!(text, "  {length} bytes");
            }
            if let Some(sequence) = self.sequence {
                let _ = write!(text, "  seq {sequence}");
            }
        }
    }
}

/// A length of time for people, from microseconds.
fn time(microseconds: u64) -> String {
    match microseconds {
        0..1_000 => format!("{microseconds} µs"),
        1_000..10_000_000 => format!("{}.{:03} ms", microseconds / 1_000, microseconds % 1_000),
        _ => short_time(microseconds / 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line_with_names_on_both_ends() {
        let some = |text: &str| Some(text.to_owned());
        let line = EventLine {
            time: "2026-12-01T14:03:11.123456Z".to_owned(),
            event: "ended".to_owned(),
            hook: some("pod-in"),
            interface: some("veth1"),
            protocol: some("TCP"),
            client: some("10.244.3.2:4000"),
            client_name: some("shop/cart"),
            service: some("shop/web:http"),
            frontend: some("10.96.0.80:80"),
            endpoint: some("10.244.1.2:8080"),
            end: some("closed"),
            packets_in: Some(5),
            bytes_in: Some(300),
            packets_out: Some(4),
            bytes_out: Some(4_000),
            handshake_microseconds: Some(1_250),
            lasted_microseconds: Some(61_000_000),
            ..EventLine::default()
        };
        assert_eq!(
            line.print(Output::Table).unwrap(),
            "14:03:11.123456 ended       pod-in veth1           TCP shop/cart (10.244.3.2:4000) → shop/web:http \
             (10.96.0.80:80) → 10.244.1.2:8080  closed  in 5 packets, 300 bytes, out 4 packets, 4000 bytes  handshake 1.250 \
             ms  lasted 1m1s\n"
        );
        let read: EventLine = serde_json::from_str(&line.print(Output::Json).unwrap()).unwrap();
        assert_eq!(read, line);
        let lost = EventLine::about("lost", line.time.clone(), 7).print(Output::Table).unwrap();
        assert!(lost.contains("7 events were lost"), "{lost}");
    }
}
