//! The real servers that seckill stands on, as processes that somebody owns.
//!
//! ```no_run
//! # async fn example() -> Result<(), seckill_parts::PartError> {
//! use seckill_parts::{Kafka, Link, LinkState, Mariadb, shared};
//!
//! // A server of one's own, to be killed and paused.
//! let dir = tempfile::tempdir().expect("a folder");
//! let kafka = Kafka::start(dir.path()).await?;
//! kafka.kill();
//! kafka.restart().await?; // same port, same data
//!
//! // A server that others use too: only with names of one's own.
//! let url = shared::mariadb().await?.create_database("orders_of_this_test").await?;
//!
//! // A line of 15 ms each way to it, that can be cut.
//! let link = Link::start(kafka.address())?;
//! link.set_delay(std::time::Duration::from_millis(15), std::time::Duration::ZERO);
//! link.set(LinkState::Stalled);
//! # drop(url);
//! # Ok(())
//! # }
//! ```
//!
//! Each part lives in the folder that it is given: configuration, data, log. A start returns when the server answers a
//! real request, or fails with the end of its log. On drop the process is killed, and when this process dies by any other
//! way the kernel kills it. Folders are the caller's to remove.
//!
//! `make services` keeps a set of them running (see [`services`]).

mod error;
mod etcd;
mod kafka;
mod kafka_jars;
mod link;
mod mariadb;
mod mariadb_pair;
mod ports;
mod process;
mod redis_server;
mod server;
pub mod services;
pub mod shared;

pub use error::PartError;
pub use etcd::{Etcd, EtcdOptions};
pub use kafka::{Kafka, KafkaOptions};
pub use link::{Link, LinkState};
pub use mariadb::{Mariadb, MariadbAdmin, MariadbOptions};
pub use mariadb_pair::{MariadbPair, folder_in_memory};
pub use process::{Identity, Lifetime};
pub use redis_server::{Redis, RedisOptions};
