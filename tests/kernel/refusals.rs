//! What keeps the real agent from starting: each is named, with what to do about it, before anything is touched.

use dataplane_tests::lab::{install, portolan};
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// A user with no right at all.
const NOBODY: u32 = 65_534;

/// A folder of this test alone, with an empty folder of manifests in it.
fn folder(test: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("portolan-refusals-{test}-{}", std::process::id()));
    fs::create_dir_all(folder.join("manifests")).unwrap();
    folder
}

/// The agent's flags: nothing of it listens, and its pins are its own.
fn flags(folder: &std::path::Path) -> Vec<String> {
    let text = |path: PathBuf| path.to_str().unwrap().to_owned();
    let pins = format!("/sys/fs/bpf/{}", folder.file_name().unwrap().to_str().unwrap());
    ["agent", "--node-name", "n", "--healthz-bind-address=", "--metrics-bind-address="]
        .map(str::to_owned)
        .into_iter()
        .chain(["--manifests".into(), text(folder.join("manifests")), "--bpffs".into(), pins])
        .collect()
}

/// What it says, and that it ended by itself with an error and without a pin.
fn refusal(test: &str, output: Output) -> String {
    let folder = folder(test);
    let pins = PathBuf::from("/sys/fs/bpf").join(folder.file_name().unwrap());
    assert!(!pins.join("links").exists(), "{test}: it attached something");
    let _ = fs::remove_dir_all(&folder);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    text.lines().filter(|line| line.starts_with("portolan: ")).collect::<Vec<_>>().join("\n")
}

#[test]
fn an_ordinary_user_is_told_which_capabilities_are_missing() {
    let folder = folder("user");
    // The build folder may be root's alone.
    let copy = folder.join("portolan");
    install(&portolan().unwrap(), &copy).unwrap();
    let output = Command::new(copy).args(flags(&folder)).uid(NOBODY).gid(NOBODY).output().unwrap();
    let text = refusal("user", output);
    assert!(
        text.contains("this process lacks CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON: run it as root"),
        "{text}"
    );
}

#[test]
fn a_root_without_a_capability_is_told_which() {
    let folder = folder("capability");
    let output = Command::new("setpriv")
        .args(["--bounding-set=-net_admin", "--inh-caps=-net_admin", "--"])
        .arg(portolan().unwrap())
        .args(flags(&folder))
        .output()
        .unwrap();
    let text = refusal("capability", output);
    assert!(text.contains("this process lacks CAP_NET_ADMIN: run it as root"), "{text}");
}

#[test]
fn a_machine_without_cgroup2_is_told_what_to_mount() {
    let folder = folder("cgroup");
    // In a mount namespace of its own, in which no mount is a cgroup2.
    let script =
        "findmnt -rno TARGET -t cgroup2 | tac | while read -r at; do umount -l \"$at\"; done; exec \"$@\"";
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(portolan().unwrap())
        .args(flags(&folder))
        .output()
        .unwrap();
    let text = refusal("cgroup", output);
    assert!(text.contains("no cgroup2 file system is mounted: mount one (`mount -t cgroup2 "), "{text}");
    assert!(text.contains("--socket-lb=off"), "{text}");
}

#[test]
fn a_cgroup_that_is_none_is_named() {
    let folder = folder("not-cgroup");
    let output =
        Command::new(portolan().unwrap()).args(flags(&folder)).arg("--cgroup").arg(&folder).output().unwrap();
    let text = refusal("not-cgroup", output);
    assert!(text.contains(&format!("--cgroup {}", folder.display())), "{text}");
    assert!(text.contains("`findmnt -t cgroup2` tells where"), "{text}");
}

#[test]
fn a_place_where_no_bpf_file_system_can_be_is_named() {
    let folder = folder("bpffs");
    let mut flags = flags(&folder);
    *flags.last_mut().unwrap() = "/proc/portolan".to_owned();
    let output = Command::new(portolan().unwrap()).args(flags).output().unwrap();
    let text = refusal("bpffs", output);
    assert!(
        text.contains("there is no BPF file system at /proc/portolan, and mounting one failed"),
        "{text}"
    );
    assert!(text.contains("mount -t bpf bpf /proc/portolan"), "{text}");
}

#[test]
fn a_folder_of_manifests_that_is_none_is_named() {
    let folder = folder("manifests");
    fs::remove_dir_all(folder.join("manifests")).unwrap();
    let output = Command::new(portolan().unwrap()).args(flags(&folder)).arg("--dry-run").output().unwrap();
    let text = refusal("manifests", output);
    assert!(text.contains("manifests") && text.contains("is no folder that can be listed"), "{text}");
}

#[test]
fn a_kubeconfig_that_is_none_is_named() {
    let folder = folder("kubeconfig");
    let output = Command::new(portolan().unwrap())
        .args(["agent", "--node-name", "n", "--kubeconfig", "/none/kubeconfig", "--dry-run"])
        .output()
        .unwrap();
    drop(folder);
    let text = refusal("kubeconfig", output);
    assert!(text.contains("kubeconfig /none/kubeconfig: "), "{text}");
}

/// The network and mount namespaces of a process, which this keeps when it has ended: what an agent mounted is seen there alone.
struct Namespaces([File; 2]);

impl Namespaces {
    fn of(pid: u32) -> Self {
        Self(["mnt", "net"].map(|kind| File::open(format!("/proc/{pid}/ns/{kind}")).unwrap()))
    }

    /// Runs `portolan` inside.
    fn portolan(&self, arguments: &[&str]) -> Output {
        let path = |namespace: &File| format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount={}", path(&self.0[0]))).arg(format!("--net={}", path(&self.0[1])));
        command.arg("--").arg(portolan().unwrap()).args(arguments).output().unwrap()
    }
}

/// An agent in network and mount namespaces of its own, in which the kernel's own types cannot be found. It attaches nothing
/// outside of them.
#[test]
fn a_kernel_without_its_own_types_serves_and_is_named() {
    let folder = folder("btf");
    let script = "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"";
    let output = folder.join("out");
    let mut agent = Command::new("unshare")
        .args(["--net", "--mount", "sh", "-c", script, "sh"])
        .arg(portolan().unwrap())
        .args(flags(&folder))
        .arg("--socket-lb=off")
        .stdout(File::create(&output).unwrap())
        .stderr(File::create(folder.join("log")).unwrap())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while fs::read_to_string(&output).unwrap() != "ready\n" && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    let inside = Namespaces::of(agent.id());
    // SAFETY: a system call on our own child, which has not been waited for.
    unsafe { libc::kill(agent.id() as libc::pid_t, libc::SIGTERM) };
    let status = agent.wait().unwrap();
    let (ready, log) =
        (fs::read_to_string(&output).unwrap(), fs::read_to_string(folder.join("log")).unwrap());
    let pins = flags(&folder).pop().unwrap();
    let cleanup = || {
        let output = inside.portolan(&["cleanup", "--keep-state", "--bpffs", &pins]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let removed = [cleanup(), cleanup()];
    let _ = fs::remove_dir_all(&folder);
    assert!(status.success() && ready == "ready\n", "{status}: {log}");
    assert!(
        log.contains("no BTF of the kernel (no /sys/kernel/btf/vmlinux; CONFIG_DEBUG_INFO_BTF)"),
        "{log}"
    );
    assert!(removed[0].ends_with(&format!("removed folder {pins}\n")), "{}", removed[0]);
    assert!(removed[1].starts_with("nothing to remove"), "{}", removed[1]);
}

#[test]
fn what_was_never_there_is_neither_shown_nor_removed() {
    let run = |arguments: &[&str]| {
        let arguments = arguments.iter().chain(&["--bpffs", "/sys/fs/bpf/portolan-none"]);
        let output = Command::new(portolan().unwrap()).args(arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    };
    for view in ["services", "backends", "flows", "drops"] {
        let (ok, text) = run(&[view]);
        assert!(!ok && text.lines().count() == 1, "{text}");
        assert!(text.contains("no maps of Portolan are pinned in /sys/fs/bpf/portolan-none/"), "{text}");
        assert!(text.contains("no agent has run with this --bpffs folder"), "{text}");
    }
    let (ok, text) = run(&["cleanup", "--keep-state"]);
    assert!(ok && text.starts_with("nothing to remove at /sys/fs/bpf/portolan-none"), "{text}");
}

#[test]
fn an_ordinary_user_is_not_told_that_there_is_nothing_to_remove() {
    let folder = folder("user-cleanup");
    // The build folder may be root's alone.
    let copy = folder.join("portolan");
    install(&portolan().unwrap(), &copy).unwrap();
    let output = Command::new(copy).arg("cleanup").uid(NOBODY).gid(NOBODY).output().unwrap();
    let text = refusal("user-cleanup", output);
    assert!(text.contains("this process lacks CAP_BPF, CAP_NET_ADMIN"), "{text}");
}
