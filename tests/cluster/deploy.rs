//! What a cluster needs, as `deploy/` has it: applied by `kubectl` to a real API server, made into pods by the DaemonSet controller,
//! run by `bwrap` from the image, with what the pods ask for and no more.

use crate::shared::{Cluster, PORT};
use crate::world::eventually;
use dataplane_common::node::Node as Settings;
use dataplane_common::tables::Nodes;
use dataplane_tests::controlplane::{API_SERVER, target_folder};
use dataplane_tests::lab::{Node, Options, Process, at, portolan};
use dataplane_user::kernel::maps::Map;
use dataplane_user::kernel::pins::Pins;
use serde_json::Value;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub(crate) const LABEL: &str = "app.kubernetes.io/name=portolan";

fn file(name: &str) -> String {
    format!("{}/../deploy/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// A cluster whose kubelet knows the image that `cargo xtask image` wrote.
pub(crate) fn raise() -> Cluster {
    raise_on(&Options::default())
}

fn raise_on(options: &Options) -> Cluster {
    let cluster = Cluster::without_agents_on(options);
    let archive = target_folder().unwrap().join("image/portolan.tar");
    cluster.plane.load_image(&archive).unwrap();
    cluster
}

fn kubectl(cluster: &Cluster, arguments: &[&str]) -> String {
    cluster.plane.kubectl(&[&["--namespace=kube-system"], arguments].concat(), "").unwrap()
}

/// Waits until each node has a pod of the DaemonSet that is ready.
fn wait_for(cluster: &Cluster, daemon_set: &str) {
    kubectl(cluster, &["rollout", "status", "daemonset", daemon_set, "--timeout=300s"]);
}

/// What `portolan services` says on a node.
fn services(node: &Node) -> String {
    run(node, "services")
}

/// What `portolan take-over` says on a node.
fn take_over(node: &Node) -> String {
    run(node, "take-over")
}

/// Runs a verb of `portolan` on a node, where it is as in its pods.
fn run(node: &Node, verb: &str) -> String {
    let [pins, run, program] = [node.bpffs(), node.run_folder(), portolan().unwrap()];
    let [pins, run, program] = [&pins, &run, &program].map(|path| path.to_str().unwrap());
    let node_sees = [
        "--dev-bind",
        "/",
        "/",
        "--bind",
        pins,
        "/sys/fs/bpf",
        "--tmpfs",
        "/run",
        "--bind",
        run,
        "/run/portolan",
    ];
    node.place().run("bwrap", &[node_sees.as_slice(), &[program, verb]].concat()).unwrap()
}

/// Whether the programs of a node leave connections to another proxy.
fn takes_over(node: &Node) -> bool {
    let nodes = Map::<Nodes>::open(&Pins::new(&node.bpffs().join("portolan")).maps()).unwrap();
    nodes.get(&0).unwrap().unwrap().has(Settings::TAKES_OVER)
}

/// Follows the head of `deploy/portolan.yaml`.
fn install(cluster: &Cluster) {
    kubectl(cluster, &["apply", "-f", &file("portolan.yaml")]);
    wait_for(cluster, "portolan");
}

/// The agents find the API server where kubeadm's kubelet does, then where its endpoints were, and among several that somebody
/// named. The cluster's own Service cannot lead them: it works when they do.
#[test]
fn the_api_server_is_found_without_a_word_and_among_several() {
    let cluster = raise();
    let node = cluster.lab.node(0);
    let server = format!("{}:{}", API_SERVER.0, API_SERVER.1);
    let noted = |name: &str| std::fs::read_to_string(node.state_folder().join(name)).unwrap_or_default();
    install(&cluster);
    assert_eq!(noted("api-servers.kubelet"), format!("https://{server}\n"));
    eventually("the endpoints of the API server are kept", || noted("api-servers") == format!("{server}\n"));

    // Without the kubelet's kubeconfig, and with empty tables.
    let again = |change: &dyn Fn()| {
        kubectl(&cluster, &["delete", "-f", &file("portolan.yaml")]);
        eventually("the agents are gone", || cluster.pod_uids(LABEL) == [String::new()].into());
        for node in cluster.lab.nodes() {
            clean(node);
        }
        change();
        install(&cluster);
    };
    again(&|| {
        for node in cluster.lab.nodes() {
            std::fs::remove_file(node.etc("kubernetes").join("kubelet.conf")).unwrap();
            std::fs::remove_file(node.state_folder().join("api-servers.kubelet")).unwrap();
        }
    });
    // What came after the snapshot tells that the API server is followed.
    let is_followed = |name: &str, node_port: u16| {
        cluster.web(name, 1, node_port);
        cluster.wait_until_served([at(cluster.cluster_ip(name), PORT), at(node.address(), node_port)]);
    };
    is_followed("found", 30_114);

    // The first of two is nobody's address.
    again(&|| {
        for node in cluster.lab.nodes() {
            std::fs::remove_file(node.state_folder().join("api-servers")).unwrap();
        }
        let servers = format!("--from-literal=PORTOLAN_API_SERVER=192.168.100.99,{server}");
        kubectl(&cluster, &["create", "configmap", "portolan", &servers]);
    });
    is_followed("named", 30_115);
}

/// A static pod has no ServiceAccount and no ConfigMap: the kubelet starts it before it has reached the API server.
#[test]
fn a_static_pod_serves_without_what_the_api_server_gives() {
    let cluster = raise_on(&Options::default().bpffs(false));
    let kubeconfig = std::fs::read_to_string(cluster.plane.agent_kubeconfig()).unwrap();
    let (before, after) = kubeconfig.split_once("certificate-authority: ").unwrap();
    let (certificate, after) = after.split_once('}').unwrap();
    let text =
        kubectl(&cluster, &["create", "--dry-run=client", "-o", "json", "-f", &file("static-pod.yaml")]);
    let pod: Value = serde_json::from_str(&text).unwrap();
    for own in ["/spec/serviceAccountName", "/spec/containers/0/envFrom"] {
        assert_eq!(pod.pointer(own), None, "a static pod has none");
    }
    for node in cluster.lab.nodes() {
        let folder = node.etc("portolan");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::copy(certificate, folder.join("ca.crt")).unwrap();
        let text = format!("{before}certificate-authority: /etc/portolan/ca.crt}}{after}");
        std::fs::write(folder.join("kubeconfig"), text).unwrap();
        // What a kubelet makes of it.
        let mut pod = pod.clone();
        pod["metadata"]["name"] = format!("portolan-{}", node.name()).into();
        pod["spec"]["nodeName"] = node.name().into();
        cluster.plane.apply(&[pod]).unwrap();
    }
    kubectl(&cluster, &["wait", "--for=condition=Ready", "pod", "-l", LABEL, "--timeout=90s"]);
    cluster.web("static", 2, 30_116);
    let to = [at(cluster.cluster_ip("static"), PORT), at(cluster.lab.node(0).address(), 30_116)];
    cluster.wait_until_served(to);
}

/// The service of systemd: its command and its capabilities are enough, and it is told when the agent is ready.
#[test]
fn the_unit_of_systemd_starts_an_agent_that_says_when_it_is_ready() {
    let cluster = raise();
    let unit = std::fs::read_to_string(file("portolan.service")).unwrap();
    let value =
        |name: &str| unit.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap();
    assert_eq!(value("Type"), "notify");
    let node = cluster.lab.node(0);
    let socket = cluster.lab.logs().join("notify");
    let listener = UnixDatagram::bind(&socket).unwrap();
    listener.set_read_timeout(Some(Duration::from_secs(60))).unwrap();

    let capabilities =
        value("CapabilityBoundingSet").split(' ').map(|name| name.trim_start_matches("CAP_").to_lowercase());
    let bounding = capabilities.fold("-all".to_owned(), |all, name| format!("{all},+{name}"));
    let mut command = node.place().command("setpriv").unwrap();
    command.args(["--bounding-set", &bounding, "--no-new-privs"]).arg(portolan().unwrap());
    let (program, arguments) = value("ExecStart").split_once(' ').unwrap();
    assert_eq!(program, "/usr/local/bin/portolan");
    for argument in arguments.split(' ') {
        match argument.split_once('=') {
            Some(("--kubeconfig", _)) => command.arg("--kubeconfig").arg(cluster.plane.agent_kubeconfig()),
            // An unset variable is no argument.
            _ if argument == "$PORTOLAN_FLAGS" => &mut command,
            _ => command.arg(argument),
        };
    }
    // Where a node of the lab differs from a machine.
    command.arg("--bpffs").arg(node.bpffs()).arg("--cgroup").arg(node.cgroup());
    command.arg("--state-dir").arg(node.state_folder());
    command.env("NODE_NAME", node.name()).env("NOTIFY_SOCKET", &socket);
    let agent = Process::start(&cluster.lab.logs(), "unit", command).unwrap();

    let mut buffer = [0; 256];
    let length = listener.recv(&mut buffer).unwrap_or_else(|error| panic!("{error}: {}", agent.log()));
    assert!(buffer[..length].starts_with(b"READY=1"), "{}", String::from_utf8_lossy(&buffer[..length]));
    agent.terminate(Duration::from_secs(20)).unwrap();
}

/// The base for kustomize is the plain manifest.
fn assert_the_base_is_the_manifest(cluster: &Cluster) {
    let objects = |arguments: &[&str]| {
        let arguments = [arguments, &["--dry-run=client", "-o", "json"]].concat();
        let text = kubectl(cluster, &arguments);
        // One after the other.
        let objects = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        let mut objects: Vec<_> = objects.map(Result::unwrap).collect();
        objects.sort_by_key(|object| object["kind"].to_string());
        objects
    };
    let base = objects(&["create", "-k", &file("")]);
    assert_eq!(base.len(), 3);
    assert_eq!(base, objects(&["create", "-f", &file("portolan.yaml")]));
}

/// Empties the tables of a node, as a boot does.
pub(crate) fn clean(node: &Node) {
    let [program, pins] = [portolan().unwrap(), node.bpffs().join("portolan")];
    let arguments = ["cleanup", "--keep-state", "--bpffs", pins.to_str().unwrap()];
    node.place().run(program.to_str().unwrap(), &arguments).unwrap();
}

/// C3: installed, updated, deleted: none of that costs a connection. Then nothing is left.
#[test]
fn a_daemon_set_serves_a_cluster_until_it_is_cleaned_up() {
    let cluster = raise();
    assert_the_base_is_the_manifest(&cluster);
    install(&cluster);

    cluster.web("installed", 2, 30_111);
    let to = [at(cluster.cluster_ip("installed"), PORT), at(cluster.lab.node(0).address(), 30_111)];
    cluster.wait_until_served(to);
    for node in cluster.lab.nodes() {
        eventually("every node has the Service", || services(node).contains("installed"));
    }

    let before = cluster.pod_uids(LABEL);
    assert_eq!(before.len(), 3);
    let made = cluster.under_new_connections(to, || {
        kubectl(&cluster, &["rollout", "restart", "daemonset", "portolan"]);
        wait_for(&cluster, "portolan");
    });
    assert!(made > 20, "{made} connections say nothing");
    let after = cluster.pod_uids(LABEL);
    assert!(after.len() == 3 && before.is_disjoint(&after), "all pods were replaced: {before:?}, {after:?}");

    let made = cluster.under_new_connections(to, || {
        kubectl(&cluster, &["delete", "-f", &file("portolan.yaml")]);
        eventually("the agents are gone", || cluster.pod_uids(LABEL) == [String::new()].into());
        std::thread::sleep(Duration::from_secs(1));
    });
    assert!(made > 20, "{made} connections say nothing");

    kubectl(&cluster, &["apply", "-f", &file("cleanup.yaml")]);
    wait_for(&cluster, "portolan-cleanup");
    // The kernel lets go of a program a moment after its pin.
    eventually("nobody serves", || {
        cluster.shell().tcp(to[0]).is_err() && cluster.outside().tcp(to[1]).is_err()
    });
    for node in cluster.lab.nodes() {
        for folder in [node.bpffs(), node.run_folder(), node.state_folder()] {
            assert_eq!(
                std::fs::read_dir(&folder).unwrap().count(),
                0,
                "{} has something left",
                folder.display()
            );
        }
    }
}

/// C3: a node whose init system mounts no BPF file system, as those of kind, is given one before its agent starts, again after a
/// restart, and none beside one that is there.
#[test]
fn a_node_without_a_bpf_file_system_is_given_one() {
    let cluster = raise_on(&Options::default().bpffs(false));
    let node = cluster.lab.node(0);
    // The clean-up finds nothing to do, and says no error.
    kubectl(&cluster, &["apply", "-f", &file("cleanup.yaml")]);
    wait_for(&cluster, "portolan-cleanup");
    kubectl(&cluster, &["delete", "-f", &file("cleanup.yaml")]);
    assert_eq!(mounts(node), ["tmpfs"]);

    install(&cluster);
    assert_eq!(mounts(node), ["tmpfs", "bpf"]);
    cluster.web("mounted", 2, 30_113);
    let to = [at(cluster.cluster_ip("mounted"), PORT), at(node.address(), 30_113)];
    cluster.wait_until_served(to);

    let made = cluster.under_new_connections(to, || {
        kubectl(&cluster, &["rollout", "restart", "daemonset", "portolan"]);
        wait_for(&cluster, "portolan");
    });
    assert!(made > 20, "{made} connections say nothing");
    assert_eq!(mounts(node), ["tmpfs", "bpf"]);

    kubectl(&cluster, &["delete", "-f", &file("portolan.yaml")]);
    eventually("the agents are gone", || cluster.pod_uids(LABEL) == [String::new()].into());
    for node in cluster.lab.nodes() {
        node.unmount_bpffs().unwrap();
    }
    eventually("nobody serves", || {
        cluster.shell().tcp(to[0]).is_err() && cluster.outside().tcp(to[1]).is_err()
    });
    kubectl(&cluster, &["apply", "-f", &file("portolan.yaml")]);
    wait_for(&cluster, "portolan");
    assert_eq!(mounts(node), ["tmpfs", "bpf"]);
    cluster.wait_until_served(to);
}

/// The kinds of the file systems that are mounted where a node has its BPF file system, one upon the other.
fn mounts(node: &Node) -> Vec<String> {
    let at = node.bpffs();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let here = fields.filter(|fields| Path::new(fields[1]) == at);
    here.map(|fields| fields[2].to_owned()).collect()
}

/// C5: the rules that kube-proxy leaves behind serve until the programs come before them. The connections that they have go on,
/// also when the rules are gone.
#[test]
fn a_cluster_goes_over_from_kube_proxy_and_no_connection_fails() {
    let cluster = raise();
    let start = |node: &Arc<Node>| {
        let command = cluster.plane.kube_proxy(node, "nftables").unwrap();
        Process::start(&cluster.lab.logs(), &format!("kube-proxy-{}", node.name()), command).unwrap()
    };
    for node in cluster.lab.nodes() {
        // A rule that asks for the state of connections has the kernel load conntrack, and with it its settings.
        let load =
            "add table inet t; add chain inet t c; add rule inet t c ct state new; delete table inet t";
        node.place().run("nft", &[load]).unwrap();
        node.place().sysctl("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "1").unwrap();
        // What any pod network that masquerades has: a rule, for a chain alone has netfilter translate nothing.
        for what in [
            "table inet pods",
            "chain inet pods out { type nat hook postrouting priority srcnat ; }",
            "rule inet pods out oifname nothing masquerade",
        ] {
            node.place().run("nft", &[&format!("add {what}")]).unwrap();
        }
    }
    let image = "registry.k8s.io/kube-proxy:lab";
    cluster
        .plane
        .make_image(image, &cluster.plane.kube_proxy_program(), "/usr/local/bin/kube-proxy")
        .unwrap();
    let proxies: Vec<_> = cluster.lab.nodes().iter().map(start).collect();
    cluster.web("moved", 2, 30_112);
    let to = [at(cluster.cluster_ip("moved"), PORT), at(cluster.lab.node(0).address(), 30_112)];
    cluster.wait_until_served(to);
    let clients = [cluster.shell(), cluster.outside()].map(|client| client.timeout(Duration::from_secs(20)));
    let calls = clients.iter().zip(to);
    let mut old: Vec<_> = calls.flat_map(|(client, to)| client.connect_many(to, 10).unwrap()).collect();
    let mut answers = || -> Vec<_> { old.iter_mut().map(|stream| stream.ask().unwrap().pod).collect() };
    let before = answers();
    let made = cluster.under_new_connections(to, || {
        for proxy in &proxies {
            proxy.terminate(Duration::from_secs(20)).unwrap();
        }
        install(&cluster);
        for node in cluster.lab.nodes() {
            eventually("every node has the Service", || services(node).contains("moved"));
        }
        for _ in 0..5 {
            assert_eq!(answers(), before);
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    assert!(made > 20, "{made} connections say nothing");
    for node in [cluster.lab.node(0), cluster.lab.node(2)] {
        assert!(takes_over(node), "connections are left to the rules");
        assert_eq!(node.metric("portolan_taking_over "), Some(1.0));
        let left = take_over(node);
        assert!(left.starts_with("10 TCP connections are left to another proxy's rules"), "{left}");
        assert_eq!(left.matches("default/moved:http   ESTABLISHED").count(), 10, "{left}");
    }

    let made = cluster.under_new_connections(to, || {
        let manifest = std::fs::read_to_string(file("kube-proxy-cleanup.yaml")).unwrap();
        let manifest = manifest.replace("KUBE_PROXY_VERSION", "lab");
        cluster.plane.kubectl(&["apply", "-f", "-"], &manifest).unwrap();
        wait_for(&cluster, "kube-proxy-cleanup");
        for node in cluster.lab.nodes() {
            let tables = node.place().run("nft", &["list", "tables"]).unwrap();
            assert_eq!(tables, "table inet pods\ntable inet portolan\n", "{}", node.name());
        }
        for _ in 0..3 {
            assert_eq!(answers(), before, "netfilter knows them without rules");
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    assert!(made > 20, "{made} connections say nothing");

    drop(old);
    for node in cluster.lab.nodes() {
        eventually("the last of the rules' connections has ended", || {
            node.metric("portolan_taking_over ") == Some(0.0)
        });
        assert!(!takes_over(node));
        assert_eq!(take_over(node), "No connection is left to another proxy.\n");
    }
}
