//! How an agent begins: what it is told meanwhile, what it tells systemd, and what it finds of a version with other maps.

use crate::api_server::{KEPT, PORT, Scene, under_new_connections};
use crate::health::{HEALTH, get, until};
use dataplane_tests::api_server::Treatment;
use dataplane_tests::lab::{AgentOptions, PodOptions, Service, at, portolan};
use dataplane_user::kernel::pins::Pins;
use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

const CAME: Ipv4Addr = Ipv4Addr::new(10, 96, 8, 40);

/// C3
#[test]
fn a_signal_ends_an_agent_that_is_still_starting() {
    let scene = Scene::set("node-1");
    for (number, signal) in [libc::SIGTERM, libc::SIGINT].into_iter().enumerate() {
        scene.launch();
        until("it has begun", || scene.log().matches("pins in").count() == number + 1);
        let agent = scene.node().agent().unwrap();
        agent.process().signal(signal);
        let status = agent.process().wait(Duration::from_secs(5)).unwrap();
        assert!(status.success() && !scene.is_ready(), "{status}: {}", scene.log());
    }
    scene.node().start_agent(&scene.options(&[])).unwrap();
    assert!(scene.serves(KEPT));
}

/// A program that is the agent as systemd starts it.
fn under_systemd(scene: &Scene, socket: &Path) -> PathBuf {
    let program = scene.lab.folder().join("under-systemd");
    let text = format!(
        "#!/bin/sh\nexport NOTIFY_SOCKET={} WATCHDOG_USEC=4000000\nexec {} \"$@\"\n",
        socket.display(),
        portolan().unwrap().display()
    );
    fs::write(&program, text).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    program
}

/// H5
#[test]
fn systemd_is_told_what_is_so_and_when() {
    let scene = Scene::set("node-1");
    let path = scene.lab.folder().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let read = || {
        let mut bytes = [0; 1_024];
        let length = socket.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..length]).trim().to_owned()
    };
    // Signs of life come all the time.
    let next = || loop {
        let told = read();
        if told != "WATCHDOG=1" {
            return told;
        }
    };
    scene.server.treat("list services", Treatment::Silence);
    let options: AgentOptions = scene.options(&[]).program(&under_systemd(&scene, &path));
    scene.node().launch_agent(&options).unwrap();
    scene.says(&["watching the Kubernetes API"]);
    scene.node().agent().unwrap().process().signal(libc::SIGHUP);
    scene.says(&["SIGHUP", "nothing to audit"]);
    assert_eq!(read(), "WATCHDOG=1", "it lives, and is not ready");
    assert!(!scene.is_ready());
    scene.server.relent();
    scene.node().wait_for_agent().unwrap();
    assert_eq!(next(), "READY=1\nSTATUS=serving");
    scene.node().agent().unwrap().process().signal(libc::SIGHUP);
    let reloading = next();
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    assert_eq!(next(), "READY=1\nSTATUS=serving");
    scene.node().agent().unwrap().stop().unwrap();
    assert_eq!(next(), "STOPPING=1");
}

/// C3, H2: to a version with another layout of the maps, and back: what is served goes on until the new maps hold all, and what was
/// true before is not served again. So it is if the first attempt is cut short.
#[test]
fn another_layout_takes_over_when_its_maps_hold_everything() {
    let scene = Scene::set("node-1");
    scene.node().start_agent(&scene.options(&[])).unwrap();
    let layouts = [Pins::new(&scene.node().bpffs()), Pins::with_layout(&scene.node().bpffs(), "v999")];
    let maps = || layouts.each_ref().map(|pins| pins.map("frontends").exists());
    let healthy = || {
        let to = at(scene.node().address(), HEALTH);
        get(scene.lab.client(), to, "/healthz").is_some_and(|answer| answer.status == 200)
    };
    assert_eq!(maps(), [true, false]);
    for (arguments, after) in [(&["--map-layout=v999"][..], [false, true]), (&[][..], [true, false])] {
        scene.node().agent().unwrap().stop().unwrap();
        let made = under_new_connections(&scene, || {
            scene.server.treat("list endpointslices", Treatment::Silence);
            // The first attempt dies in the middle.
            for _ in 0..2 {
                scene.node().launch_agent(&scene.options(arguments)).unwrap();
                scene.says(&["programs with maps of another layout are attached"]);
                until("health is told", healthy);
                std::thread::sleep(Duration::from_secs(1));
                assert_eq!(maps(), [true, true]);
                assert!(!scene.is_ready());
                scene.node().agent().unwrap().kill();
                until("it is gone", || scene.node().agent().unwrap().process().exit_status().is_some());
            }
            scene.node().launch_agent(&scene.options(arguments)).unwrap();
            scene.server.relent();
            scene.node().wait_for_agent().unwrap();
        });
        assert!(made > 20, "{made} connections say nothing");
        assert_eq!(maps(), after, "{}", scene.log());
        // The programs that are attached read what is written now.
        let came = scene.service("came", CAME);
        scene.put(&came);
        until("what came is served", || scene.serves(CAME));
        came.objects().iter().for_each(|object| scene.server.remove(object));
        until("what went is gone", || !scene.serves(CAME));
    }
    scene.node().agent().unwrap().stop().unwrap();
    // A new start of the same version is none of all that.
    let told = scene.log().matches("another layout").count();
    scene.node().start_agent(&scene.options(&[])).unwrap();
    assert_eq!(scene.log().matches("another layout").count(), told, "{}", scene.log());
}

/// C3, L2: an upgrade to another layout of the maps, and the way back, breaks no connection: its flow is there under the new version's maps,
/// and counts as open.
#[test]
fn flows_go_on_when_another_layout_takes_over() {
    let scene = Scene::set("node-1");
    let options = |more: &[&str]| scene.options(&[&["--socket-lb=off"], more].concat());
    scene.node().start_agent(&options(&[])).unwrap();
    let mut stream = scene.shell().connect(at(KEPT, PORT)).unwrap();
    let first = stream.ask().unwrap();
    let known = || {
        let flows = scene.node().portolan(&["flows"]).unwrap();
        flows
            .lines()
            .filter(|line| line.contains("established") && line.contains(&first.client.to_string()))
            .count()
    };
    let open = || {
        let text = scene.node().portolan(&["backends", "-o", "json"]).unwrap();
        let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
        rows.as_array().unwrap().iter().map(|row| row["open"].as_u64().unwrap()).sum::<u64>()
    };
    assert_eq!((known(), open()), (1, 1));
    for arguments in [&["--map-layout=v999"][..], &[]] {
        scene.node().agent().unwrap().stop().unwrap();
        scene.node().start_agent(&options(arguments)).unwrap();
        scene.says(&["1 flows of other layouts were carried over"]);
        assert_eq!(stream.ask().unwrap().client, first.client);
    }
    assert_eq!((known(), open()), (1, 1), "{}", scene.log());
    drop(stream);
    until("it is open no more", || open() == 0);
}

/// C3, S1: a client has the endpoint that it had, under the maps of the new version and of the one before.
#[test]
fn affinity_goes_on_when_another_layout_takes_over() {
    const AFFINE: Ipv4Addr = Ipv4Addr::new(10, 96, 8, 41);
    let scene = Scene::set("node-1");
    scene.lab.add_pod("web-2", 0, &PodOptions::default()).unwrap();
    let endpoints = ["web", "web-2"].map(|name| scene.lab.pod(name).unwrap().endpoint());
    let affine = Service::new("affine", AFFINE).tcp(PORT, 8080).spec("sessionAffinity", "ClientIP".into());
    scene.put(&affine.endpoints(endpoints));
    let options = |more: &[&str]| scene.options(&[&["--socket-lb=off"], more].concat());
    scene.node().start_agent(&options(&[])).unwrap();
    let answers =
        || (0..10).map(|_| scene.shell().tcp(at(AFFINE, PORT)).unwrap().pod).collect::<BTreeSet<_>>();
    let had = answers();
    assert_eq!(had.len(), 1);
    for layout in [&["--map-layout=v999"][..], &[], &["--map-layout=v998"], &[]] {
        scene.node().agent().unwrap().stop().unwrap();
        scene.node().start_agent(&options(layout)).unwrap();
        assert_eq!(answers(), had, "{}", scene.log());
    }
}

/// H3, C3: what is told of a Service's traffic is what was sent, and goes on where it was when the agent is replaced.
#[test]
fn traffic_is_told_exactly_and_goes_on_with_the_next_agent() {
    const ASKED: Ipv4Addr = Ipv4Addr::new(10, 96, 8, 42);
    /// Bytes of a question, and of its headers of UDP and IPv4.
    const QUESTION: usize = 100;
    const HEADERS: u64 = 8 + 20;
    let scene = Scene::set("node-1");
    let endpoint = scene.lab.pod("web").unwrap().endpoint();
    scene.put(&Service::new("asked", ASKED).udp(PORT, 8080).endpoints([endpoint]));
    let options = scene.options(&["--socket-lb=off"]);
    scene.node().start_agent(&options).unwrap();
    let told = |what: &str, direction: &str| {
        let labels =
            "namespace=\"default\",service=\"asked\",port=\"udp-80\",protocol=\"UDP\",ip_family=\"IPv4\"";
        let line = format!("portolan_service_{what}_total{{{labels},direction=\"{direction}\"}} ");
        scene.lab.node(0).metric(&line)
    };
    let shell = scene.lab.pod("shell").unwrap();
    let ask = |number: usize| {
        for _ in 0..number {
            let socket = shell.place().udp_socket(None).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            socket.connect(at(ASKED, PORT)).unwrap();
            socket.send(&[b'?'; QUESTION]).unwrap();
            socket.recv(&mut [0; 1_500]).unwrap();
        }
    };
    let mut sent = 0;
    for _ in 0..2 {
        ask(50);
        sent += 50;
        until("all packets are told", || told("packets", "in") == Some(sent as f64));
        assert_eq!(told("packets", "out"), Some(sent as f64));
        assert_eq!(told("bytes", "in"), Some((sent * (QUESTION as u64 + HEADERS)) as f64));
        let before = told("bytes", "out").unwrap();
        scene.node().agent().unwrap().stop().unwrap();
        scene.node().start_agent(&options).unwrap();
        until("it is told again", || told("packets", "in").is_some());
        assert_eq!((told("packets", "in"), told("bytes", "out")), (Some(sent as f64), Some(before)));
    }
    // Idle flows go, and take nothing with them.
    until("the flows are gone", || scene.node().portolan(&["flows"]).is_ok_and(|text| !text.contains("UDP")));
    assert_eq!((told("packets", "in"), told("packets", "out")), (Some(sent as f64), Some(sent as f64)));
}
