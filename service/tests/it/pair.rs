//! Two centers on one ledger, as far as they talk to each other: lanes, order databases and internal listeners in one
//! process, and a line between them that can lose answers.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use http::{HeaderMap, Method, Request};
use http_body_util::BodyExt;
use seckill::admission::{ClientAddress, Key, Limiter, Ring, Tickets, Tokens};
use seckill::config::{InventoryConfig, LedgerConfig, SecretUrl};
use seckill::cross_center::session::{Now, Sessions};
use seckill::cross_center::tls::{CallerTls, ListenerTls};
use seckill::cross_center::{CrossCenter, CrossKey, Keyring};
use seckill::http::{InternalState, PublicState, Relay, ServeOptions, internal_router, public_router, serve};
use seckill::inventory::{Inventory, Parts as InventoryParts, Purchase, PurchaseError};
use seckill::orders::{
    KafkaMetrics, KafkaOptions, OrderCenters, OrderStore, Queue, StoreOptions, WorkerOptions, Workers,
};
use seckill::telemetry::Metrics;
use seckill::topology::{Authority, Center, FileStore, Instances, Limits, Topology, TopologyHandle};
use seckill_domain::{CenterId, CenterNumber, IdempotencyKey, Quantity, SaleId, SaleSpec, Uid};
use seckill_ledger::Fence;
use seckill_ledger::testkit::RedisServer;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::support::eventually;

const USERS: &[u8] = b"users-secret-of-thirty-two-bytes";

pub(crate) fn center(id: &str) -> CenterId {
    CenterId::new(id).unwrap()
}

/// A center's first key.
pub(crate) fn key(of: &str) -> CrossKey {
    let secret = [of.as_bytes()[0]; 32].to_vec();
    CrossKey { id: format!("{of}-1"), center: center(of), secret }
}

pub(crate) fn ring(of: &str) -> Keyring {
    Keyring::new(center(of), [key("a"), key("b")]).unwrap()
}

/// One center's service, as far as it takes part here.
pub(crate) struct Side {
    pub(crate) id: CenterId,
    pub(crate) inventory: Inventory,
    pub(crate) orders: OrderStore,
    /// The order databases of both, as this one reaches them.
    pub(crate) centers: OrderCenters,
    pub(crate) topology: TopologyHandle,
    pub(crate) public: Router,
    pub(crate) tasks: TaskTracker,
    pub(crate) serving: CancellationToken,
    served: Option<tokio::task::JoinHandle<()>>,
    tls: Option<ListenerTls>,
}

/// What is spoken between the centers, and what stands behind them.
pub(crate) struct Wire {
    /// Of the URLs.
    pub(crate) scheme: &'static str,
    /// Of both listeners.
    pub(crate) listener: Option<ListenerTls>,
    /// Of both callers.
    pub(crate) caller: Option<CallerTls>,
    /// Everybody is at home in b.
    pub(crate) all_in_b: bool,
    /// The queue is Kafka, whose brokers are away.
    pub(crate) kafka: bool,
}

impl Default for Wire {
    fn default() -> Wire {
        Wire { scheme: "http", listener: None, caller: None, all_in_b: false, kafka: false }
    }
}

impl Side {
    async fn start(
        id: &str,
        redis: &RedisServer,
        dir: &std::path::Path,
        document: Topology,
        authority: Authority,
        wire: &Wire,
        stop: &CancellationToken,
    ) -> Side {
        let store = FileStore::new(dir.join("topology.json"));
        let topology = TopologyHandle::open_or_create(store, authority.clone(), document).await.unwrap();
        let tasks = TaskTracker::new();
        let (keys, instances) = (ring(id), Instances::fixed(Vec::new()));
        let cross = match wire.caller.clone() {
            Some(tls) => CrossCenter::with_tls(tls, keys, topology.clone(), instances),
            None => CrossCenter::new(keys, topology.clone(), instances),
        };
        let ledger = LedgerConfig {
            partitions: vec![SecretUrl::new(redis.url())],
            response_timeout_ms: 1000,
            ..LedgerConfig::default()
        };
        let parts = InventoryParts {
            ledger: &ledger,
            inventory: &InventoryConfig::default(),
            retry_window_ms: 0,
            topology: topology.clone(),
            authority: authority.clone(),
            cross: Some(cross.clone()),
        };
        let inventory = Inventory::start(&parts, &tasks, stop, &CancellationToken::new()).unwrap();
        let database = format!("sqlite:{}", dir.join(format!("{id}.db")).display());
        let orders = OrderStore::open(
            &database,
            StoreOptions {
                shards: topology.current().shards_of(&center(id)).collect(),
                ..StoreOptions::new(center(id))
            },
        )
        .await
        .unwrap();
        let centers = OrderCenters::new(center(id), orders.clone(), topology.clone(), Some(cross.clone()));
        let options = WorkerOptions {
            cross: Some(cross.clone()),
            centers: Some(centers.clone()),
            outbox_retention_s: 0,
            ..WorkerOptions::default()
        };
        let queue = match wire.kafka {
            false => Queue::Outbox,
            true => Queue::Kafka(KafkaOptions {
                center: center(id),
                centers: ["a", "b"]
                    .map(|id| (center(id), vec![("bootstrap.servers".to_owned(), "127.0.0.1:1".to_owned())]))
                    .into(),
                topic_prefix: String::new(),
                replication_factor: 1,
                topology: topology.subscribe(),
                metrics: KafkaMetrics::default(),
            }),
        };
        Workers::spawn(&orders, &[redis.client()], &authority, &queue, &options, &tasks, (stop, stop));
        let ring = || Ring::new(vec![Key::hs256(None, USERS).unwrap()], None, "sub");
        let public = public_router(PublicState {
            inventory: inventory.clone(),
            updates: orders.updates().clone(),
            orders: orders.clone(),
            tokens: Arc::new(Tokens::new(ring(), ring(), ring())),
            tickets: Tickets::new([USERS]),
            limiter: Limiter::new(&Limits { per_user: None, ..Limits::default() }),
            addresses: ClientAddress::new(Vec::new()),
            topology: topology.clone(),
            metrics: Arc::new(Metrics::new()),
            relay: Relay::new(Some(cross)),
            shutdown: stop.clone(),
        });
        Side {
            id: center(id),
            inventory,
            orders,
            centers,
            topology,
            public,
            tasks,
            serving: CancellationToken::new(),
            served: None,
            tls: wire.listener.clone(),
        }
    }

    /// Serves the internal listener as a process of this name.
    pub(crate) async fn listen(&mut self, listener: TcpListener, instance: &str, keys: Keyring) {
        self.listen_with(listener, Sessions::new(keys, instance.to_owned())).await;
    }

    pub(crate) async fn listen_with(&mut self, listener: TcpListener, sessions: Sessions) {
        self.serving = CancellationToken::new();
        let router = internal_router(InternalState {
            sessions,
            inventory: self.inventory.clone(),
            orders: self.orders.clone(),
            queue: None,
            topology: self.topology.clone(),
            public: self.public.clone(),
            admin: Router::new(),
            tasks: self.tasks.clone(),
            metrics: Arc::new(Metrics::new()),
        });
        let options = ServeOptions {
            drain_deadline: Duration::from_secs(1),
            tls: self.tls.clone(),
            ..ServeOptions::default()
        };
        let served = serve(listener, router, options, self.serving.clone());
        self.served = Some(tokio::spawn(async move {
            served.await;
        }));
    }

    pub(crate) async fn buy(
        &self,
        sale: &SaleId,
        uid: &str,
        key: &str,
    ) -> Result<(String, bool), PurchaseError> {
        let purchase = Purchase {
            uid: Uid::new(uid).unwrap(),
            sale_id: sale.clone(),
            key: *IdempotencyKey::new(key).unwrap().digest(),
            quantity: Quantity::ONE,
            traceparent: None,
        };
        self.inventory.purchase(purchase).await.map(|got| (got.order_id.to_string(), got.replayed))
    }

    /// A shopper's request to the public listener.
    pub(crate) async fn ask(&self, method: Method, path: &str, uid: &str) -> (u16, HeaderMap, Value) {
        use tower::ServiceExt;
        let claims = json!({"sub": uid, "exp": Now::read().unix_s + 600});
        let header = jsonwebtoken::Header::default();
        let token =
            jsonwebtoken::encode(&header, &claims, &jsonwebtoken::EncodingKey::from_secret(USERS)).unwrap();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("authorization", format!("Bearer {token}"))
            .body(axum::body::Body::empty())
            .unwrap();
        let (parts, body) = self.public.clone().oneshot(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (parts.status.as_u16(), parts.headers, serde_json::from_slice(&body).unwrap_or_default())
    }
}

/// Centers a (the master) and b. Users of even shards are at home in a.
pub(crate) struct Pair {
    pub(crate) a: Side,
    pub(crate) b: Side,
    /// Where a's internal listener is.
    pub(crate) at: SocketAddr,
    pub(crate) line: Line,
    pub(crate) stop: CancellationToken,
    /// Where b's internal listener is.
    pub(crate) b_at: SocketAddr,
    pub(crate) redis: RedisServer,
    pub(crate) dir: tempfile::TempDir,
}

impl Pair {
    pub(crate) async fn open() -> Pair {
        Pair::open_over(Wire::default()).await
    }

    pub(crate) async fn open_over(wire: Wire) -> Pair {
        let redis = RedisServer::start().await;
        let fence: Fence = redis.init_ledger().await;
        let dir = tempfile::tempdir().unwrap();
        let (of_a, of_b) = (bind(None).await, bind(None).await);
        let at = of_a.local_addr().unwrap();
        let b_at = of_b.local_addr().unwrap();
        let line = Line::to(at).await;
        let described = |number, internal: SocketAddr| Center {
            number: CenterNumber::new(number).unwrap(),
            public_url: format!("http://public-{number}"),
            admin_url: "http://127.0.0.1:1".to_owned(),
            internal_url: format!("{}://{internal}", wire.scheme),
            ledger: Vec::new(),
            extra: serde_json::Map::new(),
        };
        let mut document =
            Topology::single(fence.ledger_id.clone(), center("a"), described(1, line.at), Limits::default());
        document.centers.insert(center("b"), described(2, of_b.local_addr().unwrap()));
        document.epoch = fence.epoch;
        let every = if wire.all_in_b { 1 } else { 2 };
        for shard in document.shard_owners.iter_mut().skip(every - 1).step_by(every) {
            *shard = center("b");
        }
        let stop = CancellationToken::new();
        let authority = Authority::fixed(fence);
        let mut a = Side::start("a", &redis, dir.path(), document.clone(), authority, &wire, &stop).await;
        let authority = Authority::new(center("b"), Duration::from_secs(5), 1);
        let mut b = Side::start("b", &redis, dir.path(), document, authority, &wire, &stop).await;
        a.listen(of_a, "a-first", ring("a")).await;
        b.listen(of_b, "b-first", ring("b")).await;
        Pair { a, b, at, line, stop, b_at, redis, dir }
    }

    pub(crate) async fn sale(&self, id: &str, quantity: u64) -> SaleId {
        let spec: SaleSpec = serde_json::from_value(json!({
            "sale_id": id, "kind": "product", "quantity": quantity, "price": 100, "currency": "CNY",
        }))
        .unwrap();
        self.a.inventory.create_sale(spec, None).await.unwrap();
        let id = SaleId::new(id).unwrap();
        eventually("both centers show the sale", async || {
            let shown = |side: &Side| side.inventory.sales().get(&id).is_some();
            (shown(&self.a) && shown(&self.b)).then_some(())
        })
        .await;
        id
    }

    /// Purchases that the ledger has accepted.
    pub(crate) async fn accepted(&self, sale: &SaleId) -> u64 {
        self.a.inventory.sale(sale).await.unwrap().unwrap().accepted
    }

    /// a's process ends and another one takes its place.
    pub(crate) async fn restart_a(&mut self, instance: &str, keys: Keyring) {
        self.replace_a(Sessions::new(keys, instance.to_owned())).await;
    }

    pub(crate) async fn replace_a(&mut self, sessions: Sessions) {
        self.a.serving.cancel();
        // A connection of the old process may carry one more call until it has ended.
        if let Some(served) = self.a.served.take() {
            served.await.unwrap();
        }
        let listener = bind(Some(self.at)).await;
        self.a.listen_with(listener, sessions).await;
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.stop.cancel();
        self.a.serving.cancel();
        self.b.serving.cancel();
    }
}

pub(crate) async fn bind(at: Option<SocketAddr>) -> TcpListener {
    let at = at.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
    eventually("the port is free", async || TcpListener::bind(at).await.ok()).await
}

/// What a line remembers at most.
const OVERHEARD_BYTES: usize = 64 * 1024;

/// A line between centers that can lose answers: what comes back while it does is swallowed, and the connection
/// with it.
#[derive(Clone)]
pub(crate) struct Line {
    at: SocketAddr,
    /// How many connections still lose what comes back.
    pub(crate) losing: Arc<AtomicU64>,
    pub(crate) lost: Arc<AtomicU64>,
    /// What went there, up to [`OVERHEARD_BYTES`].
    pub(crate) overheard: Arc<Mutex<Vec<u8>>>,
}

impl Line {
    async fn to(target: SocketAddr) -> Line {
        let listener = bind(None).await;
        let at = listener.local_addr().unwrap();
        let line = Line { at, losing: Arc::default(), lost: Arc::default(), overheard: Arc::default() };
        let shared = line.clone();
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(shared.clone().carry(near, target));
            }
        });
        line
    }

    async fn carry(self, near: TcpStream, target: SocketAddr) {
        let Ok(far) = TcpStream::connect(target).await else { return };
        let ((mut from_near, mut to_near), (mut from_far, mut to_far)) =
            (near.into_split(), far.into_split());
        let overheard = Arc::clone(&self.overheard);
        let there = tokio::spawn(async move {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(read @ 1..) = from_near.read(&mut buffer).await {
                {
                    let mut overheard = overheard.lock().unwrap();
                    let room = OVERHEARD_BYTES.saturating_sub(overheard.len());
                    overheard.extend_from_slice(&buffer[..read.min(room)]);
                }
                if to_far.write_all(&buffer[..read]).await.is_err() {
                    break;
                }
            }
        });
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = from_far.read(&mut buffer).await {
            // Answers have bodies; what is shorter only keeps the connection going.
            if read > 60 && self.losing.load(Ordering::SeqCst) > 0 {
                self.losing.fetch_sub(1, Ordering::SeqCst);
                self.lost.fetch_add(1, Ordering::SeqCst);
                break;
            }
            if to_near.write_all(&buffer[..read]).await.is_err() {
                break;
            }
        }
        there.abort();
    }
}
