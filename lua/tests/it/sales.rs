//! Sales: creating, changing, stock, snapshots, archiving, and what an adopted ledger claims again.

use seckill_domain::{CenterNumber, Epoch, LedgerState, Millis, OrderId, Quantity, SaleId};
use seckill_ledger::admin::{ReclaimEntry, ReclaimOutcome, reclaim};
use seckill_ledger::read::{Claim, scan_claims, snapshot};
use seckill_ledger::{
    ArchiveOutcome, CreateOutcome, MAX_TOTAL, ReleaseOutcome, ReserveOutcome, StateChange, StateOutcome,
    StockOutcome, UpdateOutcome, add_stock, archive, create_sale, set_state, update_sale,
};

use crate::support::{Ledger, key, spec, uid};

fn nowhere() -> SaleId {
    SaleId::new("nowhere").unwrap()
}

#[tokio::test]
async fn a_sale_is_created_once_and_read_back() {
    let mut ledger = Ledger::start().await;
    let mut body = spec("s", 1_000_000_000, 3);
    body.ends_at = Some(Millis(4_000_000_000_000));
    body.reference = Some("sku \u{2713}".to_owned());
    let sale = ledger.create(&body).await;
    let row = ledger.row(&sale).await;
    assert_eq!(row.spec, body);
    assert_eq!(
        (row.state, row.ends_at, row.version, row.revision),
        (LedgerState::Active, body.ends_at, 1, 0)
    );
    assert_eq!((row.total, row.remaining, row.claimed, row.released), (1_000_000_000, 1_000_000_000, 0, 0));
    assert!(row.starts_at.0 > 1_700_000_000_000, "{:?}", row.starts_at);
    let before = ledger.dump().await;
    let fence = ledger.fence.clone();
    let same = create_sale(&mut ledger.conn, &fence, &body, &key("body")).await.unwrap();
    assert_eq!(same, CreateOutcome::Same { version: 1 });
    let exists = create_sale(&mut ledger.conn, &fence, &body, &key("another-body")).await.unwrap();
    assert_eq!(exists, CreateOutcome::Exists);
    assert_eq!(ledger.dump().await, before);
    assert_eq!(seckill_ledger::read::sale(&mut ledger.conn, &nowhere()).await.unwrap(), None);
}

#[tokio::test]
async fn an_update_needs_the_version_it_was_based_on() {
    let mut ledger = Ledger::start().await;
    let mut body = spec("s", 10, 3);
    body.starts_at = Some(Millis(4_000_000_000_000));
    let sale = ledger.create(&body).await;
    let fence = ledger.fence.clone();
    body.per_user_limit = 5;
    let conn = &mut ledger.conn;
    assert_eq!(
        update_sale(conn, &fence, &body, 2, true).await.unwrap(),
        UpdateOutcome::OtherVersion { version: 1 }
    );
    assert_eq!(
        update_sale(conn, &fence, &body, 1, true).await.unwrap(),
        UpdateOutcome::Updated { version: 2 }
    );
    let mut other = body.clone();
    other.sale_id = nowhere();
    assert_eq!(update_sale(conn, &fence, &other, 1, true).await.unwrap(), UpdateOutcome::NotFound);
    assert_eq!(ledger.row(&sale).await.spec, body);

    ledger.set_clock(4_000_000_000_000).await;
    let conn = &mut ledger.conn;
    assert_eq!(update_sale(conn, &fence, &body, 2, true).await.unwrap(), UpdateOutcome::Started);
    assert_eq!(
        update_sale(conn, &fence, &body, 2, false).await.unwrap(),
        UpdateOutcome::Updated { version: 3 }
    );
    set_state(conn, &fence, &sale, StateChange::End).await.unwrap();
    assert_eq!(update_sale(conn, &fence, &body, 4, false).await.unwrap(), UpdateOutcome::Ended);
}

#[tokio::test]
async fn an_open_start_stays_where_it_was_when_the_sale_changes() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 10, 3).await;
    let starts_at = ledger.row(&sale).await.starts_at;
    update_sale(&mut ledger.conn, &ledger.fence, &spec("s", 10, 4), 1, false).await.unwrap();
    assert_eq!(ledger.row(&sale).await.starts_at, starts_at);
}

#[tokio::test]
async fn an_ended_sale_is_over_for_good() {
    let mut ledger = Ledger::start().await;
    let mut body = spec("s", 10, 3);
    body.starts_at = Some(Millis(4_000_000_000_000));
    body.ends_at = Some(Millis(4_000_000_100_000));
    let sale = ledger.create(&body).await;
    let fence = ledger.fence.clone();
    let conn = &mut ledger.conn;
    for (change, outcome) in [
        (StateChange::End, StateOutcome::Changed { version: 2 }),
        (StateChange::End, StateOutcome::Same { version: 2 }),
        (StateChange::Resume, StateOutcome::Ended),
        (StateChange::Pause, StateOutcome::Ended),
    ] {
        assert_eq!(set_state(conn, &fence, &sale, change).await.unwrap(), outcome);
    }
    let missing = set_state(conn, &fence, &nowhere(), StateChange::End).await.unwrap();
    assert_eq!(missing, StateOutcome::NotFound);
    // Over before its start: said as over.
    assert_eq!(ledger.buy(&sale, "bob", "k", 1).await, ReserveOutcome::Ended);
    let row = ledger.row(&sale).await;
    assert!(row.ends_at.unwrap() < Millis(4_000_000_000_000));
}

#[tokio::test]
async fn a_stock_change_happens_once_for_each_key_and_never_below_what_is_claimed() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 3, 3).await;
    ledger.order(&sale, "bob", "k").await;
    let fence = ledger.fence.clone();
    let conn = &mut ledger.conn;
    let done =
        |total, remaining, version, replayed| StockOutcome::Changed { total, remaining, version, replayed };
    for (delta, name, outcome) in [
        (5, "a", done(8, 7, 2, false)),
        (5, "a", done(8, 7, 2, true)),
        (6, "a", StockOutcome::KeyReused),
        (-5, "a", StockOutcome::KeyReused),
        (-8, "b", StockOutcome::BelowClaimed { remaining: 7 }),
        (-7, "b", done(1, 0, 3, false)),
        (-7, "b", done(1, 0, 3, true)),
        (5, "a", done(8, 7, 2, true)),
        (i64::MIN, "c", StockOutcome::BelowClaimed { remaining: 0 }),
        (i64::MAX, "c", StockOutcome::TooLarge),
        (MAX_TOTAL as i64, "c", StockOutcome::TooLarge),
        (MAX_TOTAL as i64 - 1, "c", done(MAX_TOTAL, MAX_TOTAL - 1, 4, false)),
        (MAX_TOTAL as i64 - 1, "c", done(MAX_TOTAL, MAX_TOTAL - 1, 4, true)),
    ] {
        assert_eq!(
            add_stock(conn, &fence, &sale, delta, &key(name)).await.unwrap(),
            outcome,
            "{delta} {name}"
        );
    }
    assert_eq!(add_stock(conn, &fence, &nowhere(), 1, &key("a")).await.unwrap(), StockOutcome::NotFound);
    let row = ledger.row(&sale).await;
    assert_eq!((row.total, row.remaining, row.claimed, row.revision), (MAX_TOTAL, MAX_TOTAL - 1, 1, 3));
    assert!(matches!(ledger.buy(&sale, "amy", "k", 1).await, ReserveOutcome::Accepted(_)));
    let conn = &mut ledger.conn;
    set_state(conn, &fence, &sale, StateChange::End).await.unwrap();
    assert_eq!(add_stock(conn, &fence, &sale, 1, &key("z")).await.unwrap(), StockOutcome::Ended);
    assert_eq!(add_stock(conn, &fence, &sale, 5, &key("a")).await.unwrap(), done(8, 7, 2, true));
}

#[tokio::test]
async fn stock_changes_of_a_sale_are_bounded() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 3, 3).await;
    let fill = "for i = 1, 100000 do redis.call('HSET', KEYS[1], i, '1 1 1 1') end";
    ledger.raw(&["EVAL", fill, "1", "sk:k:s"]).await;
    let outcome = add_stock(&mut ledger.conn, &ledger.fence, &sale, 1, &key("a")).await.unwrap();
    assert_eq!(outcome, StockOutcome::TooMany);
}

#[tokio::test]
async fn snapshots_show_what_changed_since_a_sequence_page_by_page() {
    let mut ledger = Ledger::start().await;
    for n in 0..7 {
        ledger.sale(&format!("s{n}"), 5, 5).await;
    }
    let first = SaleId::new("s0").unwrap();
    ledger.order(&first, "bob", "k").await;
    let mut seen = Vec::new();
    let mut since = 0;
    loop {
        let page = snapshot(&mut ledger.conn, since, 3).await.unwrap();
        assert_eq!(page.fence, Some(ledger.fence.to_string()));
        assert!(page.unreadable.is_empty());
        assert!(page.clock <= page.taken_at);
        let full = page.sales.len() == 3;
        for sale in page.sales {
            assert!(sale.touched > since);
            since = sale.touched;
            seen.push(sale.spec.sale_id.to_string());
        }
        if !full {
            assert_eq!(page.seq, since);
            break;
        }
    }
    assert_eq!(seen, ["s1", "s2", "s3", "s4", "s5", "s6", "s0"]);
    assert!(snapshot(&mut ledger.conn, since, 3).await.unwrap().sales.is_empty());

    // One that cannot be read hides no other.
    ledger.raw(&["DEL", "sk:s:s1"]).await;
    ledger.raw(&["SADD", "sk:s:s1", "x"]).await;
    ledger.raw(&["HSET", "sk:s:s2", "state", "melted"]).await;
    let page = snapshot(&mut ledger.conn, 0, 100).await.unwrap();
    assert_eq!(page.sales.len(), 5);
    let unreadable: Vec<&str> = page.unreadable.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(unreadable, ["s1", "s2"]);
}

async fn claims(ledger: &mut Ledger, sale: &SaleId) -> Vec<Claim> {
    let (mut cursor, mut all) = (0, Vec::new());
    loop {
        let (next, some) = scan_claims(&mut ledger.conn, sale, cursor, 10).await.unwrap();
        all.extend(some);
        cursor = next;
        if cursor == 0 {
            all.sort_by_key(|claim: &Claim| claim.order_id);
            return all;
        }
    }
}

#[tokio::test]
async fn claims_and_tombstones_can_be_walked() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 1000, 5).await;
    let mut expected = Vec::new();
    for n in 0..300 {
        let user = format!("u{}", n % 200);
        let order_id = ledger.order(&sale, &user, &format!("k{n}")).await;
        let released = n % 3 == 0;
        if released {
            assert_eq!(ledger.release(&sale, &[(&user, order_id)]).await, [ReleaseOutcome::Released]);
        }
        let key = key(&format!("k{n}"));
        expected.push(Claim { uid: uid(&user), order_id, quantity: Quantity::ONE, key, released });
    }
    expected.sort_by_key(|claim| claim.order_id);
    assert_eq!(claims(&mut ledger, &sale).await, expected);
    assert!(claims(&mut ledger, &nowhere()).await.is_empty());
}

#[tokio::test]
async fn a_sale_is_archived_only_when_it_is_over_and_nothing_moves() {
    let mut ledger = Ledger::start().await;
    let end = Millis(4_000_000_000_000);
    let mut body = spec("s", 10, 3);
    body.ends_at = Some(end);
    let sale = ledger.create(&body).await;
    let fence = ledger.fence.clone();
    let order = ledger.order(&sale, "bob", "k").await;
    let touched = ledger.row(&sale).await.touched;
    let conn = &mut ledger.conn;
    assert_eq!(archive(conn, &fence, &nowhere(), 0, 0).await.unwrap(), ArchiveOutcome::NotFound);
    assert_eq!(archive(conn, &fence, &sale, 1000, touched).await.unwrap(), ArchiveOutcome::NotEnded);
    ledger.set_clock(end.0 + 400).await;
    let conn = &mut ledger.conn;
    let window = archive(conn, &fence, &sale, 1000, touched).await.unwrap();
    assert_eq!(window, ArchiveOutcome::RetryWindow { left_ms: 600 });
    ledger.set_clock(end.0 + 1000).await;
    ledger.release(&sale, &[("bob", order)]).await;
    let now = ledger.row(&sale).await.touched;
    let conn = &mut ledger.conn;
    let moved = archive(conn, &fence, &sale, 1000, touched).await.unwrap();
    assert_eq!(moved, ArchiveOutcome::Changed { touched: now });
    add_stock(conn, &fence, &sale, 1, &key("x")).await.unwrap();
    let now = ledger.row(&sale).await.touched;
    assert_eq!(
        archive(&mut ledger.conn, &fence, &sale, 1000, now).await.unwrap(),
        ArchiveOutcome::Archived { version: 3 }
    );
    let row = ledger.row(&sale).await;
    assert_eq!((row.state, row.total, row.remaining, row.claimed), (LedgerState::Archived, 11, 11, 0));
    assert!(claims(&mut ledger, &sale).await.is_empty());
    let conn = &mut ledger.conn;
    assert_eq!(archive(conn, &fence, &sale, 0, 0).await.unwrap(), ArchiveOutcome::Same { version: 3 });
    // To everything else it is gone, but its id stays taken.
    assert_eq!(set_state(conn, &fence, &sale, StateChange::Resume).await.unwrap(), StateOutcome::NotFound);
    assert_eq!(update_sale(conn, &fence, &body, 3, false).await.unwrap(), UpdateOutcome::NotFound);
    assert_eq!(add_stock(conn, &fence, &sale, 1, &key("x")).await.unwrap(), StockOutcome::NotFound);
    let again = create_sale(conn, &fence, &body, &key("other")).await.unwrap();
    assert_eq!(again, CreateOutcome::Exists);
    assert_eq!(ledger.buy(&sale, "bob", "k", 1).await, ReserveOutcome::NotFound);
    assert_eq!(ledger.release(&sale, &[("bob", order)]).await, [ReleaseOutcome::Unknown]);
    let exists = ledger.raw(&["EXISTS", "sk:c:s", "sk:k:s"]).await;
    assert_eq!(exists, redis::Value::Int(0));
}

#[tokio::test]
async fn stored_orders_are_claimed_again_where_stock_and_limit_allow() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 5, 2).await;
    let held = ledger.order(&sale, "bob", "k").await;
    let given_back = ledger.order(&sale, "eve", "k").await;
    ledger.release(&sale, &[("eve", given_back)]).await;
    let entry = |user: &str, seq, units| {
        let head = OrderId::head_of(CenterNumber::new(1).unwrap(), uid(user).table(), 0, Epoch(77));
        ReclaimEntry {
            order_id: OrderId::from_parts(head, seq).unwrap(),
            uid: uid(user),
            quantity: Quantity::new(units).unwrap(),
            key: Default::default(),
        }
    };
    let stored = |user: &str, order_id| ReclaimEntry {
        order_id,
        uid: uid(user),
        quantity: Quantity::ONE,
        key: Default::default(),
    };
    let entries = [
        stored("bob", held),
        stored("eve", given_back),
        entry("bob", 5, 1),
        entry("bob", 5, 1),
        entry("bob", 6, 1),
        entry("amy", 7, 2),
        entry("dan", 8, 2),
        entry("dan", 9, 1),
    ];
    use ReclaimOutcome::{Claimed, Held, Limit, NoSale, NotEnough};
    let outcomes = reclaim(&mut ledger.conn, &ledger.fence, &sale, &entries).await.unwrap();
    assert_eq!(outcomes, [Held, Held, Claimed, Held, Limit, Claimed, NotEnough, Claimed]);
    let row = ledger.row(&sale).await;
    assert_eq!((row.total, row.remaining, row.claimed, row.accepted), (5, 0, 5, 5));
    assert_eq!(row.reclaimed, 3);
    let before = ledger.dump().await;
    let outcomes = reclaim(&mut ledger.conn, &ledger.fence, &sale, &entries[..4]).await.unwrap();
    assert_eq!(outcomes, [Held; 4]);
    let outcomes = reclaim(&mut ledger.conn, &ledger.fence, &nowhere(), &entries[..2]).await.unwrap();
    assert_eq!(outcomes, [NoSale; 2]);
    assert_eq!(ledger.dump().await, before);
    // They are claims like any other.
    assert_eq!(ledger.release(&sale, &[("amy", entries[5].order_id)]).await, [ReleaseOutcome::Released]);
    assert_eq!(ledger.row(&sale).await.remaining, 2);
}

// H6: one order for each key, also when the ledger that knew of the first one is gone.
#[tokio::test]
async fn an_order_is_claimed_again_under_its_key_unless_its_buyer_holds_another_one_under_it() {
    let mut ledger = Ledger::start().await;
    let sale = ledger.sale("s", 9, 5).await;
    let lost = |user: &str, seq, under: &str| {
        let head = OrderId::head_of(CenterNumber::new(1).unwrap(), uid(user).table(), 0, Epoch(77));
        let order_id = OrderId::from_parts(head, seq).unwrap();
        ReclaimEntry { order_id, uid: uid(user), quantity: Quantity::ONE, key: key(under) }
    };
    use ReclaimOutcome::{Claimed, Held, OtherOrder};
    let retried = ledger.order(&sale, "bob", "k").await;
    let again = ledger.order(&sale, "eve", "k").await;
    ledger.release(&sale, &[("eve", again)]).await;
    let entries = [lost("amy", 5, "k"), lost("bob", 6, "k"), lost("eve", 7, "k"), lost("amy", 8, "k")];
    let outcomes = reclaim(&mut ledger.conn, &ledger.fence, &sale, &entries).await.unwrap();
    assert_eq!(outcomes, [Claimed, OtherOrder, Claimed, OtherOrder]);
    let row = ledger.row(&sale).await;
    assert_eq!((row.remaining, row.claimed, row.accepted, row.reclaimed), (6, 3, 4, 2));
    // Each key is answered with the order that it was answered with before.
    assert_eq!(ledger.buy(&sale, "amy", "k", 1).await, ReserveOutcome::Replay(entries[0].order_id));
    assert_eq!(ledger.buy(&sale, "bob", "k", 1).await, ReserveOutcome::Replay(retried));
    assert_eq!(ledger.buy(&sale, "eve", "k", 1).await, ReserveOutcome::Replay(again));
    let before = ledger.dump().await;
    let outcomes = reclaim(&mut ledger.conn, &ledger.fence, &sale, &entries).await.unwrap();
    assert_eq!(outcomes, [Held, OtherOrder, Held, OtherOrder]);
    assert_eq!(ledger.dump().await, before);
    // Once the other one is given back, there is one for the key again.
    ledger.release(&sale, &[("bob", retried)]).await;
    let outcomes = reclaim(&mut ledger.conn, &ledger.fence, &sale, &entries[1..2]).await.unwrap();
    assert_eq!(outcomes, [Claimed]);
}
