//! The service of one center, put together: `seckill serve`, and each center of `seckill up`.
//!
//! What is wrong with the configuration ends the start before anything is opened. Then the listeners answer, if only
//! that the service is starting ([`crate::boot`]), and everything else starts in the order in which parts need each
//! other. The end is the reverse: first the listeners stop taking connections and finish what they have, then the
//! lanes answer what waits, then the workers stop after the step that they are in.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use seckill_domain::{CenterId, Shard};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{ClientAddress, Limiter, Tickets, Tokens, open_rings};
use crate::audit;
use crate::boot::{Doors, wait_for};
use crate::config::{Config, InternalTls, QueueKind, SecretUrl, Stores};
use crate::cross_center::session::Sessions;
use crate::cross_center::{CrossCenter, Keyring};
use crate::http::{
    AdminState, Auditor, InternalState, PublicState, Relay, Stage, admin_router, internal_router,
    public_router,
};
use crate::inventory::{Inventory, Parts};
use crate::orders::{
    self, KafkaMetrics, KafkaOptions, KafkaQueue, OrderCenters, OrderStore, Owners, Queue, StoreOptions,
    WorkerOptions, Workers, follow_owners, spawn_keeper,
};
use crate::shift::{
    Guardian, GuardianOptions, InitPolicy, SETTLE_RETRY, ServerProcess, SettleParts, Settler, ShardParts,
    ShiftCounts, ShiftOptions, Shifts,
};
use crate::telemetry::Metrics;
use crate::topology::{
    Authority, Cause, Center, Instance, Instances, Limits, StoreError, Topology, TopologyHandle, UpdateError,
    new_ledger_id,
};

/// The partition that exists for now.
const PARTITION: u8 = 0;

/// Properties of the way to a center's brokers.
type Brokers = Vec<(String, String)>;

/// How often the start looks whether the first snapshot is there.
const LOADED_POLL: Duration = Duration::from_millis(10);

/// How long the order database may take to close.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// The sockets that the service answers on, bound by whoever starts it.
#[derive(Debug)]
pub struct Listeners {
    /// Shoppers and the shop's backend.
    pub public: TcpListener,
    /// Operators.
    pub admin: TcpListener,
    /// The other centers, where there are any.
    pub internal: Option<TcpListener>,
}

/// What depends on how the service is started.
#[derive(Debug)]
pub struct Start {
    /// Who creates the ledger.
    pub init: InitPolicy,
    /// What is known of the Redis process, where the service's own parent runs it.
    pub process: Option<watch::Receiver<ServerProcess>>,
    /// Told once requests are answered and the guardian has come to a verdict on the ledger.
    pub ready: Option<oneshot::Sender<()>>,
}

/// Runs the service until `shutdown` is cancelled, and drains it then.
pub async fn run(
    config: Config,
    listeners: Listeners,
    start: Start,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let tracker = TaskTracker::new();
    let fatal = CancellationToken::new();
    let stop = CancellationToken::new();
    let mut opened = None;
    let outcome = serve(&config, listeners, start, &mut opened, &shutdown, &tracker, &stop, &fatal).await;
    stop.cancel();
    tracker.close();
    let drain = Duration::from_secs(config.shutdown.drain_deadline_s);
    if tokio::time::timeout(drain, tracker.wait()).await.is_err() {
        tracing::warn!(drain_deadline_s = drain.as_secs(), "some tasks did not end in time");
    }
    // Moves SQLite's log into the database file; nothing is lost without it.
    if let Some(orders) = opened
        && tokio::time::timeout(CLOSE_WITHIN, orders.close()).await.is_err()
    {
        tracing::warn!("the order database did not close in time");
    }
    outcome?;
    anyhow::ensure!(!fatal.is_cancelled(), "an essential task panicked; see the log");
    Ok(())
}

/// Everything between the start and the last answer. `opened` is the order database, to be closed when its users have
/// ended.
#[expect(clippy::too_many_arguments, reason = "the ends of tasks come from outside, each on its own")]
async fn serve(
    config: &Config,
    listeners: Listeners,
    start: Start,
    opened: &mut Option<OrderStore>,
    shutdown: &CancellationToken,
    tracker: &TaskTracker,
    stop: &CancellationToken,
    fatal: &CancellationToken,
) -> anyhow::Result<()> {
    let found = Found::read(config)?;
    let metrics = Arc::new(Metrics::new());
    let doors = Doors::open(
        listeners,
        found.tls.listener.clone(),
        Duration::from_secs(config.shutdown.drain_deadline_s),
        config.center.id.clone(),
        Arc::clone(&metrics),
    );
    let outcome = work(config, found, start, &metrics, opened, &doors, shutdown, tracker, stop, fatal).await;
    tracing::info!("draining");
    doors.close().await;
    outcome
}

/// What the configuration leads to outside of itself: files, addresses. What is wrong with it shows here, before
/// anything is waited for.
struct Found {
    tokens: Tokens,
    tickets: Tickets,
    keys: Keyring,
    tls: InternalTls,
    stores: Stores,
    database_url: SecretUrl,
    redis_url: SecretUrl,
    redis: redis::Client,
    kafka: Option<BTreeMap<CenterId, Brokers>>,
}

impl Found {
    fn read(config: &Config) -> anyhow::Result<Found> {
        let (tokens, tickets) = open_rings(&config.auth).context("the keys cannot be used")?;
        let redis_url = config.ledger.partitions.first().context("ledger.partitions names no Redis")?.clone();
        Ok(Found {
            tokens,
            tickets,
            keys: config.cross_center.keyring(config.center.id.clone())?,
            tls: config.internal_tls()?,
            stores: config.topology.stores().context("the topology's store cannot be used")?,
            database_url: config.orders.whole_url()?,
            redis: redis::Client::open(redis_url.as_str()).context("ledger.partitions")?,
            redis_url,
            kafka: kafka_clusters(config)?,
        })
    }
}

/// Everything between the first answer and the end. `opened` is the order database.
#[expect(clippy::too_many_arguments, reason = "the ends of tasks come from outside, each on its own")]
async fn work(
    config: &Config,
    found: Found,
    start: Start,
    metrics: &Arc<Metrics>,
    opened: &mut Option<OrderStore>,
    doors: &Doors,
    shutdown: &CancellationToken,
    tracker: &TaskTracker,
    stop: &CancellationToken,
    fatal: &CancellationToken,
) -> anyhow::Result<()> {
    let Found { tokens, tickets, keys, tls, stores, database_url, redis_url, redis: client, kafka } = found;
    let (readiness, metrics) = (doors.readiness.clone(), Arc::clone(metrics));
    let lease_ttl = Duration::from_millis(config.topology.lease_ttl_ms);
    let authority = Authority::new(config.center.id.clone(), lease_ttl, 1);
    metrics.register(|registry| authority.register(registry));
    let read = wait_for("the topology", &readiness, shutdown, StoreError::is_transient, async || {
        let store = Arc::clone(&stores.topology);
        TopologyHandle::open_or_create(store, authority.clone(), first_topology(config)).await
    });
    let Some(topology) = read.await.context("the topology cannot be opened")? else { return Ok(()) };
    let passes = |error: &UpdateError<String>| match error {
        UpdateError::Store(error) => error.is_transient(),
        UpdateError::Refused(_) => false,
    };
    let joined =
        wait_for("the topology", &readiness, shutdown, passes, async || join(&topology, config).await);
    let joined = joined.await.map_err(|error| anyhow::anyhow!("{error}"));
    if joined.context("the configured centers do not fit the topology")?.is_none() {
        return Ok(());
    }
    topology.spawn(tracker, stop.clone());
    let me = Instance::new(
        config.center.id.clone(),
        config.listen.public_url(),
        config.listen.admin_url(),
        config.listen.internal_url(),
    );
    let instance_id = me.id.as_str().to_owned();

    let read =
        wait_for("the order database", &readiness, shutdown, orders::Error::is_transient, async || {
            open_orders(config, &database_url, &topology.current()).await
        });
    let Some(orders) = read.await.context("the order database cannot be opened")? else { return Ok(()) };
    *opened = Some(orders.clone());
    spawn_keeper(&orders, &topology.subscribe(), tracker, stop);
    metrics.register(|registry| orders.metrics().register(registry));
    let instances = Instances::start(stores.instances, Some(me), tracker, stop.clone());

    let guardian = Guardian::spawn(
        GuardianOptions {
            center: config.center.id.clone(),
            partition: PARTITION,
            redis_url: redis_url.to_string(),
            init: start.init,
            diverged_dir: config.ledger.diverged_dir.as_path().into(),
            degrade_after: Duration::from_millis(config.ledger.degrade_after_ms),
            process: start.process,
        },
        topology.clone(),
        authority.clone(),
        orders.clone(),
        tracker,
        stop.clone(),
    )?;
    metrics.register(|registry| guardian.metrics().register(registry));
    let shift_counts = ShiftCounts::default();
    metrics.register(|registry| shift_counts.register(registry));
    tracker.spawn(shift_counts.run(topology.clone(), stop.clone()));
    let shifts = Shifts::spawn(
        ShiftOptions {
            center: config.center.id.clone(),
            instance: instance_id.clone(),
            partition: PARTITION,
            redis_url: redis_url.to_string(),
            lease_ttl,
        },
        topology.clone(),
        authority.clone(),
        instances.clone(),
        tracker,
        stop.clone(),
    )?;
    let sessions = Sessions::new(keys.clone(), instance_id);
    let (signs, caller) = (keys.own().is_some(), tls.caller);
    let cross = signs.then(|| CrossCenter::with_tls(caller, keys, topology.clone(), instances.clone()));
    let shards_decided_within = Duration::from_millis(config.orders.shard_shift_ms);
    let shifts = shifts.with_shards(ShardParts::new(orders.clone(), cross.clone(), shards_decided_within));
    let relay = Relay::new(cross.clone());
    let parts = Parts {
        ledger: &config.ledger,
        inventory: &config.inventory,
        retry_window_ms: u64::from(config.sales.retry_window_s) * 1000,
        topology: topology.clone(),
        authority: authority.clone(),
        cross: cross.clone(),
    };
    let inventory = Inventory::start(&parts, tracker, stop, fatal)?;
    metrics.register(|registry| inventory.metrics().register(registry));
    let queue = queue(config, kafka, &topology, &metrics);
    let centers =
        OrderCenters::new(config.center.id.clone(), orders.clone(), topology.clone(), cross.clone());
    let settle = SettleParts {
        center: config.center.id.clone(),
        diverged_dir: config.ledger.diverged_dir.as_path().into(),
        retry: SETTLE_RETRY,
        topology: topology.clone(),
        inventory: inventory.clone(),
        cross: cross.clone(),
        centers: centers.clone(),
        #[cfg(test)]
        dies_at: Arc::default(),
    };
    let settling = Settler::spawn(settle, tracker, stop);
    metrics.register(|registry| settling.register(registry));
    let worker_options = WorkerOptions { cross, centers: Some(centers.clone()), ..worker_options(config) };
    let workers =
        Workers::spawn(&orders, &[client], &authority, &queue, &worker_options, tracker, (stop, fatal));
    let limiter = Limiter::new(&topology.current().limits);
    tracker.spawn(limiter.clone().run(topology.subscribe(), stop.clone()));

    let kafka = workers.kafka().cloned();
    let auditor = auditor(&inventory, &centers, kafka.clone());
    let tokens = Arc::new(tokens);
    let public = public_router(PublicState {
        inventory: inventory.clone(),
        orders: orders.clone(),
        updates: orders.updates().clone(),
        tokens: Arc::clone(&tokens),
        tickets,
        limiter,
        addresses: ClientAddress::new(config.limits.trusted_proxies.clone()),
        topology: topology.clone(),
        metrics: Arc::clone(&metrics),
        relay: relay.clone(),
        shutdown: doors.ending.clone(),
    });
    let admin = admin_router(AdminState {
        inventory: inventory.clone(),
        orders: orders.clone(),
        centers: centers.clone(),
        workers,
        tokens,
        topology: topology.clone(),
        authority: authority.clone(),
        center: config.center.id.clone(),
        default_currency: config.sales.default_currency,
        auditor,
        guardian,
        shifts,
        instances: instances.clone(),
        relay,
        readiness: readiness.clone(),
        metrics: Arc::clone(&metrics),
    });
    doors.internal.replace(internal_router(InternalState {
        sessions,
        inventory: inventory.clone(),
        orders: orders.clone(),
        queue: kafka,
        topology,
        public: public.clone(),
        admin: admin.clone(),
        tasks: tracker.clone(),
        metrics,
    }));
    doors.public.replace(public);
    doors.admin.replace(admin);

    tokio::select! {
        () = shutdown.cancelled() => {}
        () = fatal.cancelled() => {}
        () = first_verdict(&authority, &inventory) => {
            readiness.set(Stage::Serving);
            tracing::info!(center = %config.center.id, "ready");
            if let Some(ready) = start.ready {
                // Whoever started the service may have gone.
                let _ = ready.send(());
            }
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = fatal.cancelled() => {}
            }
        }
    }
    readiness.set(Stage::Draining);
    instances.leave();
    Ok(())
}

/// Opens the order database. Where its server replicates with the other centers', the master center makes the tables.
async fn open_orders(
    config: &Config,
    database_url: &str,
    topology: &Topology,
) -> Result<OrderStore, orders::Error> {
    let own = &config.center.id;
    let others = Shard::all().map(|shard| (shard, topology.home_center(shard).clone()));
    let options = StoreOptions {
        shards: topology.shards_of(own).collect(),
        others: others.filter(|(_, owner)| owner != own).collect(),
        makes_tables: topology.master == *own,
        max_connections: config.orders.max_connections,
        ..StoreOptions::new(own.clone())
    };
    let orders = OrderStore::open(database_url, options).await?;
    if let Some(server) = orders.server().await?
        && !server.copies.is_empty()
        && server.increments.0 < 2
    {
        tracing::warn!(
            auto_increment_increment = server.increments.0,
            "the order database copies another center's, and both give out the same row numbers: replication will \
             stop; docs/orders.md has the server's settings"
        );
    }
    // Before anybody writes an order: the database may say what was true when this center was last there (O1).
    follow_owners(&orders, &Owners::of(topology)).await?;
    Ok(orders)
}

/// Makes the topology know the configured centers, and their addresses as they are configured now.
async fn join(topology: &TopologyHandle, config: &Config) -> Result<(), UpdateError<String>> {
    let cluster = config.cluster.clone();
    topology.update(move |topology| topology.join(&cluster).map(drop)).await
}

/// What a new topology starts with, at an epoch that the ledger's creation lifts: the configured centers, or this
/// one with everything.
fn first_topology(config: &Config) -> Topology {
    let center = Center {
        number: config.center.number,
        public_url: config.listen.public_url(),
        admin_url: config.listen.admin_url(),
        internal_url: config.listen.internal_url(),
        ledger: Vec::new(),
        extra: serde_json::Map::new(),
    };
    let limits = Limits {
        per_user: config.limits.per_user,
        per_address: config.limits.per_address,
        per_sale: config.limits.per_sale,
        per_instance: config.limits.per_instance,
        ..Limits::default()
    };
    Topology::of_centers(new_ledger_id(), &config.cluster, limits.clone())
        .unwrap_or_else(|| Topology::single(new_ledger_id(), config.center.id.clone(), center, limits))
}

/// The brokers of every center, where orders go through them.
fn kafka_clusters(config: &Config) -> anyhow::Result<Option<BTreeMap<CenterId, Brokers>>> {
    let kafka = match config.queue {
        QueueKind::Outbox => return Ok(None),
        QueueKind::Kafka => &config.kafka,
    };
    let mut centers =
        BTreeMap::from([(config.center.id.clone(), kafka.own().connection().context("kafka")?)]);
    for (id, cluster) in &kafka.centers {
        let connection = cluster.connection().with_context(|| format!("kafka.centers.{id}"))?;
        centers.insert(id.clone(), connection);
    }
    Ok(Some(centers))
}

fn queue(
    config: &Config,
    kafka: Option<BTreeMap<CenterId, Brokers>>,
    topology: &TopologyHandle,
    metrics: &Metrics,
) -> Queue {
    let Some(centers) = kafka else { return Queue::Outbox };
    let counted = KafkaMetrics::default();
    metrics.register(|registry| counted.register(registry));
    Queue::Kafka(KafkaOptions {
        center: config.center.id.clone(),
        centers,
        topic_prefix: config.kafka.topic_prefix.clone(),
        replication_factor: config.kafka.replication_factor,
        topology: topology.subscribe(),
        metrics: counted,
    })
}

fn worker_options(config: &Config) -> WorkerOptions {
    let orders = &config.orders;
    WorkerOptions {
        store_batch: orders.store_batch,
        expiry_interval_ms: orders.expiry_interval_ms,
        expiry_grace_s: orders.expiry_grace_s,
        release_interval_ms: orders.release_interval_ms,
        cross: None,
        centers: None,
        outbox_retention_s: orders.outbox_retention_s,
    }
}

/// Compares the books whenever an operator asks.
fn auditor(inventory: &Inventory, orders: &OrderCenters, kafka: Option<KafkaQueue>) -> Auditor {
    let (pool, orders) = (inventory.pool().clone(), orders.clone());
    Arc::new(move |sale| {
        let (pool, orders, kafka) = (pool.clone(), orders.clone(), kafka.clone());
        Box::pin(async move {
            let report = match pool.get().await {
                Ok(mut conn) => {
                    let mut report = audit::run(&orders, &mut conn, sale.as_ref()).await;
                    if let Some(kafka) = &kafka {
                        audit::add_queue(&mut report, kafka, &orders, &mut conn).await;
                    }
                    report
                }
                Err(error) => audit::Report::incomplete(format!("no connection to the ledger: {error}")),
            };
            serde_json::to_value(&report).map_err(|error| error.to_string())
        })
    })
}

/// Waits until the guardian has come to a verdict, whatever it is, and the first snapshot is there.
async fn first_verdict(authority: &Authority, inventory: &Inventory) {
    let mut status = authority.subscribe();
    let starting = |status: &crate::topology::AuthorityStatus| matches!(status, Err(refusal) if matches!(refusal.cause, Cause::Starting | Cause::Promoting));
    // The sender lives as long as the authority.
    let _ = status.wait_for(|status| !starting(status)).await;
    while !inventory.sales().is_loaded() {
        tokio::time::sleep(LOADED_POLL).await;
    }
}
