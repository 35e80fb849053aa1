//! Tasks that must not die in silence.

use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Spawns a task that the service cannot do without. Should it panic, the service ends: `fatal` is cancelled,
/// and whoever runs the process starts it again in a state that is known.
pub fn essential<F>(name: &'static str, tracker: &TaskTracker, fatal: &CancellationToken, task: F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let fatal = fatal.clone();
    tracker.spawn(async move {
        if AssertUnwindSafe(task).catch_unwind().await.is_err() {
            tracing::error!(task = name, "an essential task panicked; the service ends");
            fatal.cancel();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_the_service() {
        let (tracker, fatal) = (TaskTracker::new(), CancellationToken::new());
        essential("fine", &tracker, &fatal, async {});
        tracker.close();
        tracker.wait().await;
        assert!(!fatal.is_cancelled());
        tracker.reopen();
        essential("faulty", &tracker, &fatal, async { panic!("on purpose") });
        fatal.cancelled().await;
    }
}
