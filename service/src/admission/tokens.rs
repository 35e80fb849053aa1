//! Bearer tokens: JSON Web Tokens (RFC 7519) of three separate key rings.
//!
//! A purchase pays for its token every time, so the verification is cut to what it needs: an HMAC state made
//! once per key, one pass over the claims that copies nothing, and a memory of *header strings* (`{"alg":
//! "HS256","typ":"JWT"}` is the same for every token of an issuer). No verified token is remembered.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use jsonwebtoken::{Algorithm, DecodingKey};
use seckill_domain::Uid;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use sha2::Sha256;

/// The longest token that is looked at.
const MAX_TOKEN_BYTES: usize = 4096;
/// Claims up to this size are decoded on the stack.
const STACK_CLAIMS_BYTES: usize = 512;
/// Header strings that are remembered per ring; an issuer needs one per key.
const MAX_KNOWN_HEADERS: usize = 16;
/// How far in the future `nbf` may lie, because the issuer's clock is not ours. `exp` gets no such grace.
const NOT_BEFORE_LEEWAY_S: f64 = 5.0;

pub(super) type HmacSha256 = Hmac<Sha256>;

/// The token was refused. Says nothing more: the reason is the bearer's business, not the network's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the bearer token is missing or not valid")]
pub struct Unauthenticated;

/// Why a key ring could not be built.
#[derive(Debug, thiserror::Error)]
pub enum InvalidKey {
    /// HMAC keys shorter than this are guessed too easily.
    #[error("an HS256 secret must have at least {MIN_SECRET_BYTES} bytes")]
    ShortSecret,
    /// Not a public key.
    #[error("not an Ed25519 public key in PEM: {0}")]
    PublicKey(#[from] jsonwebtoken::errors::Error),
}

/// The shortest HS256 secret in bytes. RFC 7518 asks for 32; what is shorter than 16 is refused outright.
pub const MIN_SECRET_BYTES: usize = 16;

/// What a key verifies with.
#[derive(Clone)]
pub struct Key {
    kid: Option<Box<str>>,
    material: Material,
}

#[derive(Clone)]
enum Material {
    /// The HMAC state after the key's block.
    Hs256(Box<HmacSha256>),
    EdDsa(DecodingKey),
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("kid", &self.kid).field("alg", &self.algorithm()).finish_non_exhaustive()
    }
}

impl Key {
    /// A shared secret.
    pub fn hs256(kid: Option<&str>, secret: &[u8]) -> Result<Key, InvalidKey> {
        if secret.len() < MIN_SECRET_BYTES {
            return Err(InvalidKey::ShortSecret);
        }
        let state = HmacSha256::new_from_slice(secret).map_err(|_| InvalidKey::ShortSecret)?;
        Ok(Key { kid: kid.map(Into::into), material: Material::Hs256(Box::new(state)) })
    }

    /// An Ed25519 public key in PEM.
    pub fn ed25519(kid: Option<&str>, public_key_pem: &[u8]) -> Result<Key, InvalidKey> {
        let key = DecodingKey::from_ed_pem(public_key_pem)?;
        Ok(Key { kid: kid.map(Into::into), material: Material::EdDsa(key) })
    }

    fn algorithm(&self) -> Alg {
        match self.material {
            Material::Hs256(_) => Alg::HS256,
            Material::EdDsa(_) => Alg::EdDSA,
        }
    }

    fn verifies(&self, message: &str, signature: &str) -> bool {
        match &self.material {
            Material::Hs256(state) => {
                let mut bytes = [0; 33];
                let Ok(32) = URL_SAFE_NO_PAD.decode_slice(signature, &mut bytes) else { return false };
                let mut mac = HmacSha256::clone(state);
                mac.update(message.as_bytes());
                // Constant time.
                mac.verify_slice(&bytes[..32]).is_ok()
            }
            Material::EdDsa(key) => {
                jsonwebtoken::crypto::verify(signature, message.as_bytes(), key, Algorithm::EdDSA)
                    .unwrap_or(false)
            }
        }
    }
}

/// The algorithms that we accept. A token names one of them, and only a key made for it is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Alg {
    HS256,
    EdDSA,
}

/// One ring: who may sign, and what the claims must say.
pub struct Ring {
    keys: Vec<Key>,
    audience: Option<Box<str>>,
    subject_claim: Box<str>,
    known_headers: ArcSwap<Vec<KnownHeader>>,
}

#[derive(Clone)]
struct KnownHeader {
    encoded: Box<str>,
    key: usize,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("keys", &self.keys)
            .field("audience", &self.audience)
            .field("subject_claim", &self.subject_claim)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Header<'a> {
    alg: Alg,
    #[serde(borrow, default)]
    kid: Option<Cow<'a, str>>,
    /// RFC 7515 §4.1.11: what is critical and not understood makes the token invalid. We understand none.
    #[serde(default)]
    crit: Option<IgnoredAny>,
}

impl Ring {
    /// A ring. An empty one accepts nothing. `audience`: what `aud` must contain, if anything.
    pub fn new(keys: Vec<Key>, audience: Option<&str>, subject_claim: &str) -> Ring {
        Ring {
            keys,
            audience: audience.map(Into::into),
            subject_claim: subject_claim.into(),
            known_headers: ArcSwap::default(),
        }
    }

    /// Whether no token can pass.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Verifies a token at a time and hands its subject (if it has one) to `use_subject`.
    fn verify<T>(
        &self,
        token: &str,
        now_s: f64,
        use_subject: impl FnOnce(Option<&str>) -> Result<T, Unauthenticated>,
    ) -> Result<T, Unauthenticated> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Unauthenticated);
        }
        let (message, signature) = token.rsplit_once('.').ok_or(Unauthenticated)?;
        let (header, payload) = message.split_once('.').ok_or(Unauthenticated)?;
        if payload.contains('.') {
            return Err(Unauthenticated);
        }
        self.verify_signature(header, message, signature)?;

        let mut stack = [0; STACK_CLAIMS_BYTES];
        let heap;
        let claims = if payload.len() / 4 * 3 + 3 <= STACK_CLAIMS_BYTES {
            let length = URL_SAFE_NO_PAD.decode_slice(payload, &mut stack).map_err(|_| Unauthenticated)?;
            &stack[..length]
        } else {
            heap = URL_SAFE_NO_PAD.decode(payload).map_err(|_| Unauthenticated)?;
            &heap[..]
        };
        let claims = ClaimsSeed(self).read(claims).ok_or(Unauthenticated)?;
        let expires = claims.expires_s.ok_or(Unauthenticated)?;
        if now_s >= expires || claims.not_before_s.is_some_and(|at| now_s + NOT_BEFORE_LEEWAY_S < at) {
            return Err(Unauthenticated);
        }
        if self.audience.is_some() && !claims.audience_matches {
            return Err(Unauthenticated);
        }
        use_subject(claims.subject.as_deref())
    }

    fn verify_signature(&self, header: &str, message: &str, signature: &str) -> Result<(), Unauthenticated> {
        let known = self.known_headers.load();
        if let Some(known) = known.iter().find(|known| *known.encoded == *header)
            && self.keys[known.key].verifies(message, signature)
        {
            return Ok(());
        }
        // Unknown, or another key signed under the same header: all that fit are tried.
        let decoded = URL_SAFE_NO_PAD.decode(header).map_err(|_| Unauthenticated)?;
        let parsed: Header<'_> = serde_json::from_slice(&decoded).map_err(|_| Unauthenticated)?;
        if parsed.crit.is_some() {
            return Err(Unauthenticated);
        }
        // `kid` selects; keys that were configured without one are always tried.
        let key = self
            .keys
            .iter()
            .position(|key| {
                key.algorithm() == parsed.alg
                    && match (&parsed.kid, &key.kid) {
                        (Some(wanted), Some(kid)) => **wanted == **kid,
                        (None, _) | (_, None) => true,
                    }
                    && key.verifies(message, signature)
            })
            .ok_or(Unauthenticated)?;
        // Only headers of tokens that were signed by us get here, so strangers cannot fill the list.
        if known.len() < MAX_KNOWN_HEADERS && !known.iter().any(|known| *known.encoded == *header) {
            let mut more = Vec::clone(&known);
            more.push(KnownHeader { encoded: header.into(), key });
            self.known_headers.store(Arc::new(more));
        }
        Ok(())
    }
}

#[derive(Default)]
struct Claims<'a> {
    subject: Option<Cow<'a, str>>,
    expires_s: Option<f64>,
    not_before_s: Option<f64>,
    audience_matches: bool,
}

/// Reads the claims in one pass. Which of them is the subject is the configuration's choice, so a derived
/// struct would not do.
struct ClaimsSeed<'r>(&'r Ring);

impl ClaimsSeed<'_> {
    fn read<'a>(&self, json: &'a [u8]) -> Option<Claims<'a>> {
        let mut deserializer = serde_json::Deserializer::from_slice(json);
        let claims = ClaimsSeed(self.0).deserialize(&mut deserializer).ok()?;
        deserializer.end().ok()?;
        Some(claims)
    }
}

impl<'de> DeserializeSeed<'de> for ClaimsSeed<'_> {
    type Value = Claims<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

/// A string that borrows from the token where it can.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience<'a> {
    One(#[serde(borrow)] Cow<'a, str>),
    Many(Vec<String>),
}

impl<'de> Visitor<'de> for ClaimsSeed<'_> {
    type Value = Claims<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("claims")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        fn once<T, E: serde::de::Error>(slot: &mut Option<T>, value: T) -> Result<(), E> {
            // Two readers may disagree on which of two values counts (RFC 8725), so none does.
            match slot.replace(value) {
                None => Ok(()),
                Some(_) => Err(E::custom("a claim appears twice")),
            }
        }
        let mut claims = Claims::default();
        let mut audience_seen = None;
        while let Some(Text(name)) = map.next_key()? {
            if *name == *self.0.subject_claim {
                let Text(subject) = map.next_value()?;
                once(&mut claims.subject, subject)?;
                continue;
            }
            match &*name {
                "exp" => once(&mut claims.expires_s, map.next_value()?)?,
                "nbf" => once(&mut claims.not_before_s, map.next_value()?)?,
                "aud" => {
                    let audience: Audience<'de> = map.next_value()?;
                    once(&mut audience_seen, ())?;
                    let wanted = self.0.audience.as_deref();
                    claims.audience_matches = match &audience {
                        Audience::One(one) => Some(&**one) == wanted,
                        Audience::Many(many) => many.iter().any(|one| Some(&**one) == wanted),
                    };
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(claims)
    }
}

/// Who acts through a payments or an admin token: its subject, or the ring's name where it has none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor(pub Arc<str>);

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The three rings. A token of one is nothing to the others.
#[derive(Debug)]
pub struct Tokens {
    users: Ring,
    payments: Ring,
    admin: Ring,
}

impl Tokens {
    /// Puts the rings together.
    pub fn new(users: Ring, payments: Ring, admin: Ring) -> Tokens {
        Tokens { users, payments, admin }
    }

    /// The user of a token.
    pub fn user(&self, token: &str) -> Result<Uid, Unauthenticated> {
        self.users.verify(token, unix_now_s(), |subject| {
            Uid::new(subject.ok_or(Unauthenticated)?).map_err(|_| Unauthenticated)
        })
    }

    /// The backend that holds a payments token.
    pub fn payments(&self, token: &str) -> Result<Actor, Unauthenticated> {
        actor(&self.payments, token, "payments")
    }

    /// The operator that holds an admin token. The rings are separate, so a valid token of the admin ring needs
    /// no further role.
    pub fn admin(&self, token: &str) -> Result<Actor, Unauthenticated> {
        actor(&self.admin, token, "admin")
    }
}

fn actor(ring: &Ring, token: &str, nameless: &str) -> Result<Actor, Unauthenticated> {
    ring.verify(token, unix_now_s(), |subject| match subject {
        // The name goes into logs and the history.
        Some(name) => Uid::new(name).map(|name| Actor(name.as_str().into())).map_err(|_| Unauthenticated),
        None => Ok(Actor(nameless.into())),
    })
}

fn unix_now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64())
}

#[cfg(test)]
mod tests;
