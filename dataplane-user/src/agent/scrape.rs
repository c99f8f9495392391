//! What is looked up when somebody asks for metrics: counters in the kernel's maps, never more than are told.

use crate::health::Health;
use crate::health_checks::HealthChecks;
use crate::http::{Once, Page, Pages, now};
use crate::kernel::bpf;
use crate::kernel::maps::{KernelMaps, MapError};
use crate::kernel::object::Programs;
use crate::metrics::{Count, Counts, Metrics, Observed, Ports, SERIES};
use crate::watch::Status;
use dataplane_common::backend::BackendStatus;
use dataplane_common::drop::Reason;
use dataplane_common::tables::{BackendTraffic, Backends, OpenCounts, Reasons, ServiceTraffic, ServiceTries};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

/// Where all that is told is found.
pub(super) struct Scrape {
    pub(super) maps: KernelMaps,
    pub(super) programs: Programs,
    pub(super) metrics: Arc<Metrics>,
    pub(super) health: Arc<Health>,
    pub(super) health_checks: Arc<HealthChecks>,
    /// How the objects are followed, once that has begun.
    pub(super) status: OnceLock<Status>,
    /// `--metrics-max-series`.
    pub(super) max_series: usize,
    /// `--metrics-endpoints`.
    pub(super) endpoints: bool,
}

/// How many clients may be at metrics at once: a page of them is some megabytes, and lies there until it is sent.
pub(super) const CLIENTS: usize = 16;

impl Scrape {
    /// `/metrics` and `/proxyMode` (H3). Many maps are read for metrics: once for all who ask at the same time.
    pub(super) fn pages(self: Arc<Self>) -> Pages {
        let once = Arc::new(Once::default());
        Arc::new(move |path| match path {
            "/metrics" => {
                let (scrape, once) = (self.clone(), once.clone());
                Box::pin(async move { once.get(move || scrape.metrics_page()).await })
            }
            "/proxyMode" => now(Page::text(200, "ebpf")),
            _ => now(Page::not_found()),
        })
    }

    fn metrics_page(&self) -> Page {
        let text = self.metrics.text(&self.observe());
        Page { content_type: "text/plain; version=0.0.4; charset=utf-8", ..Page::text(200, text) }
    }

    fn observe(&self) -> Observed {
        let counts = self.counts(&self.metrics.ports()).unwrap_or_else(|error| {
            tracing::warn!("metrics without traffic: {error}");
            Counts::default()
        });
        Observed {
            healthy: self.health.trouble().is_none(),
            unattached: self.health.count_unattached(),
            unbound: self.health_checks.unbound(),
            reasons: self.reasons().unwrap_or_default(),
            // The storage of sockets has no bound.
            rooms: self
                .maps
                .iter()
                .map(|(name, map)| (name, map.shape().max_entries))
                .filter(|(_, room)| *room > 0)
                .collect(),
            counts,
            runs: self.runs(),
            watches: self.status.get().map(|status| status.all().into_iter().collect()).unwrap_or_default(),
        }
    }

    /// How often each reason occurred, over all CPUs.
    fn reasons(&self) -> Result<Vec<(&'static str, u64)>, MapError> {
        let reasons = self.maps.map::<Reasons>()?;
        let count = |reason: &Reason| {
            let count = reasons.sum(&u32::from(*reason as u8))?;
            Ok((reason.label(), count.unwrap_or_default()))
        };
        Reason::ALL.iter().map(count).collect()
    }

    /// The counters of service ports, then, if somebody wants them and as far as series are left, those of endpoints.
    fn counts(&self, ports: &Ports) -> Result<Counts, MapError> {
        let traffic = self.maps.map::<ServiceTraffic>()?;
        let mut counts = Counts { left_out: [ports.left_out, 0], ..Counts::default() };
        let open = self.open_of_services()?;
        let tries = self.maps.map::<ServiceTries>()?;
        for (id, name) in &ports.ports {
            let tries = tries.get(id)?.unwrap_or_default();
            let count = Count {
                traffic: traffic.get(id)?.unwrap_or_default(),
                open: open.get(id).copied().unwrap_or_default(),
                tries: (tries.moved() > 0).then(|| [tries.moved(), tries.rescued]),
            };
            counts.services.push((name.clone(), count));
        }
        if !self.endpoints {
            return Ok(counts);
        }
        let room = (self.max_series / SERIES).saturating_sub(counts.services.len());
        let (mut told, mut all) = (Vec::new(), 0);
        self.maps.map::<Backends>()?.visit(|id, backends| {
            let Some(backend) = backends.first() else { return };
            if !backend.status().has(BackendStatus::SERVING) {
                return;
            }
            all += 1;
            if told.len() < room
                && let Some(name) = ports.get(backend.service())
            {
                told.push((
                    id,
                    name.clone(),
                    SocketAddr::new(backend.addr().to_ip(), backend.port().number()),
                ));
            }
        })?;
        counts.left_out[1] = all - told.len();
        let (traffic, open) = (self.maps.map::<BackendTraffic>()?, self.maps.map::<OpenCounts>()?);
        for (id, name, address) in told {
            let count = Count {
                traffic: traffic.get(&id)?.unwrap_or_default(),
                open: open.get(&id)?.unwrap_or_default().count().into(),
                tries: None,
            };
            counts.endpoints.push((name, address, count));
        }
        Ok(counts)
    }

    /// How many flows and connected sockets each service port has that did not end.
    fn open_of_services(&self) -> Result<HashMap<u32, u64>, MapError> {
        let mut open = Vec::new();
        self.maps.map::<OpenCounts>()?.visit(|backend, counts| {
            let count = counts.first().map_or(0, |count| count.count());
            if count > 0 {
                open.push((backend, u64::from(count)));
            }
        })?;
        let backends = self.maps.map::<Backends>()?;
        let mut services = HashMap::new();
        for (backend, count) in open {
            if let Some(backend) = backends.get(&backend)? {
                *services.entry(backend.service()).or_default() += count;
            }
        }
        Ok(services)
    }

    fn runs(&self) -> Vec<(Arc<str>, u64, u64)> {
        if !bpf::counts_runs() {
            return Vec::new();
        }
        self.programs.each(|name, program| {
            let (runs, nanoseconds) = bpf::program_runs(program).ok()?;
            Some((name.clone(), runs, nanoseconds))
        })
    }
}
