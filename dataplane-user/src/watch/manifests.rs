//! A folder of manifests: the YAML (or JSON) that one would give to `kubectl apply`, watched live.
//!
//! For a node without a cluster, and for tests. A file that cannot be read costs nothing that was known.

mod documents;
mod folder;
mod follow;
mod trust;

pub use documents::{ManifestError, parse};

use super::{Changes, Events, KINDS, Options, Status, Watch};
use crate::model::Change;
use folder::{Folder, Reader};
use follow::Follower;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Watches the manifests in `folder`: every file whose name ends in `.yaml`, `.yml` or `.json`, without subfolders and
/// hidden files.
///
/// A folder or a file that others than root or the agent's user can write is not read, but named.
///
/// The objects of all files are told at once. Fails only if the folder cannot be read now.
pub fn watch(folder: PathBuf, options: Options, changes: impl Into<Changes>) -> Result<Watch, ManifestError> {
    let follower = Follower::new(&folder)?;
    let status = Status::default();
    status.set_place(folder.to_string_lossy());
    let task = tokio::spawn(run(folder, options, follower, changes.into(), status.clone()));
    Ok(Watch { status, events: Events::none(), tasks: vec![task] })
}

/// Until nobody listens.
async fn run(path: PathBuf, options: Options, mut follower: Follower, changes: Changes, status: Status) {
    let mut reader = Reader::new(path.clone());
    let node_name = options.node_name.clone();
    let mut folder = Folder::new(path, options);
    let mut touched = BTreeSet::new();
    let mut others = None;
    loop {
        let asked = touched;
        let reading = tokio::task::spawn_blocking(move || {
            let reading = reader.read(&asked);
            (reader, reading)
        });
        let Ok((returned, reading)) = reading.await else { return };
        reader = returned;
        // What is being written while it is read is half a file: it is read again when its writer is done.
        let unfinished = follower.unfinished();
        reader.forget(&unfinished);
        let (told, complaints) = folder.update(reading, &unfinished);
        complaints.iter().for_each(log);
        let were_others = std::mem::replace(&mut others, folder.other_nodes());
        if let Some(names) = others.as_ref().filter(|_| others != were_others) {
            let names = names.join(", ");
            tracing::warn!("no manifest has a Node \"{node_name}\" (there are: {names}): check --node-name");
        }
        let error = folder.error();
        KINDS.iter().for_each(|kind| status.change(*kind, |status| status.error.clone_from(&error)));
        for change in told {
            let listed = if let Change::Replaced { kind, .. } = &change { Some(*kind) } else { None };
            if changes.send(change).await.is_err() {
                return;
            }
            listed.iter().for_each(|kind| status.listed(*kind));
        }
        touched = follower.next().await;
    }
}

fn log(complaint: &ManifestError) {
    match complaint {
        ManifestError::Document { .. } => {
            tracing::error!("{complaint}; the last good version of this file stays")
        }
        ManifestError::File { .. } | ManifestError::Object { .. } | ManifestError::Duplicate { .. } => {
            tracing::error!("{complaint}");
        }
    }
}

#[cfg(test)]
mod tests;
