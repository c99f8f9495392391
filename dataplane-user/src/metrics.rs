//! Metrics in Prometheus' text format (H3). The only place that knows their names; where a metric means what one of
//! kube-proxy's means, it has that name.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// Upper bounds of the buckets of all durations, in seconds.
const BOUNDS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];

/// How often something took how long.
#[derive(Debug, Default)]
pub struct Histogram {
    state: Mutex<HistogramState>,
}

#[derive(Clone, Debug, Default)]
struct HistogramState {
    buckets: [u64; BOUNDS.len()],
    count: u64,
    sum: f64,
}

impl Histogram {
    /// One more.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            state.buckets[bucket] += 1;
        }
        state.count += 1;
        state.sum += seconds;
    }

    fn write(&self, text: &mut String, name: &str, help: &str) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
        let mut sum = 0;
        for (bound, bucket) in BOUNDS.iter().zip(state.buckets) {
            sum += bucket;
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {sum}");
        }
        let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {}", state.count);
        let _ = writeln!(text, "{name}_sum {}\n{name}_count {}", state.sum, state.count);
    }
}

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

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// All that the agent counts.
#[derive(Debug, Default)]
pub struct Metrics {
    /// From the change of an object's endpoints to its tables in the kernel.
    pub programming: Histogram,
    /// From taking up changes to their tables in the kernel.
    pub sync: Histogram,
    /// When tables last reached the kernel.
    pub synced: Number,
    /// When a change was last taken up.
    pub queued: Number,
    /// Changes of Services.
    pub service_changes: Number,
    /// Changes of EndpointSlices.
    pub endpoint_changes: Number,
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
    pub interfaces: [Number; 2],
    /// Programs that should be attached and were not, and had to be attached again.
    pub reattached: Number,
}

impl Metrics {
    /// All of them, and the reasons that the kernel counts.
    pub fn text(&self, reasons: &[(&str, u64)]) -> String {
        let mut text = String::with_capacity(8192);
        self.durations(&mut text);
        let mut counter = |name: &str, help: &str, number: &Number| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter\n{name} {}", number.get());
        };
        counter(
            "kubeproxy_sync_proxy_rules_service_changes_total",
            "Changes of Services",
            &self.service_changes,
        );
        counter(
            "kubeproxy_sync_proxy_rules_endpoint_changes_total",
            "Changes of EndpointSlices",
            &self.endpoint_changes,
        );
        counter("portolan_sync_bpf_calls_total", "Calls of bpf(2) that changes took", &self.calls);
        counter("portolan_sync_ops_total", "Entries that changes wrote or removed", &self.ops);
        counter("portolan_sync_errors_total", "How often the kernel refused a write", &self.sync_errors);
        counter("portolan_audits_total", "Audits of the kernel's tables", &self.audits);
        counter("portolan_audit_repairs_total", "Entries that differed and were repaired", &self.repairs);
        counter("portolan_unreadable_objects_total", "Objects that could not be read", &self.unreadable);
        counter("portolan_reattached_total", "Programs that had to be attached again", &self.reattached);
        self.states(&mut text);
        labelled(&mut text, "portolan_complaints", "What objects get wrong", "gauge", &self.complaints());
        labelled(
            &mut text,
            "portolan_reasons_total",
            "Why packets were dropped or refused",
            "counter",
            reasons,
        );
        text
    }

    fn complaints(&self) -> Vec<(&'static str, u64)> {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn durations(&self, text: &mut String) {
        self.programming.write(
            text,
            "kubeproxy_network_programming_duration_seconds",
            "From the change of endpoints to their tables in the kernel",
        );
        self.sync.write(
            text,
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "From taking up changes to their tables in the kernel",
        );
    }

    fn states(&self, text: &mut String) {
        let [ports, backends, frontends] = &self.sizes;
        let [uplinks, pods] = &self.interfaces;
        let mut gauge = |name: &str, help: &str, number: &Number| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {}", number.get());
        };
        gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "When tables last reached the kernel",
            &self.synced,
        );
        gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "When a change was last taken up",
            &self.queued,
        );
        gauge("portolan_waiting_services", "Services that found no room yet", &self.waiting);
        gauge("portolan_service_ports", "Service ports in the kernel", ports);
        gauge("portolan_backends", "Backends in the kernel", backends);
        gauge("portolan_frontends", "Frontends in the kernel", frontends);
        gauge("portolan_uplinks", "Uplinks", uplinks);
        gauge("portolan_pod_interfaces", "Pod interfaces", pods);
    }
}

fn labelled(text: &mut String, name: &str, help: &str, kind: &str, numbers: &[(&str, u64)]) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    for (reason, number) in numbers {
        let _ = writeln!(text, "{name}{{reason=\"{reason}\"}} {number}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// H3
    #[test]
    fn metrics_that_kube_proxy_has_are_called_as_there() {
        let metrics = Metrics::default();
        metrics.programming.observe(Duration::from_millis(3));
        metrics.service_changes.add(2);
        let text = metrics.text(&[("no_endpoint", 7)]);
        assert!(
            text.contains("kubeproxy_network_programming_duration_seconds_bucket{le=\"0.0025\"} 0\n"),
            "{text}"
        );
        assert!(
            text.contains("kubeproxy_network_programming_duration_seconds_bucket{le=\"0.005\"} 1\n"),
            "{text}"
        );
        assert!(
            text.contains("kubeproxy_network_programming_duration_seconds_bucket{le=\"+Inf\"} 1\n"),
            "{text}"
        );
        assert!(text.contains("\nkubeproxy_sync_proxy_rules_service_changes_total 2\n"), "{text}");
        assert!(text.contains("\nportolan_reasons_total{reason=\"no_endpoint\"} 7\n"), "{text}");
    }

    #[test]
    fn every_line_is_a_comment_or_a_name_and_a_number() {
        for line in Metrics::default().text(&[("x", 1)]).lines().filter(|line| !line.starts_with("# ")) {
            let (name, number) = line.rsplit_once(' ').unwrap();
            assert!(number.parse::<f64>().is_ok() && !name.is_empty(), "{line}");
        }
    }
}
