//! Apache Kafka: one broker that is its own controller (KRaft), from its jars.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};

use crate::error::{PartError, file_error};
use crate::kafka_jars;
use crate::link::Link;
use crate::ports;
use crate::process::{Invocation, Lifetime, find_program};
use crate::server::{Data, Server, data_folder, folder, lifecycle, on_ports, prepare};

/// How long one metadata request may take while a broker starts.
const METADATA_WAIT: Duration = Duration::from_millis(500);

/// How to run a broker.
#[derive(Debug, Clone, Default)]
pub struct KafkaOptions {
    /// Who it lives for.
    pub lifetime: Lifetime,
    /// More lines of `server.properties`, which win over ours: `("message.max.bytes", "2000")`.
    pub extra: Vec<(String, String)>,
    /// How those reach it who are far away: the start leads this line to a listener that tells clients to stay on it.
    pub line: Option<Arc<Link>>,
}

/// A Kafka broker.
///
/// Topics are not created by use. A record that was acknowledged survives [`Kafka::kill`]; of a loss of power a single
/// broker protects nobody.
#[derive(Debug)]
pub struct Kafka {
    port: u16,
    server: Server,
}

impl Kafka {
    /// Starts a broker in `dir`; it answers metadata requests when this returns. The first start on a machine fetches
    /// 43 MB of jars.
    pub async fn start(dir: &Path) -> Result<Kafka, PartError> {
        Kafka::start_with(dir, &KafkaOptions::default()).await
    }

    /// Starts a broker with options.
    pub async fn start_with(dir: &Path, options: &KafkaOptions) -> Result<Kafka, PartError> {
        let dir = folder(dir)?;
        on_ports(&dir, |ports, data| Kafka::on_ports(&dir, ports, data, options)).await
    }

    async fn on_ports(
        dir: &Path,
        [port, controller]: [u16; 2],
        data: Data,
        options: &KafkaOptions,
    ) -> Result<Kafka, PartError> {
        let java = find_program("java")
            .ok_or(PartError::Missing { program: "java", package: "default-jre-headless" })?;
        let jars = kafka_jars::folder().await?;
        let class_path = format!("{}/*", jars.display());
        let folder = data_folder(dir, data)?;
        let properties = dir.join("server.properties");
        let far = match &options.line {
            None => None,
            Some(line) => {
                let [listener] = ports::free()?;
                line.set_target((Ipv4Addr::LOCALHOST, listener).into());
                Some((listener, line.port()))
            }
        };
        let text = server_properties(&folder, port, controller, far, &options.extra);
        fs::write(&properties, text).map_err(file_error("write", &properties))?;
        let properties = properties.display().to_string();
        if data == Data::Fresh {
            let mut format = tokio::process::Command::new(&java);
            format.args(["-Xmx64m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", &class_path]);
            format.args(["kafka.tools.StorageTool", "format", "--standalone"]);
            format.args(["-t", CLUSTER_ID, "-c", &properties]);
            prepare(dir, "kafka.tools.StorageTool", format).await?;
        }
        let args = [
            "-Xms128m",
            "-Xmx512m",
            "-XX:+UseSerialGC",
            "-XX:+ExitOnOutOfMemoryError",
            "-Djava.awt.headless=true",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            // Where it says that it started, and why it does not.
            "-Dorg.slf4j.simpleLogger.log.kafka.server=info",
            "-cp",
            &class_path,
            "kafka.Kafka",
            &properties,
        ];
        let invocation = Invocation {
            program: java,
            args: args.map(str::to_owned).into(),
            env: Vec::new(),
            dir: dir.to_owned(),
            log: dir.join("kafka.log"),
        };
        let server = Server::spawn("kafka", invocation, options.lifetime)?;
        let kafka = Kafka { port, server };
        kafka.server.ready(|| kafka.answers()).await?;
        Ok(kafka)
    }

    async fn answers(&self) -> Result<(), String> {
        let bootstrap = self.bootstrap();
        let ask = move || {
            // Nobody listens yet: librdkafka would log that once a second.
            std::net::TcpStream::connect(&bootstrap).map_err(|error| error.to_string())?;
            let client: BaseConsumer = ClientConfig::new()
                .set("bootstrap.servers", &bootstrap)
                .set("log_level", "0")
                .create()
                .map_err(|error| error.to_string())?;
            let metadata = client.fetch_metadata(None, METADATA_WAIT).map_err(|error| error.to_string())?;
            if metadata.brokers().is_empty() { Err("no broker in the metadata".to_owned()) } else { Ok(()) }
        };
        tokio::task::spawn_blocking(ask).await.unwrap_or_else(|error| Err(error.to_string()))
    }

    /// Its port on 127.0.0.1. Clients need the broker's own address: through a [`Link`] they would go on to the one that
    /// the broker advertises, unless it is the line of its options.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// For `bootstrap.servers`.
    pub fn bootstrap(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

lifecycle!(Kafka);

/// Any 16 bytes in base64. The same for all: what could be mixed up is kept apart by ports.
const CLUSTER_ID: &str = "c2Vja2lsbC1wYXJ0cy0tMQ";

/// `far` are the port of the listener at the end of a line, and that of the line.
fn server_properties(
    data: &Path,
    port: u16,
    controller: u16,
    far: Option<(u16, u16)>,
    extra: &[(String, String)],
) -> String {
    let (listener, advertised) = far.map_or_else(Default::default, |(listener, line)| {
        (format!(",FAR://127.0.0.1:{listener}"), format!(",FAR://127.0.0.1:{line}"))
    });
    let mut text = format!(
        "# Written at each start of this broker; changes here are lost.
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}{listener}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}{advertised}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,FAR:PLAINTEXT
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
log.dirs={data}

# One broker: nothing can have a second copy.
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
default.replication.factor=1
min.insync.replicas=1

# A topic that nobody created is an error, as in production.
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.num.partitions=1

# Small: many topics of 64 partitions on a developer's machine.
num.network.threads=2
num.io.threads=2
num.recovery.threads.per.data.dir=2
background.threads=2
log.index.size.max.bytes=1048576
log.cleaner.dedupe.buffer.size=16777216
",
        data = data.display()
    );
    for (name, value) in extra {
        // Of two lines for one key the last counts.
        text.push_str(&format!("{name}={value}\n"));
    }
    text
}
