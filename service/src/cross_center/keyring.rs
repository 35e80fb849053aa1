//! Long-term keys: which center signs with what.

use std::collections::HashMap;
use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use seckill_domain::CenterId;
use sha2::Sha256;

/// A secret is as long as the hash at least (RFC 2104, section 3), in bytes.
const MIN_SECRET_BYTES: usize = 32;

/// A key for HMAC-SHA256, ready for use. `Debug` does not show it.
#[derive(Clone)]
pub struct MacKey(Hmac<Sha256>);

impl MacKey {
    /// A key of any length.
    pub fn new(secret: &[u8]) -> MacKey {
        match Hmac::<Sha256>::new_from_slice(secret) {
            Ok(mac) => MacKey(mac),
            Err(_) => unreachable!("HMAC takes keys of any length"),
        }
    }

    /// The code of a message.
    pub fn sign(&self, message: &[u8]) -> [u8; 32] {
        let mut mac = self.0.clone();
        mac.update(message);
        mac.finalize().into_bytes().into()
    }

    /// Whether a code is the message's, compared in constant time.
    pub fn verifies(&self, message: &[u8], code: &[u8]) -> bool {
        let mut mac = self.0.clone();
        mac.update(message);
        mac.verify_slice(code).is_ok()
    }
}

impl fmt::Debug for MacKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MacKey(***)")
    }
}

/// A long-term key.
#[derive(Clone)]
pub struct CrossKey {
    /// Its name in signatures, `[A-Za-z0-9_-]{1,64}`.
    pub id: String,
    /// The center that signs with it.
    pub center: CenterId,
    /// The secret that both sides have.
    pub secret: Vec<u8>,
}

impl fmt::Debug for CrossKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CrossKey").field("id", &self.id).field("center", &self.center).finish_non_exhaustive()
    }
}

/// Why keys make no ring.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyringError {
    /// A name that cannot stand in a signature.
    #[error("the key id {0:?} is not 1 to 64 characters out of A-Z, a-z, 0-9, '_' and '-'")]
    Id(String),
    /// Two keys with one name.
    #[error("two keys have the id {0}")]
    Twice(String),
    /// A secret that can be guessed.
    #[error("the secret of key {id} has {bytes} bytes; at least {MIN_SECRET_BYTES} are needed")]
    Short {
        /// The key.
        id: String,
        /// How long its secret is.
        bytes: usize,
    },
}

/// All long-term keys that a center knows: its own, of which the first one signs, and those of other centers, all
/// of which are accepted.
///
/// A key is rotated without a pause in three steps, each rolled out everywhere before the next: the new key is
/// added behind the old one; it is put before the old one; the old one is taken away.
#[derive(Debug, Clone)]
pub struct Keyring {
    center: CenterId,
    own: Option<CrossKey>,
    others: HashMap<String, CrossKey>,
}

impl Keyring {
    /// The ring of a center. `keys` in the order of the configuration.
    pub fn new(center: CenterId, keys: impl IntoIterator<Item = CrossKey>) -> Result<Keyring, KeyringError> {
        let mut ring = Keyring { center, own: None, others: HashMap::new() };
        let mut ids = std::collections::HashSet::new();
        for key in keys {
            let valid = (1..=64).contains(&key.id.len())
                && key.id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
            if !valid {
                return Err(KeyringError::Id(key.id));
            }
            if !ids.insert(key.id.clone()) {
                return Err(KeyringError::Twice(key.id));
            }
            if key.secret.len() < MIN_SECRET_BYTES {
                return Err(KeyringError::Short { id: key.id, bytes: key.secret.len() });
            }
            if key.center != ring.center {
                ring.others.insert(key.id.clone(), key);
            } else if ring.own.is_none() {
                ring.own = Some(key);
            }
        }
        Ok(ring)
    }

    /// The center whose ring it is.
    pub fn center(&self) -> &CenterId {
        &self.center
    }

    /// The key that this center signs with.
    pub fn own(&self) -> Option<&CrossKey> {
        self.own.as_ref()
    }

    /// Another center's key. This center's own are not among them: what it signed is not accepted from anybody.
    pub fn of_others(&self, id: &str) -> Option<&CrossKey> {
        self.others.get(id)
    }
}

#[cfg(test)]
impl Keyring {
    /// The keys of centers a and b, as one of them has them.
    pub(crate) fn of_a_test(of: &str) -> Keyring {
        let center = |name: &str| CenterId::new(name).unwrap();
        let key = |name: &str| CrossKey {
            id: format!("{name}-1"),
            center: center(name),
            secret: [name.as_bytes()[0]; 32].to_vec(),
        };
        Keyring::new(center(of), [key("a"), key("b")]).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str, center: &str, bytes: usize) -> CrossKey {
        CrossKey { id: id.to_owned(), center: CenterId::new(center).unwrap(), secret: vec![7; bytes] }
    }

    #[test]
    fn the_first_key_of_the_center_signs_and_all_of_the_others_are_accepted() {
        let a = CenterId::new("a").unwrap();
        let keys = [key("a2", "a", 32), key("a1", "a", 32), key("b1", "b", 32), key("b2", "b", 32)];
        let ring = Keyring::new(a, keys).unwrap();
        assert_eq!(ring.own().unwrap().id, "a2");
        assert!(ring.of_others("b1").is_some() && ring.of_others("b2").is_some());
        assert!(ring.of_others("a1").is_none() && ring.of_others("a2").is_none());
    }

    #[test]
    fn weak_and_ambiguous_keys_are_refused() {
        let ring = |keys: Vec<CrossKey>| Keyring::new(CenterId::new("a").unwrap(), keys).unwrap_err();
        assert_eq!(ring(vec![key("k", "b", 31)]), KeyringError::Short { id: "k".into(), bytes: 31 });
        assert_eq!(ring(vec![key("k", "b", 32), key("k", "a", 32)]), KeyringError::Twice("k".into()));
        assert_eq!(ring(vec![key("a\"b", "b", 32)]), KeyringError::Id("a\"b".into()));
    }

    #[test]
    fn secrets_do_not_show() {
        let shown = format!("{:?} {:?}", key("k", "b", 32), MacKey::new(&[7; 32]));
        assert!(!shown.contains('7'), "{shown}");
    }
}
