//! Two centers on one ledger: what reaches the center that is not the master, and what is refused between them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use seckill::admission::{ClientAddress, Key, Limiter, Ring, Tickets, Tokens};
use seckill::config::{InventoryConfig, LedgerConfig, SecretUrl};
use seckill::cross_center::calls::{RELEASE, RESERVE, ReserveAnswer, ReserveOutcome, SESSIONS};
use seckill::cross_center::session::{ClientSession, Now, Opening, Sessions, Welcome};
use seckill::cross_center::signature::{Signing, content_digest, sign};
use seckill::cross_center::{CrossCenter, CrossKey, Keyring, MacKey};
use seckill::http::{InternalState, PublicState, Relay, ServeOptions, internal_router, public_router, serve};
use seckill::inventory::{Inventory, Parts as InventoryParts, Purchase, PurchaseError};
use seckill::orders::{OrderCenters, OrderStore, Queue, StoreOptions, WorkerOptions, Workers};
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

fn center(id: &str) -> CenterId {
    CenterId::new(id).unwrap()
}

fn key(of: &str) -> CrossKey {
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
}

impl Side {
    async fn start(
        id: &str,
        redis: &RedisServer,
        dir: &std::path::Path,
        document: Topology,
        authority: Authority,
        stop: &CancellationToken,
    ) -> Side {
        let store = FileStore::new(dir.join("topology.json"));
        let topology = TopologyHandle::open_or_create(store, authority.clone(), document).await.unwrap();
        let tasks = TaskTracker::new();
        let cross = CrossCenter::new(ring(id), topology.clone(), Instances::fixed(Vec::new()));
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
        Workers::spawn(
            &orders,
            &[redis.client()],
            &authority,
            &Queue::Outbox,
            &options,
            &tasks,
            (stop, stop),
        );
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
        }
    }

    /// Serves the internal listener as a process of this name.
    pub(crate) async fn listen(&mut self, listener: TcpListener, instance: &str, keys: Keyring) {
        self.serving = CancellationToken::new();
        let router = internal_router(InternalState {
            sessions: Sessions::new(keys, instance.to_owned()),
            inventory: self.inventory.clone(),
            orders: self.orders.clone(),
            topology: self.topology.clone(),
            public: self.public.clone(),
            admin: Router::new(),
            tasks: self.tasks.clone(),
            metrics: Arc::new(Metrics::new()),
        });
        let options = ServeOptions { drain_deadline: Duration::from_secs(1), ..ServeOptions::default() };
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
    async fn ask(&self, method: Method, path: &str, uid: &str) -> (u16, HeaderMap, Value) {
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
    line: Line,
    pub(crate) stop: CancellationToken,
    /// Where b's internal listener is.
    pub(crate) b_at: SocketAddr,
    pub(crate) redis: RedisServer,
    pub(crate) dir: tempfile::TempDir,
}

impl Pair {
    pub(crate) async fn open() -> Pair {
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
            internal_url: format!("http://{internal}"),
            ledger: Vec::new(),
            extra: serde_json::Map::new(),
        };
        let mut document =
            Topology::single(fence.ledger_id.clone(), center("a"), described(1, line.at), Limits::default());
        document.centers.insert(center("b"), described(2, of_b.local_addr().unwrap()));
        document.epoch = fence.epoch;
        for shard in document.shard_owners.iter_mut().skip(1).step_by(2) {
            *shard = center("b");
        }
        let stop = CancellationToken::new();
        let authority = Authority::fixed(fence);
        let mut a = Side::start("a", &redis, dir.path(), document.clone(), authority, &stop).await;
        let authority = Authority::new(center("b"), Duration::from_secs(5), 1);
        let mut b = Side::start("b", &redis, dir.path(), document, authority, &stop).await;
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

    async fn accepted(&self, sale: &SaleId) -> u64 {
        self.a.inventory.sale(sale).await.unwrap().unwrap().accepted
    }

    /// a's process ends and another one takes its place.
    pub(crate) async fn restart_a(&mut self, instance: &str, keys: Keyring) {
        self.a.serving.cancel();
        // A connection of the old process may carry one more call until it has ended.
        if let Some(served) = self.a.served.take() {
            served.await.unwrap();
        }
        let listener = bind(Some(self.at)).await;
        self.a.listen(listener, instance, keys).await;
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

/// A line between centers that can lose answers: what comes back while it does is swallowed, and the connection
/// with it.
#[derive(Clone)]
struct Line {
    at: SocketAddr,
    /// How many connections still lose what comes back.
    losing: Arc<AtomicU64>,
    lost: Arc<AtomicU64>,
}

impl Line {
    async fn to(target: SocketAddr) -> Line {
        let listener = bind(None).await;
        let at = listener.local_addr().unwrap();
        let line = Line { at, losing: Arc::default(), lost: Arc::default() };
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
        let there = tokio::spawn(async move { tokio::io::copy(&mut from_near, &mut to_far).await });
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_bought_in_the_other_center_is_decided_by_the_master() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    for n in 0..20 {
        let uid = format!("u{n}");
        let home = pair.b.topology.current().home_center(Uid::new(&uid).unwrap().table().shard()).clone();
        let (order, replayed) = pair.b.buy(&sale, &uid, "k").await.unwrap();
        assert!(!replayed);
        assert_eq!(
            &order[..1],
            if home == pair.a.id { "1" } else { "2" },
            "the home center's number travels"
        );
        assert_eq!(pair.b.buy(&sale, &uid, "k").await.unwrap(), (order.clone(), true));
        assert_eq!(pair.a.buy(&sale, &uid, "k").await.unwrap(), (order, true));
        assert_eq!(pair.b.buy(&sale, &uid, "other").await, Err(PurchaseError::LimitExceeded));
    }
    assert_eq!(pair.accepted(&sale).await, 20);
    let unknown = SaleId::new("nothing").unwrap();
    assert_eq!(pair.b.buy(&unknown, "u", "k").await, Err(PurchaseError::SaleNotFound));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_key_sent_to_both_centers_gives_one_order() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 1000).await;
    let asked = (0..300).map(|n| {
        let (pair, sale, uid) = (&pair, &sale, format!("u{n}"));
        async move {
            let (from_a, from_b) = tokio::join!(pair.a.buy(sale, &uid, "k"), pair.b.buy(sale, &uid, "k"));
            let ((first, replayed_a), (second, replayed_b)) = (from_a.unwrap(), from_b.unwrap());
            assert_eq!(first, second);
            assert_ne!(replayed_a, replayed_b, "one of the two was first");
        }
    });
    futures_util::future::join_all(asked).await;
    assert_eq!(pair.accepted(&sale).await, 300);
    let (batches, batched) =
        (pair.b.inventory.metrics().batches.get(), pair.b.inventory.metrics().batched.get());
    assert!(batches < batched, "{batched} purchases in {batches} calls");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_is_asked_for_again_under_the_same_keys() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    pair.b.buy(&sale, "first", "k").await.unwrap();
    for n in 0..5 {
        pair.line.losing.store(1, Ordering::SeqCst);
        let (order, replayed) = pair.b.buy(&sale, &format!("u{n}"), "k").await.unwrap();
        assert!(!replayed, "an attempt of the service's own is no replay");
        assert_eq!(pair.b.buy(&sale, &format!("u{n}"), "k").await.unwrap(), (order, true));
    }
    assert_eq!(pair.line.lost.load(Ordering::SeqCst), 5);
    assert_eq!(pair.accepted(&sale).await, 6);
    assert!(pair.b.inventory.metrics().unknown.get() > 0, "no answer was lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sold_out_is_known_in_the_other_center_without_asking_again() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 3).await;
    for n in 0..3 {
        pair.b.buy(&sale, &format!("u{n}"), "k").await.unwrap();
    }
    let hits = || pair.b.inventory.metrics().marker_hits.get();
    eventually("the marker answers", async || {
        assert_eq!(pair.b.buy(&sale, "loser", "k").await, Err(PurchaseError::SoldOut));
        (hits() > 0).then_some(())
    })
    .await;
    for n in 0..3 {
        assert!(pair.b.buy(&sale, &format!("u{n}"), "k").await.unwrap().1, "a winner never hears sold_out");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_session_follows_when_the_other_process_was_replaced_or_a_key_is_retired() {
    let mut pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    pair.b.buy(&sale, "u0", "k").await.unwrap();
    pair.restart_a("a-second", ring("a")).await;
    pair.b.buy(&sale, "u1", "k").await.unwrap();
    // Key b-1 is retired in a: b opens no session any more, and nothing of it is executed.
    let retired = Keyring::new(center("a"), [key("a")]).unwrap();
    pair.restart_a("a-third", retired).await;
    let refused = pair.b.buy(&sale, "u2", "k").await;
    assert!(matches!(refused, Err(PurchaseError::MasterUnreachable { .. })), "{refused:?}");
    assert_eq!(pair.accepted(&sale).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_asked_of_the_wrong_center_is_answered_by_its_own() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    let topology = pair.b.topology.current();
    let mut at_home = (0..)
        .map(|n| format!("u{n}"))
        .filter(|uid| topology.home_center(Uid::new(uid).unwrap().table().shard()) == &pair.a.id);
    let (uid, somebody) = (at_home.next().unwrap(), at_home.next().unwrap());
    let (order, _) = pair.b.buy(&sale, &uid, "k").await.unwrap();
    let path = format!("/v1/orders/{order}");
    let stored = eventually("the order is stored", async || {
        let (status, headers, body) = pair.b.ask(Method::GET, &path, &uid).await;
        assert_eq!((status, headers["seckill-home"].to_str().unwrap()), (200, "a"), "{body}");
        (body["status"] == "created").then_some(body)
    })
    .await;
    assert_eq!(pair.a.ask(Method::GET, &path, &uid).await.2, stored);
    let (_, _, listed) = pair.b.ask(Method::GET, "/v1/orders?limit=5", &uid).await;
    assert_eq!(listed["orders"][0]["order_id"], order);
    assert_eq!(pair.b.ask(Method::GET, "/v1/coupons", &uid).await.0, 200);
    // Somebody else's order does not exist, whoever is asked.
    let other = pair.b.ask(Method::GET, &path, &somebody).await;
    assert_eq!((other.0, &other.2["code"]), (404, &json!("order_not_found")));
    let (status, headers, _) = pair.b.ask(Method::GET, &format!("{path}/events"), &uid).await;
    assert_eq!(
        (status, headers["location"].to_str().unwrap()),
        (307, &*format!("http://public-1{path}/events"))
    );
    let (status, headers, body) = pair.b.ask(Method::POST, &format!("{path}/cancel"), &uid).await;
    assert_eq!((status, &body["status"]), (200, &json!("cancelled")), "{body}");
    assert_eq!(headers["seckill-home"], "a");
}

type Http = hyper_util::client::legacy::Client<HttpConnector, Full<Bytes>>;

/// Somebody who has seen, or forged, a request of center b.
struct Forger {
    http: Http,
    at: SocketAddr,
    session: ClientSession,
}

impl Forger {
    async fn with_session(at: SocketAddr) -> Forger {
        // A connection of its own for each request: one that the server closes meanwhile would fail the next.
        let http: Http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(0)
            .build_http();
        let opening = Opening::new(&key("b"), &center("a"), None);
        let body = serde_json::to_vec(opening.hello()).unwrap();
        let asked = Instant::now();
        let (mut parts, ()) = Request::post(format!("http://{at}{SESSIONS}")).body(()).unwrap().into_parts();
        let (own, mac) = (key("b"), MacKey::new(&key("b").secret));
        let signing = Signing { key_id: &own.id, key: &mac, epoch: 1, seq: 0, now_s: Now::read().unix_s };
        sign(&mut parts, &body, &signing).unwrap();
        let request = Request::from_parts(parts, Full::new(body.into()));
        let response = http.request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        let welcome: Welcome =
            serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
        Forger { http, at, session: opening.finish(&welcome, asked).unwrap() }
    }

    /// A purchase of this user, signed as it should be.
    fn purchase(&self, sale: &SaleId, uid: &str, epoch: u64, now_s: i64) -> (Parts, Vec<u8>) {
        let digest = IdempotencyKey::new("k").unwrap();
        let hex: String = digest.digest().iter().map(|byte| format!("{byte:02x}")).collect();
        let body = json!({"sale_id": sale, "deadline_ms": 1000, "entries": [[uid, hex, 1, 2, null]]});
        let body = body.to_string().into_bytes();
        let (mut parts, ()) =
            Request::post(format!("http://{}{RESERVE}", self.at)).body(()).unwrap().into_parts();
        let seq = self.session.next_seq();
        let signing = Signing { key_id: self.session.key_id(), key: self.session.key(), epoch, seq, now_s };
        sign(&mut parts, &body, &signing).unwrap();
        (parts, body)
    }

    async fn send(&self, mut parts: Parts, body: Vec<u8>, at: SocketAddr) -> (u16, Bytes) {
        // The signature covers the name that was dialled first; a replay elsewhere keeps it.
        let named = parts.uri.authority().unwrap().to_string();
        let path = parts.uri.path_and_query().unwrap().to_string();
        parts.uri = format!("http://{at}{path}").parse().unwrap();
        parts.headers.insert("host", HeaderValue::try_from(named).unwrap());
        let response = self.http.request(Request::from_parts(parts, Full::new(body.into()))).await.unwrap();
        let status = response.status().as_u16();
        (status, response.into_body().collect().await.unwrap().to_bytes())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_refused_was_not_executed() {
    let mut pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    let epoch = pair.a.topology.current().epoch.0;
    let forger = Forger::with_session(pair.at).await;
    let now = Now::read().unix_s;
    let mut bought = 0;

    // The genuine request is executed, once.
    let (genuine, body) = forger.purchase(&sale, "genuine", epoch, now);
    let (status, answer) = forger.send(genuine.clone(), body.clone(), pair.at).await;
    assert_eq!(status, 200, "{answer:?}");
    let answer: ReserveAnswer = serde_json::from_slice(&answer).unwrap();
    assert!(matches!(answer.outcomes[..], [ReserveOutcome::Accepted(_)]), "{answer:?}");
    bought += 1;

    type Change = fn(&mut Parts, &mut Vec<u8>);
    let changes: [(&str, Change); 14] = [
        ("digest_wrong", |_, body| {
            *body = String::from_utf8(body.clone()).unwrap().replace("1,2,null", "5,2,null").into();
        }),
        ("signature_wrong", |parts, body| {
            *body = String::from_utf8(body.clone()).unwrap().replace("1,2,null", "5,2,null").into();
            parts.headers.insert("content-digest", HeaderValue::try_from(content_digest(body)).unwrap());
        }),
        ("signature_wrong", |parts, _| swap(&mut parts.uri, RESERVE, RELEASE)),
        ("signature_wrong", |parts, _| swap(&mut parts.uri, RESERVE, "/internal/v1/reserve?x=1")),
        ("signature_wrong", |parts, _| put(parts, "seckill-epoch", "999")),
        ("signature_wrong", |parts, _| put(parts, "seckill-seq", "999")),
        ("field_invalid", |parts, _| _ = parts.headers.remove("seckill-seq")),
        ("signature_missing", |parts, _| _ = parts.headers.remove("signature")),
        ("signature_missing", |parts, _| _ = parts.headers.remove("signature-input")),
        ("signature_extra", |parts, _| {
            let second = parts.headers["signature"].clone();
            parts.headers.append("signature", second);
        }),
        ("component_uncovered", |parts, _| edit(parts, "signature-input", " \"content-digest\"", "")),
        ("component_unexpected", |parts, _| {
            edit(parts, "signature-input", "\"seckill-seq\"", "\"seckill-seq\" \"host\"");
        }),
        ("algorithm_wrong", |parts, _| edit(parts, "signature-input", "hmac-sha256", "hmac-sha512")),
        ("session_unknown", |parts, _| {
            edit(parts, "signature-input", "keyid=\"a-first.", "keyid=\"a-first.0");
        }),
    ];
    for (n, (code, change)) in changes.into_iter().enumerate() {
        let (mut parts, mut body) = forger.purchase(&sale, &format!("changed{n}"), epoch, now);
        change(&mut parts, &mut body);
        let (status, answer) = forger.send(parts, body, pair.at).await;
        let problem: Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(
            (status, &problem["code"], &problem["executed"]),
            (401, &json!(code), &json!("no")),
            "change {n}"
        );
        assert_eq!(pair.accepted(&sale).await, bought, "change {n} ({code}) was executed");
    }
    let refused = async |parts: Parts, body: Vec<u8>, at: SocketAddr| {
        let (status, answer) = forger.send(parts, body, at).await;
        assert_eq!(status, 401, "{answer:?}");
        serde_json::from_slice::<Value>(&answer).unwrap()["code"].as_str().unwrap().to_owned()
    };
    for created in [now - 40, now + 60] {
        let (parts, body) = forger.purchase(&sale, "stale", epoch, created);
        assert_eq!(refused(parts, body, pair.at).await, "stale");
    }
    // Replayed to the same process, to the other center, after a restart.
    assert_eq!(refused(genuine.clone(), body.clone(), pair.at).await, "replayed");
    let at_b: SocketAddr =
        pair.b.topology.current().center(&center("b")).unwrap().internal_url[7..].parse().unwrap();
    let (fresh, fresh_body) = forger.purchase(&sale, "unsent", epoch, now);
    assert_eq!(refused(fresh.clone(), fresh_body.clone(), at_b).await, "instance_other");
    // A process that does not see the same topology does not execute it either.
    let (early, early_body) = forger.purchase(&sale, "early", epoch + 1, now);
    let (status, answer) = forger.send(early, early_body, pair.at).await;
    let problem: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!((status, &problem["code"], &problem["executed"]), (503, &json!("no_authority"), &json!("no")));
    pair.restart_a("a-second", ring("a")).await;
    assert_eq!(refused(fresh, fresh_body, pair.at).await, "instance_other");
    assert_eq!(pair.accepted(&sale).await, bought);
}

fn put(parts: &mut Parts, name: &'static str, value: &'static str) {
    parts.headers.insert(name, HeaderValue::from_static(value));
}

fn edit(parts: &mut Parts, name: &'static str, from: &str, to: &str) {
    let text = parts.headers[name].to_str().unwrap().replacen(from, to, 1);
    parts.headers.insert(name, HeaderValue::try_from(text).unwrap());
}

fn swap(uri: &mut http::Uri, from: &str, to: &str) {
    *uri = uri.to_string().replacen(from, to, 1).parse().unwrap();
}
