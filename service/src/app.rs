//! The service of one center, put together: `seckill serve`, and each center of `seckill up`.
//!
//! It starts in the order in which parts need each other and ends in the reverse one: first the listeners stop
//! taking connections and finish what they have, then the lanes answer what waits, then the workers stop after
//! the step that they are in.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admission::{ClientAddress, Limiter, open_rings};
use crate::audit;
use crate::config::{Config, QueueKind};
use crate::cross_center::CrossCenter;
use crate::cross_center::session::Sessions;
use crate::http::{
    self, AdminState, Auditor, InternalState, PublicState, Readiness, Relay, ServeOptions, Stage,
    admin_router, internal_router, public_router,
};
use crate::inventory::{Inventory, Parts};
use crate::orders::{
    KafkaMetrics, KafkaOptions, KafkaQueue, OrderCenters, OrderStore, Queue, StoreOptions, WorkerOptions,
    Workers,
};
use crate::shift::{Guardian, GuardianOptions, InitPolicy, ServerProcess, ShiftOptions, Shifts};
use crate::telemetry::Metrics;
use crate::topology::{
    Authority, Cause, Center, Instance, Instances, Limits, Topology, TopologyHandle, new_ledger_id,
};

/// The partition that exists for now.
const PARTITION: u8 = 0;

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

/// Everything between the start and the last answer. `opened` is the order database, to be closed when its users
/// have ended.
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
    let (tokens, tickets) = open_rings(&config.auth).context("the keys cannot be used")?;
    let keys = config.cross_center.keyring(config.center.id.clone())?;
    let tls = config.internal_tls()?;
    let metrics = Arc::new(Metrics::new());
    let redis_url = config.ledger.partitions.first().context("ledger.partitions names no Redis")?;

    let lease_ttl = Duration::from_millis(config.topology.lease_ttl_ms);
    let authority = Authority::new(config.center.id.clone(), lease_ttl, 1);
    metrics.register(|registry| authority.register(registry));
    let stores = config.topology.stores().context("the topology's store cannot be used")?;
    let topology = TopologyHandle::open_or_create(stores.topology, authority.clone(), first_topology(config))
        .await
        .context("the topology cannot be opened")?;
    join(&topology, config).await?;
    topology.spawn(tracker, stop.clone());
    let me = Instance::new(
        config.center.id.clone(),
        config.listen.public_url(),
        config.listen.admin_url(),
        config.listen.internal_url(),
    );
    let instance_id = me.id.as_str().to_owned();
    let instances = Instances::start(stores.instances, Some(me), tracker, stop.clone());

    let options = StoreOptions {
        shards: topology.current().shards_of(&config.center.id).collect(),
        max_connections: config.orders.max_connections,
        ..StoreOptions::new(config.center.id.clone())
    };
    let orders = OrderStore::open(&config.orders.whole_url()?, options)
        .await
        .context("the order database cannot be opened")?;
    *opened = Some(orders.clone());
    metrics.register(|registry| orders.metrics().register(registry));

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
    let client = redis::Client::open(redis_url.as_str()).context("ledger.partitions")?;
    let queue = queue(config, &topology, &metrics)?;
    let centers =
        OrderCenters::new(config.center.id.clone(), orders.clone(), topology.clone(), cross.clone());
    let worker_options = WorkerOptions { cross, centers: Some(centers.clone()), ..worker_options(config) };
    let workers =
        Workers::spawn(&orders, &[client], &authority, &queue, &worker_options, tracker, (stop, fatal));
    let limiter = Limiter::new(&topology.current().limits);
    tracker.spawn(limiter.clone().run(topology.subscribe(), stop.clone()));

    let auditor = auditor(&inventory, &centers, workers.kafka().cloned());
    let tokens = Arc::new(tokens);
    let readiness = Readiness::default();
    let ending = CancellationToken::new();
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
        shutdown: ending.clone(),
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
    let options = ServeOptions {
        drain_deadline: Duration::from_secs(config.shutdown.drain_deadline_s),
        ..ServeOptions::default()
    };
    let mut servers = JoinSet::new();
    if let Some(listener) = listeners.internal {
        let internal = internal_router(InternalState {
            sessions,
            inventory: inventory.clone(),
            orders: orders.clone(),
            topology,
            public: public.clone(),
            admin: admin.clone(),
            tasks: tracker.clone(),
            metrics,
        });
        let options = ServeOptions { tls: tls.listener, ..options.clone() };
        servers.spawn(http::serve(listener, internal, options, ending.clone()));
    }
    servers.spawn(http::serve(listeners.public, public, options.clone(), ending.clone()));
    // Probes and operators are answered until the end of the drain.
    let admin_ending = CancellationToken::new();
    let admin = tokio::spawn(http::serve(listeners.admin, admin, options, admin_ending.clone()));

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
    tracing::info!("draining");
    ending.cancel();
    servers.join_all().await;
    admin_ending.cancel();
    let _ = admin.await;
    Ok(())
}

/// Makes the topology know the configured centers, and their addresses as they are configured now.
async fn join(topology: &TopologyHandle, config: &Config) -> anyhow::Result<()> {
    let cluster = config.cluster.clone();
    topology
        .update(move |topology| topology.join(&cluster).map(drop))
        .await
        .map_err(|error| anyhow::anyhow!("{error}"))
        .context("the configured centers do not fit the topology")
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

fn queue(config: &Config, topology: &TopologyHandle, metrics: &Metrics) -> anyhow::Result<Queue> {
    let kafka = match config.queue {
        QueueKind::Outbox => return Ok(Queue::Outbox),
        QueueKind::Kafka => &config.kafka,
    };
    let mut centers =
        BTreeMap::from([(config.center.id.clone(), kafka.own().connection().context("kafka")?)]);
    for (id, cluster) in &kafka.centers {
        let connection = cluster.connection().with_context(|| format!("kafka.centers.{id}"))?;
        centers.insert(id.clone(), connection);
    }
    let counted = KafkaMetrics::default();
    metrics.register(|registry| counted.register(registry));
    Ok(Queue::Kafka(KafkaOptions {
        center: config.center.id.clone(),
        centers,
        topic_prefix: kafka.topic_prefix.clone(),
        replication_factor: kafka.replication_factor,
        topology: topology.subscribe(),
        metrics: counted,
    }))
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
                        audit::add_queue(&mut report, kafka, &mut conn).await;
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
