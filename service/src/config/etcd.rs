//! `[topology.etcd]`: how to reach the etcd that keeps the topology.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use super::auth::{Secret, without_newline};
use super::load::ConfigError;
use super::{TopologyConfig, TopologyStoreKind};
use crate::topology::{EtcdOptions, EtcdStore, FileStore, InstanceStore, TopologyStore};

/// Where the topology lies and where instances register: the same file or etcd.
#[derive(Debug, Clone)]
pub struct Stores {
    /// For the topology.
    pub topology: Arc<dyn TopologyStore>,
    /// For the instances.
    pub instances: Arc<dyn InstanceStore>,
}

impl TopologyConfig {
    /// The stores that this asks for. Reads the password and certificates, connects to nothing yet.
    pub fn stores(&self) -> Result<Stores, ConfigError> {
        fn both<S: TopologyStore + InstanceStore + 'static>(store: S) -> Stores {
            let store = Arc::new(store);
            Stores { topology: Arc::clone(&store) as Arc<dyn TopologyStore>, instances: store }
        }
        Ok(match self.store {
            TopologyStoreKind::File => both(FileStore::new(&self.path)),
            TopologyStoreKind::Etcd => both(EtcdStore::new(self.etcd.options()?)),
        })
    }
}

/// `[topology.etcd]`: how to reach the etcd that keeps the topology.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EtcdConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT` of its members. Default: `http://127.0.0.1:2379`.
    pub endpoints: Vec<String>,
    /// What all keys begin with. Default: `/seckill`.
    pub prefix: String,
    /// User. Default: none.
    pub username: Option<String>,
    /// The user's password; from the environment only.
    pub password: Option<Secret>,
    /// File with the user's password.
    pub password_file: Option<PathBuf>,
    /// PEM file of the authority that signed the members' certificates. Default: the system's.
    pub ca_file: Option<PathBuf>,
    /// PEM file of this client's certificate. Default: none.
    pub cert_file: Option<PathBuf>,
    /// PEM file of the certificate's key.
    pub key_file: Option<PathBuf>,
    /// A call without an answer after this long has failed or has an unknown outcome. Default: 1000.
    pub request_timeout_ms: u64,
    /// A connection that is not there after this long has failed. Default: 1000.
    pub connect_timeout_ms: u64,
    /// How often the topology is read to confirm the authority to write. Default: 500.
    pub confirm_interval_ms: u64,
}

impl Default for EtcdConfig {
    fn default() -> Self {
        EtcdConfig {
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            prefix: "/seckill".to_owned(),
            username: None,
            password: None,
            password_file: None,
            ca_file: None,
            cert_file: None,
            key_file: None,
            request_timeout_ms: 1000,
            connect_timeout_ms: 1000,
            confirm_interval_ms: 500,
        }
    }
}

impl EtcdConfig {
    /// How to reach it, with the password and certificates read from their files.
    pub fn options(&self) -> Result<EtcdOptions, ConfigError> {
        let user = match &self.username {
            Some(name) => Some((name.clone(), self.read_password()?)),
            None => None,
        };
        let identity_pem = match (&self.cert_file, &self.key_file) {
            (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
            _ => None,
        };
        Ok(EtcdOptions {
            endpoints: self.endpoints.clone(),
            prefix: self.prefix.clone(),
            user,
            ca_pem: self.ca_file.as_deref().map(read).transpose()?,
            identity_pem,
            request_timeout: Duration::from_millis(self.request_timeout_ms),
            connect_timeout: Duration::from_millis(self.connect_timeout_ms),
            confirm_interval: Duration::from_millis(self.confirm_interval_ms),
        })
    }

    fn read_password(&self) -> Result<String, ConfigError> {
        match (&self.password, &self.password_file) {
            (Some(password), _) => Ok(password.expose().to_owned()),
            (None, Some(path)) => {
                let bytes = read(path)?;
                String::from_utf8(without_newline(&bytes).to_vec()).map_err(|_| ConfigError::Key {
                    key: "topology.etcd.password_file".to_owned(),
                    reason: "is not text".to_owned(),
                    variable: None,
                })
            }
            (None, None) => Ok(String::new()),
        }
    }

    /// What its type leaves open: the key and the reason of the first thing that is wrong.
    pub(super) fn validate(&self, lease_ttl_ms: u64) -> Result<(), (String, String)> {
        let problem = |key: &str, reason: &str| Err((format!("topology.etcd.{key}"), reason.to_owned()));
        if self.endpoints.is_empty() {
            return problem("endpoints", "at least one is needed");
        }
        if let Some(at) = self.endpoints.iter().position(|endpoint| !super::validate::is_http_url(endpoint)) {
            return problem(&format!("endpoints[{at}]"), "must be http://HOST:PORT or https://HOST:PORT");
        }
        let secured = self.endpoints.iter().filter(|endpoint| endpoint.starts_with("https://")).count();
        if secured != 0 && secured != self.endpoints.len() {
            return problem("endpoints", "all must be https://, or none");
        }
        let certificates = [&self.ca_file, &self.cert_file, &self.key_file];
        if secured == 0 && certificates.iter().any(|file| file.is_some()) {
            return problem("endpoints", "must be https:// where certificates are given");
        }
        if self.cert_file.is_some() != self.key_file.is_some() {
            return problem("cert_file", "cert_file and key_file belong together");
        }
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"/-_.".contains(&byte);
        if self.prefix.is_empty() || self.prefix.ends_with('/') || !self.prefix.bytes().all(valid) {
            return problem("prefix", "must be letters, digits and /-_. without a / at the end");
        }
        match (&self.username, &self.password, &self.password_file) {
            (None, None, None) | (Some(_), Some(_), None) | (Some(_), None, Some(_)) => {}
            (Some(_), None, None) => return problem("username", "needs password_file"),
            (Some(_), Some(_), Some(_)) => {
                return problem("password_file", "either password or password_file");
            }
            (None, _, _) => return problem("password_file", "needs username"),
        }
        for (key, value, min, max) in [
            ("request_timeout_ms", self.request_timeout_ms, 50, 30_000),
            ("connect_timeout_ms", self.connect_timeout_ms, 50, 30_000),
            ("confirm_interval_ms", self.confirm_interval_ms, 10, 10_000),
        ] {
            if value < min || value > max {
                return problem(key, &format!("must be from {min} to {max}, not {value}"));
            }
        }
        // One read that is lost must not cost the authority.
        if 2 * (self.confirm_interval_ms + self.request_timeout_ms) > lease_ttl_ms {
            return problem(
                "request_timeout_ms",
                "twice request_timeout_ms + confirm_interval_ms must fit into topology.lease_ttl_ms",
            );
        }
        Ok(())
    }
}

fn read(path: impl AsRef<Path>) -> Result<Vec<u8>, ConfigError> {
    let path = path.as_ref();
    std::fs::read(path).map_err(|error| ConfigError::File { path: path.to_owned(), error })
}
