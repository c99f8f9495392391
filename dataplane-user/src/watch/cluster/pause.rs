//! What an API server that has too much to do asks its clients for: to wait (`Retry-After`).

use http::header::RETRY_AFTER;
use http::{Request, Response, StatusCode};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tower::{Layer, Service};

/// The longest wait that is believed: a date or a mistake must not keep an agent away for a day.
const LONGEST: Duration = Duration::from_secs(120);

/// Until when the server wants to be left alone; clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Pause(Arc<Mutex<Option<Instant>>>);

impl Pause {
    /// How long that is from now on.
    pub(super) fn left(&self, now: Instant) -> Duration {
        let until = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// Notes what an answer asks for. As for client-go, that is heard where the server refuses (429) or fails.
    fn note(&self, status: StatusCode, after: Option<&str>, now: Instant) {
        if status != StatusCode::TOO_MANY_REQUESTS && !status.is_server_error() {
            return;
        }
        let Some(seconds) = after.and_then(|after| after.trim().parse().ok()) else { return };
        let until = now + Duration::from_secs(seconds).min(LONGEST);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }
}

impl<S> Layer<S> for Pause {
    type Service = Listening<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Listening { inner, pause: self.clone() }
    }
}

/// Passes requests on, and looks at the answers.
pub(super) struct Listening<S> {
    inner: S,
    pause: Pause,
}

impl<S, I, O> Service<Request<I>> for Listening<S>
where
    S: Service<Request<I>, Response = Response<O>>,
    S::Future: Send + 'static,
{
    type Response = Response<O>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<O>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<I>) -> Self::Future {
        let (answer, pause) = (self.inner.call(request), self.pause.clone());
        Box::pin(async move {
            let answer = answer.await?;
            let after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
            pause.note(answer.status(), after, Instant::now());
            Ok(answer)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_server_that_refuses_or_fails_is_left_alone_and_not_for_ever() {
        let now = Instant::now();
        let left = |status, after| {
            let pause = Pause::default();
            pause.note(status, after, now);
            pause.left(now).as_secs()
        };
        assert_eq!(left(StatusCode::TOO_MANY_REQUESTS, Some("7")), 7);
        assert_eq!(left(StatusCode::SERVICE_UNAVAILABLE, Some(" 1 ")), 1);
        assert_eq!(left(StatusCode::TOO_MANY_REQUESTS, Some("86400")), LONGEST.as_secs());
        assert_eq!(left(StatusCode::TOO_MANY_REQUESTS, Some("Fri, 31 Dec 1999 23:59:59 GMT")), 0);
        assert_eq!(left(StatusCode::TOO_MANY_REQUESTS, None), 0);
        assert_eq!(left(StatusCode::OK, Some("7")), 0);
        assert_eq!(left(StatusCode::NOT_FOUND, Some("7")), 0);
    }
}
