//! What production has behind two centers: a Kafka for each, MariaDB, an etcd. A Kafka that is away holds back the orders
//! of those who are at home in its center, and nobody else's.

use std::path::Path;
use std::sync::Arc;

use seckill_parts::{Kafka, KafkaOptions, Link, Mariadb, folder_in_memory};
use serde_json::{Value, json};

use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::crowd::{Crowd, compare_books, stored_orders, user_of};
use crate::support::eventually;

/// A Kafka for each center. What one publishes to the other's goes over a line between them.
pub(super) struct Kafkas {
    /// By center.
    brokers: [Kafka; 2],
    /// By center: how the other one reaches its broker.
    lines: [Arc<Link>; 2],
}

impl Kafkas {
    pub(super) async fn start(dir: &Path) -> Kafkas {
        let nowhere = ([127, 0, 0, 1], 1).into();
        let lines = BOTH.map(|_| Arc::new(Link::start(nowhere).unwrap()));
        let folders = BOTH.map(|which| dir.join(format!("kafka-{}", which.id())));
        let over =
            |line: &Arc<Link>| KafkaOptions { line: Some(Arc::clone(line)), ..KafkaOptions::default() };
        let options = [over(&lines[0]), over(&lines[1])];
        let (a, b) = tokio::join!(
            Kafka::start_with(&folders[0], &options[0]),
            Kafka::start_with(&folders[1], &options[1])
        );
        Kafkas { brokers: [a.unwrap(), b.unwrap()], lines }
    }

    pub(super) fn of(&self, which: Which) -> &Kafka {
        which.of(&self.brokers)
    }

    /// Two centers with Kafka for a queue.
    pub(super) fn options(&self) -> CentersOptions {
        let kafka = |which: Which| {
            let (own, other) = (self.of(which).bootstrap(), which.other().of(&self.lines).address());
            let table = format!(
                "[kafka]\nbootstrap = \"{own}\"\nreplication_factor = 1\n\
                 [kafka.centers.{}]\nbootstrap = \"{other}\"\n",
                which.other().id()
            );
            (which, table)
        };
        CentersOptions {
            more: BOTH.map(kafka).into(),
            queue: Some("kafka"),
            lines: self.lines.to_vec(),
            ..CentersOptions::default()
        }
    }
}

/// Servers of a test's own.
pub(super) struct Behind {
    kafka: Kafkas,
    /// By center.
    mariadb: [Mariadb; 2],
    /// The URLs of the centers' databases.
    databases: Vec<(Which, String)>,
    /// Dropped last.
    _dir: tempfile::TempDir,
}

impl Behind {
    pub(super) async fn start() -> Behind {
        let dir = folder_in_memory().unwrap();
        let [a, b] = BOTH.map(|which| dir.path().join(format!("mariadb-{}", which.id())));
        let (kafka, a, b) =
            tokio::join!(Box::pin(Kafkas::start(dir.path())), Mariadb::start(&a), Mariadb::start(&b));
        let mariadb = [a.unwrap(), b.unwrap()];
        let mut databases = Vec::new();
        for which in BOTH {
            let name = format!("seckill_{}", which.id());
            databases.push((which, which.of(&mariadb).create_database(&name).await.unwrap()));
        }
        Behind { kafka, mariadb, databases, _dir: dir }
    }

    /// Two centers in front of it.
    pub(super) fn options(&self) -> CentersOptions {
        CentersOptions { etcd: true, databases: self.databases.clone(), ..self.kafka.options() }
    }

    /// kill -9 of everything that a center has of it.
    pub(super) fn kill(&self, which: Which) {
        self.kafka.of(which).kill();
        which.of(&self.mariadb).kill();
    }

    /// What was killed is back.
    pub(super) async fn restart(&self, which: Which) {
        self.kafka.of(which).restart().await.unwrap();
        which.of(&self.mariadb).restart().await.unwrap();
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

    let kafka = behind.kafka.of(Which::B);
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

    // Whoever is asked, the audit says whose queue stands still.
    for which in BOTH {
        eventually("the audit names b's queue", async || {
            let report = audit(&centers, which);
            let problems = report["problems"].as_array()?;
            problems
                .iter()
                .any(|problem| problem.as_str().unwrap().contains("the queue of center b: "))
                .then_some(())
        })
        .await;
    }

    kafka.restart().await.unwrap();
    b.stored_order(&orders[1].1, &orders[1].0).await;
    until_nobody_waits(&centers).await;
    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    let all = heard.bought.len() as u64 + 3;
    assert_eq!(compare_books(&centers, Which::A, "phone", &heard.bought).await, all);
}

/// Waits until neither center waits for the queue: until Kafka has answered all who ask it, the audit cannot see
/// everything.
pub(super) async fn until_nobody_waits(centers: &Centers) {
    for which in BOTH {
        eventually("nobody waits for the queue", async || {
            let ready = centers.ready(which).await;
            ready["queue"]["waiting"].as_array().is_none_or(Vec::is_empty).then_some(())
        })
        .await;
    }
}

/// Waits until both centers have stored what is in their Kafka, and either one tells so of both.
pub(super) async fn until_no_lag(centers: &Centers) {
    for which in BOTH {
        eventually("both have stored everything", async || {
            let report = audit(centers, which);
            let consumers = report["queue"]["consumers"].as_array()?;
            let told: Vec<_> = consumers
                .iter()
                .map(|consumer| (consumer["center"].clone(), consumer["lag"].clone()))
                .collect();
            (told == [(json!("a"), json!(0)), (json!("b"), json!(0))]).then_some(())
        })
        .await;
    }
}

/// What the audit says, asked of a center.
pub(super) fn audit(centers: &Centers, which: Which) -> Value {
    let (code, out, err) = centers.cli(which, &["audit", "-o", "json"]);
    serde_json::from_str(&out).unwrap_or_else(|_| panic!("the audit ended with {code}:\n{out}\n{err}"))
}
