//! The order databases of all centers: this one's own, the others' over the cross-center API.
//!
//! Trimming the outbox, archiving a sale and the audit are about everybody's orders, and each center's database
//! holds its own.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use seckill_domain::{CenterId, OrderId, OrderStatus, OutboxId, SaleId, Table};

use super::error::Error;
use super::put_back::{PutBack, PutBackDone};
use super::store::{AuditOrder, OrderStore};
use crate::cross_center::calls::{
    AUDIT_ORDERS, AUDIT_QUEUE, AUDIT_ROWS, AUDIT_UNREADABLE, AuditOrdersAnswer, AuditOrdersCall,
    AuditQueueAnswer, AuditRowsAnswer, AuditRowsCall, AuditUnreadableAnswer, MAX_AUDIT_ROWS, OUTBOX,
    OutboxAnswer, RESTORE, SALE, SaleAnswer, SaleCall, UnreadableRow,
};
use crate::cross_center::{CallError, CrossCenter};
use crate::topology::TopologyHandle;

/// How long a center may take to say how far it is.
const POSITION_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a center may take for a page of rows, or to count a sale's orders.
const ROWS_TIMEOUT: Duration = Duration::from_secs(30);
/// Tables read in one call at most, so that an empty database answers soon, too.
const TABLES: u16 = 128;
/// Of an unreadable row's id or reason this much is told, characters.
const MAX_TOLD: usize = 200;
/// Unreadable entries that are told one by one.
const TOLD: u32 = 100;

/// Why a center's order database did not tell.
#[derive(Debug, thiserror::Error)]
pub enum Untold {
    /// This center's own database did not answer.
    #[error(transparent)]
    Own(#[from] Error),
    /// Another center did not answer.
    #[error("center {center}: {error}")]
    Other {
        /// Which.
        center: CenterId,
        /// Why.
        error: CallError,
    },
}

/// The way to every center's order database.
#[derive(Debug, Clone)]
pub struct OrderCenters {
    store: OrderStore,
    /// Absent where there is one center.
    others: Option<Others>,
}

#[derive(Debug, Clone)]
struct Others {
    own: CenterId,
    topology: TopologyHandle,
    cross: Option<CrossCenter>,
}

/// Who is at home where, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Homes {
    /// The centers; with one center that is not named, one entry without a name.
    pub centers: Vec<Option<CenterId>>,
    /// For each shard the place of its center among [`Homes::centers`].
    shards: Vec<usize>,
}

impl Homes {
    /// The place of the center that has a table's orders.
    pub fn of(&self, table: Table) -> usize {
        self.shards.get(usize::from(table.shard().number())).copied().unwrap_or(0)
    }

    /// Whether any user is at home there.
    pub fn is_used(&self, center: usize) -> bool {
        self.shards.contains(&center)
    }
}

impl OrderCenters {
    /// One center, whose database this is.
    pub fn alone(store: OrderStore) -> OrderCenters {
        OrderCenters { store, others: None }
    }

    /// The centers of the topology. Without a way to others these do not answer.
    pub fn new(
        own: CenterId,
        store: OrderStore,
        topology: TopologyHandle,
        cross: Option<CrossCenter>,
    ) -> OrderCenters {
        OrderCenters { store, others: Some(Others { own, topology, cross }) }
    }

    /// This center's own database.
    pub fn own(&self) -> &OrderStore {
        &self.store
    }

    /// Who is at home where now. This center's own place has no name.
    pub fn homes(&self) -> Homes {
        let Some(others) = &self.others else {
            return Homes { centers: vec![None], shards: vec![0; usize::from(seckill_domain::SHARDS)] };
        };
        let topology = others.topology.current();
        let ids: Vec<&CenterId> = topology.centers.keys().collect();
        let centers = ids.iter().map(|id| (**id != others.own).then(|| (*id).clone())).collect();
        let place = |owner: &CenterId| ids.iter().position(|id| *id == owner).unwrap_or(0);
        Homes { centers, shards: topology.shard_owners.iter().map(place).collect() }
    }

    /// Asks another center.
    async fn ask<Q, A>(
        &self,
        center: &CenterId,
        path: &'static str,
        question: &Q,
        timeout: Duration,
    ) -> Result<A, Untold>
    where
        Q: serde::Serialize + Sync,
        A: serde::de::DeserializeOwned,
    {
        let untold = |error| Untold::Other { center: center.clone(), error };
        let Some(cross) = self.others.as_ref().and_then(|others| others.cross.as_ref()) else {
            let text = "cross_center.keys has no key of this center to sign with";
            return Err(untold(CallError::NotExecuted(text.to_owned())));
        };
        cross.call(center, path, question, timeout).await.map_err(untold)
    }

    /// Up to where a center has stored a partition's outbox.
    pub async fn position(&self, center: Option<&CenterId>, partition: u8) -> Result<OutboxId, Untold> {
        let Some(center) = center else { return Ok(self.store.position(partition).await?) };
        let answer: OutboxAnswer = self.ask(center, OUTBOX, &serde_json::json!({}), POSITION_TIMEOUT).await?;
        let stored = answer.stored.into_iter().find(|(of, _)| *of == partition);
        Ok(stored.map_or(OutboxId::ZERO, |(_, position)| position))
    }

    /// How another center's Kafka queue stands.
    pub async fn queue(&self, center: &CenterId) -> Result<AuditQueueAnswer, Untold> {
        self.ask(center, AUDIT_QUEUE, &serde_json::json!({}), POSITION_TIMEOUT).await
    }

    /// Whether this center's own position counts when the outbox is trimmed: where nobody is at home, nothing has to be
    /// stored, unless `all` centers store what they read.
    pub fn own_counts(&self, all: bool) -> bool {
        let homes = self.homes();
        let own = homes.centers.iter().position(Option::is_none);
        all || own.is_none_or(|own| homes.is_used(own))
    }

    /// Up to where every other center has stored a partition's outbox; none if there is no other one. Centers where
    /// nobody is at home count only where `all` asks for it.
    pub async fn others_position(&self, partition: u8, all: bool) -> Result<Option<OutboxId>, Untold> {
        let homes = self.homes();
        let mut lowest = None;
        for (place, center) in homes.centers.iter().enumerate() {
            let Some(center) = center.as_ref().filter(|_| all || homes.is_used(place)) else { continue };
            let position = self.position(Some(center), partition).await?;
            lowest = Some(lowest.map_or(position, |lowest: OutboxId| lowest.min(position)));
        }
        Ok(lowest)
    }

    /// What a center holds of a sale.
    pub async fn sale(&self, center: Option<&CenterId>, sale_id: &SaleId) -> Result<SaleAnswer, Untold> {
        match center {
            None => Ok(sale(&self.store, sale_id).await?),
            Some(center) => {
                let call = SaleCall { sale_id: sale_id.clone() };
                self.ask(center, SALE, &call, ROWS_TIMEOUT).await
            }
        }
    }

    /// A page of a center's order tables.
    pub async fn rows(
        &self,
        center: Option<&CenterId>,
        call: &AuditRowsCall,
    ) -> Result<AuditRowsAnswer, Untold> {
        match center {
            None => Ok(rows(&self.store, call).await?),
            Some(center) => self.ask(center, AUDIT_ROWS, call, ROWS_TIMEOUT).await,
        }
    }

    /// Those of these orders, at most [`MAX_AUDIT_ORDERS`](crate::cross_center::calls::MAX_AUDIT_ORDERS), that a
    /// center has stored, and those whose units wait to be given back. The orders are read first.
    pub async fn orders(
        &self,
        center: Option<&CenterId>,
        orders: &[OrderId],
    ) -> Result<AuditOrdersAnswer, Untold> {
        match center {
            None => Ok(some_orders(&self.store, orders).await?),
            Some(center) => {
                let call = AuditOrdersCall { orders: orders.to_vec() };
                self.ask(center, AUDIT_ORDERS, &call, ROWS_TIMEOUT).await
            }
        }
    }

    /// Writes down in a center's database what became of orders of a saved tail (H6): see
    /// [`OrderStore::put_back`]. At most [`MAX_PUT_BACK`](super::MAX_PUT_BACK) orders, all at home in that center.
    pub async fn put_back(&self, center: Option<&CenterId>, call: PutBack) -> Result<PutBackDone, Untold> {
        match center {
            None => Ok(self.store.put_back(call).await?),
            Some(center) => self.ask(center, RESTORE, &call, ROWS_TIMEOUT).await,
        }
    }

    /// The entries that a center could not read and has set aside.
    pub async fn unreadable(&self, center: Option<&CenterId>) -> Result<AuditUnreadableAnswer, Untold> {
        match center {
            None => Ok(set_aside(&self.store).await?),
            Some(center) => self.ask(center, AUDIT_UNREADABLE, &serde_json::json!({}), ROWS_TIMEOUT).await,
        }
    }
}

impl std::fmt::Debug for OrderStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OrderStore").finish_non_exhaustive()
    }
}

/// What a database holds of a sale.
pub(crate) async fn sale(store: &OrderStore, sale_id: &SaleId) -> Result<SaleAnswer, Error> {
    let counts = store.counts(Some(sale_id)).await?;
    let sale = counts.sales.get(sale_id);
    Ok(SaleAnswer {
        stored: counts.positions,
        open: sale.map_or(0, |sale| sale.of(OrderStatus::Created).orders),
        releasing: sale.map_or(0, |sale| sale.releasing.orders),
    })
}

/// Reads on from a place in the order tables, over the ends of tables.
pub(crate) async fn rows(store: &OrderStore, call: &AuditRowsCall) -> Result<AuditRowsAnswer, Error> {
    let mut answer = AuditRowsAnswer { copies: store.may_hold_copies(), ..AuditRowsAnswer::default() };
    let mut left = MAX_AUDIT_ROWS;
    let mut after = call.after.as_str();
    let end = call.until.min(call.from.saturating_add(TABLES));
    for (number, table) in (call.from..end).filter_map(|number| Some((number, Table::new(number)?))) {
        let found = store.audit_rows(table, after, call.sale_id.as_ref(), left).await?;
        after = "";
        left -= (found.orders.len() + found.unreadable.len()) as u32;
        if !found.orders.is_empty() {
            answer.tables.push((number, found.orders));
        }
        answer.unreadable.extend(found.unreadable.into_iter().map(|row| UnreadableRow {
            table: number,
            order_id: row.order_id.chars().take(MAX_TOLD).collect(),
            reason: row.reason.chars().take(MAX_TOLD).collect(),
        }));
        // A page that is full says where to go on.
        if let Some(next) = found.next {
            answer.next = Some((number, next));
            return Ok(answer);
        }
    }
    if end < call.until {
        answer.next = Some((end, String::new()));
    }
    Ok(answer)
}

/// Some orders, and which of them wait for the ledger.
pub(crate) async fn some_orders(store: &OrderStore, ids: &[OrderId]) -> Result<AuditOrdersAnswer, Error> {
    let orders: Vec<AuditOrder> = store.audit_orders(ids).await?;
    let releasing: HashSet<OrderId> = store.awaiting_release(ids).await?;
    let releasing: BTreeSet<OrderId> = releasing.into_iter().collect();
    Ok(AuditOrdersAnswer { orders, releasing: releasing.into_iter().collect() })
}

/// What was set aside: how much, and the newest of it.
pub(crate) async fn set_aside(store: &OrderStore) -> Result<AuditUnreadableAnswer, Error> {
    let page = store.unreadable(TOLD, None).await?;
    let told = |text: String| -> String { text.chars().take(MAX_TOLD).collect() };
    let entries: Vec<(String, String)> =
        page.items.into_iter().map(|entry| (entry.origin.to_string(), told(entry.reason))).collect();
    let mut count = entries.len() as u64;
    let mut next = page.next;
    while let Some(cursor) = next {
        let page = store.unreadable(1000, Some(cursor)).await?;
        count += page.items.len() as u64;
        next = page.next;
    }
    Ok(AuditUnreadableAnswer { count, entries })
}
