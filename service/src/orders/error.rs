//! What can go wrong with the order database.

use seckill_domain::{InvalidId, InvalidMoney, Shard, UnknownState};
use sqlx::mysql::MySqlDatabaseError;

use super::batch::Place;

/// A call to the order database that gave no answer to its question.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database URL is none of ours.
    #[error("database_url must be sqlite:PATH or mysql://USER:PASSWORD@HOST:PORT/DATABASE")]
    Url,
    /// The database could not be opened.
    #[error("the order database {path} cannot be opened: {source}")]
    Open {
        /// Where it lies.
        path: String,
        /// What the database said.
        source: sqlx::Error,
        /// Whether it may open later without anybody changing anything: a server that is away.
        passing: bool,
    },
    /// The tables could not be brought to this release's form.
    #[error("the order database cannot be migrated: {0}")]
    Migrate(String),
    /// The database belongs to another center.
    #[error(
        "the order database belongs to center {owner}, this is center {center}; give each center its own"
    )]
    ForeignCenter {
        /// Whose it is.
        owner: String,
        /// Who we are.
        center: String,
    },
    /// Locked, out of space, read-only, gone: nothing was written, and the same call may succeed later.
    #[error("the order database did not answer: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// The answer to a commit was lost, and the database could not be asked since. The write may have happened; the
    /// same call again finds out.
    #[error("the order database did not answer a commit: {0}")]
    Unknown(#[source] sqlx::Error),
    /// The database refused the statement.
    #[error("the order database refused: {0}")]
    Database(#[source] sqlx::Error),
    /// A row that this release cannot read.
    #[error("unreadable row: {0}")]
    Row(String),
    /// Too many writes wait already; nothing was done.
    #[error("too many writes wait for the order database")]
    Overloaded,
    /// The store is closing, or its writer is gone.
    #[error("the order store is closed")]
    Closed,
    /// A queue's position was moved by somebody else (R2): read it again. Nothing was stored.
    #[error("{place} is stored up to {found}, not up to {expected}")]
    PositionMoved {
        /// Whose position.
        place: Place,
        /// What the caller took it to be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// The shard is not this center's (O1). Nothing was written.
    #[error("shard {0} is not owned by this center")]
    NotOwner(Shard),
}

/// What MySQL and MariaDB answer when the same statement may succeed later: out of connections, of disk or of memory,
/// shutting down, read-only, a lock that was not free, a deadlock, a statement that was ended or took too long.
const MYSQL_PASSING: [u16; 19] = [
    1021, 1037, 1038, 1040, 1041, 1053, 1114, 1158, 1159, 1160, 1161, 1205, 1213, 1290, 1317, 1836, 1927,
    1969, 3024,
];
/// Those after which the transaction is tried again at once: a lock that was not free, a deadlock, and a row that
/// somebody else wrote since it was looked for.
const MYSQL_CONTENDED: [u16; 3] = [1062, 1205, 1213];

/// The number of an error that a MySQL or MariaDB server answered.
pub(super) fn mysql_number(error: &sqlx::Error) -> Option<u16> {
    let error = error.as_database_error()?.try_downcast_ref::<MySqlDatabaseError>()?;
    Some(error.number())
}

impl Error {
    /// Whether another transaction was in the way.
    pub(super) fn is_contended(&self) -> bool {
        match self {
            Error::Unavailable(error) | Error::Database(error) => {
                mysql_number(error).is_some_and(|number| MYSQL_CONTENDED.contains(&number))
            }
            Error::Url
            | Error::Open { .. }
            | Error::Migrate(_)
            | Error::ForeignCenter { .. }
            | Error::Unknown(_)
            | Error::Row(_)
            | Error::Overloaded
            | Error::Closed
            | Error::PositionMoved { .. }
            | Error::NotOwner(_) => false,
        }
    }

    /// Whether the server answered; if not, the connection to it is gone.
    pub(super) fn is_answer(&self) -> bool {
        match self {
            Error::Unavailable(error) | Error::Database(error) | Error::Unknown(error) => {
                error.as_database_error().is_some()
            }
            Error::Url
            | Error::Open { .. }
            | Error::Migrate(_)
            | Error::ForeignCenter { .. }
            | Error::Row(_)
            | Error::Overloaded
            | Error::Closed
            | Error::PositionMoved { .. }
            | Error::NotOwner(_) => true,
        }
    }

    /// The same for another caller whose write shared the transaction.
    pub(super) fn for_another(&self) -> Error {
        let text = || sqlx::Error::Protocol(self.to_string());
        match self {
            Error::Unknown(_) => Error::Unknown(text()),
            _ => Error::Unavailable(text()),
        }
    }

    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Unavailable(_) | Error::Unknown(_) | Error::Overloaded | Error::PositionMoved { .. } => {
                true
            }
            Error::Open { passing, .. } => *passing,
            Error::Url
            | Error::Migrate(_)
            | Error::ForeignCenter { .. }
            | Error::Database(_)
            | Error::Row(_)
            | Error::Closed
            | Error::NotOwner(_) => false,
        }
    }
}

// What does not parse in a row was not written by us.

impl From<InvalidId> for Error {
    fn from(error: InvalidId) -> Self {
        Error::Row(error.to_string())
    }
}

impl From<InvalidMoney> for Error {
    fn from(error: InvalidMoney) -> Self {
        Error::Row(error.to_string())
    }
}

impl From<UnknownState> for Error {
    fn from(error: UnknownState) -> Self {
        Error::Row(error.to_string())
    }
}

impl From<sqlx::Error> for Error {
    /// Decides here, where the error is born, whether trying again makes sense.
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(database)
                if database.try_downcast_ref::<MySqlDatabaseError>().is_some() =>
            {
                match mysql_number(&error) {
                    Some(number) if MYSQL_PASSING.contains(&number) => Error::Unavailable(error),
                    _ => Error::Database(error),
                }
            }
            sqlx::Error::Database(database) => {
                // Primary result codes of SQLite; an extended code has them in its low byte.
                let primary =
                    database.code().and_then(|code| code.parse::<u32>().ok()).map(|code| code & 0xff);
                match primary {
                    // BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR, FULL, CANTOPEN
                    Some(5..=10 | 13 | 14) => Error::Unavailable(error),
                    _ => Error::Database(error),
                }
            }
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => Error::Row(error.to_string()),
            sqlx::Error::PoolTimedOut
            | sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::WorkerCrashed => Error::Unavailable(error),
            sqlx::Error::PoolClosed => Error::Closed,
            _ => Error::Database(error),
        }
    }
}
