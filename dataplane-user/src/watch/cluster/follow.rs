//! Lists a kind and follows its changes, for ever.
//!
//! List, tell all of it, watch from there; a watch that ends is resumed where it was; one that cannot be resumed means
//! to list again, which also finds what was deleted meanwhile. Nothing that fails is told as a deletion.

use super::failure::{Failure, Verb};
use super::seen::Seen;
use crate::model::{Change, Kind};
use crate::watch::names::Names;
use crate::watch::objects::Written;
use crate::watch::{Changes, Status};
use futures::StreamExt;
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use kube::core::metadata::PartialObjectMeta;
use kube::runtime::watcher::DefaultBackoff;
use kube::{Client, ResourceExt};
use std::pin::pin;
use std::time::{Duration, Instant};

/// Objects per page of a list.
const PAGE: u32 = 500;
/// The server ends a watch after this many seconds; it is resumed at once.
const WATCH_SECONDS: u32 = 290;
/// A watch that ended sooner than this did not work.
const SHORTEST_WATCH: Duration = Duration::from_secs(1);
/// After so long without a failure, the next one is the first.
const HEALTHY: Duration = Duration::from_secs(30);
/// How often a kind that the agent does without is asked for.
const ASK_AGAIN: Duration = Duration::from_secs(600);
/// How many Nodes are named when ours is not among them.
const NAMED_NODES: usize = 20;

/// What to follow, and where to tell it.
pub(super) struct Following {
    pub(super) client: Client,
    pub(super) server: String,
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
        api: Api::all(following.client.clone()),
        names: Names::default(),
        failed: None,
        backoff: DefaultBackoff::default(),
        following,
    };
    let Closed = follower.run().await;
}

struct Follower<W: Written> {
    api: Api<Seen<W>>,
    names: Names,
    /// When the last failure was over.
    failed: Option<Instant>,
    backoff: DefaultBackoff,
    following: Following,
}

impl<W: Written> Follower<W> {
    async fn run(mut self) -> Closed {
        loop {
            let mut version = match self.list().await {
                Ok(Ok(version)) => version,
                Ok(Err(failure)) => match self.list_failed(failure).await {
                    Ok(()) => continue,
                    Err(closed) => return closed,
                },
                Err(closed) => return closed,
            };
            loop {
                match self.watch(&mut version).await {
                    Ok(End::Resume) => {}
                    Ok(End::Relist) => break,
                    Err(closed) => return closed,
                }
            }
        }
    }

    /// Lists everything and tells it. Gives back the resource version to watch from.
    async fn list(&mut self) -> Result<Result<String, Failure>, Closed> {
        let mut objects = Vec::new();
        let mut unreadable = Vec::new();
        let mut parameters = ListParams { limit: Some(PAGE), ..ListParams::default() };
        parameters.label_selector.clone_from(&self.following.labels);
        parameters.field_selector.clone_from(&self.following.fields);
        let version = loop {
            let page = match self.api.list(&parameters).await {
                Ok(page) => page,
                Err(error) => return Ok(Err(self.failure(Verb::List, &error))),
            };
            for seen in page.items {
                match seen.read(&mut self.names) {
                    Ok(object) => objects.push(object),
                    Err(refused) => unreadable.push(refused),
                }
            }
            parameters.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
            if parameters.continue_token.is_none() {
                break page.metadata.resource_version.unwrap_or_default();
            }
        };
        objects.shrink_to_fit();
        tracing::debug!(kind = %W::KIND, objects = objects.len(), version, "listed");
        let is_without_node = W::KIND == Kind::Node && objects.is_empty();
        let named = unreadable.iter().map(|(object, _)| object.clone()).collect();
        self.tell(Change::Replaced { kind: W::KIND, objects, unreadable: named }).await?;
        for (object, error) in unreadable {
            self.tell(Change::Unreadable { object, error }).await?;
        }
        self.following.status.listed(W::KIND);
        self.recovered();
        if is_without_node {
            self.name_the_nodes().await;
        }
        Ok(Ok(version))
    }

    /// Watches from `version` on, which it moves.
    async fn watch(&mut self, version: &mut String) -> Result<End, Closed> {
        let parameters = WatchParams {
            label_selector: self.following.labels.clone(),
            field_selector: self.following.fields.clone(),
            timeout: Some(WATCH_SECONDS),
            bookmarks: true,
            send_initial_events: false,
        };
        let began = Instant::now();
        let stream = match self.api.watch(&parameters, version).await {
            Ok(stream) => stream,
            Err(error) => return Ok(self.watch_failed(self.failure(Verb::Watch, &error)).await),
        };
        self.recovered();
        let mut stream = pin!(stream);
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
                    let failure = Failure::answered(action, &self.following.server, &status);
                    return Ok(self.watch_failed(failure).await);
                }
                Err(error) => return Ok(self.watch_failed(self.failure(Verb::Watch, &error)).await),
            };
            match seen.filter(|version| !version.is_empty()) {
                Some(next) => *version = next,
                // An object that is so broken that it has no version: where the watch is, only a list can tell.
                None => return Ok(End::Relist),
            }
        }
        if began.elapsed() < SHORTEST_WATCH {
            tokio::time::sleep(self.delay()).await;
            self.failed = Some(Instant::now());
        }
        Ok(End::Resume)
    }

    async fn tell(&self, change: Change) -> Result<(), Closed> {
        self.following.changes.send(change).await.map_err(|_| Closed)
    }

    /// The plural with its group, as RBAC rules are written.
    fn resource(&self) -> String {
        if W::GROUP.is_empty() { W::PLURAL.to_owned() } else { format!("{}.{}", W::PLURAL, W::GROUP) }
    }

    fn failure(&self, verb: Verb, error: &kube::Error) -> Failure {
        Failure::new(verb, &self.resource(), &self.following.server, error)
    }

    async fn list_failed(&mut self, failure: Failure) -> Result<(), Closed> {
        // ServiceCIDRs are younger than the oldest API servers, and than the oldest roles.
        if W::KIND == Kind::ServiceCidr && matches!(failure.code, 403 | 404) {
            return self.do_without(&failure).await;
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
        if failure.relist { End::Relist } else { End::Resume }
    }

    /// Says what failed, if it is something new, and waits.
    async fn failed(&mut self, failure: &Failure) {
        let delay = self.delay();
        if self.following.status.failed(W::KIND, &failure.action, &failure.why) {
            tracing::warn!("{failure}; what is known stays in force; trying again");
        }
        tokio::time::sleep(delay).await;
        self.failed = Some(Instant::now());
    }

    /// The time to wait after a failure: longer from one to the next, and never the same for all nodes.
    fn delay(&mut self) -> Duration {
        if self.failed.is_none_or(|failed| failed.elapsed() > HEALTHY) {
            self.backoff = DefaultBackoff::default();
        }
        self.backoff.next().unwrap_or(HEALTHY)
    }

    /// Notes that the API server answers.
    fn recovered(&self) {
        if self.following.status.answered(W::KIND) {
            tracing::info!("following {} again", self.following.server);
        }
    }

    /// Says which Nodes there are, because ours is not.
    async fn name_the_nodes(&self) {
        let api = Api::<PartialObjectMeta<Seen<W>>>::all(self.following.client.clone());
        let wanted =
            self.following.fields.as_deref().unwrap_or_default().trim_start_matches("metadata.name=");
        let there = match api.list_metadata(&ListParams::default().limit(PAGE)).await {
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
