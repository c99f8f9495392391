//! Debian packages: found by name, downloaded by apt and unpacked in the target folder, never installed.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// The newest kernel of a series such as `6.1` that apt knows, made for virtual machines.
pub(crate) fn kernel(series: &str) -> Result<Kernel> {
    let pattern = format!("^linux-image-{}\\.[^ ]*-cloud-amd64$", series.replace('.', "\\."));
    let found = output("apt-cache", &["search", "--names-only", &pattern], Path::new("."))?;
    let names = found.lines().filter_map(|line| line.split_whitespace().next());
    let name = names.max_by_key(|name| numbers(name)).with_context(|| {
        format!(
            "apt knows no kernel {series}: is its list up to date (`apt-get update`)? Debian 12 has 6.1, and 6.12 among \
             its security updates or backports"
        )
    })?;
    let folder = unpacked(name)?;
    let boot = fs::read_dir(folder.join("boot"))?.flatten().map(|entry| entry.path());
    let image = boot.into_iter().find(|path| path.to_string_lossy().contains("/vmlinuz-"));
    Ok(Kernel {
        name: name.to_owned(),
        image: image.with_context(|| format!("{name} holds no kernel"))?,
        modules: ["usr/lib/modules", "lib/modules"]
            .map(|path| folder.join(path))
            .into_iter()
            .find(|path| path.is_dir())
            .with_context(|| format!("{name} holds no modules"))?,
    })
}

/// The folder of a package's files.
pub(crate) fn unpacked(name: &str) -> Result<PathBuf> {
    let folder = folder()?.join(name);
    if folder.is_dir() {
        return Ok(folder);
    }
    let work = folder.with_extension("new");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(&work)?;
    // Past libtest's capture: it takes a while.
    writeln!(io::stdout(), "downloading {name}")?;
    output("apt-get", &["download", "--quiet", name], &work)?;
    let archive = fs::read_dir(&work)?.flatten().next().context("apt-get downloaded nothing")?.path();
    let archive = archive.to_str().context("path")?;
    output("dpkg-deb", &["--extract", archive, "."], &work)?;
    fs::remove_file(archive)?;
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
