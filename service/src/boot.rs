//! The start: listeners that answer from the first moment, and what happens while something that the service needs is
//! away. It waits, says for what, and goes on.
//!
//! What only passes is waited for: a topology store or an order database that does not answer. What somebody has to
//! correct ends the start at once, with a message that says what to do.

use std::sync::Arc;
use std::time::Duration;

use seckill_domain::CenterId;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::app::Listeners;
use crate::cross_center::tls::ListenerTls;
use crate::http::{
    self, Readiness, ServeOptions, Served, Stage, Starting, starting_admin_router, starting_router,
};
use crate::telemetry::Metrics;

/// Between two attempts. A server that comes back is found soon, and one that is away is asked once a second by each
/// instance.
const RETRY: Duration = Duration::from_secs(1);

/// Tries until it succeeds or fails for good. None: the service is to end. The log says once that it waits and once
/// that it goes on, the probes all the time.
pub(crate) async fn wait_for<T, E: std::fmt::Display>(
    what: &'static str,
    readiness: &Readiness,
    shutdown: &CancellationToken,
    passes: impl Fn(&E) -> bool,
    mut attempt: impl AsyncFnMut() -> Result<T, E>,
) -> Result<Option<T>, E> {
    let mut waiting = false;
    loop {
        // An attempt that was begun is finished: it may be about to change something.
        let error = match attempt().await {
            Ok(found) => {
                if waiting {
                    readiness.waits_for(None);
                    tracing::info!("{what} is there: the start goes on");
                }
                return Ok(Some(found));
            }
            Err(error) if !passes(&error) => return Err(error),
            Err(error) => error,
        };
        let reason = format!("waiting for {what}: {error}");
        if !std::mem::replace(&mut waiting, true) {
            tracing::warn!(retry_s = RETRY.as_secs(), "{reason}");
        }
        readiness.waits_for(Some(reason.into()));
        if shutdown.run_until_cancelled(tokio::time::sleep(RETRY)).await.is_none() {
            return Ok(None);
        }
    }
}

/// The listeners of a service. Until it is put together they answer that it starts.
pub(crate) struct Doors {
    pub(crate) public: Served,
    pub(crate) admin: Served,
    pub(crate) internal: Served,
    pub(crate) readiness: Readiness,
    /// Ends the public and the internal listener, and what streams there.
    pub(crate) ending: CancellationToken,
    admin_ending: CancellationToken,
    serving: JoinSet<usize>,
    serving_admin: JoinSet<usize>,
}

impl Doors {
    /// Answers on all listeners.
    pub(crate) fn open(
        listeners: Listeners,
        tls: Option<ListenerTls>,
        drain_deadline: Duration,
        center: CenterId,
        metrics: Arc<Metrics>,
    ) -> Doors {
        let readiness = Readiness::default();
        let starting = Starting { center, readiness: readiness.clone(), metrics };
        let [public, internal] = [starting_router(), starting_router()].map(Served::from);
        let admin = Served::from(starting_admin_router(starting));
        let [ending, admin_ending] = [CancellationToken::new(), CancellationToken::new()];
        let (mut serving, mut serving_admin) = (JoinSet::new(), JoinSet::new());
        let options = ServeOptions { drain_deadline, ..ServeOptions::default() };
        if let Some(listener) = listeners.internal {
            let options = ServeOptions { tls, ..options.clone() };
            serving.spawn(http::serve(listener, internal.clone(), options, ending.clone()));
        }
        serving.spawn(http::serve(listeners.public, public.clone(), options.clone(), ending.clone()));
        serving_admin.spawn(http::serve(listeners.admin, admin.clone(), options, admin_ending.clone()));
        Doors { public, admin, internal, readiness, ending, admin_ending, serving, serving_admin }
    }

    /// Finishes the requests that are under way. Probes and operators are answered until the end of it.
    pub(crate) async fn close(self) {
        self.readiness.set(Stage::Draining);
        self.ending.cancel();
        self.serving.join_all().await;
        self.admin_ending.cancel();
        self.serving_admin.join_all().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(error: &&str) -> bool {
        *error == "away"
    }

    #[tokio::test(start_paused = true)]
    async fn what_passes_is_waited_for_at_a_bounded_pace_and_what_does_not_ends_the_start() {
        let (readiness, shutdown) = (Readiness::default(), CancellationToken::new());
        let (mut attempts, begun) = (0, tokio::time::Instant::now());
        let found = wait_for("it", &readiness, &shutdown, passes, async || {
            assert_eq!(readiness.reason().is_some(), attempts > 0);
            attempts += 1;
            if attempts < 4 { Err("away") } else { Ok(attempts) }
        })
        .await;
        assert_eq!((found, begun.elapsed()), (Ok(Some(4)), 3 * RETRY));
        assert_eq!(readiness.reason(), None, "it goes on");
        let wrong = wait_for("it", &readiness, &shutdown, passes, async || Err::<(), _>("wrong")).await;
        assert_eq!(wrong, Err("wrong"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_that_is_to_end_waits_for_nothing() {
        let (readiness, shutdown) = (Readiness::default(), CancellationToken::new());
        let ended = wait_for("it", &readiness, &shutdown, passes, async || {
            shutdown.cancel();
            Err::<(), _>("away")
        });
        assert_eq!(ended.await, Ok(None));
        assert_eq!(readiness.reason().as_deref(), Some("waiting for it: away"));
    }
}
