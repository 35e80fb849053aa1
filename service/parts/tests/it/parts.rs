//! Each part keeps its data and its port through a kill, and answers when its start returns.

use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Message, Offset, TopicPartitionList};
use seckill_parts::{Etcd, Kafka, Mariadb, MariadbAdmin, MariadbOptions, PartError, Redis, RedisOptions};
use sqlx::{Connection, Executor, MySqlConnection, Row};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const DEADLINE: Duration = Duration::from_secs(60);

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[tokio::test]
async fn a_killed_mariadb_comes_back_with_what_was_committed() {
    let dir = folder();
    let mariadb = Mariadb::start(dir.path()).await.unwrap();
    let url = mariadb.create_database("kept").await.unwrap();
    let mut connection = MySqlConnection::connect(&url).await.unwrap();
    connection.execute("CREATE TABLE t (n INT PRIMARY KEY)").await.unwrap();
    connection.execute("INSERT INTO t VALUES (7)").await.unwrap();
    let (port, before) = (mariadb.port(), mariadb.identity().unwrap());
    mariadb.kill();
    assert!(!before.is_alive());
    mariadb.restart().await.unwrap();
    assert_eq!(mariadb.port(), port);
    let mut connection = MySqlConnection::connect(&url).await.unwrap();
    let n: i32 = connection.fetch_one("SELECT n FROM t").await.unwrap().get(0);
    assert_eq!(n, 7);
    // The service's account is bound by read_only, and may not change the server.
    let mut admin = mariadb.admin().connect().await.unwrap();
    admin.execute("SET GLOBAL read_only=1").await.unwrap();
    assert!(connection.execute("INSERT INTO t VALUES (8)").await.is_err());
    assert!(connection.execute("SET GLOBAL read_only=0").await.is_err());
    // A value that stops, and a new one in the same folder, as after a restart of the program that owns it.
    mariadb.stop().await;
    drop(mariadb);
    let again = Mariadb::start(dir.path()).await.unwrap();
    assert_eq!(again.port(), port);
    assert!(matches!(again.create_database("No;").await, Err(PartError::Name(_))));
    let mut connection = MySqlConnection::connect(&url).await.unwrap();
    assert_eq!(connection.fetch_all("SELECT n FROM t").await.unwrap().len(), 1);
    assert!(matches!(Mariadb::start(dir.path()).await, Err(PartError::PortInUse { .. })));
}

#[tokio::test]
async fn two_mariadbs_replicate_both_ways() {
    let dir = folder();
    let options = |server_id| MariadbOptions { server_id, ..MariadbOptions::default() };
    let (dir_a, dir_b) = (dir.path().join("a"), dir.path().join("b"));
    let (options_a, options_b) = (options(1), options(2));
    let (a, b) =
        tokio::try_join!(Mariadb::start_with(&dir_a, &options_a), Mariadb::start_with(&dir_b, &options_b))
            .unwrap();
    a.replicate_from(b.port()).await.unwrap();
    b.replicate_from(a.port()).await.unwrap();
    let url_a = a.create_database("both").await.unwrap();
    assert!(b.catches_up_with(&a, DEADLINE).await.unwrap());
    let url_b = url_a.replace(&a.port().to_string(), &b.port().to_string());
    let mut at_b = MySqlConnection::connect(&url_b).await.unwrap();
    at_b.execute("CREATE TABLE t (n INT PRIMARY KEY)").await.unwrap();
    assert!(a.catches_up_with(&b, DEADLINE).await.unwrap());
    let mut at_a = MySqlConnection::connect(&url_a).await.unwrap();
    at_a.execute("INSERT INTO t VALUES (1)").await.unwrap();
    assert!(b.catches_up_with(&a, DEADLINE).await.unwrap());
    assert_eq!(at_b.fetch_all("SELECT n FROM t").await.unwrap().len(), 1);
    // One that is down misses nothing.
    b.kill();
    at_a.execute("INSERT INTO t VALUES (2)").await.unwrap();
    b.restart().await.unwrap();
    assert!(b.catches_up_with(&a, DEADLINE).await.unwrap());
    let mut at_b = MySqlConnection::connect(&url_b).await.unwrap();
    assert_eq!(at_b.fetch_all("SELECT n FROM t").await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_killed_kafka_comes_back_with_what_it_acknowledged() {
    let dir = folder();
    let kafka = Kafka::start(dir.path()).await.unwrap();
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", kafka.bootstrap());
    let admin: AdminClient<_> = client.create().unwrap();
    let topic = NewTopic::new("kept", 64, TopicReplication::Fixed(1));
    let created = admin.create_topics([&topic], &AdminOptions::new()).await.unwrap();
    assert_eq!(created, [Ok("kept".to_owned())]);
    let producer: FutureProducer = client.clone().set("enable.idempotence", "true").create().unwrap();
    let record = FutureRecord::to("kept").partition(63).key("k").payload("seven");
    producer.send(record, DEADLINE).await.unwrap();
    kafka.kill();
    kafka.restart().await.unwrap();

    let consumer: BaseConsumer = client.set("group.id", "nobody").create().unwrap();
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset("kept", 63, Offset::Beginning).unwrap();
    consumer.assign(&assignment).unwrap();
    let read = tokio::task::spawn_blocking(move || {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match consumer.poll(Duration::from_millis(200)) {
                Some(Ok(message)) => return message.payload().map(<[u8]>::to_vec),
                _ => assert!(Instant::now() < deadline, "the record is not there"),
            }
        }
    });
    assert_eq!(read.await.unwrap().as_deref(), Some(b"seven".as_slice()));
    kafka.stop().await;
    assert!(kafka.identity().is_none());
}

#[tokio::test]
async fn a_killed_etcd_comes_back_with_its_keys() {
    let dir = folder();
    let etcd = Etcd::start(dir.path()).await.unwrap();
    // base64 of "k" and "seven"; the JSON gateway spares this test a client.
    post(&etcd, "/v3/kv/put", r#"{"key":"aw==","value":"c2V2ZW4="}"#).await;
    etcd.kill();
    etcd.restart().await.unwrap();
    assert!(post(&etcd, "/v3/kv/range", r#"{"key":"aw=="}"#).await.contains("c2V2ZW4="));
}

async fn post(etcd: &Etcd, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(etcd.address()).await.unwrap();
    let length = body.len();
    let request = format!("POST {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.contains("200 OK"), "{answer}");
    answer
}

#[tokio::test]
async fn a_killed_redis_comes_back_with_what_it_acknowledged() {
    let dir = folder();
    let redis = Redis::start(dir.path()).await.unwrap();
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    redis::cmd("SET").arg("k").arg("seven").exec_async(&mut connection).await.unwrap();
    redis.kill();
    redis.restart().await.unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let value: String = redis::cmd("GET").arg("k").query_async(&mut connection).await.unwrap();
    assert_eq!(value, "seven");
}

#[tokio::test]
async fn an_isolated_redis_takes_no_writes_and_a_paused_one_does_not_answer() {
    let dir = folder();
    let options = RedisOptions { isolated: true, ..RedisOptions::default() };
    let redis = Redis::start_with(dir.path(), &options).await.unwrap();
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let refused = redis::cmd("SET").arg("k").arg("v").exec_async(&mut connection).await.unwrap_err();
    assert_eq!(refused.code(), Some("READONLY"));
    redis.pause();
    let ping = redis::cmd("PING");
    let silent =
        tokio::time::timeout(Duration::from_millis(200), ping.query_async::<String>(&mut connection));
    assert!(!matches!(silent.await, Ok(Ok(_))));
    redis.resume();
    let deadline = Instant::now() + DEADLINE;
    loop {
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        if ping.query_async::<String>(&mut connection).await.is_ok() {
            break;
        }
        assert!(Instant::now() < deadline, "it does not answer again");
    }
    // Ends also while it is paused.
    redis.pause();
    redis.stop().await;
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() {
    let dir = folder();
    let options =
        RedisOptions { extra: vec![("no-such-setting".into(), "1".into())], ..RedisOptions::default() };
    let error = Redis::start_with(dir.path(), &options).await.unwrap_err().to_string();
    assert!(error.contains("no-such-setting"), "{error}");
}

#[tokio::test]
async fn dropping_a_part_ends_its_process() {
    let dir = folder();
    let redis = Redis::start(dir.path()).await.unwrap();
    let process = redis.identity().unwrap();
    assert!(process.is_alive());
    drop(redis);
    assert!(!process.is_alive());
}

#[tokio::test]
async fn a_shared_server_is_the_same_for_all() {
    let (one, other) =
        tokio::try_join!(seckill_parts::shared::mariadb(), seckill_parts::shared::mariadb()).unwrap();
    assert_eq!(one.url(), other.url());
    let name = format!("seckill_parts_{}", std::process::id());
    let url = one.create_database(&name).await.unwrap();
    MySqlConnection::connect(&url).await.unwrap().ping().await.unwrap();
    MariadbAdmin::new(one.url()).drop_database(&name).await.unwrap();
    assert!(MySqlConnection::connect(&url).await.is_err());
}
