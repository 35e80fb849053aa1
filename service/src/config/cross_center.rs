//! `[cross_center]`: what centers sign their calls to each other with, and the TLS underneath.

use std::path::{Path, PathBuf};

use seckill_domain::CenterId;
use serde::Deserialize;

use super::Config;
use super::auth::{KeyError, Secret, without_newline};
use super::validate::{Problem, problem};
use crate::cross_center::tls::{Authorities, CallerTls, Identity, ListenerTls, TlsError};
use crate::cross_center::{CrossKey, Keyring};

/// `[cross_center]`: calls between centers.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CrossCenterConfig {
    /// Long-term keys of all centers; of this center's own the first one signs. Default: none, so this center
    /// neither calls others nor answers them.
    pub keys: Vec<CrossKeyConfig>,
    /// TLS of the internal API.
    pub tls: CrossTlsConfig,
}

/// `[cross_center.tls]`: TLS of the internal API, both of the listener and of this center's calls. The files are PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CrossTlsConfig {
    /// This center's certificate, then those between it and its authority. The internal listener shows it and speaks
    /// nothing but TLS then; calls to other centers show it where they ask for one. Default: none.
    pub cert_file: Option<PathBuf>,
    /// The certificate's key. Default: none.
    pub key_file: Option<PathBuf>,
    /// Authorities that sign the other centers' certificates. Default: the system's.
    pub ca_file: Option<PathBuf>,
    /// Authorities that sign what callers must show. Default: none, callers show nothing.
    pub client_ca_file: Option<PathBuf>,
}

/// TLS of the internal API, with its files read.
#[derive(Debug, Clone)]
pub struct InternalTls {
    /// For the listener; without it, it speaks plain text.
    pub listener: Option<ListenerTls>,
    /// For calls to `https://` URLs.
    pub caller: CallerTls,
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
    /// A file of TLS cannot be used.
    #[error("cross_center.tls.{key}: {path} {error}")]
    Tls {
        /// Which of them.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: TlsError,
    },
    /// A file of TLS cannot be read.
    #[error("cross_center.tls.{key}: cannot read {path}: {error}")]
    TlsFile {
        /// Which of them.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
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

impl Config {
    /// What the files of `[cross_center.tls]` leave open: whether both sides of a call will speak the same.
    pub(super) fn validate_internal_tls(&self) -> Result<(), Problem> {
        let tls = &self.cross_center.tls;
        if tls.cert_file.is_some() != tls.key_file.is_some() {
            return problem("cross_center.tls.cert_file", "cert_file and key_file belong together");
        }
        let secured = tls.cert_file.is_some();
        if tls.client_ca_file.is_some() && !secured {
            return problem(
                "cross_center.tls.client_ca_file",
                "needs cert_file: without it the listener speaks no TLS",
            );
        }
        let listed = self.cluster.centers.iter().position(|center| center.id == self.center.id);
        let listed = listed.map(|index| {
            (
                format!("cluster.centers[{index}].internal_url"),
                self.cluster.centers[index].internal_url.clone(),
            )
        });
        for (key, url) in
            listed.into_iter().chain([("listen.internal_url".to_owned(), self.listen.internal_url())])
        {
            match (url.starts_with("https://"), secured) {
                (true, false) => {
                    return problem(
                        &key,
                        format!(
                            "{url} needs a certificate: set cert_file and key_file in [cross_center.tls]"
                        ),
                    );
                }
                (false, true) => {
                    return problem(
                        &key,
                        format!(
                            "{url} must be https://, because with cross_center.tls.cert_file the listener speaks TLS"
                        ),
                    );
                }
                (true, true) | (false, false) => {}
            }
        }
        Ok(())
    }

    /// Reads the files of `[cross_center.tls]`.
    pub fn internal_tls(&self) -> Result<InternalTls, CrossCenterError> {
        let tls = &self.cross_center.tls;
        let believed = match &tls.ca_file {
            Some(path) => judged("ca_file", path, Authorities::of_pem)?,
            None => Authorities::of_system(),
        };
        let own = match (&tls.cert_file, &tls.key_file) {
            (Some(cert), Some(key)) => {
                let chain = judged("cert_file", cert, Identity::chain)?;
                let own = judged("key_file", key, |pem| Identity::new(chain, pem))?;
                let url: Option<http::Uri> = self.listen.internal_url().parse().ok();
                let host = url.as_ref().and_then(http::Uri::host).unwrap_or_default();
                own.names(host).map_err(|error| failed("cert_file", cert, error))?;
                Some((own, cert))
            }
            _ => None,
        };
        let callers = match &tls.client_ca_file {
            Some(path) => Some(judged("client_ca_file", path, Authorities::of_pem)?),
            None => None,
        };
        let listener = match &own {
            Some((own, cert)) => {
                Some(ListenerTls::new(own, callers).map_err(|error| failed("cert_file", cert, error))?)
            }
            None => None,
        };
        let caller = CallerTls::new(believed, own.map(|(own, _)| own));
        let caller = caller
            .map_err(|error| failed("ca_file", tls.ca_file.as_deref().unwrap_or(Path::new("")), error))?;
        Ok(InternalTls { listener, caller })
    }
}

fn failed(key: &'static str, path: &Path, error: TlsError) -> CrossCenterError {
    CrossCenterError::Tls { key, path: path.to_owned(), error }
}

fn judged<T>(
    key: &'static str,
    path: &Path,
    judge: impl FnOnce(&[u8]) -> Result<T, TlsError>,
) -> Result<T, CrossCenterError> {
    let pem = std::fs::read(path).map_err(|error| CrossCenterError::TlsFile {
        key,
        path: path.to_owned(),
        error,
    })?;
    judge(&pem).map_err(|error| failed(key, path, error))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, generate_simple_self_signed};

    use super::*;

    /// A folder with a certificate for `a.example` and its key, and a configuration that names them.
    fn folder() -> (tempfile::TempDir, Config) {
        let folder = tempfile::tempdir().unwrap();
        let own = generate_simple_self_signed(["a.example".to_owned(), "10.0.0.1".to_owned()]).unwrap();
        std::fs::write(folder.path().join("cert.pem"), own.cert.pem()).unwrap();
        std::fs::write(folder.path().join("key.pem"), own.signing_key.serialize_pem()).unwrap();
        let mut config = Config::default();
        config.listen.internal_url = Some("https://a.example:8082".to_owned());
        config.cross_center.tls = CrossTlsConfig {
            cert_file: Some(folder.path().join("cert.pem")),
            key_file: Some(folder.path().join("key.pem")),
            ca_file: Some(folder.path().join("cert.pem")),
            client_ca_file: Some(folder.path().join("cert.pem")),
        };
        (folder, config)
    }

    fn refused(config: &Config) -> String {
        config.internal_tls().unwrap_err().to_string()
    }

    #[test]
    fn a_certificate_with_its_key_is_taken_for_the_names_that_it_has() {
        let (_folder, mut config) = folder();
        for url in ["https://a.example:8082", "https://A.EXAMPLE", "https://10.0.0.1:8082"] {
            config.listen.internal_url = Some(url.to_owned());
            config.validate_internal_tls().unwrap();
            assert!(config.internal_tls().unwrap().listener.is_some(), "{url}");
        }
        for url in ["https://b.example:8082", "https://10.0.0.2:8082", "https://[::1]:8082"] {
            config.listen.internal_url = Some(url.to_owned());
            let text = refused(&config);
            assert!(
                text.starts_with("cross_center.tls.cert_file: ") && text.contains("does not name"),
                "{text}"
            );
        }
        // Without certificates the listener speaks plain text, and calls may still go to others' https://.
        assert!(Config::default().internal_tls().unwrap().listener.is_none());
    }

    #[test]
    fn files_that_do_not_fit_are_named_before_anything_starts() {
        let (folder, config) = folder();
        let other = folder.path().join("other.pem");
        let with = |change: fn(&mut CrossTlsConfig, PathBuf)| {
            let mut config = config.clone();
            change(&mut config.cross_center.tls, other.clone());
            refused(&config)
        };
        let missing = with(|tls, other| tls.key_file = Some(other));
        assert!(missing.starts_with("cross_center.tls.key_file: cannot read "), "{missing}");
        std::fs::write(&other, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let stranger = with(|tls, other| tls.key_file = Some(other));
        assert!(stranger.ends_with("is not the key of the certificate"), "{stranger}");
        for (key, text) in [
            ("cert_file", with(|tls, other| tls.cert_file = Some(other))),
            ("ca_file", with(|tls, other| tls.ca_file = Some(other))),
            ("client_ca_file", with(|tls, other| tls.client_ca_file = Some(other))),
        ] {
            let expected = format!("cross_center.tls.{key}: ");
            assert!(
                text.starts_with(&expected) && text.ends_with("holds no certificate in PEM form"),
                "{text}"
            );
        }
        let key = with(|tls, _| tls.key_file = tls.cert_file.clone());
        assert!(key.contains("holds no private key"), "{key}");
        // A key of a kind that the certificate is not.
        let params = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
        let ed25519 = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        std::fs::write(&other, params.self_signed(&ed25519).unwrap().pem()).unwrap();
        let kind = with(|tls, other| tls.cert_file = Some(other));
        assert!(kind.ends_with("is not the key of the certificate"), "{kind}");
    }

    #[test]
    fn a_url_that_says_other_than_the_listener_speaks_is_refused() {
        let (_folder, config) = folder();
        let refused = |change: fn(&mut Config)| {
            let mut config = config.clone();
            change(&mut config);
            config.validate_internal_tls().unwrap_err()
        };
        let (key, reason) = refused(|config| config.listen.internal_url = None);
        assert_eq!(key, "listen.internal_url");
        assert!(reason.contains("must be https://"), "{reason}");
        let (key, reason) = refused(|config| config.cross_center.tls = CrossTlsConfig::default());
        assert_eq!(key, "listen.internal_url");
        assert!(reason.contains("needs a certificate"), "{reason}");
        assert_eq!(refused(|config| config.cross_center.tls.key_file = None).0, "cross_center.tls.cert_file");
        let (key, reason) = refused(|config| {
            (config.cross_center.tls.cert_file, config.cross_center.tls.key_file) = (None, None);
        });
        assert_eq!(key, "cross_center.tls.client_ca_file", "{reason}");
        // What the others dial where no instance is registered.
        let (key, _) = refused(|config| {
            config.cluster.centers = vec![crate::config::CenterSpec {
                id: config.center.id.clone(),
                number: config.center.number,
                public_url: "https://a.example".to_owned(),
                admin_url: "https://a.example:8081".to_owned(),
                internal_url: "http://a.example:8082".to_owned(),
                ledger: vec!["a.example:6379".to_owned()],
            }];
        });
        assert_eq!(key, "cluster.centers[0].internal_url");
    }
}
