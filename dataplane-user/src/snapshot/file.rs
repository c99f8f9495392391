//! The file that holds the snapshot: replaced whole or not at all, and set aside where it cannot be trusted.

use super::format::{self, Owner, Refusal};
use super::servers::{self, Source};
use crate::model::{Object, Shared};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The file's name in the state folder.
const NAME: &str = "snapshot";
/// What is written until it is whole.
const UNFINISHED: &str = "snapshot.new";
/// What was not trusted: the last such file, for people to look at.
const REFUSED: &str = "snapshot.refused";
/// Why the folder may stay: there is none, it holds what is not ours, or it is mounted into a container, perhaps one whose root is
/// read-only.
const STAYS: [io::ErrorKind; 4] = [
    io::ErrorKind::NotFound,
    io::ErrorKind::DirectoryNotEmpty,
    io::ErrorKind::ResourceBusy,
    io::ErrorKind::ReadOnlyFilesystem,
];
/// Bits of a file's mode by which others than its owner may write it.
const OTHERS_WRITE: u32 = 0o022;

/// What keeps a snapshot from being used or written.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It is not trusted.
    #[error("the snapshot {} is not used: {refusal}; it is now {}", file.display(), aside.display())]
    Refused {
        /// The file.
        file: PathBuf,
        /// Why.
        refusal: Refusal,
        /// Where it is now.
        aside: PathBuf,
    },
    /// It is whole, but not of a time that the operator allows.
    #[error("the snapshot {} is not used: {reason}", file.display())]
    Age {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// It cannot be read.
    #[error("the snapshot {} cannot be read: {error}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
    /// It cannot be removed.
    #[error("cannot remove {}: {error}", file.display())]
    Remove {
        /// The file.
        file: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
    /// It cannot be written.
    #[error("cannot write the snapshot {}: {error}: check --state-dir", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// What a snapshot holds.
#[derive(Debug)]
pub struct Loaded {
    /// When it was taken.
    pub taken: SystemTime,
    /// The objects.
    pub objects: Vec<Object>,
}

/// The snapshot of one node's agent.
#[derive(Clone, Debug)]
pub struct File {
    folder: PathBuf,
    owner: Owner,
}

impl File {
    /// In this folder, which need not exist yet.
    pub fn new(folder: impl Into<PathBuf>, owner: Owner) -> Self {
        Self { folder: folder.into(), owner }
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.folder.join(NAME)
    }

    /// Replaces the snapshot, and gives back its size in bytes. Whatever happens, afterwards there is the old one or the
    /// new one.
    ///
    /// # Errors
    /// If it cannot be written; the old one is then still there.
    pub fn save(&self, objects: &Shared, taken: SystemTime) -> Result<u64, SnapshotError> {
        self.try_save(objects, taken).map_err(|error| SnapshotError::Write { file: self.path(), error })
    }

    /// Keeps where API servers are, beside the snapshot.
    ///
    /// # Errors
    /// If that cannot be written; what was written before is then still there.
    pub fn save_servers(&self, servers: &[String]) -> Result<(), SnapshotError> {
        servers::write(&self.folder, Source::Endpoints, servers)
            .map_err(|error| SnapshotError::Write { file: self.folder.join(Source::Endpoints.file()), error })
    }

    fn try_save(&self, objects: &Shared, taken: SystemTime) -> io::Result<u64> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let unfinished = self.folder.join(UNFINISHED);
        // Left behind by a crash, perhaps with another mode.
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
        let written = format::write(&file, &self.owner, taken, objects).and_then(|()| {
            file.sync_all()?;
            Ok(file.metadata()?.len())
        });
        if written.is_err() {
            // A full disk is not to be kept full by half a snapshot.
            let _ = fs::remove_file(&unfinished);
            return written;
        }
        fs::rename(&unfinished, self.path())?;
        fs::File::open(&self.folder)?.sync_all()?;
        written
    }

    /// The snapshot, if there is one.
    ///
    /// # Errors
    /// If it cannot be read, or is not trusted: then it was renamed, so that it is not met again.
    pub fn load(&self) -> Result<Option<Loaded>, SnapshotError> {
        let path = self.path();
        match self.read(&path) {
            Ok(Ok((taken, objects))) => Ok(Some(Loaded { taken, objects })),
            Ok(Err(refusal)) => Err(self.refuse(path, refusal)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(SnapshotError::Read { file: path, error }),
        }
    }

    /// The same for who only looks: what is not trusted stays where it is, and is none.
    pub fn look(&self) -> Option<Loaded> {
        let (taken, objects) = self.read(&self.path()).ok()?.ok()?;
        Some(Loaded { taken, objects })
    }

    fn read(&self, path: &Path) -> io::Result<Result<(SystemTime, Vec<Object>), Refusal>> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        let looks = file.metadata()?;
        // SAFETY: the call has no arguments and always succeeds.
        let own = unsafe { libc::geteuid() };
        if looks.uid() != own {
            return Ok(Err(Refusal::Open(format!("it belongs to user {}", looks.uid()))));
        }
        if looks.mode() & OTHERS_WRITE != 0 {
            return Ok(Err(Refusal::Open(format!("its mode is {:o}", looks.mode() & 0o7777))));
        }
        format::read(file, &self.owner)
    }

    fn refuse(&self, file: PathBuf, refusal: Refusal) -> SnapshotError {
        let aside = self.folder.join(REFUSED);
        match fs::rename(&file, &aside) {
            Ok(()) => SnapshotError::Refused { file, refusal, aside },
            // A read-only disk: it is refused all the same.
            Err(_) => SnapshotError::Refused { aside: file.clone(), file, refusal },
        }
    }
}

/// Removes whatever any [`File`] has left in a folder, and where API servers were found, and the folder if it is empty then; tells each thing that it removed. A
/// folder that is mounted into a container stays there, empty.
///
/// # Errors
/// If something is there and cannot be removed.
pub fn remove(folder: &Path, mut removed: impl FnMut(String)) -> Result<(), SnapshotError> {
    let servers = [Source::Endpoints, Source::Kubelet].map(Source::file);
    for name in [NAME, UNFINISHED, REFUSED].into_iter().chain(servers) {
        let file = folder.join(name);
        match fs::remove_file(&file) {
            Ok(()) => removed(format!("file {}", file.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(SnapshotError::Remove { file, error }),
        }
    }
    match fs::remove_dir(folder) {
        Ok(()) => removed(format!("folder {}", folder.display())),
        Err(error) if STAYS.contains(&error.kind()) => {}
        Err(error) => return Err(SnapshotError::Remove { file: folder.to_owned(), error }),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::samples::{endpoint, service, slice};
    use crate::model::{Change, Store};
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::Duration;

    /// A folder of its own, removed with the test.
    struct Folder(PathBuf);

    #[test]
    fn who_only_looks_leaves_what_is_not_trusted_where_it_is() {
        let folder = Folder::new("look");
        let file = folder.file();
        file.save(&Shared::default(), SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(file.look().unwrap().taken, SystemTime::UNIX_EPOCH);
        let others = File::new(&folder.0, Owner { node: "n2".into(), proxy_name: None });
        assert!(others.look().is_none() && file.path().exists(), "another node's");
        fs::write(file.path(), "damaged").unwrap();
        assert!(file.look().is_none() && file.path().exists());
    }

    impl Folder {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("portolan-snapshot-{test}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Self(path)
        }

        fn file(&self) -> File {
            File::new(&self.0, Owner { node: "n1".into(), proxy_name: None })
        }

        fn names(&self) -> Vec<String> {
            let mut names: Vec<_> = fs::read_dir(&self.0)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn taken() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn store() -> Store {
        let mut store = Store::new("n1");
        store.apply(Change::Applied(Object::Service(service("web"))));
        let web_1 = slice("web-1", "web", vec![endpoint("10.0.0.1", "n1")]);
        store.apply(Change::Applied(Object::EndpointSlice(web_1)));
        store
    }

    #[test]
    fn a_snapshot_comes_back_and_only_root_may_read_it() {
        let folder = Folder::new("comes-back");
        let file = folder.file();
        assert!(file.load().unwrap().is_none(), "there is none yet");
        file.save(&store().share(), taken()).unwrap();
        let loaded = file.load().unwrap().unwrap();
        assert_eq!((loaded.taken, loaded.objects.len()), (taken(), 2));
        assert_eq!(folder.names(), ["snapshot"]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file.path()), mode(&folder.0)), (0o600, 0o700));
    }

    #[test]
    fn what_changes_while_it_is_written_is_in_the_next_one() {
        let folder = Folder::new("shared");
        let (file, mut store) = (folder.file(), store());
        let shared = store.share();
        let more = slice("web-2", "web", vec![endpoint("10.0.0.2", "n1")]);
        let revision = store.revision();
        store.apply(Change::Applied(Object::EndpointSlice(more.clone())));
        assert_ne!(store.revision(), revision);
        file.save(&shared, taken()).unwrap();
        assert_eq!(file.load().unwrap().unwrap().objects.len(), 2);
        file.save(&store.share(), taken()).unwrap();
        assert_eq!(file.load().unwrap().unwrap().objects.len(), 3);
        let revision = store.revision();
        store.apply(Change::Applied(Object::EndpointSlice(more)));
        assert_eq!(store.revision(), revision, "told again");
    }

    #[test]
    fn half_a_snapshot_that_a_crash_left_is_never_met() {
        let folder = Folder::new("crash");
        let file = folder.file();
        file.save(&store().share(), taken()).unwrap();
        fs::write(folder.0.join(UNFINISHED), "{\"portolan_snapshot\":1").unwrap();
        assert_eq!(file.load().unwrap().unwrap().objects.len(), 2);
        file.save(&Store::new("n1").share(), taken()).unwrap();
        assert_eq!(file.load().unwrap().unwrap().objects.len(), 0);
        assert_eq!(folder.names(), ["snapshot"]);
    }

    #[test]
    fn all_that_is_left_is_removed_and_nothing_else() {
        let folder = Folder::new("removed");
        let removed = |folder: &Folder| {
            let mut told = Vec::new();
            remove(&folder.0, |what| told.push(what)).unwrap();
            told
        };
        assert!(removed(&folder).is_empty(), "there is nothing yet");
        folder.file().save(&store().share(), taken()).unwrap();
        for name in [UNFINISHED, REFUSED, Source::Kubelet.file(), "stranger"] {
            fs::write(folder.0.join(name), "").unwrap();
        }
        assert_eq!(removed(&folder).len(), 4);
        assert_eq!(folder.names(), ["stranger"]);
        fs::remove_file(folder.0.join("stranger")).unwrap();
        assert_eq!(removed(&folder), [format!("folder {}", folder.0.display())]);
        assert!(!folder.0.exists());
    }

    #[test]
    fn what_is_not_trusted_is_set_aside_and_named() {
        let folder = Folder::new("aside");
        let file = folder.file();
        for text in ["first", "second"] {
            fs::create_dir_all(&folder.0).unwrap();
            fs::write(file.path(), text).unwrap();
            let error = file.load().unwrap_err().to_string();
            let expected = format!("the snapshot {} is not used: it is damaged: ", file.path().display());
            assert!(error.starts_with(&expected), "{error}");
            assert!(error.ends_with("snapshot.refused"), "{error}");
            assert_eq!(fs::read_to_string(folder.0.join(REFUSED)).unwrap(), text, "the last one is kept");
            assert!(file.load().unwrap().is_none(), "it is not met again");
        }
    }

    #[test]
    fn what_others_may_write_is_not_trusted() {
        let folder = Folder::new("open");
        let file = folder.file();
        file.save(&store().share(), taken()).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o622)).unwrap();
        let error = file.load().unwrap_err().to_string();
        assert!(error.contains("its mode is 622: only root may be able to write it"), "{error}");
        std::os::unix::fs::symlink(folder.0.join(REFUSED), file.path()).unwrap();
        assert!(matches!(file.load(), Err(SnapshotError::Read { .. })), "a link is not followed");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_an_error_and_keeps_what_it_has() {
        let folder = Folder::new("unwritable");
        fs::create_dir_all(&folder.0).unwrap();
        fs::write(folder.0.join("file"), "").unwrap();
        let file = File::new(folder.0.join("file"), Owner { node: "n1".into(), proxy_name: None });
        let error = file.save(&store().share(), taken()).unwrap_err().to_string();
        assert!(error.starts_with("cannot write the snapshot ") && error.ends_with("check --state-dir"));
    }
}
