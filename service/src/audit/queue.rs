//! The part of the books that is neither in the ledger nor in the order tables: what a broker holds.

use redis::aio::ConnectionLike;
use seckill_domain::{CenterId, OutboxId};
use seckill_ledger::roles;
use serde::Serialize;

use super::{Report, Violation};
use crate::cross_center::calls::AuditQueueAnswer;
use crate::orders::{KafkaQueue, OrderCenters};

/// How the Kafka queues of all centers stand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct QueueReport {
    /// Records that are not stored, in all centers together; absent while one of them does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consumer_lag: Option<u64>,
    /// Partitions that stand still because the brokers do not have their next record any more, in any center.
    pub lost_partitions: Vec<u8>,
    /// What each home center's consumer says.
    pub consumers: Vec<ConsumerReport>,
    /// How far each center's brokers have acknowledged the outbox.
    pub relays: Vec<RelayReport>,
}

/// How one center's consumer stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConsumerReport {
    /// The center.
    pub center: CenterId,
    /// Records in its partitions that are not stored, as it last saw them; absent before it has looked, and where the
    /// center does not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag: Option<u64>,
    /// Its partitions that stand still.
    pub lost_partitions: Vec<u8>,
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
pub async fn add(
    report: &mut Report,
    queue: &KafkaQueue,
    centers: &OrderCenters,
    conn: &mut impl ConnectionLike,
) {
    let mut consumers = Vec::new();
    for center in queue.centers() {
        let standing = if center == *queue.center() {
            Ok(queue.standing())
        } else {
            centers.queue(&center).await.map_err(|error| error.to_string())
        };
        let AuditQueueAnswer { lag, lost, waiting } = standing.unwrap_or_else(|error| AuditQueueAnswer {
            // It names the center.
            waiting: vec![error],
            ..AuditQueueAnswer::default()
        });
        if !lost.is_empty() {
            report.violations.push(Violation {
                code: "queue_lost",
                detail: format!(
                    "the Kafka of center {center} does not have the next record of the partitions {lost:?} any more"
                ),
                order_id: None,
            });
        }
        let waiting = waiting.into_iter().map(|waits| format!("the queue of center {center}: {waits}"));
        report.problems.extend(waiting);
        consumers.push(ConsumerReport { center, lag, lost_partitions: lost });
    }
    match relays(queue, conn).await {
        Ok(relays) => {
            report.queue = Some(QueueReport {
                consumer_lag: consumers.iter().map(|consumer| consumer.lag).sum(),
                lost_partitions: consumers
                    .iter()
                    .flat_map(|consumer| consumer.lost_partitions.clone())
                    .collect(),
                consumers,
                relays,
            });
        }
        Err(error) => report.problems.push(format!("the relay's cursors: {error}")),
    }
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
