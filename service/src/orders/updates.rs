//! Who waits for an order, and how they hear that it moved.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use seckill_domain::OrderId;
use tokio::sync::watch;

/// Orders that can be waited for at the same time: about 200 bytes each.
const MAX_WATCHED: usize = 200_000;
/// How long a subscriber sleeps at most before it looks by itself: another process may have moved the order.
const BACKSTOP: Duration = Duration::from_secs(3);

/// The feed of order changes. Only orders that somebody waits for take memory.
#[derive(Debug, Clone, Default)]
pub struct Updates(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    watched: Mutex<HashMap<OrderId, watch::Sender<()>>>,
    // Lets a batch of stored orders pass without the lock while nobody waits.
    count: AtomicUsize,
}

/// Too many orders are being waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many orders are being waited for")]
pub struct TooManySubscribers;

impl Updates {
    /// Waits for an order from here on. Subscribe first, then look at the order: nothing is missed in between.
    pub fn subscribe(&self, order_id: OrderId) -> Result<Subscription, TooManySubscribers> {
        let mut watched = self.0.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if watched.len() >= MAX_WATCHED && !watched.contains_key(&order_id) {
            return Err(TooManySubscribers);
        }
        let receiver = watched.entry(order_id).or_insert_with(|| watch::Sender::new(())).subscribe();
        self.0.count.store(watched.len(), Ordering::Release);
        Ok(Subscription { order_id, receiver: Some(receiver), shared: Arc::clone(&self.0) })
    }

    /// Tells those who wait for one of these orders. Called after the transaction is committed.
    pub(crate) fn notify(&self, orders: impl IntoIterator<Item = OrderId>) {
        if self.0.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let watched = self.0.watched.lock().unwrap_or_else(PoisonError::into_inner);
        for order_id in orders {
            if let Some(sender) = watched.get(&order_id) {
                sender.send_replace(());
            }
        }
    }

    /// How many orders are being waited for.
    pub fn watched(&self) -> usize {
        self.0.count.load(Ordering::Acquire)
    }
}

/// One who waits for an order.
#[derive(Debug)]
pub struct Subscription {
    order_id: OrderId,
    // `None` only while it is being dropped.
    receiver: Option<watch::Receiver<()>>,
    shared: Arc<Shared>,
}

impl Subscription {
    /// Returns when the order may have changed: at once after a change, else after a few seconds.
    pub async fn changed(&mut self) {
        let Some(receiver) = &mut self.receiver else { return };
        // The sender lives as long as this subscription is in the map.
        let _ = tokio::time::timeout(BACKSTOP, receiver.changed()).await;
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut watched = self.shared.watched.lock().unwrap_or_else(PoisonError::into_inner);
        self.receiver = None;
        if watched.get(&self.order_id).is_some_and(|sender| sender.receiver_count() == 0) {
            watched.remove(&self.order_id);
        }
        self.shared.count.store(watched.len(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seq: u64) -> OrderId {
        OrderId::from_parts(100_000_001, seq).unwrap()
    }

    #[tokio::test]
    async fn those_who_wait_hear_of_their_order_and_leave_nothing_behind() {
        let updates = Updates::default();
        let mut one = updates.subscribe(order(1)).unwrap();
        let two = updates.subscribe(order(1)).unwrap();
        let other = updates.subscribe(order(2)).unwrap();
        assert_eq!(updates.watched(), 2);
        updates.notify([order(1), order(3)]);
        one.changed().await;
        assert!(two.receiver.as_ref().unwrap().has_changed().unwrap());
        assert!(!other.receiver.as_ref().unwrap().has_changed().unwrap());
        drop((one, two, other));
        assert_eq!(updates.watched(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_subscriber_looks_by_itself_when_nothing_is_announced() {
        let mut alone = Updates::default().subscribe(order(1)).unwrap();
        alone.changed().await;
    }
}
