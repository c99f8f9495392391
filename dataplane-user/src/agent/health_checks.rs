//! Tells of health check ports that cannot be had (S4): in the log, and to those who look at the Service.

use crate::health_checks::Unbound;
use crate::model::Kind;
use crate::watch::events::{Event, Events, Severity, reason};

/// What is done about such a port.
pub(super) fn tell(events: Events) -> impl Fn(&Unbound<'_>) {
    move |unbound| {
        let Unbound { service, uid, address, error } = unbound;
        let note = format!(
            "health check port {} cannot be had at {}: {error}; trying again. Does something else listen there?",
            address.port(),
            address.ip()
        );
        tracing::warn!("Service {service}: {note}");
        events.publish(Event {
            kind: Kind::Service,
            name: (*service).clone(),
            uid: uid.clone(),
            severity: Severity::Warning,
            reason: reason::HEALTH_CHECK_PORT,
            note,
        });
    }
}
