//! Who may write: the fence, and the role of the server.

use futures_util::StreamExt;
use redis::aio::MultiplexedConnection;
use seckill_domain::{CenterId, Epoch, OutboxId, SaleId};
use seckill_ledger::admin::{self, FenceChange, FenceOutcome, ReclaimEntry, reclaim, set_fence};
use seckill_ledger::read::News;
use seckill_ledger::roles::{Role, isolate, promote, standing};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{
    Cursor, Error, Executed, Fence, LedgerId, Refusal, ReleaseEntry, ReserveOutcome, ShardSet, StateChange,
    add_stock, archive, create_sale, keys, outbox, release, reserve, set_cursor, set_state, update_sale,
};

use crate::support::{Ledger, entry, key, spec, uid};

/// What every script that writes answers to this fence.
async fn every_write(
    conn: &mut MultiplexedConnection,
    fence: &Fence,
    sale: &SaleId,
) -> Vec<(&'static str, Error)> {
    let order: seckill_domain::OrderId = {
        let user = uid("bob");
        let head = seckill_domain::OrderId::head_of(
            seckill_domain::CenterNumber::new(1).unwrap(),
            user.table(),
            0,
            Epoch(1),
        );
        seckill_domain::OrderId::from_parts(head, 3).unwrap()
    };
    let give_back = [ReleaseEntry { order_id: order, uid: uid("bob") }];
    let center_b = seckill_domain::CenterId::new("b").unwrap();
    let cursor = Cursor { id: OutboxId { epoch: 1, seq: 1 }, shards: ShardSet::default() };
    let take_again = [ReclaimEntry {
        order_id: order,
        uid: uid("bob"),
        quantity: seckill_domain::Quantity::ONE,
        key: Default::default(),
    }];
    vec![
        ("reserve", reserve(conn, fence, 0, sale, &[entry("bob", "k9", 1)]).await.unwrap_err()),
        ("release", release(conn, fence, sale, &give_back).await.unwrap_err()),
        ("create", create_sale(conn, fence, &spec("other", 1, 1), &key("x")).await.unwrap_err()),
        ("update", update_sale(conn, fence, &spec("s", 1, 1), 1, false).await.unwrap_err()),
        ("state", set_state(conn, fence, sale, StateChange::Pause).await.unwrap_err()),
        ("stock", add_stock(conn, fence, sale, 1, &key("x")).await.unwrap_err()),
        ("archive", archive(conn, fence, sale, 0, 1).await.unwrap_err()),
        ("barrier", admin::barrier(conn, fence).await.unwrap_err()),
        ("trim", admin::trim(conn, fence, OutboxId { epoch: 9, seq: 9 }).await.unwrap_err()),
        ("cursor", set_cursor(conn, fence, &center_b, cursor).await.unwrap_err()),
        ("reclaim", reclaim(conn, fence, sale, &take_again).await.unwrap_err()),
    ]
}

#[tokio::test]
async fn every_write_with_another_fence_is_refused_and_does_nothing() {
    let mut ledger = Ledger::start().await;
    let lifted = ledger.fence.at(Epoch(5));
    let lift = FenceChange::Lift { from: ledger.fence.clone() };
    assert_eq!(set_fence(&mut ledger.conn, &lift, &lifted).await.unwrap(), FenceOutcome::Set);
    ledger.fence = lifted;
    let sale = ledger.sale("s", 5, 5).await;
    ledger.order(&sale, "bob", "k").await;

    let foreign = Fence { ledger_id: LedgerId::new("another").unwrap(), ..ledger.fence.clone() };
    let elsewhere = Fence { master: CenterId::new("b").unwrap(), ..ledger.fence.clone() };
    let found = ledger.fence.to_string();
    let before = ledger.dump().await;
    for (fence, refusal) in [
        (ledger.fence.at(Epoch(4)), Refusal::StaleEpoch { ledger_epoch: 5 }),
        (elsewhere, Refusal::StaleEpoch { ledger_epoch: 5 }),
        (ledger.fence.at(Epoch(6)), Refusal::FutureEpoch { ledger_epoch: 5 }),
        (ledger.fence.at(Epoch(10)), Refusal::FutureEpoch { ledger_epoch: 5 }),
        (foreign, Refusal::Foreign { found: found.clone() }),
    ] {
        for (what, error) in every_write(&mut ledger.conn, &fence, &sale).await {
            assert!(matches!(&error, Error::Refused(found) if *found == refusal), "{what}: {error:?}");
            assert_eq!(error.executed(), Executed::No);
        }
    }
    assert_eq!(ledger.dump().await, before);

    // Another schema is another ledger, whatever its epoch.
    let schema_2 = found.replacen("1:", "2:", 1);
    ledger.raw(&["SET", "sk:fence", &schema_2]).await;
    let fence = ledger.fence.clone();
    for (what, error) in every_write(&mut ledger.conn, &fence, &sale).await {
        let foreign = Refusal::Foreign { found: schema_2.clone() };
        assert!(matches!(&error, Error::Refused(refusal) if *refusal == foreign), "{what}: {error:?}");
    }
}

#[tokio::test]
async fn an_empty_server_refuses_every_write() {
    let mut ledger = Ledger::start().await;
    ledger.raw(&["FLUSHALL"]).await;
    let sale = SaleId::new("s").unwrap();
    let fence = ledger.fence.clone();
    for (what, error) in every_write(&mut ledger.conn, &fence, &sale).await {
        assert!(matches!(error, Error::Refused(Refusal::NoFence)), "{what}: {error:?}");
    }
    assert!(ledger.dump().await.is_empty());
}

#[tokio::test]
async fn init_makes_a_ledger_of_an_empty_server_only() {
    let mut ledger = Ledger::start().await;
    let fence = ledger.fence.clone();
    let change = |to: &Fence| to.clone();
    let conn = &mut ledger.conn;
    assert_eq!(set_fence(conn, &FenceChange::Init, &fence).await.unwrap(), FenceOutcome::Same);
    let other = change(&fence.at(Epoch(2)));
    assert_eq!(
        set_fence(conn, &FenceChange::Init, &other).await.unwrap(),
        FenceOutcome::Exists { fence: fence.to_string() }
    );
    redis::cmd("DEL").arg("sk:fence").query_async::<()>(conn).await.unwrap();
    assert_eq!(set_fence(conn, &FenceChange::Init, &other).await.unwrap(), FenceOutcome::NotEmpty);
    let page = outbox::read(conn, OutboxId::ZERO, 10).await.unwrap();
    assert_eq!(page.fence, None);
    assert_eq!(page.entries.len(), 1);
    assert_eq!(page.entries[0].event, Ok(outbox::Event::Epoch(fence)));
}

#[tokio::test]
async fn lift_needs_the_expected_fence_and_a_later_epoch() {
    let mut ledger = Ledger::start().await;
    let one = ledger.fence.clone();
    let two = one.at(Epoch(2));
    let conn = &mut ledger.conn;
    let from = |fence: &Fence| FenceChange::Lift { from: fence.clone() };
    assert_eq!(
        set_fence(conn, &from(&two), &one.at(Epoch(3))).await.unwrap(),
        FenceOutcome::Mismatch { found: Some(one.to_string()) }
    );
    assert_eq!(set_fence(conn, &from(&one), &two).await.unwrap(), FenceOutcome::Set);
    assert_eq!(set_fence(conn, &from(&one), &two).await.unwrap(), FenceOutcome::Same);
    let b = Fence { master: CenterId::new("b").unwrap(), ..two.clone() };
    for too_low in [one.clone(), b] {
        assert_eq!(
            set_fence(conn, &from(&two), &too_low).await.unwrap(),
            FenceOutcome::EpochTooLow { last: 2 }
        );
    }
    redis::cmd("DEL").arg("sk:fence").query_async::<()>(conn).await.unwrap();
    assert_eq!(
        set_fence(conn, &from(&two), &one.at(Epoch(3))).await.unwrap(),
        FenceOutcome::Mismatch { found: None }
    );
    assert_eq!(outbox::last_id(conn).await.unwrap(), Some(OutboxId { epoch: 2, seq: 2 }));
}

#[tokio::test]
async fn adopt_takes_whatever_is_there_at_a_later_epoch_and_ids_go_on() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    let before = ledger.order(&sale, "bob", "k1").await;
    let own = Fence { ledger_id: LedgerId::new("mine").unwrap(), ..ledger.fence.clone() };
    let conn = &mut ledger.conn;
    for (epoch, outcome) in [
        (1, FenceOutcome::EpochTooLow { last: 1 }),
        (7, FenceOutcome::Set),
        (7, FenceOutcome::Same),
        (6, FenceOutcome::EpochTooLow { last: 7 }),
    ] {
        assert_eq!(set_fence(conn, &FenceChange::Adopt, &own.at(Epoch(epoch))).await.unwrap(), outcome);
    }
    ledger.fence = own.at(Epoch(7));
    let after = ledger.order(&sale, "bob", "k2").await;
    assert!(after.seq() > before.seq());
    assert_eq!(ledger.buy(&sale, "bob", "k1", 1).await, ReserveOutcome::Replay(before));

    // Without an outbox the fence's epoch still counts, without a fence the outbox's.
    ledger.raw(&["DEL", "sk:outbox"]).await;
    let outcome = set_fence(&mut ledger.conn, &FenceChange::Adopt, &own.at(Epoch(5))).await.unwrap();
    assert_eq!(outcome, FenceOutcome::EpochTooLow { last: 7 });
    set_fence(&mut ledger.conn, &FenceChange::Adopt, &own.at(Epoch(8))).await.unwrap();
    ledger.raw(&["DEL", "sk:fence", "sk:seq"]).await;
    let outcome = set_fence(&mut ledger.conn, &FenceChange::Adopt, &own.at(Epoch(8))).await.unwrap();
    assert_eq!(outcome, FenceOutcome::EpochTooLow { last: 8 });
    set_fence(&mut ledger.conn, &FenceChange::Adopt, &own.at(Epoch(9))).await.unwrap();
    ledger.fence = own.at(Epoch(9));
    assert!(ledger.order(&sale, "bob", "k3").await.seq() > after.seq());
}

#[tokio::test]
async fn an_isolated_server_is_promoted_with_its_fence_in_one_step() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    let order = ledger.order(&sale, "bob", "k").await;
    isolate(&mut ledger.conn).await.unwrap();
    let isolated = standing(&mut ledger.conn).await.unwrap();
    assert!(isolated.role.is_isolated());
    assert_eq!(isolated.fence, Some(ledger.fence.to_string()));
    let refused = ledger.try_reserve(&sale, &[entry("amy", "k", 1)]).await;
    assert!(matches!(refused, Err(Error::ReadOnly)), "{refused:?}");

    let mut own = ledger.server.connect().await;
    let fence = ledger.fence.clone();
    let lift = FenceChange::Lift { from: fence.clone() };
    let next = fence.at(Epoch(2));
    // Not the fence that was expected, or an epoch that is used up: the server stays isolated.
    let before = ledger.dump().await;
    let other = fence.at(Epoch(9)).to_string();
    assert_eq!(promote(&mut own, Some(&other), &lift, &next).await.unwrap(), None);
    assert_eq!(promote(&mut own, None, &FenceChange::Init, &next).await.unwrap(), None);
    let expected = fence.to_string();
    let low = promote(&mut own, Some(&expected), &FenceChange::Adopt, &fence.at(Epoch(0))).await.unwrap();
    assert_eq!(low, Some(FenceOutcome::EpochTooLow { last: 1 }));
    assert!(standing(&mut own).await.unwrap().role.is_isolated());
    assert_eq!(ledger.dump().await, before);

    let promoted = promote(&mut own, Some(&expected), &lift, &next).await.unwrap();
    assert_eq!(promoted, Some(FenceOutcome::Set));
    let now = standing(&mut own).await.unwrap();
    assert!(matches!(now.role, Role::Master { replicas: 0, .. }), "{now:?}");
    assert_eq!((now.fence, now.seq), (Some(next.to_string()), order.seq() + 1));
    assert_eq!(now.run_id, isolated.run_id);
    ledger.fence = next;
    assert_eq!(ledger.buy(&sale, "bob", "k", 1).await, ReserveOutcome::Replay(order));
    ledger.order(&sale, "amy", "k").await;
}

#[tokio::test]
async fn an_empty_isolated_server_is_promoted_by_init() {
    let server = RedisServer::start_with(&[("replicaof", "127.0.0.1 1")]).await;
    let mut conn = server.connect().await;
    let standing_before = standing(&mut conn).await.unwrap();
    assert!(standing_before.role.is_isolated());
    assert_eq!((standing_before.fence, standing_before.seq), (None, 0));
    let fence: Fence = "1:mine:3:a".parse().unwrap();
    let outcome = promote(&mut conn, None, &FenceChange::Init, &fence).await.unwrap();
    assert_eq!(outcome, Some(FenceOutcome::Set));
    assert_eq!(standing(&mut conn).await.unwrap().fence, Some(fence.to_string()));
}

#[tokio::test]
async fn a_fence_that_changes_during_a_promotion_stops_it() {
    // On a master, so that somebody else can change the fence; the WATCH is the same.
    let ledger = Ledger::start().await;
    let mut other = ledger.server.connect().await;
    let expected = ledger.fence.to_string();
    let from = FenceChange::Lift { from: ledger.fence.clone() };
    for round in 0..50 {
        let mut own = ledger.server.connect().await;
        redis::cmd("SET").arg("sk:fence").arg(&expected).query_async::<()>(&mut other).await.unwrap();
        redis::cmd("DEL").arg("sk:outbox").query_async::<()>(&mut other).await.unwrap();
        let two = ledger.fence.at(Epoch(2));
        let three = Fence { master: CenterId::new("b").unwrap(), ..ledger.fence.at(Epoch(3)) };
        // In turn by the script's own check and by WATCH.
        let change = if round % 2 == 0 { &from } else { &FenceChange::Adopt };
        let (promoted, changed) = tokio::join!(
            promote(&mut own, Some(&expected), change, &two),
            set_fence(&mut other, &from, &three)
        );
        match (promoted.unwrap(), changed.unwrap()) {
            (Some(FenceOutcome::Set), FenceOutcome::Mismatch { found }) => {
                assert_eq!(found, Some(two.to_string()));
            }
            (None | Some(FenceOutcome::Mismatch { .. }), FenceOutcome::Set) => {
                let now = standing(&mut own).await.unwrap();
                assert_eq!(now.fence, Some(three.to_string()));
            }
            both => panic!("round {round}: {both:?}"),
        }
    }
}

#[tokio::test]
async fn a_replica_reads_and_refuses_writes() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    let order = ledger.order(&sale, "bob", "k").await;
    let of = format!("127.0.0.1 {}", ledger.server.port());
    let replica = RedisServer::start_with(&[("replicaof", &of), ("repl-diskless-sync-delay", "0")]).await;
    let mut conn = replica.connect().await;
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let page = loop {
        // Syncing: not connected yet, or still loading.
        if let Ok(page) = outbox::read(&mut conn, OutboxId::ZERO, 100).await
            && matches!(&page.role, Role::Replica { link, .. } if link == "connected")
            && page.last_seq == order.seq()
        {
            break page;
        }
        assert!(std::time::Instant::now() < deadline, "the replica does not follow");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    };
    assert_eq!(page.fence, Some(ledger.fence.to_string()));
    assert_eq!(page.entries.len(), 3);
    let found = outbox::find_order(&mut conn, 1, order).await.unwrap().unwrap();
    assert_eq!(found.order_id, order);
    let snapshot = seckill_ledger::read::snapshot(&mut conn, 0, 10).await.unwrap();
    assert_eq!(snapshot.sales.len(), 1);
    for (what, error) in every_write(&mut conn, &ledger.fence, &sale).await {
        assert!(matches!(error, Error::ReadOnly), "{what}: {error:?}");
        assert_eq!(error.executed(), Executed::No);
    }
}

#[tokio::test]
async fn returns_of_stock_and_epochs_are_announced() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    let order = ledger.order(&sale, "bob", "k").await;
    let mut pubsub = ledger.server.client().get_async_pubsub().await.unwrap();
    pubsub.subscribe(keys::NEWS).await.unwrap();
    ledger.release(&sale, &[("bob", order)]).await;
    // Nothing came back, nothing to say.
    ledger.release(&sale, &[("bob", order)]).await;
    add_stock(&mut ledger.conn, &ledger.fence, &sale, 5, &key("x")).await.unwrap();
    add_stock(&mut ledger.conn, &ledger.fence, &sale, 5, &key("x")).await.unwrap();
    let lift = FenceChange::Lift { from: ledger.fence.clone() };
    set_fence(&mut ledger.conn, &lift, &ledger.fence.at(Epoch(2))).await.unwrap();
    let mut news = Vec::new();
    let mut messages = pubsub.on_message();
    while news.len() < 3 {
        let message = tokio::time::timeout(std::time::Duration::from_secs(10), messages.next()).await;
        let text: String = message.expect("an announcement").unwrap().get_payload().unwrap();
        news.push(News::parse(&text).unwrap());
    }
    assert_eq!(
        news,
        [
            News::Returned { epoch: 1, sale_id: sale.clone(), revision: 1 },
            News::Returned { epoch: 1, sale_id: sale.clone(), revision: 2 },
            News::Epoch(2),
        ]
    );
    for odd in ["", "x", "1", "1:", "1:S:1", "1:s:x", ":s:1"] {
        assert_eq!(News::parse(odd), None, "{odd}");
    }
}
