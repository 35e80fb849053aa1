//! A storefront and a back office, as small as they can be.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use crate::support::PATIENCE;

type Http = hyper_util::client::legacy::Client<HttpConnector, Full<Bytes>>;

/// Talks to one instance of `seckill up`.
#[derive(Clone)]
pub(crate) struct Client {
    http: Http,
    public: String,
    admin: String,
    secret: Vec<u8>,
    admin_token: String,
    payments_token: String,
}

/// An answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) body: Value,
}

impl Answer {
    /// The problem's code.
    pub(crate) fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or("")
    }
}

impl Client {
    pub(crate) fn new(base_port: u16, dir: &Path) -> Client {
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap_or_default();
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Client {
            http: hyper_util::client::legacy::Client::builder(TokioExecutor::new())
                .pool_idle_timeout(Duration::from_secs(5))
                .build(connector),
            public: format!("http://127.0.0.1:{base_port}"),
            admin: format!("http://127.0.0.1:{}", base_port + 1),
            secret: read("dev-token-secret").trim_end_matches('\n').as_bytes().to_vec(),
            admin_token: read("admin-token").trim().to_owned(),
            payments_token: read("payments-token").trim().to_owned(),
        }
    }

    /// A user's token.
    pub(crate) fn token(&self, uid: &str) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        jsonwebtoken::encode(
            &jsonwebtoken::Header::default(),
            &json!({"sub": uid, "exp": now + 3600}),
            &jsonwebtoken::EncodingKey::from_secret(&self.secret),
        )
        .unwrap()
    }

    /// Sends a request; `None` if no answer came.
    pub(crate) async fn send(
        &self,
        method: Method,
        url: &str,
        token: &str,
        headers: &[(&str, &str)],
        body: Option<Vec<u8>>,
    ) -> Option<Answer> {
        let mut request = Request::builder().method(method).uri(url);
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body.unwrap_or_default()))).unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(15), async {
            let response = self.http.request(request).await.ok()?;
            let (parts, body) = response.into_parts();
            let bytes = body.collect().await.ok()?.to_bytes();
            Some((parts, bytes))
        })
        .await
        .ok()??;
        let (parts, bytes) = answer;
        let body = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        Some(Answer { status: parts.status.as_u16(), headers: parts.headers, body })
    }

    /// What a probe of the admin listener hears; `None` if no answer came.
    pub(crate) async fn probe(&self, path: &str) -> Option<Answer> {
        self.send(Method::GET, &format!("{}{path}", self.admin), "", &[], None).await
    }

    /// Whether the service says that it takes requests.
    pub(crate) async fn is_ready(&self) -> bool {
        let answer = self.send(Method::GET, &format!("{}/readyz", self.admin), "", &[], None).await;
        answer.is_some_and(|answer| answer.status == 200)
    }

    /// What an operator is shown; `None` if no answer came.
    pub(crate) async fn look(&self, path: &str) -> Option<Answer> {
        self.send(Method::GET, &format!("{}{path}", self.admin), &self.admin_token, &[], None).await
    }

    pub(crate) async fn admin(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<Value>,
    ) -> Answer {
        let body = body.map(|body| body.to_string().into_bytes());
        self.send(method, &format!("{}{path}", self.admin), &self.admin_token, headers, body)
            .await
            .expect("the admin listener answers")
    }

    pub(crate) async fn user(&self, method: Method, path: &str, uid: &str, body: Option<Value>) -> Answer {
        let body = body.map(|body| body.to_string().into_bytes());
        self.send(method, &format!("{}{path}", self.public), &self.token(uid), &[], body)
            .await
            .expect("the public listener answers")
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, &format!("{}{path}", self.public), "", &[], None)
            .await
            .expect("the public listener answers")
    }

    /// Puts a product on sale and waits until shoppers see it.
    pub(crate) async fn create_sale(&self, id: &str, quantity: u64, more: Value) -> Value {
        let mut sale = json!({
            "sale_id": id, "kind": "product", "title": id, "quantity": quantity, "price": 1999,
            "currency": "CNY", "per_user_limit": 1,
        });
        for (key, value) in more.as_object().cloned().unwrap_or_default() {
            sale[key] = value;
        }
        let answer = self.admin(Method::POST, "/admin/v1/sales", &[], Some(sale)).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        crate::support::eventually("the sale is shown", async || {
            (self.get(&format!("/v1/sales/{id}")).await.status == 200).then_some(())
        })
        .await;
        answer.body
    }

    /// One purchase attempt; `None` if no answer came.
    pub(crate) async fn buy(&self, sale: &str, uid: &str, key: &str, quantity: i64) -> Option<Answer> {
        self.buy_with_token(sale, &self.token(uid), key, quantity).await
    }

    pub(crate) async fn buy_with_token(
        &self,
        sale: &str,
        token: &str,
        key: &str,
        quantity: i64,
    ) -> Option<Answer> {
        let url = format!("{}/v1/sales/{sale}/purchases", self.public);
        let body = json!({"quantity": quantity}).to_string().into_bytes();
        self.send(Method::POST, &url, token, &[("idempotency-key", key)], Some(body)).await
    }

    /// Buys until the outcome is known: retries what says it is retryable, and what gave no answer, under the
    /// same key.
    pub(crate) async fn buy_until_known(&self, sale: &str, uid: &str, key: &str) -> Answer {
        let token = self.token(uid);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.buy_with_token(sale, &token, key, 1).await {
                Some(answer) if answer.body["retryable"] != json!(true) => return answer,
                answer => assert!(Instant::now() < deadline, "a purchase has no outcome: {answer:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until an order is stored.
    pub(crate) async fn stored_order(&self, uid: &str, order_id: &str) -> Value {
        crate::support::eventually("the order is stored", async || {
            let answer = self.user(Method::GET, &format!("/v1/orders/{order_id}"), uid, None).await;
            (answer.status == 200 && answer.body["status"] != "queued").then_some(answer.body)
        })
        .await
    }

    pub(crate) async fn order_status(&self, uid: &str, order_id: &str) -> String {
        let answer = self.user(Method::GET, &format!("/v1/orders/{order_id}"), uid, None).await;
        answer.body["status"].as_str().unwrap_or("").to_owned()
    }

    pub(crate) async fn pay(&self, order_id: &str, body: Value) -> Answer {
        self.pay_once(order_id, body).await.expect("the public listener answers")
    }

    /// The same; `None` if no answer came.
    pub(crate) async fn pay_once(&self, order_id: &str, body: Value) -> Option<Answer> {
        let url = format!("{}/v1/orders/{order_id}/pay", self.public);
        self.send(Method::POST, &url, &self.payments_token, &[], Some(body.to_string().into_bytes())).await
    }

    /// What the snapshot says is left of a sale.
    pub(crate) async fn remaining(&self, sale: &str) -> u64 {
        self.get(&format!("/v1/sales/{sale}")).await.body["remaining"].as_u64().unwrap_or(u64::MAX)
    }
}
