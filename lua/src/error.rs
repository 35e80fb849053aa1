//! What can go wrong with a call, and whether it may have happened all the same.

use redis::{ErrorKind, RedisError, ServerErrorKind};

/// Whether a failed call may have changed the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Executed {
    /// Nothing happened: the same call may be sent again, or given up.
    No,
    /// It may have happened. Only the same call under the same keys tells.
    Unknown,
}

/// Why the ledger refused a write by its fence. Nothing happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The ledger is at a later epoch (or another master's): the caller's topology is old.
    #[error("the ledger is at epoch {ledger_epoch}, later than the call's")]
    StaleEpoch {
        /// The ledger's epoch.
        ledger_epoch: u64,
    },
    /// The ledger is at an earlier epoch: its fence was not lifted yet, or it has been rolled back.
    #[error("the ledger is at epoch {ledger_epoch}, earlier than the call's")]
    FutureEpoch {
        /// The ledger's epoch.
        ledger_epoch: u64,
    },
    /// The ledger has no fence: it is empty. Only `ledger init` and `ledger adopt` create one.
    #[error("the ledger is empty: it has no fence")]
    NoFence,
    /// The ledger has another identity or schema.
    #[error("this is another ledger ({found})")]
    Foreign {
        /// The fence that was found.
        found: String,
    },
}

/// A call to the ledger that gave no answer to its question.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The fence did not match.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// This server is a replica.
    #[error("this Redis is a replica and takes no writes")]
    ReadOnly,
    /// The memory bound is reached: purchases stop, releases go on (rule M2).
    #[error("the ledger's memory bound is reached")]
    Full,
    /// The server refused before it ran anything: loading, busy, misconfigured, an unknown command.
    #[error("Redis refused the call: {0}")]
    Rejected(String),
    /// A key of the ledger is missing, or holds what this crate never writes there. Found before anything was
    /// decided; somebody has to look at the server's data.
    #[error("the ledger is damaged: {0}")]
    Damaged(String),
    /// No answer: timed out, connection lost, or the script died half-way.
    #[error("no answer from Redis: {0}")]
    NoAnswer(#[source] RedisError),
    /// An answer that this release does not understand.
    #[error("Redis answered in an unknown form: {0}")]
    Malformed(String),
}

impl Error {
    /// Whether the call may have changed the ledger.
    pub fn executed(&self) -> Executed {
        match self {
            Error::Refused(_) | Error::ReadOnly | Error::Full | Error::Rejected(_) | Error::Damaged(_) => {
                Executed::No
            }
            Error::NoAnswer(_) | Error::Malformed(_) => Executed::Unknown,
        }
    }
}

impl From<RedisError> for Error {
    /// Decides here, where the error is born, whether the server may have run the call.
    fn from(error: RedisError) -> Self {
        let code = error.code().unwrap_or("");
        match code {
            "READONLY" => return Error::ReadOnly,
            "OOM" => return Error::Full,
            // Every script meets a key of the wrong type before its first write that counts.
            "DAMAGED" | "WRONGTYPE" => return Error::Damaged(error.to_string()),
            "LOADING" | "BUSY" | "MISCONF" | "MASTERDOWN" | "NOREPLICAS" | "NOAUTH" | "NOPERM"
            | "NOSCRIPT" | "EXECABORT" | "WRONGPASS" => {
                return Error::Rejected(error.to_string());
            }
            _ => {}
        }
        match error.kind() {
            ErrorKind::Server(
                ServerErrorKind::BusyLoading
                | ServerErrorKind::MasterDown
                | ServerErrorKind::NoScript
                | ServerErrorKind::ExecAbort
                | ServerErrorKind::NoPerm,
            )
            | ErrorKind::AuthenticationFailed
            | ErrorKind::RESP3NotSupported
            | ErrorKind::InvalidClientConfig => Error::Rejected(error.to_string()),
            ErrorKind::Server(ServerErrorKind::ReadOnly) => Error::ReadOnly,
            // A refused connection never carried the call.
            ErrorKind::Io if error.is_connection_refusal() => Error::Rejected(error.to_string()),
            _ => Error::NoAnswer(error),
        }
    }
}
