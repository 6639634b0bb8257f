//! Work that blocks, on a thread of its own: a disk that hangs holds up one VM, not `laird`.

use std::io;
use tokio::sync::oneshot;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    /// The host or the service has as many threads as it may have.
    #[error("No thread can be started")]
    Start(#[source] io::Error),
    /// The work panicked.
    #[error("Internal error: work on a thread ended without a result")]
    Lost,
}

/// Does `work` on a thread. Work that has begun goes on to its end, should this be dropped.
///
/// Not on tokio's threads: it panics where the first of them cannot be started (faults.md, SV9), and work is rare enough here for the
/// few microseconds that a new one takes.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ThreadError> {
    let (sender, receiver) = oneshot::channel();
    let thread = std::thread::Builder::new().name("work".into());
    thread.spawn(move || drop(sender.send(work()))).map_err(ThreadError::Start)?;
    receiver.await.map_err(|_| ThreadError::Lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_gives_its_result_and_a_panic_is_an_error() {
        assert_eq!(run(|| 7).await.unwrap(), 7);
        let lost = run(|| panic!("asked for by a test")).await;
        assert!(matches!(lost, Err::<(), _>(ThreadError::Lost)));
    }
}
