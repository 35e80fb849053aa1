//! `[cross_center]`: what centers sign their calls to each other with.

use std::path::PathBuf;

use seckill_domain::CenterId;
use serde::Deserialize;

use super::auth::{KeyError, Secret, without_newline};
use crate::cross_center::{CrossKey, Keyring};

/// `[cross_center]`: calls between centers.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CrossCenterConfig {
    /// Long-term keys of all centers; of this center's own the first one signs. Default: none, so this center
    /// neither calls others nor answers them.
    pub keys: Vec<CrossKeyConfig>,
}

/// A long-term key, the same on both sides.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CrossKeyConfig {
    /// Its name in signatures, `[A-Za-z0-9_-]{1,64}`.
    pub id: String,
    /// The center that signs with it.
    pub center: CenterId,
    /// File with the secret, 32 bytes at least: its bytes as they stand, a newline at the end aside.
    #[serde(default)]
    pub secret_file: Option<PathBuf>,
    /// The secret itself; from the environment only.
    #[serde(default)]
    pub secret: Option<Secret>,
}

/// Why there is no key ring.
#[derive(Debug, thiserror::Error)]
pub enum CrossCenterError {
    /// A key cannot be read.
    #[error("cross_center.keys[{index}]: {error}")]
    Key {
        /// Its place.
        index: usize,
        /// Why.
        error: KeyError,
    },
    /// Neither file nor secret, or both.
    #[error("cross_center.keys[{index}]: exactly one of secret_file and secret is needed")]
    Source {
        /// Its place.
        index: usize,
    },
    /// The keys do not fit together.
    #[error("cross_center.keys: {0}")]
    Ring(#[from] crate::cross_center::KeyringError),
}

impl CrossCenterConfig {
    /// Reads the keys of a center.
    pub fn keyring(&self, center: CenterId) -> Result<Keyring, CrossCenterError> {
        let mut keys = Vec::with_capacity(self.keys.len());
        for (index, key) in self.keys.iter().enumerate() {
            let secret = match (&key.secret, &key.secret_file) {
                (Some(secret), None) => secret.expose().as_bytes().to_vec(),
                (None, Some(path)) => {
                    let failed = |error| CrossCenterError::Key {
                        index,
                        error: KeyError::File { path: path.clone(), error },
                    };
                    without_newline(&std::fs::read(path).map_err(failed)?).to_vec()
                }
                _ => return Err(CrossCenterError::Source { index }),
            };
            keys.push(CrossKey { id: key.id.clone(), center: key.center.clone(), secret });
        }
        Ok(Keyring::new(center, keys)?)
    }
}
