//! The Kafka queue on a real broker.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use seckill_domain::Shard;
use seckill_ledger::LedgerId;
use tokio::sync::watch;

use super::workers::{Shop, eventually, start_with};
use super::*;
use crate::orders::{Advance, ConsumerStatus, KafkaMetrics, KafkaOptions, Origin, Queue, StoreBatch};
use crate::topology::{Center, Limits, Topology};

/// Topics of a test's own on the broker that all tests share.
pub(super) struct KafkaLine {
    bootstrap: String,
    prefix: String,
    topology: watch::Sender<Arc<Topology>>,
    pub(super) metrics: KafkaMetrics,
}

fn center(id: &str) -> CenterId {
    CenterId::new(id).unwrap()
}

fn topology() -> Topology {
    let url = "http://127.0.0.1:1".to_owned();
    let a = Center {
        number: CenterNumber::new(1).unwrap(),
        public_url: url.clone(),
        admin_url: url.clone(),
        internal_url: url,
        ledger: Vec::new(),
        extra: serde_json::Map::new(),
    };
    Topology::single(LedgerId::new("test").unwrap(), center("a"), a, Limits::default())
}

/// Two centers; `b` answers which shards are at home in the second.
fn two_centers(b: impl Fn(Shard) -> bool) -> Topology {
    let mut two = topology();
    let other = two.centers[&center("a")].clone();
    two.centers.insert(center("b"), Center { number: CenterNumber::new(2).unwrap(), ..other });
    for shard in Shard::all().filter(|shard| b(*shard)) {
        two.shard_owners[usize::from(shard.number())] = center("b");
    }
    two
}

impl KafkaLine {
    pub(super) async fn new() -> KafkaLine {
        KafkaLine::at(seckill_parts::shared::kafka().await.unwrap())
    }

    fn at(bootstrap: String) -> KafkaLine {
        KafkaLine {
            bootstrap,
            prefix: format!("t{:016x}.", rand::random::<u64>()),
            topology: watch::Sender::new(Arc::new(topology())),
            metrics: KafkaMetrics::default(),
        }
    }

    pub(super) fn options(&self) -> KafkaOptions {
        let own = vec![("bootstrap.servers".to_owned(), self.bootstrap.clone())];
        KafkaOptions {
            center: center("a"),
            centers: BTreeMap::from([(center("a"), own)]),
            topic_prefix: self.prefix.clone(),
            replication_factor: 1,
            topology: self.topology.subscribe(),
            metrics: self.metrics.clone(),
        }
    }

    fn queue(&self) -> Queue {
        Queue::Kafka(self.options())
    }

    fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.bootstrap);
        config
    }

    fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    async fn create(&self, name: &str, partitions: i32, setting: Option<(&str, &str)>) {
        let admin: AdminClient<DefaultClientContext> = self.config().create().unwrap();
        let name = self.topic(name);
        let mut topic = NewTopic::new(&name, partitions, TopicReplication::Fixed(1));
        if let Some((setting, value)) = setting {
            topic = topic.set(setting, value);
        }
        for created in admin.create_topics(&[topic], &AdminOptions::new()).await.unwrap() {
            created.unwrap();
        }
    }

    /// Puts a record into the orders topic as another system might.
    async fn put(&self, partition: i32, key: &str, content: &str, headers: &[(&str, &str)]) {
        let producer: FutureProducer = self.config().create().unwrap();
        let topic = self.topic("seckill.orders");
        let mut all = OwnedHeaders::new();
        for (name, value) in headers {
            all = all.insert(Header { key: name, value: Some(*value) });
        }
        let record = FutureRecord::to(&topic).partition(partition).key(key).payload(content).headers(all);
        producer.send(record, Duration::from_secs(20)).await.unwrap();
    }

    /// So many records of a topic's partition, from its beginning: key, content, headers.
    fn read(
        &self,
        name: &str,
        partition: i32,
        records: usize,
    ) -> Vec<(String, String, BTreeMap<String, String>)> {
        let mut config = self.config();
        config.set("group.id", "test").set("auto.offset.reset", "earliest");
        let consumer: BaseConsumer = config.create().unwrap();
        let mut list = rdkafka::TopicPartitionList::new();
        list.add_partition_offset(&self.topic(name), partition, rdkafka::Offset::Beginning).unwrap();
        consumer.assign(&list).unwrap();
        let mut found = Vec::new();
        let begin = std::time::Instant::now();
        while found.len() < records && begin.elapsed() < super::workers::DEADLINE {
            let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) else { continue };
            let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
            let headers = message.headers().into_iter().flat_map(|headers| headers.iter());
            let headers = headers.map(|header| (header.key.to_owned(), text(header.value))).collect();
            found.push((text(message.key()), text(message.payload()), headers));
        }
        found
    }
}

fn content(order: &OrderRecord) -> serde_json::Value {
    serde_json::json!({
        "v": 1, "order_id": order.order_id, "uid": order.uid, "sale_id": order.sale_id,
        "quantity": order.quantity.get(), "accepted_at": order.accepted_at, "terms": &*order.terms,
    })
}

fn headers(order: &OrderRecord) -> Vec<(&'static str, String)> {
    vec![
        ("ce_type", "seckill.order.accepted".to_owned()),
        ("seckill_outbox", format!("0/1-{}", order.order_id.seq())),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poison_record_goes_to_the_dead_letters_and_its_partition_goes_on() {
    let mut shop = Shop::open().await;
    let line = KafkaLine::new().await;
    shop.buy("s", &["bob"]).await;
    let running = start_with(&shop.db.store, shop.redis.client(), &shop.authority(), &line.queue());
    eventually(async || shop.stored("s").await == 1).await;
    let bob = order("bob", 700, &product(100, 900));
    let partition = i32::from(bob.uid.table().shard().number());
    let good = headers(&bob);
    let good: Vec<(&str, &str)> = good.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let changed = |field: &str, value: serde_json::Value| {
        let mut content = content(&bob);
        content[field] = value;
        content.to_string()
    };
    let odd = [
        ("bob", "not JSON".to_owned(), &good[..], partition),
        ("bob", changed("v", 2.into()), &good[..], partition),
        ("bob", changed("order_id", "77".into()), &good[..], partition),
        ("bob", changed("quantity", 0.into()), &good[..], partition),
        ("bob", changed("terms", serde_json::json!({})), &good[..], partition),
        ("amy", content(&bob).to_string(), &good[..], partition),
        ("bob", content(&bob).to_string(), &good[..], (partition + 1) % 64),
        ("bob", content(&bob).to_string(), &good[..1], partition),
        ("bob", content(&bob).to_string(), &[], partition),
        ("bob", content(&bob).to_string(), &[("ce_type", "gift"), ("seckill_outbox", "0/1-700")], partition),
        (
            "bob",
            content(&bob).to_string(),
            &[("ce_type", "seckill.order.accepted"), ("seckill_outbox", "0/1-9")],
            partition,
        ),
    ];
    for (key, content, headers, partition) in &odd {
        line.put(*partition, key, content, headers).await;
    }
    // An order of a sale that this ledger never heard of.
    let mut strange = content(&bob);
    strange["sale_id"] = "elsewhere".into();
    line.put(partition, "bob", &strange.to_string(), &good).await;
    eventually(async || shop.stored("elsewhere").await == 1).await;
    eventually(async || shop.db.store.counts(None).await.unwrap().unreadable == odd.len() as u64).await;
    running.stop().await;
    let letters = line.read("seckill.dead-letter", 0, odd.len());
    assert_eq!(letters.len(), odd.len());
    for (key, _, headers) in &letters {
        assert!(!headers["seckill_reason"].is_empty());
        assert_eq!(headers["seckill_topic"], line.topic("seckill.orders"));
        assert!(headers["seckill_offset"].parse::<i64>().is_ok() && !key.is_empty());
    }
    assert!(letters.iter().any(|(_, content, _)| content == "not JSON"));
    assert!(letters.iter().any(|(_, _, headers)| headers["seckill_reason"] == "format version 2"));
    assert_eq!(line.metrics.dead_letters.get(), odd.len() as u64);
    let aside = shop.db.store.unreadable(50, None).await.unwrap().items;
    assert!(aside.iter().all(|one| matches!(one.origin, Origin::Kafka { .. })), "{aside:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_later_release_can_read_is_stored_by_a_replay() {
    let shop = Shop::open().await;
    let bob = order("bob", 700, &product(100, 900));
    let shard = bob.uid.table().shard();
    let raw = |kind: &str, content: serde_json::Value| {
        let content = content.to_string();
        serde_json::json!({ "kind": kind, "outbox": "0/1-700", "key": "bob", "content": content }).to_string()
    };
    let aside = |offset, raw: String| crate::orders::Unreadable {
        origin: Origin::Kafka { shard, offset },
        reason: "an earlier release".to_owned(),
        raw,
    };
    // An entry of the outbox that the relay could not read; what it holds this release reads.
    let table = bob.uid.table();
    let entry = serde_json::json!({
        "v": "1", "k": "orders", "s": "s", "a": "5", "t": serde_json::to_string(&*bob.terms).unwrap(),
        "o": format!("1{table}00001 1 bob\n"),
    });
    let relayed = serde_json::json!({ "v": 1, "reason": "then", "raw": entry.to_string() });
    let unreadable = vec![
        aside(1, raw("seckill.order.accepted", content(&bob))),
        aside(2, raw("seckill.order.accepted", content(&bob))),
        aside(3, raw("seckill.unreadable", relayed).replace("0/1-700", "0/1-701")),
        aside(4, raw("gift", content(&bob))),
    ];
    shop.db.store.store(StoreBatch { unreadable, ..StoreBatch::default() }).await.unwrap();
    for (read, stored, duplicates) in [(3, 2, 1), (0, 0, 0)] {
        let replay = crate::orders::replay(&shop.db.store, |_| true).await.unwrap();
        assert_eq!((replay.read, replay.stored, replay.duplicates), (read, stored, duplicates));
        assert_eq!(replay.unreadable.len(), 1);
        assert!(replay.unreadable[0].reason.contains("gift"));
    }
    assert_eq!(shop.db.store.order(bob.order_id).await.unwrap().unwrap().order_id, bob.order_id);
    assert_eq!(shop.db.store.counts(None).await.unwrap().unreadable, 1);
}

/// Purchases go on whatever becomes of the broker; their orders come when it is back, each once.
#[tokio::test(flavor = "multi_thread")]
async fn orders_wait_for_a_broker_that_is_away_and_arrive_once() {
    let folder = tempfile::tempdir().unwrap();
    let broker = seckill_parts::Kafka::start(folder.path()).await.unwrap();
    let mut shop = Shop::open().await;
    let line = KafkaLine::at(broker.bootstrap());
    broker.stop().await;
    // The service starts without its broker.
    let running = start_with(&shop.db.store, shop.redis.client(), &shop.authority(), &line.queue());
    let mut bought = shop.buy("s", &["early"]).await.len() as u64;
    eventually(async || running.workers.waiting().len() == 2).await;
    broker.restart().await.unwrap();
    eventually(async || shop.stored("s").await == 1).await;
    for round in 0..3 {
        match round {
            0 => broker.pause(),
            1 => broker.kill(),
            _ => broker.stop().await,
        }
        for n in 0..20 {
            let uids: Vec<String> = (0..10).map(|user| format!("r{round}-{n}-{user}")).collect();
            bought += shop.buy("s", &uids.iter().map(String::as_str).collect::<Vec<_>>()).await.len() as u64;
        }
        if round == 0 {
            broker.resume();
        } else {
            if round == 2 {
                // The consumer has looked for it, too; it comes back with later leader epochs than that knows.
                eventually(async || running.workers.waiting().len() == 2).await;
            }
            broker.restart().await.unwrap();
        }
        eventually(async || shop.stored("s").await == bought).await;
    }
    eventually(async || running.workers.waiting().is_empty()).await;
    running.stop().await;
    assert_eq!(shop.db.store.metrics().stored.get(), bought);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_center_whose_broker_is_away_holds_back_its_own_orders_only() {
    let folder = tempfile::tempdir().unwrap();
    let away = seckill_parts::Kafka::start(folder.path()).await.unwrap();
    away.stop().await;
    let mut shop = Shop::open().await;
    let line = KafkaLine::new().await;
    line.topology.send_replace(Arc::new(two_centers(|shard| shard.number() % 2 == 1)));
    let mut options = line.options();
    options.centers.insert(center("b"), vec![("bootstrap.servers".to_owned(), away.bootstrap())]);
    let uids: Vec<String> = (0..100).map(|n| format!("u{n}")).collect();
    let at_home = |uid: &String| user(uid).table().shard().number().is_multiple_of(2);
    let own = uids.iter().filter(|uid| at_home(uid)).count() as u64;
    shop.buy("s", &uids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let running = start_with(&shop.db.store, shop.redis.client(), &shop.authority(), &Queue::Kafka(options));
    eventually(async || shop.stored("s").await == own).await;
    eventually(async || !running.workers.waiting().is_empty()).await;
    away.restart().await.unwrap();
    let b = KafkaLine {
        bootstrap: away.bootstrap(),
        prefix: line.prefix.clone(),
        ..KafkaLine::at(String::new())
    };
    // What it acknowledged is noted, up to the last entry.
    let last = seckill_ledger::outbox::last_id(&mut shop.conn).await.unwrap().unwrap();
    let mut conn = shop.redis.connect().await;
    eventually(async || {
        let noted = seckill_ledger::cursor(&mut conn, &center("b")).await.unwrap();
        noted.is_some_and(|noted| noted.id == last)
    })
    .await;
    let label = crate::orders::CenterLabel { center: "b".to_owned() };
    assert!(line.metrics.published.get_or_create(&label).get() >= 100 - own);
    eventually(async || running.workers.waiting().is_empty()).await;
    running.stop().await;
    // Sales are told to every center.
    assert_eq!(b.read("seckill.sales", 0, 1).len(), 1);
    assert_eq!(shop.stored("s").await, own);
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_cloud_events_and_sales_are_told_to_everybody() {
    let mut shop = Shop::open().await;
    let line = KafkaLine::new().await;
    let order_id = shop.buy("s", &["bob"]).await[0];
    seckill_ledger::add_stock(&mut shop.conn, &shop.fence, &sale("s"), -5, &[1; 16]).await.unwrap();
    seckill_ledger::set_state(&mut shop.conn, &shop.fence, &sale("s"), seckill_ledger::StateChange::Pause)
        .await
        .unwrap();
    let running = start_with(&shop.db.store, shop.redis.client(), &shop.authority(), &line.queue());
    eventually(async || shop.stored("s").await == 1).await;
    let sales = line.read("seckill.sales", 0, 3);
    running.stop().await;
    let contents: Vec<serde_json::Value> =
        sales.iter().map(|(_, content, _)| serde_json::from_str(content).unwrap()).collect();
    assert_eq!(
        (&contents[0]["sale"]["sale_id"], &contents[0]["sale"]["quantity"]),
        (&"s".into(), &1000.into())
    );
    assert_eq!(contents[1], serde_json::json!({ "v": 1, "sale_id": "s", "stock_delta": -5 }));
    assert_eq!(contents[2], serde_json::json!({ "v": 1, "sale_id": "s", "state": "paused" }));
    for (key, _, headers) in &sales {
        assert_eq!((key.as_str(), headers["ce_specversion"].as_str()), ("s", "1.0"));
        assert!(headers["ce_time"].ends_with('Z') && headers["ce_source"].starts_with("/seckill/"));
        assert_eq!(headers["content-type"], "application/json");
    }
    assert!(shop.db.store.order(order_id).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_opens_each_partition_with_a_mark_of_where_it_goes_on() {
    let mut shop = Shop::open().await;
    let line = KafkaLine::new().await;
    let shard = user("bob").table().shard();
    let neighbour = (0..).map(|n| format!("n{n}")).find(|uid| user(uid).table().shard() == shard).unwrap();
    let mut expected = Vec::new();
    for (stored, uid) in (1..).zip(["bob", &neighbour]) {
        let resumed = seckill_ledger::cursor(&mut shop.conn, &center("a")).await.unwrap();
        let resumed = resumed.map_or(OutboxId::ZERO, |cursor| cursor.id);
        let running = start_with(&shop.db.store, shop.redis.client(), &shop.authority(), &line.queue());
        let order_id = shop.buy("s", &[uid]).await[0];
        eventually(async || shop.stored("s").await == stored).await;
        running.stop().await;
        expected.push(("seckill.mark".to_owned(), format!("0/{resumed}")));
        expected.push(("seckill.order.accepted".to_owned(), format!("0/1-{}", order_id.seq())));
    }
    // Marks of a silence in between may be there, too.
    for count in 4..16 {
        let records = line.read("seckill.orders", shard.number().into(), count);
        let name = |headers: &BTreeMap<String, String>| {
            (headers["ce_type"].clone(), headers["seckill_outbox"].clone())
        };
        let mut found: Vec<_> = records.iter().map(|(_, _, headers)| name(headers)).collect();
        if found.last() == expected.last() {
            assert_eq!(found[0], expected[0]);
            found.retain(|record| expected.contains(record));
            assert_eq!(found, expected);
            return;
        }
    }
    panic!("the last order is not there");
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_that_do_not_fit_are_refused_with_the_reason() {
    let shop = Shop::open().await;
    for (partitions, setting, said) in [
        (3, None, "has 3 partitions instead of 64"),
        (64, Some(("retention.ms", "60000")), "retention.ms=60000 instead of -1"),
    ] {
        let line = KafkaLine::new().await;
        line.create("seckill.orders", partitions, setting).await;
        let running = start_with(&shop.db.store, shop.redis.client(), &shop.authority(), &line.queue());
        // The consumer and the relay.
        eventually(async || {
            let waiting = running.workers.waiting();
            waiting.len() == 2 && waiting.iter().all(|reason| reason.contains(said))
        })
        .await;
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_that_are_gone_are_never_skipped_in_silence() {
    let mut shop = Shop::open().await;
    let line = KafkaLine::new().await;
    // What this database has stored, the brokers never had: the topic was created anew.
    let shard = user("bob").table().shard();
    let advance = Advance::Kafka { shard, from: 0, to: 100, outbox: Vec::new() };
    shop.db.store.store(StoreBatch { advance: vec![advance], ..StoreBatch::default() }).await.unwrap();
    let other = ["amy", "eve", "dan"].into_iter().find(|uid| user(uid).table().shard() != shard).unwrap();
    shop.buy("s", &["bob", other]).await;
    let running = start_with(&shop.db.store, shop.redis.client(), &shop.authority(), &line.queue());
    eventually(async || shop.stored("s").await == 1).await;
    let consumer = running.workers.kafka().unwrap().consumer.clone();
    eventually(
        async || matches!(&*consumer.borrow(), ConsumerStatus::Following { lost, .. } if *lost == [shard]),
    )
    .await;
    assert_eq!(line.metrics.offsets_lost.get(), 1);
    assert!(running.workers.waiting()[0].contains(&format!("partitions {shard}:")));
    running.stop().await;
    assert_eq!(shop.db.store.position(0).await.unwrap(), OutboxId::ZERO);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_partitions_of_this_centers_shards_are_read() {
    let mut shop = Shop::open().await;
    let line = KafkaLine::new().await;
    let mine = user("bob").table().shard();
    let one = line.topology.send_replace(Arc::new(two_centers(|shard| shard != mine)));
    let uids: Vec<String> = (0..64).map(|n| format!("u{n}")).collect();
    let mut uids: Vec<&str> =
        uids.iter().map(String::as_str).filter(|uid| user(uid).table().shard() != mine).collect();
    uids.push("bob");
    shop.buy("s", &uids).await;
    let running = start_with(&shop.db.store, shop.redis.client(), &shop.authority(), &line.queue());
    eventually(async || shop.stored("s").await == 1).await;
    // The shards come home: what is older than the cursor is published for them, too.
    line.topology.send_replace(one);
    eventually(async || shop.stored("s").await == uids.len() as u64).await;
    running.stop().await;
}
