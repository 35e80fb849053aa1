//! The servers that are compared: ours, the bare handlers, and ours with one script call per request.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use clap::Subcommand;
use seckill::admission::{Limiter, Tokens};
use seckill::config::{LedgerConfig, SecretUrl};
use seckill::inventory::{LedgerPool, ledger_pool};
use seckill::topology::Limits;
use seckill_domain::{CenterNumber, IdempotencyKey, Quantity, SaleId};
use seckill_ledger::{Fence, ReserveEntry, ReserveOutcome, reserve};
use tokio::net::TcpListener;

/// Which server to be.
#[derive(Debug, Subcommand)]
pub(crate) enum Kind {
    /// Bare axum handlers: read the same body, send the same bytes.
    Bare {
        /// File with the answer to give, as `capture` wrote it.
        #[arg(long)]
        answer: PathBuf,
    },
    /// The service's own public router on a ledger.
    Service(crate::service::Args),
    /// The service's order workers alone: an outbox drains over Kafka into a database.
    Drain(crate::drain::Args),
    /// Token, limits and one script call per request through the pool.
    PerRequest {
        /// URL of the redis-server.
        #[arg(long)]
        redis: String,
        /// The ledger's fence.
        #[arg(long)]
        fence: String,
        /// File with the users' HS256 key.
        #[arg(long)]
        secret: PathBuf,
    },
}

/// Binds a free port and says which: the parent waits for this line.
pub(crate) async fn listen() -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    println!("http://{}", listener.local_addr()?);
    Ok(listener)
}

/// An answer of the service, taken once and then given again and again by a bare handler.
#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct Captured {
    /// Status code.
    pub(crate) status: u16,
    /// Headers that the handler sets; the server adds `content-length` and `date` itself.
    pub(crate) headers: Vec<(String, String)>,
    /// The body.
    pub(crate) body: String,
}

struct Bare {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

/// Runs bare handlers for the purchase and the sale read.
pub(crate) async fn bare(answer: &std::path::Path) -> anyhow::Result<()> {
    let captured: Captured = serde_json::from_slice(&std::fs::read(answer)?)?;
    let mut headers = HeaderMap::new();
    for (name, value) in &captured.headers {
        headers.append(HeaderName::try_from(name)?, HeaderValue::try_from(value)?);
    }
    let bare = Arc::new(Bare {
        status: StatusCode::from_u16(captured.status)?,
        headers,
        body: Bytes::from(captured.body),
    });
    async fn answer_read(State(bare): State<Arc<Bare>>) -> Response {
        (bare.status, bare.headers.clone(), bare.body.clone()).into_response()
    }
    async fn answer_purchase(State(bare): State<Arc<Bare>>, _body: Bytes) -> Response {
        (bare.status, bare.headers.clone(), bare.body.clone()).into_response()
    }
    let router = Router::new()
        .route("/v1/sales/{id}", get(answer_read))
        .route("/v1/sales/{id}/purchases", post(answer_purchase))
        .with_state(bare);
    let listener = axum::serve::ListenerExt::tap_io(listen().await?, |stream| {
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, router).await?;
    Ok(())
}

struct PerRequest {
    tokens: Tokens,
    limiter: Limiter,
    pool: LedgerPool,
    fence: Fence,
}

/// Runs the purchase with a script call of its own for every request: what a service without lanes would do.
pub(crate) async fn per_request(redis: &str, fence: &str, secret: &std::path::Path) -> anyhow::Result<()> {
    let config = LedgerConfig {
        partitions: vec![SecretUrl::new(redis)],
        // As many as requests are under way: nobody waits for a connection.
        pool_size: 512,
        ..LedgerConfig::default()
    };
    let state = Arc::new(PerRequest {
        tokens: crate::service::tokens(secret)?,
        limiter: Limiter::new(&Limits::default()),
        pool: ledger_pool(redis, &config)?,
        fence: fence.parse()?,
    });
    let router = Router::new().route("/v1/sales/{id}/purchases", post(purchase)).with_state(state);
    axum::serve(listen().await?, router).await?;
    Ok(())
}

async fn purchase(
    State(state): State<Arc<PerRequest>>,
    Path(sale): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    match decide(&state, &sale, &headers, &body).await {
        Ok(response) => response,
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")).into_response(),
    }
}

#[derive(serde::Deserialize)]
struct Body {
    quantity: Quantity,
}

async fn decide(
    state: &PerRequest,
    sale: &str,
    headers: &HeaderMap,
    body: &[u8],
) -> anyhow::Result<Response> {
    let header =
        |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).context("a header is missing");
    let token = header("authorization")?.strip_prefix("Bearer ").context("no bearer token")?;
    let uid = state.tokens.user(token)?;
    let sale = SaleId::new(sale)?;
    anyhow::ensure!(state.limiter.purchase(&uid, None, &sale).is_ok(), "rate limited");
    let key = IdempotencyKey::new(header("idempotency-key")?)?;
    let Body { quantity } = serde_json::from_slice(body)?;
    let entry =
        ReserveEntry { uid, key: *key.digest(), quantity, center: CenterNumber::new(1)?, traceparent: None };
    let mut conn = state.pool.get().await?;
    let reply = reserve(&mut conn, &state.fence, 0, &sale, &[entry]).await?;
    match reply.outcomes.first() {
        Some(ReserveOutcome::Accepted(order_id)) => {
            let body = serde_json::json!({
                "order_id": order_id, "sale_id": sale, "quantity": quantity, "status": "queued",
                "home_center": "a", "poll_after_ms": 200,
            });
            let location = format!("/v1/orders/{order_id}");
            Ok((StatusCode::ACCEPTED, [("location", location)], axum::Json(body)).into_response())
        }
        other => anyhow::bail!("{other:?}"),
    }
}
