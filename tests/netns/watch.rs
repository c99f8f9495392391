//! `portolan watch`: what it tells of real connections, and that it leaves nothing behind however it ends.

use crate::health::until;
use dataplane_common::event::Watch;
use dataplane_common::tables::{LAYOUT, Watches};
use dataplane_tests::lab::{
    AgentOptions, Client, Failure, Lab, Options, PodOptions, Process, Service, at, portolan,
};
use dataplane_user::kernel::events::LEASE;
use dataplane_user::kernel::maps::KernelMaps;
use serde_json::Value;
use std::net::Ipv4Addr;
use std::time::Duration;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 15, 1);
const EMPTY: Ipv4Addr = Ipv4Addr::new(10, 96, 15, 2);

fn lab() -> Lab {
    let lab = Options::default().nodes(1).create().unwrap();
    for pod in ["web", "shell"] {
        lab.add_pod(pod, 0, &PodOptions::default()).unwrap();
    }
    let web = lab.pod("web").unwrap().endpoint();
    let service = Service::new("web", ADDRESS).tcp(80, 8080).udp(80, 8080).endpoints([web]);
    lab.manifests().apply(&service).unwrap();
    lab.manifests().apply(&Service::new("empty", EMPTY).tcp(80, 8080).endpoints([])).unwrap();
    lab.start_agents(&AgentOptions::default()).unwrap();
    until("the names of Services are written", || {
        lab.node(0).portolan(&["services"]).unwrap().contains("default/empty")
    });
    lab
}

/// Begins to watch the node, and waits until programs tell.
fn watch(lab: &Lab, name: &str, arguments: &[&str]) -> Process {
    let node = lab.node(0);
    let before = state(lab).until;
    let mut command = node.place().command(portolan().unwrap()).unwrap();
    command.args(["watch", "--output", "json", "--bpffs"]).arg(node.bpffs()).args(arguments);
    let process = Process::start(&lab.logs(), name, command).unwrap();
    until("it watches", || {
        assert_eq!(process.exit_status(), None, "{}", process.log());
        state(lab).until > before
    });
    process
}

fn state(lab: &Lab) -> Watch {
    let maps = KernelMaps::open(&lab.node(0).bpffs().join(LAYOUT)).unwrap();
    maps.map::<Watches>().unwrap().get(&0).unwrap().unwrap()
}

/// The events that were told so far; the last line may not be whole.
fn events(process: &Process) -> Vec<Value> {
    process.output().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The first event for which something is so, once there is one.
#[track_caller]
fn event(process: &Process, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
    let mut found = None;
    until(what, || {
        found = events(process).into_iter().find(&is_it);
        found.is_some()
    });
    found.unwrap()
}

/// H7, P1, P9, C4: names and times of what pods and the node call, at the hook that did it.
#[test]
fn events_tell_who_called_whom_where_and_how_long_it_took() {
    let lab = lab();
    let all = watch(&lab, "watch-all", &[]);
    let refused = watch(&lab, "watch-refused", &["--event", "refused", "--count", "2"]);
    let shell = lab.pod("shell").unwrap();
    let (web, shell_ip) = (lab.pod("web").unwrap().address(), shell.address().to_string());
    let in_pod = Client::at(shell.place()).timeout(Duration::from_secs(5));
    in_pod.tcp(at(ADDRESS, 80)).unwrap();
    let is = |kind: &'static str, protocol: &'static str| {
        let shell_ip = shell_ip.clone();
        move |event: &Value| {
            let of_shell = event["client"].as_str().is_some_and(|client| client.starts_with(&shell_ip));
            event["event"] == kind && event["protocol"] == protocol && of_shell
        }
    };
    let begun = event(&all, "its begin is told", is("begun", "TCP"));
    assert_eq!(
        (&begun["hook"], &begun["service"]),
        (&"pod-in".into(), &"default/web:tcp-80".into()),
        "{begun}"
    );
    assert_eq!(
        (&begun["frontend"], &begun["endpoint"]),
        (&"10.96.15.1:80".into(), &format!("{web}:8080").into())
    );
    assert!(begun["interface"].as_str().is_some_and(|name| !name.is_empty()), "{begun}");
    let established = event(&all, "it is established", is("established", "TCP"));
    let ended = event(&all, "its end is told", is("ended", "TCP"));
    assert_eq!(established["handshake_microseconds"], ended["handshake_microseconds"]);
    assert!(ended["handshake_microseconds"].as_u64() <= ended["lasted_microseconds"].as_u64(), "{ended}");
    assert!(ended["bytes_in"].as_u64() > Some(100) && ended["packets_out"].as_u64() > Some(2), "{ended}");
    assert_eq!(ended["end"], "closed", "{ended}");

    // The endpoint of the node's own connection is chosen at its socket.
    Client::at(lab.node(0).place()).timeout(Duration::from_secs(5)).tcp(at(ADDRESS, 80)).unwrap();
    let at_socket = event(&all, "a socket's choice is told", |event| event["hook"] == "connect");
    assert_eq!(
        (&at_socket["event"], &at_socket["client_name"]),
        (&"begun".into(), &"node".into()),
        "{at_socket}"
    );
    assert_eq!(at_socket["endpoint"], format!("{web}:8080"));

    // One by packet and one at a socket; who asked for two sees these and ends.
    for place in [shell.place(), lab.node(0).place()] {
        let asked = Client::at(place).timeout(Duration::from_secs(5)).tcp(at(EMPTY, 80));
        assert_eq!(asked, Err(Failure::Refused));
    }
    refused.wait(Duration::from_secs(30)).unwrap();
    let told = events(&refused);
    let hooks: Vec<_> = told.iter().map(|event| event["hook"].as_str().unwrap()).collect();
    assert_eq!(hooks, ["pod-in", "connect"]);
    assert!(told.iter().all(|event| event["reason"] == "no-endpoints"), "{told:?}");
    assert_eq!(told[0]["service"], "default/empty:tcp-80");

    // What the agent sweeps away is told as well.
    in_pod.udp(at(ADDRESS, 80)).unwrap();
    let swept =
        event(&all, "the idle flow is told", |event| event["end"] == "idle" && event["protocol"] == "UDP");
    assert_eq!(
        (&swept["hook"], &swept["packets_in"], &swept["packets_out"]),
        (&"sweep".into(), &1.into(), &1.into())
    );
    assert!(swept["lasted_microseconds"].as_u64() > Some(1_000_000), "{swept}");
    all.kill();
}

/// H7: a reader that is killed, and one whose own reader has gone, leave programs that tell nothing.
#[test]
fn nothing_is_told_once_the_last_who_watched_is_gone() {
    let lab = lab();
    let watching = watch(&lab, "watch-killed", &[]);
    let shell = lab.pod("shell").unwrap();
    let client = Client::at(shell.place()).timeout(Duration::from_secs(5));
    client.tcp(at(ADDRESS, 80)).unwrap();
    event(&watching, "an event", |event| event["event"] == "begun");
    watching.signal(libc::SIGKILL);
    watching.wait(Duration::from_secs(10)).unwrap();
    std::thread::sleep(LEASE);
    until("the first connection after its lease notes that it is over", || {
        client.tcp(at(ADDRESS, 80)).unwrap();
        state(&lab).until == 0
    });
    let head = state(&lab).head;
    client.tcp(at(ADDRESS, 80)).unwrap();
    assert_eq!(state(&lab).head, head);

    let node = lab.node(0);
    let mut command = node.place().command("/bin/sh").unwrap();
    let words = format!(
        "{} watch --bpffs {} | true; echo closed",
        portolan().unwrap().display(),
        node.bpffs().display()
    );
    command.args(["-c", &words]);
    let process = Process::start(&lab.logs(), "watch-closed", command).unwrap();
    process.wait_for_line(Duration::from_secs(30), |line| line == "closed").unwrap();
}

/// H7: more than somebody wants to see is left out, and counted.
#[test]
fn what_is_left_out_is_counted() {
    let lab = lab();
    let watching = watch(&lab, "watch-few", &["--rate", "1", "--event", "refused"]);
    let shell = lab.pod("shell").unwrap();
    let client = Client::at(shell.place()).timeout(Duration::from_secs(5));
    for _ in 0..20 {
        assert_eq!(client.tcp(at(EMPTY, 80)), Err(Failure::Refused));
    }
    let seen = || {
        let all = events(&watching);
        let left_out = all.iter().filter_map(|event| event["count"].as_u64()).sum::<u64>();
        (all.iter().filter(|event| event["event"] == "refused").count() as u64, left_out)
    };
    until("all are shown or counted", || {
        let (shown, left_out) = seen();
        shown + left_out == 20
    });
    assert!(seen().1 > 0 && seen().0 > 0, "{:?}", seen());
    watching.kill();
}

/// H7: the packets of a flow that begins while somebody asks for its client's, in both directions.
#[test]
fn packets_are_told_of_whom_they_were_asked_for() {
    let lab = lab();
    let shell = lab.pod("shell").unwrap();
    let filter = format!("client={},service=default/web:tcp-80", shell.address());
    let watching = watch(&lab, "watch-packets", &["--packets", &filter, "--event", "packet"]);
    let client = Client::at(shell.place()).timeout(Duration::from_secs(5));
    client.udp(at(ADDRESS, 80)).unwrap();
    client.tcp(at(ADDRESS, 80)).unwrap();
    let answer = event(&watching, "the endpoint's answer", |event| event["tcp_flags"] == "SYN,ACK");
    assert_eq!((&answer["hook"], &answer["sent_by"]), (&"pod-out".into(), &"endpoint".into()), "{answer}");
    event(&watching, "data of the client", |event| {
        event["sent_by"] == "client" && event["length"].as_u64() > Some(80)
    });
    assert!(events(&watching).iter().all(|event| event["protocol"] == "TCP"));
    watching.kill();
}
