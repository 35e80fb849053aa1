//! What only a server can do to the store: answers that never come, connections that end, locks, restarts.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use seckill_domain::{Money, OrderStatus};
use seckill_parts::Mariadb;
use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection, MySqlPool};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;
use crate::orders::{CancelOutcome, Error, PayOutcome};

/// What happens to a commit on the line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// The server never sees it.
    Before,
    /// The server did it, and its answer is lost.
    After,
}

/// A line to the server that ends when a commit passes, `cuts` times.
struct Line {
    address: SocketAddr,
    cuts: Arc<AtomicU32>,
    task: JoinHandle<()>,
}

impl Line {
    async fn to(url: &str, cut: Cut) -> Line {
        let server = host_of(url).to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cuts = Arc::new(AtomicU32::new(0));
        let left = Arc::clone(&cuts);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(server.as_str()).await.unwrap();
                tokio::spawn(carry(client, server, cut, Arc::clone(&left)));
            }
        });
        Line { address, cuts, task }
    }

    /// The URL, by this line.
    fn url(&self, url: &str) -> String {
        url.replace(host_of(url), &self.address.to_string())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// `HOST:PORT` of a database's URL.
fn host_of(url: &str) -> &str {
    url.rsplit('@').next().unwrap().split('/').next().unwrap()
}

async fn carry(mut client: TcpStream, mut server: TcpStream, cut: Cut, left: Arc<AtomicU32>) {
    let (mut up, mut down) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(length @ 1..) = read else { return };
                let is_commit = up[..length].ends_with(b"\x03COMMIT");
                let due = |left: u32| left.checked_sub(1);
                if is_commit && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, due).is_ok() {
                    if cut == Cut::After {
                        server.write_all(&up[..length]).await.unwrap();
                        // The answer came, so it is done.
                        assert!(server.read(&mut down).await.unwrap() > 0);
                    }
                    return;
                }
                if server.write_all(&up[..length]).await.is_err() { return }
            }
            read = server.read(&mut down) => {
                let Ok(length @ 1..) = read else { return };
                if client.write_all(&down[..length]).await.is_err() { return }
            }
        }
    }
}

#[tokio::test]
async fn a_lost_commit_is_looked_up_not_guessed() {
    for cut in [Cut::Before, Cut::After] {
        let place = Place::new(Kind::MySql).await;
        let line = Line::to(place.url(), cut).await;
        let clock = Arc::new(ManualClock::new(START));
        let store = open(&line.url(place.url()), &clock, "a").await.unwrap();
        let mut orders = Vec::new();
        for seq in 1..=4 {
            let record = order(&format!("u{seq}"), seq, &product(100, 900));
            line.cuts.store(1, Ordering::SeqCst);
            let batch = StoreBatch::outbox(0, at(seq - 1), at(seq), vec![record.clone()]);
            // Told as what it is: neither an error nor a duplicate.
            let outcome = store.store(batch).await.unwrap();
            assert_eq!(outcome, StoreOutcome { stored: 1, duplicates: 0, foreign: 0 }, "{cut:?}");
            assert_eq!(line.cuts.load(Ordering::SeqCst), 0);
            orders.push(record);
        }
        for (record, id) in orders.iter().zip(["p1", "p2", "p3", "p4"]) {
            line.cuts.store(1, Ordering::SeqCst);
            let paid = store.pay(payment(record, id, 100)).await.unwrap();
            assert!(matches!(paid, PayOutcome::Paid(_)), "{cut:?} {paid:?}");
        }
        let counts = store.counts(None).await.unwrap().sales[&sale("s")].clone();
        assert_eq!((counts.of(OrderStatus::Paid).orders, counts.of(OrderStatus::Created).orders), (4, 0));
        assert_eq!(store.position(0).await.unwrap(), at(4));
        store.close().await;
    }
}

#[tokio::test]
async fn connections_that_are_killed_lose_and_double_nothing() {
    let fixture = Fixture::on(Kind::MySql).await;
    let database = fixture.place.url().rsplit('/').next().unwrap().to_owned();
    let admin = seckill_parts::shared::mariadb().await.unwrap();
    let killer = tokio::spawn(async move {
        let pool = MySqlPool::connect(admin.url()).await.unwrap();
        loop {
            let ids: Vec<i64> = sqlx::query_scalar(AssertSqlSafe(format!(
                "SELECT id FROM information_schema.processlist WHERE db = '{database}'"
            )))
            .fetch_all(&pool)
            .await
            .unwrap();
            for id in ids {
                // It may be gone by itself.
                let _ = sqlx::raw_sql(AssertSqlSafe(format!("KILL CONNECTION {id}"))).execute(&pool).await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let mut seq = 0;
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while seq < 60 {
        assert!(std::time::Instant::now() < deadline, "only {seq} batches");
        let record = order(&format!("u{seq}"), seq + 1, &product(100, 900));
        match fixture.store.store(StoreBatch::outbox(0, at(seq), at(seq + 1), vec![record])).await {
            Ok(outcome) => {
                assert_eq!(outcome.stored, 1);
                seq += 1;
            }
            Err(error) => assert!(matches!(error, Error::Unavailable(_)), "{error}"),
        }
    }
    killer.abort();
    let _ = killer.await;
    eventually(async || fixture.store.position(0).await.is_ok()).await;
    let counts = fixture.store.counts(None).await.unwrap();
    assert_eq!(counts.sales[&sale("s")].of(OrderStatus::Created).orders, 60);
    assert_eq!(counts.positions, [(0, at(60))]);
}

#[tokio::test]
async fn a_deadlock_is_tried_again() {
    let mut fixture = Fixture::on(Kind::MySql).await;
    let orders = [1, 2].map(|seq| order(&format!("u{seq}"), seq, &product(100, 900)));
    fixture.put(&orders).await;
    let mut rival = MySqlConnection::connect(fixture.place.url()).await.unwrap();
    let lock = |record: &OrderRecord| {
        let (table, id) = (record.order_id.table(), record.order_id);
        AssertSqlSafe(format!("UPDATE orders_{table} SET reason = 'rival' WHERE order_id = '{id}'"))
    };
    sqlx::raw_sql("START TRANSACTION").execute(&mut rival).await.unwrap();
    // The heavier of the two is spared, so the store is the victim.
    for seq in 1000..1100 {
        let sql = format!("INSERT INTO outbox_trim VALUES ('z', 9, {seq}, 'x')");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut rival).await.unwrap();
    }
    sqlx::raw_sql(lock(&orders[1])).execute(&mut rival).await.unwrap();
    let store = fixture.store.clone();
    let ids: Vec<OrderId> = orders.iter().map(|record| record.order_id).collect();
    let both = tokio::spawn(async move { store.cancel_lost(ids, "lost").await });
    // The store holds the first and waits for the second.
    let admin = MySqlPool::connect(seckill_parts::shared::mariadb().await.unwrap().url()).await.unwrap();
    // Other tests wait for locks on the same server.
    let database = fixture.place.url().rsplit('/').next().unwrap().to_owned();
    eventually(async || {
        // InnoDB shows this table from a copy that it renews only when nobody has read it for 100 ms.
        tokio::time::sleep(Duration::from_millis(150)).await;
        let waiting: i64 = sqlx::query_scalar(
            "SELECT COUNT(*) FROM information_schema.innodb_trx
             JOIN information_schema.processlist ON id = trx_mysql_thread_id
             WHERE trx_state = 'LOCK WAIT' AND db = ?",
        )
        .bind(&database)
        .fetch_one(&admin)
        .await
        .unwrap();
        waiting > 0
    })
    .await;
    sqlx::raw_sql(lock(&orders[0])).execute(&mut rival).await.unwrap();
    sqlx::raw_sql("COMMIT").execute(&mut rival).await.unwrap();
    assert_eq!(both.await.unwrap().unwrap().len(), 2);
    for record in &orders {
        let row = fixture.store.admin_order(record.order_id).await.unwrap().unwrap();
        assert_eq!((row.order.status, row.reason.as_deref()), (OrderStatus::Cancelled, Some("lost")));
    }
    admin.close().await;
}

#[tokio::test]
async fn a_server_that_stops_and_returns_is_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let server = Mariadb::start(folder.path()).await.unwrap();
    let url = server.create_database("orders").await.unwrap();
    let clock = Arc::new(ManualClock::new(START));
    let store = open(&url, &clock, "a").await.unwrap();
    let records: Vec<_> = (1..=2).map(|seq| order(&format!("u{seq}"), seq, &product(100, 900))).collect();
    let put = |seq: u64| StoreBatch::outbox(0, at(seq - 1), at(seq), vec![records[seq as usize - 1].clone()]);
    store.store(put(1)).await.unwrap();
    server.kill();
    let refused = store.store(put(2)).await;
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
    let unpaid = store.pay(payment(&records[0], "p", 100)).await;
    assert!(matches!(unpaid, Err(Error::Unavailable(_))), "{unpaid:?}");
    assert!(matches!(store.order(records[0].order_id).await, Err(Error::Unavailable(_))));
    server.restart().await.unwrap();
    assert_eq!(store.store(put(2)).await.unwrap().stored, 1);
    assert!(matches!(store.pay(payment(&records[0], "p", 100)).await.unwrap(), PayOutcome::Paid(_)));
    let cancelled = store.cancel(&records[1].uid, records[1].order_id).await.unwrap();
    assert!(matches!(cancelled, CancelOutcome::Cancelled(_)));
    assert_eq!(store.position(0).await.unwrap(), at(2));
    store.close().await;
}

#[tokio::test]
async fn a_buyer_whose_id_is_full_of_quotes_is_a_buyer_like_any_other() {
    let mut fixture = Fixture::on(Kind::MySql).await;
    let uids = [r"a'b", r#"a"b"#, r"a\", r"a\'--", r"'),('1", "%_", "`", "?", "$1", "/*!x*/"];
    let orders: Vec<_> = (1..).zip(uids).map(|(seq, uid)| order(uid, seq, &coupon(0))).collect();
    assert_eq!(fixture.put(&orders).await.stored, uids.len() as u64);
    for record in &orders {
        let own = fixture.store.orders_of(&record.uid, 10, None).await.unwrap().items;
        assert_eq!(own.iter().map(|order| order.order_id).collect::<Vec<_>>(), [record.order_id]);
        assert_eq!(own[0].amount, Money::ZERO);
        assert_eq!(fixture.store.coupons_of(&record.uid, 10, None).await.unwrap().items.len(), 1);
    }
}
