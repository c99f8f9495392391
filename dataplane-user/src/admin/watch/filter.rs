//! Which events are shown, and how many.

use super::super::names::is_of;
use super::host;
use super::line::EventLine;
use crate::config::WatchArgs;
use std::time::{Duration, Instant};

/// What somebody asked for.
#[derive(Debug)]
pub(super) struct Filter {
    service: Option<String>,
    pod: Option<String>,
    reasons: Vec<String>,
    events: Vec<&'static str>,
    rate: Option<u32>,
    second: Instant,
    shown: u32,
    left_out: u64,
}

impl Filter {
    pub(super) fn new(args: &WatchArgs) -> Self {
        Self {
            service: args.service.clone(),
            pod: args.pod.clone(),
            reasons: args.reason.clone(),
            events: args.event.iter().map(|event| event.name()).collect(),
            rate: args.rate,
            second: Instant::now(),
            shown: 0,
            left_out: 0,
        }
    }

    /// Whether an event is one of those that are wanted. What is about the watch itself always is.
    pub(super) fn wants(&self, line: &EventLine) -> bool {
        if line.count.is_some() {
            return true;
        }
        let service = line.service.as_deref().unwrap_or_default();
        let of_service = self.service.as_ref().is_none_or(|wanted| is_of(service, wanted));
        let of_pod = self.pod.as_ref().is_none_or(|wanted| {
            let ends = [(&line.client, &line.client_name), (&line.endpoint, &line.endpoint_name)];
            ends.iter().any(|(address, name)| is_end(wanted, address.as_deref(), name.as_deref()))
        });
        let for_reason = self.reasons.is_empty()
            || line.reason.as_ref().is_some_and(|reason| self.reasons.contains(reason));
        let of_kind = self.events.is_empty() || self.events.contains(&line.event.as_str());
        of_service && of_pod && for_reason && of_kind
    }

    /// Whether another line may be shown in this second; else it is counted.
    pub(super) fn allows(&mut self) -> bool {
        let Some(rate) = self.rate else { return true };
        if self.second.elapsed() >= Duration::from_secs(1) {
            (self.second, self.shown) = (Instant::now(), 0);
        }
        if self.shown < rate {
            self.shown += 1;
            return true;
        }
        self.left_out += 1;
        false
    }

    /// How many lines were left out, once their second is over.
    pub(super) fn left_out(&mut self) -> Option<u64> {
        let is_over = self.left_out > 0 && self.second.elapsed() >= Duration::from_secs(1);
        is_over.then(|| std::mem::take(&mut self.left_out))
    }
}

/// Whether somebody who wrote an address, or the name of a pod with its namespace or without, means this end.
fn is_end(wanted: &str, address: Option<&str>, name: Option<&str>) -> bool {
    let is_name = name
        .is_some_and(|name| name == wanted || name.split_once('/').is_some_and(|(_, name)| name == wanted));
    address.map(host) == Some(wanted) || is_name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_meant_by_its_address_or_its_name() {
        for (wanted, address, name) in [
            ("10.0.0.1", Some("10.0.0.1:80"), None),
            ("10.0.0.1", Some("10.0.0.1"), None),
            ("fd00::1", Some("[fd00::1]:80"), None),
            ("fd00::1", Some("fd00::1"), None),
            ("web-0", Some("10.0.0.2:80"), Some("shop/web-0")),
            ("shop/web-0", None, Some("shop/web-0")),
            ("node", Some("10.0.0.2"), Some("node")),
        ] {
            assert!(is_end(wanted, address, name), "{wanted}");
        }
        assert!(!is_end("10.0.0.1", Some("10.0.0.10:80"), Some("shop/web-0")));
        assert!(!is_end("web", None, Some("shop/web-0")));
    }
}
