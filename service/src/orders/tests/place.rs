//! Where a test's orders lie: a file of its own, or a database of its own on a real MariaDB.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use seckill_parts::{Mariadb, folder_in_memory, shared};
use sqlx::{AssertSqlSafe, MySqlPool, SqlitePool};
use tempfile::TempDir;

/// Which database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Sqlite,
    MySql,
}

/// Makes two tests of each: one for every database.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod on_sqlite {
            $(#[tokio::test] async fn $name() { super::$name(super::Kind::Sqlite).await; })*
        }
        mod on_mariadb {
            $(#[tokio::test] async fn $name() { super::$name(super::Kind::MySql).await; })*
        }
    };
}
pub(super) use on_both;

/// A database.
pub(super) enum Place {
    File {
        _folder: TempDir,
        url: String,
    },
    Server(Lease),
    /// On a server of its own, which copies from nobody.
    Alone {
        _server: Box<Mariadb>,
        _folder: TempDir,
        url: String,
    },
}

impl Place {
    /// One without orders.
    pub(super) async fn new(kind: Kind) -> Place {
        match kind {
            Kind::Sqlite => Place::file(),
            Kind::MySql => Place::Server(Lease::take().await),
        }
    }

    /// One without orders, on a server that replicates with no other.
    pub(super) async fn alone(kind: Kind) -> Place {
        match kind {
            Kind::Sqlite => Place::file(),
            Kind::MySql => {
                let folder = folder_in_memory().unwrap();
                let server = Mariadb::start(folder.path()).await.unwrap();
                let url = server.create_database("seckill").await.unwrap();
                Place::Alone { _server: Box::new(server), _folder: folder, url }
            }
        }
    }

    /// One without tables.
    pub(super) async fn empty(kind: Kind) -> Place {
        match kind {
            Kind::Sqlite => Place::file(),
            Kind::MySql => Place::Server(Lease::create().await),
        }
    }

    fn file() -> Place {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", folder.path().join("orders.db").display());
        Place::File { _folder: folder, url }
    }

    pub(super) fn url(&self) -> &str {
        match self {
            Place::File { url, .. } => url,
            Place::Server(Lease { url }) | Place::Alone { url, .. } => url,
        }
    }

    pub(super) async fn run(&self, sql: String) {
        match self {
            Place::File { url, .. } => {
                let pool = SqlitePool::connect(url).await.unwrap();
                sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await.unwrap();
                pool.close().await;
            }
            Place::Server(Lease { url }) | Place::Alone { url, .. } => {
                let pool = MySqlPool::connect(url).await.unwrap();
                sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await.unwrap();
                pool.close().await;
            }
        }
    }

    pub(super) async fn number(&self, sql: &str) -> i64 {
        let sql = AssertSqlSafe(sql.to_owned());
        match self {
            Place::File { url, .. } => {
                let pool = SqlitePool::connect(url).await.unwrap();
                let number = sqlx::query_scalar(sql).fetch_one(&pool).await.unwrap();
                pool.close().await;
                number
            }
            Place::Server(Lease { url }) | Place::Alone { url, .. } => {
                let pool = MySqlPool::connect(url).await.unwrap();
                let number = sqlx::query_scalar(sql).fetch_one(&pool).await.unwrap();
                pool.close().await;
                number
            }
        }
    }

    pub(super) async fn pairs(&self, sql: String) -> Vec<(String, String)> {
        let sql = AssertSqlSafe(sql);
        match self {
            Place::File { url, .. } => {
                let pool = SqlitePool::connect(url).await.unwrap();
                let rows = sqlx::query_as(sql).fetch_all(&pool).await.unwrap();
                pool.close().await;
                rows
            }
            Place::Server(Lease { url }) | Place::Alone { url, .. } => {
                let pool = MySqlPool::connect(url).await.unwrap();
                let rows = sqlx::query_as(sql).fetch_all(&pool).await.unwrap();
                pool.close().await;
                rows
            }
        }
    }
}

/// A database on the server. A thousand tables take a while to make, so a test that is done hands its database to
/// the next one, which empties it.
pub(super) struct Lease {
    pub(super) url: String,
}

static FREE: Mutex<Vec<String>> = Mutex::new(Vec::new());
static MADE: AtomicU32 = AtomicU32::new(0);

impl Lease {
    pub(super) async fn take() -> Lease {
        let free = FREE.lock().unwrap().pop();
        match free {
            None => Lease::create().await,
            Some(url) => {
                empty(&url).await;
                Lease { url }
            }
        }
    }

    /// A database without tables. Those of test runs that are over are removed.
    pub(super) async fn create() -> Lease {
        let admin = shared::mariadb().await.unwrap();
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        if number == 0 {
            let pool = MySqlPool::connect(admin.url()).await.unwrap();
            let names: Vec<String> = sqlx::query_scalar(
                "SELECT CAST(schema_name AS CHAR) FROM information_schema.schemata
                 WHERE schema_name LIKE 'seckill\\_store\\_%'",
            )
            .fetch_all(&pool)
            .await
            .unwrap();
            pool.close().await;
            for name in names {
                let process = name.split('_').nth(2).unwrap_or_default();
                if !std::path::Path::new("/proc").join(process).exists() {
                    admin.drop_database(&name).await.unwrap();
                }
            }
        }
        let name = format!("seckill_store_{}_{number}", std::process::id());
        Lease { url: admin.create_database(&name).await.unwrap() }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // A test that failed may have left anything behind.
        if !std::thread::panicking() {
            FREE.lock().unwrap().push(std::mem::take(&mut self.url));
        }
    }
}

/// Leaves the tables as they were made.
async fn empty(url: &str) {
    let pool = MySqlPool::connect(url).await.unwrap();
    let tables: Vec<String> = sqlx::query_scalar(
        "SELECT CAST(table_name AS CHAR) FROM information_schema.tables WHERE table_schema = DATABASE()
         AND table_name NOT IN ('schema_version', 'shard_owner')",
    )
    .fetch_all(&pool)
    .await
    .unwrap();
    let mut sql: String = tables.iter().map(|table| format!("DELETE FROM {table};")).collect();
    if !tables.is_empty() {
        sql.push_str("UPDATE shard_owner SET owner = 'a', epoch = 0;");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await.unwrap();
    }
    pool.close().await;
}
