//! The load: a fixed number of connections, each with one request under way, every request prepared beforehand.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
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
