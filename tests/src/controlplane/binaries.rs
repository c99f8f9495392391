//! The control plane's programs: brought along, found in PATH, or built from `tests/controlplane` once.

use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IsTerminal};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Names the folder of a control plane that was built elsewhere.
pub const FOLDER_VARIABLE: &str = "PORTOLAN_CONTROLPLANE_BIN";
/// What a control plane consists of.
const PROGRAMS: [&str; 4] = ["etcd", "kube-apiserver", "kube-controller-manager", "kubectl"];
/// The packages of those programs that are Kubernetes' own, and of the rival that the benchmarks measure.
const KUBERNETES: [&str; 4] = [
    "k8s.io/kubernetes/cmd/kube-apiserver",
    "k8s.io/kubernetes/cmd/kube-controller-manager",
    "k8s.io/kubernetes/cmd/kube-proxy",
    "k8s.io/kubernetes/cmd/kubectl",
];
/// The package of etcd.
const ETCD: &str = "go.etcd.io/etcd/server/v3";
/// CoreDNS.
pub(crate) const COREDNS: Extra = Extra {
    name: "CoreDNS",
    module: "controlplane/coredns",
    programs: &[("github.com/coredns/coredns", "coredns")],
    tags: "",
};
/// Helm.
pub(crate) const HELM: Extra = Extra {
    name: "Helm",
    module: "controlplane/helm",
    programs: &[("helm.sh/helm/v4/cmd/helm", "helm")],
    tags: "",
};
/// Prometheus' promtool, without its clients of clouds: nothing here asks one, and they are nine tenths of the build.
const PROMTOOL: Extra = Extra {
    name: "promtool",
    module: "controlplane/promtool",
    programs: &[("github.com/prometheus/prometheus/cmd/promtool", "promtool")],
    tags: "remove_all_sd",
};

/// Programs with a Go module of their own, for they want other versions than the control plane of what both are built from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extra {
    /// In words.
    pub(crate) name: &'static str,
    /// The folder of the module, below `tests`.
    pub(crate) module: &'static str,
    /// Packages, and what is built from them.
    pub(crate) programs: &'static [(&'static str, &'static str)],
    /// What of their source is left out, by Go's build tags.
    pub(crate) tags: &'static str,
}
/// How often a build that is not watched on a terminal says how far it is.
const PROGRESS_PERIOD: Duration = Duration::from_secs(15);

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Binaries {
    folder: Option<PathBuf>,
}

impl Binaries {
    /// Finds the programs, or builds them, which takes minutes the first time.
    pub fn find_or_build() -> Result<Self> {
        if let Some(folder) = std::env::var_os(FOLDER_VARIABLE) {
            let folder = PathBuf::from(folder);
            let missing: Vec<_> = PROGRAMS.iter().filter(|name| !folder.join(name).is_file()).collect();
            ensure!(missing.is_empty(), "{FOLDER_VARIABLE}={} has no {missing:?}", folder.display());
            return Ok(Self { folder: Some(folder) });
        }
        if PROGRAMS.iter().all(|name| in_path(name)) {
            return Ok(Self { folder: None });
        }
        let folder = cache(&module(), &[])?;
        if !PROGRAMS.iter().all(|name| folder.join(name).is_file()) {
            build(&folder, &build_cluster).context("building the control plane from tests/controlplane")?;
        }
        Ok(Self { folder: Some(folder) })
    }

    /// Another program: found beside the others or in PATH, or built as they are, in a folder of its own.
    pub(super) fn find_or_build_extra(&self, extra: Extra) -> Result<PathBuf> {
        let (_, name) = extra.programs[0];
        if let Some(beside) = self.folder.as_ref().map(|folder| folder.join(name)).filter(|p| p.is_file()) {
            return Ok(beside);
        }
        extra.find_or_build()
    }

    /// All that tests ask for beside the control plane itself.
    pub fn find_or_build_extras(&self) -> Result<()> {
        [COREDNS, HELM, PROMTOOL].into_iter().try_for_each(|extra| self.find_or_build_extra(extra).map(drop))
    }

    /// Where `promtool` is.
    ///
    /// # Errors
    /// If it cannot be built.
    pub fn promtool_program(&self) -> Result<PathBuf> {
        self.find_or_build_extra(PROMTOOL)
    }

    /// The path of a program.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.as_ref().map_or_else(|| name.into(), |folder| folder.join(name))
    }
}

fn in_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

/// The Go module, in the source tree that this program was built from.
fn module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("controlplane")
}

impl Extra {
    /// The folder of its module.
    pub(crate) fn module(self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(self.module)
    }

    /// Its first program, from PATH or built.
    pub(crate) fn find_or_build(self) -> Result<PathBuf> {
        let (_, name) = self.programs[0];
        if in_path(name) {
            return Ok(name.into());
        }
        Ok(self.built()?.join(name))
    }

    /// The folder of all its programs, which are built if they are not there.
    pub(crate) fn built(self) -> Result<PathBuf> {
        let names: Vec<_> = self.programs.iter().map(|(_, name)| *name).collect();
        let folder = cache(&self.module(), &names)?;
        if !names.iter().all(|name| folder.join(name).is_file()) {
            build(&folder, &|folder| self.build(folder))
                .with_context(|| format!("building {} from {}", self.name, self.module().display()))?;
        }
        Ok(folder)
    }

    fn build(self, folder: &Path) -> Result<()> {
        eprintln!("building {} once (several minutes) …", self.name);
        let packages: Vec<_> = self.programs.iter().map(|(package, _)| *package).collect();
        let mut progress = Progress::new(self.module(), self.tags, &packages)?;
        for (package, name) in self.programs {
            progress.go_build(&self.flags(package)?, &folder.join(name), &[package])?;
        }
        progress.finish(self.name);
        Ok(())
    }

    /// Kubernetes' own programs are told their version.
    fn flags(self, package: &str) -> Result<String> {
        if package.starts_with("k8s.io/kubernetes/") {
            return Ok(version_flags(&version(&self.module())?));
        }
        Ok("-s -w".to_owned())
    }
}

/// Cargo's target folder, in which this program lies.
pub fn target_folder() -> Result<PathBuf> {
    let running = std::env::current_exe()?;
    let target = running.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    let target =
        target.with_context(|| format!("{} is not in a target folder of cargo", running.display()))?;
    Ok(target.to_owned())
}

/// `target/controlplane/HASH`, where the hash is that of a module's versions and of the programs' names.
fn cache(module: &Path, programs: &[&str]) -> Result<PathBuf> {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for file in ["go.mod", "go.sum"] {
        let path = module.join(file);
        add(&fs::read(&path).with_context(|| path.display().to_string())?);
    }
    add(programs.join(" ").as_bytes());
    Ok(target_folder()?.join("controlplane").join(format!("{hash:016x}")))
}

/// Has the programs of a folder built, unless somebody else is about to.
fn build(folder: &Path, programs: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
    let parent = folder.parent().context("cache folder")?;
    fs::create_dir_all(parent)?;
    let lock = File::create(parent.join("lock"))?;
    // SAFETY: a system call on a descriptor that lives to the end of this function.
    unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) };
    if folder.is_dir() {
        return Ok(());
    }
    if !in_path("go") {
        bail!(
            "Go is needed: install Go 1.26 or later, or name a folder with {PROGRAMS:?} in {FOLDER_VARIABLE}"
        );
    }
    // Under the lock: nobody else builds, and what is there is of a build that was cut short.
    let new = parent.join(".new");
    let _ = fs::remove_dir_all(&new);
    programs(&new)?;
    Ok(fs::rename(&new, folder)?)
}

fn build_cluster(folder: &Path) -> Result<()> {
    eprintln!("building the control plane once (several minutes) …");
    let all: Vec<_> = KUBERNETES.iter().copied().chain([ETCD]).collect();
    let mut progress = Progress::new(module(), "", &all)?;
    let version = version(&module())?;
    progress.go_build(&version_flags(&version), &folder.join(""), &KUBERNETES)?;
    progress.go_build("-s -w", &folder.join("etcd"), &[ETCD])?;
    progress.finish("the control plane");
    Ok(())
}

/// The version of Kubernetes that go.mod requires.
pub(crate) fn version(module: &Path) -> Result<String> {
    let text = fs::read_to_string(module.join("go.mod"))?;
    text.lines()
        .find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes "))
        .map(|version| version.trim().to_owned())
        .context("go.mod does not require k8s.io/kubernetes")
}

fn version_flags(version: &str) -> String {
    let mut parts = version.trim_start_matches('v').split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let told = ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"].map(|package| {
        format!(
            " -X {package}.gitVersion={version} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
        )
    });
    format!("-s -w{}", told.concat())
}

pub(crate) fn go(module: &Path) -> Command {
    let mut go = Command::new("go");
    go.current_dir(module).env("CGO_ENABLED", "0").env_remove("GOFLAGS");
    go
}

/// How many packages the programs are made of; also fetches their modules.
fn packages(module: &Path, tags: &str, roots: &[&str]) -> Result<usize> {
    eprintln!("fetching Go modules …");
    let mut list = go(module);
    list.args(["list", "-mod=readonly", "-deps", "-tags", tags]).args(roots);
    let output = list.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "go list: {}", output.status);
    Ok(output.stdout.iter().filter(|&&byte| byte == b'\n').count())
}

/// How far a build is, by the packages that `go build -v` names as it compiles them.
struct Progress {
    module: PathBuf,
    tags: &'static str,
    done: usize,
    total: usize,
    start: Instant,
    told: Instant,
}

impl Progress {
    fn new(module: PathBuf, tags: &'static str, roots: &[&str]) -> Result<Self> {
        let total = packages(&module, tags, roots)?;
        Ok(Self { module, tags, done: 0, total, start: Instant::now(), told: Instant::now() })
    }

    fn go_build(&mut self, flags: &str, out: &Path, packages: &[&str]) -> Result<()> {
        let mut command = go(&self.module);
        command.args([
            "build",
            "-v",
            "-mod=readonly",
            "-buildvcs=false",
            "-trimpath",
            "-tags",
            self.tags,
            "-ldflags",
            flags,
            "-o",
        ]);
        command.arg(out).args(packages).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let mut complaints = Vec::new();
        for line in BufReader::new(child.stderr.take().context("pipe")?).lines() {
            let line = line?;
            // A package is one word; whatever else is said is kept for the case of failure.
            if line.contains(' ') {
                complaints.push(line);
            } else {
                self.done += 1;
                self.tell();
            }
        }
        let status = child.wait()?;
        ensure!(status.success(), "go build: {status}\n{}", complaints.join("\n"));
        Ok(())
    }

    fn tell(&mut self) {
        let terminal = std::io::stderr().is_terminal();
        let period = if terminal { Duration::from_millis(200) } else { PROGRESS_PERIOD };
        if self.told.elapsed() < period {
            return;
        }
        self.told = Instant::now();
        let seconds = self.start.elapsed().as_secs();
        let text = format!("  {}/{} packages, {}:{:02}", self.done, self.total, seconds / 60, seconds % 60);
        if terminal {
            eprint!("\r{text} ");
        } else {
            eprintln!("{text}");
        }
    }

    fn finish(&self, what: &str) {
        let seconds = self.start.elapsed().as_secs();
        eprintln!("\r{what} is built ({}:{:02})", seconds / 60, seconds % 60);
    }
}
