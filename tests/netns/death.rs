//! The real agent killed at a given call of `bpf(2)`: traffic through what was there never meets a half-written Service, and
//! the next agent ends where it should.

use crate::world::eventually;
use dataplane_tests::lab::client::TIMEOUT;
use dataplane_tests::lab::{
    AgentOptions, Client, Failure, Lab, Node, Options, PodOptions, Service, at, install,
};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const PORT: u16 = 80;
const STEADY: Ipv4Addr = Ipv4Addr::new(10, 96, 9, 1);
const CHANGING: Ipv4Addr = Ipv4Addr::new(10, 96, 9, 2);
const NODE_PORT: u16 = 30_900;

/// The calls at which a start is cut short: each start goes on from what the one before left. With two threads that call
/// `bpf(2)`, a start makes some 170 in the one that makes more.
const START_CALLS: [usize; 12] = [1, 12, 29, 45, 60, 75, 85, 95, 110, 125, 140, 160];
/// How long a start may take until it is cut short.
const START: Duration = Duration::from_secs(60);

fn lab() -> Lab {
    let lab = Options::default().nodes(1).create().unwrap();
    for name in ["web-1", "web-2"] {
        lab.add_pod(name, 0, &PodOptions::default()).unwrap();
    }
    lab.add_pod("shell", 0, &PodOptions::client()).unwrap();
    lab
}

fn service(lab: &Lab, name: &str, address: Ipv4Addr, pod: &str) -> Service {
    Service::new(name, address).tcp(PORT, 8080).endpoints([lab.pod(pod).unwrap().endpoint()])
}

/// strace that kills what it traces at the `call`-th `bpf(2)` of a thread.
fn strace(call: usize) -> Vec<String> {
    let inject = format!("inject=bpf:signal=SIGKILL:when={call}");
    ["-f", "-qq", "-o", "/dev/null", "-e", "trace=bpf", "-e", &inject].map(str::to_owned).to_vec()
}

/// A program that is the agent, until it dies at that call.
fn mortal(lab: &Lab, call: usize) -> PathBuf {
    let program = lab.folder().join(format!("mortal-{call}"));
    let script = program.with_extension("sh");
    let portolan = dataplane_tests::lab::portolan().unwrap();
    let text =
        format!("#!/bin/sh\nexec strace -D {} -- {} \"$@\"\n", strace(call).join(" "), portolan.display());
    fs::write(&script, text).unwrap();
    install(&script, &program).unwrap();
    program
}

/// strace on the agent that runs.
struct Fate(Child);

impl Fate {
    fn of(node: &Node, call: usize) -> Self {
        let agent = node.agent().unwrap();
        let pid = agent.process().pid();
        let child = Command::new("strace")
            .args(strace(call))
            .args(["-p", &pid.to_string()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let traced = || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|pid| pid.trim() != "0"))
        };
        eventually("the agent is traced", traced);
        Self(child)
    }
}

impl Drop for Fate {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_alive(node: &Node) -> bool {
    node.agent().unwrap().process().exit_status().is_none()
}

#[track_caller]
fn wait_for_death(node: &Node) {
    let end = Instant::now() + START;
    while is_alive(node) {
        assert!(Instant::now() < end, "the agent lives on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Asks an address again and again while something is done, and gives what `judge` has against each answer.
fn under_judgement<T>(
    client: &Client,
    to: SocketAddr,
    judge: impl Fn(Result<String, Failure>) -> Result<(), String> + Sync,
    act: impl FnOnce() -> T,
) -> T {
    let (end, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                judge(client.tcp(to).map(|answer| answer.pod))?;
                asked.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, String>(())
        });
        let done = catch_unwind(AssertUnwindSafe(act));
        end.store(true, Ordering::Relaxed);
        let done = done.unwrap_or_else(|panic| resume_unwind(panic));
        asking.join().unwrap().unwrap();
        assert!(asked.load(Ordering::Relaxed) > 0, "{asked:?} questions say nothing");
        done
    })
}

/// C3: a cold start that dies, again and again, a little later each time. What is there is a whole Service or none: nobody is
/// refused, as a Service without endpoints refuses.
#[test]
fn a_start_that_is_cut_short_anywhere_leaves_whole_services_or_none() {
    let lab = lab();
    let node = lab.node(0);
    for (name, address) in [("steady", STEADY), ("changing", CHANGING)] {
        lab.manifests().apply(&service(&lab, name, address, "web-1")).unwrap();
    }
    let client = Client::at(lab.pod("shell").unwrap().place()).timeout(Duration::from_millis(200));
    let whole_or_none = |asked: Result<String, Failure>| match asked {
        Ok(pod) if pod == "web-1" => Ok(()),
        Err(Failure::TimedOut | Failure::Unreachable) => Ok(()),
        Ok(_) | Err(_) => Err(format!("{asked:?}")),
    };
    let mut died = 0;
    under_judgement(&client, at(STEADY, PORT), whole_or_none, || {
        for call in START_CALLS {
            node.launch_agent(&AgentOptions::default().program(&mortal(&lab, call))).unwrap();
            let is_ready = || {
                let agent = node.agent().unwrap();
                agent.process().output().lines().any(|line| line == "ready")
            };
            eventually("the start ends", || !is_alive(node) || is_ready());
            if is_alive(node) {
                // Later calls are those of a running agent.
                node.agent().unwrap().kill();
                break;
            }
            died += 1;
        }
        node.start_agent(&AgentOptions::default()).unwrap();
    });
    assert!(died >= 8, "only {died} starts were cut short");
    let client = client.timeout(TIMEOUT);
    for address in [STEADY, CHANGING] {
        assert_eq!(client.tcp(at(address, PORT)).unwrap().pod, "web-1");
    }
}

/// C3: what is served goes on, and what changes is the old or the new, whichever call is the last.
#[test]
fn an_update_and_a_deletion_that_are_cut_short_are_recovered_from() {
    let lab = lab();
    let node = lab.node(0);
    let shell = lab.pod("shell").unwrap();
    let client = Client::at(shell.place());
    lab.manifests().apply(&service(&lab, "steady", STEADY, "web-1")).unwrap();
    let mut changing = service(&lab, "changing", CHANGING, "web-1").tcp_node_port(81, 8080, NODE_PORT);
    lab.manifests().apply(&changing).unwrap();
    node.start_agent(&AgentOptions::default()).unwrap();
    let always = |asked: Result<String, Failure>| asked.map(drop).map_err(|failure| failure.to_string());
    under_judgement(&client, at(STEADY, PORT), always, || {
        for call in 1..=5 {
            let pod = ["web-1", "web-2"][call % 2];
            changing.set_endpoints([lab.pod(pod).unwrap().endpoint()]);
            under_judgement(&client, at(CHANGING, PORT), always, || {
                let fate = Fate::of(node, call);
                lab.manifests().apply(&changing).unwrap();
                wait_for_death(node);
                drop(fate);
                std::thread::sleep(Duration::from_millis(100));
            });
            node.start_agent(&AgentOptions::default()).unwrap();
            for _ in 0..5 {
                assert_eq!(client.tcp(at(CHANGING, PORT)).unwrap().pod, pod, "after call {call}");
            }
        }
        for call in 1..=3 {
            lab.manifests().apply(&changing).unwrap();
            eventually("it is back", || client.tcp(at(CHANGING, PORT)).is_ok());
            let fate = Fate::of(node, call);
            lab.manifests().delete(&changing).unwrap();
            wait_for_death(node);
            drop(fate);
            node.start_agent(&AgentOptions::default()).unwrap();
            assert!(client.clone().timeout(Duration::from_millis(200)).tcp(at(CHANGING, PORT)).is_err());
            let services = node.portolan(&["services"]).unwrap();
            assert!(!services.contains("changing") && services.contains("steady"), "{services}");
        }
    });
    let audited = node.agent().unwrap();
    let audits = || node.metric("portolan_audits_total ");
    let before = audits().unwrap();
    audited.process().signal(libc::SIGHUP);
    eventually("the tables are audited", || audits().is_some_and(|count| count > before));
    let log = audited.process().log();
    assert!(!log.contains("audit: repaired"), "{log}");
}
