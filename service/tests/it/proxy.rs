//! The load balancer in front of two centers: the real haproxy with `deploy/haproxy.cfg`, only its ports are others.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::get;
use bytes::Bytes;
use futures_util::StreamExt;
use http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::{PATIENCE, eventually};

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// As much of a center as a proxy sees: a public listener, and probes on the admin listener.
struct Center {
    name: &'static str,
    public: u16,
    admin: u16,
    ready: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Center {
    fn new(name: &'static str) -> Center {
        let (public, admin) = (free_port(), free_port());
        Center { name, public, admin, ready: Arc::new(AtomicBool::new(true)), tasks: JoinSet::new() }
    }

    async fn start(&mut self) {
        let (name, ready) = (self.name, Arc::clone(&self.ready));
        let events = || async {
            // The first event goes out; then the stream stays open.
            let first = futures_util::stream::once(async {
                Ok::<_, std::io::Error>(Bytes::from_static(b"event: sale\ndata: {}\n\n"))
            });
            Body::from_stream(first.chain(futures_util::stream::pending()))
        };
        let public = Router::new()
            .route("/v1/sales", get(move || async move { name }))
            .route("/v1/sales/phone-1/events", get(events));
        let readyz = move || {
            let ready = ready.load(Ordering::SeqCst);
            async move { if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE } }
        };
        let admin = Router::new().route("/readyz", get(readyz));
        for (port, router) in [(self.public, public), (self.admin, admin)] {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.set_reuseaddr(true).unwrap();
            socket.bind(SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
            let listener = socket.listen(64).unwrap();
            self.tasks.spawn(async move { axum_serve(listener, router).await });
        }
    }

    /// Gone: whoever connects is refused, and what was connected is cut.
    async fn stop(&mut self) {
        self.tasks.shutdown().await;
    }
}

/// Serves until the task is aborted, and ends its connections with it.
async fn axum_serve(listener: tokio::net::TcpListener, router: Router) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let service = hyper_util::service::TowerToHyperService::new(router.clone());
        connections.spawn(async move {
            let io = hyper_util::rt::TokioIo::new(stream);
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(io, service).await;
        });
    }
}

struct Haproxy {
    child: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl Haproxy {
    fn start(a: &Center, b: &Center) -> Haproxy {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let mut text = std::fs::read_to_string(deploy.join("haproxy.cfg")).unwrap();
        for (from, to) in [
            ("127.0.0.1:8000".to_owned(), format!("127.0.0.1:{port}")),
            ("127.0.0.1:8080 port 8081".to_owned(), format!("127.0.0.1:{} port {}", a.public, a.admin)),
            ("127.0.0.1:8090 port 8091".to_owned(), format!("127.0.0.1:{} port {}", b.public, b.admin)),
            ("deploy/shards.map".to_owned(), deploy.join("shards.map").display().to_string()),
        ] {
            assert!(text.contains(&from), "deploy/haproxy.cfg does not name {from}");
            text = text.replace(&from, &to);
        }
        let config = dir.path().join("haproxy.cfg");
        std::fs::write(&config, text).unwrap();
        let child = Command::new("haproxy")
            .arg("-db")
            .arg("-f")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("haproxy is installed: scripts/setup.sh");
        Haproxy { child, port, _dir: dir }
    }

    /// The body of an answer to a shopper of this shard, if it is 200.
    async fn ask(&self, shard: Option<u8>) -> Option<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await.ok()?;
        let cookie = shard.map(|shard| format!("Cookie: theme=dark; seckill_shard={shard}\r\n"));
        let request = format!(
            "GET /v1/sales HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n{}\r\n",
            cookie.unwrap_or_default()
        );
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        tokio::time::timeout(Duration::from_secs(10), read).await.ok()?.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        head.starts_with("HTTP/1.1 200").then(|| body.to_owned())
    }

    async fn until_answered_by(&self, shard: Option<u8>, center: &str) {
        eventually(&format!("center {center} answers shard {shard:?}"), async || {
            (self.ask(shard).await? == center).then_some(())
        })
        .await;
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cookie_leads_home_and_the_other_center_steps_in() {
    let (mut a, mut b) = (Center::new("a"), Center::new("b"));
    a.start().await;
    b.start().await;
    let haproxy = Haproxy::start(&a, &b);
    haproxy.until_answered_by(Some(0), "a").await;
    haproxy.until_answered_by(Some(63), "b").await;
    // Every shard, each time.
    for shard in 0..64 {
        let home = if shard < 32 { "a" } else { "b" };
        assert_eq!(haproxy.ask(Some(shard)).await.as_deref(), Some(home), "shard {shard}");
    }
    // Nobody is turned away for a cookie that says nothing.
    assert!(haproxy.ask(None).await.is_some());
    assert!(haproxy.ask(Some(200)).await.is_some());

    // It drains: new requests go elsewhere, then come back.
    a.ready.store(false, Ordering::SeqCst);
    haproxy.until_answered_by(Some(0), "b").await;
    a.ready.store(true, Ordering::SeqCst);
    haproxy.until_answered_by(Some(0), "a").await;

    // It is gone altogether.
    b.stop().await;
    haproxy.until_answered_by(Some(63), "a").await;
    for _ in 0..20 {
        assert_eq!(haproxy.ask(Some(40)).await.as_deref(), Some("a"));
        assert_eq!(haproxy.ask(None).await.as_deref(), Some("a"));
    }
    b.start().await;
    haproxy.until_answered_by(Some(63), "b").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_through_while_their_stream_is_open() {
    let (mut a, mut b) = (Center::new("a"), Center::new("b"));
    a.start().await;
    b.start().await;
    let haproxy = Haproxy::start(&a, &b);
    haproxy.until_answered_by(Some(0), "a").await;
    let mut stream = TcpStream::connect(("127.0.0.1", haproxy.port)).await.unwrap();
    stream
        .write_all(b"GET /v1/sales/phone-1/events HTTP/1.1\r\nHost: shop\r\nCookie: seckill_shard=3\r\n\r\n")
        .await
        .unwrap();
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while !seen.contains("event: sale") {
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await.unwrap().unwrap();
        assert!(read > 0, "it ended: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
}
