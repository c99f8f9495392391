//! Debian packages: found by name, downloaded by apt and unpacked in the target folder, never installed.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A kernel that was unpacked.
#[derive(Debug)]
pub(crate) struct Kernel {
    /// The package's name.
    pub(crate) name: String,
    /// What is booted.
    pub(crate) image: PathBuf,
    /// The folder with its modules.
    pub(crate) modules: PathBuf,
}

/// Where packages come from: options of apt.
#[derive(Debug, Default)]
pub(crate) struct Archive(Vec<String>);

impl Archive {
    /// Debian's newest packages (sid).
    pub(crate) fn newest() -> Result<Self> {
        Self::of("sid")
    }

    /// A release of Debian, by lists of this tier's own: the machine's are not touched.
    pub(crate) fn of(release: &str) -> Result<Self> {
        let place = folder()?.join(release);
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(place.join(part))?;
        }
        // The server that the machine has its own packages from.
        let format = ["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"];
        let servers = output("apt-get", &format, Path::new("."))?;
        let mut servers = servers.lines().map(|line| line.trim_end_matches('/'));
        let server =
            servers.find(|line| line.ends_with("/debian")).context("apt has no source of Debian's")?;
        let sources = place.join("sources.list");
        fs::write(&sources, format!("deb [signed-by={KEYS}] {server} {release} main\n"))?;
        let option = |name: &str, value: &Path| format!("{name}={}", value.display());
        let archive = Self(vec![
            // Releases that are no longer kept have lists that are old.
            "Acquire::Check-Valid-Until=false".into(),
            option("Dir::State::lists", &place.join("lists")),
            option("Dir::Cache", &place.join("cache")),
            option("Dir::Etc::sourcelist", &sources),
            "Dir::Etc::sourceparts=-".into(),
            "Acquire::Languages=none".into(),
            "APT::Architectures=amd64".into(),
        ]);
        let updated = fs::metadata(place.join("updated")).and_then(|file| file.modified());
        let fresh = updated.is_ok_and(|then| then.elapsed().is_ok_and(|age| age < FRESH));
        if !fresh {
            writeln!(io::stdout(), "asking for Debian's packages of {release}")?;
            archive.run("apt-get", &["update", "--quiet"], Path::new("."))?;
            fs::write(place.join("updated"), "")?;
        }
        Ok(archive)
    }

    fn run(&self, program: &str, arguments: &[&str], folder: &Path) -> Result<String> {
        let options = self.0.iter().flat_map(|option| ["-o", option]);
        output(program, &options.chain(arguments.iter().copied()).collect::<Vec<_>>(), folder)
    }
}

/// Whose signatures Debian's lists have (package `debian-archive-keyring`).
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// For how long lists are taken as they are.
const FRESH: Duration = Duration::from_secs(24 * 60 * 60);

/// The newest kernel of a series such as `6.1` that apt knows, made for virtual machines; of an empty one, the newest of all.
pub(crate) fn kernel(archive: &Archive, series: &str) -> Result<Kernel> {
    let series_dot = if series.is_empty() { String::new() } else { series.replace('.', "\\.") + "\\." };
    let pattern = format!("^linux-image-{series_dot}[0-9][^ ]*-cloud-amd64$");
    let found = archive.run("apt-cache", &["search", "--names-only", &pattern], Path::new("."))?;
    let names = found.lines().filter_map(|line| line.split_whitespace().next());
    let name = names.max_by_key(|name| numbers(name)).with_context(|| {
        format!(
            "apt knows no kernel {series}: is its list up to date (`apt-get update`)? Debian 12 has 6.1, and 6.12 among \
             its security updates or backports"
        )
    })?;
    let mut folders = vec![unpacked(archive, name)?];
    // Since 7.1 that package is empty and needs two others.
    let rest = name.trim_start_matches("linux-image-");
    for part in ["linux-binary", "linux-modules"].map(|part| format!("{part}-{rest}")) {
        let exactly = format!("^{}$", part.replace('.', "\\.").replace('+', "\\+"));
        let found = archive.run("apt-cache", &["search", "--names-only", &exactly], Path::new("."))?;
        if !found.is_empty() {
            folders.push(unpacked(archive, &part)?);
        }
    }
    let below = |place: &str| folders.iter().map(|folder| folder.join(place)).collect::<Vec<_>>();
    let images = below("boot").into_iter().flat_map(entries).filter(|path| is_kernel(path));
    let modules: Vec<_> = ["usr/lib/modules", "lib/modules"].into_iter().flat_map(below).collect();
    let beside_modules =
        modules.iter().cloned().flat_map(entries).flat_map(entries).filter(|path| is_kernel(path));
    Ok(Kernel {
        name: name.to_owned(),
        image: images.chain(beside_modules).next().with_context(|| format!("{name} holds no kernel"))?,
        modules: modules
            .iter()
            .find(|folder| entries((*folder).clone()).any(|version| version.join("kernel").is_dir()))
            .with_context(|| format!("{name} holds no modules"))?
            .clone(),
    })
}

/// What lies in a folder, if there is one.
fn entries(folder: PathBuf) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn is_kernel(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"))
}

/// The folder of a package's files.
pub(crate) fn unpacked(archive: &Archive, name: &str) -> Result<PathBuf> {
    let folder = folder()?.join(name);
    if folder.is_dir() {
        return Ok(folder);
    }
    let work = folder.with_extension("new");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work)?;
    // Past libtest's capture: it takes a while.
    writeln!(io::stdout(), "downloading {name}")?;
    archive.run("apt-get", &["download", "--quiet", name], &work)?;
    let package = fs::read_dir(&work)?.flatten().next().context("apt-get downloaded nothing")?.path();
    let package = package.to_str().context("path")?;
    output("dpkg-deb", &["--extract", package, "."], &work)?;
    fs::remove_file(package)?;
    // It appears whole or not at all.
    fs::rename(&work, &folder)?;
    Ok(folder)
}

/// Where this tier keeps what it downloads and makes.
pub(crate) fn folder() -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm");
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// What a command prints; an error if it fails.
pub(crate) fn output(program: &str, arguments: &[&str], folder: &Path) -> Result<String> {
    Ok(String::from_utf8_lossy(&bytes(program, arguments, folder)?).into_owned())
}

/// As [`output`], as it comes.
pub(crate) fn bytes(program: &str, arguments: &[&str], folder: &Path) -> Result<Vec<u8>> {
    let output = Command::new(program).args(arguments).current_dir(folder).output();
    let output = output.with_context(|| format!("cannot run {program}: is its package installed?"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{program} {}`: {}\n{complaint}", arguments.join(" "), output.status);
    Ok(output.stdout)
}

/// The numbers in a name, by which versions are compared.
fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}
