//! A shop of its own for each test: redis-server, SQLite, topology, both routers.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::BodyExt;
use seckill_domain::{CenterId, CenterNumber, Clock, SystemClock};
use seckill_ledger::testkit::RedisServer;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::admission::{ClientAddress, Key, Limiter, Ring, Tickets, Tokens};
use crate::config::{InventoryConfig, LedgerConfig, SecretUrl};
use crate::http::{AdminState, PublicState, Readiness};
use crate::inventory::{Inventory, Parts};
use crate::orders::{OrderStore, StoreOptions, WorkerOptions, Workers};
use crate::telemetry::Metrics;
use crate::topology::{Authority, Center, FileStore, Limits, Topology, TopologyHandle};

pub(super) const USERS: &[u8] = b"users-secret-of-thirty-two-bytes";
pub(super) const PAYMENTS: &[u8] = b"payments-secret-of-32-bytes-long";
pub(super) const ADMIN: &[u8] = b"admin-secret-of-thirty-two-bytes";
const PATIENCE: Duration = Duration::from_secs(20);

/// A token that is good for an hour.
pub(super) fn token(subject: &str, secret: &[u8]) -> String {
    signed(
        &json!({"alg": "HS256"}),
        &json!({"sub": subject, "exp": SystemClock.now().0 / 1000 + 3600}),
        secret,
    )
}

pub(super) fn signed(header: &Value, claims: &Value, secret: &[u8]) -> String {
    use hmac::{KeyInit, Mac};
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", part(header), part(claims));
    let mut mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(secret).unwrap();
    mac.update(message.as_bytes());
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

/// What came back.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) text: String,
    pub(super) body: Value,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no {name} in {self:?}")).to_str().unwrap()
    }

    #[track_caller]
    pub(super) fn is_problem(&self, status: u16, code: &str) {
        assert_eq!((self.status, &self.body["code"]), (status, &json!(code)), "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        for member in ["type", "title", "detail", "request_id"] {
            assert!(self.body[member].is_string(), "{member}: {self:?}");
        }
        assert_eq!(self.body["status"], status);
        assert_eq!(self.body["retryable"], [429, 503].contains(&status));
    }
}

pub(super) struct Shop {
    pub(super) public: Router,
    pub(super) admin: Router,
    pub(super) public_routes: Vec<(&'static str, &'static str)>,
    pub(super) admin_routes: Vec<(&'static str, &'static str)>,
    pub(super) readiness: Readiness,
    pub(super) shutdown: CancellationToken,
    stop: CancellationToken,
    tracker: TaskTracker,
    _redis: RedisServer,
    _dir: tempfile::TempDir,
}

impl Shop {
    pub(super) async fn open() -> Shop {
        let redis = RedisServer::start().await;
        let fence = redis.init_ledger().await;
        let dir = tempfile::tempdir().unwrap();
        let url = "http://127.0.0.1:1".to_owned();
        let center = Center {
            number: CenterNumber::new(1).unwrap(),
            public_url: url.clone(),
            admin_url: url.clone(),
            internal_url: url,
            ledger: Vec::new(),
            extra: serde_json::Map::new(),
        };
        let a = CenterId::new("a").unwrap();
        let limits = Limits { per_user: None, ..Limits::default() };
        let mut document = Topology::single(fence.ledger_id.clone(), a.clone(), center, limits.clone());
        document.epoch = fence.epoch;
        let authority = Authority::fixed(fence);
        let store = FileStore::new(dir.path().join("topology.json"));
        let topology = TopologyHandle::open_or_create(store, authority.clone(), document).await.unwrap();
        let (tracker, stop, shutdown) =
            (TaskTracker::new(), CancellationToken::new(), CancellationToken::new());
        let ledger =
            LedgerConfig { partitions: vec![SecretUrl::new(redis.url())], ..LedgerConfig::default() };
        let config = InventoryConfig::default();
        let parts = Parts {
            ledger: &ledger,
            inventory: &config,
            retry_window_ms: 0,
            topology: topology.clone(),
            authority: authority.clone(),
            cross: None,
        };
        let inventory = Inventory::start(&parts, &tracker, &stop, &CancellationToken::new()).unwrap();
        let database = format!("sqlite:{}", dir.path().join("orders.db").display());
        let orders = OrderStore::open(&database, StoreOptions::new(a.clone())).await.unwrap();
        let workers = Workers::spawn(
            &orders,
            &[redis.client()],
            &authority,
            &crate::orders::Queue::Outbox,
            &WorkerOptions::default(),
            &tracker,
            (&stop, &stop),
        );
        let metrics = Arc::new(Metrics::new());
        let ring = |secret| Ring::new(vec![Key::hs256(None, secret).unwrap()], None, "sub");
        let tokens = Arc::new(Tokens::new(ring(USERS), ring(PAYMENTS), ring(ADMIN)));
        let limiter = Limiter::new(&limits);
        tracker.spawn(limiter.clone().run(topology.subscribe(), stop.clone()));
        let readiness = Readiness::default();
        let (public, public_routes) = super::super::public_routes(PublicState {
            inventory: inventory.clone(),
            orders: orders.clone(),
            updates: orders.updates().clone(),
            tokens: Arc::clone(&tokens),
            tickets: Tickets::new([USERS]),
            limiter,
            addresses: ClientAddress::default(),
            topology: topology.clone(),
            metrics: Arc::clone(&metrics),
            relay: super::super::Relay::default(),
            shutdown: shutdown.clone(),
        });
        let instances = crate::topology::Instances::fixed(Vec::new());
        let shifts = crate::shift::Shifts::spawn(
            crate::shift::ShiftOptions {
                center: a.clone(),
                instance: "shop".to_owned(),
                partition: 0,
                redis_url: redis.url(),
                lease_ttl: Duration::from_secs(5),
            },
            topology.clone(),
            authority.clone(),
            instances.clone(),
            &tracker,
            stop.clone(),
        )
        .unwrap();
        let (admin, admin_routes) = super::super::admin_routes(AdminState {
            inventory,
            centers: crate::orders::OrderCenters::alone(orders.clone()),
            orders,
            workers,
            tokens,
            topology,
            authority,
            center: a,
            default_currency: None,
            auditor: Arc::new(|_| Box::pin(async { Ok(json!({"verdict": "clean", "sales": []})) })),
            guardian: crate::shift::GuardianHandle::ended(),
            shifts,
            instances,
            relay: super::super::Relay::default(),
            readiness: readiness.clone(),
            metrics,
        });
        Shop {
            public,
            admin,
            public_routes,
            admin_routes,
            readiness,
            shutdown,
            stop,
            tracker,
            _redis: redis,
            _dir: dir,
        }
    }

    pub(super) async fn close(self) {
        self.shutdown.cancel();
        self.stop.cancel();
        self.tracker.close();
        tokio::time::timeout(PATIENCE, self.tracker.wait()).await.expect("the tasks end");
    }

    pub(super) async fn eventually<T, F>(&self, what: &str, mut check: impl FnMut() -> F) -> T
    where
        F: Future<Output = Option<T>>,
    {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = check().await {
                return found;
            }
            assert!(Instant::now() < deadline, "waited in vain: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Creates a sale and waits until shoppers see it.
    pub(super) async fn sale(&self, spec: Value) {
        let created = self.admin("POST", "/admin/v1/sales", &[], &spec.to_string()).await;
        assert_eq!(created.status, 201, "{created:?}");
        let path = format!("/v1/sales/{}", spec["sale_id"].as_str().unwrap());
        self.eventually("the sale is shown", async || {
            (self.get(&path, None).await.status == 200).then_some(())
        })
        .await;
    }

    pub(super) async fn buy(&self, sale: &str, uid: &str, key: &str) -> Answer {
        self.purchase(sale, &token(uid, USERS), Some(key), r#"{"quantity":1}"#).await
    }

    pub(super) async fn purchase(&self, sale: &str, token: &str, key: Option<&str>, body: &str) -> Answer {
        let bearer = format!("Bearer {token}");
        let mut headers = vec![("authorization", &*bearer)];
        headers.extend(key.map(|key| ("idempotency-key", key)));
        self.call("POST", &format!("/v1/sales/{sale}/purchases"), &headers, body).await
    }

    /// Waits until an order is stored, and returns it.
    pub(super) async fn stored(&self, path: &str, uid: &str) -> Value {
        let token = token(uid, USERS);
        self.eventually("the order is stored", async || {
            let answer = self.get(path, Some(&token)).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            (answer.body["status"] != "queued").then_some(answer.body)
        })
        .await
    }

    pub(super) async fn get(&self, path: &str, token: Option<&str>) -> Answer {
        self.with_token("GET", path, token, "").await
    }

    pub(super) async fn post(&self, path: &str, token: Option<&str>, body: &str) -> Answer {
        self.with_token("POST", path, token, body).await
    }

    async fn with_token(&self, method: &str, path: &str, token: Option<&str>, body: &str) -> Answer {
        let bearer = token.map(|token| format!("Bearer {token}"));
        let headers: Vec<_> = bearer.iter().map(|bearer| ("authorization", &**bearer)).collect();
        self.call(method, path, &headers, body).await
    }

    pub(super) async fn call(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        send(&self.public, method, path, headers, body.to_owned()).await
    }

    pub(super) async fn admin_get(&self, path: &str) -> Answer {
        self.admin("GET", path, &[], "").await
    }

    pub(super) async fn admin(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let bearer = format!("Bearer {}", token("operator", ADMIN));
        let mut headers = headers.to_vec();
        headers.push(("authorization", &bearer));
        self.call_admin(method, path, &headers, body).await
    }

    pub(super) async fn call_admin(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        send(&self.admin, method, path, headers, body.to_owned()).await
    }

    pub(super) async fn stream(&self, path: &str, headers: &[(&str, &str)]) -> Stream {
        let response =
            self.public.clone().oneshot(request("GET", path, headers, String::new())).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Stream { body: response.into_body(), text: String::new() }
    }
}

fn request(method: &str, path: &str, headers: &[(&str, &str)], body: String) -> Request<Body> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Body::from(body)).unwrap()
}

pub(super) async fn send(
    router: &Router,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: String,
) -> Answer {
    let response = router.clone().oneshot(request(method, path, headers, body)).await.unwrap();
    let (parts, body) = response.into_parts();
    let bytes: Bytes = body.collect().await.unwrap().to_bytes();
    Answer {
        status: parts.status.as_u16(),
        headers: parts.headers,
        text: String::from_utf8_lossy(&bytes).into_owned(),
        body: serde_json::from_slice(&bytes).unwrap_or_default(),
    }
}

/// An event stream being read.
pub(super) struct Stream {
    body: Body,
    text: String,
}

impl Stream {
    pub(super) async fn until(&mut self, wanted: &str, within: Duration) {
        let deadline = Instant::now() + within;
        while !self.text.contains(wanted) {
            let frame = tokio::time::timeout_at(deadline, self.body.frame()).await;
            let frame = frame.unwrap_or_else(|_| panic!("{wanted} did not come: {}", self.text));
            let frame =
                frame.unwrap_or_else(|| panic!("{wanted} did not come before the end: {}", self.text));
            self.text.push_str(std::str::from_utf8(&frame.unwrap().into_data().unwrap()).unwrap());
        }
    }

    pub(super) async fn rest(mut self, within: Duration) -> String {
        let deadline = Instant::now() + within;
        while let Some(frame) =
            tokio::time::timeout_at(deadline, self.body.frame()).await.expect("the stream ends")
        {
            self.text.push_str(std::str::from_utf8(&frame.unwrap().into_data().unwrap()).unwrap());
        }
        self.text
    }
}
