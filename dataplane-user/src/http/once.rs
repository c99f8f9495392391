//! A page that costs much to make: made once for all who wait for it.

use super::Page;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Instant;
use tokio::sync::Mutex;

/// The page, while somebody waits for it.
#[derive(Debug, Default)]
pub struct Once {
    waiting: AtomicUsize,
    /// When the last one was begun, and what came of it.
    last: Mutex<Option<(Instant, Arc<Page>)>>,
}

impl Once {
    /// The page, no older than this question: one is made at a time, and all who asked before it was begun share it.
    pub async fn get(&self, make: impl FnOnce() -> Page + Send + 'static) -> Arc<Page> {
        let asked = Instant::now();
        let _waiting = Waiting::new(&self.waiting);
        let mut last = self.last.lock().await;
        let known = last.as_ref().filter(|(begun, _)| *begun >= asked).map(|(_, page)| page.clone());
        let page = match known {
            Some(page) => page,
            None => {
                let begun = Instant::now();
                let made = tokio::task::spawn_blocking(make).await;
                let page =
                    Arc::new(made.unwrap_or_else(|_| Page::text(500, "this is a fault of portolan\n")));
                *last = Some((begun, page.clone()));
                page
            }
        };
        if self.waiting.load(SeqCst) == 1 {
            // Nobody else wants it: it may be large.
            *last = None;
        }
        page
    }
}

/// Somebody who waits, until that is dropped: clients hang up.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// H3
    #[tokio::test]
    async fn those_who_wait_share_a_page_and_nobody_gets_one_from_before_he_asked() {
        let (once, made) = (Arc::new(Once::default()), Arc::new(AtomicUsize::new(0)));
        let get = || {
            let (once, made) = (once.clone(), made.clone());
            tokio::spawn(async move {
                let make = move || {
                    let number = made.fetch_add(1, SeqCst);
                    std::thread::sleep(Duration::from_millis(100));
                    Page::text(200, number.to_string())
                };
                once.get(make).await.body.clone()
            })
        };
        let first = get();
        while made.load(SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let later: Vec<_> = (0..50).map(|_| get()).collect();
        assert_eq!(first.await.unwrap(), "0");
        for page in later {
            assert_eq!(page.await.unwrap(), "1");
        }
        assert!(once.last.lock().await.is_none(), "it is not kept");
        assert_eq!(get().await.unwrap(), "2");
    }
}
