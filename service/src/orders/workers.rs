//! The tasks around the store.
//!
//! They run once per process and need not be alone: everything they do is decided by a row or by the ledger, so
//! two of them, or one that dies between any two lines, do no harm.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client};
use seckill_domain::{Epoch, OutboxId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::centers::OrderCenters;
use super::expiry::Expiry;
use super::kafka::{KafkaOptions, KafkaQueue};
use super::releases::Releases;
use super::store::OrderStore;
use super::tailer::Tailer;
use super::trim::Trim;
use crate::cross_center::CrossCenter;
use crate::inventory::Barrier;
use crate::topology::Authority;

/// How long a connection may take to come about, and a call to be answered. Longer than any block of a read.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause after a failure: long enough not to burn a core, short beside what an outage takes.
const PAUSE: Duration = Duration::from_millis(500);

/// How the workers pace themselves.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Orders in one transaction at most, roughly: whole outbox entries are stored together.
    pub store_batch: usize,
    /// How often due orders are looked for.
    pub expiry_interval_ms: u64,
    /// What an order gets that came due while the service was away.
    pub expiry_grace_s: u32,
    /// How often waiting releases are delivered.
    pub release_interval_ms: u64,
    /// Outbox entries that were stored more recently stay.
    pub outbox_retention_s: u32,
    /// The way to other centers, where there are any.
    pub cross: Option<CrossCenter>,
    /// The order databases of all centers, where there are others than this one's.
    pub centers: Option<OrderCenters>,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        WorkerOptions {
            store_batch: 4096,
            expiry_interval_ms: 1000,
            expiry_grace_s: 120,
            release_interval_ms: 100,
            outbox_retention_s: 3600,
            cross: None,
            centers: None,
        }
    }
}

/// How the tailer of one partition stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TailerStatus {
    /// It has not read anything yet.
    Starting,
    /// It follows the outbox.
    Following {
        /// Up to where entries are stored.
        position: OutboxId,
    },
    /// It does not read on until this is over; it tries again by itself.
    Waiting {
        /// What it waits for.
        reason: String,
    },
    /// The database has stored entries that the ledger does not have: the ledger was rolled back (F2). Sales have
    /// to stop until `seckill ledger adopt`.
    RolledBack {
        /// Up to where entries are stored.
        position: OutboxId,
        /// The ledger's last entry.
        ledger: OutboxId,
    },
}

/// How accepted orders come to the store.
#[derive(Clone)]
pub enum Queue {
    /// A tailer for each partition reads the local outbox.
    Outbox,
    /// A relay publishes the outbox to every center's Kafka, a consumer stores what is in this one's.
    Kafka(KafkaOptions),
}

/// The running workers.
#[derive(Debug, Clone)]
pub struct Workers {
    tailers: Vec<watch::Receiver<TailerStatus>>,
    kafka: Option<KafkaQueue>,
}

impl Workers {
    /// Starts the queue's workers and a trimmer for each partition of the ledger, and the expiry and release
    /// workers. They end when the token is cancelled, each after the step that it is in. Should the barrier panic,
    /// nothing that they write would count any more, and `fatal` is cancelled.
    pub fn spawn(
        store: &OrderStore,
        ledger: &[Client],
        authority: &Authority,
        queue: &Queue,
        options: &WorkerOptions,
        tracker: &TaskTracker,
        (token, fatal): (&CancellationToken, &CancellationToken),
    ) -> Workers {
        let links: Vec<Link> = (0u8..)
            .zip(ledger)
            .map(|(partition, client)| Link {
                partition,
                client: client.clone(),
                authority: authority.clone(),
                barrier: Barrier::open(client.clone(), authority, tracker, fatal),
                cross: options.cross.clone(),
            })
            .collect();
        let mut tailers = Vec::new();
        let mut kafka = None;
        match queue {
            Queue::Outbox => {
                for link in &links {
                    let (tailer, status) = Tailer::new(store.clone(), link.clone(), options);
                    tailers.push(status);
                    let tailer = Arc::new(tailer);
                    supervise("order tailer", tracker, token, move |token| {
                        let tailer = Arc::clone(&tailer);
                        async move { tailer.run(token).await }
                    });
                }
            }
            Queue::Kafka(kafka_options) => {
                let batch = options.store_batch.max(1);
                kafka = Some(KafkaQueue::spawn(store, &links, kafka_options, batch, tracker, token));
            }
        }
        for link in links.iter().cloned() {
            // Kafka has no mark of a center that nobody is at home in; a tailer follows the outbox there, too.
            let everywhere = matches!(queue, Queue::Outbox);
            let trim = Arc::new(Trim::new(store.clone(), link, options, everywhere));
            supervise("outbox trim", tracker, token, move |token| {
                let trim = Arc::clone(&trim);
                async move { trim.run(token).await }
            });
        }
        let expiry = Arc::new(Expiry::new(store.clone(), options));
        supervise("order expiry", tracker, token, move |token| {
            let expiry = Arc::clone(&expiry);
            async move { expiry.run(token).await }
        });
        let releases = Arc::new(Releases::new(store.clone(), links, options));
        supervise("order releases", tracker, token, move |token| {
            let releases = Arc::clone(&releases);
            async move { releases.run(token).await }
        });
        Workers { tailers, kafka }
    }

    /// The name of the queue.
    pub fn queue(&self) -> &'static str {
        if self.kafka.is_some() { "kafka" } else { "outbox" }
    }

    /// What the queue waits for, if for anything: nothing is lost meanwhile, but orders come late.
    pub fn waiting(&self) -> Vec<String> {
        let tailers = self.tailers.iter().filter_map(|tailer| match &*tailer.borrow() {
            TailerStatus::Starting | TailerStatus::Following { .. } => None,
            TailerStatus::Waiting { reason } => Some(reason.clone()),
            TailerStatus::RolledBack { position, ledger } => {
                Some(format!("the ledger ends at {ledger}, but entries up to {position} are stored"))
            }
        });
        tailers.chain(self.kafka.iter().flat_map(KafkaQueue::waiting)).collect()
    }

    /// How the Kafka queue stands, where it is the queue.
    pub fn kafka(&self) -> Option<&KafkaQueue> {
        self.kafka.as_ref()
    }

    /// How the tailer of a partition stands, and every change of it.
    pub fn tailer(&self, partition: u8) -> Option<watch::Receiver<TailerStatus>> {
        self.tailers.get(usize::from(partition)).cloned()
    }
}

/// The way to one partition's local Redis.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) partition: u8,
    pub(super) client: Client,
    pub(super) authority: Authority,
    /// What a write counts behind, and what an entry is read behind.
    pub(super) barrier: Barrier,
    /// The way to the master center's ledger, where that is another one's.
    pub(super) cross: Option<CrossCenter>,
}

impl Link {
    /// The epoch that releases are made at now, here or in the master center.
    pub(super) fn epoch(&self) -> Option<Epoch> {
        match (self.authority.grant(), &self.cross) {
            (Ok(grant), _) => Some(grant.fence.epoch),
            (Err(_), Some(cross)) => cross.other_master().map(|_| cross.epoch()),
            (Err(_), None) => None,
        }
    }

    /// A connection of the caller's own, which it may hold up.
    pub(super) async fn connect(&self) -> Result<MultiplexedConnection, seckill_ledger::Error> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(RESPONSE_TIMEOUT));
        Ok(self.client.get_multiplexed_async_connection_with_config(&config).await?)
    }
}

/// Sleeps; `false` if the token was cancelled meanwhile.
pub(super) async fn sleep(duration: Duration, token: &CancellationToken) -> bool {
    token.run_until_cancelled(tokio::time::sleep(duration)).await.is_some()
}

/// The pause after a failure.
pub(super) async fn pause(token: &CancellationToken) -> bool {
    sleep(PAUSE, token).await
}

/// What lasts no longer than this is no news: at each change of the epoch every worker meets a ledger that is ahead of
/// the topology or behind it for a moment, and the change itself is in the log. As long as a shift may hold purchases.
const NO_NEWS: Duration = Duration::from_secs(3);

/// Logs a row of failures once, when it has lasted for a while, and its end; not each of them.
#[derive(Debug, Default)]
pub(super) struct Streak {
    failures: u64,
    since: Option<Instant>,
    said: bool,
}

impl Streak {
    pub(super) fn failed(&mut self, worker: &str, error: &dyn std::fmt::Display) {
        self.failures += 1;
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() >= NO_NEWS && !std::mem::replace(&mut self.said, true) {
            tracing::warn!(worker, failures = self.failures, %error, "an order worker fails; it goes on trying");
        } else {
            tracing::debug!(worker, failures = self.failures, %error, "an order worker failed; it tries again");
        }
    }

    pub(super) fn succeeded(&mut self, worker: &str) {
        if self.said {
            tracing::info!(worker, failures = self.failures, "an order worker works again");
        }
        *self = Streak::default();
    }
}

/// Runs a worker, and runs it again should it panic: its state is in the database.
pub(crate) fn supervise<F, R>(name: &'static str, tracker: &TaskTracker, token: &CancellationToken, run: R)
where
    F: Future<Output = ()> + Send + 'static,
    R: Fn(CancellationToken) -> F + Send + 'static,
{
    let token = token.clone();
    tracker.spawn(async move {
        while AssertUnwindSafe(run(token.clone())).catch_unwind().await.is_err() {
            tracing::error!(worker = name, "an order worker panicked and is started again");
            if !pause(&token).await {
                break;
            }
        }
    });
}
