//! An agent that hangs, or of which a part is gone: it shows, and the kernel goes on serving.

use crate::api_server::{KEPT, Scene};
use crate::health::{HEALTH, get, until};
use dataplane_tests::lab::{AgentOptions, Client, Lab, Node, Options, PodOptions, Service, at, portolan};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PORT: u16 = 80;
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 11, 1);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 96, 11, 2);

fn lab() -> Lab {
    let lab = Options::default().nodes(1).create().unwrap();
    lab.add_pod("web", 0, &PodOptions::default()).unwrap();
    lab.add_pod("shell", 0, &PodOptions::client()).unwrap();
    lab.manifests().apply(&service(&lab, "steady", ADDRESS)).unwrap();
    lab
}

fn service(lab: &Lab, name: &str, address: Ipv4Addr) -> Service {
    Service::new(name, address).tcp(PORT, 8080).endpoints([lab.pod("web").unwrap().endpoint()])
}

fn serves(lab: &Lab, address: Ipv4Addr) -> bool {
    let shell = Client::at(lab.pod("shell").unwrap().place());
    shell.timeout(Duration::from_millis(400)).tcp(at(address, PORT)).is_ok()
}

/// What the node says of itself: status and text.
fn page(lab: &Lab, path: &str) -> (u16, String) {
    let ask = || get(lab.client(), at(lab.node(0).address(), HEALTH), path);
    // While a write hangs, the thread that would answer may be the one that writes.
    let answer = (0..20).find_map(|_| ask()).unwrap_or_else(|| panic!("nobody answers {path}"));
    (answer.status, answer.text)
}

/// strace on the agent that runs, which changes what its calls come to.
struct Injection(Child);

impl Injection {
    fn into(node: &Node, injection: &str) -> Self {
        let pid = node.agent().unwrap().process().pid();
        let child = Command::new("strace")
            .args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("inject={injection}")])
            .args(["-p", &pid.to_string()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        until("the agent is traced", || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|pid| pid.trim() != "0"))
        });
        Self(child)
    }
}

impl Drop for Injection {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// H2, H5, C3: a call of `bpf(2)` that does not return holds up changes, and nothing else.
#[test]
fn an_agent_whose_system_call_hangs_says_so_and_is_well_when_it_returns() {
    let lab = lab();
    let node = lab.node(0);
    let arguments = ["--healthy-within=2s", "--alive-within=4s"];
    node.start_agent(&AgentOptions::default().arguments(&arguments)).unwrap();
    assert_eq!((page(&lab, "/healthz").0, page(&lab, "/livez").0), (200, 200));
    let hanging = Injection::into(node, "bpf:delay_enter=60000000");
    lab.manifests().apply(&service(&lab, "other", OTHER)).unwrap();
    until("the node cannot serve what it was told", || {
        let (status, text) = page(&lab, "/healthz");
        status == 503 && text.contains("an update has been waiting")
    });
    until("the agent is not alive", || {
        let (status, text) = page(&lab, "/livez");
        status == 503 && text.contains("the event loop has shown nothing")
    });
    assert!(serves(&lab, ADDRESS) && !serves(&lab, OTHER), "the kernel goes on");
    drop(hanging);
    until("it goes on", || (page(&lab, "/healthz").0, page(&lab, "/livez").0) == (200, 200));
    until("what changed is served", || serves(&lab, OTHER));
}

/// Whether a file below the folder has these words.
fn is_written(folder: &Path, words: &str) -> bool {
    let files =
        fs::read_dir(folder).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap_or_default());
    files.into_iter().any(|bytes| String::from_utf8_lossy(&bytes).contains(words))
}

/// H2, C3: writes are tried again ever more slowly, and all else goes on meanwhile.
#[test]
fn a_kernel_that_refuses_every_write_holds_up_nothing_else() {
    let scene = Scene::set("node-1");
    let (lab, node) = (&scene.lab, scene.node());
    node.start_agent(&scene.options(&["--healthy-within=2s"])).unwrap();
    until("what it knows is on disk", || is_written(&node.state_folder(), "kept"));
    let refusing = Injection::into(node, "bpf:error=ENOMEM");
    scene.put(&scene.service("came", OTHER));
    until("the node cannot serve what it was told", || {
        let (status, text) = page(lab, "/healthz");
        status == 503 && text.contains("the kernel has refused every update")
    });
    until("what came is on disk", || is_written(&node.state_folder(), "came"));
    std::thread::sleep(Duration::from_secs(11));
    assert_eq!(page(lab, "/livez").0, 200);
    assert!(!scene.log().contains("no longer attached"), "nobody knows: {}", scene.log());
    assert!(scene.serves(KEPT) && !scene.serves(OTHER));
    drop(refusing);
    until("what came is served", || scene.serves(OTHER));
    until("the node is well", || page(lab, "/healthz").0 == 200);
}

/// A program that is the agent, with its log going to a file that may be a pipe.
fn logging_to(lab: &Lab, log: &Path) -> PathBuf {
    let program = lab.folder().join("logging");
    let text = format!("#!/bin/sh\nexec {} \"$@\" 2<>{}\n", portolan().unwrap().display(), log.display());
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

/// Fills a pipe up to the last byte.
fn fill(pipe: &mut File) {
    for size in [4_096, 1] {
        loop {
            match pipe.write(&[b'.'; 4_096][..size]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// H5, C3
#[test]
fn an_agent_whose_log_nobody_reads_says_so() {
    let lab = lab();
    let node = lab.node(0);
    let path = lab.folder().join("log-pipe");
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a closed string that outlives the call.
    let made = unsafe { libc::mkfifo(name.as_ptr(), 0o600) };
    assert_eq!(made, 0, "{}: {}", path.display(), std::io::Error::last_os_error());
    let mut pipe =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
    let options = AgentOptions::default().program(&logging_to(&lab, &path));
    node.start_agent(&options.arguments(&["--alive-within=3s"])).unwrap();
    assert_eq!(page(&lab, "/livez").0, 200);
    fill(&mut pipe);
    // What is wrong with a manifest is logged.
    lab.manifests().write("broken.yaml", "kind: [\n").unwrap();
    until("the agent is not alive", || {
        let (status, text) = page(&lab, "/livez");
        status == 503 && text.contains("a write to the log has shown nothing")
    });
    assert_eq!(page(&lab, "/healthz").0, 200, "it still serves what it was told");
    assert!(serves(&lab, ADDRESS));
}

/// H5, C3: tokio panics where the kernel does not tell it of events.
#[test]
fn a_thread_that_panics_ends_the_agent_and_nothing_else() {
    let lab = lab();
    let node = lab.node(0);
    node.start_agent(&AgentOptions::default()).unwrap();
    let agent = node.agent().unwrap();
    let _no_events = Injection::into(node, "epoll_wait,epoll_pwait,epoll_pwait2:error=EBADF");
    let end = Instant::now() + Duration::from_secs(60);
    while agent.process().exit_status().is_none() {
        assert!(Instant::now() < end, "it lives on:\n{}", agent.process().log());
        std::thread::sleep(Duration::from_millis(50));
    }
    let log = agent.process().log();
    assert_eq!(agent.process().exit_status().unwrap().signal(), Some(libc::SIGABRT), "{log}");
    assert!(log.contains("panicked at"), "{log}");
    assert!(serves(&lab, ADDRESS));
    node.start_agent(&AgentOptions::default()).unwrap();
    assert_eq!(lab.node(0).metric("portolan_healthy "), Some(1.0));
}
