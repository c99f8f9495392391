//! Netfilter's part of P4: the rules that translate clients from outside where the endpoint is a pod of this node. And what the
//! operator's own rules in netfilter come too late for (S2).

use crate::world::eventually;
use dataplane_tests::lab::{AgentOptions, Client, Family, Lab, Options, PodOptions, Service, at};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::process::Stdio;
use std::time::Duration;

const PORT: u16 = 80;
const TARGET: u16 = 8080;
const NODE_PORT: u16 = 30_080;
const V4: Ipv4Addr = Ipv4Addr::new(10, 96, 12, 1);
const V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0xc, 1);

/// A node with a server behind a node port, and no agent yet.
fn lab() -> Lab {
    let lab = Options::default().nodes(1).create().unwrap();
    lab.add_pod("web-1", 0, &PodOptions::default()).unwrap();
    let web = lab.pod("web-1").unwrap().endpoint();
    let service = Service::new("marked", V4).and_cluster_ip(V6);
    let service = service.tcp_node_port(PORT, TARGET, NODE_PORT).udp_node_port(PORT, TARGET, NODE_PORT);
    lab.manifests().apply(&service.endpoints([web])).unwrap();
    lab
}

fn start(lab: &Lab, arguments: &[&str]) {
    lab.node(0).start_agent(&AgentOptions::default().arguments(arguments)).unwrap();
}

fn nft(lab: &Lab, arguments: &[&str]) -> String {
    lab.node(0).place().run("nft", arguments).unwrap()
}

/// What the server saw of the client outside, by TCP and UDP and in both families.
fn seen(lab: &Lab) -> Vec<(Family, IpAddr, u16)> {
    let client = Client::at(lab.client());
    let mut seen = Vec::new();
    for family in Family::BOTH {
        let to = at(lab.node(0).ip(family), NODE_PORT);
        for (transport, asked) in [("TCP", client.tcp(to)), ("UDP", client.udp(to))] {
            let answer = asked.unwrap_or_else(|failure| panic!("{transport} {to}: {failure:?}"));
            seen.push((family, answer.client_ip(), answer.client.port()));
        }
    }
    seen
}

/// Whether the server sees addresses of the node; else it sees the client's own.
fn is_masqueraded(lab: &Lab) -> bool {
    let seen = seen(lab);
    let is_client = |(family, ip, _): &(Family, IpAddr, u16)| *ip == lab.client_addresses().of(*family);
    let clients = seen.iter().filter(|one| is_client(one)).count();
    assert!(clients == 0 || clients == seen.len(), "{seen:?}");
    clients == 0
}

/// P4, P12
#[test]
fn the_mark_and_the_ports_are_those_of_the_flags_and_nft_can_read_its_own_list() {
    let lab = lab();
    start(&lab, &["--masquerade-bit=20", "--masquerade-ports=2000-2099"]);
    assert!(seen(&lab).iter().all(|(.., port)| (2_000..2_100).contains(port)), "{:?}", seen(&lab));
    assert!(is_masqueraded(&lab));
    let table = nft(&lab, &["list", "table", "inet", "portolan"]);
    for part in [
        "0x00100000",
        "masquerade to :2000-2099 fully-random",
        "\"portolan sctp: mark 0x100000 to ports 2000-2099\"",
    ] {
        assert!(table.contains(part), "{part} in {table}");
    }
    let mut check = lab.node(0).place().command("nft").unwrap();
    let mut check = check.args(["--check", "--file", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    check.stdin.take().unwrap().write_all(table.as_bytes()).unwrap();
    assert!(check.wait().unwrap().success(), "{table}");
}

/// P4: within a second, and told.
#[test]
fn rules_that_something_flushes_or_changes_are_back_within_a_second() {
    let lab = lab();
    start(&lab, &[]);
    assert!(is_masqueraded(&lab));
    let changes: [&[&str]; 3] = [
        &["flush", "ruleset"],
        &["flush", "table", "inet", "portolan"],
        &["delete", "chain", "inet", "portolan", "postrouting"],
    ];
    for (number, change) in changes.iter().enumerate() {
        nft(&lab, change);
        std::thread::sleep(Duration::from_secs(1));
        assert!(is_masqueraded(&lab), "{change:?}");
        assert_eq!(lab.node(0).metric("portolan_masquerade_restored_total "), Some(number as f64 + 1.0));
    }
    assert!(lab.node(0).agent().unwrap().process().log().contains("it is back"));
}

/// C3: the rules outlive the agent, the next one finds them, and `cleanup` takes them away and no one else's.
#[test]
fn the_rules_stay_between_agents_and_go_with_cleanup() {
    let lab = lab();
    nft(&lab, &["add", "table", "inet", "others"]);
    start(&lab, &[]);
    lab.node(0).agent().unwrap().kill();
    assert!(is_masqueraded(&lab), "without an agent");
    start(&lab, &[]);
    assert!(is_masqueraded(&lab), "by the next agent");
    assert_eq!(lab.node(0).metric("portolan_masquerade_restored_total "), Some(0.0));
    lab.node(0).agent().unwrap().kill();
    let removed = lab.node(0).portolan(&["cleanup"]).unwrap();
    assert!(removed.contains("nftables table inet portolan"), "{removed}");
    assert_eq!(nft(&lab, &["list", "tables"]).trim(), "table inet others");
}

/// P4: served all the same, with the client's own address; an error, and a metric. As soon as the kernel does it, it is done.
#[test]
fn where_netfilter_does_not_translate_clients_keep_their_source_and_that_is_told() {
    let lab = lab();
    let mut owner = lab.node(0).place().command("nft").unwrap();
    let mut owner = owner.arg("--interactive").stdin(Stdio::piped()).spawn().unwrap();
    let mut input = owner.stdin.take().unwrap();
    input.write_all(b"add table inet portolan { flags owner; }\n").unwrap();
    eventually("the table has another owner", || nft(&lab, &["list", "tables"]).contains("portolan"));
    start(&lab, &[]);
    assert!(!is_masqueraded(&lab));
    assert_eq!(lab.node(0).metric("portolan_masquerading "), Some(0.0));
    let log = lab.node(0).agent().unwrap().process().log();
    assert!(log.contains("cannot have netfilter masquerade clients from outside"), "{log}");
    drop(input);
    owner.wait().unwrap();
    eventually("netfilter translates", || lab.node(0).metric("portolan_masquerading ") == Some(1.0));
    eventually("and the programs mark", || {
        seen(&lab).iter().all(|(family, ip, _)| *ip != lab.client_addresses().of(*family))
    });
}

/// P4
#[test]
fn with_the_flag_there_are_no_rules_and_endpoints_see_the_client() {
    let lab = lab();
    start(&lab, &["--keep-client-source"]);
    assert!(!is_masqueraded(&lab));
    assert!(!nft(&lab, &["list", "tables"]).contains("portolan"));
}

/// A setting of the node's kernel, and another value for it.
fn setting(lab: &Lab, name: &str, value: Option<&str>) -> String {
    let path = format!("/proc/sys/net/{name}");
    if let Some(value) = value {
        lab.node(0).place().run("sh", &["-c", &format!("echo '{value}' > {path}")]).unwrap();
    }
    lab.node(0).place().run("cat", &[&path]).unwrap().trim().to_owned()
}

/// P4: what goes to pods passes conntrack, which has the times that kube-proxy gives it, those of the flags, or those that it had.
#[test]
fn conntrack_has_the_times_that_kube_proxy_gives_it() {
    const NAMES: [&str; 2] =
        ["netfilter/nf_conntrack_tcp_timeout_established", "netfilter/nf_conntrack_tcp_timeout_close_wait"];
    let lab = lab();
    start(&lab, &[]);
    assert_eq!(NAMES.map(|name| setting(&lab, name, None)), ["86400", "3600"]);
    lab.node(0).agent().unwrap().stop().unwrap();
    start(&lab, &["--conntrack-tcp-timeout-established=2h", "--conntrack-tcp-timeout-close-wait=0"]);
    assert_eq!(NAMES.map(|name| setting(&lab, name, None)), ["7200", "3600"]);
    let told = lab.node(0).place().run(
        dataplane_tests::lab::portolan().unwrap().to_str().unwrap(),
        &["set-conntrack", "--conntrack-tcp-timeout-close-wait=30m"],
    );
    let told = told.unwrap();
    assert!(told.contains("nf_conntrack_tcp_timeout_close_wait: 3600 before, 1800 now"), "{told}");
    assert_eq!(NAMES.map(|name| setting(&lab, name, None)), ["86400", "1800"]);
}

/// P12: ports that sockets of the node may get as well are told.
#[test]
fn ports_that_sockets_may_get_are_told() {
    const TOLD: &str = "sockets of the node may get ports of --masquerade-ports, 1024 to 14999";
    let lab = lab();
    setting(&lab, "ipv4/ip_local_port_range", Some("1024 65535"));
    start(&lab, &[]);
    // The log goes on where the next agent begins.
    let told = || lab.node(0).agent().unwrap().process().log().matches(TOLD).count();
    assert_eq!(told(), 1);
    lab.node(0).agent().unwrap().stop().unwrap();
    setting(&lab, "ipv4/ip_local_reserved_ports", Some("1024-14999,61000-65535"));
    start(&lab, &[]);
    assert_eq!(told(), 1);
}

/// S2: who may call from outside follows the file, live, and what is dropped has a name.
#[test]
fn sources_that_the_file_denies_meet_silence_until_it_says_something_else() {
    let lab = lab();
    let file = std::env::temp_dir().join(format!("sources-{}.yaml", std::process::id()));
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    let clients = lab.client_addresses();
    start(&lab, &["--sources-file", file.to_str().unwrap()]);
    assert_eq!(seen(&lab).len(), 4, "everybody may call");
    let refused = |what: &str| {
        eventually(what, || {
            let client = Client::at(lab.client()).timeout(Duration::from_millis(300));
            Family::BOTH.iter().all(|family| {
                let to = at(lab.node(0).ip(*family), NODE_PORT);
                client.tcp(to).is_err() && client.udp(to).is_err()
            })
        });
    };
    write(&format!("deniedSources: ['{}/32', '{}/128']", clients.v4, clients.v6));
    refused("the client is denied");
    write("nodePortSources: ['10.99.0.0/16', 'fd00:99::/32']");
    refused("the client is none of those who may");
    write(&format!("nodePortSources: ['{}/32', '{}/128']", clients.v4, clients.v6));
    eventually("the client may call", || {
        let client = Client::at(lab.client()).timeout(Duration::from_millis(300));
        Family::BOTH.iter().all(|family| client.tcp(at(lab.node(0).ip(*family), NODE_PORT)).is_ok())
    });
    let drops = lab.node(0).portolan(&["drops"]).unwrap();
    assert!(drops.contains("source-denied") && drops.contains("node-port-source"), "{drops}");
    std::fs::remove_file(&file).unwrap();
}
