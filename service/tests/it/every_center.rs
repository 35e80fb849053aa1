//! What is about the orders of all centers: the audit, trimming, archiving, the back office.

use std::time::Duration;

use http::Method;
use seckill::archive::{self, archive};
use seckill::audit::{self, Report, Verdict};
use seckill::cross_center::CallError;
use seckill::inventory::SaleError;
use seckill::orders::{self, OrderCenters, PutBack, PutBackDone, StoreBatch, Untold};
use seckill_domain::{OrderId, OrderRecord, OutboxId, Shard, Uid};
use seckill_ledger::StateChange;
use seckill_ledger::outbox::{self, Event};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use crate::client::Client;
use crate::pair::{Pair, Wire, center};
use crate::support::eventually;
use crate::up::Up;

/// What somebody with a database shell could do.
async fn sql(file: &std::path::Path, sql: String) {
    let mut conn = sqlx::sqlite::SqliteConnectOptions::new().filename(file).connect().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut conn).await.unwrap();
    conn.close().await.unwrap();
}

impl Pair {
    fn centers(&self) -> OrderCenters {
        self.a.centers.clone()
    }

    async fn audit(&self) -> Report {
        let mut conn = self.redis.connect().await;
        audit::run(&self.centers(), &mut conn, None).await
    }

    async fn last_entry(&self) -> OutboxId {
        let mut conn = self.redis.connect().await;
        outbox::read(&mut conn, OutboxId::ZERO, 1000).await.unwrap().entries.last().unwrap().id
    }

    /// b stores the outbox up to an entry. By itself it does not: its Redis here is the master's.
    async fn store_at_b(&self, to: OutboxId) {
        let from = self.b.orders.position(0).await.unwrap();
        let mut conn = self.redis.connect().await;
        let page = outbox::read(&mut conn, from, 1000).await.unwrap();
        let orders =
            page.entries.into_iter().filter(|entry| entry.id <= to).filter_map(|entry| match entry.event {
                Ok(Event::Orders(orders)) => Some(orders),
                _ => None,
            });
        let batch = StoreBatch::outbox(0, from, to, orders.flatten().collect());
        self.b.orders.store(batch).await.unwrap();
    }

    /// Users of center b.
    fn at_home_in_b(&self) -> impl Iterator<Item = String> + '_ {
        let topology = self.b.topology.current();
        (0..)
            .map(|n| format!("u{n}"))
            .filter(move |uid| topology.home_center(Uid::new(uid).unwrap().table().shard()).as_str() == "b")
    }
}

fn codes(report: &Report) -> Vec<&'static str> {
    let mut codes: Vec<&str> =
        report.sales.iter().flat_map(|sale| &sale.violations).map(|violation| violation.code).collect();
    codes.sort_unstable();
    codes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_holds_the_ledger_against_the_orders_of_each_home_center() {
    let pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    for n in 0..30 {
        pair.a.buy(&sale, &format!("u{n}"), "k").await.unwrap();
    }
    eventually("a has its own", async || {
        (pair.a.orders.position(0).await.unwrap() == pair.last_entry().await).then_some(())
    })
    .await;
    let report = pair.audit().await;
    assert_eq!(report.verdict, Verdict::Clean, "{report:?}");
    let in_flight = report.sales[0].in_flight;
    assert!(in_flight > 0 && report.sales[0].orders.created == 30 - in_flight, "{report:?}");

    // Once b has stored them, they may leave the outbox.
    let mut conn = pair.redis.connect().await;
    let page = outbox::read(&mut conn, OutboxId::ZERO, 1000).await.unwrap();
    let accepted: Vec<OrderRecord> = page
        .entries
        .into_iter()
        .filter_map(|entry| match entry.event {
            Ok(Event::Orders(orders)) => Some(orders),
            _ => None,
        })
        .flatten()
        .collect();
    pair.store_at_b(pair.last_entry().await).await;
    let report = pair.audit().await;
    assert_eq!((report.verdict, report.sales[0].orders.created), (Verdict::Clean, 30), "{report:?}");

    // An order in the other center's database, too; one of b's that is gone; one that is nobody's.
    let victims: Vec<String> = pair.at_home_in_b().take(2).collect();
    let mut ids: Vec<OrderId> = Vec::new();
    for uid in &victims {
        ids.push(pair.a.buy(&sale, uid, "k").await.unwrap().0.parse().unwrap());
    }
    let (a, b) = (pair.dir.path().join("a.db"), pair.dir.path().join("b.db"));
    let (copied, lost) = (ids[0], ids[1]);
    let attach = format!("ATTACH '{}' AS b;", b.display());
    let (t, id) = (copied.table(), copied);
    let copy =
        format!("{attach} INSERT INTO main.orders_{t} SELECT * FROM b.orders_{t} WHERE order_id = '{id}'");
    sql(&a, copy).await;
    sql(&b, format!("DELETE FROM orders_{} WHERE order_id = '{lost}'", lost.table())).await;
    let report = pair.audit().await;
    assert_eq!(codes(&report), ["claim_without_order", "wrong_center"], "{report:?}");
    assert!(
        report.sales[0].violations.iter().any(|violation| violation.detail.contains("belongs to center b"))
    );
    sql(&a, format!("DELETE FROM orders_{t} WHERE order_id = '{id}'")).await;

    // The one that is gone is put back where it is at home, over the wire; a center that is not its home refuses it.
    let record = accepted.into_iter().find(|order| order.order_id == lost).unwrap();
    let call = PutBack { held: vec![lost], records: vec![record], ..PutBack::default() };
    let wrong = pair.a.centers.put_back(None, call.clone()).await;
    assert!(matches!(wrong, Err(Untold::Own(orders::Error::NotOwner(_)))), "{wrong:?}");
    let wrong = pair.b.centers.put_back(Some(&center("a")), call.clone()).await;
    assert!(matches!(wrong, Err(Untold::Other { error: CallError::NotExecuted(_), .. })), "{wrong:?}");
    let done = pair.a.centers.put_back(Some(&center("b")), call).await.unwrap();
    assert_eq!(done, PutBackDone { inserted: 1, ..PutBackDone::default() });
    let report = pair.audit().await;
    assert_eq!(report.verdict, Verdict::Clean, "{report:?}");

    // Without b, what is at home there is not judged, and the report says so; a's own is.
    pair.b.serving.cancel();
    let report = pair.audit().await;
    assert_eq!((report.verdict, codes(&report)), (Verdict::Incomplete, vec![]), "{report:?}");
    assert!(report.problems.iter().any(|problem| problem.contains("center b")), "{report:?}");
    let topology = pair.a.topology.current();
    let uid = (0..30)
        .map(|n| format!("u{n}"))
        .find(|uid| topology.home_center(Uid::new(uid).unwrap().table().shard()).as_str() == "a");
    let order: OrderId = pair.a.buy(&sale, &uid.unwrap(), "k").await.unwrap().0.parse().unwrap();
    sql(&a, format!("DELETE FROM orders_{} WHERE order_id = '{order}'", order.table())).await;
    let report = pair.audit().await;
    assert_eq!(
        (report.verdict, codes(&report)),
        (Verdict::Violation, vec!["claim_without_order"]),
        "{report:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_outbox_keeps_what_another_center_has_not_stored() {
    let mut pair = Pair::open().await;
    let mut conn = pair.redis.connect().await;
    // Entries go in whole nodes of the stream: one each.
    let mut config = redis::cmd("CONFIG");
    config.arg("SET").arg("stream-node-max-entries").arg(1).exec_async(&mut conn).await.unwrap();
    let sale = pair.sale("s", 100).await;
    for n in 0..3 {
        pair.a.buy(&sale, &format!("u{n}"), "k").await.unwrap();
    }
    let half = pair.last_entry().await;
    for n in 3..6 {
        pair.a.buy(&sale, &format!("u{n}"), "k").await.unwrap();
    }
    let all = pair.last_entry().await;
    eventually("a has stored all", async || (pair.a.orders.position(0).await.unwrap() == all).then_some(()))
        .await;
    let mut first = async || outbox::first_id(&mut conn).await.unwrap().unwrap();
    let beginning = first().await;

    assert!(beginning < half);
    // b has half of it: the last entry that it has is the first that stays.
    pair.store_at_b(half).await;
    eventually("what both have is gone", async || {
        let first = first().await;
        assert!(first <= half, "what b has not stored is gone");
        (first == half).then_some(())
    })
    .await;
    // b has everything, and does not answer.
    pair.b.serving.cancel();
    pair.store_at_b(all).await;
    let failures = pair.a.orders.metrics().retries.get();
    eventually("trim asked in vain", async || {
        assert_eq!(first().await, half, "what b may not have stored is gone");
        (pair.a.orders.metrics().retries.get() > failures + 1).then_some(())
    })
    .await;
    assert_eq!(first().await, half);
    let listener = crate::pair::bind(Some(pair.b_at)).await;
    pair.b.listen(listener, "b-second", crate::pair::ring("b")).await;
    eventually("b answers again", async || (first().await == all).then_some(())).await;
}

/// With Kafka a center has a position only in the shards that are at home there. One without any has none, and keeps
/// nothing: neither for ever, because it waits for itself, nor too little, because it does not wait for the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_without_shards_trims_up_to_what_the_home_center_has_stored() {
    let pair = Pair::open_over(Wire { all_in_b: true, kafka: true, ..Wire::default() }).await;
    let mut conn = pair.redis.connect().await;
    let mut config = redis::cmd("CONFIG");
    config.arg("SET").arg("stream-node-max-entries").arg(1).exec_async(&mut conn).await.unwrap();
    let sale = pair.sale("s", 100).await;
    for n in 0..3 {
        pair.a.buy(&sale, &format!("u{n}"), "k").await.unwrap();
    }
    let half = pair.last_entry().await;
    for n in 3..6 {
        pair.a.buy(&sale, &format!("u{n}"), "k").await.unwrap();
    }
    let all = pair.last_entry().await;
    let mut first = async || outbox::first_id(&mut conn).await.unwrap().unwrap();
    assert_eq!(pair.a.orders.position(0).await.unwrap(), OutboxId::ZERO);
    assert!(first().await < half);
    pair.store_at_b(half).await;
    eventually("what b has is gone", async || {
        let first = first().await;
        assert!(first <= half, "what b has not stored is gone");
        (first == half).then_some(())
    })
    .await;
    // Some rounds later what it has not is still there.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(first().await, half);
    pair.store_at_b(all).await;
    eventually("b has all", async || (first().await == all).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sale_is_archived_when_every_center_is_done_with_it() {
    let mut pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    let uid = pair.at_home_in_b().next().unwrap();
    let order: OrderId = pair.a.buy(&sale, &uid, "k").await.unwrap().0.parse().unwrap();
    pair.a.inventory.set_state(&sale, StateChange::End).await.unwrap();
    let tried = async |pair: &Pair| match archive(&pair.a.inventory, &pair.centers(), &sale).await {
        Err(archive::Error::Sale(SaleError::NotFinal(what))) => what,
        other => format!("{other:?}"),
    };
    assert_eq!(tried(&pair).await, "in center b accepted orders are not stored yet");
    pair.store_at_b(pair.last_entry().await).await;
    assert_eq!(tried(&pair).await, "in center b 1 orders are neither paid nor closed");
    pair.b.serving.cancel();
    let silent = archive(&pair.a.inventory, &pair.centers(), &sale).await;
    assert!(
        matches!(&silent, Err(archive::Error::Orders(Untold::Other { center, .. })) if center.as_str() == "b"),
        "{silent:?}"
    );
    let listener = crate::pair::bind(Some(pair.b_at)).await;
    pair.b.listen(listener, "b-second", crate::pair::ring("b")).await;
    // a does not answer: the release waits in b.
    pair.a.serving.cancel();
    pair.b.orders.cancel(&Uid::new(&uid).unwrap(), order).await.unwrap();
    assert_eq!(tried(&pair).await, "in center b the stock of 1 orders is on its way back");
    pair.restart_a("a-second", crate::pair::ring("a")).await;
    eventually("b's release is done", async || {
        (pair.b.orders.pending_release_count().await.unwrap() == 0).then_some(())
    })
    .await;
    pair.store_at_b(pair.last_entry().await).await;
    archive(&pair.a.inventory, &pair.centers(), &sale).await.unwrap();
    let archived = pair.a.inventory.sale(&sale).await.unwrap().unwrap();
    assert_eq!((archived.remaining, archived.released), (100, 1));
}

/// Users at home in a center: shards 0–31 are a's.
fn users_of(center: &str) -> impl Iterator<Item = String> {
    let lower = center == "a";
    (0..).map(|n| format!("buyer-{n}")).filter(move |uid| {
        let shard: Shard = Uid::new(uid).unwrap().table().shard();
        (shard.number() < 32) == lower
    })
}

async fn stored_in(up: &Up, center: &str) -> i64 {
    let file = up.dir().join(center).join("orders.db");
    let mut conn = sqlx::sqlite::SqliteConnectOptions::new().filename(file).connect().await.unwrap();
    let mut count = 0;
    for table in 0..512 {
        let one = AssertSqlSafe(format!("SELECT COUNT(*) FROM orders_{table:03}"));
        count += sqlx::query_scalar::<_, i64>(one).fetch_one(&mut conn).await.unwrap();
    }
    count
}

fn admin_of(up: &Up, number: u16) -> String {
    format!("http://127.0.0.1:{}", up.redis_port() - 2 + (number - 1) * 10)
}

/// `seckill audit` asked of a center: exit code and report.
fn audit_at(up: &Up, number: u16) -> (i32, Value) {
    let (code, out, err) = up.cli(&["audit", "--admin", &admin_of(up, number), "-o", "json"]);
    (code, serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}\n{err}\n{}", up.log())))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_spans_both_centers_and_any_of_them_may_be_asked() {
    let mut up = Up::start_centers("a,b");
    let (a, b) = (up.client(), up.client_of(2));
    a.create_sale("phone", 100, json!({})).await;
    let buyers: Vec<String> = users_of("a").take(6).chain(users_of("b").take(9)).collect();
    let mut orders = Vec::new();
    for (n, uid) in buyers.iter().enumerate() {
        let through: &Client = if n % 2 == 0 { &a } else { &b };
        let bought = through.buy_until_known("phone", uid, "k").await;
        assert_eq!(bought.status, 202, "{bought:?}");
        let id = bought.body["order_id"].as_str().unwrap().to_owned();
        a.stored_order(uid, &id).await;
        orders.push(id);
    }
    // Bought here or there: each is in its home center's database and in no other.
    assert_eq!((stored_in(&up, "a").await, stored_in(&up, "b").await), (6, 9));
    for number in [1, 2] {
        let (code, report) = audit_at(&up, number);
        assert_eq!(code, 0, "{report:#}\n{}", up.log());
        let sale = &report["sales"][0];
        assert_eq!((&sale["claimed"], &sale["orders"]["created"]), (&json!(15), &json!(15)), "{report:#}");
        let (code, text, err) = up.cli(&["audit", "--sale", "phone", "--admin", &admin_of(&up, number)]);
        assert_eq!(code, 0, "{text}{err}");
        assert!(text.contains("clean: 1 sales agree"), "{text}");
    }

    // One unit of one of b's orders, changed by hand.
    let order: OrderId = orders[8].parse().unwrap();
    let file = up.dir().join("b").join("orders.db");
    let set = |quantity: u32| {
        format!("UPDATE orders_{} SET quantity = {quantity} WHERE order_id = '{order}'", order.table())
    };
    sql(&file, set(2)).await;
    for number in [1, 2] {
        let (code, report) = audit_at(&up, number);
        assert_eq!((code, &report["sales"][0]["violations"][0]["code"]), (2, &json!("order_differs")));
    }
    sql(&file, set(1)).await;

    // Without b nobody knows the rest.
    assert_eq!(up.terminate(), Some(0), "{}", up.log());
    up.centers("a");
    up.restart();
    let (code, report) = audit_at(&up, 1);
    assert_eq!(code, 3, "{report:#}");
    assert!(report["problems"][0].as_str().unwrap().contains("center b"), "{report:#}");
    assert_eq!(report["sales"][0]["orders"]["created"], 6);
    assert_eq!(report["sales"][0]["violation_count"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_back_office_asks_of_the_other_center_happens_once_and_shows_in_both() {
    let dir = tempfile::tempdir().unwrap();
    let mut up = Up::at(dir.path(), crate::up::free_base_port());
    up.centers("a,b");
    up.spawn(&[("SECKILL__SALES__RETRY_WINDOW_S", "0")]);
    up.wait_ready();
    let (a, b) = (up.client(), up.client_of(2));
    // The epoch grows when b's Redis is in sync: calls of the older one would be refused.
    eventually("b is in sync", async || {
        let topology = b.admin(Method::GET, "/admin/v1/topology", &[], None).await.body;
        (topology["state"] == "steady" && topology["in_sync"][0]["center"] == "b").then_some(())
    })
    .await;
    let sale = json!({
        "sale_id": "phone", "kind": "product", "title": "old", "quantity": 10, "price": 1999, "currency": "CNY",
    });
    let created = b.admin(Method::POST, "/admin/v1/sales", &[], Some(sale.clone())).await;
    assert_eq!(created.status, 201, "{created:?}");
    assert_eq!(created.headers["seckill-home"], "a");
    assert_eq!(b.admin(Method::POST, "/admin/v1/sales", &[], Some(sale)).await.status, 200);
    let at_master = async || a.admin(Method::GET, "/admin/v1/sales/phone", &[], None).await;
    let version = at_master().await.body["version"].as_u64().unwrap();
    let shown = async |what: &str, pointer: &str, value: Value| {
        for client in [&a, &b] {
            eventually(what, async || {
                let sale = client.get("/v1/sales/phone").await;
                (sale.body.pointer(pointer) == Some(&value)).then_some(())
            })
            .await;
        }
    };
    shown("the sale", "/remaining", json!(10)).await;

    let path = "/admin/v1/sales/phone";
    let tag = format!("\"{version}\"");
    let patched = b.admin(Method::PATCH, path, &[("if-match", &tag)], Some(json!({"title": "new"}))).await;
    assert_eq!((patched.status, patched.body["version"].as_u64()), (200, Some(version + 1)), "{patched:?}");
    let again = b.admin(Method::PATCH, path, &[("if-match", &tag)], Some(json!({"title": "newer"}))).await;
    assert_eq!((again.status, again.code()), (412, "version_mismatch"));
    shown("the title", "/title", json!("new")).await;

    let stock = format!("{path}/stock");
    for replayed in [None, Some("true")] {
        let added =
            b.admin(Method::POST, &stock, &[("idempotency-key", "more")], Some(json!({"delta": 5}))).await;
        assert_eq!((added.status, &added.body["total"]), (200, &json!(15)), "{added:?}");
        let header = added.headers.get("idempotent-replayed").map(|value| value.to_str().unwrap());
        assert_eq!(header, replayed);
    }
    shown("the stock", "/remaining", json!(15)).await;

    let post = async |what: &str| b.admin(Method::POST, &format!("{path}/{what}"), &[], None).await;
    assert_eq!(post("pause").await.status, 200);
    shown("the pause", "/state", json!("paused")).await;
    assert_eq!(a.buy_until_known("phone", "somebody", "k").await.code(), "paused");
    assert_eq!(post("resume").await.status, 200);
    shown("the resumption", "/state", json!("on_sale")).await;

    // A buyer of b buys in a, and gives it back in a: b's order, a's stock.
    let uid = users_of("b").next().unwrap();
    let bought = a.buy_until_known("phone", &uid, "k").await;
    let order = bought.body["order_id"].as_str().unwrap().to_owned();
    a.stored_order(&uid, &order).await;
    shown("a sold unit", "/remaining", json!(14)).await;
    let cancelled = a.user(Method::POST, &format!("/v1/orders/{order}/cancel"), &uid, None).await;
    assert_eq!((cancelled.status, &cancelled.headers["seckill-home"]), (200, &"b".parse().unwrap()));
    shown("the unit given back", "/remaining", json!(15)).await;
    let master = at_master().await.body;
    assert_eq!(
        (&master["released"], &master["claimed"], &master["total"]),
        (&json!(1), &json!(0), &json!(15))
    );

    let limits = json!({"per_user": {"per_second": 77, "burst": 99}});
    let set = b.admin(Method::PUT, "/admin/v1/limits", &[], Some(limits.clone())).await;
    assert_eq!(set.status, 200, "{set:?}");
    for client in [&a, &b] {
        eventually("the limits", async || {
            let topology = client.admin(Method::GET, "/admin/v1/topology", &[], None).await;
            (topology.body["limits"]["per_user"] == limits["per_user"]).then_some(())
        })
        .await;
    }

    assert_eq!(post("end").await.status, 200);
    shown("the end", "/state", json!("ended")).await;
    let archived = post("archive").await;
    assert_eq!(archived.status, 200, "{archived:?}");
    assert_eq!((&archived.body["archived"], &archived.body["total"]), (&json!(true), &json!(15)));
    assert_eq!(at_master().await.body["archived"], true);
    let (code, report) = audit_at(&up, 2);
    assert_eq!(code, 0, "{report:#}");
}
