//! The part of the books that is neither in the ledger nor in the order tables: what a broker holds.

use redis::aio::ConnectionLike;
use seckill_domain::{CenterId, OutboxId};
use seckill_ledger::roles;
use serde::Serialize;

use super::{Report, Violation};
use crate::orders::{ConsumerStatus, KafkaQueue};

/// How the Kafka queue of this center stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QueueReport {
    /// Records in this center's partitions that are not stored, as the consumer last saw them; absent before it
    /// has looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consumer_lag: Option<u64>,
    /// Partitions that stand still because the brokers do not have their next record any more.
    pub lost_partitions: Vec<u8>,
    /// How far each center's brokers have acknowledged the outbox.
    pub relays: Vec<RelayReport>,
}

/// What one center's brokers have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RelayReport {
    /// The center.
    pub center: CenterId,
    /// Up to here the outbox is acknowledged there; absent before anything was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acknowledged: Option<OutboxId>,
    /// Entries between that and the outbox's end, at most: some may be of no interest there.
    pub behind: u64,
}

/// Adds the queue to a report: what stands still is a violation, what cannot be reached makes it incomplete.
pub async fn add(report: &mut Report, queue: &KafkaQueue, conn: &mut impl ConnectionLike) {
    match relays(queue, conn).await {
        Ok(relays) => {
            let (consumer_lag, lost_partitions) = match &*queue.consumer.borrow() {
                ConsumerStatus::Starting | ConsumerStatus::Waiting { .. } => (None, Vec::new()),
                ConsumerStatus::Following { lag, lost } => {
                    (Some(*lag), lost.iter().map(|shard| shard.number()).collect())
                }
            };
            if !lost_partitions.is_empty() {
                report.violations.push(Violation {
                    code: "queue_lost",
                    detail: format!(
                        "Kafka does not have the next record of the partitions {lost_partitions:?} any more"
                    ),
                    order_id: None,
                });
            }
            report.queue = Some(QueueReport { consumer_lag, lost_partitions, relays });
        }
        Err(error) => report.problems.push(format!("the relay's cursors: {error}")),
    }
    report.problems.extend(queue.waiting().into_iter().map(|waits| format!("the queue: {waits}")));
    report.verdict = super::verdict(report);
}

async fn relays(
    queue: &KafkaQueue,
    conn: &mut impl ConnectionLike,
) -> Result<Vec<RelayReport>, seckill_ledger::Error> {
    let last = roles::standing(conn).await?.seq;
    let mut relays = Vec::new();
    for (_, center) in queue.relays.keys() {
        let acknowledged = seckill_ledger::cursor(conn, center).await?.map(|cursor| cursor.id);
        let behind = last.saturating_sub(acknowledged.map_or(0, |id| id.seq));
        relays.push(RelayReport { center: center.clone(), acknowledged, behind });
    }
    Ok(relays)
}
