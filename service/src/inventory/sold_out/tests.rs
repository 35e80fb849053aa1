//! The marker at its moments (M3): no task runs, each step is made by hand, the ledger is a real one.

use seckill_domain::{KeyDigest, OrderId, SaleSpec};
use seckill_ledger::testkit::{RedisServer, one_unit};
use seckill_ledger::{ReleaseEntry, ReleaseOutcome, ReserveOutcome, create_sale, read, release, reserve};

use super::*;

const TIMEOUT: Duration = Duration::from_secs(20);

struct Shop {
    redis: RedisServer,
    conn: MultiplexedConnection,
    fence: Fence,
    sale: SaleId,
    sold_out: SoldOut,
    follower: Follower,
}

impl Shop {
    /// A sale of one unit, known to a process that has no marker yet.
    async fn open() -> Shop {
        let redis = RedisServer::start().await;
        let fence = redis.init_ledger().await;
        let mut conn = redis.connect().await;
        let spec: SaleSpec = serde_json::from_value(serde_json::json!({
            "sale_id": "s", "kind": "product", "quantity": 1, "price": 100, "currency": "CNY",
        }))
        .unwrap();
        create_sale(&mut conn, &fence, &spec, &KeyDigest::default()).await.unwrap();
        let sold_out = SoldOut {
            armed: AtomicUsize::new(0),
            sales: RwLock::default(),
            hasher: RandomState::new(),
            winners_max: 100,
            work: Notify::new(),
            view: Arc::new(ArcSwap::from_pointee(SalesView::default())),
        };
        let follower = Follower { conn: None, position: None, followed_at: Instant::now() };
        let mut shop = Shop { redis, conn, fence, sale: spec.sale_id, sold_out, follower };
        shop.refresh().await;
        shop
    }

    /// The next snapshot.
    async fn refresh(&mut self) {
        let sale = read::sale(&mut self.conn, &self.sale).await.unwrap().unwrap();
        let at = newest(&mut self.conn).await.unwrap();
        self.sold_out.view.store(Arc::new(SalesView::of_a_test(sale, at)));
    }

    /// The next turn of whoever follows the outbox.
    async fn follow(&mut self) {
        let target = Target::of(self.redis.client(), TIMEOUT);
        self.sold_out.follow(&target, &mut self.follower).await.unwrap();
    }

    /// The ledger's answer, and how its stock stood.
    async fn ask(&mut self, uid: &str) -> (ReserveOutcome, StockMark) {
        let entry = one_unit(uid, Purchase::of_a_test(uid).key);
        let reply = reserve(&mut self.conn, &self.fence, 0, &self.sale, &[entry]).await.unwrap();
        (reply.outcomes.into_iter().next().unwrap(), reply.mark)
    }

    async fn win(&mut self, uid: &str) -> OrderId {
        match self.ask(uid).await.0 {
            ReserveOutcome::Accepted(order_id) => order_id,
            other => panic!("{uid}: {other:?}"),
        }
    }

    async fn lose(&mut self, uid: &str) -> StockMark {
        let (outcome, mark) = self.ask(uid).await;
        assert_eq!(outcome, ReserveOutcome::SoldOut, "{uid}");
        mark
    }

    /// Gives a unit back. What the ledger announces is heard when the test says so.
    async fn give_back(&mut self, uid: &str, order_id: OrderId) -> String {
        let entry = ReleaseEntry { order_id, uid: Uid::new(uid).unwrap() };
        let released = release(&mut self.conn, &self.fence, &self.sale, &[entry]).await.unwrap();
        assert_eq!(released, [ReleaseOutcome::Released]);
        let sale = read::sale(&mut self.conn, &self.sale).await.unwrap().unwrap();
        format!("{}:{}:{}", self.fence.epoch, self.sale, sale.revision)
    }

    fn rejects(&self, uid: &str) -> bool {
        self.sold_out.rejects(&Purchase::of_a_test(uid))
    }
}

/// Who bought after the last look at the outbox is not in the index yet. The marker of a reply that is later than the
/// purchase must not speak before the index has reached that reply.
#[tokio::test]
async fn a_winner_whom_the_index_does_not_know_yet_never_hears_sold_out() {
    let mut shop = Shop::open().await;
    let first = shop.win("first").await;
    let mark = shop.lose("loser").await;
    shop.sold_out.observe(&shop.sale, mark);
    assert!(!shop.rejects("first") && !shop.rejects("loser"), "there is no index yet");
    shop.follow().await;
    assert!(shop.rejects("loser"), "the index has reached the reply");
    assert!(!shop.rejects("first"), "a winner hears sold_out");

    // The unit is sold again. This process hears `SOLD_OUT` before it reads of that.
    let news = shop.give_back("first", first).await;
    shop.sold_out.hear(&news);
    shop.win("second").await;
    let mark = shop.lose("loser").await;
    shop.sold_out.observe(&shop.sale, mark);
    assert!(!shop.rejects("second"), "a winner whom the index does not know yet hears sold_out");
    shop.follow().await;
    assert!(shop.rejects("loser"));
    // Nor does whoever gave a unit back: the same key finds the order.
    assert!(!shop.rejects("second") && !shop.rejects("first"), "a winner hears sold_out");
}

/// A reply that was on its way while stock came back says nothing of it.
#[tokio::test]
async fn a_reply_of_before_stock_came_back_sets_no_marker() {
    let mut shop = Shop::open().await;
    let order = shop.win("first").await;
    let late = shop.lose("loser").await;
    let news = shop.give_back("first", order).await;
    shop.sold_out.hear(&news);
    shop.sold_out.observe(&shop.sale, late);
    shop.follow().await;
    assert!(!shop.rejects("loser"), "a marker that is older than the stock answers");
    shop.win("loser").await;
}

/// An announcement may be lost: then the next snapshot shows that there is stock.
#[tokio::test]
async fn a_snapshot_with_stock_ends_the_marker() {
    let mut shop = Shop::open().await;
    let order = shop.win("first").await;
    let mark = shop.lose("loser").await;
    shop.sold_out.observe(&shop.sale, mark);
    shop.follow().await;
    assert!(shop.rejects("loser"));
    // One from before the reply does not contradict it, though the sale had a unit then.
    shop.sold_out.compare_with_snapshot();
    assert!(shop.rejects("loser"), "an older snapshot ended the marker");
    shop.give_back("first", order).await;
    shop.refresh().await;
    shop.sold_out.compare_with_snapshot();
    assert!(!shop.rejects("loser"), "the marker answers although there is stock");
}
