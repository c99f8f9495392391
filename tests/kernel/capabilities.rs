//! The table of `docs/security.md`: what the agent's capabilities are for. Each thread has capabilities of its own, so these tests
//! take them from theirs.

use caps::{CapSet, Capability};
use dataplane_common::tables::{Frontends, SourceRanges};
use dataplane_user::kernel::conntrack;
use dataplane_user::kernel::maps::create;
use dataplane_user::kernel::object::{Object, Options};
use dataplane_user::kernel::pins::Pins;
use std::collections::HashSet;

/// What the DaemonSet gives to its agent.
const AGENT: [Capability; 3] = [Capability::CAP_BPF, Capability::CAP_NET_ADMIN, Capability::CAP_PERFMON];

/// Does something on a thread that has these capabilities and no others.
fn with<T: Send>(capabilities: &[Capability], action: impl FnOnce() -> T + Send) -> T {
    let capabilities: HashSet<_> = capabilities.iter().copied().collect();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            caps::set(None, CapSet::Effective, &capabilities).unwrap();
            action()
        });
        thread.join().unwrap()
    })
}

/// Fails for want of a right, and for no other reason.
#[track_caller]
fn assert_not_permitted<T>(what: &str, result: Result<T, String>) {
    match result {
        Ok(_) => panic!("{what} is permitted"),
        // The verifier says by its own words what it allows root only.
        Err(error) => {
            assert!(error.contains("os error 1)") || error.contains("for !root"), "{what}: {error}")
        }
    }
}

/// All the causes of an error.
fn text<T>(result: Result<T, impl std::error::Error>) -> Result<T, String> {
    result.map_err(|error| dataplane_user::causes::causes(&error))
}

fn make_a_map() -> Result<(), String> {
    text(create::<SourceRanges>(4)).map(drop)
}

fn load_a_program() -> Result<(), String> {
    let mut object = text(Object::open(&Options::default()))?;
    text(object.load("tc_pod_in"))
}

fn read_conntrack() -> Result<(), String> {
    let frontends = text(create::<Frontends>(4))?;
    text(conntrack::tcp_to(&frontends)).map(drop)
}

#[test]
fn each_capability_is_needed_for_what_the_documentation_says() {
    let uses: [(&str, fn() -> Result<(), String>, &[Capability]); 3] = [
        ("making a map", make_a_map, &[Capability::CAP_BPF]),
        ("loading a program", load_a_program, &AGENT),
        ("reading conntrack", read_conntrack, &[Capability::CAP_BPF, Capability::CAP_NET_ADMIN]),
    ];
    for (what, action, needed) in uses {
        with(&AGENT, action).unwrap_or_else(|error| panic!("{what}: {error}"));
        for taken in AGENT {
            let left: Vec<_> = AGENT.into_iter().filter(|capability| *capability != taken).collect();
            let result = with(&left, action);
            if needed.contains(&taken) {
                assert_not_permitted(&format!("{what} without {taken}"), result);
            } else {
                result.unwrap_or_else(|error| panic!("{what} without {taken}: {error}"));
            }
        }
    }
}

#[test]
fn to_mount_a_bpf_file_system_takes_more_than_the_agent_has() {
    let folder = std::env::temp_dir().join(format!("portolan-mount-{}", std::process::id()));
    let prepare = || text(Pins::new(&folder).prepare());
    assert_not_permitted("mounting", with(&AGENT, prepare));
    let mounted = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            crate::leave_mounts();
            let mounted = [prepare(), prepare()];
            caps::set(None, CapSet::Effective, &AGENT.into()).unwrap();
            (mounted, prepare())
        });
        thread.join().unwrap()
    });
    let _ = std::fs::remove_dir_all(&folder);
    let ([first, again], unprivileged) = mounted;
    assert_eq!(first, Ok(Some(folder)), "there was none");
    assert_eq!(again, Ok(None), "there is one: none is mounted upon it");
    assert_eq!(unprivileged, Ok(None), "where there is one, the agent needs no right");
}
