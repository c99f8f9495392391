//! The real agent on a BPF file system that others have too, or that is its own alone.

use dataplane_tests::lab::portolan;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// What the agent says of pins that end with it.
const WARNING: &str = "pins end with this agent, and with them the traffic of Services";
const START: Duration = Duration::from_secs(60);

/// An agent behind a shell that is the first process of a process namespace, in network and mount namespaces of its own.
struct Agent {
    child: Child,
    folder: PathBuf,
}

impl Agent {
    /// The script is given the agent's command line as its arguments, where no BPF file system is mounted.
    fn start(name: &str, script: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("portolan-lasting-{name}-{}", std::process::id()));
        fs::create_dir_all(folder.join("manifests")).unwrap();
        let script = format!(
            "ip link set lo up; while umount /sys/fs/bpf 2>/dev/null; do :; done; mount -t tmpfs none /run; {script}"
        );
        let unshare = [
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--mount",
            "--net",
            "sh",
            "-c",
            &script,
            "sh",
        ];
        let child = Command::new("unshare")
            .args(unshare)
            .arg(portolan().unwrap())
            .args(["agent", "--node-name", "n", "--socket-lb=off", "--healthz-bind-address=", "--manifests"])
            .arg(folder.join("manifests"))
            .stdout(File::create(folder.join("out")).unwrap())
            .stderr(File::create(folder.join("log")).unwrap())
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.folder.join(file)).unwrap()
    }

    fn wait_until_ready(&self) {
        let end = Instant::now() + START;
        while self.read("out") != "ready\n" {
            assert!(Instant::now() < end, "{}", self.read("log"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn metrics(&self) -> String {
        let output = Command::new("nsenter")
            .arg(format!("--net=/proc/{}/ns/net", self.child.id()))
            .args(["--", "curl", "--silent", "--show-error", "--fail", "http://127.0.0.1:10249/metrics"])
            .output()
            .unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // All that is in the process namespace ends with its first process, and pins and programs with the last one's namespaces.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// C3
#[test]
fn an_agent_whose_pins_end_with_it_says_so_and_no_other_does() {
    let mount = "mount -t bpf bpf /sys/fs/bpf";
    for (name, script, private) in [
        ("own-namespace", "unshare --mount \"$@\"; exit".to_owned(), true),
        ("machine", format!("{mount}; \"$@\"; exit"), false),
        ("shared", format!("{mount}; unshare --mount \"$@\"; exit"), false),
        ("container", "exec \"$@\"".to_owned(), true),
        ("container-with-the-machines", format!("{mount}; exec \"$@\""), false),
    ] {
        let agent = Agent::start(name, &script);
        agent.wait_until_ready();
        let (log, metrics) = (agent.read("log"), agent.metrics());
        assert_eq!(log.matches(WARNING).count(), usize::from(private), "{name}: {log}");
        assert_eq!(log.contains("mount -t bpf bpf /sys/fs/bpf"), private, "{name}: {log}");
        let line = format!("portolan_private_pins {}", u8::from(private));
        assert!(metrics.lines().any(|other| other == line), "{name}: {metrics}");
    }
}
