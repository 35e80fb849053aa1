//! What is made of the library's reports. A broker cannot be asked to refuse one request and take the next, so these
//! run against the library's own brokers, which take any record of a producer, as real ones do of one that is new.

use std::time::Instant;

use rdkafka::bindings::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION as NOT_LEADER;
use rdkafka::consumer::DefaultConsumerContext;
use rdkafka::message::OwnedHeaders;
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::RDKafkaApiKey;
use seckill_domain::OutboxId;

use super::*;

const TOPIC: &str = "orders";
/// As long as it takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

struct Brokers {
    cluster: MockCluster<'static, DefaultProducerContext>,
    connection: Connection,
    progress: Arc<Progress>,
    sender: Sender,
}

impl Brokers {
    fn start() -> Brokers {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic(TOPIC, 1, 1).unwrap();
        // The second request is on its way before the first is answered.
        cluster.broker_round_trip_time(1, Duration::from_millis(100)).unwrap();
        let properties = [
            ("bootstrap.servers".to_owned(), cluster.bootstrap_servers()),
            // A request for each record.
            ("batch.num.messages".to_owned(), "1".to_owned()),
        ];
        let connection = Connection::new(properties.to_vec());
        let progress = Arc::new(Progress::default());
        let sender = connection.sender(&progress, &TaskTracker::new()).unwrap();
        Brokers { cluster, connection, progress, sender }
    }

    /// The next request that brings a record is answered as if the partition had no leader.
    fn refuse_next(&self) {
        self.cluster.request_errors(RDKafkaApiKey::Produce, &[NOT_LEADER]);
    }

    fn send(&self, content: &str) {
        let record =
            Outgoing { key: None, content: Some(content.as_bytes().to_vec()), headers: OwnedHeaders::new() };
        let number = self.progress.begin(OutboxId::ZERO, 1);
        assert!(self.sender.send(TOPIC, 0, &record, number).unwrap());
    }

    /// Waits until everything is acknowledged, or something failed; returns what.
    async fn outcome(&self) -> Option<String> {
        let settled = async {
            while self.progress.in_flight() > 0 && self.progress.failure().is_none() {
                self.progress.changed().await;
            }
        };
        tokio::time::timeout(DEADLINE, settled).await.unwrap();
        self.progress.failure()
    }

    /// What the partition holds.
    fn contents(&self, count: usize) -> Vec<String> {
        let mut config = self.connection.client();
        config.set("group.id", "test");
        let consumer: BaseConsumer<DefaultConsumerContext> =
            BaseConsumer::from_config_and_context(&config, DefaultConsumerContext).unwrap();
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(TOPIC, 0, Offset::Beginning).unwrap();
        consumer.assign(&list).unwrap();
        let begun = Instant::now();
        let mut contents = Vec::new();
        while contents.len() < count && begun.elapsed() < DEADLINE {
            let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) else { continue };
            contents.push(String::from_utf8(message.payload().unwrap().to_vec()).unwrap());
        }
        contents
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_was_passed_over_is_not_taken_for_written() {
    let brokers = Brokers::start();
    brokers.refuse_next();
    brokers.send("first");
    brokers.send("second");
    let failure = brokers.outcome().await.expect("the first record is nowhere");
    assert!(failure.contains("passed over"), "{failure}");
    assert_eq!(brokers.contents(1), ["second"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_record_that_was_waited_for_stands_before_the_next() {
    let brokers = Brokers::start();
    brokers.refuse_next();
    brokers.send("first");
    assert_eq!(brokers.outcome().await, None);
    brokers.send("second");
    assert_eq!(brokers.outcome().await, None);
    assert_eq!(brokers.contents(2), ["first", "second"]);
}
