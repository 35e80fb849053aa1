//! The topics: created where they are missing, checked where they are there.

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, ResourceSpecifier, TopicReplication};

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use seckill_domain::SHARDS;
use tokio::runtime::Handle;

use super::client::{CALL_TIMEOUT, Connection, Quiet};

/// How often a topic that was just created is looked for: brokers hear of it one after the other.
const LOOKS: u32 = 80;
const BETWEEN_LOOKS: std::time::Duration = std::time::Duration::from_millis(250);

/// The topics' names and how they are created.
#[derive(Debug, Clone)]
pub(crate) struct Topics {
    pub(crate) orders: String,
    pub(crate) sales: String,
    pub(crate) dead_letter: String,
    replication: u16,
}

/// Why the topics cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TopicError {
    #[error("Kafka does not answer: {0}")]
    Kafka(#[from] KafkaError),
    #[error("topic {topic} cannot be created: {code}")]
    Create { topic: String, code: RDKafkaErrorCode },
    #[error(
        "topic {topic} has {found} partitions instead of {wanted}: orders of a user would be looked for in another \
         partition. Create it with {wanted} partitions, or choose another kafka.topic_prefix"
    )]
    Partitions { topic: String, found: usize, wanted: usize },
    #[error(
        "topic {topic} has {setting}={found} instead of {wanted}: Kafka would drop orders that nobody has stored. \
         Set it with kafka-configs"
    )]
    Setting { topic: String, setting: &'static str, found: String, wanted: &'static str },
    #[error("topic {0} was created and is not there yet")]
    Missing(String),
}

/// What keeps records until somebody removes them.
const KEPT: [(&str, &str); 3] =
    [("cleanup.policy", "delete"), ("retention.ms", "-1"), ("retention.bytes", "-1")];

impl Topics {
    pub(crate) fn new(prefix: &str, replication: u16) -> Topics {
        Topics {
            orders: format!("{prefix}seckill.orders"),
            sales: format!("{prefix}seckill.sales"),
            dead_letter: format!("{prefix}seckill.dead-letter"),
            replication,
        }
    }

    fn wanted(&self) -> [(&str, usize); 3] {
        [(&self.orders, usize::from(SHARDS)), (&self.sales, 1), (&self.dead_letter, 1)]
    }

    /// Creates what is missing and checks what is there.
    pub(super) async fn ensure(&self, connection: &Connection) -> Result<(), TopicError> {
        let (topics, connection) = (self.clone(), connection.clone());
        let runtime = Handle::current();
        // The library blocks here and there, and joins a thread at the end.
        let work = move || {
            let admin = connection.admin()?;
            topics.ensure_with(&admin, &runtime)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(done) => done,
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        }
    }

    fn ensure_with(&self, admin: &AdminClient<Quiet>, runtime: &Handle) -> Result<(), TopicError> {
        let options =
            AdminOptions::new().request_timeout(Some(CALL_TIMEOUT)).operation_timeout(Some(CALL_TIMEOUT));
        // A write is safe on all replicas but one, which may be down.
        let in_sync = self.replication.saturating_sub(1).max(1).to_string();
        let wanted: Vec<NewTopic<'_>> = self
            .wanted()
            .into_iter()
            .map(|(name, partitions)| {
                let replication = TopicReplication::Fixed(i32::from(self.replication));
                let topic =
                    NewTopic::new(name, partitions as i32, replication).set("min.insync.replicas", &in_sync);
                KEPT.iter().fold(topic, |topic, (setting, value)| topic.set(setting, value))
            })
            .collect();
        for created in runtime.block_on(admin.create_topics(&wanted, &options))? {
            match created {
                Ok(topic) => tracing::info!(topic, "created"),
                Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((topic, code)) => return Err(TopicError::Create { topic, code }),
            }
        }
        for (name, partitions) in self.wanted() {
            check_partitions(admin, name, partitions)?;
        }
        let topics = self.wanted().map(|(name, _)| ResourceSpecifier::Topic(name));
        for described in runtime.block_on(admin.describe_configs(&topics, &options))? {
            let described = match described {
                Ok(described) => described,
                Err(code) => {
                    // An account that may not look still may write and read.
                    tracing::warn!(%code, "the settings of the topics cannot be checked");
                    continue;
                }
            };
            let rdkafka::admin::OwnedResourceSpecifier::Topic(topic) = &described.specifier else { continue };
            for (setting, wanted) in KEPT {
                let found = described.get(setting).and_then(|entry| entry.value.as_deref());
                if let Some(found) = found
                    && found != wanted
                {
                    return Err(TopicError::Setting {
                        topic: topic.clone(),
                        setting,
                        found: found.to_owned(),
                        wanted,
                    });
                }
            }
        }
        Ok(())
    }
}

fn check_partitions(admin: &AdminClient<Quiet>, name: &str, wanted: usize) -> Result<(), TopicError> {
    for _ in 0..LOOKS {
        let metadata = admin.inner().fetch_metadata(Some(name), CALL_TIMEOUT)?;
        let found = metadata.topics().iter().find(|topic| topic.name() == name && topic.error().is_none());
        match found.map(|topic| topic.partitions().len()) {
            Some(found) if found == wanted => return Ok(()),
            Some(0) | None => std::thread::sleep(BETWEEN_LOOKS),
            Some(found) => return Err(TopicError::Partitions { topic: name.to_owned(), found, wanted }),
        }
    }
    Err(TopicError::Missing(name.to_owned()))
}
