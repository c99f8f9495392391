//! The program runner: real programs, real maps filled by the agent's own compiler and `sync`, one packet at a time
//! through `BPF_PROG_TEST_RUN`, in a network namespace of its own.

mod batch;
pub mod build;
mod events;
pub mod family;
mod stepwise;

pub use batch::NodeFacts;

use crate::lab::xdp;
use anyhow::{Context as _, Result, bail, ensure};
use dataplane_common::drop::Reason;
use dataplane_common::flow::{Flow, FlowKey, Stage};
use dataplane_common::tables;
use dataplane_user::compile::{self, Compiler, Context, NodeSettings, NodeTables, Update};
use dataplane_user::config::MapSize;
use dataplane_user::kernel::bpf::{self, TestRun, TestRunResult};
use dataplane_user::kernel::carry;
use dataplane_user::kernel::clock::Clock;
use dataplane_user::kernel::maps::KernelMaps;
use dataplane_user::kernel::object::{Object, Options};
use dataplane_user::kernel::rehearsal;
use dataplane_user::model::store::Store;
use dataplane_user::model::{Change, Kind};
use dataplane_user::sync::{Maps, Mirror};
use dataplane_user::watch::manifests;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The node's IPv4 address on its uplink.
pub const NODE: &str = family::V4.node;
/// A client outside the cluster, behind the gateway.
pub const CLIENT: &str = family::V4.client;
/// A pod of this node.
pub const POD: &str = family::V4.pod;
/// Link-layer address of the gateway and of the other nodes.
pub const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];

/// Where a packet meets the dataplane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// XDP on the uplink.
    Xdp,
    /// tc, from the network.
    UplinkIn,
    /// tc, to the network.
    UplinkOut,
    /// tc, from the network, without a link-layer header.
    BareIn,
    /// tc, to the network, without a link-layer header.
    BareOut,
    /// tc, from a pod.
    PodIn,
    /// tc, to a pod.
    PodOut,
}

impl Hook {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Xdp, Self::UplinkIn, Self::UplinkOut, Self::BareIn, Self::BareOut, Self::PodIn, Self::PodOut];

    /// The name of the program there.
    pub fn program(self) -> &'static str {
        match self {
            Self::Xdp => "xdp_uplink",
            Self::UplinkIn => "tc_uplink_in",
            Self::UplinkOut => "tc_uplink_out",
            Self::BareIn => "tc_bare_in",
            Self::BareOut => "tc_bare_out",
            Self::PodIn => "tc_pod_in",
            Self::PodOut => "tc_pod_out",
        }
    }

    /// The verdict there on a packet that goes on past the stack, out of the uplink.
    pub fn sent_on(self) -> Verdict {
        if self == Self::Xdp { Verdict::Tx } else { Verdict::Redirect }
    }
}

/// What a program did with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On to the next program and the stack.
    Pass,
    /// Gone.
    Drop,
    /// Sent elsewhere past the stack.
    Redirect,
    /// Back out of the interface it came in on (XDP).
    Tx,
}

/// All that came of one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The verdict.
    pub verdict: Verdict,
    /// The whole packet.
    pub packet: Vec<u8>,
    /// Its mark; XDP has none.
    pub mark: u32,
    /// The counters that moved, by how much. Reasons by their label; `service …` and `backend …` over all ids.
    pub moved: BTreeMap<String, u64>,
}

/// A node whose programs are run by hand.
pub struct World {
    object: Mutex<Object>,
    maps: KernelMaps,
    mirror: Mirror,
    store: Store,
    compiler: Compiler,
    settings: NodeSettings,
    uplink: u32,
    bare: u32,
    pod: u32,
}

/// Runs a test in a network namespace of its own, which goes with the thread.
pub fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: a plain system call; the namespace is this thread's alone.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "a network namespace needs root: {}", std::io::Error::last_os_error());
        // What it holds ends with the namespace.
        let _queues = set_up().unwrap_or_else(|error| panic!("{error:#}"));
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// An uplink with a gateway and another node behind it, a pod, and routes to both, in both families. A veth has the receive
/// queues for XDP, one of which a test run's context names, only while a program is attached: the links are to it.
fn set_up() -> Result<Vec<OwnedFd>> {
    let interfaces = "link set lo up
         link add up0 address 02:00:00:00:00:01 type veth peer name up1
         link add pod0 type veth peer name pod1
         link set up0 up
         link set up1 up
         link set pod0 up
         link set pod1 up
         tuntap add tun0 mode tun
         link set tun0 up";
    let commands = [interfaces.to_owned(), family::V4.network(), family::V6.network()];
    for command in commands.iter().flat_map(|commands| commands.lines()) {
        let status = Command::new("ip").args(command.split_whitespace()).status().context("ip")?;
        ensure!(status.success(), "ip {command}");
    }
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("ip_forward")?;
    std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").context("forwarding")?;
    xdp::pass_all(&["up0".to_owned()])
}

/// The index of an interface of the calling thread's namespace.
pub(crate) fn index(interface: &str) -> Result<u32> {
    // /sys shows the namespace it was mounted in; `ip` shows ours.
    let output = Command::new("ip").args(["-o", "link", "show", interface]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = text.split(':').next().and_then(|number| number.trim().parse().ok());
    number.with_context(|| format!("no interface {interface}: {text}"))
}

/// The node's addresses.
fn interfaces() -> Result<[IpAddr; 4]> {
    let own = [family::V4.node.parse()?, family::V6.node.parse()?];
    Ok([Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), own[0], own[1]])
}

/// `struct __sk_buff` of a packet of an interface, with its `gso_size`.
fn sk_buff(interface: u32, segment: u32) -> Vec<u8> {
    const GSO_SIZE: usize = 176;
    let mut context = rehearsal::sk_buff(interface);
    context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&segment.to_ne_bytes());
    context
}

/// Tables that are to be written.
struct Compiled {
    node: NodeTables,
    update: Update,
}

impl Compiled {
    fn write(&self, mirror: &mut Mirror, maps: &impl Maps) -> Result<()> {
        mirror.set_node(maps, &self.node, Instant::now())?;
        let changes = self.update.services.iter().map(|(name, compiled)| (name, Some(&compiled.tables)));
        let outcome = mirror.change(maps, changes, Instant::now())?;
        ensure!(outcome.refused.is_empty(), "a Service found no room");
        Ok(())
    }
}

impl World {
    /// A node of the name `here` with the objects of these manifests in its tables.
    ///
    /// # Errors
    /// If anything that a test relies on fails.
    pub fn new(yaml: &str) -> Result<Self> {
        Self::with(yaml, 0, &[])
    }

    /// The same with flags of the node's settings and other map sizes.
    ///
    /// # Errors
    /// As [`World::new`].
    pub fn with(yaml: &str, flags: u32, sizes: &[(&'static str, u32)]) -> Result<Self> {
        Self::with_ports(yaml, flags, sizes, 61_000..=61_007)
    }

    /// The same with another range of translated source ports.
    ///
    /// # Errors
    /// As [`World::new`].
    pub fn with_ports(
        yaml: &str,
        flags: u32,
        sizes: &[(&'static str, u32)],
        snat_ports: RangeInclusive<u16>,
    ) -> Result<Self> {
        // Small tables: all counters are read before and after each packet.
        let small =
            ["backends", "backend_traffic", "open", "services", "service_traffic", "service_tries", "rounds"]
                .map(|map| (map, 256));
        let sizes = small.iter().chain(sizes).map(|&(map, entries)| MapSize { map, entries });
        let sizes: Vec<_> = sizes.collect();
        let object = Object::open(&Options { sizes: &sizes, ..Options::default() })?;
        let fds = tables::ALL.iter().map(|(name, ..)| Ok((*name, object.map(name)?)));
        let maps = KernelMaps::from_fds(fds.collect::<Result<Vec<_>>>()?)?;
        let mirror = Mirror::open(&maps, Instant::now())?;
        let settings = NodeSettings {
            service_ranges: vec!["10.96.0.0/16".parse()?, "fd00:10:96::/108".parse()?],
            node_port_addresses: compile::NodePortAddresses::All,
            snat_ports: vec![snat_ports],
            flags,
            masquerade_mark: 0,
            connection_mark: 0,
            sources: compile::Sources::default(),
            netns_cookie: 1,
            secret: 1,
        };
        let (uplink, bare, pod) = (index("up0")?, index("tun0")?, index("pod0")?);
        let mut world = Self {
            object: Mutex::new(object),
            maps,
            mirror,
            store: Store::new("here"),
            compiler: Compiler::default(),
            settings,
            uplink,
            bare,
            pod,
        };
        world.apply(yaml)?;
        Ok(world)
    }

    /// Brings the tables to what these manifests say, as the agent would.
    ///
    /// # Errors
    /// If a manifest does not parse, or the kernel refuses.
    pub fn apply(&mut self, yaml: &str) -> Result<()> {
        self.compile(yaml)?.write(&mut self.mirror, &self.maps)
    }

    /// Takes these manifests for all there is.
    fn compile(&mut self, yaml: &str) -> Result<Compiled> {
        let (objects, errors) = manifests::parse(yaml, "test");
        if let Some(error) = errors.first() {
            bail!("{error}");
        }
        let mut dirty = BTreeSet::new();
        for kind in [Kind::Node, Kind::ServiceCidr, Kind::Service, Kind::EndpointSlice] {
            let of_kind = objects.iter().filter(|object| object.reference().kind == kind);
            let change = Change::replaced(kind, of_kind.cloned().collect());
            dirty.extend(self.store.apply(change).services);
        }
        let interfaces = interfaces()?.to_vec().into();
        let context = Context::new(&self.store, None, &[], &interfaces);
        let update = self.compiler.update(&self.store, &dirty, &context);
        let (node, _) = compile::node(&self.settings, self.store.own_node(), &interfaces, &BTreeSet::new());
        Ok(Compiled { node, update })
    }

    /// Takes this interface for the uplink that packets are met on.
    ///
    /// # Errors
    /// If it is not there.
    pub fn set_uplink(&mut self, interface: &str) -> Result<()> {
        self.uplink = index(interface)?;
        Ok(())
    }

    /// Has netfilter masquerade what has this mark; 0: nothing.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_masquerade_mark(&mut self, mark: u32) -> Result<()> {
        self.settings.masquerade_mark = mark;
        self.write_node()
    }

    /// Lets only these call node ports from outside, and those nothing.
    ///
    /// # Errors
    /// If a range is none, or the kernel refuses.
    pub fn set_sources(&mut self, node_ports: &[&str], denied: &[&str]) -> Result<()> {
        let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse()).collect::<Result<_, _>>();
        self.settings.sources = compile::Sources { node_ports: ranges(node_ports)?, denied: ranges(denied)? };
        self.write_node()
    }

    /// Has netfilter note this mark of connections from outside; 0: none.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_connection_mark(&mut self, mark: u32) -> Result<()> {
        self.settings.connection_mark = mark;
        self.write_node()
    }

    /// Takes these ports for translated sources.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_snat_ports(&mut self, ports: std::ops::RangeInclusive<u16>) -> Result<()> {
        self.settings.snat_ports = vec![ports];
        self.write_node()
    }

    fn write_node(&mut self) -> Result<()> {
        let interfaces = interfaces()?.to_vec().into();
        let (tables, _) = compile::node(&self.settings, self.store.own_node(), &interfaces, &BTreeSet::new());
        self.mirror.set_node(&self.maps, &tables, Instant::now())?;
        Ok(())
    }

    /// Has the programs hold back what may be of flows that others begin, or no longer.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn hold_back(&self, holds: bool) -> Result<()> {
        let now = self.tick()?;
        Ok(carry::hold_back(&self.maps, holds.then_some(now))?)
    }

    /// The programs' tick.
    fn tick(&self) -> Result<u32> {
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Clock::new(&mut object)?.tick())
    }

    /// Takes this number for the secret of the boot.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn set_secret(&mut self, secret: u64) -> Result<()> {
        self.settings.secret = secret;
        let interfaces = interfaces()?.to_vec().into();
        let (tables, _) = compile::node(&self.settings, self.store.own_node(), &interfaces, &BTreeSet::new());
        self.mirror.set_node(&self.maps, &tables, Instant::now())?;
        Ok(())
    }

    /// Sends a packet through the program at a hook.
    ///
    /// # Errors
    /// If the kernel refuses to run it.
    pub fn send(&self, hook: Hook, packet: &build::Packet) -> Result<Outcome> {
        self.send_bytes(hook, &packet.bytes())
    }

    /// Sends these bytes.
    ///
    /// # Errors
    /// As [`World::send`].
    pub fn send_bytes(&self, hook: Hook, data: &[u8]) -> Result<Outcome> {
        self.observe(|| self.run(hook, hook.program(), data, 0))
    }

    /// Sends a packet that will be cut into segments with so many bytes of data each.
    ///
    /// # Errors
    /// As [`World::send`].
    pub fn send_train(&self, hook: Hook, packet: &build::Packet, segment: u32) -> Result<Outcome> {
        self.observe(|| self.run(hook, hook.program(), &packet.bytes(), segment))
    }

    /// Looks at all counters before and after.
    fn observe(&self, run: impl FnOnce() -> Result<(Verdict, TestRunResult)>) -> Result<Outcome> {
        let before = self.counters()?;
        let (verdict, result) = run()?;
        let moved = self.counters()?.into_iter().filter_map(|(name, count)| {
            let difference = count - before.get(&name).copied().unwrap_or(0);
            (difference != 0).then_some((name, difference))
        });
        Ok(Outcome {
            verdict,
            packet: result.data,
            mark: rehearsal::mark_of(&result.context),
            moved: moved.collect(),
        })
    }

    /// Runs the program at a hook once, and looks at no counter: what it decided, and how many nanoseconds it took.
    ///
    /// # Errors
    /// As [`World::send`].
    pub fn time(&self, hook: Hook, data: &[u8]) -> Result<(Verdict, u32)> {
        let (verdict, result) = self.run(hook, hook.program(), data, 0)?;
        Ok((verdict, result.nanoseconds))
    }

    /// As [`World::time`], of the program that does nothing.
    ///
    /// # Errors
    /// As [`World::send`].
    pub fn time_of_nothing(&self, hook: Hook, data: &[u8]) -> Result<u32> {
        let empty = if hook == Hook::Xdp { "xdp_empty" } else { "tc_empty" };
        Ok(self.run(hook, empty, data, 0)?.1.nanoseconds)
    }

    /// Runs the program at a hook many times on a packet that it leaves as it is. One by one: the kernel breaks off a run of many where it
    /// has something for this thread to do, and does not say how many it has made.
    fn run_times(&self, hook: Hook, data: &[u8], times: u32) -> Result<()> {
        (0..times).try_for_each(|_| self.run(hook, hook.program(), data, 0).map(drop))
    }

    /// One run of a program with the context of a hook; `segment`: bytes of data in each segment, 0 where it is one.
    fn run(&self, hook: Hook, program: &str, data: &[u8], segment: u32) -> Result<(Verdict, TestRunResult)> {
        let context = match hook {
            Hook::Xdp => rehearsal::xdp_md(data.len(), self.uplink),
            Hook::UplinkIn | Hook::UplinkOut => sk_buff(self.uplink, segment),
            Hook::BareIn | Hook::BareOut => sk_buff(self.bare, segment),
            Hook::PodIn | Hook::PodOut => sk_buff(self.pod, segment),
        };
        let run = TestRun { data, context: &context, ..TestRun::default() };
        // Most cases run one program or two, and the verifier takes its time.
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        object.load(program)?;
        let result = bpf::prog_test_run(object.program(program)?, &run)?;
        Ok((verdict(hook, result.retval as i32)?, result))
    }

    /// All counters, added up over CPUs and ids.
    fn counters(&self) -> Result<BTreeMap<String, u64>> {
        let mut counters = BTreeMap::new();
        for (index, count) in self.maps.map::<tables::Reasons>()?.sums()? {
            if count != 0 {
                counters.insert(Reason::from_number(index as u8).label().to_owned(), count);
            }
        }
        for (whose, all) in ["service", "backend"].into_iter().zip(self.traffic_by_id()?) {
            for traffic in all {
                let fields = [
                    ("in", traffic.packets_in),
                    ("in bytes", traffic.bytes_in),
                    ("out", traffic.packets_out),
                    ("out bytes", traffic.bytes_out),
                    ("new", traffic.new_flows),
                ];
                for (field, count) in fields.into_iter().filter(|(_, count)| *count != 0) {
                    *counters.entry(format!("{whose} {field}")).or_default() += count;
                }
            }
        }
        Ok(counters)
    }

    /// The flows of each stage (half-open, established, closing).
    ///
    /// # Errors
    /// If the table cannot be read.
    pub fn flows(&self) -> Result<[Vec<(FlowKey, Flow)>; 3]> {
        let entries = self.maps.map::<tables::Flows>()?.entries()?;
        Ok([Stage::HalfOpen, Stage::Established, Stage::Closing]
            .map(|stage| entries.iter().filter(|(_, flow)| flow.stage() == stage).copied().collect()))
    }

    /// How many entries each stage has.
    ///
    /// # Errors
    /// As [`World::flows`].
    pub fn flow_counts(&self) -> Result<[usize; 3]> {
        Ok(self.flows()?.map(|flows| flows.len()))
    }

    /// Lets freed ids rest, so that the next change may use them again.
    pub fn rest(&self) {
        std::thread::sleep(dataplane_user::sync::REST + Duration::from_millis(50));
    }
}

/// What a program at a hook returned, in words.
fn verdict(hook: Hook, code: i32) -> Result<Verdict> {
    Ok(match (hook, code) {
        (Hook::Xdp, 2) => Verdict::Pass,
        (Hook::Xdp, 1) => Verdict::Drop,
        (Hook::Xdp, 3) => Verdict::Tx,
        (Hook::Xdp, 4) => Verdict::Redirect,
        (Hook::Xdp, code) => bail!("{hook:?} returned {code}"),
        (_, -1) => Verdict::Pass,
        (_, 2) => Verdict::Drop,
        (_, 7) => Verdict::Redirect,
        (hook, code) => bail!("{hook:?} returned {code}"),
    })
}

/// The counters of one packet of `bytes` bytes from a client; `new` if it began a flow.
pub fn counted_in(bytes: u64, new: bool) -> BTreeMap<String, u64> {
    counted("in", bytes, new)
}

/// The counters of one packet of `bytes` bytes from an endpoint.
pub fn counted_out(bytes: u64) -> BTreeMap<String, u64> {
    counted("out", bytes, false)
}

fn counted(direction: &str, bytes: u64, new: bool) -> BTreeMap<String, u64> {
    let mut counters = BTreeMap::new();
    for whose in ["service", "backend"] {
        counters.insert(format!("{whose} {direction}"), 1);
        counters.insert(format!("{whose} {direction} bytes"), bytes);
        if new {
            counters.insert(format!("{whose} new"), 1);
        }
    }
    counters
}

/// One reason, once.
pub fn reason(reason: Reason) -> BTreeMap<String, u64> {
    BTreeMap::from([(reason.label().to_owned(), 1)])
}
