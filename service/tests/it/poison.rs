//! Records in Kafka that cannot be read, or that nobody here expected.

use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Offset, TopicPartitionList};
use seckill_domain::{CenterNumber, Epoch, OrderId, Table, Uid};
use serde_json::{Value, json};

use crate::serve::Center;
use crate::support::{PATIENCE, eventually};

const ORDER: &str = "seckill.order.accepted";

/// Whoever has access to the topic.
struct Stranger {
    producer: FutureProducer,
    topic: String,
    partition: i32,
}

impl Stranger {
    fn new(center: &Center, uid: &Uid) -> Stranger {
        let producer = ClientConfig::new().set("bootstrap.servers", center.bootstrap()).create().unwrap();
        let partition = i32::from(uid.table().shard().number());
        Stranger { producer, topic: center.topic("seckill.orders"), partition }
    }

    async fn put(&self, key: &str, content: &str, headers: &[(&str, &str)]) {
        let headers = headers
            .iter()
            .fold(OwnedHeaders::new(), |all, (key, value)| all.insert(Header { key, value: Some(*value) }));
        let record = FutureRecord::to(&self.topic)
            .partition(self.partition)
            .key(key)
            .payload(content)
            .headers(headers);
        self.producer.send(record, Duration::from_secs(30)).await.map_err(|(error, _)| error).unwrap();
    }
}

/// A complete order of a sale that this center never heard of.
fn order(uid: &str, id: OrderId, version: u32) -> String {
    json!({
        "v": version, "order_id": id.to_string(), "uid": uid, "sale_id": "never-heard-of", "quantity": 1,
        "accepted_at": "2026-11-21T00:00:00.120Z",
        "terms": {"kind": "product", "unit_price": 199_900, "currency": "CNY", "payment_ttl_s": 900},
    })
    .to_string()
}

fn order_id(table: Table, epoch: u64, seq: u64) -> OrderId {
    let head = OrderId::head_of(CenterNumber::new(1).unwrap(), table, 0, Epoch(epoch));
    OrderId::from_parts(head, seq).unwrap()
}

/// The reasons in the dead-letter topic, as soon as there are so many.
fn letters(center: &Center, count: usize) -> Vec<String> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", center.bootstrap())
        .set("group.id", "test")
        .set("enable.auto.commit", "false")
        .create()
        .unwrap();
    let mut start = TopicPartitionList::new();
    start.add_partition_offset(&center.topic("seckill.dead-letter"), 0, Offset::Beginning).unwrap();
    consumer.assign(&start).unwrap();
    let mut reasons = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while reasons.len() < count {
        assert!(Instant::now() < deadline, "only {reasons:?}");
        let Some(Ok(letter)) = consumer.poll(Duration::from_millis(100)) else { continue };
        let reason = letter
            .headers()
            .and_then(|headers| headers.iter().find(|header| header.key == "seckill_reason"))
            .and_then(|header| header.value)
            .map(|value| String::from_utf8_lossy(value).into_owned());
        reasons.push(reason.expect("a dead letter says why"));
    }
    reasons
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poison_is_set_aside_with_the_reason_counted_and_replayed_while_its_partition_goes_on() {
    let center = Center::open().await;
    let (service, client) = center.start().await;
    client.create_sale("before", 10, json!({})).await;
    client.create_sale("behind", 10, json!({})).await;
    let alice = Uid::new("alice").unwrap();
    let first = client.buy_until_known("before", "alice", "k").await;
    let first: OrderId = first.body["order_id"].as_str().unwrap().parse().unwrap();
    client.stored_order("alice", &first.to_string()).await;

    let epoch = client.admin(http::Method::GET, "/admin/v1/topology", &[], None).await.body["epoch"]
        .as_u64()
        .unwrap();
    let table = alice.table();
    // The first entries of a ledger's outbox are no orders: no purchase has these ids.
    let (unheard, future) = (order_id(table, epoch, 1), order_id(table, epoch, 2));
    let elsewhere = order_id(Table::all().find(|other| other.shard() != table.shard()).unwrap(), epoch, 1);
    let place = |seq: u64| format!("0/{epoch}-{seq}");
    let stranger = Stranger::new(&center, &alice);
    let (one, two) = (place(1), place(2));
    stranger.put("alice", "\u{0}\u{1} no JSON", &[("ce_type", ORDER), ("seckill_outbox", &one)]).await;
    stranger.put("alice", &order("alice", unheard, 1), &[]).await;
    stranger.put("alice", &order("alice", future, 99), &[("ce_type", ORDER), ("seckill_outbox", &two)]).await;
    stranger
        .put("alice", &order("alice", elsewhere, 1), &[("ce_type", ORDER), ("seckill_outbox", &one)])
        .await;
    stranger
        .put("alice", &order("al ice", unheard, 1), &[("ce_type", ORDER), ("seckill_outbox", &one)])
        .await;
    stranger.put("alice", "{}", &[("ce_type", ORDER), ("seckill_outbox", "0/later-than-ever")]).await;
    stranger.put("alice", &order("alice", unheard, 1), &[("ce_type", ORDER), ("seckill_outbox", &one)]).await;

    // The partition goes on: behind the poison stand an order of an unknown sale and one of a known sale.
    let stored = client.stored_order("alice", &unheard.to_string()).await;
    assert_eq!(
        (stored["sale_id"].as_str(), stored["status"].as_str()),
        (Some("never-heard-of"), Some("created"))
    );
    let second = client.buy_until_known("behind", "alice", "k").await;
    client.stored_order("alice", second.body["order_id"].as_str().unwrap()).await;

    let expected =
        ["not an order", "outbox id", "format version 99", "is not in its user's table", "user", "outbox id"];
    let found = letters(&center, expected.len());
    for (reason, part) in found.iter().zip(expected) {
        assert!(reason.contains(part), "{part:?} is not in {reason:?} of {found:?}");
    }
    assert_eq!(found.len(), expected.len(), "{found:?}");

    let (code, out, err) = service.cli(&["dead-letter", "list", "-o", "json"]);
    assert_eq!(code, 0, "{err}");
    let listed: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(listed["dead_letters"].as_array().unwrap().len(), expected.len(), "{listed:#}");
    let (code, report) = service.audit();
    assert_eq!((code, &report["unreadable"]), (2, &json!(expected.len())), "{report:#}");

    // This release cannot read them either; one that could would find what the future wrote.
    let (code, out, _) = service.cli(&["dead-letter", "replay", "-o", "json"]);
    let replay: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &replay["read"]), (1, &json!(0)), "{replay:#}");
    let pool = center.pool().await;
    sqlx::query("UPDATE unreadable SET raw = REPLACE(raw, ':99', ':1')").execute(&pool).await.unwrap();
    pool.close().await;
    let (_, out, _) = service.cli(&["dead-letter", "replay", "-o", "json"]);
    let replay: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&replay["read"], &replay["stored"]), (&json!(1), &json!(1)), "{replay:#}");
    client.stored_order("alice", &future.to_string()).await;
    eventually("the audit counts what is left", async || {
        let (code, report) = service.audit();
        (code == 2 && report["unreadable"] == json!(expected.len() - 1)).then_some(())
    })
    .await;
    drop(service);
    center.close().await;
}
