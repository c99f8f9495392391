//! Keeps the node's own routes to Services, which lead its packets to a program whatever its other routes say. It runs
//! beside the tables, and is back within a second where something takes a route away.

use crate::heartbeat::Beat;
use crate::kernel::service_route::{RouteError, ServiceRoutes, Wanted};
use crate::metrics::Metrics;
use ipnet::IpNet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// Time between two looks whether the routes are there.
const LOOK: Duration = Duration::from_millis(500);
/// How many times longer than one of the event loop a round may take.
pub(super) const PATIENCE: u32 = 1;

/// Follows what is wanted until nobody wants anything any more. No route leads to the device before its program is `attached`, to
/// an interface of that index. `settled` is told when the first routes are there, or cannot be.
pub(super) async fn keep(
    mut wanted: watch::Receiver<Wanted>,
    mut attached: watch::Receiver<Option<u32>>,
    settled: watch::Sender<bool>,
    metrics: Arc<Metrics>,
    beat: Beat,
) {
    let mut routes = loop {
        match ServiceRoutes::open() {
            Ok(routes) => break routes,
            Err(error) => tracing::error!("{error}"),
        }
        beat.beat();
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    let mut looks = tokio::time::interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = None;
    loop {
        beat.beat();
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            changed = attached.changed() => if changed.is_err() { return },
            _ = looks.tick() => {}
        }
        let now = wanted.borrow_and_update().clone();
        if now.ranges.is_empty() {
            continue;
        }
        let result = match routes.device(now.mtu).await {
            Ok(device) if *attached.borrow_and_update() == Some(device) => routes.ensure(device, &now).await,
            Ok(_) => continue,
            Err(error) => Err(error),
        };
        tell(result, &now, &mut told, &metrics);
        settled.send_if_modified(|settled| !std::mem::replace(settled, true));
    }
}

/// Says what changed, once.
fn tell(
    result: Result<Vec<IpNet>, RouteError>,
    wanted: &Wanted,
    told: &mut Option<Result<Wanted, String>>,
    metrics: &Metrics,
) {
    let now = match result {
        Ok(restored) => {
            if !restored.is_empty() {
                metrics.routes_restored.add(restored.len() as u64);
                let restored: Vec<_> = restored.iter().map(ToString::to_string).collect();
                tracing::warn!(
                    "something removed the route for {}: it is back. Does a network manager remove routes that it does not know?",
                    restored.join(", ")
                );
            }
            Ok(wanted.clone())
        }
        Err(error) => Err(error.to_string()),
    };
    metrics.routes.set(if now.is_ok() { wanted.ranges.len() as u64 } else { 0 });
    if told.as_ref() == Some(&now) {
        return;
    }
    match &now {
        Ok(wanted) => {
            let ranges: Vec<_> =
                wanted.ranges.iter().map(|(range, source)| format!("{range} from {source}")).collect();
            tracing::info!(
                "the node itself sends to Services by {}: {}",
                crate::kernel::service_route::DEVICE,
                ranges.join(", ")
            );
        }
        Err(error) => tracing::error!("{error}"),
    }
    *told = Some(now);
}
