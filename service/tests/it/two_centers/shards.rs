//! Shards move between two centers whose databases replicate each other, while people buy and pay in both.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http::Method;
use seckill_domain::OrderId;
use seckill_parts::{Kafka, Mariadb, MariadbPair};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection};
use tokio::task::JoinSet;

use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::client::{Answer, Client};
use crate::crowd::{Bought, Crowd, assert_audits_clean, compare_ledger, stored_orders, user_of};
use crate::support::{PATIENCE, eventually};

/// More than anybody buys in these tests.
const PLENTY: u64 = 1_000_000;
/// What one unit costs, in the sales of these tests.
pub(super) const PRICE: u64 = 1999;

/// Two databases that are one.
pub(super) struct Databases(MariadbPair);

impl Databases {
    pub(super) async fn start() -> Databases {
        Databases(MariadbPair::start("seckill").await.unwrap())
    }

    pub(super) fn options(&self) -> CentersOptions {
        let databases = BOTH.into_iter().zip(self.0.urls.clone()).collect();
        CentersOptions { databases, ..CentersOptions::default() }
    }

    pub(super) fn server(&self, which: Which) -> &Mariadb {
        which.of(&self.0.servers)
    }

    pub(super) async fn number(&self, which: usize, sql: &str) -> i64 {
        let mut conn = MySqlConnection::connect(&self.0.urls[which]).await.unwrap();
        let number = sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(&mut conn).await.unwrap();
        conn.close().await.unwrap();
        number
    }
}

/// People who buy and pay at once, each in the center of their turn, and insist until it is done.
pub(super) struct Payers {
    tasks: JoinSet<Paid>,
    stop: Arc<AtomicBool>,
    paid: Arc<AtomicU64>,
}

/// What they heard.
#[derive(Debug, Default)]
pub(super) struct Paid {
    pub(super) bought: Vec<Bought>,
    /// Refusals by code: each said that nothing was done. Without an answer: "".
    pub(super) again: BTreeMap<String, u64>,
    /// The longest that anybody waited for a payment.
    pub(super) longest: Duration,
}

impl Payers {
    pub(super) fn start(centers: &Centers, sale: &'static str, width: usize) -> Payers {
        let (stop, paid) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut tasks = JoinSet::new();
        for number in 0..width {
            let clients = BOTH.map(|which| centers.client(which));
            let (stop, paid) = (Arc::clone(&stop), Arc::clone(&paid));
            tasks.spawn(async move {
                let mut heard = Paid::default();
                for turn in number.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let (uid, client) = (format!("payer-{number}-{turn}"), &clients[turn % 2]);
                    let answer = client.buy_until_known(sale, &uid, "k").await;
                    assert_eq!(answer.status, 202, "{answer:?}");
                    let order_id = answer.body["order_id"].as_str().unwrap().to_owned();
                    pay(&clients[(turn / 2) % 2], &order_id, &mut heard).await;
                    heard.bought.push(Bought { uid, key: "k".to_owned(), order_id });
                    paid.fetch_add(1, Ordering::Relaxed);
                }
                heard
            });
        }
        Payers { tasks, stop, paid }
    }

    pub(super) async fn until_more(&self, more: u64) {
        let goal = self.paid.load(Ordering::Relaxed) + more;
        eventually("people pay", async || (self.paid.load(Ordering::Relaxed) >= goal).then_some(())).await;
    }

    pub(super) async fn stop(mut self) -> Paid {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Paid::default();
        while let Some(heard) = self.tasks.join_next().await {
            let heard = heard.unwrap();
            all.bought.extend(heard.bought);
            all.longest = all.longest.max(heard.longest);
            for (code, count) in heard.again {
                *all.again.entry(code).or_default() += count;
            }
        }
        all
    }
}

/// Pays an order, under the same id until it is known that it is paid.
async fn pay(client: &Client, order_id: &str, heard: &mut Paid) {
    let begun = Instant::now();
    loop {
        let body = json!({ "payment_id": format!("pay-{order_id}"), "amount": PRICE });
        // Where a service dies, no answer may come.
        let answer = client.pay_once(order_id, body).await;
        if let Some(answer) = &answer {
            if answer.status == 200 {
                assert_eq!(answer.body["status"], "paid", "{answer:?}");
                heard.longest = heard.longest.max(begun.elapsed());
                return;
            }
            // An order may also be on its way to its table, or the answer late: then it is not known, and asked again.
            let passing = ["shifting", "orders_unavailable", "no_authority", "master_unreachable"];
            let passing = passing.contains(&answer.code());
            assert!(answer.status == 503 && passing && answer.body["retryable"] == true, "{answer:?}");
            assert!(answer.code() != "shifting" || answer.body["executed"] == "no", "{answer:?}");
        }
        let code = answer.as_ref().map_or("", Answer::code);
        *heard.again.entry(code.to_owned()).or_default() += 1;
        assert!(begun.elapsed() < PATIENCE, "{order_id} is never paid: {answer:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Moves shards with the command, asked of a center, and returns what it printed.
fn shift(centers: &Centers, asked: Which, args: &[&str]) -> (i32, Value) {
    let mut all = vec!["shards", "shift"];
    all.extend(args);
    all.extend(["--yes", "-o", "json"]);
    let (code, out, err) = centers.cli(asked, &all);
    println!("{args:?}: {code}\n{out}\n{err}");
    (code, out.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or(Value::Null))
}

pub(super) fn owners(topology: &Value) -> Vec<String> {
    let owners = topology["shard_owners"].as_array().unwrap();
    owners.iter().map(|owner| owner.as_str().unwrap().to_owned()).collect()
}

/// Both databases hold exactly what the ledger holds; the audits are clean; what was paid is paid in both.
pub(super) async fn compare(centers: &Centers, bought: &[Bought], paid: &[Bought]) {
    let all: Vec<Bought> = bought.iter().chain(paid).cloned().collect();
    let claims = compare_ledger(centers, Which::A, "phone", &all).await;
    let mut expected: Vec<(String, String)> =
        claims.values().map(|claim| (claim.order_id.to_string(), claim.uid.to_string())).collect();
    expected.sort();
    for which in BOTH {
        let begun = Instant::now();
        while stored_orders(&centers.database(which), "phone").await != expected {
            if begun.elapsed() >= PATIENCE {
                panic!("not every order is stored once:\n{}", difference(centers, &expected).await);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert_audits_clean(centers).await;
    for which in BOTH {
        let client = centers.client(which);
        for bought in paid.iter().step_by(7) {
            let status = client.order_status(&bought.uid, &bought.order_id).await;
            assert_eq!(status, "paid", "asked of {}: {bought:?}", which.id());
        }
    }
}

/// What each database lacks of these orders and has beside them, and what its queue waits for.
async fn difference(centers: &Centers, expected: &[(String, String)]) -> String {
    let only = |these: &[(String, String)], those: &[(String, String)]| -> Vec<String> {
        let shard = |id: &str| id.parse::<OrderId>().unwrap().table().shard();
        let only = these.iter().filter(|order| !those.contains(order));
        only.map(|(id, uid)| format!("{id} of {uid} in shard {}", shard(id))).collect()
    };
    let mut text = String::new();
    for which in BOTH {
        let stored = stored_orders(&centers.database(which), "phone").await;
        let (lacks, beside) = (only(expected, &stored), only(&stored, expected));
        let queue = &centers.ready(which).await["queue"];
        text += &format!("{} lacks {lacks:?}, has beside {beside:?}; its queue: {queue}\n", which.id());
    }
    text + &centers.logs()
}

async fn there_and_back(databases: &Databases, options: CentersOptions) {
    let centers = Centers::start(options).await;
    let [a, b] = BOTH.map(|which| centers.client(which));
    a.create_sale("phone", PLENTY, json!({ "price": PRICE })).await;
    let crowd = Crowd::start(&centers, "phone", "u", 12, PLENTY);
    let payers = Payers::start(&centers, "phone", 8);
    crowd.until_more(200).await;
    payers.until_more(50).await;
    let before = centers.topology(Which::A).await;

    // All shards leave a, asked of a: the command finds b.
    let (code, shift_there) = shift(&centers, Which::A, &["--from", "a", "--to", "b"]);
    assert_eq!(code, 0, "{shift_there:#}\n{}", centers.logs());
    let there = centers.topology(Which::B).await;
    assert!(owners(&there).iter().all(|owner| owner == "b"), "{there:#}");
    assert_eq!((&there["blocked_shards"], &there["epoch"]), (&json!([]), &before["epoch"]), "{there:#}");
    crowd.until_more(200).await;
    payers.until_more(50).await;
    for uid in [user_of(Which::A, "x"), user_of(Which::B, "x")] {
        let order = a.buy_until_known("phone", &uid, "k").await;
        let order_id = order.body["order_id"].as_str().unwrap().to_owned();
        assert_eq!(order.body["home_center"], "b", "{order:?}");
        b.stored_order(&uid, &order_id).await;
        let asked = a.user(Method::GET, &format!("/v1/orders/{order_id}"), &uid, None).await;
        assert_eq!(asked.headers.get("seckill-home").unwrap(), "b", "{asked:?}");
    }

    // And half of them back, asked of b.
    let (code, shift_back) = shift(&centers, Which::B, &["--shards", "0-31", "--to", "a"]);
    assert_eq!(code, 0, "{shift_back:#}\n{}", centers.logs());
    let back = centers.topology(Which::A).await;
    assert_eq!(owners(&back), owners(&before));
    crowd.until_more(200).await;
    payers.until_more(50).await;

    let heard = crowd.stop().await;
    let paid = payers.stop().await;
    println!(
        "{} bought ({:?} asked again), {} paid ({:?} asked again, the longest took {:?})",
        heard.bought.len(),
        heard.again,
        paid.bought.len(),
        paid.again,
        paid.longest
    );
    // Purchases know nothing of it.
    assert!(heard.again.keys().all(|code| code.is_empty() || code == "overloaded"), "{:?}", heard.again);
    let mut bought = heard.bought;
    for uid in [user_of(Which::A, "x"), user_of(Which::B, "x")] {
        let order = a.buy_until_known("phone", &uid, "k").await;
        let order_id = order.body["order_id"].as_str().unwrap().to_owned();
        bought.push(Bought { uid, key: "k".to_owned(), order_id });
    }
    compare(&centers, &bought, &paid.bought).await;
    assert_eq!(
        databases.number(0, "SELECT COUNT(*) FROM payments WHERE outcome = 'paid'").await,
        paid.bought.len() as i64
    );
    let refunds = databases.number(1, "SELECT COUNT(*) FROM refunds").await;
    assert_eq!(refunds, 0, "somebody paid a closed order");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_kafka_too_all_shards_move_there_and_back() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = BOTH.map(|which| dir.path().join(which.id()));
    let (databases, a, b) = tokio::join!(Databases::start(), Kafka::start(&a), Kafka::start(&b));
    let kafka = [a.unwrap(), b.unwrap()];
    let table = |which: Which| {
        let at = |which: Which| kafka[usize::from(which.number() - 1)].bootstrap();
        let (own, other, name) = (at(which), at(which.other()), which.other().id());
        let text = format!(
            "[kafka]\nbootstrap = \"{own}\"\nreplication_factor = 1\n\
             [kafka.centers.{name}]\nbootstrap = \"{other}\"\n"
        );
        (which, text)
    };
    let more = BOTH.map(table).into();
    there_and_back(&databases, CentersOptions { more, queue: Some("kafka"), ..databases.options() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_shards_move_there_and_back_while_people_buy_and_pay() {
    let databases = Databases::start().await;
    there_and_back(&databases, databases.options()).await;
}
