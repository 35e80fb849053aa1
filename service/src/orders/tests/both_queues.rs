//! What holds whichever queue brings the orders: one suite, run over the outbox and over a real Kafka.

use rand::RngExt as _;
use seckill_domain::OrderStatus;
use seckill_ledger::outbox;

use super::kafka::KafkaLine;
use super::workers::{Running, Shop, eventually, start_with};
use super::*;
use crate::orders::{Origin, Queue};
use crate::topology::Authority;

/// A shop and the queue between its ledger and its order tables.
struct Line {
    shop: Shop,
    kafka: Option<KafkaLine>,
}

impl Line {
    async fn open(kafka: bool) -> Line {
        let shop = Shop::open().await;
        let kafka = if kafka { Some(KafkaLine::new().await) } else { None };
        Line { shop, kafka }
    }

    fn queue(&self) -> Queue {
        match &self.kafka {
            Some(kafka) => Queue::Kafka(kafka.options()),
            None => Queue::Outbox,
        }
    }

    fn start(&self) -> Running {
        self.start_on(&self.shop.db.store, &self.shop.authority())
    }

    fn start_on(&self, store: &OrderStore, authority: &Authority) -> Running {
        start_with(store, self.shop.redis.client(), authority, &self.queue())
    }

    async fn buy_some(&mut self, round: usize, orders: usize) -> Vec<OrderId> {
        let uids: Vec<String> = (0..orders).map(|n| format!("u{round}-{n}")).collect();
        self.shop.buy("s", &uids.iter().map(String::as_str).collect::<Vec<_>>()).await
    }
}

macro_rules! over_both_queues {
    ($($name:ident)*) => {
        mod over_the_outbox {
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(super::Line::open(false).await).await; })*
        }
        mod over_kafka {
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(super::Line::open(true).await).await; })*
        }
    };
}

over_both_queues! {
    every_order_arrives_once_and_the_position_follows
    two_services_at_once_store_each_order_once
    orders_survive_workers_that_end_at_any_moment
    an_unreadable_entry_is_set_aside_and_holds_nobody_up
    nothing_leaves_a_ledger_without_authority
    what_was_paid_stays_paid_when_it_is_delivered_again
}

async fn every_order_arrives_once_and_the_position_follows(mut line: Line) {
    let mut accepted = line.buy_some(0, 3).await;
    let running = line.start();
    for round in 1..20 {
        accepted.extend(line.buy_some(round, round).await);
    }
    eventually(async || line.shop.stored("s").await == accepted.len() as u64).await;
    for order_id in &accepted {
        assert!(line.shop.db.store.order(*order_id).await.unwrap().is_some());
    }
    // Also of shards that nobody bought in: the outbox can be trimmed up to here.
    let last = outbox::last_id(&mut line.shop.conn).await.unwrap().unwrap();
    eventually(async || line.shop.db.store.position(0).await.unwrap() == last).await;
    assert_eq!(line.shop.db.store.highest(0).await.unwrap(), last);
    running.stop().await;
    assert_eq!(line.shop.db.store.metrics().stored.get(), accepted.len() as u64);
}

async fn two_services_at_once_store_each_order_once(mut line: Line) {
    let other = line.shop.db.again().await;
    let one = line.start();
    let two = line.start_on(&other, &line.shop.authority());
    let mut accepted = Vec::new();
    for round in 0..40 {
        accepted.extend(line.buy_some(round, 5).await);
    }
    eventually(async || line.shop.stored("s").await == accepted.len() as u64).await;
    one.stop().await;
    two.stop().await;
    let stored = line.shop.db.store.metrics().stored.get() + other.metrics().stored.get();
    assert_eq!(stored, accepted.len() as u64);
    other.close().await;
}

async fn orders_survive_workers_that_end_at_any_moment(mut line: Line) {
    let mut accepted = Vec::new();
    for round in 0..6 {
        let running = line.start();
        accepted.extend(line.buy_some(round, 40).await);
        let pause = rand::rng().random_range(0..400);
        println!("round {round}: the workers end after {pause} ms");
        tokio::time::sleep(std::time::Duration::from_millis(pause)).await;
        accepted.extend(line.buy_some(100 + round, 40).await);
        running.abandon();
    }
    let running = line.start();
    eventually(async || line.shop.stored("s").await == accepted.len() as u64).await;
    running.stop().await;
    assert_eq!(line.shop.db.store.metrics().stored.get(), accepted.len() as u64);
}

async fn an_unreadable_entry_is_set_aside_and_holds_nobody_up(mut line: Line) {
    line.buy_some(0, 1).await;
    let last = outbox::last_id(&mut line.shop.conn).await.unwrap().unwrap();
    let broken = OutboxId { seq: last.seq + 1, ..last };
    redis::pipe()
        .cmd("XADD")
        .arg("sk:outbox")
        .arg(broken.to_string())
        .arg(&["v", "1", "k", "orders", "s", "s", "a", "5", "t", "{", "o", "nonsense\n"])
        .cmd("INCR")
        .arg("sk:seq")
        .query_async::<()>(&mut line.shop.conn)
        .await
        .unwrap();
    line.buy_some(1, 1).await;
    let running = line.start();
    eventually(async || line.shop.stored("s").await == 2).await;
    eventually(async || line.shop.db.store.counts(None).await.unwrap().unreadable == 1).await;
    running.stop().await;
    let aside = line.shop.db.store.unreadable(10, None).await.unwrap().items;
    assert!(aside[0].raw.contains("nonsense") && aside[0].reason.contains("terms"), "{aside:?}");
    match (&line.kafka, aside[0].origin) {
        (None, Origin::Outbox { id, .. }) => assert_eq!(id, broken),
        (Some(_), Origin::Kafka { offset, .. }) => assert!(offset >= 0),
        other => panic!("{:?}", other.1),
    }
    // This release cannot read it either; one that writes it right can.
    let replay = crate::orders::replay(&line.shop.db.store, |_| true).await.unwrap();
    assert_eq!((replay.read, replay.unreadable.len()), (0, 1));
    assert!(replay.unreadable[0].reason.contains("terms"), "{replay:?}");
}

async fn nothing_leaves_a_ledger_without_authority(mut line: Line) {
    line.buy_some(0, 3).await;
    let running = line.start_on(&line.shop.db.store, &Authority::fixed(line.shop.fence.at(Epoch(2))));
    eventually(async || !running.workers.waiting().is_empty()).await;
    running.stop().await;
    assert_eq!(line.shop.stored("s").await, 0);
    let running = line.start();
    eventually(async || line.shop.stored("s").await == 3).await;
    eventually(async || running.workers.waiting().is_empty()).await;
    running.stop().await;
}

async fn what_was_paid_stays_paid_when_it_is_delivered_again(mut line: Line) {
    let accepted = line.buy_some(0, 20).await;
    let running = line.start();
    eventually(async || line.shop.stored("s").await == 20).await;
    running.stop().await;
    let order = line.shop.db.store.admin_order(accepted[0]).await.unwrap().unwrap();
    let payment = Payment {
        order_id: accepted[0],
        payment_id: PaymentId::new("p").unwrap(),
        amount: order.order.amount,
        coupon_id: None,
    };
    line.shop.db.store.pay(payment).await.unwrap();
    line.shop.db.store.cancel(&user("u0-1"), accepted[1]).await.unwrap();
    // Nobody knows any more how far it was, and later orders go first.
    redis::cmd("DEL").arg("sk:cursors").query_async::<()>(&mut line.shop.conn).await.unwrap();
    line.buy_some(1, 20).await;
    let running = line.start();
    eventually(async || line.shop.stored("s").await == 40).await;
    if line.kafka.is_some() {
        eventually(async || line.shop.db.store.metrics().duplicates.get() == 20).await;
    }
    running.stop().await;
    let status = async |order_id| line.shop.db.store.order(order_id).await.unwrap().unwrap().status;
    assert_eq!(status(accepted[0]).await, OrderStatus::Paid);
    assert_eq!(status(accepted[1]).await, OrderStatus::Cancelled);
}
