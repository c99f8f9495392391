//! What comes and goes while an agent is watched, and who calls meanwhile.

use crate::api_server::{ApiServer, Treatment};
use crate::lab::{AgentOptions, Client, Endpoint, Lab, Options, PodOptions, Service, Source, at};
use anyhow::{Context, Result, bail};
use dataplane_common::frontend::FrontendKey;
use dataplane_common::tables::{Frontends, LAYOUT};
use dataplane_common::{Addr, Port};
use dataplane_user::kernel::maps::Map;
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Between two changes.
const PAUSE: Duration = Duration::from_millis(50);
/// Services that come and go, and endpoints that one may have.
const SERVICES: u64 = 200;
const ENDPOINTS: u64 = 30;
/// Pods and interfaces beside them that there are at most at a time.
const PODS: u64 = 3;
const INTERFACES: u64 = 5;
/// How often the API server is in trouble, and for how long.
const TROUBLE_EVERY: Duration = Duration::from_secs(60);
const TROUBLE: Duration = Duration::from_secs(4);
/// Between two calls of the Service that nothing happens to.
const BETWEEN_CALLS: Duration = Duration::from_millis(25);
/// How long anything may take to come to rest, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

const PORT: u16 = 80;
const TARGET: u16 = 8080;
/// TCP.
const PROTO: u8 = 6;
const KEPT: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const TIMED: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 20);

/// A node with an agent, its API server, and what there is of churn.
pub(super) struct Scene {
    server: ApiServer,
    lab: Lab,
    random: Cell<u64>,
    changes: Cell<u64>,
    /// By number; of the Services with their objects.
    services: RefCell<Vec<Option<Service>>>,
    pods: RefCell<Vec<bool>>,
    interfaces: RefCell<Vec<bool>>,
    /// When the API server is in trouble next, and how.
    trouble: Cell<(Instant, u64)>,
}

/// How often the Service that nothing happens to was called.
#[derive(Default)]
pub(super) struct Calls {
    made: AtomicU64,
    failed: AtomicU64,
}

impl Calls {
    /// Calls, and failed calls.
    pub(super) fn counts(&self) -> [u64; 2] {
        [&self.made, &self.failed].map(|count| count.load(Ordering::Relaxed))
    }
}

impl Scene {
    pub(super) fn raise() -> Result<Self> {
        let lab = Options::default().nodes(1).create()?;
        lab.add_pod("web", 0, &PodOptions::default())?;
        lab.add_pod("shell", 0, &PodOptions::client())?;
        let node = lab.node(0);
        let server = ApiServer::start(node.place())?;
        server.put(json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": node.name() } }));
        server.put(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
            "spec": { "cidrs": ["10.96.0.0/16"] },
        }));
        let web = lab.pod("web").context("no pod")?.endpoint();
        let kept = Service::new("kept", KEPT).tcp(PORT, TARGET).udp(PORT, TARGET).endpoints([web]);
        kept.objects().into_iter().for_each(|object| server.put(object));
        let kubeconfig = server.kubeconfig(lab.folder())?;
        node.start_agent(&AgentOptions::default().source(Source::Kubeconfig(kubeconfig)))?;
        Ok(Self {
            server,
            lab,
            random: Cell::new(0x9e37_79b9_7f4a_7c15),
            changes: Cell::new(0),
            services: RefCell::new(vec![None; SERVICES as usize]),
            pods: RefCell::new(vec![false; PODS as usize]),
            interfaces: RefCell::new(vec![false; INTERFACES as usize]),
            trouble: Cell::new((Instant::now() + TROUBLE_EVERY / 4, 0)),
        })
    }

    /// The agent's process.
    pub(super) fn agent(&self) -> Result<u32> {
        Ok(self.lab.node(0).agent().context("there is no agent")?.process().pid())
    }

    /// Where its pins are.
    pub(super) fn pins(&self) -> PathBuf {
        self.lab.node(0).bpffs()
    }

    pub(super) fn changes(&self) -> u64 {
        self.changes.get()
    }

    /// Does this while a pod calls the Service that nothing happens to.
    pub(super) fn under_calls(&self, act: impl FnOnce(&Calls) -> Result<()>) -> Result<()> {
        let (calls, end) = (Calls::default(), AtomicBool::new(false));
        let client =
            Client::at(self.lab.pod("shell").context("no pod")?.place()).timeout(Duration::from_secs(5));
        std::thread::scope(|scope| {
            let calling = scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    let number = calls.made.fetch_add(1, Ordering::Relaxed);
                    let to = at(KEPT, PORT);
                    let answer = if number % 2 == 0 { client.tcp(to) } else { client.udp(to) };
                    if let Err(failure) = answer {
                        eprintln!("call {number}: {failure}");
                        calls.failed.fetch_add(1, Ordering::Relaxed);
                    }
                    std::thread::sleep(BETWEEN_CALLS);
                }
            });
            let result = act(&calls);
            end.store(true, Ordering::Relaxed);
            calling.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result
        })
    }

    /// Has everything come and go until then.
    pub(super) fn churn_until(&self, end: Instant) -> Result<()> {
        while Instant::now() < end {
            self.change()?;
            self.changes.set(self.changes.get() + 1);
            self.trouble();
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// A number below `end`: xorshift, the same at every run.
    fn below(&self, end: u64) -> u64 {
        let mut x = self.random.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.random.set(x);
        x % end
    }

    fn change(&self) -> Result<()> {
        match self.below(20) {
            0 => self.turn_pod(self.below(PODS)),
            1 | 2 => self.turn_interface(self.below(INTERFACES)),
            3..=6 => self.turn_service(self.below(SERVICES)),
            _ => self.change_endpoints(self.below(SERVICES)),
        }
    }

    fn turn_pod(&self, number: u64) -> Result<()> {
        let name = format!("churn-{number}");
        let mut pods = self.pods.borrow_mut();
        let there = &mut pods[number as usize];
        if *there {
            self.lab.node(0).remove_pod(&name)?;
        } else {
            self.lab.add_pod(&name, 0, &PodOptions::client())?;
        }
        *there = !*there;
        Ok(())
    }

    fn turn_interface(&self, number: u64) -> Result<()> {
        let mut interfaces = self.interfaces.borrow_mut();
        let there = &mut interfaces[number as usize];
        let name = format!("churn{number}");
        let lines = if *there {
            vec![format!("link del {name}")]
        } else {
            vec![
                format!("link add {name} type veth peer name {name}p"),
                format!("addr add 198.18.{number}.1/24 dev {name}"),
                format!("link set {name} up"),
                format!("link set {name}p up"),
            ]
        };
        self.lab.node(0).place().ip(&lines)?;
        *there = !*there;
        Ok(())
    }

    fn turn_service(&self, number: u64) -> Result<()> {
        let mut services = self.services.borrow_mut();
        let slot = &mut services[number as usize];
        match slot.take() {
            Some(service) => service.objects().iter().for_each(|object| self.server.remove(object)),
            None => {
                let address = Ipv4Addr::new(10, 96, 1, number as u8);
                let service = Service::new(&format!("churn-{number}"), address)
                    .tcp_node_port(PORT, TARGET, 30_000 + number as u16)
                    .endpoints(self.endpoints());
                service.objects().into_iter().for_each(|object| self.server.put(object));
                *slot = Some(service);
            }
        }
        Ok(())
    }

    fn change_endpoints(&self, number: u64) -> Result<()> {
        if let Some(service) = &mut self.services.borrow_mut()[number as usize] {
            service.set_endpoints(self.endpoints());
            service.objects().into_iter().for_each(|object| self.server.put(object));
        }
        Ok(())
    }

    fn endpoints(&self) -> Vec<Endpoint> {
        let count = self.below(ENDPOINTS);
        let endpoint = |_| {
            let [high, low] = (self.below(1 << 12) as u16).to_be_bytes();
            Endpoint::new("elsewhere", Ipv4Addr::new(10, 244, 16 + high, low), "node-9")
        };
        (0..count).map(endpoint).collect()
    }

    /// The API server is cut off, silent or has forgotten everything, in turn.
    fn trouble(&self) {
        let (next, number) = self.trouble.get();
        let now = Instant::now();
        if now < next {
            return;
        }
        let (in_trouble, which) = (number % 2 == 1, number / 2 % 3);
        if in_trouble {
            self.server.relent();
        } else {
            match which {
                0 => self.server.treat("", Treatment::Cut),
                1 => self.server.treat("", Treatment::Silence),
                _ => self.server.forget(),
            }
        }
        let pause = if in_trouble { TROUBLE_EVERY } else { TROUBLE };
        self.trouble.set((now + pause, number + 1));
    }

    /// Takes away all that came, and waits until the agent has followed; tells how long a new Service took then.
    pub(super) fn settle(&self) -> Result<Duration> {
        self.server.relent();
        let (_, number) = self.trouble.get();
        self.trouble.set((Instant::now() + TROUBLE_EVERY / 4, number.next_multiple_of(2)));
        for number in 0..PODS {
            if self.pods.borrow()[number as usize] {
                self.turn_pod(number)?;
            }
        }
        for number in 0..INTERFACES {
            if self.interfaces.borrow()[number as usize] {
                self.turn_interface(number)?;
            }
        }
        for number in 0..SERVICES {
            if self.services.borrow()[number as usize].is_some() {
                self.turn_service(number)?;
            }
        }
        // Once to see that it follows again, and then for the time.
        self.time_a_service()?;
        let took = self.time_a_service()?;
        self.wait_until("all interfaces are as they were", || {
            let links = self.lab.node(0).place().run("ip", &["-brief", "link"])?;
            Ok(!links.contains("churn"))
        })?;
        self.wait_until("pins of interfaces that went are gone", || Ok(self.stale_pins()? == 0))?;
        Ok(took)
    }

    /// Pins of links whose interface does not exist; they carry its index.
    fn stale_pins(&self) -> Result<usize> {
        let links = self.lab.node(0).place().run("ip", &["-oneline", "link"])?;
        let indexes: Vec<&str> = links.lines().filter_map(|line| line.split(':').next()).collect();
        let mut stale = 0;
        let folder = self.pins().join("links");
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let index = name.rsplit('-').next().filter(|index| index.parse::<u32>().is_ok());
            stale += usize::from(index.is_some_and(|index| !indexes.contains(&index)));
        }
        Ok(stale)
    }

    /// A Service comes and goes: from the change to the kernel.
    fn time_a_service(&self) -> Result<Duration> {
        let service = Service::new("timed", TIMED).tcp(PORT, TARGET).endpoints(self.endpoints());
        let frontends = Map::<Frontends>::open(&self.pins().join(LAYOUT))?;
        let key = FrontendKey::new(Addr::from(IpAddr::from(TIMED)), Port::new(PORT), PROTO);
        let begun = Instant::now();
        service.objects().into_iter().for_each(|object| self.server.put(object));
        self.wait_until("a new Service is in the kernel", || Ok(frontends.get(&key)?.is_some()))?;
        let took = begun.elapsed();
        service.objects().iter().for_each(|object| self.server.remove(object));
        self.wait_until("it is gone", || Ok(frontends.get(&key)?.is_none()))?;
        Ok(took)
    }

    fn wait_until(&self, what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
        let begun = Instant::now();
        while !is_so()? {
            if begun.elapsed() > PATIENCE {
                self.lab.tell_agent_logs();
                bail!("not within {} s: {what}", PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}
