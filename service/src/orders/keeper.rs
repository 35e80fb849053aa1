//! Keeps `shard_owner` of this center's database at what the topology says: shards that were given to this center are
//! taken, those that were given away are given up, and a move that was given up leaves nothing blocked.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::error::Error;
use super::store::{OrderStore, Owners, Turned};
use super::workers::{Streak, pause, supervise};
use crate::topology::Topology;

/// How often the rows are looked at although the topology stands still: somebody else may have changed them, another
/// center's late change of them among others.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Starts the keeper.
pub fn spawn_keeper(
    store: &OrderStore,
    topology: &watch::Receiver<Arc<Topology>>,
    tracker: &TaskTracker,
    token: &CancellationToken,
) {
    let (store, topology) = (store.clone(), topology.clone());
    let (limited, limits) = (store.clone(), topology.clone());
    // By itself: the other one waits for the database.
    supervise("shard limits", tracker, token, move |token| limit(limited.clone(), limits.clone(), token));
    supervise("shard owners", tracker, token, move |token| keep(store.clone(), topology.clone(), token));
}

/// Follows the topology once and says what changed.
pub async fn follow_owners(store: &OrderStore, owners: &Owners) -> Result<Turned, Error> {
    let turned = store.follow_owners(owners).await?;
    for (shards, what) in [(&turned.gained, "are ours now"), (&turned.lost, "are another center's now")] {
        if !shards.is_empty() {
            let shards: Vec<u8> = shards.iter().map(|shard| shard.number()).collect();
            tracing::info!(?shards, "shards {what}");
        }
    }
    Ok(turned)
}

async fn limit(store: OrderStore, mut topology: watch::Receiver<Arc<Topology>>, token: CancellationToken) {
    loop {
        store.limit_to(&Owners::of(&topology.borrow_and_update()));
        tokio::select! {
            () = token.cancelled() => return,
            changed = topology.changed() => if changed.is_err() { return },
        }
    }
}

async fn keep(store: OrderStore, mut topology: watch::Receiver<Arc<Topology>>, token: CancellationToken) {
    let mut streak = Streak::default();
    loop {
        let owners = Owners::of(&topology.borrow_and_update());
        match follow_owners(&store, &owners).await {
            Ok(_) => streak.succeeded("shard owners"),
            Err(Error::Closed) => return,
            Err(error) => {
                streak.failed("shard owners", &error);
                if !pause(&token).await {
                    return;
                }
                continue;
            }
        }
        tokio::select! {
            () = token.cancelled() => return,
            changed = topology.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
    }
}
