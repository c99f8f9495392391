//! Metrics in Prometheus' text format (H3). [`family`] is the only place that knows their names; where a metric means what
//! one of kube-proxy's means, it has that name. Nothing here reads a map: that is [`Observed`]'s maker's part.

pub mod family;
mod fill;
mod histogram;
mod process;
mod traffic;

pub use fill::Fill;
pub use histogram::Histogram;
pub use traffic::{Count, Counts, Ports, SERIES};

use crate::model::Kind;
use crate::version;
use crate::watch::KindStatus;
use family::Text;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Values of the label `ip_family`, as kube-proxy has them.
pub const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// A number that goes up, or stands for a state.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    /// Adds to a number that goes up.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Relaxed);
    }

    /// Sets a number that stands for a state.
    pub fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    /// Sets it to the moment, in seconds since 1970.
    pub fn set_now(&self) {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.set(since.as_secs());
    }

    /// It, as it is now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// All that the agent counts.
#[derive(Debug, Default)]
pub struct Metrics {
    /// From the change of an object's endpoints to its tables in the kernel, by their family ([`FAMILIES`]).
    pub programming: [Histogram; 2],
    /// From taking up changes to their tables in the kernel.
    pub sync: Histogram,
    /// When tables last reached the kernel.
    pub synced: Number,
    /// When a change was last taken up.
    pub queued: Number,
    /// Changes of Services.
    pub service_changes: Number,
    /// Those of them that are not in the kernel yet.
    pub service_changes_pending: Number,
    /// Changes of EndpointSlices.
    pub endpoint_changes: Number,
    /// Those of them that are not in the kernel yet.
    pub endpoint_changes_pending: Number,
    /// Service ports with a Local policy, internal and external, that have endpoints on other nodes only, by family.
    pub without_local_endpoints: [[Number; 2]; 2],
    /// Services whose tables wait for room or another try.
    pub waiting: Number,
    /// `bpf(2)` calls of the changes.
    pub calls: Number,
    /// Entries that the changes wrote or removed.
    pub ops: Number,
    /// How often the kernel refused a write.
    pub sync_errors: Number,
    /// Entries that an audit had to repair.
    pub repairs: Number,
    /// Audits.
    pub audits: Number,
    /// Objects that could not be read (Z5).
    pub unreadable: Number,
    /// What objects got wrong now, by reason (Z5).
    pub complaints: Mutex<Vec<(&'static str, u64)>>,
    /// Service ports, backends and frontends in the kernel.
    pub sizes: [Number; 3],
    /// Uplinks and pod interfaces.
    interfaces: [Number; 2],
    /// What each interface is.
    interface_roles: Mutex<Vec<InterfaceRole>>,
    /// Programs that should be attached and were not, and had to be attached again.
    pub reattached: Number,
    /// When the snapshot was last written.
    pub snapshot_kept: Number,
    /// How often it could not be written.
    pub snapshot_errors: Number,
    /// Snapshots that were not trusted.
    pub snapshots_refused: Number,
    /// 1 while a snapshot is served.
    pub snapshot_served: Number,
    /// Routes for service ranges that lead to the own device.
    pub routes: Number,
    /// Those that something had removed.
    pub routes_restored: Number,
    /// 1 while netfilter masquerades what the programs mark.
    pub masquerading: Number,
    /// How often something had removed or changed its rules.
    pub masquerade_restored: Number,
    /// 1 while another proxy's connections may run.
    pub taking_over: Number,
    /// Traces of other proxies on this node.
    pub rivals: Number,
    /// By how many counts of open connections were wrong.
    pub open_drift: Number,
    /// 1 if pins end with the agent.
    pub private_pins: Number,
    /// How full the tables are.
    pub fill: Fill,
    /// The service ports whose counters are told.
    pub ports: Mutex<Arc<Ports>>,
    /// Answers to `/healthz` and `/livez` by status.
    health_answers: Mutex<[BTreeMap<u16, u64>; 2]>,
}

/// What an interface is to the dataplane, and why.
#[derive(Clone, Debug)]
pub struct InterfaceRole {
    /// Its name.
    pub interface: String,
    /// Its role, or `none`.
    pub role: &'static str,
    /// Why it has that role.
    pub reason: &'static str,
}

/// What is looked up at the moment somebody asks.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Whether the node can serve what it was told (H2).
    pub healthy: bool,
    /// Programs that should be attached and are not.
    pub unattached: usize,
    /// Health check ports that cannot be had.
    pub unbound: usize,
    /// How often each reason occurred.
    pub reasons: Vec<(&'static str, u64)>,
    /// The room in each table.
    pub rooms: Vec<(&'static str, usize)>,
    /// Traffic of service ports and endpoints.
    pub counts: Counts,
    /// Runs of each program and their nanoseconds; empty while the kernel does not count them.
    pub runs: Vec<(Arc<str>, u64, u64)>,
    /// How each kind of objects is followed.
    pub watches: Vec<(Kind, KindStatus)>,
}

impl Metrics {
    /// Somebody asked for health and got this status.
    pub fn health_answered(&self, path: &str, status: u16) {
        let at = match path {
            "/healthz" => 0,
            "/livez" => 1,
            _ => return,
        };
        let mut answers = self.health_answers.lock().unwrap_or_else(PoisonError::into_inner);
        *answers[at].entry(status).or_default() += 1;
    }

    /// A table has so many entries; before it is full, that is said in the log.
    pub fn filled(&self, table: &'static str, entries: usize, capacity: usize) {
        if let Some(warning) = self.fill.set(table, entries, capacity) {
            tracing::warn!("{warning}");
        }
    }

    /// The interfaces are these now, so many of them uplinks and pod interfaces.
    pub fn set_interfaces(&self, roles: Vec<InterfaceRole>, counts: [u64; 2]) {
        *self.interface_roles.lock().unwrap_or_else(PoisonError::into_inner) = roles;
        self.interfaces.iter().zip(counts).for_each(|(number, count)| number.set(count));
    }

    /// What each interface is, but for pods' and loopback.
    pub fn interface_roles(&self) -> Vec<InterfaceRole> {
        self.interface_roles.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many interfaces to pods have programs.
    pub fn pod_interfaces(&self) -> u64 {
        self.interfaces[1].get()
    }

    /// The service ports whose counters are told.
    pub fn ports(&self) -> Arc<Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Other service ports are to be told.
    pub fn set_ports(&self, ports: Ports) {
        *self.ports.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(ports);
    }

    /// All of them.
    pub fn text(&self, observed: &Observed) -> String {
        let mut text = Text::default();
        text.head(&family::PROGRAMMING);
        for (ip_family, histogram) in FAMILIES.iter().zip(&self.programming) {
            histogram.write(&mut text, &family::PROGRAMMING, ip_family);
        }
        self.both_families(&mut text);
        let [ports, backends, frontends] = &self.sizes;
        let [uplinks, pods] = &self.interfaces;
        for (family, number) in [
            (&family::SERVICE_CHANGES, &self.service_changes),
            (&family::SERVICE_CHANGES_PENDING, &self.service_changes_pending),
            (&family::ENDPOINT_CHANGES, &self.endpoint_changes),
            (&family::ENDPOINT_CHANGES_PENDING, &self.endpoint_changes_pending),
            (&family::SYNC_CALLS, &self.calls),
            (&family::SYNC_OPS, &self.ops),
            (&family::SYNC_ERRORS, &self.sync_errors),
            (&family::AUDITS, &self.audits),
            (&family::REPAIRS, &self.repairs),
            (&family::UNREADABLE, &self.unreadable),
            (&family::WAITING, &self.waiting),
            (&family::REATTACHED, &self.reattached),
            (&family::SNAPSHOT_KEPT, &self.snapshot_kept),
            (&family::SNAPSHOT_ERRORS, &self.snapshot_errors),
            (&family::SNAPSHOTS_REFUSED, &self.snapshots_refused),
            (&family::SNAPSHOT_SERVED, &self.snapshot_served),
            (&family::TAKING_OVER, &self.taking_over),
            (&family::OTHER_PROXIES, &self.rivals),
            (&family::SERVICE_ROUTES, &self.routes),
            (&family::SERVICE_ROUTES_RESTORED, &self.routes_restored),
            (&family::MASQUERADING, &self.masquerading),
            (&family::MASQUERADE_RESTORED, &self.masquerade_restored),
            (&family::OPEN_DRIFT, &self.open_drift),
            (&family::PRIVATE_PINS, &self.private_pins),
            (&family::SERVICE_PORTS, ports),
            (&family::BACKENDS, backends),
            (&family::FRONTENDS, frontends),
            (&family::UPLINKS, uplinks),
            (&family::POD_INTERFACES, pods),
        ] {
            text.single(family, number.get());
        }
        text.head(&family::INTERFACE_ROLES);
        for told in self.interface_roles() {
            text.sample(&family::INTERFACE_ROLES, &[&told.interface, told.role, told.reason], 1);
        }
        text.head(&family::NO_LOCAL_ENDPOINTS);
        for (policy, numbers) in ["internal", "external"].iter().zip(&self.without_local_endpoints) {
            for (ip_family, number) in FAMILIES.iter().zip(numbers) {
                text.sample(&family::NO_LOCAL_ENDPOINTS, &[policy, ip_family], number.get());
            }
        }
        self.health(&mut text, observed);
        by_reason(&mut text, &family::COMPLAINTS, &self.complaints());
        watches(&mut text, &observed.watches);
        self.fill.write(&mut text, &observed.rooms);
        by_reason(&mut text, &family::REASONS, &observed.reasons);
        observed.counts.write(&mut text);
        runs(&mut text, &observed.runs);
        process::write(&mut text);
        text.head(&family::BUILD);
        text.sample(&family::BUILD, &[env!("CARGO_PKG_VERSION"), version::revision()], 1);
        text.into_string()
    }

    /// What kube-proxy tells by family, and here is of both: they are written together.
    fn both_families(&self, text: &mut Text) {
        text.head(&family::SYNC);
        FAMILIES.iter().for_each(|ip_family| self.sync.write(text, &family::SYNC, ip_family));
        for (family, number) in [(&family::SYNCED, &self.synced), (&family::QUEUED, &self.queued)] {
            text.head(family);
            FAMILIES.iter().for_each(|ip_family| text.sample(family, &[ip_family], number.get()));
        }
    }

    fn health(&self, text: &mut Text, observed: &Observed) {
        let answers = self.health_answers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (family, answers) in [&family::HEALTHZ, &family::LIVEZ].into_iter().zip(&answers) {
            text.head(family);
            for code in [200, 503] {
                let count = answers.get(&code).copied().unwrap_or_default();
                text.sample(family, &[&code.to_string()], count);
            }
        }
        text.single(&family::HEALTHY, u8::from(observed.healthy));
        text.single(&family::HEALTH_CHECK_PORTS, observed.unbound);
        text.single(&family::UNATTACHED, observed.unattached);
    }

    /// What objects get wrong now, by reason.
    pub fn complaints(&self) -> Vec<(&'static str, u64)> {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn by_reason(text: &mut Text, family: &family::Family, numbers: &[(&str, u64)]) {
    text.head(family);
    for (reason, number) in numbers {
        text.sample(family, &[reason], number);
    }
}

fn watches(text: &mut Text, watches: &[(Kind, KindStatus)]) {
    let seconds = |moment: Option<SystemTime>| {
        let since = moment.and_then(|moment| moment.duration_since(SystemTime::UNIX_EPOCH).ok());
        since.unwrap_or_default().as_secs()
    };
    let mut each = |family: &family::Family, number: &dyn Fn(&KindStatus) -> u64| {
        text.head(family);
        for (kind, status) in watches {
            text.sample(family, &[&kind.to_string()], number(status));
        }
    };
    each(&family::WATCH_CONNECTED_SINCE, &|status| seconds(status.since));
    each(&family::WATCH_LAST_HEARD, &|status| seconds(status.heard));
    each(&family::WATCH_ERRORS, &|status| status.errors);
    each(&family::WATCH_LISTS, &|status| status.lists);
}

fn runs(text: &mut Text, programs: &[(Arc<str>, u64, u64)]) {
    text.head(&family::PROGRAM_RUNS);
    for (program, runs, _) in programs {
        text.sample(&family::PROGRAM_RUNS, &[program], runs);
    }
    text.head(&family::PROGRAM_SECONDS);
    for (program, _, nanoseconds) in programs {
        text.sample(&family::PROGRAM_SECONDS, &[program], *nanoseconds as f64 / 1e9);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// H3
    #[test]
    fn metrics_that_kube_proxy_has_are_called_as_there() {
        let metrics = Metrics::default();
        metrics.programming[1].observe(Duration::from_millis(3));
        metrics.sync.observe(Duration::from_millis(3));
        metrics.service_changes.add(2);
        metrics.health_answered("/healthz", 503);
        let text = metrics.text(&Observed { reasons: vec![("no-endpoints", 7)], ..Observed::default() });
        for line in [
            "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"0.0025\"} 0",
            "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"0.005\"} 1",
            "kubeproxy_network_programming_duration_seconds_bucket{ip_family=\"IPv6\",le=\"+Inf\"} 1",
            "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv6\"} 1",
            "kubeproxy_network_programming_duration_seconds_count{ip_family=\"IPv4\"} 0",
            "kubeproxy_sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} 1",
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv6\"} 0",
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\",ip_family=\"IPv4\"} 0",
            "kubeproxy_sync_proxy_rules_service_changes_total 2",
            "kubeproxy_proxy_healthz_total{code=\"503\"} 1",
            "kubeproxy_proxy_livez_total{code=\"200\"} 0",
            "portolan_reasons_total{reason=\"no-endpoints\"} 7",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
    }

    /// H3
    #[test]
    fn how_each_kind_of_objects_is_followed_is_told() {
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let followed = KindStatus { since: at(70), heard: at(90), lists: 2, ..KindStatus::default() };
        let failing = KindStatus { heard: at(80), lists: 1, errors: 3, ..KindStatus::default() };
        let watches = vec![(Kind::Service, followed), (Kind::EndpointSlice, failing)];
        let text = Metrics::default().text(&Observed { watches, ..Observed::default() });
        for line in [
            "portolan_watch_connected_since_timestamp_seconds{kind=\"Service\"} 70",
            "portolan_watch_connected_since_timestamp_seconds{kind=\"EndpointSlice\"} 0",
            "portolan_watch_last_heard_timestamp_seconds{kind=\"Service\"} 90",
            "portolan_watch_last_heard_timestamp_seconds{kind=\"EndpointSlice\"} 80",
            "portolan_watch_errors_total{kind=\"EndpointSlice\"} 3",
            "portolan_watch_lists_total{kind=\"Service\"} 2",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} in {text}");
        }
    }

    /// H3
    #[test]
    fn every_line_is_a_comment_or_a_name_and_a_number() {
        let observed = Observed {
            reasons: vec![("x", 1)],
            runs: vec![("connect4".into(), 2, 3)],
            ..Observed::default()
        };
        for line in Metrics::default().text(&observed).lines().filter(|line| !line.starts_with("# ")) {
            let (name, number) = line.rsplit_once(' ').unwrap();
            assert!(number.parse::<f64>().is_ok() && !name.is_empty(), "{line}");
        }
    }

    /// H3
    #[test]
    fn every_metric_of_the_list_is_told_and_no_other() {
        let text = Metrics::default().text(&Observed::default());
        let told: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let mut listed: Vec<_> =
            family::ALL.iter().map(|family| format!("{} {}", family.name, family.kind)).collect();
        let mut told: Vec<_> = told.into_iter().map(str::to_owned).collect();
        told.sort();
        listed.sort();
        assert_eq!(told, listed);
    }
}
