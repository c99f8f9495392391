//! What an operator asks a node: `portolan status` with an agent, without one, and without anything.

use crate::health::until;
use dataplane_tests::lab::{AgentOptions, Lab, Options, PodOptions, Service};
use serde_json::Value;
use std::net::Ipv4Addr;

const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 13, 1);

fn lab() -> Lab {
    let lab = Options::default().nodes(1).create().unwrap();
    lab.add_pod("web", 0, &PodOptions::default()).unwrap();
    let web = lab.pod("web").unwrap().endpoint();
    lab.manifests()
        .apply(&Service::new("web", ADDRESS).tcp_node_port(80, 8080, 32_113).endpoints([web]))
        .unwrap();
    lab
}

fn status(lab: &Lab, arguments: &[&str]) -> (i32, String) {
    let (code, out, err) = lab.node(0).portolan_verdict(&[&["status"], arguments].concat()).unwrap();
    assert!(err.is_empty(), "{err}");
    (code, out)
}

fn json(lab: &Lab) -> Value {
    serde_json::from_str(&status(lab, &["-o", "json"]).1).unwrap()
}

/// H2, C3
#[test]
fn one_screen_tells_how_a_node_is_and_the_exit_code_says_it_too() {
    let lab = lab();
    let (code, text) = status(&lab, &[]);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("holds nothing of Portolan") && text.contains("nothing is served"), "{text}");

    lab.start_agents(&AgentOptions::default()).unwrap();
    let (code, text) = status(&lab, &[]);
    assert_eq!(code, 0, "{text}");
    assert!(text.starts_with("✓ node-1: all is well\n"), "{text}");
    for part in
        ["1 service ports, 3 frontends, 1 endpoints", "eth0 (", "connect4", "no trace", "none occurred"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    println!("{text}");
    let page = json(&lab);
    assert_eq!(page["verdict"], "well");
    assert_eq!(page["agent"]["node"], "node-1");
    assert_eq!(page["agent"]["trouble"], Value::Null);
    assert_eq!(page["agent"]["source"]["watches"].as_array().unwrap().len(), 4);
    assert_eq!((&page["kernel"]["service_ports"], &page["kernel"]["endpoints"]), (&1.into(), &1.into()));
    let (code, yaml) = status(&lab, &["-o", "yaml"]);
    assert!(code == 0 && yaml.starts_with("verdict: well\n"), "{yaml}");
    let wide = status(&lab, &["-o", "wide"]).1;
    assert!(wide.contains("eth0: tc_uplink_in") && wide.contains("affinity 0 of"), "{wide}");

    lab.node(0).agent().unwrap().kill();
    let (code, text) = status(&lab, &[]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("what is in the kernel is served, and nothing changes any more"), "{text}");
    assert_eq!(status(&lab, &["--allow-warnings"]).0, 0);
    assert_eq!(json(&lab)["kernel"]["service_ports"], 1);
}

/// H2, Z5: what somebody should look at is a finding, and no ill health.
#[test]
fn what_somebody_should_look_at_is_named() {
    let lab = lab();
    lab.start_agents(&AgentOptions::default()).unwrap();
    let again = "add table ip nat; add chain ip nat KUBE-SERVICES; add table ip kube-proxy; \
                 add chain ip kube-proxy services";
    lab.node(0).place().run("nft", &[again]).unwrap();
    let (code, text) = status(&lab, &[]);
    assert_eq!(code, 3, "{text}");
    let traces = "chain KUBE-SERVICES of iptables, table nat, table kube-proxy of nftables";
    assert!(text.contains(traces), "{text}");
    lab.node(0).place().run("nft", &["delete table ip nat; delete table ip kube-proxy"]).unwrap();
    assert_eq!(status(&lab, &[]).0, 0);

    let odd = "apiVersion: v1\nkind: Service\nmetadata: {namespace: default, name: odd}\nspec: {clusterIP: 10.96.13.2, \
               externalIPs: [127.0.0.9], ports: [{port: 80}]}\n";
    lab.manifests().write("odd.yaml", odd).unwrap();
    until("it is told", || status(&lab, &[]).1.contains("1 × RefusedAddress"));
    assert_eq!(status(&lab, &[]).0, 3);
}

/// H2: kube-proxy that comes back is told of where nobody asks, and again when it comes again; what was there before is not.
#[test]
fn another_proxy_that_comes_back_is_noticed() {
    let lab = lab();
    let node = lab.node(0);
    let nft = |script: &str| node.place().run("nft", &[script]).unwrap();
    let traces = || lab.node(0).metric("portolan_other_proxy_traces ");
    let told = || node.agent().unwrap().process().log().matches("another Service proxy has come").count();
    let comes = "add table ip kube-proxy; add chain ip kube-proxy services";
    nft(comes);
    lab.start_agents(&AgentOptions::default()).unwrap();
    until("what was there is counted", || traces() == Some(1.0));
    nft("delete table ip kube-proxy");
    until("it is gone", || traces() == Some(0.0));
    assert_eq!(told(), 0);
    nft(comes);
    until("it is back", || traces() == Some(1.0));
    assert_eq!(told(), 1);
}

/// A script that each shell takes.
#[test]
fn shells_complete_the_verbs() {
    let lab = Options::default().nodes(1).create().unwrap();
    let portolan = dataplane_tests::lab::portolan().unwrap();
    let portolan = portolan.to_str().unwrap();
    let script = lab.node(0).place().run(portolan, &["completion", "bash"]).unwrap();
    let words = "source <(\"$0\" completion bash) && COMP_WORDS=(portolan sta) COMP_CWORD=1 && \
                 _portolan portolan sta portolan && echo \"${COMPREPLY[@]}\"";
    assert!(script.contains("_portolan"), "{script}");
    assert_eq!(lab.node(0).place().run("bash", &["-c", words, portolan]).unwrap(), "status\n");
}

fn check(lab: &Lab, arguments: &[&str]) -> (i32, Vec<Value>) {
    let all = [&["check", "-o", "json"], arguments].concat();
    let (code, out, err) = lab.node(0).portolan_verdict(&all).unwrap();
    let page: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    (code, page["checks"].as_array().unwrap().clone())
}

/// What was found of one thing: verdict, text, and what helps.
fn found(checks: &[Value], check: &str) -> (String, String, String) {
    let line =
        checks.iter().find(|line| line["check"] == check).unwrap_or_else(|| panic!("{check}: {checks:?}"));
    let text = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
    (text("verdict"), text("found"), text("helps"))
}

/// F2, P1, P12: before an install a node is told what it lacks, and afterwards what it serves badly.
#[test]
fn a_node_is_checked_before_an_install_and_after() {
    let lab = lab();
    let cgroup = lab.node(0).cgroup().display().to_string();
    let own = ["--cgroup", &cgroup];
    let (code, checks) = check(&lab, &own);
    assert_eq!(code, 3, "{checks:?}");
    for what in
        ["rights", "kernel", "cgroup2", "BPF file system", "forwarding", "source ports", "other proxies"]
    {
        assert_eq!(found(&checks, what).0, "well", "{checks:?}");
    }
    assert_eq!(found(&checks, "health port").1, "10256 is free");
    assert_eq!(found(&checks, "API server").1, "not asked");

    let stranger =
        lab.node(0).place().enter(|| std::net::TcpListener::bind("0.0.0.0:10256").unwrap()).unwrap();
    let (code, checks) = check(&lab, &own);
    let (verdict, text, _) = found(&checks, "health port");
    assert!(code == 4 && verdict == "failing" && text.contains("is taken by "), "{text}");
    drop(stranger);
    let (code, checks) = check(&lab, &[&own[..], &["--snat-ports", "40000-50000"]].concat());
    let (verdict, text, helps) = found(&checks, "source ports");
    assert!(code == 4 && verdict == "failing" && text.contains("overlap"), "{text}");
    assert!(helps.contains("ip_local_port_range"), "{helps}");

    lab.start_agents(&AgentOptions::default()).unwrap();
    let (code, checks) = check(&lab, &own);
    assert_eq!(code, 0, "{checks:?}");
    assert!(found(&checks, "agent").1.ends_with("serves node-1"), "{checks:?}");
    assert_eq!(found(&checks, "health port").1, "10256 is the agent's");
    assert_eq!(found(&checks, "endpoints").1, "each of 1 service ports has one");
    lab.manifests().apply(&Service::new("empty", Ipv4Addr::new(10, 96, 13, 3)).tcp(80, 8080)).unwrap();
    until("a Service without endpoints is named", || {
        let (code, checks) = check(&lab, &own);
        code == 3 && found(&checks, "endpoints").1.contains("default/empty")
    });
}

/// One archive, from a node with an agent.
#[test]
fn a_report_has_what_the_verbs_show() {
    let lab = lab();
    lab.start_agents(&AgentOptions::default()).unwrap();
    // They are written beside what serves.
    until("the names of Services are there", || {
        lab.node(0).portolan(&["services"]).unwrap().contains("default/web")
    });
    let file = lab.logs().join("report.tar.gz");
    let (code, out, err) = lab.node(0).portolan_verdict(&["report", "-o", file.to_str().unwrap()]).unwrap();
    assert_eq!((code, out), (0, format!("wrote {}\n", file.display())), "{err}");
    let list = lab.node(0).place().run("tar", &["-tzf", file.to_str().unwrap()]).unwrap();
    for name in [
        "status.json",
        "check.json",
        "services.json",
        "flows.json",
        "drops.json",
        "metrics.txt",
        "interfaces.txt",
    ] {
        assert!(list.lines().any(|line| line == format!("portolan-report/{name}")), "{name} in {list}");
    }
    assert!(!list.contains(".error"), "{list}");
    let text = |name: &str| {
        let member = format!("portolan-report/{name}");
        lab.node(0).place().run("tar", &["-xOzf", file.to_str().unwrap(), &member]).unwrap()
    };
    assert!(
        text("services.json").contains("default/web") && text("metrics.txt").contains("portolan_healthy 1")
    );
}

/// All nodes from a workstation: a `kubectl` that enters the lab's nodes.
#[test]
fn all_nodes_are_asked_by_kubectl_a_row_each() {
    let lab = Options::default().nodes(2).create().unwrap();
    lab.add_pod("web", 0, &PodOptions::default()).unwrap();
    let web = lab.pod("web").unwrap().endpoint();
    lab.manifests().apply(&Service::new("web", ADDRESS).tcp(80, 8080).endpoints([web])).unwrap();
    lab.start_agents(&AgentOptions::default()).unwrap();
    let pods: Vec<_> = lab
        .nodes()
        .iter()
        .map(|node| serde_json::json!({ "metadata": { "namespace": "kube-system", "name": format!("portolan-{}", node.name()) },
                                        "spec": { "nodeName": node.name() } }))
        .collect();
    let folder = lab.folder().join("workstation");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("pods.json"), serde_json::json!({ "items": pods }).to_string()).unwrap();
    for node in lab.nodes() {
        let page = node.portolan_verdict(&["status", "-o", "json"]).unwrap().1;
        std::fs::write(folder.join(format!("portolan-{}.json", node.name())), page).unwrap();
    }
    let script = "#!/bin/bash\nset -e\ncd \"$(dirname \"$0\")\"\n\
                  case $1 in get) cat pods.json ;; exec) echo \"$*\" > asked; cat \"$4.json\"\n\
                  echo 'command terminated with exit code 3' >&2; exit 3 ;; esac\n";
    let kubectl = folder.join("kubectl");
    std::fs::write(&kubectl, script).unwrap();
    std::fs::set_permissions(&kubectl, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let run_with = |arguments: &[&str]| {
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
        let mut command = std::process::Command::new(dataplane_tests::lab::portolan().unwrap());
        let output = command.args(arguments).env("PATH", path).output().unwrap();
        let [out, err] =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        (output.status.code(), out, err)
    };
    let run = || {
        let (code, out, _) = run_with(&["status", "--all-nodes"]);
        (code, out)
    };
    // One of them: its own page, and the exit code of the verb there.
    let (code, page, err) = run_with(&["status", "-o", "json", "--node", "node-2"]);
    assert_eq!((code, err.as_str()), (Some(3), ""));
    assert_eq!(page, std::fs::read_to_string(folder.join("portolan-node-2.json")).unwrap());
    let asked = std::fs::read_to_string(folder.join("asked")).unwrap();
    assert!(asked.trim().ends_with("--container portolan -- portolan status -o json"), "{asked}");
    let (code, _, err) = run_with(&["services", "--node=node-9"]);
    assert!(code == Some(1) && err.contains("nodes that have one: node-1, node-2"), "{err}");
    let (code, text) = run();
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(text.lines().count(), 3, "{text}");
    assert!(text.contains("✓   node-1") && text.contains("✓   node-2"), "{text}");
    // A report of all: what each pod writes, and its log; one that writes none does not take the others along.
    let own = folder.join("own.tar.gz");
    lab.node(0).portolan(&["report", "-o", own.to_str().unwrap()]).unwrap();
    let reports = "#!/bin/bash\ncd \"$(dirname \"$0\")\"\n\
                   case \"$1 $*\" in get*) cat pods.json ;; logs*previous*) exit 1 ;; logs*) echo token eyJhbGciOi.eyJpc3Mi.c2ln of $4 ;;\n\
                   exec*node-1*report) cat own.tar.gz ;; *) echo it is away >&2; exit 1 ;; esac\n";
    std::fs::write(&kubectl, reports).unwrap();
    let all = folder.join("all.tar.gz");
    let (code, out, err) = run_with(&["report", "--all-nodes", "-o", all.to_str().unwrap()]);
    assert_eq!((code, out), (Some(0), format!("wrote {}\n", all.display())), "{err}");
    let member = |name: &str| {
        let member = format!("portolan-report/{name}");
        lab.node(0).place().run("tar", &["-xOzf", all.to_str().unwrap(), &member]).unwrap()
    };
    assert!(member("node-1/services.json").contains("default/web"));
    assert_eq!(member("node-1/log.txt"), "token [struck out] of portolan-node-1\n");
    assert_eq!(member("node-2.error"), "it is away\n");
    let (code, _, err) = run_with(&["report", "--node=node-9", "-o", all.to_str().unwrap()]);
    assert!(code == Some(1) && err.contains("nodes that have one: node-1, node-2"), "{err}");
    std::fs::write(&kubectl, script).unwrap();
    std::fs::remove_file(folder.join("portolan-node-2.json")).unwrap();
    let (code, text) = run();
    assert!(code == Some(4) && text.contains("✗   node-2") && text.contains("does not answer"), "{text}");
}
