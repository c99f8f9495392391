//! The laboratory tested by itself, without any agent: what it makes, what its clients see, what it leaves behind.

mod ground;

use dataplane_tests::lab::{self, Answer, Client, Failure, Family, Options, PodNetwork, PodOptions, at};
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const SHORT: Duration = Duration::from_millis(300);

/// The answers over TCP and UDP, both of which must come.
#[track_caller]
fn ask(client: &Client, to: SocketAddr) -> [Answer; 2] {
    [client.tcp(to), client.udp(to)].map(|answer| answer.unwrap_or_else(|error| panic!("{to}: {error}")))
}

/// Every pod reaches every pod, every node and the other nodes' pods; pods see the address of who asks.
fn everybody_reaches_everybody(options: Options) {
    let lab = options.nodes(2).create().unwrap();
    let pods: Vec<_> = (0..4)
        .map(|number| lab.add_pod(&format!("web-{number}"), number % 2, &PodOptions::default()).unwrap())
        .collect();
    for node in lab.nodes() {
        node.serve(&format!("host-{}", node.name()), &PodOptions::default().tcp(&[9000]).udp(&[9000]))
            .unwrap();
    }
    for family in Family::BOTH {
        for from in &pods {
            let client = Client::at(from.place());
            for to in pods.iter().filter(|to| to.name() != from.name()) {
                for answer in ask(&client, at(to.ip(family), 8080)) {
                    assert_eq!((answer.pod.as_str(), answer.node.as_str()), (to.name(), to.node()));
                    assert_eq!(answer.client_ip(), from.ip(family));
                }
            }
        }
        for node in lab.nodes() {
            for answer in ask(&Client::at(lab.client()), at(node.ip(family), 9000)) {
                assert_eq!(answer.node, node.name());
                assert_eq!(answer.client_ip(), lab.client_addresses().of(family));
            }
            for pod in &pods {
                for answer in ask(&Client::at(node.place()), at(pod.ip(family), 8080)) {
                    assert_eq!(answer.pod, pod.name());
                }
                // Over UDP a server on all addresses answers its own node's pods from the one nearest to them.
                let answer = Client::at(pod.place()).tcp(at(node.ip(family), 9000)).unwrap();
                assert_eq!((answer.node.as_str(), answer.client_ip()), (node.name(), pod.ip(family)));
            }
        }
    }
}

#[test]
fn pods_with_host_routes_reach_each_other_on_all_nodes() {
    everybody_reaches_everybody(Options::default().pods(PodNetwork::HostRoutes));
}

#[test]
fn pods_on_a_bridge_reach_each_other_on_all_nodes() {
    everybody_reaches_everybody(Options::default().pods(PodNetwork::Bridge));
}

#[test]
fn pods_behind_vxlan_reach_each_other_on_all_nodes() {
    everybody_reaches_everybody(Options::default().pods(PodNetwork::Vxlan));
}

#[test]
fn pods_behind_tunnels_without_ethernet_reach_each_other_on_all_nodes() {
    everybody_reaches_everybody(Options::default().pods(PodNetwork::Tun));
}

#[test]
fn nodes_on_different_subnets_reach_each_other_by_a_router() {
    for pods in [PodNetwork::HostRoutes, PodNetwork::Vxlan] {
        everybody_reaches_everybody(Options::default().pods(pods).routed(true));
    }
}

/// A node calls pods of another from its tunnel's address; in the tunnel the packets have no Ethernet header.
#[test]
fn a_tunnel_has_an_address_and_a_smaller_mtu() {
    for (pods, device, kind, mtu) in
        [(PodNetwork::Vxlan, "vxlan0", "link/ether", 1450), (PodNetwork::Tun, "tun0", "link/none", 1472)]
    {
        let lab = Options::default().nodes(2).pods(pods).create().unwrap();
        let pod = lab.add_pod("web-0", 1, &PodOptions::default()).unwrap();
        let node = lab.node(0);
        for family in Family::BOTH {
            let answer = Client::at(node.place()).tcp(at(pod.ip(family), 8080)).unwrap();
            assert_eq!(answer.client_ip(), node.sources().of(family));
        }
        let link = node.place().run("ip", &["link", "show", device]).unwrap();
        assert!(link.contains(kind) && link.contains(&format!("mtu {mtu} ")), "{link}");
        let link = pod.place().run("ip", &["link", "show", "eth0"]).unwrap();
        assert!(link.contains(&format!("mtu {mtu} ")), "{link}");
    }
}

/// What the client outside sends to an address that is routed to a node takes that way.
#[test]
fn a_route_from_outside_leads_through_a_node() {
    for routed in [false, true] {
        let lab = Options::default().nodes(2).routed(routed).create().unwrap();
        let pod = lab.add_pod("web-0", 1, &PodOptions::default()).unwrap();
        for family in Family::BOTH {
            lab.route_from_outside(
                &format!("{}/{}", pod.ip(family), if family == Family::V4 { 32 } else { 128 }),
                1,
            )
            .unwrap();
            let answer = Client::at(lab.client()).tcp(at(pod.ip(family), 8080)).unwrap();
            assert_eq!(answer.client_ip(), lab.client_addresses().of(family));
        }
    }
}

#[test]
fn a_strict_rp_filter_without_tx_checksumming_changes_nothing() {
    everybody_reaches_everybody(Options::default().strict_rp_filter(true).tx_checksums(false));
}

#[test]
fn uplinks_prepared_for_xdp_carry_the_same_traffic() {
    everybody_reaches_everybody(Options::default().xdp(true));
}

#[test]
fn options_reach_the_interfaces() {
    let lab = Options::default().nodes(1).strict_rp_filter(true).xdp(true).create().unwrap();
    lab.add_pod("web-0", 0, &PodOptions::client()).unwrap();
    let node = lab.node(0).place();
    let interface = lab.pod("web-0").unwrap().node_interface();
    for interface in ["eth0", &interface] {
        let value = node.run("cat", &[&format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter")]).unwrap();
        assert_eq!(value.trim(), "1", "{interface}");
    }
    assert!(lab.net().run("ip", &["-d", "link", "show", "node-1"]).unwrap().contains("xdp"));
}

#[test]
fn failures_are_told_apart() {
    let lab = Options::default().nodes(1).create().unwrap();
    let pod = lab.add_pod("web-0", 0, &PodOptions::default()).unwrap();
    let client = Client::at(lab.node(0).place());
    assert_eq!(client.tcp(at(pod.address(), 1)), Err(Failure::Refused));
    assert_eq!(client.udp(at(pod.address(), 1)), Err(Failure::Refused));
    pod.place().ip(&["route add blackhole 192.168.100.0/24".into()]).unwrap();
    let outside = Client::at(lab.client()).timeout(SHORT);
    lab.client().ip(&[format!("route add {} via {}", pod.address(), lab.node(0).address())]).unwrap();
    assert_eq!(outside.tcp(at(pod.address(), 8080)), Err(Failure::TimedOut));
    assert_eq!(outside.udp_unconnected(at(pod.address(), 8080)), Err(Failure::TimedOut));
    let mut stream = client.connect(at(pod.address(), 8080)).unwrap();
    assert_eq!(stream.ask().unwrap().pod, "web-0");
    pod.server().unwrap().kill();
    assert_eq!(stream.ask(), Err(Failure::Reset));
}

#[test]
fn a_client_keeps_the_source_it_is_told() {
    let lab = Options::default().nodes(1).create().unwrap();
    let pod = lab.add_pod("web-0", 0, &PodOptions::default()).unwrap();
    let source = at(lab.node(0).address(), 4242);
    let client = Client::at(lab.node(0).place()).source(source);
    assert_eq!(client.tcp(at(pod.address(), 8080)).unwrap().client, source);
    assert_eq!(client.udp_unconnected(at(pod.address(), 8080)).unwrap().client, source);
}

#[test]
fn sockets_belong_to_the_cgroup_of_their_place() {
    let lab = Options::default().nodes(1).create().unwrap();
    let socket = lab.node(0).place().udp_socket(None).unwrap();
    let address = socket.local_addr().unwrap();
    // The kernel tells a socket's cgroup in sock_diag; `ss` prints its path.
    let output = lab.node(0).place().run("ss", &["--udp", "--all", "--numeric", "--cgroup"]).unwrap();
    let line = output.lines().find(|line| line.contains(&address.port().to_string())).unwrap();
    assert!(line.contains(&format!("{}/node-1/host", lab.id())), "{line}");
}

#[test]
fn a_draining_server_goes_on_for_its_time() {
    let lab = Options::default().nodes(1).create().unwrap();
    let options = PodOptions::default().drain(Duration::from_secs(4));
    let pod = lab.add_pod("web-0", 0, &options).unwrap();
    let client = Client::at(lab.node(0).place());
    let mut stream = client.connect(at(pod.address(), 8080)).unwrap();
    pod.terminate();
    std::thread::sleep(SHORT);
    assert_eq!(stream.ask().unwrap().pod, "web-0");
    assert_eq!(client.tcp(at(pod.address(), 8080)).unwrap().pod, "web-0");
    assert!(pod.server().unwrap().wait(Duration::from_secs(60)).unwrap().success());
    assert_eq!(client.tcp(at(pod.address(), 8080)), Err(Failure::Refused));
}

#[test]
fn a_thousand_connections_stay_open() {
    let lab = Options::default().nodes(1).create().unwrap();
    let pod = lab.add_pod("web-0", 0, &PodOptions::default()).unwrap();
    let client = Client::at(lab.node(0).place());
    let mut streams = client.connect_many(at(pod.address(), 8080), 1000).unwrap();
    for stream in &mut streams {
        assert_eq!(stream.ask().unwrap().pod, "web-0");
    }
}

#[test]
fn a_removed_pod_is_gone_and_its_address_rests() {
    let lab = Options::default().nodes(1).create().unwrap();
    let first = lab.add_pod("web-0", 0, &PodOptions::default()).unwrap();
    lab.node(0).remove_pod("web-0").unwrap();
    assert!(lab.pod("web-0").is_none());
    let again = lab.add_pod("web-0", 0, &PodOptions::default()).unwrap();
    assert_ne!(first.address(), again.address());
    assert_eq!(Client::at(lab.node(0).place()).tcp(at(again.address(), 8080)).unwrap().pod, "web-0");
}

#[test]
fn two_labs_stand_side_by_side() {
    let labs = [(); 2].map(|()| Options::default().nodes(1).create().unwrap());
    for (lab, name) in labs.iter().zip(["left", "right"]) {
        lab.add_pod(name, 0, &PodOptions::default()).unwrap();
    }
    for (lab, name) in labs.iter().zip(["left", "right"]) {
        let pod = lab.pod(name).unwrap();
        assert_eq!(Client::at(lab.node(0).place()).tcp(at(pod.address(), 8080)).unwrap().pod, name);
    }
}

/// Whatever carries the lab's id.
fn traces(id: &str) -> Vec<String> {
    let cgroups = std::fs::read_to_string("/proc/mounts").unwrap();
    let cgroup = cgroups.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
    let folders = ["/run/netns", "/run/portolan", lab::LABS].map(str::to_owned);
    let cgroups = format!("{}/portolan-lab", cgroup.split(' ').nth(1).unwrap());
    folders
        .into_iter()
        .chain([cgroups])
        .flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten().flatten())
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            // Agents have files for people in folders that are called as the folder of their pins.
            name == id || name.starts_with(&format!("{id}-")) || name.contains(&id.replace('-', "\\x2d"))
        })
        .map(|entry| entry.path().display().to_string())
        .collect()
}

/// A lab in a process of its own.
fn lab_process() -> (Child, String) {
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_portolan-lab")).arg("up").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line)
        .unwrap();
    let id = line.split_whitespace().nth(1).unwrap().to_owned();
    assert!(Path::new(lab::LABS).join(&id).is_dir(), "{line}");
    (child, id)
}

#[test]
fn a_lab_leaves_nothing_when_it_is_dropped() {
    let lab = Options::default().nodes(1).create().unwrap();
    lab.add_pod("web-0", 0, &PodOptions::default()).unwrap();
    let id = lab.id().to_owned();
    assert!(traces(&id).len() > 4);
    drop(lab);
    assert_eq!(traces(&id), Vec::<String>::new());
}

#[test]
fn a_lab_leaves_nothing_when_a_test_fails() {
    let id = std::sync::Mutex::new(String::new());
    let result = std::panic::catch_unwind(|| {
        let lab = Options::default().nodes(1).create().unwrap();
        *id.lock().unwrap() = lab.id().to_owned();
        panic!("as a failed assertion");
    });
    assert!(result.is_err());
    let id = id.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    assert_eq!(traces(&id), Vec::<String>::new());
}

#[test]
fn a_lab_leaves_nothing_when_it_is_interrupted() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let (mut child, id) = lab_process();
        // SAFETY: a system call on our own child.
        unsafe { libc::kill(child.id() as i32, signal) };
        child.wait().unwrap();
        assert_eq!(traces(&id), Vec::<String>::new());
    }
}

#[test]
fn the_next_lab_removes_what_a_killed_one_left() {
    let (mut child, id) = lab_process();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(traces(&id).len() > 4);
    let lab = Options::default().nodes(1).create().unwrap();
    assert_eq!(traces(&id), Vec::<String>::new());
    drop(lab);
}

/// In a mount namespace of its own, whose `/run` is empty: other labs of this machine share theirs.
#[test]
fn the_last_lab_takes_away_what_labs_share() {
    let script = "mount -t tmpfs none /run && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh", env!("CARGO_BIN_EXE_portolan-lab"), "up"]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line)
        .unwrap();
    assert!(line.ends_with("is up\n"), "{line}");
    let inside = std::fs::File::open(format!("/proc/{}/ns/mnt", child.id())).unwrap();
    let inside = format!("--mount=/proc/{}/fd/{}", std::process::id(), inside.as_raw_fd());
    let inside = |command: &[&str]| {
        let output = Command::new("nsenter").arg(&inside).arg("--").args(command).output().unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    assert!(inside(&["find", "/run"]).lines().count() > 10);
    // SAFETY: a system call on our own child.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert!(child.wait().unwrap().success());
    assert_eq!(inside(&["find", "/run"]), "/run\n");
    assert_eq!(inside(&["umount", "/run"]), "", "nothing is mounted there");
}

#[test]
fn settings_of_interfaces_are_the_kernel_s_whatever_the_machine_s_are() {
    let lab = Options::default().nodes(1).create().unwrap();
    let read = |setting: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/{setting}");
        lab.client().enter(|| std::fs::read_to_string(path).unwrap()).unwrap()
    };
    for scope in ["all", "default", "lo", "eth0"] {
        for (name, value) in [("rp_filter", "0"), ("accept_redirects", "1"), ("forwarding", "0")] {
            assert_eq!(read(&format!("{scope}/{name}")).trim(), value, "{scope} {name}");
        }
    }
}

#[test]
fn a_command_runs_in_a_place_by_name() {
    let (mut child, id) = lab_process();
    let exec = |place: &str, command: &[&str]| {
        let mut exec = Command::new(env!("CARGO_BIN_EXE_portolan-lab"));
        let output = exec.args(["exec", "--lab", &id, place, "--"]).args(command).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    assert!(exec("client", &["ip", "-4", "addr"]).1.contains("192.168.100.200/24"));
    assert!(exec("node-1", &["cat", "/proc/self/cgroup"]).1.contains(&format!("{id}/node-1/host")));
    assert_eq!(exec("node-1", &["sh", "-c", "exit 7"]).0, Some(7));
    assert_eq!(exec("nowhere", &["true"]).0, Some(1));
    // SAFETY: a system call on our own child.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    child.wait().unwrap();
}
