//! The data folder: locked by one process, with the secrets and tokens of this machine.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::Serialize;

use crate::config::without_newline;

/// The tokens written to files are for the person at this machine: they outlive every test and demo.
const TOKEN_LIFE_S: u64 = 10 * 365 * 24 * 3600;
/// Bytes of a new secret, written as hexadecimal digits.
const SECRET_BYTES: usize = 32;

/// What is wrong with a data folder.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another process works in it.
    #[error("{} is in use by another `seckill up`{}", path.display(), pid.as_ref().map_or_else(String::new, |pid| format!(" (process {pid})")))]
    InUse {
        /// The folder.
        path: PathBuf,
        /// The other process, if it could be told.
        pid: Option<String>,
    },
    /// The file system refused.
    #[error("the data folder cannot be used: {} {}: {source}", action, path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file or folder.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A token could not be signed.
    #[error("a token cannot be signed: {0}")]
    Token(#[from] jsonwebtoken::errors::Error),
}

/// A data folder, held until this is dropped (or the process dies).
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Creates the folder if need be and locks it.
    pub fn open(path: &Path) -> Result<DataDir, DataDirError> {
        folder(path)?;
        // Absolute, because it goes into the configuration of child processes.
        let path = path.canonicalize().map_err(io_error("find", path))?;
        let lock_path = path.join("lock");
        let mut lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&lock_path)
            .map_err(io_error("write", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = lock.read_to_string(&mut pid);
                let pid = Some(pid.trim().to_owned()).filter(|pid| !pid.is_empty());
                return Err(DataDirError::InUse { path, pid });
            }
            Err(TryLockError::Error(source)) => return Err(io_error("lock", &lock_path)(source)),
        }
        // Written through the locked file: it also shows that the folder takes writes.
        lock.set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .and_then(|()| lock.sync_all())
            .map_err(io_error("write", &lock_path))?;
        Ok(DataDir { path, _lock: lock })
    }

    /// The folder, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file or folder in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// A secret in a file of its own, made up if there is none yet. Its bytes count as they stand, a newline at
    /// the end aside.
    pub fn secret(&self, name: &str) -> Result<Vec<u8>, DataDirError> {
        let path = self.join(name);
        match fs::read(&path) {
            Ok(bytes) if !without_newline(&bytes).is_empty() => return Ok(without_newline(&bytes).to_vec()),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("read", &path)(error));
            }
            _ => {}
        }
        let random: [u8; SECRET_BYTES] = rand::random();
        let text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        private_file(&path, format!("{text}\n").as_bytes())?;
        Ok(text.into_bytes())
    }

    /// A token for `subject` in a file of its own, signed anew at each start: the secret may have changed.
    pub fn token(&self, name: &str, subject: &str, secret: &[u8]) -> Result<PathBuf, DataDirError> {
        #[derive(Serialize)]
        struct Claims<'a> {
            sub: &'a str,
            iat: u64,
            exp: u64,
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let claims = Claims { sub: subject, iat: now, exp: now + TOKEN_LIFE_S };
        let token =
            jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &EncodingKey::from_secret(secret))?;
        let path = self.join(name);
        private_file(&path, format!("{token}\n").as_bytes())?;
        Ok(path)
    }
}

/// Creates a folder that only this user can read.
pub(super) fn folder(path: &Path) -> Result<(), DataDirError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("create", path))
}

/// Replaces a file that only this user can read, whole or not at all.
fn private_file(path: &Path, content: &[u8]) -> Result<(), DataDirError> {
    let next = path.with_extension("new");
    let _ = fs::remove_file(&next);
    OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&next)
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&next, path))
        .map_err(io_error("write", path))
}

pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataDirError {
    let path = path.to_owned();
    move |source| DataDirError::Io { action, path, source }
}
