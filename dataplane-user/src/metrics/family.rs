//! The names of all metrics with their labels and meanings: the only place that knows them, and the text they are told in.

use std::fmt::{self, Write as _};

/// Prometheus' kinds of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up; begins at zero with the agent or with the kernel's maps.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        })
    }
}

/// All that is told under one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it means.
    pub help: &'static str,
}

macro_rules! families {
    ($($constant:ident = $name:literal, $kind:ident, [$($label:literal),*], $help:literal;)+) => {
        $(
            #[doc = $help]
            pub const $constant: Family =
                Family { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help };
        )+

        /// All families, in the order in which they are told.
        pub const ALL: &[Family] = &[$($constant,)+];
    };
}

families! {
    PROGRAMMING = "kubeproxy_network_programming_duration_seconds", Histogram, ["ip_family"],
        "From the change of a Service's endpoints, as its EndpointSlice tells, to their tables in the kernel";
    SYNC = "kubeproxy_sync_proxy_rules_duration_seconds", Histogram, ["ip_family"],
        "From taking up changes to their tables in the kernel; both families are written at once, and have the same";
    SYNCED = "kubeproxy_sync_proxy_rules_last_timestamp_seconds", Gauge, ["ip_family"],
        "When tables last reached the kernel, in seconds since 1970, the same for both families";
    QUEUED = "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", Gauge, ["ip_family"],
        "When a change was last taken up, in seconds since 1970, the same for both families";
    SERVICE_CHANGES = "kubeproxy_sync_proxy_rules_service_changes_total", Counter, [],
        "Changes of Services";
    SERVICE_CHANGES_PENDING = "kubeproxy_sync_proxy_rules_service_changes_pending", Gauge, [],
        "Changes of Services that are not in the kernel yet";
    ENDPOINT_CHANGES = "kubeproxy_sync_proxy_rules_endpoint_changes_total", Counter, [],
        "Changes of EndpointSlices";
    ENDPOINT_CHANGES_PENDING = "kubeproxy_sync_proxy_rules_endpoint_changes_pending", Gauge, [],
        "Changes of EndpointSlices that are not in the kernel yet";
    NO_LOCAL_ENDPOINTS = "kubeproxy_sync_proxy_rules_no_local_endpoints_total", Gauge, ["traffic_policy", "ip_family"],
        "Service ports with a Local traffic policy whose endpoints are all on other nodes";
    HEALTHZ = "kubeproxy_proxy_healthz_total", Counter, ["code"],
        "Answers to /healthz by HTTP status";
    LIVEZ = "kubeproxy_proxy_livez_total", Counter, ["code"],
        "Answers to /livez by HTTP status";
    HEALTHY = "portolan_healthy", Gauge, [],
        "1 if the node can serve what it was told, as /healthz has it, else 0";
    SYNC_CALLS = "portolan_sync_bpf_calls_total", Counter, [],
        "Calls of bpf(2) that changes took";
    SYNC_OPS = "portolan_sync_ops_total", Counter, [],
        "Entries that changes wrote or removed";
    SYNC_ERRORS = "portolan_sync_errors_total", Counter, [],
        "How often the kernel refused a write";
    AUDITS = "portolan_audits_total", Counter, [],
        "Audits of the kernel's tables";
    REPAIRS = "portolan_audit_repairs_total", Counter, [],
        "Entries that were not as they should be and were repaired";
    UNREADABLE = "portolan_unreadable_objects_total", Counter, [],
        "Objects that could not be read; what was known of them stays";
    COMPLAINTS = "portolan_complaints", Gauge, ["reason"],
        "What objects get wrong now and is not programmed, by the reason of its Event";
    WAITING = "portolan_waiting_services", Gauge, [],
        "Services whose changes found no room in a table";
    HEALTH_CHECK_PORTS = "portolan_health_check_ports_unbound", Gauge, [],
        "Health check ports that cannot be had, counted per address: something else listens there";
    UNATTACHED = "portolan_unattached_programs", Gauge, [],
        "Programs that should be attached and are not, each at each place: the log says why";
    REATTACHED = "portolan_reattached_total", Counter, [],
        "Programs that somebody detached and that were attached again";
    WATCH_CONNECTED_SINCE = "portolan_watch_connected_since_timestamp_seconds", Gauge, ["kind"],
        "Since when the changes of a kind of objects are followed without a failure, in seconds since 1970; 0: they are not now";
    WATCH_LAST_HEARD = "portolan_watch_last_heard_timestamp_seconds", Gauge, ["kind"],
        "When the API server last told of a kind of objects, in seconds since 1970; where nothing changes it says so every minute or so";
    WATCH_ERRORS = "portolan_watch_errors_total", Counter, ["kind"],
        "How often a list or a watch of a kind of objects failed; the log says why";
    WATCH_LISTS = "portolan_watch_lists_total", Counter, ["kind"],
        "How often a kind of objects was listed: once, and again after each gap";
    SNAPSHOT_KEPT = "portolan_snapshot_timestamp_seconds", Gauge, [],
        "When the snapshot below --state-dir was last written by this agent, in seconds since 1970; 0: not yet";
    SNAPSHOT_ERRORS = "portolan_snapshot_errors_total", Counter, [],
        "How often the snapshot could not be written";
    SNAPSHOTS_REFUSED = "portolan_snapshots_refused_total", Counter, [],
        "Snapshots that were damaged, too old, of another node or of another version, and not used";
    SNAPSHOT_SERVED = "portolan_snapshot_served", Gauge, [],
        "1 while objects of the snapshot are served because the API server has not told everything, else 0";
    TAKING_OVER = "portolan_taking_over", Gauge, [],
        "1 while TCP connections that another proxy translates may run and are left to it, else 0";
    OTHER_PROXIES = "portolan_other_proxy_traces", Gauge, [],
        "Rules and interfaces of another Service proxy on the node, as `portolan status` names them, looked for twice a minute";
    SERVICE_ROUTES = "portolan_service_routes", Gauge, [],
        "Service ranges with a route to Portolan's own device, for what the node itself sends";
    SERVICE_ROUTES_RESTORED = "portolan_service_routes_restored_total", Counter, [],
        "Routes for service ranges that something removed and that were made again";
    MASQUERADING = "portolan_masquerading", Gauge, [],
        "1 while netfilter translates the source of clients from outside where the endpoint is on this node, else 0: the log says why";
    MASQUERADE_RESTORED = "portolan_masquerade_restored_total", Counter, [],
        "How often something removed or changed the nftables table inet portolan, and it was made again";
    OPEN_DRIFT = "portolan_open_connections_drift_total", Counter, [],
        "By how many the counts of open connections differed from the flows and sockets that there are, and were put right";
    PRIVATE_PINS = "portolan_private_pins", Gauge, [],
        "1 if pins, and with them programs and flows, end with the agent: no other process has their BPF file system; else 0";
    SERVICE_PORTS = "portolan_service_ports", Gauge, [],
        "Service ports in the kernel, IPv4 and IPv6 counted apart";
    BACKENDS = "portolan_backends", Gauge, [],
        "Backends in the kernel: endpoints per service port";
    FRONTENDS = "portolan_frontends", Gauge, [],
        "Frontends in the kernel: addresses and ports that lead to a service port";
    UPLINKS = "portolan_uplinks", Gauge, [],
        "Interfaces to the network that have programs";
    INTERFACE_ROLES = "portolan_interface_role", Gauge, ["interface", "role", "reason"],
        "1 for each interface with its role and the reason for it; pods' interfaces and loopback are left out";
    POD_INTERFACES = "portolan_pod_interfaces", Gauge, [],
        "Interfaces to pods that have programs";
    TABLE_ENTRIES = "portolan_table_entries", Gauge, ["table"],
        "Entries in a table, as last counted; a flow has two";
    TABLE_CAPACITY = "portolan_table_capacity", Gauge, ["table"],
        "Entries that a table has room for; --map-size and --max-flows set it";
    TABLE_NEARLY_FULL = "portolan_table_nearly_full", Gauge, ["table"],
        "1 from 90 % of a table's room on until it is below 80 % again, else 0";
    REASONS = "portolan_reasons_total", Counter, ["reason"],
        "Why packets were dropped or refused, and what else happened to them; `portolan drops` explains each reason";
    SERVICE_PACKETS = "portolan_service_packets_total", Counter,
        ["namespace", "service", "port", "protocol", "ip_family", "direction"],
        "Packets of a service port: `in` from clients, `out` from endpoints. Connections made at connect time have none. As of the last sweep of the flows, at most 15 seconds ago";
    SERVICE_BYTES = "portolan_service_bytes_total", Counter,
        ["namespace", "service", "port", "protocol", "ip_family", "direction"],
        "Bytes of these packets of a service port, from the network header on";
    SERVICE_FLOWS = "portolan_service_flows_total", Counter,
        ["namespace", "service", "port", "protocol", "ip_family"],
        "Flows of a service port that began, by packet or at connect time";
    SERVICE_OPEN = "portolan_service_open_connections", Gauge,
        ["namespace", "service", "port", "protocol", "ip_family"],
        "Connections and UDP flows of a service port that did not end, by packet and by socket, of this node";
    SERVICE_MOVED = "portolan_service_moved_total", Counter,
        ["namespace", "service", "port", "protocol", "ip_family"],
        "Connections and UDP questions of a service port that were given to another endpoint because theirs was silent, refused them or could not be reached (L5). Told of those that have had one";
    SERVICE_RESCUED = "portolan_service_rescued_total", Counter,
        ["namespace", "service", "port", "protocol", "ip_family"],
        "Those of them that another endpoint than their first has answered; beside portolan_service_moved_total";
    ENDPOINT_PACKETS = "portolan_endpoint_packets_total", Counter,
        ["namespace", "service", "port", "protocol", "endpoint", "direction"],
        "Packets of one endpoint of a service port: `in` from clients, `out` from the endpoint";
    ENDPOINT_BYTES = "portolan_endpoint_bytes_total", Counter,
        ["namespace", "service", "port", "protocol", "endpoint", "direction"],
        "Bytes of these packets of one endpoint, from the network header on";
    ENDPOINT_OPEN = "portolan_endpoint_open_connections", Gauge,
        ["namespace", "service", "port", "protocol", "endpoint"],
        "Connections and UDP flows of an endpoint that did not end, by packet and by socket, of this node";
    ENDPOINT_FLOWS = "portolan_endpoint_flows_total", Counter,
        ["namespace", "service", "port", "protocol", "endpoint"],
        "Flows to one endpoint of a service port that began, by packet or at connect time";
    LEFT_OUT = "portolan_metrics_left_out", Gauge, ["kind"],
        "Service ports, and endpoints where these are told, whose series were left out because of --metrics-max-series";
    PROGRAM_RUNS = "portolan_program_runs_total", Counter, ["program"],
        "Runs of an eBPF program. Only while kernel.bpf_stats_enabled is 1";
    PROGRAM_SECONDS = "portolan_program_seconds_total", Counter, ["program"],
        "Time an eBPF program ran. Only while kernel.bpf_stats_enabled is 1";
    CPU_SECONDS = "process_cpu_seconds_total", Counter, [],
        "Processor time of the agent";
    START_TIME = "process_start_time_seconds", Gauge, [],
        "When the agent began, in seconds since 1970";
    RESIDENT = "process_resident_memory_bytes", Gauge, [],
        "Memory of the agent";
    OPEN_FDS = "process_open_fds", Gauge, [],
        "File descriptors of the agent";
    MAX_FDS = "process_max_fds", Gauge, [],
        "File descriptors that the agent may have";
    BUILD = "portolan_build_info", Gauge, ["version", "revision"],
        "Always 1";
}

/// Metrics in Prometheus' text format.
#[derive(Debug, Default)]
pub(super) struct Text(String);

impl Text {
    pub(super) fn into_string(self) -> String {
        self.0
    }

    /// Meaning and kind of a family, before its lines.
    pub(super) fn head(&mut self, family: &Family) {
        let Family { name, kind, help, .. } = family;
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// A family of one line.
    pub(super) fn single(&mut self, family: &Family, value: impl fmt::Display) {
        self.head(family);
        self.sample(family, &[], value);
    }

    /// A line of a family, with values for its labels in their order.
    pub(super) fn sample(&mut self, family: &Family, values: &[&str], value: impl fmt::Display) {
        debug_assert_eq!(family.labels.len(), values.len(), "{}", family.name);
        let labels: Vec<_> = family.labels.iter().copied().zip(values.iter().copied()).collect();
        self.line(family.name, "", &labels, value);
    }

    pub(super) fn line(&mut self, name: &str, end: &str, labels: &[(&str, &str)], value: impl fmt::Display) {
        let _ = write!(self.0, "{name}{end}");
        for (at, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"", if at == 0 { '{' } else { ',' });
            for c in text.chars() {
                match c {
                    '\n' => self.0.push_str("\\n"),
                    '"' | '\\' => self.0.extend(['\\', c]),
                    _ => self.0.push(c),
                }
            }
            self.0.push('"');
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    /// The page of the documentation.
    fn page() -> String {
        let mut page = String::from(
            "# Metrics\n\n\
             What `portolan agent` tells at `/metrics` (`--metrics-bind-address`, by default `127.0.0.1:10249`), in \
             Prometheus' text format.\nWhere a metric means what one of kube-proxy's means, it has that metric's name. \
             This page is made from the code:\n`cargo xtask bless` writes it anew, and a test compares it.\n\n\
             | name | kind | labels | meaning |\n|---|---|---|---|\n",
        );
        for Family { name, kind, labels, help } in ALL {
            let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
            let _ = writeln!(page, "| `{name}` | {kind} | {} | {help} |", labels.join(", "));
        }
        page.push_str(
            "\n## How much there is\n\n\
             The counters of service ports are read from the kernel's maps when somebody asks, six series each and two more \
             where connections were given\nto another endpoint, and with `--metrics-endpoints` those of endpoints as well; at most `--metrics-max-series` of them (20,000 unless told): \
             those of service ports first, the oldest first.\n`portolan_metrics_left_out` says how many were left out. The kernel counts \
             all of them all the same: `portolan services` and\n`portolan backends` show them.\n\n\
             Tables are not read to tell how full they are: `sync` knows what it wrote, and the sweep of idle flows counts \
             what it passes,\nevery 15 seconds. The agent also logs a warning once a table is nearly full.\n",
        );
        page
    }

    /// H3
    #[test]
    fn the_page_of_metrics_in_the_documentation_is_up_to_date() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
        if std::env::var_os("PORTOLAN_BLESS").is_some() {
            std::fs::write(&file, page()).unwrap();
        }
        let written = std::fs::read_to_string(&file).unwrap_or_default();
        assert!(
            written == page(),
            "docs/metrics.md differs from the code: `cargo xtask bless` writes it anew"
        );
    }

    /// H3
    #[test]
    fn names_are_unique_and_follow_prometheus() {
        let names: BTreeSet<_> = ALL.iter().map(|family| family.name).collect();
        assert_eq!(names.len(), ALL.len());
        for family in ALL {
            // kube-proxy's name for this gauge is what it is.
            if *family != NO_LOCAL_ENDPOINTS {
                assert_eq!(family.name.ends_with("_total"), family.kind == Kind::Counter, "{}", family.name);
            }
            assert!(
                !family.help.contains(['\n', '\\', '|']) && !family.help.ends_with('.'),
                "{}",
                family.name
            );
        }
    }

    #[test]
    fn values_of_labels_are_escaped() {
        let mut text = Text::default();
        text.sample(&REASONS, &["a\"b\\c\nd"], 1);
        assert_eq!(text.into_string(), "portolan_reasons_total{reason=\"a\\\"b\\\\c\\nd\"} 1\n");
    }
}
