//! Serving a router on a listener: bounded connections, read timeouts, a drain with a deadline.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use super::call::Peer;
use crate::cross_center::tls::ListenerTls;

/// How a listener is served.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Connections at the same time. Those beyond wait in the kernel's backlog.
    pub max_connections: usize,
    /// How long a client may take for a request's head, and how long an idle connection is kept.
    pub header_read_timeout: Duration,
    /// How long a drain waits for requests under way.
    pub drain_deadline: Duration,
    /// Speaks TLS and nothing else.
    pub tls: Option<ListenerTls>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        ServeOptions {
            max_connections: 50_000,
            header_read_timeout: Duration::from_secs(60),
            drain_deadline: Duration::from_secs(20),
            tls: None,
        }
    }
}

/// After `accept` failed (no more file descriptors, as a rule) it is tried again this much later.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Streams of one HTTP/2 connection at the same time.
const MAX_HTTP2_STREAMS: u32 = 256;
/// The largest head of a request; a token has 4 KiB at most.
const MAX_HEAD_BYTES: usize = 32 * 1024;

/// A router that may be replaced while it is served: each request meets the one of its moment.
#[derive(Debug, Clone)]
pub struct Served(Arc<ArcSwap<Router>>);

impl Served {
    /// Requests from now on meet this one.
    pub fn replace(&self, router: Router) {
        self.0.store(Arc::new(router));
    }
}

impl From<Router> for Served {
    fn from(router: Router) -> Served {
        Served(Arc::new(ArcSwap::from_pointee(router)))
    }
}

/// Serves until `shutdown`, then lets requests under way finish, for as long as the drain deadline allows. Returns
/// how many connections had to be cut.
pub async fn serve(
    listener: TcpListener,
    router: impl Into<Served>,
    options: ServeOptions,
    shutdown: CancellationToken,
) -> usize {
    let router: Served = router.into();
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(options.header_read_timeout)
        .max_buf_size(MAX_HEAD_BYTES)
        .pipeline_flush(true);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_HTTP2_STREAMS)
        .keep_alive_interval(Some(options.header_read_timeout));
    let builder = Arc::new(builder);
    let slots = Arc::new(Semaphore::new(options.max_connections));
    let connections = TaskTracker::new();
    let cut = CancellationToken::new();

    loop {
        let slot = tokio::select! {
            () = shutdown.cancelled() => break,
            // The semaphore is never closed.
            slot = Arc::clone(&slots).acquire_owned() => slot,
        };
        let (stream, peer) = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    if !is_of_one_connection(&error) {
                        tracing::warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                    continue;
                }
            },
        };
        // Answers are small and complete: waiting to fill a segment would only delay them.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY could not be set");
        }
        let (builder, router, tls) = (Arc::clone(&builder), router.clone(), options.tls.clone());
        let (shutdown, cut) = (shutdown.clone(), cut.clone());
        connections.spawn(async move {
            match tls {
                None => serve_connection(builder, stream, peer, router, shutdown, cut).await,
                Some(tls) => {
                    // A drain does not wait for handshakes: nothing was asked yet.
                    let shaken = tokio::select! {
                        () = shutdown.cancelled() => return,
                        shaken = tls.accept(stream) => shaken,
                    };
                    match shaken {
                        Ok(stream) => serve_connection(builder, stream, peer, router, shutdown, cut).await,
                        Err(error) => tracing::debug!(%peer, %error, "no TLS connection came about"),
                    }
                }
            }
            drop(slot);
        });
    }

    // The port is free for a successor while the drain goes on.
    drop(listener);
    connections.close();
    if tokio::time::timeout(options.drain_deadline, connections.wait()).await.is_ok() {
        return 0;
    }
    let left = connections.len();
    tracing::warn!(connections = left, "the drain's deadline has passed: connections are cut");
    cut.cancel();
    connections.wait().await;
    left
}

async fn serve_connection<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    builder: Arc<Builder<TokioExecutor>>,
    stream: S,
    peer: SocketAddr,
    router: Served,
    shutdown: CancellationToken,
    cut: CancellationToken,
) {
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        // A router is always ready.
        Router::clone(&router.0.load()).call(request.map(Body::new))
    });
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    tokio::select! {
        // What goes wrong on a connection is the client's affair: it went away, or spoke no HTTP.
        _ = connection.as_mut() => return,
        () = cut.cancelled() => return,
        () = shutdown.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        _ = connection => {}
        () = cut.cancelled() => {}
    }
}

fn is_of_one_connection(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionAborted | ConnectionReset)
}
