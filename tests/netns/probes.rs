//! The two ends of a call by which `portolan check --pods` tries a cluster, in pods of a laboratory.

use crate::health::until;
use dataplane_tests::lab::{AgentOptions, Lab, Options, Place, PodOptions, Process, Service, at, portolan};
use serde_json::{Value, json};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 16, 1);
const EMPTY: Ipv4Addr = Ipv4Addr::new(10, 96, 16, 2);
/// Where nothing listens in a pod of the laboratory.
const PORT: u16 = 8_090;

fn command(place: &Place, arguments: &[&str]) -> Command {
    let mut command = place.command(portolan().unwrap()).unwrap();
    command.arg("probe").args(arguments);
    command
}

fn ask(lab: &Lab, to: SocketAddr, more: &[&str]) -> Value {
    let place = lab.pod("shell").unwrap();
    let to = to.to_string();
    let output = command(place.place(), &[&["ask", &to, "--timeout=1000"], more].concat()).output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"))
}

/// P1, P9, P11: a pod that serves tells who it is and whom it sees; one that calls tells what came of it, itself included.
#[test]
fn a_probe_tells_who_answered_and_what_else_came() {
    let lab = Options::default().nodes(2).create().unwrap();
    for (pod, node) in [("served", 0), ("shell", 1)] {
        lab.add_pod(pod, node, &PodOptions::default()).unwrap();
    }
    let mut servers = Vec::new();
    for (pod, node) in [("served", "node-1"), ("shell", "node-2")] {
        let serve = ["serve", "--port=8090", "--node", node, "--pod", pod];
        let server = command(lab.pod(pod).unwrap().place(), &serve);
        servers.push(Process::start(&lab.logs(), &format!("probe-{pod}"), server).unwrap());
    }
    let endpoint = |pod: &str| lab.pod(pod).unwrap().endpoint();
    let service = Service::new("probe", ADDRESS).tcp(80, PORT).udp(80, PORT);
    lab.manifests().apply(&service.clone().endpoints([endpoint("served")])).unwrap();
    lab.manifests().apply(&Service::new("empty", EMPTY).tcp(80, PORT).endpoints([])).unwrap();
    lab.start_agents(&AgentOptions::default()).unwrap();
    let shell = lab.pod("shell").unwrap().address().to_string();
    until("the probe serves", || ask(&lab, at(ADDRESS, 80), &[])["answers"][0]["pod"] == "served");
    for protocol in [[].as_slice(), &["--udp"]] {
        let asked = ask(&lab, at(ADDRESS, 80), &[&["--count=3"], protocol].concat());
        let answers = asked["answers"].as_array().unwrap();
        assert_eq!(
            (answers.len(), &asked["refused"], &asked["timed_out"]),
            (3, &0.into(), &0.into()),
            "{asked}"
        );
        for answer in answers {
            assert_eq!(
                (&answer["node"], &answer["client"]),
                (&"node-1".into(), &shell.as_str().into()),
                "{asked}"
            );
        }
    }
    assert_eq!(ask(&lab, at(EMPTY, 80), &[])["refused"], 1);
    let silent = ask(&lab, at(Ipv4Addr::new(10, 96, 16, 99), 80), &[]);
    assert_eq!(
        (&silent["timed_out"], &silent["answers"]),
        (&1.into(), &Value::Array(Vec::new())),
        "{silent}"
    );
    lab.manifests().apply(&service.endpoints([endpoint("shell")])).unwrap();
    until("it calls itself", || ask(&lab, at(ADDRESS, 80), &[])["answers"][0]["pod"] == "shell");
}

/// A workstation of a laboratory: its `kubectl` knows the objects that `check --pods` makes, and enters pods of the laboratory.
struct Workstation {
    lab: Lab,
    folder: PathBuf,
    _servers: Vec<Process>,
}

/// The Services that it makes, as the laboratory has them: name, ClusterIP, node ports of TCP and UDP.
const MADE: [(&str, u8, &[(&str, u16)]); 3] =
    [("all", 11, &[("TCP", 32_160), ("UDP", 32_161)]), ("local", 12, &[("TCP", 32_162)]), ("empty", 13, &[])];

impl Workstation {
    fn new() -> Self {
        let lab = Options::default().nodes(2).create().unwrap();
        let mut servers = Vec::new();
        for (pod, node) in [("probe-1", 0), ("probe-2", 1)] {
            lab.add_pod(pod, node, &PodOptions::client()).unwrap();
            let node = format!("node-{}", node + 1);
            let serve = ["serve", "--port=8080", "--node", &node, "--pod", pod];
            let server = command(lab.pod(pod).unwrap().place(), &serve);
            servers.push(Process::start(&lab.logs(), pod, server).unwrap());
        }
        let both = || ["probe-1", "probe-2"].map(|pod| lab.pod(pod).unwrap().endpoint());
        let of = |name: &str, last: u8| Service::new(name, Ipv4Addr::new(10, 96, 16, last));
        let all = of("all", 11).tcp_node_port(80, 8080, 32_160).udp_node_port(80, 8080, 32_161);
        let local = of("local", 12).tcp_node_port(80, 8080, 32_162).external_local().internal_local();
        let empty = of("empty", 13).tcp(80, 8080);
        for service in [all.endpoints(both()), local.endpoints(both()), empty.endpoints([])] {
            lab.manifests().apply(&service).unwrap();
        }
        lab.start_agents(&AgentOptions::default()).unwrap();
        let folder = lab.folder().join("workstation");
        fs::create_dir(&folder).unwrap();
        let workstation = Self { lab, folder, _servers: servers };
        workstation.write_kubectl();
        workstation
    }

    fn write_kubectl(&self) {
        let lab = &self.lab;
        let write = |file: &str, value: Value| fs::write(self.folder.join(file), value.to_string()).unwrap();
        let pod = |name: &str, node: usize| {
            json!({
                "metadata": { "name": name }, "spec": { "nodeName": lab.node(node).name() },
                "status": {
                    "conditions": [{ "type": "Ready", "status": "True" }],
                    "podIPs": [{ "ip": lab.pod(name).unwrap().address().to_string() }],
                    "hostIPs": [{ "ip": lab.node(node).address().to_string() }],
                },
            })
        };
        write("pods.json", json!({ "items": [pod("probe-1", 0), pod("probe-2", 1)] }));
        write("agents.json", json!({ "items": [{ "spec": { "containers": [{ "image": "an/image:1" }] } }] }));
        write("daemonsets.json", json!({ "items": [{ "status": { "desiredNumberScheduled": 2 } }] }));
        let service = |(name, last, ports): &(&str, u8, &[(&str, u16)])| {
            let ports: Vec<_> =
                ports.iter().map(|(it, port)| json!({ "protocol": it, "nodePort": port })).collect();
            json!({
                "metadata": { "name": name },
                "spec": { "clusterIPs": [format!("10.96.16.{last}")], "ports": ports },
            })
        };
        write("services.json", json!({ "items": MADE.iter().map(service).collect::<Vec<_>>() }));
        let enter = ["probe-1", "probe-2"].map(|name| {
            let pod = lab.pod(name).unwrap();
            let (cgroup, namespace) = (pod.place().cgroup().display().to_string(), pod.place().namespace().to_owned());
            format!("{name}) echo $$ > {cgroup}/cgroup.procs; exec nsenter --net=/run/netns/{namespace} -- {} \"${{@:7}}\" ;;\n",
                portolan().unwrap().display())
        });
        let script = format!(
            "#!/bin/bash\nset -e\ncd \"$(dirname \"$0\")\"\ncase \"$1 $2\" in\n\
             'get pods') case $3 in --all-namespaces) cat agents.json ;; *) cat pods.json ;; esac ;;\n\
             'get namespaces') echo '{{\"items\": []}}' ;;\n\
             'apply --filename') cat > applied.json; touch namespace ;;\n\
             'get daemonsets') cat daemonsets.json ;;\n\
             'get services') cat services.json ;;\n\
             'delete namespace') rm -f namespace; touch deleted ;;\n\
             'exec --namespace') case $4 in\n{}esac ;;\n\
             *) echo \"what is $*?\" >&2; exit 1 ;;\nesac\n",
            enter.concat()
        );
        let kubectl = self.folder.join("kubectl");
        fs::write(&kubectl, script).unwrap();
        fs::set_permissions(&kubectl, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let path = format!("{}:{}", self.folder.display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(portolan().unwrap());
        command.args(["check", "--pods"]).args(arguments).env("PATH", path);
        command
    }

    fn has(&self, file: &str) -> bool {
        self.folder.join(file).exists()
    }
}

/// P1, P4, P7, P9, P11: a pod of each node calls Services of each kind; each call is a line with its verdict, and what was made is gone.
#[test]
fn a_cluster_is_tried_from_a_pod_of_each_node() {
    let station = Workstation::new();
    let output = station.command(&["--output", "json"]).output().unwrap();
    let page: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    let lines = page["checks"].as_array().unwrap();
    // Nobody answers for DNS in this laboratory: what is not so is said, with what helps, and the rest goes on.
    let (dns, others): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line["check"] == "DNS");
    assert!(others.iter().all(|line| line["verdict"] == "well"), "{page:#}");
    assert_eq!((dns.len(), output.status.code()), (2, Some(4)), "{page:#}");
    assert!(dns.iter().all(|line| line["verdict"] == "failing" && line["helps"].is_string()));
    let of = |check: &str, node: &str| {
        others.iter().filter(|line| line["check"] == check && line["node"] == node).count()
    };
    for node in ["node-1", "node-2"] {
        let counts = ["ClusterIP", "node port", "externalTrafficPolicy Local", "no endpoints: refused"];
        assert_eq!(counts.map(|check| of(check, node)), [2, 4, 2, 1], "{page:#}");
        assert_eq!(of("hairpin, internalTrafficPolicy Local", node), 1);
    }
    let applied: Value =
        serde_json::from_slice(&fs::read(station.folder.join("applied.json")).unwrap()).unwrap();
    let image = &applied["items"][1]["spec"]["template"]["spec"]["containers"][0]["image"];
    assert_eq!(image, "an/image:1", "that of the agents");
    assert!(station.has("deleted") && !station.has("namespace"));
    let text = station.command(&["--node", "node-2"]).output().unwrap();
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("node-2: TCP 10.96.16.11:80") && !text.contains("node-1: "), "{text}");

    // An endpoint that nobody is behind: who calls it is told.
    let nobody = Service::new("local", Ipv4Addr::new(10, 96, 16, 12)).tcp_node_port(80, 8_099, 32_162);
    let pods = ["probe-1", "probe-2"].map(|pod| station.lab.pod(pod).unwrap().endpoint());
    station.lab.manifests().apply(&nobody.external_local().internal_local().endpoints(pods)).unwrap();
    let output = station.command(&["--node", "node-1"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let failing = text.lines().find(|line| line.starts_with('✗') && line.contains("hairpin")).unwrap();
    assert!(failing.contains("refused") && failing.contains("portolan explain --node node-1"), "{failing}");
}

/// What was made is removed after Ctrl-C, and after a failure.
#[test]
fn nothing_of_a_trial_is_left_however_it_ends() {
    let station = Workstation::new();
    // A pod that never comes.
    let waits = json!({ "items": [{ "status": { "desiredNumberScheduled": 3 } }] });
    fs::write(station.folder.join("daemonsets.json"), waits.to_string()).unwrap();
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let _ = fs::remove_file(station.folder.join("deleted"));
        let mut ended = station.command(&[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        until("its namespace is made", || station.has("namespace"));
        // SAFETY: a plain system call on a child that was not waited for.
        unsafe { libc::kill(ended.id() as i32, signal) };
        assert!(!ended.wait().unwrap().success());
        assert!(station.has("deleted") && !station.has("namespace"));
    }
    fs::write(station.folder.join("services.json"), "no JSON").unwrap();
    let ready = json!({ "items": [{ "status": { "desiredNumberScheduled": 2 } }] });
    fs::write(station.folder.join("daemonsets.json"), ready.to_string()).unwrap();
    fs::remove_file(station.folder.join("deleted")).unwrap();
    let output = station.command(&[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(station.has("deleted") && !station.has("namespace"));
}
