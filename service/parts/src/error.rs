//! What can go wrong with a part.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a part does not run, or does not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    /// Two servers were told to replicate each other, and the second does not follow.
    #[error("a server does not follow the other one; its log says why")]
    Unpaired,
    /// No such program.
    #[error("{program} is not installed: run `make setup`, or `apt-get install {package}`")]
    Missing {
        /// The program.
        program: &'static str,
        /// Debian's package with it.
        package: &'static str,
    },
    /// A file or folder cannot be used.
    #[error("cannot {what} {}: {source}", path.display())]
    File {
        /// What was tried, as a verb: `write`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The process could not be started.
    #[error("{part} cannot be started: {source}")]
    Spawn {
        /// Which.
        part: String,
        /// Why.
        source: io::Error,
    },
    /// The process ended before it answered.
    #[error("{part} ended before it answered ({status}); the end of its log:\n{log}")]
    Ended {
        /// Which.
        part: String,
        /// How it ended.
        status: String,
        /// Its last words.
        log: String,
    },
    /// The process runs and does not answer.
    #[error("{part} did not answer within {waited:?} ({reason}); the end of its log:\n{log}")]
    Silent {
        /// Which.
        part: String,
        /// For how long it was asked.
        waited: Duration,
        /// What the last attempt said.
        reason: String,
        /// Its last words.
        log: String,
    },
    /// A program that prepares a part failed.
    #[error("{program} failed ({status}): {output}")]
    Preparation {
        /// The program.
        program: &'static str,
        /// How it ended.
        status: String,
        /// The end of what it said.
        output: String,
    },
    /// The port that the folder's data belongs to is taken.
    #[error("port {port}, which {} was made for, is in use by another program: end that, or remove the folder", dir.display())]
    PortInUse {
        /// The port.
        port: u16,
        /// The part's folder.
        dir: PathBuf,
    },
    /// No free port was found.
    #[error("no free port between {0} and {1}")]
    NoPort(u16, u16),
    /// A statement failed.
    #[error("MariaDB: {0}")]
    Database(#[from] sqlx::Error),
    /// The state of `make services` cannot be read.
    #[error("{} is not a state of services: {source}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// A name that cannot be one of a database.
    #[error("{0:?} cannot be a database's name: use a-z, 0-9 and _, at most 64")]
    Name(String),
    /// A task of this crate died.
    #[error("a task of the parts died: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Makes the error of a file operation, for `map_err`.
pub(crate) fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PartError {
    move |source| PartError::File { what, path: path.to_owned(), source }
}
