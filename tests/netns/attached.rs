//! Where programs are attached, and what becomes of a hook that another program has, that somebody takes away, or that is
//! wanted no more.

use crate::api_server::{KEPT, Scene};
use crate::health::{HEALTH, get, until};
use dataplane_tests::lab::{AgentOptions, Client, Lab, Node, Options, PodOptions, Service, at};
use dataplane_user::config::{SocketLb, XdpMode};
use dataplane_user::kernel::attach::Attachments;
use dataplane_user::kernel::link::{Link, XDP};
use dataplane_user::kernel::links::{self, Interfaces};
use dataplane_user::kernel::object::{self, Object};
use dataplane_user::kernel::pins::Pins;
use dataplane_user::kernel::probe::{Features, features};
use dataplane_user::kernel::roles::Role;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::time::Duration;

const PORT: u16 = 80;
const NODE_PORT: u16 = 32_109;
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 12, 1);
/// Longer than the time between two looks at what is attached.
const LOOK: Duration = Duration::from_secs(11);

fn lab() -> Lab {
    let lab = Options::default().nodes(1).create().unwrap();
    lab.add_pod("web", 0, &PodOptions::default()).unwrap();
    let web = lab.pod("web").unwrap().endpoint();
    let service = Service::new("web", ADDRESS).tcp_node_port(PORT, 8080, NODE_PORT).endpoints([web]);
    lab.manifests().apply(&service).unwrap();
    lab
}

fn log(node: &Node) -> String {
    node.agent().unwrap().process().log()
}

fn healthz(lab: &Lab) -> (u16, Value) {
    let answer = get(lab.client(), at(lab.node(0).address(), HEALTH), "/healthz").unwrap();
    (answer.status, answer.json())
}

/// A program that is not the agent's, though its twin: with maps of its own, in which there is nothing.
fn strange(program: &str) -> Object {
    let mut object = Object::open(&object::Options::default()).unwrap();
    object.load(program).unwrap();
    object
}

/// `BPF_PROG_ATTACH` and `BPF_PROG_DETACH` of a `connect4` program, as they were before links: alone.
fn alone(attach: bool, cgroup: &File, program: BorrowedFd<'_>) {
    #[repr(C)]
    struct Attach {
        target: i32,
        program: i32,
        /// `BPF_CGROUP_INET4_CONNECT`.
        kind: u32,
        flags: u32,
    }
    let command = if attach { 8 } else { 9 };
    let attr = Attach { target: cgroup.as_raw_fd(), program: program.as_raw_fd(), kind: 10, flags: 0 };
    // SAFETY: the head of what these commands read; it outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const attr, size_of::<Attach>()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// H2, Z5
#[test]
fn a_socket_hook_that_another_program_has_is_tried_until_it_is_there() {
    let scene = Scene::set("node-1");
    let (lab, node) = (&scene.lab, scene.node());
    let object = strange("connect4");
    let cgroup = File::open(node.cgroup()).unwrap();
    alone(true, &cgroup, object.program("connect4").unwrap());
    node.start_agent(&scene.options(&[])).unwrap();
    let unattached = || lab.node(0).metric("portolan_unattached_programs ");
    assert_eq!(unattached(), Some(1.0));
    let (status, body) = healthz(lab);
    assert_eq!(status, 200, "packets are served: {body}");
    assert!(body["warnings"][0].as_str().unwrap().contains("connect4"), "{body}");
    until("an Event tells it", || {
        let events = scene.server.events();
        events
            .iter()
            .any(|event| event["reason"] == "ProgramNotAttached" && event["regarding"]["name"] == "node-1")
    });
    // What comes and goes among interfaces says nothing of sockets, and neither does a look at what is attached.
    lab.add_pod("another", 0, &PodOptions::client()).unwrap();
    std::thread::sleep(LOOK);
    assert_eq!(unattached(), Some(1.0), "{}", log(node));
    assert!(!log(node).contains("all programs are attached"), "{}", log(node));
    assert_eq!(log(node).matches("cannot attach connect4").count(), 1, "{}", log(node));
    assert!(scene.serves(KEPT), "packets are served");
    alone(false, &cgroup, object.program("connect4").unwrap());
    until("it is attached", || unattached() == Some(0.0));
    until("the log says so", || log(node).contains("all programs are attached"));
    assert!(healthz(lab).1.get("warnings").is_none());
}

/// H2: pods come and go, and take their programs with them.
#[test]
fn a_pod_that_goes_is_no_loss() {
    let lab = lab();
    lab.start_agents(&AgentOptions::default()).unwrap();
    let end = std::time::Instant::now() + 2 * LOOK;
    while std::time::Instant::now() < end {
        lab.add_pod("brief", 0, &PodOptions::client()).unwrap();
        lab.node(0).remove_pod("brief").unwrap();
    }
    let log = log(lab.node(0));
    assert!(!log.contains("no longer attached") && !log.contains("ERROR"), "{log}");
    assert_eq!(lab.node(0).metric("portolan_reattached_total "), Some(0.0));
}

/// H2: whoever looks before netlink has told of it.
#[test]
fn an_interface_that_went_has_lost_nothing_and_one_whose_program_went_has() {
    for tcx in [true, false] {
        let lab = lab();
        let node = lab.node(0);
        let web = lab.pod("web").unwrap().node_interface();
        let pins = Pins::new(&node.bpffs());
        pins.prepare().unwrap();
        let object =
            Object::open(&object::Options { pins: Some(&pins), ..object::Options::default() }).unwrap();
        let features = Features { tcx, ..features().unwrap() };
        let attachments = Attachments::new(object, pins.clone(), &features, XdpMode::Off, SocketLb::Off);
        let mut attachments = attachments.unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let known = node.place().enter(|| runtime.block_on(links::follow())).unwrap().unwrap();
        let known: Interfaces = known.borrow().clone();
        let role = |name: &str| match name {
            "eth0" => Some(Role::Uplink),
            name => (name == web).then_some(Role::Pod),
        };
        let roles: BTreeMap<u32, Role> =
            known.links.iter().filter_map(|(index, link)| Some((*index, role(&link.name)?))).collect();
        assert_eq!(roles.len(), 2);
        let mut lost = || node.place().enter(|| attachments.lost()).unwrap();
        assert!(lost().is_empty(), "nothing was attached yet");
        let errors = node.place().enter(|| attachments.interfaces(&known, &roles)).unwrap();
        assert!(errors.is_empty(), "{errors:?}");
        let mut lost = || node.place().enter(|| attachments.lost()).unwrap();
        assert!(lost().is_empty(), "all is there");
        node.remove_pod("web").unwrap();
        assert_eq!(lost(), [String::new(); 0], "it went with its programs");
        if tcx {
            let uplink = roles.iter().find(|(_, role)| **role == Role::Uplink).unwrap().0;
            std::fs::remove_file(pins.link("tc_uplink_in", *uplink)).unwrap();
        } else {
            node.place().run("tc", &["filter", "del", "dev", "eth0", "ingress"]).unwrap();
        }
        assert_eq!(lost(), ["tc_uplink_in of eth0"]);
        assert!(lost().is_empty(), "it is told once");
    }
}

/// H2: what somebody takes away is found on every kind of hook, and what runs another program in its place is not it.
#[test]
fn a_filter_with_another_program_is_replaced() {
    let lab = lab();
    let place = lab.node(0).place();
    lab.start_agents(&AgentOptions::default().arguments(&["--tc=clsact"])).unwrap();
    let filter = || place.run("tc", &["filter", "show", "dev", "eth0", "ingress"]).unwrap();
    let ours = filter();
    // The filter of the pod's side in the place of the uplink's: same priority, same handle.
    let object = strange("tc_pod_in");
    let pin = lab.node(0).bpffs().join("strange");
    dataplane_user::kernel::bpf::obj_pin(object.program("tc_pod_in").unwrap(), &pin).unwrap();
    let replace = [
        "filter",
        "replace",
        "dev",
        "eth0",
        "ingress",
        "prio",
        "1",
        "handle",
        "0x504c",
        "protocol",
        "all",
        "bpf",
        "direct-action",
        "object-pinned",
        pin.to_str().unwrap(),
    ];
    place.run("tc", &replace).unwrap();
    std::fs::remove_file(&pin).unwrap();
    assert!(filter().contains("tc_pod_in"), "{}", filter());
    until("it is replaced", || filter() == ours);
    assert_eq!(lab.node(0).metric("portolan_reattached_total "), Some(1.0));
}

/// C3: before Linux 6.6 nothing but the agent takes a filter away.
#[test]
fn filters_of_an_interface_that_lost_its_role_go() {
    let lab = lab();
    let node = lab.node(0);
    let (web, shell) = (lab.pod("web").unwrap(), lab.add_pod("shell", 0, &PodOptions::client()).unwrap());
    let filters = |interface: &str| {
        let of =
            |direction| node.place().run("tc", &["filter", "show", "dev", interface, direction]).unwrap();
        ["ingress", "egress"].map(of).concat().matches("direct-action").count()
    };
    let [web, shell] = [web.node_interface(), shell.node_interface()];
    let clsact = AgentOptions::default().arguments(&["--tc=clsact"]);
    node.start_agent(&clsact).unwrap();
    assert_eq!((filters(&web), filters(&shell)), (2, 2));
    // While no agent ran.
    node.agent().unwrap().stop().unwrap();
    node.start_agent(&clsact.arguments(&["--pod-interface", &web])).unwrap();
    assert_eq!((filters(&web), filters(&shell), filters("eth0")), (2, 0, 2));
    // While one runs.
    let rename = [
        format!("link set {web} down"),
        format!("link set {web} name renamed"),
        "link set renamed up".into(),
    ];
    node.place().ip(&rename).unwrap();
    until("its filters are gone", || filters("renamed") == 0);
    assert_eq!(filters("eth0"), 2);
    assert!(!log(node).contains("no longer attached"), "{}", log(node));
}

/// Whether `eth0` of the node runs XDP, and how.
fn xdp(node: &Node) -> &'static str {
    let link = node.place().run("ip", &["link", "show", "eth0"]).unwrap();
    let modes = ["xdpgeneric", "xdp"];
    modes.into_iter().find(|mode| link.split_whitespace().any(|word| word == *mode)).unwrap_or("off")
}

/// C3
#[test]
fn another_mode_of_xdp_takes_the_place_of_the_one_before() {
    let lab = lab();
    let node = lab.node(0);
    for (mode, shown) in
        [("generic", "xdpgeneric"), ("native", "xdp"), ("generic", "xdpgeneric"), ("off", "off")]
    {
        node.start_agent(&AgentOptions::default().arguments(&["--xdp", mode])).unwrap();
        assert_eq!(xdp(node), shown, "{}", log(node));
        node.agent().unwrap().stop().unwrap();
    }
}

/// P4: a driver that has packets in several buffers keeps XDP where they are longer than a page, and sends them on as they are.
#[test]
fn xdp_serves_where_packets_are_longer_than_a_page() {
    const LONG: usize = 8_000;
    let lab = Options::default().nodes(2).xdp(true).create().unwrap();
    lab.add_pod("web", 1, &PodOptions::default()).unwrap();
    let web = lab.pod("web").unwrap().endpoint();
    let service = Service::new("web", ADDRESS).udp_node_port(PORT, 8080, NODE_PORT).endpoints([web]);
    lab.manifests().apply(&service).unwrap();
    let widen = |name: &str| format!("link set {name} mtu 9000");
    let ports = ["br0", "node-1", "node-2", "client"].map(widen);
    lab.net().ip(&ports).unwrap();
    let node = lab.node(0);
    for place in [node.place(), lab.node(1).place(), lab.client()] {
        place.ip(&[widen("eth0")]).unwrap();
    }
    node.start_agent(&AgentOptions::default().arguments(&["--xdp=native"])).unwrap();
    assert_eq!(xdp(node), "xdp", "{}", log(node));
    let left_to_tc = || {
        let text = node.portolan(&["drops", "-o", "json"]).unwrap();
        let rows: Value = serde_json::from_str(&text).unwrap();
        let row = rows.as_array().unwrap().iter().find(|row| row["reason"] == "xdp-left-to-tc");
        row.unwrap()["count"].as_u64().unwrap()
    };
    let to = at(node.address(), NODE_PORT);
    let client = Client::at(lab.client());
    // Until its neighbours are known.
    client.udp(to).unwrap();
    let before = left_to_tc();
    client.udp_to_cut_up(to, LONG).unwrap();
    assert_eq!(left_to_tc(), before, "XDP has left a packet to tc");
}

/// H2: `--xdp auto` never costs anything.
#[test]
fn an_uplink_that_another_xdp_program_has_is_left_to_tc() {
    let lab = lab();
    let node = lab.node(0);
    let object = strange("xdp_uplink");
    let link = node.place().run("ip", &["-oneline", "link", "show", "eth0"]).unwrap();
    let index = link.split(':').next().unwrap().parse().unwrap();
    let native = 1 << 2;
    let program = object.program("xdp_uplink").unwrap();
    let other =
        node.place().enter(|| Link::to_interface(program.as_fd(), index, XDP, native)).unwrap().unwrap();
    let options = AgentOptions::default().arguments(&["--xdp=auto", "--xdp-driver=veth"]);
    node.start_agent(&options).unwrap();
    let told = || log(node).matches("no XDP on eth0, tc does its work").count();
    assert_eq!(told(), 1, "{}", log(node));
    // Not at each look, nor at each interface that comes.
    lab.add_pod("another", 0, &PodOptions::client()).unwrap();
    std::thread::sleep(LOOK);
    assert_eq!(told(), 1, "{}", log(node));
    let (status, body) = healthz(&lab);
    assert!(status == 200 && body.get("warnings").is_none(), "{body}");
    assert_eq!(lab.node(0).metric("portolan_unattached_programs "), Some(0.0));
    assert!(Client::at(lab.client()).tcp(at(node.address(), NODE_PORT)).is_ok());
    node.agent().unwrap().stop().unwrap();
    drop(other);
    node.start_agent(&options).unwrap();
    assert_eq!((xdp(node), told()), ("xdp", 1), "{}", log(node));
}
