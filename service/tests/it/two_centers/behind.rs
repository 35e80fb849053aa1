//! What production has behind two centers: a Kafka for each, MariaDB, an etcd. A Kafka that is away holds back the orders
//! of those who are at home in its center, and nobody else's.

use seckill_parts::{Kafka, Mariadb};
use serde_json::json;

use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::crowd::{Crowd, compare_books, stored_orders, user_of};
use crate::support::eventually;

/// Servers of a test's own.
pub(super) struct Behind {
    /// By center.
    kafka: [Kafka; 2],
    /// The URLs of the centers' databases in one MariaDB.
    databases: Vec<(Which, String)>,
    _mariadb: Mariadb,
    /// Dropped last.
    _dir: tempfile::TempDir,
}

impl Behind {
    pub(super) async fn start() -> Behind {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = BOTH.map(|which| dir.path().join(format!("kafka-{}", which.id())));
        let mariadb = dir.path().join("mariadb");
        let (a, b, mariadb) = tokio::join!(Kafka::start(&a), Kafka::start(&b), Mariadb::start(&mariadb));
        let mariadb = mariadb.unwrap();
        let mut databases = Vec::new();
        for which in BOTH {
            let name = format!("seckill_{}", which.id());
            databases.push((which, mariadb.create_database(&name).await.unwrap()));
        }
        Behind { kafka: [a.unwrap(), b.unwrap()], databases, _mariadb: mariadb, _dir: dir }
    }

    fn kafka(&self, which: Which) -> &Kafka {
        match which {
            Which::A => &self.kafka[0],
            Which::B => &self.kafka[1],
        }
    }

    /// Two centers in front of it.
    pub(super) fn options(&self) -> CentersOptions {
        let kafka = |which: Which| {
            let (own, other) = (self.kafka(which).bootstrap(), self.kafka(which.other()).bootstrap());
            let table = format!(
                "[kafka]\nbootstrap = \"{own}\"\nreplication_factor = 1\n\
                 [kafka.centers.{}]\nbootstrap = \"{other}\"\n",
                which.other().id()
            );
            (which, table)
        };
        CentersOptions {
            etcd: true,
            more: BOTH.map(kafka).into(),
            queue: Some("kafka"),
            databases: self.databases.clone(),
            ..CentersOptions::default()
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_center_without_its_kafka_waits_for_its_own_orders_and_nobody_else_does() {
    let behind = Behind::start().await;
    let centers = Centers::start(behind.options()).await;
    let [a, b] = BOTH.map(|which| centers.client(which));
    a.create_sale("phone", 1_000_000, json!({})).await;
    let crowd = Crowd::start(&centers, "phone", "u", 8, 1_000_000);
    crowd.until_more(200).await;

    let kafka = behind.kafka(Which::B);
    kafka.kill();
    let epoch = centers.epoch(Which::A).await;
    let mut orders = Vec::new();
    for which in BOTH {
        let uid = user_of(which, "meanwhile");
        let answer = centers.client(which).buy_until_known("phone", &uid, "k").await;
        assert_eq!(answer.status, 202, "{answer:?}");
        orders.push((answer.body["order_id"].as_str().unwrap().to_owned(), uid));
    }
    a.stored_order(&orders[0].1, &orders[0].0).await;
    crowd.until_more(200).await;
    // Again: those came after everything that was on its way when the broker died.
    let uid = user_of(Which::A, "later");
    let later = a.buy_until_known("phone", &uid, "k").await;
    a.stored_order(&uid, later.body["order_id"].as_str().unwrap()).await;
    assert_eq!(b.order_status(&orders[1].1, &orders[1].0).await, "queued");
    let stored = stored_orders(&centers.database(Which::B), "phone").await;
    assert!(!stored.contains(&orders[1]), "{:?} got there without Kafka", orders[1]);
    // Purchases are as safe as before: they need no Kafka.
    let topology = centers.topology(Which::A).await;
    assert_eq!((&topology["state"], &topology["epoch"]), (&json!("steady"), &json!(epoch)));
    // What waits is no error in the books.
    for which in BOTH {
        let (code, out, err) = centers.cli(which, &["audit"]);
        println!("meanwhile the audit ends with {code}, asked of {}", which.id());
        assert!([0, 3].contains(&code), "{code}:\n{out}\n{err}");
    }

    kafka.restart().await.unwrap();
    b.stored_order(&orders[1].1, &orders[1].0).await;
    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    let all = heard.bought.len() as u64 + 3;
    assert_eq!(compare_books(&centers, Which::A, "phone", &heard.bought).await, all);
    eventually("nobody waits for Kafka", async || {
        let ready = centers.ready(Which::A).await;
        ready["queue"]["waiting"].as_array().is_none_or(Vec::is_empty).then_some(())
    })
    .await;
}
