//! Looking at the host's devices. A device that is broken may hold up whoever reads it, perhaps for ever; then one thread waits for it, and
//! not one for each request.

use super::{
    server::failed,
    types::{ApiError, ErrorKind},
};
use crate::{error::chain, host::thread};
use std::{sync::Arc, time::Duration};
use tokio::{sync::Mutex, time::timeout};

/// One look at a time.
#[derive(Debug, Clone, Default)]
pub(super) struct Look(Arc<Mutex<()>>);

impl Look {
    /// Does `look` on a thread, after those that were asked for before; waits no longer than `limit` for all of it. What was begun goes on
    /// to its end, and holds up those that come after.
    pub(super) async fn at<T: Send + 'static>(
        &self,
        limit: Duration,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let turn = Arc::clone(&self.0);
        let looked = timeout(limit, async move {
            let turn = turn.lock_owned().await;
            let looked = thread::run(move || {
                let seen = look();
                drop(turn);
                seen
            });
            looked.await.map_err(|error| failed(chain(&error)))
        });
        looked.await.unwrap_or_else(|_| {
            let message =
                format!("The host's devices could not be read within {limit:?}: one of them does not answer");
            Err(ApiError::new(ErrorKind::TimedOut, message).hint("look into the kernel's log: journalctl -k"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc,
    };

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_device_that_does_not_answer_takes_one_thread_and_no_request_waits_for_ever() {
        let look = Look::default();
        let begun = Arc::new(AtomicUsize::new(0));
        let (release, stuck) = mpsc::channel::<()>();
        let count = Arc::clone(&begun);
        let first = look.at(Duration::from_millis(50), move || {
            count.fetch_add(1, SeqCst);
            stuck.recv()
        });
        assert_eq!(first.await.unwrap_err().kind, ErrorKind::TimedOut);
        for _ in 0..10 {
            let count = Arc::clone(&begun);
            let next = look.at(Duration::from_millis(5), move || count.fetch_add(1, SeqCst));
            assert_eq!(next.await.unwrap_err().kind, ErrorKind::TimedOut);
        }
        assert_eq!(begun.load(SeqCst), 1);
        release.send(()).unwrap();
        assert_eq!(look.at(LONG, || 7).await.unwrap(), 7);
    }

    #[tokio::test]
    async fn a_look_that_panics_holds_up_no_other() {
        let look = Look::default();
        assert!(look.at(LONG, || panic!("asked for by a test")).await.is_err());
        assert_eq!(look.at(LONG, || 7).await.unwrap(), 7);
    }
}
