//! The machine's root: one archive in the kernel's format (cpio, "newc") with busybox, the programs under test, what they
//! are linked with and the kernel's modules.

use super::package::{self, Kernel, bytes, folder, output, unpacked};
use anyhow::{Context, Result, ensure};
use dataplane_tests::lab::{portolan, program};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What `init` does.
const INIT: &str = include_str!("init");
/// Commands of busybox that it uses.
const APPLETS: &[&str] =
    &["cat", "dmesg", "grep", "insmod", "mkdir", "mount", "poweroff", "sh", "timeout", "uname"];
/// Programs of this machine that the tour calls.
const TOOLS: &[&str] = &["bpftool", "ip", "wg"];
/// Folders that are empty at first.
const MOUNT_POINTS: &[&str] = &["dev", "proc", "root", "run", "sys", "tmp"];

// Types of files in `c_mode`.
const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;

/// Files by their path without the leading `/`.
#[derive(Debug, Default)]
struct Archive(BTreeMap<PathBuf, (u32, Vec<u8>)>);

/// Makes the archive and says where it lies.
pub(crate) fn build(kernel: &Kernel, modules: &[&str], tours: &[&str]) -> Result<PathBuf> {
    let mut archive = Archive::default();
    let busybox = unpacked(&package::Archive::default(), "busybox-static")?;
    let busybox = ["bin/busybox", "usr/bin/busybox"].map(|path| busybox.join(path));
    let busybox = busybox.iter().find(|path| path.is_file()).context("busybox-static holds no busybox")?;
    archive.file("bin/busybox", PROGRAM, fs::read(busybox)?);
    for applet in APPLETS {
        archive.file(&format!("bin/{applet}"), SYMLINK, b"busybox".to_vec());
    }
    archive.program("portolan", &portolan()?)?;
    archive.program("portolan-lab", &program("portolan-lab", "PORTOLAN_LAB_PROGRAM")?)?;
    for tool in TOOLS {
        archive.program(tool, &find(tool)?)?;
    }
    archive.modules(&kernel.modules, modules)?;
    for place in MOUNT_POINTS {
        archive.file(place, FOLDER, Vec::new());
    }
    archive.file("tours", PROGRAM, tours.iter().flat_map(|tour| format!("{tour}\n").into_bytes()).collect());
    archive.file("init", PROGRAM, INIT.into());
    let path = folder()?.join(format!("{}.cpio", kernel.name));
    fs::write(&path, archive.bytes())?;
    Ok(path)
}

/// A program of this machine, also where PATH lacks the administrator's folders.
fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = folders.map(|folder| folder.join(name)).find(|path| path.is_file());
    found.with_context(|| format!("there is no {name}: `cargo xtask setup` installs it"))
}

impl Archive {
    fn file(&mut self, path: &str, mode: u32, content: Vec<u8>) {
        let path = Path::new(path.trim_start_matches('/'));
        for folder in path.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty()) {
            self.0.entry(folder.into()).or_insert((FOLDER, Vec::new()));
        }
        self.0.insert(path.into(), (mode, content));
    }

    /// A program in `/bin`, without its debug information, and the libraries that it is linked with.
    fn program(&mut self, name: &str, path: &Path) -> Result<()> {
        let stripped = folder()?.join("stripped");
        let (from, to) = (path.to_str().context("path")?, stripped.to_str().context("path")?);
        output("strip", &["-o", to, from], Path::new("."))?;
        self.file(&format!("bin/{name}"), PROGRAM, fs::read(&stripped)?);
        for line in output("ldd", &[from], Path::new("."))?.lines() {
            if let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) {
                self.file(library, PROGRAM, fs::read(library)?);
            }
        }
        Ok(())
    }

    /// Modules and what they depend on, with a list in the order in which they must be inserted.
    fn modules(&mut self, root: &Path, names: &[&str]) -> Result<()> {
        let mut found = BTreeMap::new();
        find_modules(root, &mut found)?;
        let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
        for name in names {
            self.module(name, &found, &mut seen, &mut order)?;
        }
        self.file("modules/order", PROGRAM, order.join("\n").into_bytes());
        Ok(())
    }

    fn module(
        &mut self,
        name: &str,
        found: &BTreeMap<String, PathBuf>,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<String>,
    ) -> Result<()> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        // What is no module is part of the kernel, or its lack will show.
        let Some(path) = found.get(name) else { return Ok(()) };
        let content = if path.extension().is_some_and(|extension| extension == "xz") {
            bytes("xz", &["--decompress", "--stdout", path.to_str().context("path")?], Path::new("."))?
        } else {
            fs::read(path)?
        };
        for needed in dependencies(&content) {
            self.module(&needed, found, seen, order)?;
        }
        self.file(&format!("modules/{name}.ko"), PROGRAM, content);
        order.push(name.to_owned());
        Ok(())
    }

    /// The archive as the kernel reads it.
    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, (path, (mode, content))) in (1..).zip(&self.0) {
            entry(&mut out, number, &path.to_string_lossy(), *mode, content);
        }
        entry(&mut out, 0, "TRAILER!!!", 0, &[]);
        out
    }
}

/// One file: a header of hexadecimal numbers, its name and its content, each padded to four bytes.
fn entry(out: &mut Vec<u8>, number: usize, name: &str, mode: u32, content: &[u8]) {
    let pad = |out: &mut Vec<u8>| out.resize(out.len().next_multiple_of(4), 0);
    let (mode, size, name_size) = (mode as usize, content.len(), name.len() + 1);
    // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    let fields = [number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
    out.extend(b"070701");
    fields.iter().for_each(|field| out.extend(format!("{field:08X}").bytes()));
    out.extend(name.bytes().chain([0]));
    pad(out);
    out.extend(content);
    pad(out);
}

/// All modules below a folder by their names.
fn find_modules(folder: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let (kind, path) = entry.map(|entry| (entry.file_type(), entry.path()))?;
        if kind?.is_dir() {
            find_modules(&path, found)?;
        } else if let Some((name, _)) = path.file_name().and_then(|name| name.to_str()?.split_once(".ko")) {
            found.insert(name.replace('-', "_"), path);
        }
    }
    ensure!(folder.is_dir(), "{}: no folder", folder.display());
    Ok(())
}

/// What a module says it depends on: `depends=a,b`, closed by a zero.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|bytes| bytes == KEY) else { return Vec::new() };
    let value = module[start + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}
