//! What the ledger makes of a server in trouble: restarted, full, damaged, gone.

use redis::AsyncConnectionConfig;
use seckill_domain::{Epoch, OutboxId};
use seckill_ledger::admin::{self, FenceChange, FenceOutcome, set_fence};
use seckill_ledger::read::{scan_claims, snapshot};
use seckill_ledger::roles::{isolate, promote, standing};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{
    Error, Executed, ReleaseOutcome, ReserveOutcome, StateChange, StockOutcome, add_stock, create_sale,
    load_all, outbox, set_state, update_sale,
};

use crate::support::{Ledger, entry, key, spec};

#[tokio::test]
async fn a_server_that_lost_its_scripts_gets_them_again() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    let order = ledger.order(&sale, "bob", "k1").await;
    ledger.raw(&["SCRIPT", "FLUSH"]).await;
    ledger.order(&sale, "bob", "k2").await;

    ledger.server.kill();
    ledger.server.restart().await;
    ledger.conn = ledger.server.connect().await;
    // What was answered is there: the answer came behind the AOF's fsync.
    assert_eq!(ledger.buy(&sale, "bob", "k1", 1).await, ReserveOutcome::Replay(order));
    ledger.raw(&["SCRIPT", "FLUSH"]).await;
    load_all(&mut ledger.conn).await.unwrap();
    ledger.order(&sale, "bob", "k3").await;
}

/// The keys that a purchase touches, and what must still be as it was when one of them is of the wrong type.
#[tokio::test]
async fn a_key_of_the_wrong_type_stops_a_call_before_anything_counts() {
    for broken in ["sk:fence", "sk:seq", "sk:outbox", "sk:touched", "sk:s:s", "sk:c:s", "sk:k:s"] {
        let mut ledger = Ledger::start().await;
        let sale = ledger.sale("s", 5, 5).await;
        let order = ledger.order(&sale, "bob", "k1").await;
        ledger.raw(&["DEL", broken]).await;
        ledger.raw(&["SADD", broken, "x"]).await;
        let before: Vec<_> = ledger.dump().await.into_iter().filter(|(key, _)| key != "sk:touched").collect();
        let fence = ledger.fence.clone();
        let release_entry = seckill_ledger::ReleaseEntry { order_id: order, uid: crate::support::uid("bob") };
        let reclaim_entry = admin::ReclaimEntry {
            order_id: "1000000010000000077".parse().unwrap(),
            uid: crate::support::uid("amy"),
            quantity: seckill_domain::Quantity::ONE,
            key: Default::default(),
        };
        let conn = &mut ledger.conn;
        let answers = [
            (
                "reserve",
                seckill_ledger::reserve(conn, &fence, 0, &sale, &[entry("amy", "k", 1)]).await.map(drop),
            ),
            ("release", seckill_ledger::release(conn, &fence, &sale, &[release_entry]).await.map(drop)),
            ("update", update_sale(conn, &fence, &spec("s", 5, 4), 1, false).await.map(drop)),
            ("state", set_state(conn, &fence, &sale, StateChange::Pause).await.map(drop)),
            ("stock", add_stock(conn, &fence, &sale, 1, &key("x")).await.map(drop)),
            ("reclaim", admin::reclaim(conn, &fence, &sale, &[reclaim_entry]).await.map(drop)),
        ];
        let touches = |what: &str| match broken {
            "sk:c:s" => ["reserve", "release", "reclaim"].contains(&what),
            "sk:k:s" => what == "stock",
            _ => true,
        };
        if broken != "sk:c:s" && broken != "sk:k:s" {
            for (what, answer) in &answers {
                let error = answer.as_ref().expect_err(what);
                assert_eq!(error.executed(), Executed::No, "{broken}, {what}: {error:?}");
                let typed = matches!(error, Error::Damaged(_))
                    || (broken == "sk:fence" && matches!(error, Error::Refused(_)));
                assert!(typed, "{broken}, {what}: {error:?}");
            }
            let after: Vec<_> =
                ledger.dump().await.into_iter().filter(|(key, _)| key != "sk:touched").collect();
            assert_eq!(after, before, "{broken}");
        } else {
            for (what, answer) in &answers {
                let damaged = matches!(answer, Err(Error::Damaged(_)));
                assert_eq!(damaged, touches(what), "{broken}, {what}: {answer:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_sale_that_lacks_a_field_is_damaged_not_half_sold() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    ledger.order(&sale, "bob", "k1").await;
    for field in ["starts", "limit", "remaining", "claimed", "accepted", "revision", "terms"] {
        let value = ledger.raw(&["HGET", "sk:s:s", field]).await;
        let value: String = redis::from_redis_value(value).unwrap();
        ledger.raw(&["HDEL", "sk:s:s", field]).await;
        let before = ledger.dump().await;
        let refused = ledger.try_reserve(&sale, &[entry("amy", "k", 1)]).await;
        assert!(matches!(refused, Err(Error::Damaged(_))), "{field}: {refused:?}");
        assert_eq!(ledger.dump().await, before, "{field}");
        ledger.raw(&["HSET", "sk:s:s", field, &value]).await;
    }
    ledger.order(&sale, "amy", "k").await;
}

#[tokio::test]
async fn a_full_ledger_sells_nothing_but_takes_returns() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    let order = ledger.order(&sale, "bob", "k1").await;
    ledger.server.config_set("maxmemory", "1").await;
    let fence = ledger.fence.clone();
    let full = ledger.try_reserve(&sale, &[entry("amy", "k", 1)]).await.unwrap_err();
    assert!(matches!(full, Error::Full), "{full:?}");
    assert_eq!(full.executed(), Executed::No);
    let full = create_sale(&mut ledger.conn, &fence, &spec("t", 1, 1), &key("t")).await.unwrap_err();
    assert!(matches!(full, Error::Full), "{full:?}");

    assert_eq!(ledger.release(&sale, &[("bob", order)]).await, [ReleaseOutcome::Released]);
    set_state(&mut ledger.conn, &fence, &sale, StateChange::Pause).await.unwrap();
    let stock = add_stock(&mut ledger.conn, &fence, &sale, -1, &key("x")).await.unwrap();
    assert!(matches!(stock, StockOutcome::Changed { total: 4, .. }), "{stock:?}");
    admin::barrier(&mut ledger.conn, &fence).await.unwrap();
    admin::trim(&mut ledger.conn, &fence, OutboxId { epoch: 1, seq: 2 }).await.unwrap();
    // Everything can still be read, or nobody could make room.
    let page = outbox::read(&mut ledger.conn, OutboxId::ZERO, 100).await.unwrap();
    assert_eq!((page.entries.len(), page.last_seq, page.fence), (6, 6, Some(fence.to_string())));
    assert_eq!(ledger.row(&sale).await.total, 4);
    assert_eq!(snapshot(&mut ledger.conn, 0, 10).await.unwrap().sales.len(), 1);
    assert_eq!(scan_claims(&mut ledger.conn, &sale, 0, 10).await.unwrap().1.len(), 1);
    assert_eq!(standing(&mut ledger.conn).await.unwrap().seq, 6);
    let next = fence.at(Epoch(2));
    let lift = FenceChange::Lift { from: fence };
    assert_eq!(set_fence(&mut ledger.conn, &lift, &next).await.unwrap(), FenceOutcome::Set);

    ledger.server.config_set("maxmemory", "0").await;
    ledger.fence = next;
    set_state(&mut ledger.conn, &ledger.fence, &sale, StateChange::Resume).await.unwrap();
    ledger.order(&sale, "amy", "k").await;
}

#[tokio::test]
async fn a_full_ledger_can_be_promoted() {
    let ledger = Ledger::start().await;
    let fence = ledger.fence.clone();
    let mut conn = ledger.server.connect().await;
    ledger.server.config_set("maxmemory", "1").await;
    // On a master already: nothing to promote, only the fence to lift.
    let expected = fence.to_string();
    let two = fence.at(Epoch(2));
    let lift = FenceChange::Lift { from: fence.clone() };
    let outcome = promote(&mut conn, Some(&expected), &lift, &two).await.unwrap();
    assert_eq!(outcome, Some(FenceOutcome::Set));

    isolate(&mut conn).await.unwrap();
    let three = fence.at(Epoch(3));
    let lift = FenceChange::Lift { from: two.clone() };
    let outcome = promote(&mut conn, Some(&two.to_string()), &lift, &three).await.unwrap();
    assert_eq!(outcome, Some(FenceOutcome::Set));
    let now = standing(&mut conn).await.unwrap();
    assert!(!now.role.is_isolated());
    assert_eq!(now.fence, Some(three.to_string()));
}

#[tokio::test]
async fn a_server_that_does_not_answer_leaves_the_outcome_open() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    ledger.order(&sale, "bob", "k1").await;
    let config =
        AsyncConnectionConfig::new().set_response_timeout(Some(std::time::Duration::from_millis(100)));
    let mut impatient =
        ledger.server.client().get_multiplexed_async_connection_with_config(&config).await.unwrap();
    // Holds writes back, as a stopped process would.
    ledger.raw(&["CLIENT", "PAUSE", "60000", "WRITE"]).await;
    let lost =
        seckill_ledger::reserve(&mut impatient, &ledger.fence, 0, &sale, &[entry("amy", "k", 1)]).await;
    let lost = lost.unwrap_err();
    assert!(matches!(lost, Error::NoAnswer(_)), "{lost:?}");
    assert_eq!(lost.executed(), Executed::Unknown);
    ledger.raw(&["CLIENT", "UNPAUSE"]).await;
    // It may have happened; the same key tells. Here it did, or does now: one order in either case.
    let order = match ledger.buy(&sale, "amy", "k", 1).await {
        ReserveOutcome::Accepted(order) | ReserveOutcome::Replay(order) => order,
        other => panic!("{other:?}"),
    };
    assert_eq!(ledger.buy(&sale, "amy", "k", 1).await, ReserveOutcome::Replay(order));
    assert_eq!(ledger.row(&sale).await.claimed, 2);

    // A connection that breaks: open too.
    ledger.server.kill();
    let broken = ledger.try_reserve(&sale, &[entry("eve", "k", 1)]).await.unwrap_err();
    assert_eq!(broken.executed(), Executed::Unknown, "{broken:?}");
    // A connection that was never made carried nothing.
    let refused = ledger.server.client().get_multiplexed_async_connection().await.map(drop).unwrap_err();
    let refused = Error::from(refused);
    assert_eq!(refused.executed(), Executed::No, "{refused:?}");
}

#[tokio::test]
async fn a_server_that_is_misconfigured_or_closed_is_a_rejection() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 5).await;
    let closed = RedisServer::start().await;
    closed.config_set("requirepass", "secret").await;
    let client = closed.client();
    let error = match client.get_multiplexed_async_connection().await {
        Err(error) => Error::from(error),
        Ok(mut conn) => admin::barrier(&mut conn, &ledger.fence).await.unwrap_err(),
    };
    assert!(matches!(error, Error::Rejected(_)), "{error:?}");
    assert_eq!(error.executed(), Executed::No);

    ledger.raw(&["CONFIG", "SET", "min-replicas-to-write", "1"]).await;
    let error = ledger.try_reserve(&sale, &[entry("bob", "k", 1)]).await.unwrap_err();
    assert!(matches!(error, Error::Rejected(_)), "{error:?}");
    assert_eq!(error.executed(), Executed::No);
}
