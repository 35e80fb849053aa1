//! Which database it is, and its connections.

use std::path::PathBuf;

use sqlx::mysql::{MySqlConnectOptions, MySqlPool};
use sqlx::sqlite::SqlitePool;

use super::super::error::Error;
use super::mysql::Tables;
use super::session::Session;
use super::{mysql, schema};

/// Tasks that write batches, and as many that write single orders, to MySQL.
const MYSQL_WRITERS: usize = 4;

/// Where the orders lie.
pub(super) enum Database {
    /// A file.
    Sqlite(PathBuf),
    /// A server.
    MySql(Box<MySqlConnectOptions>),
}

impl Database {
    /// Tells by the URL's scheme.
    pub(super) fn of(database_url: &str) -> Result<Database, Error> {
        if database_url.starts_with("mysql://") {
            return Ok(Database::MySql(Box::new(mysql::options_of(database_url)?)));
        }
        Ok(Database::Sqlite(schema::path_of(database_url)?))
    }

    /// Opens a connection that writes.
    pub(super) async fn connect(&self) -> Result<Session, Error> {
        match self {
            Database::Sqlite(path) => {
                let mut conn = schema::connect_writer(path).await?;
                schema::create_staging(&mut conn).await?;
                Ok(Session::Sqlite(Box::new(conn)))
            }
            Database::MySql(options) => mysql::connect_writer(options).await,
        }
    }

    /// Opens the first connection and brings the tables to this release's form.
    pub(super) async fn open(&self, tables: &Tables<'_>) -> Result<Session, Error> {
        let mut session = self.connect().await.map_err(|error| self.not_opened(error))?;
        match (&mut session, self) {
            (Session::Sqlite(conn), _) => {
                schema::migrate(conn, tables.center, tables.shards).await?;
                schema::check_owner(&mut session, tables.center).await?;
            }
            (_, Database::MySql(_)) => mysql::migrate(&mut session, tables).await?,
            (_, Database::Sqlite(_)) => {}
        }
        Ok(session)
    }

    fn not_opened(&self, error: Error) -> Error {
        let passing = error.is_transient();
        match (self, error) {
            (Database::MySql(options), Error::Unavailable(source) | Error::Database(source)) => {
                let path = format!("at {}:{}", options.get_host(), options.get_port());
                Error::Open { path, source, passing }
            }
            (_, error) => error,
        }
    }

    /// The connections that read.
    pub(super) async fn readers(&self, connections: u32) -> Result<Readers, Error> {
        Ok(match self {
            Database::Sqlite(path) => Readers::Sqlite(schema::connect_readers(path, connections).await?),
            Database::MySql(options) => {
                Readers::MySql(mysql::readers(MySqlConnectOptions::clone(options), connections))
            }
        })
    }

    /// Tasks of each kind that write; one in all, if it is one.
    pub(super) fn writers(&self) -> usize {
        match self {
            Database::Sqlite(_) => 1,
            Database::MySql(_) => MYSQL_WRITERS,
        }
    }
}

/// The connections that read.
#[derive(Clone)]
pub(super) enum Readers {
    Sqlite(SqlitePool),
    MySql(MySqlPool),
}

impl Readers {
    pub(super) async fn acquire(&self) -> Result<Session, Error> {
        Ok(match self {
            Readers::Sqlite(pool) => Session::SqliteReader(pool.acquire().await?),
            Readers::MySql(pool) => Session::MySqlReader(pool.acquire().await?),
        })
    }

    pub(super) async fn close(&self) {
        match self {
            Readers::Sqlite(pool) => pool.close().await,
            Readers::MySql(pool) => pool.close().await,
        }
    }
}
