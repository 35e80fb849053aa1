//! Records that cannot be read, on their way to a topic of their own.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::message::Header;
use seckill_domain::OutboxId;
use tokio_util::task::TaskTracker;

use super::client::{Connection, Sender};
use super::progress::Progress;
use super::pump::Poison;
use super::record::Outgoing;
use super::topics::Topics;

/// How long the topic may take to acknowledge.
const WITHIN: Duration = Duration::from_secs(10);

/// Writes the dead letters; connected while there are some.
pub(super) struct DeadLetters {
    connection: Connection,
    topics: Topics,
    tracker: TaskTracker,
    open: Option<(Arc<Progress>, Sender)>,
}

impl DeadLetters {
    pub(super) fn new(connection: Connection, topics: Topics, tracker: TaskTracker) -> DeadLetters {
        DeadLetters { connection, topics, tracker, open: None }
    }

    /// Writes records, with the reason and where they came from; returns when they are safe.
    pub(super) async fn write(&mut self, poison: &[Poison]) -> Result<(), String> {
        let (progress, sender) = match self.open.take() {
            Some(open) => open,
            None => {
                let progress = Arc::new(Progress::default());
                let sender = self.connection.sender(&progress, &self.tracker).map_err(|e| e.to_string())?;
                (progress, sender)
            }
        };
        for record in poison {
            let number = progress.begin(OutboxId::ZERO, 1);
            let (partition, offset) = (record.shard.to_string(), record.offset.to_string());
            let headers = record
                .headers
                .clone()
                .insert(Header { key: "seckill_reason", value: Some(&record.reason) })
                .insert(Header { key: "seckill_topic", value: Some(&self.topics.orders) })
                .insert(Header { key: "seckill_partition", value: Some(&partition) })
                .insert(Header { key: "seckill_offset", value: Some(&offset) });
            let letter = Outgoing { key: record.key.clone(), content: record.content.clone(), headers };
            let sent = sender.send(&self.topics.dead_letter, 0, &letter, number);
            if !sent.map_err(|error| error.to_string())? {
                return Err("the library's queue is full".to_owned());
            }
        }
        let acknowledged = async {
            while progress.in_flight() > 0 {
                if let Some(reason) = progress.failure() {
                    return Err(reason);
                }
                progress.changed().await;
            }
            Ok(())
        };
        // After a failure nobody knows what was written: the next attempt begins with a new producer, and a letter
        // may be there twice.
        tokio::time::timeout(WITHIN, acknowledged).await.map_err(|_| "no acknowledgement".to_owned())??;
        self.open = Some((progress, sender));
        Ok(())
    }
}
