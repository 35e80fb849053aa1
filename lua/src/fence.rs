//! The fence: which writes the ledger accepts at all.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use seckill_domain::{CenterId, Epoch};
use serde::{Deserialize, Serialize};

/// Version of the ledger's formats. A ledger of another schema refuses every write.
pub const SCHEMA: u32 = 1;

/// Names one ledger from its `init` on; a copy restored elsewhere still carries it, a new one does not.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LedgerId(Arc<str>);

impl LedgerId {
    /// A ledger id: 1–40 characters out of a-z, 0-9 and '-'.
    pub fn new(text: &str) -> Option<LedgerId> {
        let valid = (1..=40).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        valid.then(|| LedgerId(Arc::from(text)))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LedgerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for LedgerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a write must carry, exactly: ledger, epoch and master center (rules F1 and F2).
///
/// Stored in the ledger, and sent with each call, as the text `schema:ledger_id:epoch:master`, so that the
/// check is one comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// The ledger's identity.
    pub ledger_id: LedgerId,
    /// The epoch of the topology's authority.
    pub epoch: Epoch,
    /// The master center of that epoch.
    pub master: CenterId,
}

impl Fence {
    /// The same ledger and master at another epoch.
    pub fn at(&self, epoch: Epoch) -> Fence {
        Fence { epoch, ..self.clone() }
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEMA}:{}:{}:{}", self.ledger_id, self.epoch, self.master)
    }
}

/// Why a stored fence could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidFence {
    /// Written by another release of the ledger's formats.
    #[error("the ledger has schema {found}, this release reads schema {SCHEMA}")]
    Schema {
        /// The ledger's schema.
        found: String,
    },
    /// Not a fence at all.
    #[error("not a fence: {0:?}")]
    Malformed(String),
}

impl FromStr for Fence {
    type Err = InvalidFence;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || InvalidFence::Malformed(text.chars().take(120).collect());
        let mut parts = text.split(':');
        let (Some(schema), Some(ledger_id), Some(epoch), Some(master), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(malformed());
        };
        if schema != SCHEMA.to_string() {
            return Err(InvalidFence::Schema { found: schema.to_owned() });
        }
        Ok(Fence {
            ledger_id: LedgerId::new(ledger_id).ok_or_else(malformed)?,
            epoch: Epoch(epoch.parse().map_err(|_| malformed())?),
            master: master.parse().map_err(|_| malformed())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_survives_text() {
        let fence = Fence {
            ledger_id: LedgerId::new("0a1b-2c").unwrap(),
            epoch: Epoch(7),
            master: CenterId::new("a").unwrap(),
        };
        assert_eq!(fence.to_string(), "1:0a1b-2c:7:a");
        assert_eq!(fence.to_string().parse::<Fence>().unwrap(), fence);
        assert!(matches!("2:x:7:a".parse::<Fence>(), Err(InvalidFence::Schema { .. })));
        for text in ["", "1", "1:x:7", "1:x:7:a:b", "1:X:7:a", "1:x:-1:a", "1:x:7:A"] {
            assert!(matches!(
                text.parse::<Fence>(),
                Err(InvalidFence::Malformed(_) | InvalidFence::Schema { .. })
            ));
        }
    }
}
