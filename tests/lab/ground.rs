//! Where `cargo xtask test` runs tests, and what it says if they leave something there.

use dataplane_tests::lab::program;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// The folder and the cgroup of one command, which whoever starts it removes.
struct Place(String);

impl Place {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(1);
        // As `cargo xtask` calls them, with this process in its place.
        Self(format!("portolan-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)))
    }

    /// Runs a script there: whether that went well and nothing was left, and what was said.
    fn run(&self, flags: &[&str], script: &str) -> (bool, String) {
        let xtask = program("xtask", "PORTOLAN_XTASK").unwrap();
        let mut command = Command::new(xtask);
        command.args(["alone", "--name", &self.0]).args(flags).args(["--", "sh", "-c", script]);
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(std::env::temp_dir().join(&self.0));
        remove_cgroups(&cgroup2().join(&self.0));
    }
}

fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"))
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .into()
}

fn remove_cgroups(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        remove_cgroups(&entry.path());
    }
    let _ = fs::remove_dir(path);
}

/// Prints what a fresh machine has not: a BPF file system where agents look for one, folders of Portolan, interfaces, cgroups.
const LOOK: &str = "findmnt -rno TARGET -t bpf --mountpoint /sys/fs/bpf; ls /run | grep -e portolan -e netns; ip -o link | cut -d: -f2; \
                    cd $(findmnt -rno TARGET -t cgroup2 | head -n 1) && ls -d */ 2>/dev/null; ls $TMPDIR";

#[test]
fn tests_begin_where_nothing_is() {
    let place = Place::new();
    let (ok, text) = place.run(&[], &format!("{LOOK}; exit 0"));
    assert!(ok, "{text}");
    assert_eq!(text.trim(), "lo\n\ntest nothing_is_left_behind ... ok");
}

#[test]
fn some_run_again_where_a_killed_laboratory_left_its_things() {
    let place = Place::new();
    let (ok, text) = place.run(&["--ground", "used"], &format!("{LOOK}; exit 0"));
    assert!(ok, "{text}");
    for thing in ["/sys/fs/bpf\n", "netns\n", "portolan\n", "portolan-lab\n", "portolan-lab/\n"] {
        assert!(text.contains(thing), "{thing}: {text}");
    }
}

#[test]
fn whatever_tests_leave_is_named_and_fails() {
    let place = Place::new();
    let script = "set -e; mount -t bpf bpf /sys/fs/bpf; mkdir /sys/fs/bpf/pins /run/portolan; : > $TMPDIR/file; \
                  ip link add left type bridge; nft add table inet left; ip netns add left; \
                  mkdir $(findmnt -rno TARGET -t cgroup2 | head -n 1)/left; setsid sleep 600 &";
    let (ok, text) = place.run(&[], script);
    assert!(!ok, "{text}");
    for thing in [
        "mount /sys/fs/bpf (bpf)",
        "file /sys/fs/bpf/pins",
        "file /run/portolan",
        &format!("file {}/tmp/file", std::env::temp_dir().join(&place.0).display()),
        "interface left",
        "nftables: table inet left",
        "file /run/netns",
        "/left\n",
        "(sleep 600)",
    ] {
        assert!(
            text.lines()
                .any(|line| line.starts_with("    left behind: ") && format!("{line}\n").contains(thing)),
            "{thing}: {text}"
        );
    }
    assert!(text.ends_with("test result: FAILED. 0 passed; 1 failed; 0 ignored\n"), "{text}");
    // Nothing of it is to be seen outside.
    assert!(!Path::new("/run/netns/left").exists());
}

#[test]
fn a_failure_inside_is_one_outside() {
    let place = Place::new();
    let (ok, text) = place.run(&[], "exit 3");
    assert!(!ok && text.contains("nothing_is_left_behind ... ok"), "{text}");
}
