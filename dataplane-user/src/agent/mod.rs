//! The node agent: wires the watches, the compiler, `sync` and the kernel together. It calls and decides nothing itself.
//!
//! Whatever ends it, it leaves everything in place: the kernel goes on serving (C3).

#[cfg(test)]
mod crash_points;
mod dataplane;
mod dry_run;
mod health_checks;
#[cfg(test)]
mod histories;
mod hooks;
mod keep;
mod masquerade;
mod notify;
mod roles;
mod scrape;
mod serve;
mod service_routes;
mod settings;
mod signals;
mod sources;
mod standing;

use crate::compile::OwnAddresses;
use crate::config::{AgentArgs, Machine, ServiceRoute, SocketLb, TcMode};
use crate::health::Health;
use crate::health_checks::HealthChecks;
use crate::http::{self, Gate};
use crate::kernel::attach::Attachments;
use crate::kernel::callers::CallerCells;
use crate::kernel::carry;
use crate::kernel::clock::Clock;
use crate::kernel::fold::Fold;
use crate::kernel::links::{self, Interfaces};
use crate::kernel::maps::KernelMaps;
use crate::kernel::object::{Object, Options, ProgramLog};
use crate::kernel::pins::{self, Pins};
use crate::kernel::roles::Choice;
use crate::kernel::sysctls::{self, Made};
use crate::kernel::{alone, capability, lasting, probe, service_route};
use crate::memory;
use crate::metrics::Metrics;
use crate::status::local;
use crate::sync::Maps as _;
use crate::version;
use crate::watch::cluster::{Answered, Servers};
use crate::watch::{self, Changes, Watch};
use anyhow::{Context as _, Result};
use dataplane::Dataplane;
use dataplane_common::node::Node;
use dataplane_common::tables::Nodes;
use hooks::{Hooks, Start};
use keep::Keeping;
use masquerade::Masquerading;
use scrape::Scrape;
use serve::{Inputs, Service, Told};
use settings::Settings;
pub(crate) use settings::node_name;
use signals::Signals;
use standing::Standing;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch as state};

/// How many questions by the command line may wait for the loop.
const QUESTIONS: usize = 16;
/// How many changes may wait for the loop before the sources wait for it.
const CHANGES: usize = 1_024;
/// Threads of the runtime, besides the one of the loop and the one that tells of health.
const THREADS: usize = 4;

/// Runs until SIGTERM or SIGINT, or prints what it would do.
///
/// # Errors
/// What keeps it from starting, and what to do about it.
pub fn run(args: AgentArgs) -> Result<()> {
    memory::share_arena();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    // The loop has this thread for itself: no task waits for it there, and none is held up when it hangs.
    let result = runtime
        .block_on(async move { if args.dry_run { dry_run::print(&args).await } else { serve(args).await } });
    // Tasks end with the process, which no job that hangs keeps. If the runtime were shut down under them, its timers would have
    // them panic.
    std::mem::forget(runtime);
    result
}

async fn serve(args: AgentArgs) -> Result<()> {
    let started = SystemTime::now();
    let signals = Signals::new()?;
    let starting = signals::end_while_starting()?;
    tracing::info!("Portolan {}, pins in {}", version::text(), args.bpffs.display());
    capability::check()?;
    let mut features = probe::features()?;
    features.tcx &= args.tc == TcMode::Auto;
    tracing::info!("{features}");
    let cgroup = match args.socket_lb {
        SocketLb::Off => None,
        SocketLb::All | SocketLb::Host => Some(probe::cgroup(args.cgroup.as_deref())?),
    };
    let pins = Pins::with_layout(&args.bpffs, &args.map_layout);
    let mounted = pins.prepare()?;
    if let Some(at) = &mounted {
        tracing::info!("mounted a BPF file system at {}; pins last as long as this mount", at.display());
    }
    let private_pins = lasting::is_private(pins.root(), mounted.is_some());
    if private_pins {
        tracing::warn!(
            "pins end with this agent, and with them the traffic of Services: nobody else has the BPF file system of {}. Mount \
             one on the machine itself (`mount -t bpf bpf /sys/fs/bpf`), and in a container the machine's /sys/fs/bpf",
            pins.root().display()
        );
    }
    let _held = pins.hold(pins::ENDING)?;
    let upgrade = pins.is_upgrade()?;

    let log = tracing::enabled!(target: "dataplane_ebpf", tracing::Level::DEBUG);
    let mut object = Object::open(&Options {
        pins: Some(&pins),
        sizes: &args.map_sizes(Machine::this()),
        log,
        reads: None,
    })?;
    if log {
        tokio::spawn(forward_log(object.logger().context("the programs' log")?));
    }
    let (clock, fold) = (Clock::new(&mut object)?, Fold::new(&mut object)?);
    let attachments = Attachments::new(object, pins.clone(), &features, args.xdp, args.socket_lb)?
        .with_xdp_drivers(args.xdp_driver.clone());
    if args.service_route == ServiceRoute::Auto {
        // The first interfaces that get programs have it among them. The task that keeps routes tells what is in the way.
        let _ = service_route::make_device().await;
    }
    let interfaces = links::follow().await?;
    let maps = KernelMaps::open(&pins.maps())?;
    // Before this version's programs: flows of an earlier one's may be there.
    CallerCells::map(&maps.map()?)?.mark_all(clock.tick());

    // An upgrade that was cut short may have held something back.
    carry::hold_back(&maps, None)?;

    let health = Arc::new(Health::new(args.healthy_within, args.alive_within));
    let metrics = Arc::new(Metrics::default());
    metrics.private_pins.set(u64::from(private_pins));
    let health_checks = Arc::new(HealthChecks::default());
    let scrape = Scrape {
        maps: maps.clone(),
        programs: attachments.programs(),
        metrics: metrics.clone(),
        health: health.clone(),
        health_checks: health_checks.clone(),
        status: OnceLock::new(),
        max_series: args.metrics_max_series,
        endpoints: args.metrics_endpoints,
    };
    let (gate, scrape) = (Gate::default(), Arc::new(scrape));
    spawn_servers(&args, &gate, scrape.clone())?;
    let netns_cookie = links::netns_cookie().context("the cookie of this network namespace")?;
    let mut settings = Settings::new(&args, netns_cookie, features.fib_source);
    // A boot's choices are of one kind, whichever agent runs.
    let written = maps.get::<Nodes>(&0)?.map(|node| node.secret);
    settings.node.secret = written.filter(|secret| *secret != 0).unwrap_or(settings.node.secret);
    if serve::take_over::is_due(&maps)? {
        settings.node.flags |= Node::TAKES_OVER;
        // Before the first flow; a look beside the loop tells what stands in the way.
        let (maps, ports) = (maps.clone(), settings.node.snat_ports.clone());
        let _ = tokio::task::spawn_blocking(move || serve::take_over::note_answers(&maps, &ports)).await?;
    }
    let found = Answered::default();
    let (questions, asked) = mpsc::channel(QUESTIONS);
    let standing = Standing {
        scrape: scrape.clone(),
        node_name: settings.node_name.clone(),
        found: found.clone(),
        started,
        questions,
    };
    tokio::spawn(local::serve(args.bpffs.clone(), standing.pages()));
    let (sender, changes) = mpsc::channel(CHANGES);
    let changes_of = Changes::new(sender, health.pending().clone());
    let watch = watch_objects(&args, &settings, found, changes_of).await?;
    // Nobody else sets it.
    let _ = scrape.status.set(watch.status());

    let _alone = alone::claim()?;
    let choice = settings::choice(&args);
    let hooks = Hooks {
        attachments,
        interfaces: interfaces.clone(),
        choice: choice.clone(),
        cgroup,
        health: health.clone(),
        metrics: metrics.clone(),
        events: watch.events(),
        node_name: settings.node_name.clone(),
        roles: roles::Roles::default(),
        told: hooks::Told::default(),
        own_device: tokio::sync::watch::Sender::default(),
    };
    let own_device = hooks.own_device.subscribe();
    let hooks = if upgrade { Start::AfterTheFirstSnapshot(hooks, pins) } else { Start::Now(hooks) };

    let addresses = own_addresses(&interfaces.borrow(), &choice);
    let keeping = Keeping::new(&args, &settings, metrics.clone());
    let mut dataplane = Dataplane::open(settings, maps, addresses)?;
    // Before the first tables: what is marked must be masqueraded.
    let wanted = settings::masquerade(&args);
    let mut masquerading = Masquerading::new(wanted, interfaces.clone(), choice.clone(), metrics.clone());
    let first = masquerading.look();
    dataplane.set_netfilter(first);
    let (sender, netfilter) = state::channel(first);
    check_settings(&args);
    let tell = health_checks::tell(watch.events());
    let checks = tokio::spawn(crate::health_checks::serve(health_checks.clone(), health.clone(), gate, tell));
    let told = Told { health: health.clone(), health_checks, metrics: metrics.clone() };
    let mut service = Service::new(dataplane, watch, keeping, told, (clock, fold), &args);
    service.look_after("the task that serves health check ports", checks);
    if args.service_route == ServiceRoute::Auto {
        let beat = health.heartbeat().part("the task that keeps routes", service_routes::PATIENCE);
        let (wanted, settled) = service.routes();
        let routes = tokio::spawn(service_routes::keep(wanted, own_device, settled, metrics, beat));
        service.look_after("the task that keeps routes", routes);
    }
    let beat = health.heartbeat().part("the task that keeps netfilter's rules", masquerade::PATIENCE);
    service
        .look_after("the task that keeps netfilter's rules", tokio::spawn(masquerading.keep(sender, beat)));
    service.start_hooks(hooks)?;
    starting.abort();
    service.run(Inputs { changes, interfaces, netfilter, questions: asked, signals }, choice).await
}

/// Makes the settings of the node that it may make, and says which are not as they should be.
fn check_settings(args: &AgentArgs) {
    for (setting, made) in args.conntrack.wanted().apply() {
        let told = made.told(&setting);
        match made {
            Made::Was => {}
            Made::Changed(_) => tracing::info!("{}: {told}", setting.name()),
            Made::Refused(..) => tracing::warn!(
                "{}: {told}. Set it on the node, or have `portolan set-conntrack` run before the agent, as deploy/portolan.yaml does",
                setting.name()
            ),
        }
    }
    let ports = args.masquerade_ports.first..=args.masquerade_ports.last;
    if let Some(shared) = sysctls::shared_with_sockets(&ports) {
        tracing::warn!(
            "sockets of the node may get ports of --masquerade-ports, {} to {}: their connections to an endpoint can meet those of \
             a Service. Narrow net.ipv4.ip_local_port_range, or add these to net.ipv4.ip_local_reserved_ports",
            shared.start(),
            shared.end()
        );
    }
}

fn own_addresses(interfaces: &Interfaces, choice: &Choice) -> OwnAddresses {
    let own = interfaces.own_addresses(&interfaces.roles(choice));
    OwnAddresses { own, left_over: interfaces.left_over_addresses() }
}

async fn watch_objects(
    args: &AgentArgs,
    settings: &Settings,
    found: Answered,
    changes: impl Into<Changes>,
) -> Result<Watch> {
    let options = watch::Options {
        node_name: settings.node_name.clone(),
        service_proxy_name: settings.proxy_name.clone(),
    };
    match &args.manifests {
        Some(folder) => Ok(watch::manifests::watch(folder.clone(), options, changes)?),
        None => {
            let (named, state) = (args.named_servers(), args.state_dir.clone());
            let servers = Servers { named, state, found, ..Servers::default() };
            Ok(watch::cluster::watch(args.kubeconfig.as_deref(), servers, options, changes).await?)
        }
    }
}

fn spawn_servers(args: &AgentArgs, gate: &Gate, scrape: Arc<Scrape>) -> Result<()> {
    if let Some(address) = args.healthz_bind_address.0 {
        let (health, metrics) = (scrape.health.clone(), scrape.metrics.clone());
        let pages = http::at_once(move |path| {
            let page = health.page(path);
            metrics.health_answered(path, page.status);
            page
        });
        // By a thread of its own: whatever hangs, as all do that write to a log that nobody reads, health is told (H5).
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let serving = http::serve("health", address, gate.clone(), pages);
        std::thread::Builder::new().name("health".into()).spawn(move || runtime.block_on(serving))?;
    }
    if let Some(address) = args.metrics_bind_address.0 {
        tokio::spawn(http::serve("metrics", address, gate.group(scrape::CLIENTS), scrape.pages()));
    }
    Ok(())
}

/// Passes on what the programs log.
async fn forward_log(logger: ProgramLog) {
    // SAFETY: the logger keeps its one descriptor open and the same for as long as it lives.
    let registered = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let Ok(mut logger) = registered else { return };
    while let Ok(mut ready) = logger.readable_mut().await {
        ready.get_inner_mut().flush();
        ready.clear_ready();
    }
}
