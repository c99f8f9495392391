//! The pin folder: where it is, that it lies on a BPF file system, who holds it, and what is pinned in it.
//!
//! `<folder>/<layout>/<map>` and `<folder>/links/<program>[-<interface index>]`. Nothing else may be in there.

use dataplane_common::tables::LAYOUT;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// `BPF_FS_MAGIC` of linux/magic.h.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// How long a process may take to end before its folder counts as held.
pub const ENDING: Duration = Duration::from_secs(3);
/// Where BPF file systems are mounted by custom.
const SYS_FS_BPF: &str = "/sys/fs/bpf";

/// What went wrong with the pin folder.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// No BPF file system, and none could be mounted.
    #[error(
        "there is no BPF file system at {path}, and mounting one failed: {source}. As root on the node, `portolan mount-bpffs` \
         or `mount -t bpf bpf {path}` mounts one. In a cluster an init container does that: a privileged one that has the \
         node's {SYS_FS_BPF} with `mountPropagation: Bidirectional`, as deploy/portolan.yaml has it"
    )]
    Mount {
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A folder or pin cannot be made, read or removed.
    #[error("cannot {verb} {path}: {source}. Is this root, and is --bpffs the right folder?")]
    Folder {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another process holds the folder.
    #[error(
        "the pin folder {path} is in use by {holder}: stop it first, or give this one another folder with --bpffs"
    )]
    Held {
        /// The folder.
        path: PathBuf,
        /// Who holds it.
        holder: String,
    },
}

fn folder_error(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PinError {
    let path = path.to_owned();
    move |source| PinError::Folder { verb, path, source }
}

/// The pin folder.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
    layout: String,
}

impl Pins {
    /// The folder at `root`, which may not exist yet, with maps of this version's layout.
    pub fn new(root: &Path) -> Self {
        Self::with_layout(root, LAYOUT)
    }

    /// The folder at `root` with maps of the layout of this name: `v` and a number.
    pub fn with_layout(root: &Path, layout: &str) -> Self {
        Self { root: root.to_owned(), layout: layout.to_owned() }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of the maps of this layout.
    pub fn maps(&self) -> PathBuf {
        self.root.join(&self.layout)
    }

    /// Pin of a map.
    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    /// Folder of the links.
    pub fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// Pin of a link to an interface.
    pub fn link(&self, program: &str, index: u32) -> PathBuf {
        self.links().join(format!("{program}-{index}"))
    }

    /// Pin of a link to the cgroup.
    pub fn socket_link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    /// Whether the folder, or that in which it would be made, lies on a BPF file system.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn lies_on_bpffs(&self) -> Result<bool, PinError> {
        let existing = self.root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        is_bpffs(existing).map_err(folder_error("read", existing))
    }

    /// Makes the folders, and mounts a BPF file system if there is none; says where it mounted one.
    ///
    /// What counts is the kind of the file system, not whether the folder is a mount point: in a container it is one always.
    ///
    /// # Errors
    /// If it cannot be mounted, or a folder cannot be made.
    pub fn prepare(&self) -> Result<Option<PathBuf>, PinError> {
        let mounted = if self.lies_on_bpffs()? {
            None
        } else {
            let under_custom = self.root.starts_with(SYS_FS_BPF) && Path::new(SYS_FS_BPF).exists();
            let at = if under_custom { Path::new(SYS_FS_BPF) } else { &self.root };
            mount(at)?;
            Some(at.to_owned())
        };
        for folder in [self.maps(), self.links()] {
            fs::create_dir_all(&folder).map_err(folder_error("make", &folder))?;
        }
        Ok(mounted)
    }

    /// Takes the folder for this process; it is free again when the process ends, however it ends.
    ///
    /// Waits up to `patience` for a process that is just ending: one that was killed has it until the kernel is done with it.
    ///
    /// # Errors
    /// [`PinError::Held`] names the process that has it.
    pub fn hold(&self, patience: Duration) -> Result<Held, PinError> {
        let folder = File::open(&self.root).map_err(folder_error("open", &self.root))?;
        let begun = Instant::now();
        loop {
            // SAFETY: a plain system call on a descriptor that is open.
            if unsafe { libc::flock(folder.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
                return Ok(Held { _folder: folder });
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(folder_error("lock", &self.root)(error));
            }
            if begun.elapsed() >= patience {
                return Err(self.held(&folder)?);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Who holds the folder, as an error.
    fn held(&self, folder: &File) -> Result<PinError, PinError> {
        let file = folder.metadata().map_err(folder_error("read", &self.root))?;
        let file = format!("{:02x}:{:02x}:{}", libc::major(file.dev()), libc::minor(file.dev()), file.ino());
        let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
        let holder = holder(&locks, &file).map_or_else(|| "another process".to_owned(), describe);
        Ok(PinError::Held { path: self.root.clone(), holder })
    }

    /// The links that are pinned: names, sorted. None if there is no folder.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn pinned_links(&self) -> Result<Vec<String>, PinError> {
        names(&self.links())
    }

    /// The maps that are pinned, of all layouts: paths below the folder, sorted.
    ///
    /// # Errors
    /// If a folder cannot be read.
    pub fn pinned_maps(&self) -> Result<Vec<PathBuf>, PinError> {
        let mut maps = Vec::new();
        for layout in names(&self.root)?.into_iter().filter(|name| name != "links") {
            let folder = self.root.join(layout);
            maps.extend(names(&folder)?.into_iter().map(|name| folder.join(name)));
        }
        Ok(maps)
    }

    /// The layouts besides this one of which there are maps: an upgrade or its way back is not complete.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn other_layouts(&self) -> Result<Vec<String>, PinError> {
        let names = names(&self.root)?.into_iter();
        Ok(names.filter(|name| is_layout(name) && *name != self.layout).collect())
    }

    /// Whether the programs that are attached may read maps of another layout: then they serve what this layout's maps do not
    /// hold yet. To be asked before this layout's maps are made.
    ///
    /// # Errors
    /// If a folder cannot be read.
    pub fn is_upgrade(&self) -> Result<bool, PinError> {
        let new = names(&self.maps())?.is_empty();
        Ok(!self.other_layouts()?.is_empty() || new && !self.pinned_links()?.is_empty())
    }

    /// Removes the maps of all other layouts; says of which. The kernel has each map for as long as a program reads it. What is
    /// no layout's folder is somebody else's, and stays.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub fn remove_other_layouts(&self) -> Result<Vec<String>, PinError> {
        let layouts = self.other_layouts()?;
        for layout in &layouts {
            let folder = self.root.join(layout);
            for map in names(&folder)? {
                self.remove(&folder.join(map))?;
            }
            fs::remove_dir(&folder).map_err(folder_error("remove", &folder))?;
        }
        Ok(layouts)
    }

    /// Removes one pin. A pin that is gone already is no error.
    ///
    /// # Errors
    /// If it is there and cannot be removed.
    pub fn remove(&self, pin: &Path) -> Result<(), PinError> {
        match fs::remove_file(pin) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(folder_error("remove", pin)(error)),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Removes the folders, which must be empty by now.
    ///
    /// # Errors
    /// If one cannot be removed; the mount point of a file system that is mounted right there stays.
    pub fn remove_folders(&self) -> Result<(), PinError> {
        for folder in names(&self.root)?.into_iter().map(|name| self.root.join(name)) {
            fs::remove_dir(&folder).map_err(folder_error("remove", &folder))?;
        }
        match fs::remove_dir(&self.root) {
            Err(error) if error.raw_os_error() != Some(libc::EBUSY) => {
                Err(folder_error("remove", &self.root)(error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// Whether a name is that of a layout.
pub fn is_layout(name: &str) -> bool {
    name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok())
}

/// The right to use the pin folder, as long as this lives.
#[derive(Debug)]
pub struct Held {
    _folder: File,
}

fn names(folder: &Path) -> Result<Vec<String>, PinError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(folder_error("read", folder)(error)),
    };
    let mut names = entries
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(folder_error("read", folder))?;
    names.sort();
    Ok(names)
}

/// Whether `path` lies on a BPF file system.
fn is_bpffs(path: &Path) -> io::Result<bool> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all zeros are a valid `statfs`, and the kernel fills it in.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` is a closed string, `stat` is as long as the kernel expects; both outlive the call.
    if unsafe { libc::statfs(path.as_ptr(), &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.f_type == BPF_FS_MAGIC)
}

fn mount(at: &Path) -> Result<(), PinError> {
    let failed = |source| PinError::Mount { path: at.to_owned(), source };
    fs::create_dir_all(at).map_err(failed)?;
    let path = CString::new(at.as_os_str().as_bytes()).map_err(|error| failed(error.into()))?;
    // SAFETY: closed strings that outlive the call, and no data.
    let result = unsafe { libc::mount(c"bpf".as_ptr(), path.as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null()) };
    if result != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(())
}

/// The process that holds a lock on `file` (device and inode), from the text of `/proc/locks`.
fn holder(locks: &str, file: &str) -> Option<u32> {
    locks.lines().find_map(|line| {
        // "1: FLOCK  ADVISORY  WRITE 1234 00:2a:56789 0 EOF"; who waits for a lock has "->" in the second place.
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, "FLOCK", _, "WRITE", pid, locked, ..] = fields[..] else { return None };
        let pid = pid.parse().ok().filter(|pid| *pid != 0)?;
        (locked == file).then_some(pid)
    })
}

fn describe(pid: u32) -> String {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    match command.trim() {
        "" => format!("process {pid}"),
        command => format!("process {pid} ({command})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCKS: &str = "\
1: POSIX  ADVISORY  WRITE 77 00:2a:100 0 EOF
2: FLOCK  ADVISORY  WRITE 4711 00:2a:100 0 EOF
2: -> FLOCK  ADVISORY  WRITE 4712 00:2a:100 0 EOF
3: FLOCK  ADVISORY  WRITE 0 00:2a:101 0 EOF
";

    #[test]
    fn the_holder_of_a_lock_is_found_by_device_and_inode() {
        assert_eq!(holder(LOCKS, "00:2a:100"), Some(4711));
        assert_eq!(holder(LOCKS, "00:2b:100"), None);
    }

    #[test]
    fn a_holder_in_another_pid_namespace_has_no_number() {
        assert_eq!(holder(LOCKS, "00:2a:101"), None);
    }

    #[test]
    fn a_folder_that_is_held_is_refused_and_the_holder_is_named() {
        let root = std::env::temp_dir().join(format!("portolan-pins-{}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        let pins = Pins::new(&root);
        let held = pins.hold(Duration::ZERO).unwrap();
        let error = pins.hold(Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(held);
        pins.hold(Duration::ZERO).unwrap();
        fs::remove_dir(&root).unwrap();
    }

    fn folder(name: &str, entries: &[&str]) -> Pins {
        let root = std::env::temp_dir().join(format!("portolan-{name}-{}", std::process::id()));
        let pins = Pins::with_layout(&root, "v4");
        for entry in entries {
            let path = root.join(entry);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        pins
    }

    #[test]
    fn an_upgrade_is_not_complete_before_other_layouts_are_gone() {
        let pins = folder("upgrade", &["links/connect4", "v3/flows", "v3/slots", "theirs/map", "v4/flows"]);
        assert!(pins.is_upgrade().unwrap(), "one was cut short before");
        assert_eq!(pins.remove_other_layouts().unwrap(), ["v3"]);
        assert!(!pins.is_upgrade().unwrap());
        assert!(!pins.root().join("v3").exists() && pins.root().join("theirs/map").exists());
        fs::remove_file(pins.map("flows")).unwrap();
        assert!(pins.is_upgrade().unwrap(), "the programs read maps that are pinned nowhere");
        fs::remove_file(pins.socket_link("connect4")).unwrap();
        assert!(!pins.is_upgrade().unwrap(), "there is nothing");
        fs::remove_dir_all(pins.root()).unwrap();
        assert!(!pins.is_upgrade().unwrap(), "there is no folder");
    }

    #[test]
    fn pins_are_named_by_program_and_interface() {
        let pins = Pins::new(Path::new("/p"));
        assert_eq!(pins.map("flows"), Path::new("/p").join(LAYOUT).join("flows"));
        assert_eq!(pins.link("tc_pod_in", 7), Path::new("/p/links/tc_pod_in-7"));
        assert_eq!(pins.socket_link("connect4"), Path::new("/p/links/connect4"));
    }
}
