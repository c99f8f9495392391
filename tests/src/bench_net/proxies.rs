//! What the proxies themselves take: memory, and the time until one endpoint's change reaches packets (B10, B12).
//!
//! Of all legs alike: from the request to the API server until a client in a pod sees the change. Of Portolan also: from
//! the event, as a watch of this process sees it, until the word in the kernel's table has changed; and its `bpf()` calls.

use super::Leg;
use super::load;
use super::station::Station;
use crate::bench::target::{Judgement, Limit, Ratio};
use crate::bench_sync::Durations;
use crate::controlplane::ControlPlane;
use crate::lab::{Client, Place, at};
use anyhow::{Context, Result, bail, ensure};
use dataplane_common::frontend::FrontendKey;
use dataplane_common::service::Service;
use dataplane_common::tables::{Frontends, LAYOUT, Services};
use dataplane_common::{Addr, Port};
use dataplane_user::kernel::maps::Map;
use futures::StreamExt;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{Patch, PatchParams, WatchEvent, WatchParams};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// The port of a probe's Service and of its endpoint: the load tool's echo.
const PORT: u16 = 7000;
/// How long the changes of one leg may take together, for each that is wanted: a slow proxy is timed less often.
const PATIENCE: Duration = Duration::from_millis(150);
/// How long one change may take.
const ONE_CHANGE: Duration = Duration::from_secs(10);
/// TCP.
const PROTO: u8 = 6;

/// B10: milliseconds from the event to packets, of 99 in 100 changes.
const CHANGE_LIMIT_MS: f64 = 5.0;
/// B10: `bpf()` calls of one change.
const CALLS_LIMIT: f64 = 8.0;
/// B12: Services, and MiB at most.
const MEMORY_LIMITS: [(usize, f64); 2] = [(10_000, 40.0), (30_000, 120.0)];

/// What one proxy takes at one size.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProxyCost {
    /// Which leg.
    pub leg: Leg,
    /// How many Services there were.
    pub services: usize,
    /// Resident memory, in KiB.
    pub resident_kib: Option<u64>,
    /// Milliseconds from the request to the API server until a client sees an endpoint come or go.
    pub change_ms: Option<Durations>,
    /// Of Portolan: the change inside the agent.
    pub agent: Option<AgentChanges>,
    /// Why something of this is missing.
    pub failure: Option<String>,
}

/// Changes of one endpoint, as Portolan's agent takes them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentChanges {
    /// How many.
    pub changes: usize,
    /// Milliseconds from the event to the table in the kernel.
    pub event_to_kernel_ms: Durations,
    /// Milliseconds from the request to the API server to the table in the kernel.
    pub request_to_kernel_ms: Durations,
    /// `bpf()` calls of one change, on the average.
    pub calls: f64,
}

/// Measures all proxies in turn.
pub(super) fn measure(
    plane: &ControlPlane,
    stations: &[Station],
    size: usize,
    changes: usize,
) -> Vec<ProxyCost> {
    let mut costs = Vec::new();
    for station in stations.iter().filter(|station| station.has_proxy()) {
        let mut cost = ProxyCost {
            leg: station.leg(),
            services: size,
            resident_kib: station.proxy_pid().and_then(resident_kib),
            change_ms: None,
            agent: None,
            failure: None,
        };
        if let Err(error) = fill(&mut cost, plane, station, changes) {
            cost.failure = Some(format!("{error:#}"));
        }
        println!("  {}", cost.line());
        costs.push(cost);
    }
    costs
}

fn fill(cost: &mut ProxyCost, plane: &ControlPlane, station: &Station, changes: usize) -> Result<()> {
    let name = format!("change-{}-{}", cost.services, cost.leg.name());
    let ports = [("echo", "TCP", PORT, PORT)];
    let endpoint = station.endpoint();
    let node = station.node().name();
    let address = plane.block_on(load::create(plane.client(), &name, &ports, None, &[(endpoint, node)]))?;
    let probe = Probe { plane, slice: format!("{name}-1"), endpoint, address, client: station.client() };
    probe.wait(true)?;
    cost.change_ms = Some(Durations::of(probe.change(changes)?)?);
    // The two other legs of Portolan have the same agent.
    if cost.leg == Leg::PortolanPacket {
        cost.agent = Some(probe.change_in_kernel(station, changes)?);
    }
    Ok(())
}

/// Resident memory of a process.
pub(crate) fn resident_kib(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

impl ProxyCost {
    fn line(&self) -> String {
        let name = self.leg.name();
        let memory = self.resident_kib.map_or(0.0, |kib| kib as f64 / 1024.0);
        let change = self.change_ms.as_ref().map_or_else(String::new, |ms| {
            format!(", a change reaches clients after {:.1} ms (p99 {:.1})", ms.median, ms.p99)
        });
        let agent = self.agent.as_ref().map_or_else(String::new, |agent| {
            let ms = &agent.event_to_kernel_ms;
            format!("; event to kernel {:.2} ms (p99 {:.2}), {:.1} calls", ms.median, ms.p99, agent.calls)
        });
        let failure =
            self.failure.as_ref().map_or_else(String::new, |failure| format!("; FAILED: {failure}"));
        format!("{name:<20} {memory:>6.1} MiB resident{change}{agent}{failure}")
    }
}

/// A Service whose endpoint comes and goes.
struct Probe<'a> {
    plane: &'a ControlPlane,
    slice: String,
    endpoint: Ipv4Addr,
    address: Ipv4Addr,
    client: &'a Place,
}

impl Probe<'_> {
    /// Writes the slice's endpoints.
    fn set(&self, endpoints: &[Ipv4Addr]) -> impl Future<Output = Result<()>> + Send + use<> {
        let ready = json!({ "ready": true, "serving": true, "terminating": false });
        let endpoints: Vec<_> =
            endpoints.iter().map(|address| json!({ "addresses": [address], "conditions": ready })).collect();
        let slices = Api::<EndpointSlice>::default_namespaced(self.plane.client().clone());
        let name = self.slice.clone();
        async move {
            let patch = Patch::Merge(json!({ "endpoints": endpoints }));
            slices.patch(&name, &PatchParams::default(), &patch).await.map(drop).context("patching a slice")
        }
    }

    /// Waits until the Service answers, or refuses.
    fn wait(&self, answers: bool) -> Result<()> {
        let client = Client::at(self.client).timeout(Duration::from_millis(200));
        let end = Instant::now() + ONE_CHANGE;
        while client.connect(at(self.address, PORT)).is_ok() != answers {
            ensure!(Instant::now() < end, "a change is not seen after {ONE_CHANGE:?}");
        }
        Ok(())
    }

    /// Lets the endpoint go and come; how long each took to be seen by a client.
    fn change(&self, changes: usize) -> Result<Vec<Duration>> {
        let (mut samples, end) = (Vec::new(), Instant::now() + PATIENCE * changes as u32);
        while samples.len() < changes && Instant::now() < end {
            for endpoints in [&[][..], &[self.endpoint]] {
                let begun = Instant::now();
                self.plane.block_on(self.set(endpoints))?;
                self.wait(!endpoints.is_empty())?;
                samples.push(begun.elapsed());
            }
        }
        Ok(samples)
    }

    /// Replaces the endpoint; how long each change took to be in the kernel.
    fn change_in_kernel(&self, station: &Station, changes: usize) -> Result<AgentChanges> {
        let folder = station.node().bpffs().join(LAYOUT);
        let key = FrontendKey::new(Addr::from(IpAddr::from(self.address)), Port::new(PORT), PROTO);
        let frontend = Map::<Frontends>::open(&folder)?.get(&key)?.context("the probe is in no table")?;
        let table = Map::<Services>::open(&folder)?;
        let read = || -> Result<Service> { table.get(&frontend.service())?.context("no such service port") };
        let events = self.watch();
        // The first event tells what is there.
        events.recv_timeout(ONE_CHANGE).context("the watch tells nothing")?;
        let (mut after_event, mut after_request) = (Vec::new(), Vec::new());
        let calls = calls(station)?;
        for n in 0..changes {
            let before = read()?;
            let other = Ipv4Addr::new(10, 140, 0, 1 + (n % 2) as u8);
            let request = Instant::now();
            let (sender, done) = mpsc::channel();
            let set = self.set(&[other]);
            self.plane.spawn(async move { drop(sender.send(set.await)) });
            while read()? == before {
                ensure!(request.elapsed() < ONE_CHANGE, "a change is not in the kernel after {ONE_CHANGE:?}");
            }
            let now = Instant::now();
            done.recv_timeout(ONE_CHANGE).context("the API server does not answer")??;
            let event = events.recv_timeout(ONE_CHANGE).context("the watch tells nothing")?;
            after_event.push(now.saturating_duration_since(event));
            after_request.push(now - request);
        }
        let calls = (self::calls(station)? - calls) / changes as f64;
        let (event_to_kernel_ms, request_to_kernel_ms) =
            (Durations::of(after_event)?, Durations::of(after_request)?);
        Ok(AgentChanges { changes, event_to_kernel_ms, request_to_kernel_ms, calls })
    }

    /// When each event about the slice arrives.
    fn watch(&self) -> Receiver<Instant> {
        let slices = Api::<EndpointSlice>::default_namespaced(self.plane.client().clone());
        let parameters = WatchParams::default().fields(&format!("metadata.name={}", self.slice));
        let (sender, receiver) = mpsc::channel();
        self.plane.spawn(async move {
            let Ok(stream) = slices.watch(&parameters, "0").await else { return };
            let mut stream = std::pin::pin!(stream);
            while let Some(Ok(event)) = stream.next().await {
                let told = matches!(event, WatchEvent::Added(_) | WatchEvent::Modified(_));
                if told && sender.send(Instant::now()).is_err() {
                    return;
                }
            }
        });
        receiver
    }
}

/// How many `bpf()` calls changes took until now, as the agent tells.
fn calls(station: &Station) -> Result<f64> {
    let client = Client::at(station.node().place()).timeout(Duration::from_secs(5));
    let metrics = at(Ipv4Addr::LOCALHOST, 10_249);
    let mut stream = client.connect(metrics).map_err(|failure| anyhow::anyhow!("metrics: {failure}"))?;
    let (status, text) = stream.get("/metrics").map_err(|failure| anyhow::anyhow!("metrics: {failure}"))?;
    ensure!(status == 200, "metrics: status {status}");
    let Some(number) = text.lines().find_map(|line| line.strip_prefix("portolan_sync_bpf_calls_total "))
    else {
        bail!("the agent's metrics have no portolan_sync_bpf_calls_total");
    };
    number.trim().parse().context("portolan_sync_bpf_calls_total")
}

/// What was measured of B10 and B12.
pub(super) fn judge(costs: &[ProxyCost]) -> Vec<Judgement> {
    let mut all = Vec::new();
    let mut per_size = Vec::new();
    for (services, mebibytes) in MEMORY_LIMITS {
        let of_size = |leg: Leg| costs.iter().find(|cost| cost.services == services && cost.leg == leg);
        for leg in [Leg::PortolanSocket, Leg::PortolanPacket] {
            let memory = of_size(leg)
                .and_then(|cost| cost.resident_kib)
                .map(|kib| Ratio::exactly(kib as f64 / 1024.0));
            let what = format!("resident memory of the agent, {}, {services} Services", leg.name());
            all.push(Judgement::new("B12", what, memory, Limit::at_most(mebibytes, "MiB")));
        }
        let agent = of_size(Leg::PortolanPacket).and_then(|cost| cost.agent.as_ref());
        let time = agent.map(|agent| {
            let ms = &agent.event_to_kernel_ms;
            Ratio { median: ms.p99, min: ms.min, max: ms.max }
        });
        let what = format!("event to kernel, p99, real API server, {services} Services");
        all.push(Judgement::new("B10", what, time, Limit::at_most(CHANGE_LIMIT_MS, "ms")));
        let calls = agent.map(|agent| Ratio::exactly(agent.calls));
        let what = format!("calls of one change, real API server, {services} Services");
        all.push(Judgement::new("B10", what, calls, Limit::at_most(CALLS_LIMIT, "bpf() calls")));
        per_size.push(agent.map(|agent| agent.calls.ceil()));
    }
    let growth = match per_size.as_slice() {
        [Some(few), Some(many)] => Some(Ratio::exactly(many / few)),
        _ => None,
    };
    let what = "calls of one change at 30000 Services over those at 10000";
    all.push(Judgement::new("B10", what, growth, Limit::at_most(1.0, "x")));
    all
}
