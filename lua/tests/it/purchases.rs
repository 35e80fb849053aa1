//! What `reserve` and `release` answer, and what they leave behind.

use seckill_domain::{Millis, OrderId, SaleId};
use seckill_ledger::{
    Error, ReleaseOutcome, ReserveOutcome, StateChange, StateOutcome, StockOutcome, UpdateOutcome, add_stock,
    create_sale, set_state, update_sale,
};

use crate::support::{Ledger, entry, key, spec, uid};

use ReserveOutcome::{
    Accepted, Ended, Insufficient, KeyReused, Limit, NotFound, NotStarted, Paused, SoldOut,
};

fn replay_of(order: OrderId) -> ReserveOutcome {
    ReserveOutcome::Replay(order)
}

#[tokio::test]
async fn a_purchase_is_accepted_and_a_retry_gets_the_same_order() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 10, 1).await;
    let order = ledger.order(&sale, "bob", "k1").await;
    assert_eq!(order.table(), uid("bob").table());
    assert_eq!(ledger.buy(&sale, "bob", "k1", 1).await, replay_of(order));
    let row = ledger.row(&sale).await;
    assert_eq!((row.total, row.remaining, row.claimed, row.accepted), (10, 9, 1, 1));
}

#[tokio::test]
async fn duplicates_in_one_batch_behave_as_if_they_came_one_after_the_other() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 4, 2).await;
    let outcomes = ledger
        .reserve(
            &sale,
            &[
                entry("bob", "k1", 1),
                entry("bob", "k1", 1),
                entry("bob", "k1", 2),
                entry("bob", "k2", 1),
                entry("bob", "k3", 1),
                entry("amy", "k1", 2),
                entry("eve", "k1", 1),
                entry("bob", "k2", 1),
                entry("bob", "k3", 1),
            ],
        )
        .await;
    let [Accepted(first), _, _, Accepted(second), _, Accepted(third), ..] = outcomes[..] else {
        panic!("{outcomes:?}");
    };
    assert_eq!(
        outcomes,
        [
            Accepted(first),
            replay_of(first),
            KeyReused,
            Accepted(second),
            Limit,
            Accepted(third),
            SoldOut,
            replay_of(second),
            Limit,
        ]
    );
    assert_eq!((second.seq(), third.seq()), (first.seq() + 1, first.seq() + 2));
}

#[tokio::test]
async fn bob_is_not_bob_in_capitals() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 10, 1).await;
    let bob = ledger.order(&sale, "bob", "k").await;
    let capital = ledger.order(&sale, "Bob", "k").await;
    assert_ne!(bob, capital);
}

#[tokio::test]
async fn the_checks_come_in_the_order_of_the_contract() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 3, 2).await;
    let order = ledger.order(&sale, "bob", "k1").await;
    // LIMIT before SOLD_OUT and INSUFFICIENT.
    assert_eq!(ledger.buy(&sale, "bob", "k2", 3).await, Limit);
    assert_eq!(ledger.buy(&sale, "amy", "k", 2).await, Accepted(order_after(order, "amy", 1)));
    assert_eq!(ledger.buy(&sale, "bob", "k2", 1).await, SoldOut);
    assert_eq!(ledger.buy(&sale, "bob", "k2", 2).await, Limit);

    // A replay and a reused key come before the sale's state, whatever it is; the state before the limit.
    set_state(&mut ledger.conn, &ledger.fence, &sale, StateChange::Pause).await.unwrap();
    assert_eq!(ledger.buy(&sale, "bob", "k1", 1).await, replay_of(order));
    assert_eq!(ledger.buy(&sale, "bob", "k1", 2).await, KeyReused);
    assert_eq!(ledger.buy(&sale, "bob", "k2", 2).await, Paused);
    set_state(&mut ledger.conn, &ledger.fence, &sale, StateChange::End).await.unwrap();
    assert_eq!(ledger.buy(&sale, "bob", "k1", 1).await, replay_of(order));
    assert_eq!(ledger.buy(&sale, "bob", "k2", 2).await, Ended);
    let nowhere = SaleId::new("nowhere").unwrap();
    assert_eq!(ledger.buy(&nowhere, "bob", "k1", 1).await, NotFound);
}

/// The order that the user's purchase becomes when it is the `n`th after `order`.
fn order_after(order: OrderId, user: &str, n: u64) -> OrderId {
    let head = order.head() - u32::from(order.table().number()) * 100_000
        + u32::from(uid(user).table().number()) * 100_000;
    OrderId::from_parts(head, order.seq() + n).unwrap()
}

#[tokio::test]
async fn less_than_asked_is_said_with_what_is_left() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 1_000_000_000, 1_000_000).await;
    let taken = 1_000_000_000 - 5;
    let away = add_stock(&mut ledger.conn, &ledger.fence, &sale, -taken, &key("k")).await.unwrap();
    assert!(matches!(away, StockOutcome::Changed { remaining: 5, .. }), "{away:?}");
    assert_eq!(ledger.buy(&sale, "bob", "k", 6).await, Insufficient { remaining: 5 });
    // The key is free again: only acceptances are remembered.
    assert!(matches!(ledger.buy(&sale, "bob", "k", 5).await, Accepted(_)));
    assert_eq!(ledger.buy(&sale, "amy", "k", 1).await, SoldOut);
}

#[tokio::test]
async fn a_window_opens_and_closes_and_the_start_is_named() {
    let mut ledger = Ledger::start().await;
    let far = Millis(4_000_000_000_123);
    let mut window = spec("s", 10, 5);
    window.starts_at = Some(far);
    window.ends_at = Some(far.plus_ms(1000));
    let sale = ledger.create(&window).await;
    assert_eq!(ledger.buy(&sale, "bob", "k", 1).await, NotStarted { starts_at: far });
    // Paused is said before the window.
    set_state(&mut ledger.conn, &ledger.fence, &sale, StateChange::Pause).await.unwrap();
    assert_eq!(ledger.buy(&sale, "bob", "k", 1).await, Paused);
    set_state(&mut ledger.conn, &ledger.fence, &sale, StateChange::Resume).await.unwrap();

    ledger.set_clock(far.0 - 1).await;
    assert_eq!(ledger.buy(&sale, "bob", "k", 1).await, NotStarted { starts_at: far });
    ledger.set_clock(far.0).await;
    let reply = ledger.try_reserve(&sale, &[entry("bob", "k", 1)]).await.unwrap();
    assert_eq!(reply.now, far);
    assert!(matches!(reply.outcomes[0], Accepted(_)));
    ledger.set_clock(far.0 + 999).await;
    assert!(matches!(ledger.buy(&sale, "amy", "k", 1).await, Accepted(_)));
    ledger.set_clock(far.0 + 1000).await;
    assert_eq!(ledger.buy(&sale, "eve", "k", 1).await, Ended);
    assert!(matches!(ledger.buy(&sale, "amy", "k", 1).await, ReserveOutcome::Replay(_)));

    // The last moment that can be named, and one before 1970.
    let mut window = spec("t", 10, 5);
    window.starts_at = Some(Millis::MAX);
    let sale = ledger.create(&window).await;
    assert_eq!(ledger.buy(&sale, "bob", "k", 1).await, NotStarted { starts_at: Millis::MAX });
    assert_eq!(ledger.row(&sale).await.starts_at, Millis::MAX);
    let mut window = spec("u", 10, 5);
    window.starts_at = Some(Millis(-5));
    let sale = ledger.create(&window).await;
    assert!(matches!(ledger.buy(&sale, "bob", "k", 1).await, Accepted(_)));
}

#[tokio::test]
async fn the_ledgers_time_never_goes_back() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 10, 5).await;
    let ahead = 5_000_000_000_000;
    ledger.set_clock(ahead).await;
    for (n, user) in ["bob", "amy"].into_iter().enumerate() {
        let reply = ledger.try_reserve(&sale, &[entry(user, "k", 1)]).await.unwrap();
        assert_eq!((n, reply.now), (n, Millis(ahead)));
    }
    let beat = seckill_ledger::admin::barrier(&mut ledger.conn, &ledger.fence).await.unwrap();
    assert_eq!(beat, Millis(ahead));
}

#[tokio::test]
async fn a_release_gives_quantity_and_limit_back_once() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 3, 1).await;
    let order = ledger.order(&sale, "bob", "k1").await;
    let other = ledger.order(&sale, "amy", "k1").await;
    assert_eq!(ledger.buy(&sale, "bob", "k2", 1).await, Limit);
    let stranger = order_after(order, "bob", 77);
    assert_eq!(
        ledger
            .release(
                &sale,
                &[("bob", order), ("bob", order), ("bob", stranger), ("eve", other), ("bob", other)]
            )
            .await,
        [
            ReleaseOutcome::Released,
            ReleaseOutcome::AlreadyReleased,
            ReleaseOutcome::Unknown,
            ReleaseOutcome::Unknown,
            ReleaseOutcome::Unknown,
        ]
    );
    let row = ledger.row(&sale).await;
    assert_eq!((row.remaining, row.claimed, row.released, row.revision), (2, 1, 1, 1));
    let before = ledger.dump().await;
    assert_eq!(ledger.release(&sale, &[("bob", order)]).await, [ReleaseOutcome::AlreadyReleased]);
    let nowhere = SaleId::new("nowhere").unwrap();
    assert_eq!(ledger.release(&nowhere, &[("bob", order)]).await, [ReleaseOutcome::Unknown]);
    assert_eq!(ledger.dump().await, before, "a release that changes nothing writes nothing");

    // The tombstone still answers for its key; another key buys again.
    assert_eq!(ledger.buy(&sale, "bob", "k1", 1).await, replay_of(order));
    assert_eq!(ledger.buy(&sale, "bob", "k1", 2).await, KeyReused);
    let again = ledger.order(&sale, "bob", "k2").await;
    assert_eq!(ledger.buy(&sale, "bob", "k3", 1).await, Limit);
    assert_eq!(ledger.release(&sale, &[("bob", again), ("amy", other)]).await, [ReleaseOutcome::Released; 2]);
    let row = ledger.row(&sale).await;
    assert_eq!((row.total, row.remaining, row.claimed, row.released, row.accepted), (3, 3, 0, 3, 3));
}

#[tokio::test]
async fn stock_returns_to_a_sale_that_is_paused_or_over() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 2, 1).await;
    let bob = ledger.order(&sale, "bob", "k").await;
    let amy = ledger.order(&sale, "amy", "k").await;
    set_state(&mut ledger.conn, &ledger.fence, &sale, StateChange::Pause).await.unwrap();
    assert_eq!(ledger.release(&sale, &[("bob", bob)]).await, [ReleaseOutcome::Released]);
    set_state(&mut ledger.conn, &ledger.fence, &sale, StateChange::End).await.unwrap();
    assert_eq!(ledger.release(&sale, &[("amy", amy)]).await, [ReleaseOutcome::Released]);
    let row = ledger.row(&sale).await;
    assert_eq!((row.remaining, row.claimed), (2, 0));
    assert_eq!(ledger.buy(&sale, "amy", "k", 1).await, replay_of(amy));
}

#[tokio::test]
async fn a_user_cannot_grow_without_bound_by_buying_and_giving_back() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 10, 1).await;
    let mut bought = 0;
    loop {
        match ledger.buy(&sale, "bob", &format!("k{bought}"), 1).await {
            Accepted(order) => {
                bought += 1;
                ledger.release(&sale, &[("bob", order)]).await;
            }
            outcome => {
                assert_eq!(outcome, Limit);
                break;
            }
        }
    }
    assert_eq!(bought, 65);
    assert!(matches!(ledger.buy(&sale, "bob", "k0", 1).await, ReserveOutcome::Replay(_)));
}

#[tokio::test]
async fn the_largest_batch_passes_and_numbers_its_orders_in_order() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 2000, 2).await;
    let entries: Vec<_> = (0..seckill_ledger::MAX_BATCH)
        .map(|n| entry(&format!("{n:0>128}"), "k", 1 + (n % 2) as u32))
        .collect();
    let outcomes = ledger.reserve(&sale, &entries).await;
    let mut last = None;
    let mut releases = Vec::new();
    for (entry, outcome) in entries.iter().zip(&outcomes) {
        let Accepted(order) = outcome else { panic!("{outcome:?}") };
        assert!(last.is_none_or(|last| order.seq() == last + 1));
        last = Some(order.seq());
        releases.push((entry.uid.as_str(), *order));
    }
    assert!(
        ledger.release(&sale, &releases).await.iter().all(|outcome| *outcome == ReleaseOutcome::Released)
    );
    assert_eq!(ledger.row(&sale).await.remaining, 2000);
}

#[tokio::test]
async fn ids_do_not_repeat_over_epochs_and_stop_when_the_digits_end() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 100, 100).await;
    let first = ledger.order(&sale, "bob", "k1").await;
    let next = ledger.fence.at(ledger.fence.epoch.next());
    let lift = seckill_ledger::admin::FenceChange::Lift { from: ledger.fence.clone() };
    seckill_ledger::admin::set_fence(&mut ledger.conn, &lift, &next).await.unwrap();
    ledger.fence = next;
    let second = ledger.order(&sale, "bob", "k2").await;
    assert!(second.seq() > first.seq());
    assert_eq!((first.head() % 10_000, second.head() % 10_000), (1, 2));

    ledger.raw(&["SET", "sk:seq", "9999999997"]).await;
    let last = ledger.order(&sale, "bob", "k3").await;
    assert_eq!(last.seq(), 9_999_999_998);
    assert_eq!(ledger.order(&sale, "bob", "k4").await.seq(), 9_999_999_999);
    let refused = ledger.try_reserve(&sale, &[entry("bob", "k5", 1)]).await;
    assert!(matches!(refused, Err(Error::Rejected(_))), "{refused:?}");
    // Giving back still works: it needs an outbox id, not an order id.
    assert_eq!(ledger.release(&sale, &[("bob", last)]).await, [ReleaseOutcome::Released]);
}

#[tokio::test]
async fn a_lower_limit_counts_for_later_purchases() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 10, 3).await;
    ledger.order(&sale, "bob", "k1").await;
    ledger.order(&sale, "bob", "k2").await;
    let changed = update_sale(&mut ledger.conn, &ledger.fence, &spec("s", 10, 1), 1, false).await.unwrap();
    assert_eq!(changed, UpdateOutcome::Updated { version: 2 });
    assert_eq!(ledger.buy(&sale, "bob", "k3", 1).await, Limit);
    assert!(matches!(ledger.buy(&sale, "amy", "k", 1).await, Accepted(_)));
    assert_eq!(ledger.buy(&sale, "amy", "k2", 1).await, Limit);
}

#[tokio::test]
async fn a_paused_sale_sells_again_when_it_is_resumed() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 10, 3).await;
    for (change, outcome) in [
        (StateChange::Resume, StateOutcome::Same { version: 1 }),
        (StateChange::Pause, StateOutcome::Changed { version: 2 }),
        (StateChange::Pause, StateOutcome::Same { version: 2 }),
        (StateChange::Resume, StateOutcome::Changed { version: 3 }),
    ] {
        assert_eq!(set_state(&mut ledger.conn, &ledger.fence, &sale, change).await.unwrap(), outcome);
    }
    ledger.order(&sale, "bob", "k1").await;
    // Creating it again changes nothing.
    let again = create_sale(&mut ledger.conn, &ledger.fence, &spec("s", 10, 3), &key("body")).await.unwrap();
    assert_eq!(again, seckill_ledger::CreateOutcome::Same { version: 3 });
}
