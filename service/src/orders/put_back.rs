//! Orders of a saved tail, put back into the database where they are at home (H6).
//!
//! The tail is what only the lost master's ledger had. Whoever replays it asks the new master for each order's claim
//! first; what became of that is written here, in one transaction. The same call again changes nothing more.

use std::collections::BTreeSet;

use seckill_domain::OrderId;
use seckill_domain::OrderRecord;
use serde::{Deserialize, Serialize};

/// Orders in one call at most, and records: other writes wait while it runs, some 20 ms with SQLite, and 500 of the
/// longest records fit into a call between centers.
pub const MAX_PUT_BACK: usize = 500;
/// Why an order was cancelled whose purchase was lost with its master, as the shop sees it.
pub const ACCEPTED_LOSS: &str = "accepted_loss";

/// What became of the claims of some orders of a tail. All of them belong to shards of the center that is asked,
/// otherwise nothing happens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PutBack {
    /// The ledger holds a claim. Those that were cancelled or expired meanwhile are released again.
    pub held: Vec<OrderId>,
    /// The ledger holds none and has no room for one. Unpaid orders are cancelled, and no release is due for them.
    pub lost: Vec<OrderId>,
    /// The lost master gave their units back. If they are closed, they are released again.
    pub released: Vec<OrderId>,
    /// Orders that the database did not have when it was asked: stored first, unless they are there by now.
    #[serde(with = "records")]
    pub records: Vec<OrderRecord>,
}

impl PutBack {
    /// Every order that it is about, in order.
    pub(super) fn orders(&self) -> BTreeSet<OrderId> {
        let named = self.held.iter().chain(&self.lost).chain(&self.released).copied();
        named.chain(self.records.iter().map(|record| record.order_id)).collect()
    }

    /// Whether it is no longer than a call may be.
    pub fn is_bounded(&self) -> bool {
        self.held.len() + self.lost.len() + self.released.len() <= MAX_PUT_BACK
            && self.records.len() <= MAX_PUT_BACK
    }
}

/// How the orders of a [`PutBack`] stand.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PutBackDone {
    /// Orders that were stored by this call.
    pub inserted: u64,
    /// Lost orders that are cancelled as accepted loss, by this call or an earlier one.
    pub cancelled: u64,
    /// Closed orders whose release waits for the ledger now.
    pub released_again: u64,
    /// Lost orders that are paid. They stay as they are.
    pub paid_without_claim: Vec<OrderId>,
}

/// Records between centers: as in the queue, with the trace context beside them.
mod records {
    use std::borrow::Cow;
    use std::sync::Arc;

    use seckill_domain::{Millis, OrderId, OrderRecord, Quantity, SaleId, SaleTerms, Uid};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Line<'a> {
        order_id: OrderId,
        uid: Cow<'a, Uid>,
        sale_id: Cow<'a, SaleId>,
        quantity: Quantity,
        accepted_at: Millis,
        terms: Cow<'a, SaleTerms>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        traceparent: Option<Cow<'a, str>>,
    }

    pub(super) fn serialize<S: Serializer>(records: &[OrderRecord], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(records.iter().map(|record| Line {
            order_id: record.order_id,
            uid: Cow::Borrowed(&record.uid),
            sale_id: Cow::Borrowed(&record.sale_id),
            quantity: record.quantity,
            accepted_at: record.accepted_at,
            terms: Cow::Borrowed(&record.terms),
            traceparent: record.traceparent.as_deref().map(Cow::Borrowed),
        }))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<OrderRecord>, D::Error> {
        let lines: Vec<Line<'static>> = Vec::deserialize(from)?;
        let record = |line: Line<'_>| OrderRecord {
            order_id: line.order_id,
            uid: line.uid.into_owned(),
            sale_id: line.sale_id.into_owned(),
            quantity: line.quantity,
            terms: Arc::new(line.terms.into_owned()),
            accepted_at: line.accepted_at,
            traceparent: line.traceparent.map(|text| text.into()),
        };
        Ok(lines.into_iter().map(record).collect())
    }
}
