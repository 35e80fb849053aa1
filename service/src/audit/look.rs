//! Looking at every center's orders. A center that does not answer once is not asked again in the same round: what
//! is at home there is not compared, and the report says so.

use std::collections::{BTreeMap, HashSet};

use seckill_domain::{CenterId, OrderId, OutboxId, Table};

use super::Obstacle;
use crate::cross_center::calls::{AuditRowsAnswer, AuditRowsCall, AuditUnreadableAnswer, MAX_AUDIT_ORDERS};
use crate::orders::{AuditOrder, Homes, OrderCenters, Untold};

/// The order databases of all centers, as one round sees them.
pub(super) struct Look<'a> {
    centers: &'a OrderCenters,
    homes: Homes,
    silent: BTreeMap<usize, String>,
}

impl<'a> Look<'a> {
    pub(super) fn new(centers: &'a OrderCenters) -> Look<'a> {
        Look { centers, homes: centers.homes(), silent: BTreeMap::new() }
    }

    /// The places of all centers.
    pub(super) fn places(&self) -> std::ops::Range<usize> {
        0..self.homes.centers.len()
    }

    /// The place of the center that a table's users are at home in.
    pub(super) fn home(&self, table: Table) -> usize {
        self.homes.of(table)
    }

    /// A center's name, where it is not this one.
    pub(super) fn name(&self, place: usize) -> String {
        match self.center(place) {
            Some(center) => format!("center {center}"),
            None => "this center".to_owned(),
        }
    }

    /// Whether the home of a table's users has answered so far.
    pub(super) fn answers(&self, table: Table) -> bool {
        !self.silent.contains_key(&self.home(table))
    }

    /// Whether every center has answered so far.
    pub(super) fn all_answer(&self) -> bool {
        self.silent.is_empty()
    }

    /// Who is silent, and why.
    pub(super) fn silent(&self) -> impl Iterator<Item = String> + '_ {
        self.silent.values().map(|reason| format!("orders cannot be read: {reason}"))
    }

    /// Whether users are still at home where they were when the round began.
    pub(super) fn stands(&self) -> bool {
        self.homes == self.centers.homes()
    }

    fn center(&self, place: usize) -> Option<&CenterId> {
        self.homes.centers.get(place).and_then(Option::as_ref)
    }

    fn told<T>(&mut self, place: usize, told: Result<T, Untold>) -> Result<Option<T>, Obstacle> {
        match told {
            Ok(told) => Ok(Some(told)),
            Err(Untold::Own(error)) => Err(error.into()),
            Err(untold @ Untold::Other { .. }) => {
                self.silent.insert(place, untold.to_string());
                Ok(None)
            }
        }
    }

    /// Up to where a center has stored a partition's outbox.
    pub(super) async fn position(
        &mut self,
        place: usize,
        partition: u8,
    ) -> Result<Option<OutboxId>, Obstacle> {
        if self.silent.contains_key(&place) {
            return Ok(None);
        }
        let told = self.centers.position(self.center(place), partition).await;
        self.told(place, told)
    }

    /// A page of a center's order tables.
    pub(super) async fn rows(
        &mut self,
        place: usize,
        call: &AuditRowsCall,
    ) -> Result<Option<AuditRowsAnswer>, Obstacle> {
        if self.silent.contains_key(&place) {
            return Ok(None);
        }
        let told = self.centers.rows(self.center(place), call).await;
        self.told(place, told)
    }

    /// Those of these orders that their home centers have stored, and those whose units the ledger has not taken
    /// back yet. Orders are read first.
    pub(super) async fn orders(
        &mut self,
        ids: &[OrderId],
    ) -> Result<(Vec<AuditOrder>, HashSet<OrderId>), Obstacle> {
        let mut by_home: BTreeMap<usize, Vec<OrderId>> = BTreeMap::new();
        for id in ids {
            by_home.entry(self.home(id.table())).or_default().push(*id);
        }
        let (mut orders, mut releasing) = (Vec::with_capacity(ids.len()), HashSet::new());
        for (place, ids) in by_home {
            for chunk in ids.chunks(MAX_AUDIT_ORDERS) {
                if self.silent.contains_key(&place) {
                    break;
                }
                let told = self.centers.orders(self.center(place), chunk).await;
                if let Some(found) = self.told(place, told)? {
                    orders.extend(found.orders);
                    releasing.extend(found.releasing);
                }
            }
        }
        Ok((orders, releasing))
    }

    /// What a center has set aside.
    pub(super) async fn unreadable(
        &mut self,
        place: usize,
    ) -> Result<Option<AuditUnreadableAnswer>, Obstacle> {
        if self.silent.contains_key(&place) {
            return Ok(None);
        }
        let told = self.centers.unreadable(self.center(place)).await;
        self.told(place, told)
    }
}
