//! How all objects of a kind are read: as a stream of events where the server has that, else as a list, by default from
//! the server's memory in place of its database.
//!
//! A streamed list (`sendInitialEvents`, KEP-3157) is a watch that begins with all there is, says when that was all, and goes
//! on as a watch. Neither side holds it as one text. A server that does not know of it refuses, or never says the end.

use super::seen::Seen;
use crate::model::{Kind, Object, Reference};
use crate::watch::names::Names;
use crate::watch::objects::Written;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use kube::Error;
use kube::api::{Api, ListParams, VersionMatch, WatchEvent, WatchParams};
use std::collections::BTreeMap;

/// Objects per page of a list that the server reads from its database.
const PAGE: u32 = 500;
/// The bookmark that ends the initial events has this annotation.
const ALL_SENT: &str = "k8s.io/initial-events-end";

/// The events of a watch.
pub(super) type Events<W> = BoxStream<'static, Result<WatchEvent<Seen<W>>, Error>>;

/// From which moment on a list must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AsOf {
    /// Whatever the server has in memory.
    Any,
    /// This resource version or a later one: what was told must not become older.
    Version(String),
    /// Now: the server asks its database.
    Now,
}

impl AsOf {
    fn version(&self) -> &str {
        match self {
            Self::Any => "0",
            Self::Version(version) => version,
            Self::Now => "",
        }
    }
}

/// All objects of a kind.
pub(super) struct Listing<W> {
    pub(super) objects: Vec<Object>,
    pub(super) unreadable: Vec<(Reference, String)>,
    pub(super) version: String,
    /// What comes next, of a list that was streamed.
    pub(super) events: Option<Events<W>>,
}

/// Why there is no streamed list.
pub(super) enum NotStreamed {
    /// This server has none: ask for a plain list.
    Unknown,
    /// Something failed that would fail a plain list as well.
    Failed(Error),
}

/// Asks for all objects as a stream.
pub(super) async fn streamed<W: Written>(
    api: &Api<Seen<W>>,
    parameters: WatchParams,
    as_of: &AsOf,
    names: &mut Names,
) -> Result<Listing<W>, NotStreamed> {
    let parameters = WatchParams { bookmarks: true, send_initial_events: true, ..parameters };
    // Invalid, or a server that wants no such parameter; nothing that a plain list would be told.
    let failed = |error| {
        let is_refused = matches!(&error, Error::Api(status) if matches!(status.code, 400 | 422));
        if is_refused { NotStreamed::Unknown } else { NotStreamed::Failed(error) }
    };
    let events = api.watch(&parameters, as_of.version()).await.map_err(failed)?;
    let mut events: Events<W> = events.boxed();
    let mut objects = BTreeMap::new();
    while let Some(event) = events.try_next().await.map_err(failed)? {
        match event {
            WatchEvent::Added(seen) | WatchEvent::Modified(seen) => {
                objects.insert(seen.reference(names).name, seen.read(names));
            }
            WatchEvent::Deleted(seen) => {
                objects.remove(&seen.reference(names).name);
            }
            WatchEvent::Bookmark(bookmark) if bookmark.metadata.annotations.contains_key(ALL_SENT) => {
                let mut listing = Listing {
                    objects: Vec::with_capacity(objects.len()),
                    unreadable: Vec::new(),
                    version: bookmark.metadata.resource_version,
                    events: Some(events),
                };
                objects.into_values().for_each(|read| listing.take(read));
                return Ok(listing);
            }
            // It watches, but it does not know what it was asked for.
            WatchEvent::Bookmark(_) => return Err(NotStreamed::Unknown),
            WatchEvent::Error(status) => return Err(failed(Error::Api(status))),
        }
    }
    Err(NotStreamed::Unknown)
}

/// Asks for all objects as a list.
pub(super) async fn listed<W: Written>(
    api: &Api<Seen<W>>,
    parameters: ListParams,
    as_of: &AsOf,
    names: &mut Names,
) -> Result<Listing<W>, Error> {
    let mut parameters = match as_of {
        AsOf::Now => parameters.limit(PAGE),
        // With a limit it would come from the database.
        AsOf::Any | AsOf::Version(_) => parameters.at(as_of.version()).matching(VersionMatch::NotOlderThan),
    };
    let mut listing =
        Listing { objects: Vec::new(), unreadable: Vec::new(), version: String::new(), events: None };
    loop {
        let page = api.list(&parameters).await?;
        page.items.into_iter().for_each(|seen| listing.take(seen.read(names)));
        parameters.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if parameters.continue_token.is_none() {
            listing.version = page.metadata.resource_version.unwrap_or_default();
            listing.objects.shrink_to_fit();
            return Ok(listing);
        }
        // The token says what the other pages are of.
        (parameters.resource_version, parameters.version_match) = (None, None);
    }
}

impl<W: Written> Listing<W> {
    fn take(&mut self, read: Result<Object, (Reference, String)>) {
        match read {
            Ok(object) => self.objects.push(object),
            Err(refused) => self.unreadable.push(refused),
        }
    }

    /// Whether there is no Node of the agent's name.
    pub(super) fn is_without_node(&self) -> bool {
        W::KIND == Kind::Node && self.objects.is_empty()
    }
}
