//! The load: a fixed number of connections, each with one request under way, every request prepared beforehand.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use seckill_loadtest::buyers::{Buyers, TokenTerms};
use seckill_loadtest::client::{Connection, Target};

/// What a round of load gave.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    /// Requests answered.
    pub(crate) requests: usize,
    /// From the first to the last.
    pub(crate) wall: Duration,
}

impl Round {
    /// Requests per second.
    pub(crate) fn rate(&self) -> f64 {
        self.requests as f64 / self.wall.as_secs_f64()
    }
}

/// One purchase by each of `count` buyers, whom nobody else has who takes another seed; each has a token, signed with
/// `secret`, and a key of its own.
pub(crate) fn purchases(
    authority: &str,
    sale: &str,
    (seed, count): (u64, u32),
    secret: &[u8],
) -> Arc<Vec<Vec<u8>>> {
    const BODY: &[u8] = br#"{"quantity":1}"#;
    let expires_at_s = jiff::Timestamp::now().as_second() + 3600;
    let buyers = Buyers::sign(seed, None, count, &TokenTerms { secret, kid: None, expires_at_s }, |_| {});
    let head = format!(
        "POST /v1/sales/{sale}/purchases HTTP/1.1\r\nhost: {authority}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nauthorization: Bearer ",
        BODY.len()
    );
    let request = |user| {
        let mut request = Vec::with_capacity(512);
        request.extend_from_slice(head.as_bytes());
        buyers.write_token(user, &mut request);
        request.extend_from_slice(b"\r\nidempotency-key: ");
        buyers.write_key(user, 0, &mut request);
        request.extend_from_slice(b"\r\n\r\n");
        request.extend_from_slice(BODY);
        request
    };
    Arc::new((0..count).map(request).collect())
}

/// Sends the requests over `connections` connections and checks that each answer has `status`.
pub(crate) async fn run(
    target: &Target,
    requests: Arc<Vec<Vec<u8>>>,
    connections: usize,
    status: u16,
) -> anyhow::Result<Round> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut opened = Vec::with_capacity(connections);
    for _ in 0..connections {
        opened.push(Connection::connect(target).await?);
    }
    let started = Instant::now();
    let mut workers = tokio::task::JoinSet::new();
    for mut connection in opened {
        let (next, requests) = (Arc::clone(&next), Arc::clone(&requests));
        workers.spawn(async move {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(request) = requests.get(index) else { return anyhow::Ok(()) };
                let answer = connection.call(request).await?;
                ensure!(
                    answer.status == status,
                    "{} instead of {status}: {}",
                    answer.status,
                    String::from_utf8_lossy(&answer.body)
                );
            }
        });
    }
    while let Some(worker) = workers.join_next().await {
        worker.context("a worker of the load died")??;
    }
    Ok(Round { requests: requests.len(), wall: started.elapsed() })
}
