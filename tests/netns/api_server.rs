//! Agents whose API server refuses, forgets, dawdles, falls silent or is not there: what is served goes on, what changed comes
//! when it is over, and the log says once what to check.

use crate::world::eventually;
use dataplane_tests::api_server::{ApiServer, Treatment, kubeconfig};
use dataplane_tests::lab::{self, AgentOptions, Client, Lab, Node, Options, PodOptions, Service, Source, at};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

pub(crate) const KEPT: Ipv4Addr = Ipv4Addr::new(10, 96, 8, 1);
pub(crate) const PORT: u16 = 80;

/// A node with an agent to be, and an API server on it that knows the Node and one Service.
pub(crate) struct Scene {
    pub(crate) server: ApiServer,
    pub(crate) lab: Lab,
}

fn node_object(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Node", "metadata": { "name": name } })
}

impl Scene {
    pub(crate) fn set(node_name: &str) -> Self {
        let lab = Options::default().nodes(1).create().unwrap();
        lab.add_pod("web", 0, &PodOptions::default()).unwrap();
        lab.add_pod("shell", 0, &PodOptions::client()).unwrap();
        let server = ApiServer::start(lab.node(0).place()).unwrap();
        server.put(node_object(node_name));
        server.put(json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": { "name": "kubernetes" },
            "spec": { "cidrs": ["10.96.0.0/16"] },
        }));
        let scene = Self { server, lab };
        scene.put(&scene.service("kept", KEPT));
        scene
    }

    pub(crate) fn service(&self, name: &str, address: Ipv4Addr) -> Service {
        Service::new(name, address).tcp(PORT, 8080).endpoints([self.lab.pod("web").unwrap().endpoint()])
    }

    pub(crate) fn put(&self, service: &Service) {
        service.objects().into_iter().for_each(|object| self.server.put(object));
    }

    pub(crate) fn node(&self) -> &Node {
        self.lab.node(0)
    }

    pub(crate) fn launch(&self) {
        self.launch_with(&self.server.kubeconfig(self.lab.folder()).unwrap());
    }

    fn launch_with(&self, kubeconfig: &Path) {
        let options = AgentOptions::default().source(Source::Kubeconfig(kubeconfig.into()));
        self.node().launch_agent(&options).unwrap();
    }

    /// Such an agent, with these flags as well.
    pub(crate) fn options(&self, arguments: &[&str]) -> AgentOptions {
        let kubeconfig = self.server.kubeconfig(self.lab.folder()).unwrap();
        AgentOptions::default().source(Source::Kubeconfig(kubeconfig)).arguments(arguments)
    }

    pub(crate) fn log(&self) -> String {
        self.node().agent().unwrap().process().log()
    }

    /// Waits until the log says so; no line before it said that the agent is ready.
    #[track_caller]
    pub(crate) fn says(&self, words: &[&str]) {
        let found = || {
            let log = self.log();
            log.lines().any(|line| words.iter().all(|word| line.contains(word)))
        };
        eventually(&format!("the log says {words:?}"), found);
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.node().agent().unwrap().process().output().lines().any(|line| line == "ready")
    }

    pub(crate) fn shell(&self) -> Client {
        Client::at(self.lab.pod("shell").unwrap().place())
    }

    pub(crate) fn serves(&self, address: Ipv4Addr) -> bool {
        self.shell().tcp(at(address, PORT)).is_ok()
    }

    /// Whether nobody answers there for a moment.
    fn is_silent(&self, address: Ipv4Addr) -> bool {
        self.shell().timeout(Duration::from_millis(300)).tcp(at(address, PORT)).is_err()
    }
}

#[test]
fn an_agent_that_is_not_let_in_says_why_and_waits() {
    let scene = Scene::set("node-1");
    scene.server.treat("", Treatment::Refused(401));
    scene.launch();
    scene.says(&["does not know these credentials (401)", "kubeconfig", "trying again"]);
    for verb in ["list", "watch"] {
        let request = format!("{verb} endpointslices");
        scene.server.relent();
        scene.server.treat(&request, Treatment::Refused(403));
        scene.says(&[
            &format!("{request}.discovery.k8s.io: forbidden (403)"),
            "needs the verbs list and watch",
        ]);
        if verb == "list" {
            assert!(!scene.is_ready(), "it has not heard of all endpoints");
        }
    }
    scene.server.relent();
    scene.node().wait_for_agent().unwrap();
    eventually("it serves", || scene.serves(KEPT));
    scene.says(&["following http://", "again"]);
}

#[test]
fn a_server_that_is_not_there_is_named_with_what_to_check() {
    let scene = Scene::set("node-1");
    let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let no_route = SocketAddr::from((Ipv4Addr::new(203, 0, 113, 1), 6443));
    scene.node().place().ip(&["route add unreachable 203.0.113.0/24".into()]).unwrap();
    for (address, check) in [
        (nobody, "is the API server running, and is this its address?"),
        (no_route, "check the route and the firewall"),
    ] {
        scene.launch_with(&kubeconfig(scene.lab.folder(), address).unwrap());
        scene.says(&[&format!("no answer from http://{address}"), check]);
        assert!(!scene.is_ready());
        scene.node().agent().unwrap().kill();
    }
}

#[test]
fn an_unknown_node_name_is_answered_with_those_there_are() {
    let scene = Scene::set("other-1");
    scene.server.put(node_object("other-2"));
    scene.launch();
    scene.says(&["there is no Node \"node-1\" (there are: other-1, other-2)", "--node-name", "waiting"]);
    assert!(!scene.is_ready() && scene.is_silent(KEPT));
    scene.server.put(node_object("node-1"));
    scene.node().wait_for_agent().unwrap();
    assert!(scene.serves(KEPT));
}

/// New connections while something is done: how many there were, none of which failed.
pub(crate) fn under_new_connections(scene: &Scene, disturb: impl FnOnce()) -> usize {
    lab::under_new_connections(&[(scene.shell(), at(KEPT, PORT))], disturb).unwrap()
}

/// What the API server does to its clients, one after the other: nothing that is served is given up, and what changed
/// meanwhile is taken up.
fn disturbs_nothing(ills: &[(&str, Treatment)]) -> String {
    let scene = Scene::set("node-1");
    let gone = scene.service("gone", Ipv4Addr::new(10, 96, 8, 2));
    scene.put(&gone);
    scene.launch();
    scene.node().wait_for_agent().unwrap();
    let came = scene.service("came", Ipv4Addr::new(10, 96, 8, 3));
    let made = under_new_connections(&scene, || {
        for (requests, ill) in ills {
            let before = scene.server.asked_in_all();
            scene.server.treat(requests, ill.clone());
            eventually(&format!("the agent meets {ill:?}"), || scene.server.asked_in_all() > before);
        }
        gone.objects().iter().for_each(|object| scene.server.remove(object));
        scene.put(&came);
        std::thread::sleep(Duration::from_millis(100));
        assert!(scene.serves(Ipv4Addr::new(10, 96, 8, 2)), "nobody said that it is gone");
        scene.server.relent();
        eventually("what came meanwhile is served", || scene.serves(Ipv4Addr::new(10, 96, 8, 3)));
        eventually("what went meanwhile is gone", || scene.is_silent(Ipv4Addr::new(10, 96, 8, 2)));
    });
    assert!(made > 20, "{made} connections say nothing");
    scene.log()
}

/// How many lines of a log say so.
fn lines_with(log: &str, words: &str) -> usize {
    log.lines().filter(|line| line.contains(words)).count()
}

/// C3
#[test]
fn refusals_end_nothing_that_is_served_and_are_said_once() {
    let log = disturbs_nothing(&[
        ("", Treatment::Refused(401)),
        ("", Treatment::Refused(403)),
        ("", Treatment::Refused(500)),
    ]);
    for words in ["(401)", "forbidden (403)", "answered 500"] {
        let lines = lines_with(&log, words);
        // Each kind asks for itself, and a refusal names the kind.
        assert!((1..=4).contains(&lines), "{words} is said {lines} times:\n{log}");
    }
}

/// C3
#[test]
fn silence_and_broken_connections_end_nothing_that_is_served() {
    let log = disturbs_nothing(&[
        ("", Treatment::Cut),
        ("", Treatment::Silence),
        ("", Treatment::Slow(Duration::from_millis(700))),
    ]);
    assert!(lines_with(&log, "no answer from http://127.0.0.1") > 0, "{log}");
}

/// C3
#[test]
fn a_history_that_is_forgotten_is_listed_again_and_flushes_nothing() {
    let scene = Scene::set("node-1");
    let gone = scene.service("gone", Ipv4Addr::new(10, 96, 8, 9));
    scene.put(&gone);
    scene.launch();
    scene.node().wait_for_agent().unwrap();
    assert!(scene.serves(Ipv4Addr::new(10, 96, 8, 9)));
    let lists = scene.server.asked("list services");
    let made = under_new_connections(&scene, || {
        scene.server.treat("watch", Treatment::Cut);
        gone.objects().iter().for_each(|object| scene.server.remove(object));
        scene.server.forget();
        scene.server.relent();
        scene.says(&["watch services: too long ago", "(410): listing again"]);
        eventually("what went meanwhile is gone", || scene.is_silent(Ipv4Addr::new(10, 96, 8, 9)));
    });
    assert!(made > 20, "{made} connections say nothing");
    // Slices are listed by themselves, and may have been first.
    eventually("Services are listed again", || scene.server.asked("list services") > lists);
}

/// Z5, H2: a Service for which a table has no room is told so by an Event on it and counted by a metric, and is served when there is room.
#[test]
fn a_service_that_finds_no_room_gets_an_event_and_a_metric() {
    let scene = Scene::set("node-1");
    let last = |number: u8| Ipv4Addr::new(10, 96, 8, 20 + number);
    // Id 0 is nobody's, so there is room for `kept` and two more.
    scene.node().start_agent(&scene.options(&["--map-size=services=4"])).unwrap();
    let services = [1, 2, 3].map(|number| scene.service(&format!("s{number}"), last(number)));
    for (number, service) in services[..2].iter().enumerate() {
        scene.put(service);
        eventually("it is served", || scene.serves(last(number as u8 + 1)));
    }
    let waiting = || scene.node().metric("portolan_waiting_services ");
    assert_eq!(waiting(), Some(0.0));
    scene.put(&services[2]);
    let told = || {
        let events = scene.server.events().into_iter();
        let own = events.filter(|event| event["reason"] == "NoRoom");
        own.map(|event| (event["regarding"]["name"].clone(), event["note"].to_string())).collect::<Vec<_>>()
    };
    eventually("an Event tells of it", || !told().is_empty());
    for (name, note) in told() {
        assert_eq!(name, "s3");
        assert!(note.contains("--map-size services=N") && note.contains("its changes wait"), "{note}");
    }
    eventually("a metric counts it", || waiting() == Some(1.0));
    assert!(scene.serves(KEPT) && scene.serves(last(1)) && scene.serves(last(2)));
    services[0].objects().iter().for_each(|object| scene.server.remove(object));
    eventually("it is served where there is room", || scene.serves(last(3)));
    eventually("none waits", || waiting() == Some(0.0));
}
