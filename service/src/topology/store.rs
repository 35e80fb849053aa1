//! What a store of the topology does: load, compare-and-set, watch.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use serde::{Deserialize, Serialize};

use super::document::{Extra, Topology};

/// More than any topology, so that a wrong file or key does not fill the memory.
pub(super) const MAX_BYTES: usize = 1 << 20;

/// Which version of the document. Every change has a later one than the change before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// The document and its revision.
#[derive(Debug, Clone, PartialEq)]
pub struct Versioned {
    /// Its revision.
    pub revision: Revision,
    /// The document.
    pub topology: Arc<Topology>,
}

/// Changes of the document as the store tells them.
pub type Changes = BoxStream<'static, Result<Versioned, StoreError>>;

/// Where the topology lies.
pub trait TopologyStore: fmt::Debug + Send + Sync {
    /// Reads the document as it is now: what was written before the call is in it, whoever wrote it and wherever
    /// (A1). Ends within a bound of the store's own.
    fn load(&self) -> BoxFuture<'_, Result<Versioned, StoreError>>;

    /// Replaces the document if it is at revision `expected`; `None` creates it if there is none.
    ///
    /// [`StoreError::Unknown`] says that it may have happened, or may still happen. Every other error says that it
    /// did not and will not.
    fn compare_and_set<'a>(
        &'a self,
        expected: Option<Revision>,
        topology: &'a Topology,
    ) -> BoxFuture<'a, Result<Revision, StoreError>>;

    /// Changes made after this revision, as they happen. Intermediate ones may be left out. The stream ends, or
    /// has an error, when the store cannot be followed: then it is asked for again. What it tells confirms nothing.
    fn watch(&self, after: Revision) -> Changes;

    /// How often the document is read again to confirm the authority by it.
    fn confirm_interval(&self) -> Duration;

    /// Where it lies, for people.
    fn place(&self) -> String;
}

impl<T: TopologyStore + ?Sized> TopologyStore for Arc<T> {
    fn load(&self) -> BoxFuture<'_, Result<Versioned, StoreError>> {
        T::load(self)
    }

    fn compare_and_set<'a>(
        &'a self,
        expected: Option<Revision>,
        topology: &'a Topology,
    ) -> BoxFuture<'a, Result<Revision, StoreError>> {
        T::compare_and_set(self, expected, topology)
    }

    fn watch(&self, after: Revision) -> Changes {
        T::watch(self, after)
    }

    fn confirm_interval(&self) -> Duration {
        T::confirm_interval(self)
    }

    fn place(&self) -> String {
        T::place(self)
    }
}

/// What can go wrong with a store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// There is no document yet.
    #[error("there is no topology at {place}")]
    Missing {
        /// Where it should be.
        place: String,
    },
    /// Somebody changed it meanwhile. Nothing happened.
    #[error("the topology has changed meanwhile (it is at revision {})", found.map_or(0, |found| found.0))]
    Conflict {
        /// The revision that was found, none if there is no document.
        found: Option<Revision>,
    },
    /// The document cannot be understood, or would break a rule. Nothing happened.
    #[error("the topology at {place} cannot be used: {reason}")]
    Malformed {
        /// Where it lies.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store does not answer, or refuses. Nothing happened.
    #[error("the topology at {place} cannot be {action}: {reason}")]
    Unavailable {
        /// `read`, `changed`, `watched`, …
        action: &'static str,
        /// Where it lies.
        place: String,
        /// What is known of the reason.
        reason: String,
    },
    /// The store answers that it may not be used like this: an account, a permission, another kind of server. Nothing
    /// happened, and nothing will until somebody corrects that.
    #[error(
        "the topology at {place} cannot be {action}: {reason}. Correct the account under [topology] of the \
         configuration, or what it may do there"
    )]
    Refused {
        /// `read`, `changed`, `watched`, …
        action: &'static str,
        /// Where it lies.
        place: String,
        /// What the store said.
        reason: String,
    },
    /// A change was sent and not answered: it may have happened, or may yet happen. Read it again before you do
    /// anything that relies on either.
    #[error("whether the topology at {place} was changed is not known: {reason}")]
    Unknown {
        /// Where it lies.
        place: String,
        /// Why there is no answer.
        reason: String,
    },
    /// The store shows an older document than it did: it was restored from a backup, or is another one.
    #[error(
        "the topology at {place} went back from revision {} to {}: was the store restored from a backup? Compare \
         its epoch with the ledger's and start the service again",
        known.0, found.0
    )]
    WentBack {
        /// Where it lies.
        place: String,
        /// What it showed before.
        known: Revision,
        /// What it shows now.
        found: Revision,
    },
}

impl StoreError {
    /// Whether the same call may succeed later without anybody correcting anything.
    pub fn is_transient(&self) -> bool {
        match self {
            StoreError::Missing { .. }
            | StoreError::Conflict { .. }
            | StoreError::Unavailable { .. }
            | StoreError::Unknown { .. } => true,
            StoreError::Malformed { .. } | StoreError::Refused { .. } | StoreError::WentBack { .. } => false,
        }
    }
}

/// Reads the stored form of a document, without the field `mark` that the store itself put there. (The field is
/// taken out first: serde's `flatten` would lose the numeric keys of nested maps.)
pub(super) fn parse(text: &[u8], mark: &str) -> Result<(serde_json::Value, Topology), String> {
    let mut fields: Extra = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let value = fields.remove(mark).unwrap_or_default();
    let topology: Topology =
        serde_json::from_value(serde_json::Value::Object(fields)).map_err(|error| error.to_string())?;
    topology.check()?;
    Ok((value, topology))
}
