//! Who may come in: bearer tokens, rate limits, client addresses, stream tickets.

mod address;
mod buckets;
mod limiter;
mod ticket;
mod tokens;

pub use address::ClientAddress;
pub use limiter::{Limited, Limiter, Scope};
pub use ticket::{TICKET_TTL_S, Tickets};
pub use tokens::{Actor, InvalidKey, Key, MIN_SECRET_BYTES, Ring, Tokens, Unauthenticated};

use crate::config::{AuthConfig, KeyConfig, KeyError, KeyMaterial, KeyRing};

/// Why the key rings of the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key cannot be read.
    #[error("auth.{ring}: {source}")]
    Unreadable {
        /// Which ring.
        ring: &'static str,
        /// Why.
        source: KeyError,
    },
    /// A key is none.
    #[error("auth.{ring}: {source}")]
    Invalid {
        /// Which ring.
        ring: &'static str,
        /// Why.
        source: InvalidKey,
    },
}

/// Builds the three key rings, and the tickets from the secrets in them.
pub fn open_rings(config: &AuthConfig) -> Result<(Tokens, Tickets), Error> {
    let mut secrets = Vec::new();
    let mut ring = |name: &'static str, ring: &KeyRing| -> Result<Ring, Error> {
        let keys = ring.keys.iter().map(|key| open_key(name, key, &mut secrets));
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        Ok(Ring::new(keys, ring.audience.as_deref(), &ring.subject_claim))
    };
    let tokens = Tokens::new(
        ring("users", &config.users)?,
        ring("payments", &config.payments)?,
        ring("admin", &config.admin)?,
    );
    let tickets = Tickets::new(secrets.iter().map(Vec::as_slice));
    Ok((tokens, tickets))
}

fn open_key(ring: &'static str, config: &KeyConfig, secrets: &mut Vec<Vec<u8>>) -> Result<Key, Error> {
    let material = config.material().map_err(|source| Error::Unreadable { ring, source })?;
    let kid = config.kid.as_deref();
    let key = match material {
        KeyMaterial::Hs256(secret) => {
            let key = Key::hs256(kid, &secret);
            secrets.push(secret);
            key
        }
        KeyMaterial::EdDsaPem(pem) => Key::ed25519(kid, &pem),
    };
    key.map_err(|source| Error::Invalid { ring, source })
}
