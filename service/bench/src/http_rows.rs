//! The rows that are measured over HTTP.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use seckill_domain::SaleSpec;
use seckill_ledger::Fence;
use seckill_ledger::testkit::RedisServer;
use seckill_loadtest::client::{Connection, Target};
use serde_json::json;

use crate::Scope;
use crate::load::{self, Round};
use crate::process::{Server, cpu_time};
use crate::serve::Captured;
use crate::table::{Better, Row, print, row};

/// Purchases under way at the same time: a herd, as a flash sale is.
const HERD: usize = 512;
/// Requests under way at the same time where no ledger is asked.
const READERS: usize = 64;
const SECRET: &[u8] = b"a secret of the bench, thirty-two bytes or more";

const ACCEPTED: &str = "accepted purchase: service CPU / bare handler";
const REDIS: &str = "accepted purchase: Redis CPU, 512 in flight";
const BATCHING: &str = "accepted purchases/s / one script call per request";
const STORED: &str = "HTTP to stored order: CPU / bare handler";
const SOLD_OUT: &str = "sold-out answers/s / bare handler";
const READS: &str = "sale reads/s / bare GET handler";

/// Everything that the HTTP rows share.
struct Bench<'a> {
    scope: &'a Scope,
    dir: tempfile::TempDir,
    redis: RedisServer,
    fence: Fence,
    secret: PathBuf,
    /// Next buyer that has bought nothing yet.
    next_seed: u64,
    services: u32,
}

/// CPU per request and rate of one round.
#[derive(Debug, Clone, Copy)]
struct Cost {
    server_us: f64,
    redis_us: f64,
    rate: f64,
}

pub(crate) async fn measure(scope: &Scope) -> anyhow::Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    let secret = dir.path().join("secret");
    std::fs::write(&secret, SECRET)?;
    let redis = RedisServer::start().await;
    let fence = redis.init_ledger().await;
    let mut bench = Bench { scope, dir, redis, fence, secret, next_seed: 1, services: 0 };
    bench.create_sale("hot", 1_000_000_000).await?;
    bench.create_sale("gone", 1).await?;
    let mut rows = Vec::new();
    if [ACCEPTED, REDIS, BATCHING].iter().any(|name| scope.wants(name)) {
        rows.extend(bench.purchases().await?);
    }
    if scope.wants(STORED) {
        rows.push(bench.stored().await?);
    }
    if scope.wants(SOLD_OUT) {
        rows.push(bench.sold_out().await?);
    }
    if scope.wants(READS) {
        rows.push(bench.reads().await?);
    }
    Ok(rows)
}

impl Bench<'_> {
    async fn create_sale(&self, id: &str, quantity: u64) -> anyhow::Result<()> {
        let spec: SaleSpec = serde_json::from_value(json!({
            "sale_id": id, "kind": "product", "title": "A sale of the bench", "quantity": quantity,
            "price": 1999, "currency": "CNY", "reference": "SKU-1",
        }))?;
        let mut conn = self.redis.connect().await;
        seckill_ledger::create_sale(&mut conn, &self.fence, &spec, &[0; 16]).await?;
        Ok(())
    }

    fn service(&mut self, workers: bool) -> anyhow::Result<Server> {
        self.services += 1;
        let dir = self.dir.path().join(format!("service-{}", self.services));
        std::fs::create_dir(&dir)?;
        let (redis, fence) = (self.redis.url(), self.fence.to_string());
        let (secret, dir) = (self.secret.display().to_string(), dir.display().to_string());
        let mut args =
            vec!["service", "--redis", &redis, "--fence", &fence, "--secret", &secret, "--dir", &dir];
        if workers {
            args.push("--workers");
        }
        Server::start(&args)
    }

    /// A bare server that gives the answer that the service gave to this request.
    async fn bare_like(&self, service: &Server, request: &[u8]) -> anyhow::Result<Server> {
        let captured = capture(&service.url, request).await?;
        let file = self.dir.path().join(format!("answer-{}", captured.status));
        std::fs::write(&file, serde_json::to_vec(&captured)?)?;
        Server::start(&["bare", "--answer", &file.display().to_string()])
    }

    /// Purchases by as many buyers who have bought nothing yet, each with a token and a key of its own.
    fn purchases_of(&mut self, server: &Server, sale: &str, count: u32) -> Arc<Vec<Vec<u8>>> {
        let seed = self.next_seed;
        self.next_seed += 1;
        load::purchases(server.url.trim_start_matches("http://"), sale, (seed, count), SECRET)
    }

    async fn cost(
        &self,
        server: &Server,
        requests: Arc<Vec<Vec<u8>>>,
        in_flight: usize,
        status: u16,
    ) -> anyhow::Result<Cost> {
        let target = Target::resolve(&server.url).await?;
        let (cpu, redis_cpu) = (cpu_time(server.pid())?, self.redis.cpu_us().await);
        let round = load::run(&target, requests, in_flight, status).await?;
        Ok(Cost {
            server_us: per_request(cpu_time(server.pid())? - cpu, &round),
            redis_us: (self.redis.cpu_us().await - redis_cpu) / round.requests as f64,
            rate: round.rate(),
        })
    }

    async fn purchases(&mut self) -> anyhow::Result<Vec<Row>> {
        let service = self.service(false)?;
        let sample = self.purchases_of(&service, "hot", 1);
        let bare = self.bare_like(&service, &sample[0]).await?;
        let (redis, fence) = (self.redis.url(), self.fence.to_string());
        let secret = self.secret.display().to_string();
        let single =
            Server::start(&["per-request", "--redis", &redis, "--fence", &fence, "--secret", &secret])?;
        let (mut ratios, mut redis, mut batching) = (Vec::new(), Vec::new(), Vec::new());
        let mut last = None;
        // The first round warms up and does not count.
        for round in 0..=self.scope.rounds {
            let requests = self.purchases_of(&service, "hot", self.scope.requests);
            let ours = self.cost(&service, Arc::clone(&requests), HERD, 202).await?;
            let theirs = self.cost(&bare, requests, HERD, 202).await?;
            let requests = self.purchases_of(&single, "hot", self.scope.requests / 2);
            let one_by_one = self.cost(&single, requests, HERD, 202).await?;
            if round > 0 {
                ratios.push(ours.server_us / theirs.server_us);
                redis.push(ours.redis_us);
                batching.push(ours.rate / one_by_one.rate);
            }
            last = Some((ours, theirs, one_by_one));
        }
        let (ours, theirs, single) = last.context("no round")?;
        let rows = [
            row(
                ACCEPTED,
                "x",
                &ratios,
                (Better::Lower, 2.0, 1.3),
                format!(
                    "{:.1} / {:.1} us; {:.0} / {:.0} per s",
                    ours.server_us, theirs.server_us, ours.rate, theirs.rate
                ),
            ),
            row(
                REDIS,
                "us",
                &redis,
                (Better::Lower, 4.0, 2.0),
                format!("one by one {:.1} us", single.redis_us),
            ),
            row(
                BATCHING,
                "x",
                &batching,
                (Better::Higher, 2.5, 4.0),
                format!(
                    "{:.0} / {:.0} per s; service CPU {:.1} / {:.1} us",
                    ours.rate, single.rate, ours.server_us, single.server_us
                ),
            ),
        ];
        let wanted: Vec<Row> = rows.into_iter().filter(|row| self.scope.wants(row.what)).collect();
        wanted.iter().for_each(print);
        Ok(wanted)
    }

    async fn stored(&mut self) -> anyhow::Result<Row> {
        let service = self.service(true)?;
        let sample = self.purchases_of(&service, "hot", 1);
        let bare = self.bare_like(&service, &sample[0]).await?;
        let target = Target::resolve(&service.url).await?;
        // What other rows bought is stored first.
        let mut stored = settled(&target).await?;
        let (mut ratios, mut detail) = (Vec::new(), String::new());
        for round in 0..=self.scope.rounds {
            let requests = self.purchases_of(&service, "hot", self.scope.requests);
            let count = requests.len() as u64;
            let (cpu, redis_cpu) = (cpu_time(service.pid())?, self.redis.cpu_us().await);
            let sent = load::run(&target, Arc::clone(&requests), HERD, 202).await?;
            stored = wait_stored(&target, stored + count).await?;
            let service_us = per_request(cpu_time(service.pid())? - cpu, &sent);
            let redis_us = (self.redis.cpu_us().await - redis_cpu) / count as f64;
            let theirs = self.cost(&bare, requests, HERD, 202).await?;
            if round > 0 {
                ratios.push((service_us + redis_us) / theirs.server_us);
            }
            detail = format!(
                "service with SQLite {service_us:.1} + Redis {redis_us:.1} / {:.1} us; {:.0} per s",
                theirs.server_us,
                sent.rate()
            );
        }
        let row = row(STORED, "x", &ratios, (Better::Lower, 5.0, 3.0), detail);
        print(&row);
        Ok(row)
    }

    async fn sold_out(&mut self) -> anyhow::Result<Row> {
        let service = self.service(false)?;
        let target = Target::resolve(&service.url).await?;
        let winner = self.purchases_of(&service, "gone", 1);
        load::run(&target, winner, 1, 202).await?;
        // A few losers set the marker and let the index of winners catch up.
        let losers = self.purchases_of(&service, "gone", 2_000);
        load::run(&target, losers, 1, 409).await?;
        let sample = self.purchases_of(&service, "gone", 1);
        let bare = self.bare_like(&service, &sample[0]).await?;
        self.compare(SOLD_OUT, (Better::Higher, 0.8, 0.9), &service, &bare, 409, |bench, server| {
            let count = bench.scope.requests;
            bench.purchases_of(server, "gone", count)
        })
        .await
    }

    async fn reads(&mut self) -> anyhow::Result<Row> {
        let service = self.service(false)?;
        let request = |server: &Server| {
            let authority = server.url.trim_start_matches("http://");
            format!("GET /v1/sales/hot HTTP/1.1\r\nhost: {authority}\r\n\r\n").into_bytes()
        };
        let bare = self.bare_like(&service, &request(&service)).await?;
        self.compare(READS, (Better::Higher, 0.9, 0.98), &service, &bare, 200, |bench, server| {
            Arc::new(vec![request(server); bench.scope.requests as usize])
        })
        .await
    }

    /// Rates of two servers in turn.
    async fn compare(
        &mut self,
        what: &'static str,
        bars: (Better, f64, f64),
        service: &Server,
        bare: &Server,
        status: u16,
        mut requests: impl FnMut(&mut Self, &Server) -> Arc<Vec<Vec<u8>>>,
    ) -> anyhow::Result<Row> {
        let (mut ratios, mut detail) = (Vec::new(), String::new());
        for round in 0..=self.scope.rounds {
            let batch = requests(self, service);
            let ours = self.cost(service, Arc::clone(&batch), READERS, status).await?;
            let theirs = self.cost(bare, batch, READERS, status).await?;
            if round > 0 {
                ratios.push(ours.rate / theirs.rate);
            }
            detail = format!(
                "{:.0} / {:.0} per s; CPU {:.1} / {:.1} us",
                ours.rate, theirs.rate, ours.server_us, theirs.server_us
            );
        }
        let row = row(what, "x", &ratios, bars, detail);
        print(&row);
        Ok(row)
    }
}

fn per_request(cpu: Duration, round: &Round) -> f64 {
    cpu.as_secs_f64() * 1e6 / round.requests as f64
}

/// Sends a request once and keeps the answer with its headers.
async fn capture(url: &str, request: &[u8]) -> anyhow::Result<Captured> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(url.trim_start_matches("http://")).await?;
    stream.write_all(request).await?;
    let mut bytes = Vec::new();
    loop {
        let mut chunk = [0; 4096];
        let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut chunk)).await??;
        ensure!(read > 0, "the service closed the connection");
        bytes.extend_from_slice(&chunk[..read]);
        let text = String::from_utf8_lossy(&bytes);
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        let length = headers
            .iter()
            .find(|(name, _)| name == "content-length")
            .and_then(|(_, n)| n.parse::<usize>().ok());
        if length.is_some_and(|length| body.len() >= length) {
            return Ok(Captured {
                status: status.context("no status")?,
                headers: headers
                    .into_iter()
                    .filter(|(name, _)| name != "content-length" && name != "date")
                    .collect(),
                body: body.to_owned(),
            });
        }
    }
}

async fn stored_count(target: &Target) -> anyhow::Result<u64> {
    let mut connection = Connection::connect(target).await?;
    let answer = connection.call(&target.request("GET", "/bench/stored", &[], None)).await?;
    Ok(String::from_utf8(answer.body)?.parse()?)
}

/// Waits until no more orders are being stored.
async fn settled(target: &Target) -> anyhow::Result<u64> {
    let mut last = stored_count(target).await?;
    loop {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let now = stored_count(target).await?;
        if now == last {
            return Ok(now);
        }
        last = now;
    }
}

async fn wait_stored(target: &Target, count: u64) -> anyhow::Result<u64> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let stored = stored_count(target).await?;
        if stored >= count {
            return Ok(stored);
        }
        ensure!(Instant::now() < deadline, "{stored} of {count} orders are stored after a minute");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
