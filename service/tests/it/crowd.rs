//! Shoppers of two centers who do not give up, and the comparison of what they were told with both centers' books.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use seckill_domain::{OrderId, SHARDS, SaleId, TABLES, Uid};
use seckill_ledger::read::{self, Claim};
use serde_json::json;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, MySqlConnection};
use tokio::task::JoinSet;

use crate::centers::{BOTH, Centers, Which};
use crate::client::{Answer, Client};
use crate::support::{PATIENCE, eventually};

/// The longest that one shopper asks again: longer than any outage of these tests, and the way back from it.
const INSISTENCE: Duration = Duration::from_secs(120);
/// What SQLite takes in one compound SELECT.
const COMPOUND_MAX: u16 = 256;

/// The center of a user's orders in a new topology.
pub(crate) fn home(uid: &str) -> Which {
    match Uid::new(uid).unwrap().table().shard().number() < SHARDS / 2 {
        true => Which::A,
        false => Which::B,
    }
}

/// A user who is at home there.
pub(crate) fn user_of(which: Which, prefix: &str) -> String {
    (0..).map(|n| format!("{prefix}{n}")).find(|uid| home(uid) == which).unwrap()
}

/// A purchase that was acknowledged.
#[derive(Debug, Clone)]
pub(crate) struct Bought {
    pub(crate) uid: String,
    pub(crate) key: String,
    pub(crate) order_id: String,
}

/// What became of one purchase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Acknowledged.
    Bought,
    /// Nothing left.
    SoldOut,
}

/// What shoppers heard.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) bought: Vec<Bought>,
    pub(crate) sold_out: u64,
    /// Answers that said: again, with the same key; by code. Without an answer: "".
    pub(crate) again: BTreeMap<String, u64>,
}

impl Heard {
    /// With what others heard.
    pub(crate) fn add(&mut self, other: Heard) {
        self.bought.extend(other.bought);
        self.sold_out += other.sold_out;
        for (code, count) in other.again {
            *self.again.entry(code).or_default() += count;
        }
    }
}

/// Shoppers that buy, one after another, until they are stopped. Each asks its own center first and, when that has no
/// outcome for it, the other one, and so on, always with the same key; every tenth asks both at once.
pub(crate) struct Crowd {
    shoppers: JoinSet<Heard>,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
}

impl Crowd {
    /// `width` shoppers at a time; `users` at most in all. Names begin with `prefix`, so that crowds do not meet.
    pub(crate) fn start(centers: &Centers, sale: &str, prefix: &str, width: usize, users: u64) -> Crowd {
        let (next, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let mut shoppers = JoinSet::new();
        for _ in 0..width {
            let clients = BOTH.map(|which| centers.client(which));
            let (next, stop, acknowledged) =
                (Arc::clone(&next), Arc::clone(&stop), Arc::clone(&acknowledged));
            let (sale, prefix) = (sale.to_owned(), prefix.to_owned());
            shoppers.spawn(async move {
                let mut heard = Heard::default();
                while !stop.load(Ordering::Relaxed) {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= users {
                        break;
                    }
                    let uid = format!("{prefix}{n}");
                    if shop(&clients, &sale, &uid, n, &mut heard).await == Ended::Bought {
                        acknowledged.fetch_add(1, Ordering::Relaxed);
                    }
                }
                heard
            });
        }
        Crowd { shoppers, stop, acknowledged }
    }

    /// How many purchases were acknowledged so far.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until so many more are acknowledged.
    pub(crate) async fn until_more(&self, more: u64) {
        let goal = self.acknowledged() + more;
        eventually("purchases are acknowledged", async || (self.acknowledged() >= goal).then_some(())).await;
    }

    /// Lets nobody new in, and waits until everybody knows their outcome.
    pub(crate) async fn stop(self) -> Heard {
        self.stop.store(true, Ordering::Relaxed);
        self.finish().await
    }

    /// Waits until everybody has been there.
    pub(crate) async fn finish(mut self) -> Heard {
        let mut all = Heard::default();
        while let Some(heard) = self.shoppers.join_next().await {
            all.add(heard.unwrap());
        }
        all
    }
}

/// One user's purchase, to its outcome.
async fn shop(clients: &[Client; 2], sale: &str, uid: &str, n: u64, heard: &mut Heard) -> Ended {
    let (token, key) = (clients[0].token(uid), format!("key-of-{uid}"));
    let deadline = Instant::now() + INSISTENCE;
    let mut turn = usize::from(n % 2 == 1);
    let buy = |turn: usize| clients[turn % 2].buy_with_token(sale, &token, &key, 1);
    let mut answers = match n % 10 {
        0 => <[_; 2]>::from(tokio::join!(buy(0), buy(1))).to_vec(),
        _ => vec![buy(turn).await],
    };
    loop {
        let mut ended = None;
        for answer in answers {
            match outcome(answer) {
                Ok(Some(order_id)) => {
                    let known = ended.get_or_insert_with(|| Some(order_id.clone()));
                    assert_eq!(known.as_ref(), Some(&order_id), "two outcomes for {uid} under one key");
                }
                Ok(None) => {
                    let known = ended.get_or_insert(None);
                    assert_eq!(*known, None, "a winner, {uid}, heard sold_out");
                }
                Err(code) => *heard.again.entry(code).or_default() += 1,
            }
        }
        match ended {
            Some(Some(order_id)) => {
                heard.bought.push(Bought { uid: uid.to_owned(), key, order_id });
                return Ended::Bought;
            }
            Some(None) => {
                heard.sold_out += 1;
                return Ended::SoldOut;
            }
            None => {}
        }
        assert!(Instant::now() < deadline, "the purchase of {uid} has no outcome: {:?}", heard.again);
        tokio::time::sleep(Duration::from_millis(50)).await;
        turn += 1;
        answers = vec![buy(turn).await];
    }
}

/// The order, or that it is sold out; an error says that the same request may be sent again.
fn outcome(answer: Option<Answer>) -> Result<Option<String>, String> {
    let Some(answer) = answer else { return Err(String::new()) };
    match (answer.status, answer.code()) {
        (202, _) => Ok(Some(answer.body["order_id"].as_str().unwrap().to_owned())),
        (409, "sold_out") => Ok(None),
        // Where a load balancer would lead nobody: the service has started before what it stands on.
        (503, "no_authority") if answer.body["detail"] == json!("The service is starting") => {
            assert_eq!(answer.body["executed"], json!("no"), "{answer:?}");
            Err("no_authority: starting".to_owned())
        }
        (503, code) if answer.body["retryable"] == json!(true) => Err(code.to_owned()),
        other => panic!("{other:?}: {}", answer.body),
    }
}

/// Everybody who bought asks again, in the other center than most, and gets the same order.
pub(crate) async fn ask_again(client: &Client, sale: &str, bought: &[Bought]) {
    for bought in bought {
        let again = client.buy_until_known(sale, &bought.uid, &bought.key).await;
        assert_eq!(
            (again.status, again.body["order_id"].as_str()),
            (202, Some(&*bought.order_id)),
            "{again:?}"
        );
    }
}

/// Waits until every purchase in the master's ledger is stored, and compares the books of both centers:
/// - whatever was acknowledged is in the ledger of the center `master`,
/// - what is in the ledger is in its home center's database, and only there, and nothing else is in any,
/// - no more was sold than was on offer, and what is left is right,
/// - the audit, asked of either center, finds the same: it looks at the orders of both.
///
/// Returns how many orders there are.
pub(crate) async fn compare_books(centers: &Centers, master: Which, sale: &str, bought: &[Bought]) -> u64 {
    let claims = compare_ledger(centers, master, sale, bought).await;
    for which in BOTH {
        let mut expected: Vec<(String, String)> = claims
            .values()
            .filter(|claim| home(claim.uid.as_str()) == which)
            .map(|claim| (claim.order_id.to_string(), claim.uid.to_string()))
            .collect();
        expected.sort();
        let digit = which.number().to_string();
        assert!(expected.iter().all(|(order, _)| order.starts_with(&digit)), "an order names another center");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let stored = stored_orders(&centers.database(which), sale).await;
            if stored == expected {
                break;
            }
            let strange: Vec<_> =
                stored.iter().filter(|order| expected.binary_search(order).is_err()).collect();
            assert!(strange.is_empty(), "center {} stored orders that nobody holds: {strange:?}", which.id());
            assert!(
                Instant::now() < deadline,
                "center {} stored {} orders of {}",
                which.id(),
                stored.len(),
                expected.len()
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    assert_audits_clean(centers).await;
    claims.len() as u64
}

/// Compares what was acknowledged with the ledger of the center `master`: nothing is missing, nobody has more than one
/// order, and the sums are right. Returns all claims.
pub(crate) async fn compare_ledger(
    centers: &Centers,
    master: Which,
    sale: &str,
    bought: &[Bought],
) -> HashMap<OrderId, Claim> {
    let sale_id = SaleId::new(sale).unwrap();
    let mut ledger = centers.ledger(master).await;
    let (claims, row) = {
        let row = read::sale(&mut ledger, &sale_id).await.unwrap().expect("the sale is in the ledger");
        let (mut cursor, mut claims) = (0, HashMap::new());
        loop {
            let (next, found) = read::scan_claims(&mut ledger, &sale_id, cursor, 1000).await.unwrap();
            claims.extend(found.into_iter().map(|claim| (claim.order_id, claim)));
            cursor = next;
            if cursor == 0 {
                break (claims, row);
            }
        }
    };
    for bought in bought {
        let claim = claims.get(&bought.order_id.parse::<OrderId>().unwrap());
        assert!(claim.is_some_and(|claim| claim.uid.as_str() == bought.uid), "{bought:?} is lost");
    }
    let held: u64 =
        claims.values().filter(|claim| !claim.released).map(|claim| u64::from(claim.quantity.get())).sum();
    assert_eq!((row.claimed, row.remaining + row.claimed), (held, row.total), "{row:?}");
    let mut users: HashMap<&Uid, u64> = HashMap::new();
    for claim in claims.values() {
        *users.entry(&claim.uid).or_default() += 1;
    }
    assert!(users.values().all(|orders| *orders == 1), "somebody has two orders");
    claims
}

/// `seckill audit`, asked of either center, finds nothing. It is asked again while it is incomplete: a moment after an
/// epoch began the queues are still on their way there.
pub(crate) async fn assert_audits_clean(centers: &Centers) {
    for which in BOTH {
        eventually("the audit sees everything", async || {
            let (code, out, err) = centers.command(which, &["audit"]);
            assert!([0, 3].contains(&code), "{code}, asked of {}:\n{out}\n{err}", which.id());
            (code == 0).then_some(())
        })
        .await;
    }
}

/// All orders of a sale in an order database, with their users, in order.
pub(crate) async fn stored_orders(database: &str, sale: &str) -> Vec<(String, String)> {
    let statements = (0..TABLES).step_by(usize::from(COMPOUND_MAX)).map(|from| {
        let tables: Vec<String> = (from..TABLES.min(from + COMPOUND_MAX))
            .map(|table| format!("SELECT order_id, uid FROM orders_{table:03} WHERE sale_id = '{sale}'"))
            .collect();
        tables.join(" UNION ALL ")
    });
    let mut orders: Vec<(String, String)> = Vec::new();
    match database.strip_prefix("sqlite:") {
        Some(file) => {
            let mut conn = sqlx::sqlite::SqliteConnectOptions::new()
                .filename(file)
                .read_only(true)
                .busy_timeout(Duration::from_secs(20))
                .connect()
                .await
                .unwrap();
            for sql in statements {
                orders.extend(sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut conn).await.unwrap());
            }
        }
        None => {
            let mut conn = MySqlConnection::connect(database).await.unwrap();
            for sql in statements {
                orders.extend(sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut conn).await.unwrap());
            }
            conn.close().await.unwrap();
        }
    }
    orders.sort();
    orders
}
