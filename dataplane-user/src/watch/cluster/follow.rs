//! Lists a kind and follows its changes, for ever.
//!
//! List, tell all of it, watch from there; a watch that ends is resumed where it was; one that cannot be resumed means
//! to list again, which also finds what was deleted meanwhile. Nothing that fails is told as a deletion.

use super::access::Access;
use super::failure::{Failure, Remedy, Verb};
use super::listing::{self, AsOf, Events, Listing, NotStreamed};
use super::seen::Seen;
use crate::model::{Change, Kind};
use crate::watch::names::Names;
use crate::watch::objects::Written;
use crate::watch::{Changes, Status};
use futures::StreamExt;
use kube::ResourceExt;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::core::metadata::PartialObjectMeta;
use kube::runtime::watcher::DefaultBackoff;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The server ends a watch after so many seconds, and it is resumed at once. Drawn for each watch, as client-go does: nodes
/// that began together, because the server began then, do not come back together.
const WATCH_SECONDS: Range<u32> = 300..600;
/// How often a watch may fail without telling anything before all is listed anew.
const FRUITLESS: u32 = 3;
/// A watch that ended sooner than this did not work.
const SHORTEST_WATCH: Duration = Duration::from_secs(1);
/// After so long without a failure, the next one is the first.
const HEALTHY: Duration = Duration::from_secs(30);
/// How often a kind that the agent does without is asked for.
const ASK_AGAIN: Duration = Duration::from_secs(600);
/// How many Nodes are asked for when ours is not among them.
const NODES: u32 = 500;
/// How many Nodes are named when ours is not among them.
const NAMED_NODES: usize = 20;

/// What to follow, and where to tell it.
pub(super) struct Following {
    pub(super) access: Access,
    pub(super) labels: Option<String>,
    pub(super) fields: Option<String>,
    pub(super) changes: Changes,
    pub(super) status: Status,
}

/// Nobody listens any more.
struct Closed;

/// Why a watch ended.
enum End {
    /// It goes on from the last resource version.
    Resume,
    /// It does not.
    Relist,
}

/// Follows the objects of `W` until nobody listens.
pub(super) async fn follow<W: Written>(following: Following) {
    let follower = Follower::<W> {
        server: "".into(),
        names: Names::default(),
        as_of: AsOf::Any,
        streams: true,
        fruitless: 0,
        failed: None,
        backoff: DefaultBackoff::default(),
        following,
        kind: PhantomData,
    };
    let Closed = follower.run().await;
}

struct Follower<W> {
    /// The API server that was last asked, in words.
    server: Arc<str>,
    names: Names,
    /// From which moment on the next list must be.
    as_of: AsOf,
    /// Whether the server may have streamed lists.
    streams: bool,
    /// How often a watch failed since anything was told.
    fruitless: u32,
    /// When the last failure was over.
    failed: Option<Instant>,
    backoff: DefaultBackoff,
    following: Following,
    kind: PhantomData<W>,
}

impl<W: Written> Follower<W> {
    async fn run(mut self) -> Closed {
        loop {
            let (mut version, mut events) = match self.list().await {
                Ok(Ok(listed)) => listed,
                Ok(Err(failure)) => match self.list_failed(failure).await {
                    Ok(()) => continue,
                    Err(closed) => return closed,
                },
                Err(closed) => return closed,
            };
            loop {
                match self.watch(&mut version, events.take()).await {
                    Ok(End::Resume) => {}
                    Ok(End::Relist) => {
                        if self.as_of != AsOf::Now {
                            self.as_of = AsOf::Version(version);
                        }
                        break;
                    }
                    Err(closed) => return closed,
                }
            }
        }
    }

    /// Lists everything and tells it. Gives back the resource version to watch from, and the watch if it has begun.
    async fn list(&mut self) -> Result<Result<(String, Option<Events<W>>), Failure>, Closed> {
        let listing = match self.listing().await {
            Ok(listing) => listing,
            Err((verb, error)) => return Ok(Err(self.failure(verb, &error))),
        };
        let is_without_node = listing.is_without_node();
        let Listing { objects, unreadable, version, events } = listing;
        tracing::debug!(kind = %W::KIND, objects = objects.len(), version, "listed");
        let named = unreadable.iter().map(|(object, _)| object.clone()).collect();
        self.tell(Change::Replaced { kind: W::KIND, objects, unreadable: named }).await?;
        for (object, error) in unreadable {
            self.tell(Change::Unreadable { object, error }).await?;
        }
        self.as_of = if version.is_empty() { AsOf::Now } else { AsOf::Version(version.clone()) };
        self.following.status.listed(W::KIND);
        self.recovered().await;
        if is_without_node {
            self.name_the_nodes().await;
        }
        Ok(Ok((version, events)))
    }

    async fn listing(&mut self) -> Result<Listing<W>, (Verb, kube::Error)> {
        let api = self.api().await;
        if self.streams {
            let parameters = self.watch_parameters();
            match listing::streamed(&api, parameters, &self.as_of, &mut self.names).await {
                Ok(listing) => return Ok(listing),
                Err(NotStreamed::Failed(error)) => return Err((Verb::List, error)),
                Err(NotStreamed::Unknown) => {
                    tracing::debug!(kind = %W::KIND, "{} has no streamed lists", self.server);
                    self.streams = false;
                }
            }
        }
        let parameters = ListParams {
            label_selector: self.following.labels.clone(),
            field_selector: self.following.fields.clone(),
            ..ListParams::default()
        };
        let listed = listing::listed(&api, parameters, &self.as_of, &mut self.names).await;
        listed.map_err(|error| (Verb::List, error))
    }

    /// With the newest credentials.
    async fn api(&mut self) -> Api<Seen<W>> {
        let session = self.following.access.session().await;
        self.following.status.set_place(session.server.clone());
        self.server = session.server;
        Api::all(session.client)
    }

    fn watch_parameters(&self) -> WatchParams {
        WatchParams {
            label_selector: self.following.labels.clone(),
            field_selector: self.following.fields.clone(),
            timeout: Some(fastrand::u32(WATCH_SECONDS)),
            bookmarks: true,
            send_initial_events: false,
        }
    }

    /// Watches from `version` on, which it moves; by these events, if there are some.
    async fn watch(&mut self, version: &mut String, events: Option<Events<W>>) -> Result<End, Closed> {
        let began = Instant::now();
        let mut stream = match events {
            Some(events) => events,
            None => {
                let parameters = self.watch_parameters();
                match self.api().await.watch(&parameters, version).await {
                    Ok(stream) => stream.boxed(),
                    Err(error) => return Ok(self.watch_failed(self.failure(Verb::Watch, &error)).await),
                }
            }
        };
        self.recovered().await;
        while let Some(event) = stream.next().await {
            let seen = match event {
                Ok(WatchEvent::Added(seen) | WatchEvent::Modified(seen)) => {
                    let next = seen.resource_version().map(str::to_owned);
                    let change = seen
                        .read(&mut self.names)
                        .map_or_else(|(object, error)| Change::Unreadable { object, error }, Change::Applied);
                    self.tell(change).await?;
                    next
                }
                Ok(WatchEvent::Deleted(seen)) => {
                    let next = seen.resource_version().map(str::to_owned);
                    let reference = seen.reference(&mut self.names);
                    self.tell(Change::Deleted(reference)).await?;
                    next
                }
                Ok(WatchEvent::Bookmark(bookmark)) => Some(bookmark.metadata.resource_version),
                Ok(WatchEvent::Error(status)) => {
                    let action = format!("watch {}", self.resource());
                    let failure = Failure::answered(action, &self.server, &status);
                    return Ok(self.watch_failed(failure).await);
                }
                Err(error) => return Ok(self.watch_failed(self.failure(Verb::Watch, &error)).await),
            };
            match seen.filter(|version| !version.is_empty()) {
                Some(next) => self.went_on(version, next),
                // An object that is so broken that it has no version: where the watch is, only a list can tell.
                None => return Ok(End::Relist),
            }
        }
        if began.elapsed() >= SHORTEST_WATCH {
            return Ok(End::Resume);
        }
        tokio::time::sleep(self.delay()).await;
        self.failed = Some(Instant::now());
        Ok(self.end(Remedy::ResumeOrList))
    }

    /// The watch told something.
    fn went_on(&mut self, version: &mut String, next: String) {
        self.fruitless = 0;
        *version = next;
        self.following.status.heard(W::KIND);
    }

    /// How to go on after a watch that failed.
    fn end(&mut self, remedy: Remedy) -> End {
        match remedy {
            Remedy::Resume => return End::Resume,
            Remedy::ResumeOrList => {
                self.fruitless += 1;
                if self.fruitless < FRUITLESS {
                    return End::Resume;
                }
            }
            // What is there is older than what was told, or is counted in another way: only the database knows.
            Remedy::List => self.as_of = AsOf::Now,
        }
        self.fruitless = 0;
        End::Relist
    }

    async fn tell(&self, change: Change) -> Result<(), Closed> {
        self.following.changes.send(change).await.map_err(|_| Closed)
    }

    /// The plural with its group, as RBAC rules are written.
    fn resource(&self) -> String {
        if W::GROUP.is_empty() { W::PLURAL.to_owned() } else { format!("{}.{}", W::PLURAL, W::GROUP) }
    }

    fn failure(&self, verb: Verb, error: &kube::Error) -> Failure {
        Failure::new(verb, &self.resource(), &self.server, error)
    }

    async fn list_failed(&mut self, failure: Failure) -> Result<(), Closed> {
        // ServiceCIDRs are younger than the oldest API servers, and than the oldest roles.
        if W::KIND == Kind::ServiceCidr && matches!(failure.code, 403 | 404) {
            return self.do_without(&failure).await;
        }
        if failure.remedy == Remedy::List {
            self.as_of = AsOf::Now;
        }
        self.failed(&failure).await;
        Ok(())
    }

    async fn do_without(&mut self, failure: &Failure) -> Result<(), Closed> {
        if self.following.status.failed(W::KIND, &failure.action, &failure.why) {
            tracing::warn!("{failure}; going on without the cluster's ServiceCIDRs: give --service-cidr");
        }
        if !self.following.status.of(W::KIND).synced {
            self.tell(Change::replaced(W::KIND, Vec::new())).await?;
        }
        self.following.status.change(W::KIND, |status| (status.synced, status.unavailable) = (true, true));
        tokio::time::sleep(ASK_AGAIN).await;
        Ok(())
    }

    async fn watch_failed(&mut self, failure: Failure) -> End {
        if failure.code == 410 {
            // Nothing is wrong: the agent was away, or the API server forgets fast.
            tracing::info!("{failure}");
            tokio::time::sleep(self.delay()).await;
            self.failed = Some(Instant::now());
        } else {
            self.failed(&failure).await;
        }
        self.end(failure.remedy)
    }

    /// Says what failed, if it is something new, and waits.
    async fn failed(&mut self, failure: &Failure) {
        if failure.is_about_credentials {
            self.following.access.refused().await;
        }
        let delay = self.delay();
        if self.following.status.failed(W::KIND, &failure.action, &failure.why) {
            tracing::warn!("{failure}; what is known stays in force; trying again");
        }
        tokio::time::sleep(delay).await;
        self.failed = Some(Instant::now());
    }

    /// The time to wait after a failure: longer from one to the next, as long as the server asks for, and never the same
    /// for all nodes.
    fn delay(&mut self) -> Duration {
        if self.failed.is_none_or(|failed| failed.elapsed() > HEALTHY) {
            self.backoff = DefaultBackoff::default();
        }
        let asked_for = self.following.access.pause.left(Instant::now());
        let own = self.backoff.next().unwrap_or(HEALTHY);
        own.max(asked_for.mul_f64(1.0 + fastrand::f64() / 2.0))
    }

    /// Notes that the API server answers.
    async fn recovered(&self) {
        self.following.access.accepted().await;
        if self.following.status.answered(W::KIND) {
            tracing::info!("following {} again", self.server);
        }
    }

    /// Says which Nodes there are, because ours is not.
    async fn name_the_nodes(&self) {
        let api = Api::<PartialObjectMeta<Seen<W>>>::all(self.following.access.session().await.client);
        let wanted =
            self.following.fields.as_deref().unwrap_or_default().trim_start_matches("metadata.name=");
        let there = match api.list_metadata(&ListParams::default().limit(NODES)).await {
            Ok(list) => {
                let mut names: Vec<_> = list.items.iter().map(ResourceExt::name_any).collect();
                let more = if names.len() > NAMED_NODES { ", …" } else { "" };
                names.sort();
                names.truncate(NAMED_NODES);
                if names.is_empty() { "none".to_owned() } else { names.join(", ") + more }
            }
            Err(error) => self.failure(Verb::List, &error).to_string(),
        };
        tracing::warn!(
            "there is no Node \"{wanted}\" (there are: {there}): check --node-name; waiting for it"
        );
    }
}
