//! Key rings: whose tokens are believed. Three of them, and a token of one is nothing to the others.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// `[auth]`: three separate key rings.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Shoppers.
    pub users: KeyRing,
    /// The shop's backend, which marks orders paid.
    pub payments: KeyRing,
    /// Operators.
    pub admin: KeyRing,
}

/// `[auth.users]`, `[auth.payments]`, `[auth.admin]`: keys side by side, so that they can be rotated.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeyRing {
    /// `aud` that a token must have. Default: not checked.
    pub audience: Option<String>,
    /// Claim that holds the user id; for users only. Default: `sub`.
    pub subject_claim: String,
    /// The keys. Default: none, so no token is believed.
    pub keys: Vec<KeyConfig>,
}

impl Default for KeyRing {
    fn default() -> Self {
        KeyRing { audience: None, subject_claim: "sub".to_owned(), keys: Vec::new() }
    }
}

/// One key of a ring: `HS256` with `secret_file` (or `secret` from the environment), or `EdDSA` with
/// `public_key_file`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// Selects the key when a token names one; a ring of several keys needs it in each.
    #[serde(default)]
    pub kid: Option<String>,
    /// Signature algorithm; a token with another `alg` is refused.
    pub alg: KeyAlgorithm,
    /// File with the secret: its bytes as they stand, a newline at the end aside.
    #[serde(default)]
    pub secret_file: Option<PathBuf>,
    /// The secret itself; from the environment only.
    #[serde(default)]
    pub secret: Option<Secret>,
    /// PEM file with an Ed25519 public key.
    #[serde(default)]
    pub public_key_file: Option<PathBuf>,
}

/// Signature algorithm of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
pub enum KeyAlgorithm {
    /// HMAC with SHA-256.
    #[serde(rename = "HS256")]
    Hs256,
    /// Ed25519.
    #[serde(rename = "EdDSA")]
    EdDsa,
}

/// A text that `Debug` does not show.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Keeps a text secret.
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// What a key consists of, read from where the configuration says.
#[derive(Clone, PartialEq, Eq)]
pub enum KeyMaterial {
    /// Secret of an HS256 key.
    Hs256(Vec<u8>),
    /// PEM of an Ed25519 public key.
    EdDsaPem(Vec<u8>),
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyMaterial::Hs256(_) => f.write_str("Hs256(***)"),
            KeyMaterial::EdDsaPem(_) => f.write_str("EdDsaPem(…)"),
        }
    }
}

impl KeyConfig {
    /// An HS256 key whose secret lies in a file.
    pub fn hs256_file(path: impl Into<PathBuf>) -> KeyConfig {
        KeyConfig {
            kid: None,
            alg: KeyAlgorithm::Hs256,
            secret_file: Some(path.into()),
            secret: None,
            public_key_file: None,
        }
    }

    /// An HS256 key with its secret.
    pub fn hs256(secret: impl Into<String>) -> KeyConfig {
        KeyConfig {
            kid: None,
            alg: KeyAlgorithm::Hs256,
            secret_file: None,
            secret: Some(Secret::new(secret)),
            public_key_file: None,
        }
    }

    /// Reads the key. The error says which file or setting is wrong.
    pub fn material(&self) -> Result<KeyMaterial, KeyError> {
        match (self.alg, &self.secret, &self.secret_file, &self.public_key_file) {
            (KeyAlgorithm::Hs256, Some(secret), None, None) => hs256(secret.expose().as_bytes(), "secret"),
            (KeyAlgorithm::Hs256, None, Some(file), None) => {
                hs256(&read(file)?, &format!("secret_file {}", file.display()))
            }
            (KeyAlgorithm::EdDsa, None, None, Some(file)) => Ok(KeyMaterial::EdDsaPem(read(file)?)),
            (KeyAlgorithm::Hs256, ..) => Err(KeyError::Hs256Source),
            (KeyAlgorithm::EdDsa, ..) => Err(KeyError::EdDsaSource),
        }
    }
}

/// Why a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Not exactly one source for an HS256 key.
    #[error("an HS256 key needs exactly one of secret_file and secret")]
    Hs256Source,
    /// Not exactly one source for an EdDSA key.
    #[error("an EdDSA key needs public_key_file and nothing else")]
    EdDsaSource,
    /// An empty secret would let everyone sign.
    #[error("{0} is empty")]
    Empty(String),
    /// The file cannot be read.
    #[error("cannot read {path}: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
}

fn read(path: &Path) -> Result<Vec<u8>, KeyError> {
    std::fs::read(path).map_err(|error| KeyError::File { path: path.to_owned(), error })
}

fn hs256(bytes: &[u8], source: &str) -> Result<KeyMaterial, KeyError> {
    let bytes = without_newline(bytes);
    if bytes.is_empty() {
        return Err(KeyError::Empty(source.to_owned()));
    }
    Ok(KeyMaterial::Hs256(bytes.to_vec()))
}

/// A secret's bytes as they stand in its file, a newline at the end aside.
pub fn without_newline(bytes: &[u8]) -> &[u8] {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    bytes.strip_suffix(b"\r").unwrap_or(bytes)
}
