//! The audit against a real redis-server and a real order database, in order and after somebody tampered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use redis::aio::MultiplexedConnection;
use seckill::audit::{self, Report, Verdict};
use seckill::orders::{OrderCenters, OrderStore, Payment, PaymentId, PutBack, StoreBatch, StoreOptions};
use seckill_domain::{
    CenterId, CenterNumber, IdempotencyKey, OrderId, OrderRecord, OutboxId, Quantity, SaleId, SaleSpec, Uid,
};
use seckill_ledger::outbox::Event;
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{Fence, ReleaseEntry, ReserveEntry, ReserveOutcome, outbox};
use serde_json::json;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

/// A ledger and an order database, filled by hand.
struct Books {
    redis: RedisServer,
    conn: MultiplexedConnection,
    fence: Fence,
    store: OrderStore,
    sale: SaleId,
    dir: tempfile::TempDir,
}

impl Books {
    async fn open(quantity: u64) -> Books {
        let redis = RedisServer::start().await;
        let fence = redis.init_ledger().await;
        let mut conn = redis.connect().await;
        let dir = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", dir.path().join("orders.db").display());
        let store = OrderStore::open(&url, StoreOptions::new(CenterId::new("a").unwrap())).await.unwrap();
        let spec: SaleSpec = serde_json::from_value(json!({
            "sale_id": "phone", "kind": "product", "quantity": quantity, "price": 100, "currency": "CNY",
            "per_user_limit": 2,
        }))
        .unwrap();
        let spec = spec.validate(None).unwrap();
        seckill_ledger::create_sale(&mut conn, &fence, &spec, &[7; 16]).await.unwrap();
        Books { redis, conn, fence, store, sale: spec.sale_id, dir }
    }

    async fn buy(&mut self, uids: &[String]) -> Vec<OrderId> {
        buy(&mut self.conn, &self.fence, &self.sale, uids).await
    }

    async fn store_all(&mut self) {
        while store_some(&mut self.conn, &self.store).await {}
    }

    async fn release(&mut self, uid: &str, order_id: OrderId) {
        let entry = ReleaseEntry { order_id, uid: Uid::new(uid).unwrap() };
        seckill_ledger::release(&mut self.conn, &self.fence, &self.sale, &[entry]).await.unwrap();
    }

    async fn cancel(&self, uid: &str, order_id: OrderId) {
        self.store.cancel(&Uid::new(uid).unwrap(), order_id).await.unwrap();
    }

    async fn audit(&mut self) -> Report {
        audit::run(&OrderCenters::alone(self.store.clone()), &mut self.conn, None).await
    }

    /// What somebody with a database shell could do.
    async fn sql(&self, sql: &str) {
        let mut conn = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(self.dir.path().join("orders.db"))
            .connect()
            .await
            .unwrap();
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut conn).await.unwrap();
        conn.close().await.unwrap();
    }

    async fn redis(&mut self, command: &[&str]) {
        let mut cmd = redis::cmd(command[0]);
        for arg in &command[1..] {
            cmd.arg(arg);
        }
        cmd.exec_async(&mut self.conn).await.unwrap();
    }
}

async fn buy(
    conn: &mut MultiplexedConnection,
    fence: &Fence,
    sale: &SaleId,
    uids: &[String],
) -> Vec<OrderId> {
    let entries: Vec<ReserveEntry> = uids
        .iter()
        .map(|uid| ReserveEntry {
            uid: Uid::new(uid).unwrap(),
            key: *IdempotencyKey::new(&format!("{:016x}", rand::random::<u64>())).unwrap().digest(),
            quantity: Quantity::ONE,
            center: CenterNumber::new(1).unwrap(),
            traceparent: None,
        })
        .collect();
    let mut orders = Vec::new();
    for batch in entries.chunks(500) {
        let reply = seckill_ledger::reserve(conn, fence, 0, sale, batch).await.unwrap();
        orders.extend(reply.outcomes.into_iter().filter_map(|outcome| match outcome {
            ReserveOutcome::Accepted(order_id) => Some(order_id),
            _ => None,
        }));
    }
    orders
}

async fn store_some(conn: &mut MultiplexedConnection, store: &OrderStore) -> bool {
    let from = store.position(0).await.unwrap();
    let page = outbox::read(conn, from, 100).await.unwrap();
    let Some(last) = page.entries.last() else { return false };
    let to: OutboxId = last.id;
    let orders = page
        .entries
        .into_iter()
        .filter_map(|entry| match entry.event.unwrap() {
            Event::Orders(orders) => Some(orders),
            _ => None,
        })
        .flatten()
        .collect();
    store.store(StoreBatch::outbox(0, from, to, orders)).await.unwrap();
    true
}

fn uids(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|number| format!("user-{number}")).collect()
}

fn codes(report: &Report) -> Vec<&'static str> {
    let mut codes: Vec<&str> = report
        .sales
        .iter()
        .flat_map(|sale| &sale.violations)
        .chain(&report.violations)
        .map(|violation| violation.code)
        .collect();
    codes.sort_unstable();
    codes.dedup();
    codes
}

#[tokio::test]
async fn books_in_order_are_clean_at_every_stage() {
    let mut books = Books::open(100).await;
    let report = books.audit().await;
    assert_eq!(report.verdict, Verdict::Clean, "{report:?}");

    let orders = books.buy(&uids(0..60)).await;
    let report = books.audit().await;
    assert_eq!((report.verdict, report.sales[0].in_flight), (Verdict::Clean, 60), "{report:?}");

    books.store_all().await;
    books.cancel("user-3", orders[3]).await;
    let report = books.audit().await;
    assert_eq!(report.verdict, Verdict::Clean, "{report:?}");
    let sale = &report.sales[0];
    assert_eq!((sale.in_flight, sale.releases_in_flight), (0, 1));
    assert_eq!((sale.total, sale.remaining, sale.claimed, sale.released), (100, 40, 60, 0));
    assert_eq!((sale.orders.created, sale.orders.cancelled), (59, 1));

    books.release("user-3", orders[3]).await;
    books.store.releases_done(vec![orders[3]], Vec::new()).await.unwrap();
    let report = books.audit().await;
    assert_eq!(report.verdict, Verdict::Clean, "{report:?}");
    let sale = &report.sales[0];
    assert_eq!((sale.remaining, sale.claimed, sale.released), (41, 59, 1));

    let one =
        audit::run(&OrderCenters::alone(books.store.clone()), &mut books.conn, Some(&books.sale.clone()))
            .await;
    assert_eq!((one.verdict, one.sales.len()), (Verdict::Clean, 1));
}

#[tokio::test]
async fn a_missing_a_moved_and_a_changed_order_are_violations() {
    let mut books = Books::open(100).await;
    let orders = books.buy(&uids(0..10)).await;
    books.store_all().await;
    books.sql(&format!("DELETE FROM orders_{} WHERE order_id = '{}'", orders[0].table(), orders[0])).await;
    let report = books.audit().await;
    assert_eq!(report.verdict, Verdict::Violation);
    assert_eq!(codes(&report), ["claim_without_order"], "{report:?}");
    assert_eq!(report.sales[0].violations[0].order_id, Some(orders[0]));

    let table = orders[1].table();
    let other = (table.number() + 1) % 512;
    books
        .sql(&format!(
            "INSERT INTO orders_{other:03} SELECT * FROM orders_{table} WHERE order_id = '{}';
             DELETE FROM orders_{table} WHERE order_id = '{}'",
            orders[1], orders[1]
        ))
        .await;
    books
        .sql(&format!(
            "UPDATE orders_{} SET quantity = 2 WHERE order_id = '{}'",
            orders[2].table(),
            orders[2]
        ))
        .await;
    books
        .sql(&format!(
            "UPDATE orders_{} SET status = 'lost' WHERE order_id = '{}'",
            orders[3].table(),
            orders[3]
        ))
        .await;
    let report = books.audit().await;
    assert_eq!(
        codes(&report),
        ["claim_without_order", "order_differs", "order_unreadable", "wrong_table"],
        "{report:?}"
    );
}

#[tokio::test]
async fn an_order_that_was_lost_with_its_master_is_listed_and_one_that_is_paid_is_a_violation() {
    let mut books = Books::open(100).await;
    books.buy(&uids(0..3)).await;
    let page = outbox::read(&mut books.conn, OutboxId::ZERO, 100).await.unwrap();
    let known = page.entries.into_iter().find_map(|entry| match entry.event.unwrap() {
        Event::Orders(orders) => orders.into_iter().next(),
        _ => None,
    });
    let known = known.unwrap();
    books.store_all().await;
    // Accepted by a master that is gone: this ledger never heard of them.
    let [unpaid, paid] = ["unpaid", "paid"].map(|uid| {
        let uid = Uid::new(uid).unwrap();
        let head = OrderId::head_of(CenterNumber::new(1).unwrap(), uid.table(), 0, books.fence.epoch);
        let order_id = OrderId::from_parts(head, known.order_id.seq()).unwrap();
        OrderRecord { order_id, uid, ..known.clone() }
    });
    let lost = vec![unpaid.order_id, paid.order_id];
    let call = PutBack { records: vec![unpaid.clone(), paid.clone()], ..PutBack::default() };
    assert_eq!(books.store.put_back(call).await.unwrap().inserted, 2);
    let payment = Payment {
        order_id: paid.order_id,
        payment_id: PaymentId::new("p").unwrap(),
        amount: paid.amount(),
        coupon_id: None,
    };
    books.store.pay(payment).await.unwrap();
    let done = books.store.put_back(PutBack { lost, ..PutBack::default() }).await.unwrap();
    assert_eq!((done.cancelled, done.paid_without_claim), (1, vec![paid.order_id]));
    let report = books.audit().await;
    let sale = &report.sales[0];
    assert_eq!((sale.accepted_loss, &*sale.lost_orders), (1, &[unpaid.order_id][..]), "{report:?}");
    assert_eq!(codes(&report), ["order_without_claim"], "{report:?}");
    assert_eq!(sale.violations[0].order_id, Some(paid.order_id));
}

#[tokio::test]
async fn a_claim_and_an_order_that_disagree_about_a_release_are_violations() {
    let mut books = Books::open(100).await;
    let orders = books.buy(&uids(0..4)).await;
    books.store_all().await;
    // Given back although the order is open.
    books.release("user-0", orders[0]).await;
    assert_eq!(codes(&books.audit().await), ["released_but_open"]);
    // Closed, the release record is gone, but the units were never given back.
    books.cancel("user-1", orders[1]).await;
    books.store.releases_done(vec![orders[1]], Vec::new()).await.unwrap();
    assert_eq!(codes(&books.audit().await), ["closed_but_held", "released_but_open"]);
}

#[tokio::test]
async fn a_ledger_that_was_tampered_with_is_a_violation() {
    let mut books = Books::open(100).await;
    books.buy(&uids(0..4)).await;
    books.store_all().await;
    books.redis(&["HINCRBY", "sk:s:phone", "remaining", "1"]).await;
    assert_eq!(codes(&books.audit().await), ["total"]);
    books.redis(&["HINCRBY", "sk:s:phone", "remaining", "-1"]).await;
    books.redis(&["HINCRBY", "sk:s:phone", "claimed", "-1"]).await;
    books.redis(&["HINCRBY", "sk:s:phone", "remaining", "1"]).await;
    assert_eq!(codes(&books.audit().await), ["claimed_sum"]);
    books.redis(&["HDEL", "sk:c:phone", "user-2"]).await;
    let report = books.audit().await;
    assert!(codes(&report).contains(&"order_without_claim"), "{report:?}");
    books.redis(&["HSET", "sk:c:phone", "user-3", "nonsense"]).await;
    let report = books.audit().await;
    assert!(codes(&report).contains(&"claim_unreadable"), "{report:?}");
}

#[tokio::test]
async fn a_user_above_the_limit_is_a_violation() {
    let mut books = Books::open(100).await;
    books.buy(&uids(0..1)).await;
    books.buy(&uids(0..1)).await;
    books.store_all().await;
    assert_eq!(books.audit().await.verdict, Verdict::Clean);
    // A third purchase that the script would never have allowed: the limit was lifted for it by hand.
    books.redis(&["HSET", "sk:s:phone", "limit", "3"]).await;
    books.buy(&uids(0..1)).await;
    books.store_all().await;
    assert_eq!(codes(&books.audit().await), ["limit"]);
}

#[tokio::test]
async fn an_empty_ledger_under_stored_orders_is_a_violation() {
    let mut books = Books::open(100).await;
    books.buy(&uids(0..4)).await;
    books.store_all().await;
    books.redis(&["FLUSHALL"]).await;
    let report = books.audit().await;
    assert_eq!((report.verdict, codes(&report)), (Verdict::Violation, vec!["order_without_claim"]));
    assert!(!report.problems.is_empty());
}

#[tokio::test]
async fn a_ledger_that_does_not_answer_makes_the_audit_incomplete() {
    let mut books = Books::open(100).await;
    books.redis.kill();
    let report = books.audit().await;
    assert_eq!(report.verdict, Verdict::Incomplete, "{report:?}");
    assert!(report.problems[0].contains("ledger"), "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn audits_beside_the_load_raise_no_false_alarm() {
    let mut books = Books::open(1_000_000).await;
    let done = Arc::new(AtomicBool::new(false));
    let mut tasks = tokio::task::JoinSet::new();
    {
        let (mut conn, fence, sale) = (books.redis.connect().await, books.fence.clone(), books.sale.clone());
        let done = Arc::clone(&done);
        tasks.spawn(async move {
            let mut next = 0;
            while !done.load(Ordering::SeqCst) {
                buy(&mut conn, &fence, &sale, &uids(next..next + 50)).await;
                next += 50;
            }
        });
    }
    {
        let (mut conn, store, done) = (books.redis.connect().await, books.store.clone(), Arc::clone(&done));
        tasks.spawn(async move {
            while !done.load(Ordering::SeqCst) {
                store_some(&mut conn, &store).await;
            }
        });
    }
    {
        // Cancels what is stored, then gives it back, one by one.
        let (mut conn, store, fence) =
            (books.redis.connect().await, books.store.clone(), books.fence.clone());
        let (sale, done) = (books.sale.clone(), Arc::clone(&done));
        tasks.spawn(async move {
            let mut cursor = None;
            while !done.load(Ordering::SeqCst) {
                let page = store.orders_of_sale(&sale, 20, cursor).await.unwrap();
                cursor = page.next;
                for order in page.items.into_iter().step_by(3) {
                    store.cancel(&order.uid, order.order.order_id).await.unwrap();
                }
                for release in store.pending_releases(100, &[]).await.unwrap() {
                    let entry = ReleaseEntry { order_id: release.order_id, uid: release.uid };
                    seckill_ledger::release(&mut conn, &fence, &sale, &[entry]).await.unwrap();
                    store.releases_done(vec![release.order_id], Vec::new()).await.unwrap();
                }
            }
        });
    }
    let mut seen = 0;
    for _ in 0..6 {
        let report = books.audit().await;
        assert_eq!(report.verdict, Verdict::Clean, "{report:#?}");
        seen = report.sales[0].orders.cancelled;
    }
    done.store(true, Ordering::SeqCst);
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    assert!(seen > 0, "the load did not cancel anything");
    books.store_all().await;
    let report = books.audit().await;
    assert_eq!((report.verdict, report.sales[0].in_flight), (Verdict::Clean, 0));
}
