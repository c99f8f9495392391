//! What a folder of manifests holds, and how it differs from what was told.

use super::documents::{Entry, ManifestError, read};
use super::trust::distrust;
use crate::model::{Change, Object, Reference};
use crate::watch::names::Names;
use crate::watch::{KINDS, Options};
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, Metadata};
use std::hash::{Hash, Hasher};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Whether a file of this name counts. Hidden files are those of editors and of ConfigMap volumes.
pub(super) fn is_manifest(name: &str) -> bool {
    let ends = [".yaml", ".yml", ".json"];
    !name.starts_with('.') && ends.iter().any(|end| name.ends_with(end))
}

/// Reads the files that changed.
#[derive(Debug)]
pub(super) struct Reader {
    folder: PathBuf,
    names: Names,
    seen: HashMap<String, Seen>,
}

/// A file as it was read.
#[derive(Debug)]
struct Seen {
    /// Inode, size, times of modification and change.
    looks: Looks,
    /// A hash of its text.
    hash: u64,
}

type Looks = (u64, u64, (i64, i64), (i64, i64));

fn looks(file: &Metadata) -> Looks {
    (file.ino(), file.size(), (file.mtime(), file.mtime_nsec()), (file.ctime(), file.ctime_nsec()))
}

/// What was found in the folder.
#[derive(Debug)]
pub(super) struct Reading {
    /// The files that are there; or why that cannot be told.
    present: Result<BTreeSet<String>, ManifestError>,
    /// Those that are new or changed.
    files: Vec<(String, Contents)>,
}

#[derive(Debug, Default)]
struct Contents {
    entries: Vec<Entry>,
    errors: Vec<ManifestError>,
}

impl Reader {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder, names: Names::default(), seen: HashMap::new() }
    }

    /// Reads the files that look new, and those that were touched however they look: two changes may come so close
    /// that the file's time is the same.
    pub(super) fn read(&mut self, touched: &BTreeSet<String>) -> Reading {
        let present = match list(&self.folder) {
            Ok(present) => present,
            Err(error) => return Reading { present: Err(error), files: Vec::new() },
        };
        self.seen.retain(|name, _| present.contains_key(name));
        let mut files = Vec::new();
        for (name, looks) in &present {
            let is_known = self.seen.get(name).is_some_and(|seen| seen.looks == *looks);
            if touched.contains(name) || !is_known {
                files.extend(self.file(name, *looks).map(|contents| (name.clone(), contents)));
            }
        }
        Reading { present: Ok(present.into_keys().collect()), files }
    }

    /// What a file holds, unless it holds what it did.
    fn file(&mut self, name: &str, looks: Looks) -> Option<Contents> {
        let path = self.folder.join(name);
        let shown = path.display().to_string();
        let text = match text(&path) {
            Ok(text) => text?,
            Err(reason) => {
                self.seen.insert(name.to_owned(), Seen { looks, hash: 0 });
                let reason = format!("{reason}; what was known of it stays");
                let error = ManifestError::File { file: shown, reason };
                return Some(Contents { entries: Vec::new(), errors: vec![error] });
            }
        };
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        let hash = hasher.finish();
        if self.seen.insert(name.to_owned(), Seen { looks, hash }).is_some_and(|seen| seen.hash == hash) {
            return None;
        }
        let (entries, errors) = read(&String::from_utf8_lossy(&text), &shown, &mut self.names);
        Some(Contents { entries, errors })
    }

    /// Forgets what files held, so that they are read again.
    pub(super) fn forget(&mut self, names: &BTreeSet<String>) {
        self.seen.retain(|name, _| !names.contains(name));
    }
}

/// What a file holds: of the very file whose owner was looked at. `None` if it is gone since the folder was listed: the next
/// reading will tell.
fn text(path: &Path) -> Result<Option<Vec<u8>>, String> {
    let read = || -> io::Result<Result<Vec<u8>, String>> {
        let mut file = fs::File::open(path)?;
        if let Some(reason) = distrust(path, &file.metadata()?) {
            return Ok(Err(reason));
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(Ok(text))
    };
    match read() {
        Ok(read) => read.map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot be read: {error}")),
    }
}

/// The names of the manifests in a folder, and how they look.
fn list(folder: &Path) -> Result<BTreeMap<String, Looks>, ManifestError> {
    let failed = |error: io::Error| ManifestError::File {
        file: folder.display().to_string(),
        reason: format!("cannot be listed: {error}; what was known stays"),
    };
    let found = fs::metadata(folder).map_err(failed)?;
    if let Some(reason) = distrust(folder, &found) {
        let reason = format!("{reason}; what was known stays");
        return Err(ManifestError::File { file: folder.display().to_string(), reason });
    }
    let mut names = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if !is_manifest(&name) {
            continue;
        }
        // A link to nothing is not there.
        if let Some(file) = fs::metadata(entry.path()).ok().filter(|file| !file.is_dir()) {
            names.insert(name, looks(&file));
        }
    }
    Ok(names)
}

/// An object of a file, in its last good version.
#[derive(Debug)]
struct Known {
    line: usize,
    object: Arc<Object>,
}

/// The last good version of each file.
#[derive(Debug, Default)]
struct File {
    objects: Vec<Known>,
    errors: Vec<ManifestError>,
}

/// What the folder holds, and what of it was told.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    options: Options,
    files: BTreeMap<String, File>,
    /// What was told; `None` until something was.
    told: Option<HashMap<Reference, Arc<Object>>>,
    error: Option<ManifestError>,
    /// What was complained of, so that it is not said again.
    complained: Vec<ManifestError>,
}

impl Folder {
    pub(super) fn new(path: PathBuf, options: Options) -> Self {
        Self { path, options, files: BTreeMap::new(), told: None, error: None, complained: Vec::new() }
    }

    /// What is wrong with the folder now.
    pub(super) fn error(&self) -> Option<String> {
        self.complained.first().map(ToString::to_string)
    }

    /// Takes a reading over, but for the files that are `unfinished`. Gives back what to tell, and what is wrong that
    /// was not wrong before.
    pub(super) fn update(
        &mut self,
        reading: Reading,
        unfinished: &BTreeSet<String>,
    ) -> (Vec<Change>, Vec<ManifestError>) {
        let mut changes = Vec::new();
        match reading.present {
            Ok(present) => {
                self.error = None;
                self.files.retain(|name, _| present.contains(name) || unfinished.contains(name));
                for (name, contents) in reading.files {
                    if !unfinished.contains(&name) {
                        changes.extend(contents.errors.iter().filter_map(unreadable));
                        self.files.entry(name).or_default().update(contents);
                    }
                }
            }
            Err(error) => self.error = Some(error),
        }
        let (objects, duplicates) = self.objects();
        let complaints = self.complaints(duplicates);
        // What cannot be read is told after what can, so that a first snapshot comes first.
        let mut told = self.tell(objects);
        told.append(&mut changes);
        (told, complaints)
    }

    /// The objects that count, and those that are there twice: the first file by name wins.
    fn objects(&self) -> (HashMap<Reference, Arc<Object>>, Vec<ManifestError>) {
        let mut objects: HashMap<Reference, Arc<Object>> = HashMap::new();
        let mut places: HashMap<Reference, (&str, usize)> = HashMap::new();
        let mut duplicates = Vec::new();
        let known =
            self.files.iter().flat_map(|(name, file)| file.objects.iter().map(move |known| (name, known)));
        for (name, Known { line, object }) in known.filter(|(_, known)| self.counts(&known.object)) {
            let object_name = object.reference();
            match places.get(&object_name) {
                Some((first, first_line)) => duplicates.push(ManifestError::Duplicate {
                    file: self.path.join(name).display().to_string(),
                    line: *line,
                    object: object_name,
                    first: format!("{}:{first_line}", self.path.join(first).display()),
                }),
                None => {
                    places.insert(object_name.clone(), (name, *line));
                    objects.insert(object_name, object.clone());
                }
            }
        }
        (objects, duplicates)
    }

    /// The names of the Nodes, if the own Node is not among them.
    pub(super) fn other_nodes(&self) -> Option<Vec<Arc<str>>> {
        let objects = self.files.values().flat_map(|file| &file.objects);
        let names = objects.filter_map(|known| match &*known.object {
            Object::Node(node) => Some(node.name.clone()),
            Object::Service(_) | Object::EndpointSlice(_) | Object::ServiceCidr { .. } => None,
        });
        let names: Vec<_> = names.collect();
        (!names.is_empty() && !names.contains(&self.options.node_name)).then_some(names)
    }

    /// What the label selectors of the API's watches say (F2), and that only the own Node is told.
    fn counts(&self, object: &Object) -> bool {
        match object {
            Object::Service(service) => self.options.serves(service.proxy_name.as_deref()),
            Object::Node(node) => node.name == self.options.node_name,
            Object::EndpointSlice(_) | Object::ServiceCidr { .. } => true,
        }
    }

    /// What is wrong now and was not before. What an `Unreadable` tells is left to who hears it.
    fn complaints(&mut self, duplicates: Vec<ManifestError>) -> Vec<ManifestError> {
        let of_files = self.files.values().flat_map(|file| &file.errors).cloned();
        let now: Vec<_> = self.error.clone().into_iter().chain(of_files).chain(duplicates).collect();
        let fresh =
            now.iter().filter(|error| !self.complained.contains(error) && unreadable(error).is_none());
        let fresh = fresh.cloned().collect();
        self.complained = now;
        fresh
    }

    /// The changes from what was told to `objects`.
    fn tell(&mut self, objects: HashMap<Reference, Arc<Object>>) -> Vec<Change> {
        let Some(told) = &self.told else {
            // A folder that cannot be read at the start is no empty folder.
            if self.error.is_some() {
                return Vec::new();
            }
            let all = |kind| objects.iter().filter(move |(object, _)| object.kind == kind);
            let replaced = KINDS.iter().map(|kind| {
                Change::replaced(*kind, all(*kind).map(|(_, object)| (**object).clone()).collect())
            });
            let changes = replaced.collect();
            self.told = Some(objects);
            return changes;
        };
        let mut applied: Vec<_> = objects
            .iter()
            .filter(|(reference, object)| {
                told.get(*reference).is_none_or(|told| !Arc::ptr_eq(told, object) && told != *object)
            })
            .collect();
        applied.sort_by_key(|(reference, _)| {
            (KINDS.iter().position(|kind| *kind == reference.kind), *reference)
        });
        let applied = applied.into_iter().map(|(_, object)| Change::Applied((**object).clone()));
        let mut deleted: Vec<_> =
            told.keys().filter(|reference| !objects.contains_key(reference)).cloned().collect();
        deleted.sort();
        let changes = applied.chain(deleted.into_iter().map(Change::Deleted)).collect();
        self.told = Some(objects);
        changes
    }
}

impl File {
    /// Takes over what can be read. If the file does not parse, its last good version stays as a whole; if an object
    /// cannot be used, the last good version of that object stays (Z5).
    fn update(&mut self, contents: Contents) {
        let does_not_parse = contents
            .errors
            .iter()
            .any(|error| matches!(error, ManifestError::Document { .. } | ManifestError::File { .. }));
        let before = std::mem::take(&mut self.objects);
        let refused: BTreeSet<_> = contents.errors.iter().filter_map(refused).collect();
        self.errors = contents.errors.clone();
        if does_not_parse && !before.is_empty() {
            self.objects = before;
            return;
        }
        self.objects =
            before.into_iter().filter(|known| refused.contains(&known.object.reference())).collect();
        let read = contents.entries.into_iter();
        self.objects.extend(read.map(|Entry { line, object }| Known { line, object: Arc::new(object) }));
    }
}

/// The object that an error is about, if it is about one that cannot be used.
fn refused(error: &ManifestError) -> Option<Reference> {
    match error {
        ManifestError::Object { object, .. } => Some(object.clone()),
        ManifestError::File { .. } | ManifestError::Document { .. } | ManifestError::Duplicate { .. } => None,
    }
}

fn unreadable(error: &ManifestError) -> Option<Change> {
    match error {
        ManifestError::Object { file, line, object, reason } => {
            Some(Change::Unreadable { object: object.clone(), error: format!("{file}:{line}: {reason}") })
        }
        ManifestError::File { .. } | ManifestError::Document { .. } | ManifestError::Duplicate { .. } => None,
    }
}
