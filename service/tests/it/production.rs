//! Orders over Kafka and MariaDB: what was promised is stored once, whatever stops, hangs or dies meanwhile.

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use seckill_parts::{Kafka, Mariadb, PartError, shared};
use serde_json::{Value, json};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::race::{UNITS, race};
use crate::serve::{Center, Service};
use crate::support::{PATIENCE, eventually};

/// How often the tables are counted while a test waits for orders.
const COUNT_INTERVAL: Duration = Duration::from_millis(250);

/// Waits until MariaDB holds as many orders as were promised: they are exactly those, each in its table, and the books
/// balance. Tells what the audit says.
async fn assert_stored_once(center: &Center, service: &Service, promised: &HashMap<String, String>) -> Value {
    let mut deadline = Instant::now() + PATIENCE;
    let mut before = 0;
    loop {
        let count = center.order_count().await;
        if count >= promised.len() as i64 {
            break;
        }
        if count > before {
            (before, deadline) = (count, Instant::now() + PATIENCE);
        }
        let missing = promised.len() as i64 - count;
        assert!(Instant::now() < deadline, "{missing} orders are missing:\n{}", service.log());
        tokio::time::sleep(COUNT_INTERVAL).await;
    }
    let stored = center.orders().await;
    let lost: Vec<_> = promised.iter().filter(|(id, uid)| stored.get(*id) != Some(*uid)).take(5).collect();
    let extra: Vec<_> = stored.iter().filter(|(id, _)| !promised.contains_key(*id)).take(5).collect();
    assert!(lost.is_empty() && extra.is_empty(), "lost: {lost:?}, never promised: {extra:?}");
    service.assert_books_balance()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_race_over_kafka_and_mariadb_stores_every_unit_once_in_the_right_table() {
    let center = Center::open().await;
    let (service, client) = center.start().await;
    client.create_sale("race", UNITS as u64, json!({})).await;
    let owners = race(&client).await;
    let audit = assert_stored_once(&center, &service, &owners).await;
    assert_eq!(audit["sales"][0]["orders"]["created"], json!(UNITS), "{audit:#}");
    assert_eq!(audit["sales"][0]["remaining"], json!(0), "{audit:#}");
    // Over HTTP, too, and for their owners alone.
    for (id, uid) in owners.iter().take(20) {
        let order = client.stored_order(uid, id).await;
        assert_eq!((order["sale_id"].as_str(), order["quantity"].as_u64()), (Some("race"), Some(1)));
        assert_eq!(
            client.user(http::Method::GET, &format!("/v1/orders/{id}"), "nobody", None).await.status,
            404
        );
    }
    drop(service);
    center.close().await;
}

/// A server that can go away.
trait Server {
    fn hang(&self);
    fn die(&self);
    async fn come_back(&self) -> Result<(), PartError>;
}

impl Server for Kafka {
    fn hang(&self) {
        self.pause();
    }

    fn die(&self) {
        self.kill();
    }

    async fn come_back(&self) -> Result<(), PartError> {
        self.restart().await
    }
}

impl Server for Mariadb {
    fn hang(&self) {
        self.pause();
    }

    fn die(&self) {
        self.kill();
    }

    async fn come_back(&self) -> Result<(), PartError> {
        self.restart().await
    }
}

/// One purchase, tried once.
struct Purchase {
    uid: String,
    /// When it was due.
    due: Instant,
    /// From then until its answer.
    took: Duration,
    /// The order, or what came instead.
    outcome: Result<String, String>,
}

/// Between two purchases of the steady load.
const EVERY: Duration = Duration::from_millis(4);

/// Buyers that come one by one at a steady rate, however long the others wait.
fn steady_load(client: &Client, sale: &'static str, stop: &CancellationToken) -> JoinHandle<Vec<Purchase>> {
    let (client, stop) = (client.clone(), stop.clone());
    tokio::spawn(async move {
        let mut under_way = JoinSet::new();
        let mut purchases = Vec::new();
        let mut ticks = tokio::time::interval(EVERY);
        for number in 0.. {
            let Some(due) = stop.run_until_cancelled(ticks.tick()).await else { break };
            let client = client.clone();
            under_way.spawn(async move {
                let uid = format!("buyer-{number}");
                let outcome = match client.buy(sale, &uid, "k", 1).await {
                    Some(answer) if answer.status == 202 => {
                        Ok(answer.body["order_id"].as_str().unwrap().to_owned())
                    }
                    other => Err(format!("{other:?}")),
                };
                Purchase { uid, due: due.into_std(), took: due.elapsed(), outcome }
            });
            while let Some(done) = under_way.try_join_next() {
                purchases.push(done.unwrap());
            }
        }
        while let Some(done) = under_way.join_next().await {
            purchases.push(done.unwrap());
        }
        purchases
    })
}

/// The 50th and the 99th percentile of how long purchases took that were due in a stretch of time, and how many there
/// were.
fn latency(purchases: &[Purchase], from: Instant, until: Instant) -> (Duration, Duration, usize) {
    let mut took: Vec<Duration> = purchases
        .iter()
        .filter(|purchase| (from..until).contains(&purchase.due))
        .map(|purchase| purchase.took)
        .collect();
    took.sort_unstable();
    let at = |share: usize| took[(took.len() * share / 100).min(took.len() - 1)];
    (at(50), at(99), took.len())
}

/// How long a sale runs before the server goes away, how long it hangs, how long it is gone then.
const BEFORE: Duration = Duration::from_secs(8);
const HANGS: Duration = Duration::from_secs(30);
const GONE: Duration = Duration::from_secs(30);

/// A sale during which a server hangs for half a minute and is dead for another one. Every purchase is accepted at the
/// first attempt and as fast as before; the audit says that it cannot see everything, and nothing worse; everything is
/// stored once when the server is back.
async fn a_minute_without(server: &impl Server, center: Center) {
    let (service, client) = center.start().await;
    client.create_sale("s", 1_000_000, json!({})).await;
    let stop = CancellationToken::new();
    let load = steady_load(&client, "s", &stop);
    let begin = Instant::now();
    tokio::time::sleep(BEFORE).await;
    let away = Instant::now();
    server.hang();
    tokio::time::sleep(HANGS).await;
    server.die();
    let dead = Instant::now();
    assert!(client.is_ready().await, "reads and purchases go on:\n{}", service.log());
    let (code, report) = service.audit();
    assert_eq!((code, &report["verdict"]), (3, &json!("incomplete")), "{report:#}");
    tokio::time::sleep(GONE.saturating_sub(dead.elapsed())).await;
    let back = Instant::now();
    server.come_back().await.unwrap();
    let returned = Instant::now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    stop.cancel();
    let purchases = load.await.unwrap();

    let failed: Vec<&Purchase> = purchases.iter().filter(|purchase| purchase.outcome.is_err()).collect();
    let first = failed.first().map(|purchase| (purchase.due - begin, &purchase.outcome));
    assert!(failed.is_empty(), "{} purchases failed, first {first:?}:\n{}", failed.len(), service.log());
    // The first second warms up.
    let (p50_before, p99_before, count_before) = latency(&purchases, begin + Duration::from_secs(1), away);
    let (p50_away, p99_away, count_away) = latency(&purchases, away, back);
    println!(
        "before: {count_before} accepted, p50 {p50_before:?}, p99 {p99_before:?}; \
         away for {:?}: {count_away} accepted, p50 {p50_away:?}, p99 {p99_away:?}",
        back - away
    );
    let offered = (back - away).as_millis() / EVERY.as_millis();
    assert!(count_away as u128 * 100 >= offered * 98, "{count_away} of {offered} purchases were made");
    // What waits for a server that is away waits for seconds.
    let bound = (3 * p99_before).max(Duration::from_millis(400));
    assert!(p99_away <= bound, "purchases slowed down: {p99_away:?}, before {p99_before:?}");

    let promised = purchases.into_iter().map(|purchase| (purchase.outcome.unwrap(), purchase.uid)).collect();
    // Until it has answered each of them, the audit cannot see everything.
    eventually("the queue waits for nothing", async || {
        let ready = client.admin(http::Method::GET, "/readyz", &[], None).await;
        ready.body["queue"]["waiting"].as_array().is_none_or(Vec::is_empty).then_some(())
    })
    .await;
    assert_stored_once(&center, &service, &promised).await;
    println!("{} orders are stored {:?} after it answered again", promised.len(), returned.elapsed());
    drop(service);
    center.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minute_without_kafka_delays_orders_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let kafka = Kafka::start(dir.path()).await.unwrap();
    let center = Center::on(kafka.bootstrap(), shared::mariadb().await.unwrap()).await;
    a_minute_without(&kafka, center).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minute_without_mariadb_delays_orders_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mariadb = Mariadb::start(dir.path()).await.unwrap();
    let center = Center::on(shared::kafka().await.unwrap(), mariadb.admin()).await;
    a_minute_without(&mariadb, center).await;
}

/// Buyers under way at once.
const CROWD: usize = 32;

/// A crowd that buys until it is told to stop. Every buyer asks all services at once, under the same key, until each has
/// answered, and hears the same order everywhere.
struct Crowd {
    stop: CancellationToken,
    bought: Arc<AtomicUsize>,
    buyers: JoinSet<Vec<(String, String)>>,
}

impl Crowd {
    fn start(clients: &[Client], sale: &'static str) -> Crowd {
        let (stop, bought) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
        let next = Arc::new(AtomicUsize::new(0));
        let mut buyers = JoinSet::new();
        for _ in 0..CROWD {
            let (clients, stop) = (clients.to_vec(), stop.clone());
            let (bought, next) = (Arc::clone(&bought), Arc::clone(&next));
            buyers.spawn(async move {
                let mut orders = Vec::new();
                while !stop.is_cancelled() {
                    let uid = format!("buyer-{}", next.fetch_add(1, Ordering::Relaxed));
                    let asked = clients.iter().map(|client| client.buy_until_known(sale, &uid, "k"));
                    let mut heard: Vec<String> = Vec::new();
                    for answer in join_all(asked).await {
                        assert_eq!(answer.status, 202, "{answer:?}");
                        heard.push(answer.body["order_id"].as_str().unwrap().to_owned());
                    }
                    let order = heard.pop().unwrap();
                    assert!(heard.iter().all(|other| *other == order), "{uid} got {order} and {heard:?}");
                    orders.push((order, uid));
                    bought.fetch_add(1, Ordering::Relaxed);
                }
                orders
            });
        }
        Crowd { stop, bought, buyers }
    }

    /// Waits until so many more have bought.
    async fn wait_for(&self, more: usize) {
        let target = self.bought.load(Ordering::Relaxed) + more;
        eventually("the crowd gets on", async || {
            (self.bought.load(Ordering::Relaxed) >= target).then_some(())
        })
        .await;
    }

    /// The users by order.
    async fn finish(mut self) -> HashMap<String, String> {
        self.stop.cancel();
        let mut orders = HashMap::new();
        while let Some(bought) = self.buyers.join_next().await {
            for (order, uid) in bought.unwrap() {
                assert_eq!(orders.insert(order, uid), None, "an order id was given twice");
            }
        }
        orders
    }
}

/// It dies after the database committed a batch and before the consumer knows; after Kafka acknowledged records and
/// before the cursor says so; and at moments that nobody chose. `SECKILL_SEED=N` repeats those.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_dies_between_any_two_steps_and_every_order_is_stored_once() {
    let seed = std::env::var("SECKILL_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("SECKILL_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let center = Center::open().await;
    let (mut service, client) = center.start().await;
    client.create_sale("s", 1_000_000, json!({})).await;
    let crowd = Crowd::start(&[client], "s");
    crowd.wait_for(100).await;
    let folder = tempfile::tempdir().unwrap();
    let fail_point = folder.path().join("fail-point");
    for place in ["stored 1", "stored 3", "acknowledged 1", "acknowledged 4"] {
        service.kill();
        std::fs::write(&fail_point, format!("{place} kill")).unwrap();
        service.spawn(&[("SECKILL_FAIL_POINT", fail_point.to_str().unwrap())]);
        let status = eventually("it dies in that place", async || service.ended()).await;
        assert_eq!(status.signal(), Some(9), "{place}: {status}\n{}", service.log());
        service.start(&[]).await;
    }
    for _ in 0..4 {
        crowd.wait_for(rng.random_range(1..500)).await;
        service.kill();
        service.start(&[]).await;
    }
    crowd.wait_for(100).await;
    assert_stored_once(&center, &service, &crowd.finish().await).await;
    drop(service);
    center.close().await;
}

/// Orders that a service handed to Kafka.
async fn published(client: &Client) -> f64 {
    let metrics = client.admin(http::Method::GET, "/metrics", &[], None).await;
    let text = metrics.body.as_str().unwrap().to_owned();
    let lines = text.lines().filter(|line| line.starts_with("seckill_kafka_published_total"));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_relays_and_two_consumers_of_one_center_store_every_order_once() {
    let center = Center::open().await;
    let (first, client) = center.start().await;
    client.create_sale("s", 1_000_000, json!({})).await;
    let mut second = center.service(2);
    second.start(&[]).await;
    let clients = [first.client(), second.client()];
    eventually("both sell", async || (clients[1].get("/v1/sales/s").await.status == 200).then_some(())).await;
    let crowd = Crowd::start(&clients, "s");
    crowd.wait_for(2000).await;
    // One of them dies meanwhile, and comes back.
    second.kill();
    second.start(&[]).await;
    crowd.wait_for(500).await;
    // Its count began anew with it.
    let relays = async || (published(&clients[1]).await > 0.0).then_some(());
    eventually("the second relays beside the first", relays).await;
    let orders = crowd.finish().await;
    assert_stored_once(&center, &first, &orders).await;
    second.assert_books_balance();
    assert!(published(&clients[0]).await > 0.0, "the first relays");
    drop((first, second));
    center.close().await;
}
