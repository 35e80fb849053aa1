//! Reading the configuration: the file, then the environment on top of it.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Config;
use super::auth::KeyError;
use super::cross_center::CrossCenterError;

/// The commented default configuration; `seckill config default` prints it.
pub const DEFAULT_TOML: &str = include_str!("../../config.default.toml");

/// Environment variables with this prefix are configuration: `SECKILL__SECTION__KEY`.
pub const ENV_PREFIX: &str = "SECKILL__";

/// Optional keys that hold text. The default file shows them in comments only, so their type is not to be seen
/// there, and a secret of digits must not become a number.
const TEXT_KEYS: [&str; 19] = [
    "id",
    "center",
    "secret",
    "secret_file",
    "public_key_file",
    "kid",
    "audience",
    "public_url",
    "admin_url",
    "internal_url",
    "default_currency",
    "username",
    "password",
    "password_file",
    "database_password_file",
    "ca_file",
    "cert_file",
    "key_file",
    "client_ca_file",
];

/// Entries of a list that the environment may name by position, such as `SECKILL__AUTH__USERS__KEYS__0__SECRET`.
const MAX_LIST: usize = 64;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{path} is not TOML: {error}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Why, with line and column.
        error: Box<toml::de::Error>,
    },
    /// An unknown key, or a value of the wrong kind or range.
    #[error("{key}: {reason}{}", .variable.as_ref().map(|name| format!(" (from {name})")).unwrap_or_default())]
    Key {
        /// Path of the key, such as `inventory.lanes`.
        key: String,
        /// What is wrong.
        reason: String,
        /// The environment variable it came from, if it did.
        variable: Option<String>,
    },
    /// A secret in the file.
    #[error("{key}: a secret must not stand in the configuration file: use {instead}")]
    SecretInFile {
        /// Path of the key.
        key: String,
        /// Where it belongs.
        instead: String,
    },
    /// A token key cannot be used.
    #[error("{key}: {error}")]
    TokenKey {
        /// Path of the key.
        key: String,
        /// Why.
        error: KeyError,
    },
    /// What centers sign or encrypt their calls with cannot be used.
    #[error(transparent)]
    CrossCenter(#[from] CrossCenterError),
}

/// The process' environment, as far as it is text.
pub fn process_env() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

impl Config {
    /// Reads the file, if one is given, puts `SECKILL__SECTION__KEY` of `env` on top and checks every value.
    /// Token keys are not read yet, see [`Config::read_keys`](Config::read_keys).
    pub fn load(
        path: Option<&Path>,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Config, ConfigError> {
        let mut table = match path {
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| ConfigError::File { path: path.to_owned(), error })?;
                toml::from_str::<Table>(&text)
                    .map_err(|error| ConfigError::Syntax { path: path.to_owned(), error: Box::new(error) })?
            }
            None => Table::new(),
        };
        refuse_secrets(&table)?;
        let mut from_env = Vec::new();
        let defaults: Table = toml::from_str(DEFAULT_TOML).unwrap_or_default();
        let mut variables: Vec<(String, String)> =
            env.into_iter().filter(|(name, _)| name.starts_with(ENV_PREFIX)).collect();
        variables.sort();
        for (name, text) in variables {
            let key = name[ENV_PREFIX.len()..].to_ascii_lowercase().replace("__", ".");
            let value = typed(&defaults, &key, &text);
            put(&mut table, &key, value).map_err(|reason| ConfigError::Key {
                key: key.clone(),
                reason,
                variable: Some(name.clone()),
            })?;
            from_env.push((key, name));
        }
        let config: Config = serde_path_to_error::deserialize(table).map_err(|error| {
            let key = error.path().to_string();
            key_error(key, error.into_inner().message().to_owned(), &from_env)
        })?;
        config.validate().map_err(|(key, reason)| key_error(key, reason, &from_env))?;
        Ok(config)
    }
}

fn key_error(key: String, reason: String, from_env: &[(String, String)]) -> ConfigError {
    // `keys[0].kid` is `keys.0.kid` in the environment's spelling.
    let spelled = key.replace('[', ".").replace(']', "");
    let variable = from_env
        .iter()
        .find(|(known, _)| {
            spelled == *known
                || spelled.starts_with(&format!("{known}."))
                || known.starts_with(&format!("{spelled}."))
        })
        .map(|(_, name)| name.clone());
    ConfigError::Key { key, reason, variable }
}

/// Gives an environment value the type that the default has; what has no default is read as TOML where it is
/// TOML, otherwise as text. A list may be TOML or text with commas.
fn typed(defaults: &Table, key: &str, text: &str) -> Value {
    let mut parts = key.split('.');
    let last = key.rsplit('.').next().unwrap_or(key);
    let first = parts.next().and_then(|part| defaults.get(part));
    let default = parts.fold(first, |at, part| at.and_then(|value| value.get(part)));
    let as_toml = || {
        let mut table: Table = toml::from_str(&format!("v = {text}")).ok()?;
        (table.len() == 1).then(|| table.remove("v")).flatten()
    };
    match default {
        // A limit is the word `off` or a table.
        Some(Value::String(_)) if text.starts_with('{') => {
            as_toml().unwrap_or_else(|| Value::String(text.to_owned()))
        }
        Some(Value::String(_)) => Value::String(text.to_owned()),
        Some(Value::Array(_)) => match as_toml() {
            Some(Value::Array(list)) => Value::Array(list),
            _ => Value::Array(
                text.split(',')
                    .map(str::trim)
                    .filter(|part| !part.is_empty())
                    .map(|part| Value::String(part.to_owned()))
                    .collect(),
            ),
        },
        _ if TEXT_KEYS.contains(&last) => Value::String(text.to_owned()),
        _ => as_toml().unwrap_or_else(|| Value::String(text.to_owned())),
    }
}

fn put(table: &mut Table, key: &str, value: Value) -> Result<(), String> {
    let mut parts = key.split('.').peekable();
    let first = parts.next().unwrap_or_default();
    let mut at = table.entry(first).or_insert_with(|| empty_for(parts.peek().copied()));
    while let Some(part) = parts.next() {
        let mut fresh = || empty_for(parts.peek().copied());
        at = match at {
            Value::Table(table) => table.entry(part).or_insert_with(fresh),
            Value::Array(list) => {
                let index: usize = part.parse().map_err(|_| format!("{part:?} is not a position"))?;
                if index > list.len() || index >= MAX_LIST {
                    return Err(format!("there is no position {index}"));
                }
                if index == list.len() {
                    list.push(fresh());
                }
                &mut list[index]
            }
            _ => return Err(format!("{part:?} lies below a plain value")),
        };
    }
    *at = value;
    Ok(())
}

/// What a missing step of a path is: a list if a position follows, otherwise a table.
fn empty_for(next: Option<&str>) -> Value {
    match next {
        Some(part) if part.parse::<usize>().is_ok() => Value::Array(Vec::new()),
        _ => Value::Table(Table::new()),
    }
}

fn refuse_secrets(table: &Table) -> Result<(), ConfigError> {
    let rings = table.get("auth").and_then(Value::as_table).into_iter().flatten();
    for (ring, settings) in rings {
        let mut keys = settings.get("keys").and_then(Value::as_array).into_iter().flatten();
        if let Some(index) = keys.position(|key| key.get("secret").is_some()) {
            return Err(ConfigError::SecretInFile {
                key: format!("auth.{ring}.keys[{index}].secret"),
                instead: format!(
                    "secret_file, or {ENV_PREFIX}AUTH__{}__KEYS__{index}__SECRET",
                    ring.to_uppercase()
                ),
            });
        }
    }
    let etcd = table.get("topology").and_then(|topology| topology.get("etcd"));
    if etcd.is_some_and(|etcd| etcd.get("password").is_some()) {
        return Err(ConfigError::SecretInFile {
            key: "topology.etcd.password".to_owned(),
            instead: format!("password_file, or {ENV_PREFIX}TOPOLOGY__ETCD__PASSWORD"),
        });
    }
    let keys = table.get("cross_center").and_then(|section| section.get("keys"));
    let mut keys = keys.and_then(Value::as_array).into_iter().flatten();
    if let Some(index) = keys.position(|key| key.get("secret").is_some()) {
        return Err(ConfigError::SecretInFile {
            key: format!("cross_center.keys[{index}].secret"),
            instead: format!("secret_file, or {ENV_PREFIX}CROSS_CENTER__KEYS__{index}__SECRET"),
        });
    }
    let urls = [("ledger", "partitions"), ("orders", "database_url")];
    for (section, key) in urls {
        let value = table.get(section).and_then(|section| section.get(key));
        let texts = match value {
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            Some(Value::String(text)) => vec![text.as_str()],
            _ => Vec::new(),
        };
        if texts.into_iter().any(|url| super::SecretUrl::new(url).password().is_some()) {
            return Err(ConfigError::SecretInFile {
                key: format!("{section}.{key}"),
                instead: format!("{ENV_PREFIX}{}__{}", section.to_uppercase(), key.to_uppercase()),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KeyMaterial;
    use crate::topology::Rate;

    fn load(toml: &str, env: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seckill.toml");
        std::fs::write(&path, toml).unwrap();
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Config::load(Some(&path), env)
    }

    fn error(toml: &str, env: &[(&str, &str)]) -> String {
        load(toml, env).unwrap_err().to_string()
    }

    #[test]
    fn the_default_file_says_what_the_defaults_are() {
        assert_eq!(load(DEFAULT_TOML, &[]).unwrap(), Config::default());
        assert_eq!(Config::load(None, []).unwrap(), Config::default());
    }

    #[test]
    fn every_commented_out_key_of_the_default_file_exists() {
        let mut uncommented = String::new();
        let mut in_example = false;
        let mut lines = DEFAULT_TOML.lines().peekable();
        while let Some(line) = lines.next() {
            let bare = line.strip_prefix("# ").unwrap_or(line);
            let is_key = bare
                .split_once(" = ")
                .is_some_and(|(key, _)| key.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'));
            in_example = in_example && line.starts_with('#') || bare.starts_with("[[");
            // The example of a key stands for the empty list before it.
            if bare == "keys = []" && lines.peek().is_some_and(|next| next.starts_with("# [[")) {
                continue;
            }
            if is_key || bare.starts_with('[') {
                uncommented.push_str(bare);
                uncommented.push('\n');
            }
        }
        let config = load(&uncommented, &[]).unwrap();
        assert_eq!(config.auth.users.keys.len(), 1, "{uncommented}");
        assert!(config.ledger.max_memory_bytes.is_some());
        assert!(config.sales.default_currency.is_some());
        assert!(!in_example);
    }

    #[test]
    fn an_unknown_key_is_an_error_with_its_path() {
        assert!(error("[inventory]\nlane = 3", &[]).starts_with("inventory.lane: unknown field `lane`"));
        assert!(error("colour = 1", &[]).starts_with("colour: unknown field"));
        assert!(
            error("[auth.users]\nkeys = [{ alg = \"HS256\", scret = 1 }]", &[])
                .starts_with("auth.users.keys[0].scret: ")
        );
        assert!(
            error("[limits]\nper_user = { per_second = 1, brst = 2 }", &[])
                .starts_with("limits.per_user.brst: ")
        );
        let text = error("", &[("SECKILL__INVENTORY__LANE", "3")]);
        assert!(
            text.starts_with("inventory.lane: ") && text.ends_with("(from SECKILL__INVENTORY__LANE)"),
            "{text}"
        );
    }

    #[test]
    fn a_value_out_of_range_is_an_error_with_its_path() {
        assert!(
            error("[inventory]\nmax_batch = 1025", &[])
                .starts_with("inventory.max_batch: must be from 1 to 1024")
        );
        assert!(error("[inventory]\nlanes = \"many\"", &[]).starts_with("inventory.lanes: invalid type"));
        assert!(error("[center]\nnumber = 9", &[]).starts_with("center.number: "));
        assert!(error("[ledger]\npartitions = []", &[]).starts_with("ledger.partitions: exactly one"));
        assert!(error("[telemetry]\nlog = \"a=b=c\"", &[]).starts_with("telemetry.log: "));
        assert!(error("[orders]\ndatabase_url = \"mysql://h\"", &[]).starts_with("orders.database_url: "));
        assert!(
            error("[auth.admin]\nkeys = [{ alg = \"EdDSA\", secret_file = \"x\" }]", &[])
                .starts_with("auth.admin.keys[0]: an EdDSA key")
        );
        assert!(
            error("[auth.admin]\nkeys = [{ alg = \"none\", secret_file = \"x\" }]", &[])
                .starts_with("auth.admin.keys[0].alg: ")
        );
        let text = error("", &[("SECKILL__INVENTORY__LANES", "0")]);
        assert!(text.contains("(from SECKILL__INVENTORY__LANES)"), "{text}");
    }

    #[test]
    fn the_environment_wins_and_takes_the_type_of_the_key() {
        let config = load(
            "[inventory]\nlanes = 3\n",
            &[
                ("SECKILL__INVENTORY__LANES", "5"),
                ("SECKILL__LEDGER__PARTITIONS", "redis://:pw@127.0.0.1:7000"),
                ("SECKILL__LEDGER__MAX_MEMORY_BYTES", "1073741824"),
                ("SECKILL__CENTER__ID", "7"),
                ("SECKILL__LIMITS__PER_USER", "off"),
                ("SECKILL__LIMITS__PER_SALE", "{ per_second = 5, burst = 6 }"),
                ("SECKILL__LIMITS__TRUSTED_PROXIES", "10.0.0.0/8, ::1"),
                ("SECKILL__SALES__DEFAULT_CURRENCY", "CNY"),
                ("SECKILL__AUTH__USERS__KEYS__0__ALG", "HS256"),
                ("SECKILL__AUTH__USERS__KEYS__0__SECRET", "0123456789"),
                ("SECKILL_ADMIN_URL", "http://elsewhere"),
            ],
        )
        .unwrap();
        assert_eq!(config.inventory.lanes, 5);
        assert_eq!(&*config.ledger.partitions[0], "redis://:pw@127.0.0.1:7000");
        assert_eq!(config.ledger.max_memory_bytes, Some(1 << 30));
        assert_eq!(config.center.id.as_str(), "7");
        assert_eq!(config.limits.per_user, None);
        assert_eq!(config.limits.per_sale, Rate::new(5, 6));
        assert_eq!(config.limits.trusted_proxies.len(), 2);
        let material = config.auth.users.keys[0].material().unwrap();
        assert_eq!(material, KeyMaterial::Hs256(b"0123456789".to_vec()));
        let shown = format!("{config:?} {material:?}");
        assert!(!shown.contains("0123456789") && !shown.contains(":pw@"), "{shown}");
    }

    #[test]
    fn a_secret_in_the_file_is_refused_and_not_shown() {
        let text = error("[auth.users]\nkeys = [{ alg = \"HS256\", secret = \"hush\" }]", &[]);
        assert!(text.contains("SECKILL__AUTH__USERS__KEYS__0__SECRET") && !text.contains("hush"), "{text}");
        let text = error("[ledger]\npartitions = [\"redis://:hush@h\"]", &[]);
        assert!(text.contains("SECKILL__LEDGER__PARTITIONS") && !text.contains("hush"), "{text}");
    }

    #[test]
    fn etcd_is_checked_where_it_is_used() {
        let etcd = |rest: &str| format!("[topology]\nstore = \"etcd\"\n[topology.etcd]\n{rest}");
        load(&etcd(""), &[]).unwrap();
        load("[topology.etcd]\nendpoints = []", &[]).unwrap();
        for (wrong, key) in [
            ("endpoints = []", "topology.etcd.endpoints"),
            ("endpoints = [\"10.0.0.1:2379\"]", "topology.etcd.endpoints[0]"),
            ("endpoints = [\"http://a:1\", \"https://b:1\"]", "topology.etcd.endpoints"),
            ("ca_file = \"ca.pem\"", "topology.etcd.endpoints"),
            ("endpoints = [\"https://a:1\"]\ncert_file = \"c.pem\"", "topology.etcd.cert_file"),
            ("prefix = \"/\"", "topology.etcd.prefix"),
            ("username = \"u\"", "topology.etcd.username"),
            ("password_file = \"p\"", "topology.etcd.password_file"),
            ("request_timeout_ms = 2500", "topology.etcd.request_timeout_ms"),
            ("password = \"hush\"", "topology.etcd.password"),
        ] {
            let text = error(&etcd(wrong), &[]);
            assert!(text.starts_with(&format!("{key}: ")) && !text.contains("hush"), "{wrong}: {text}");
        }
        let secret = ("SECKILL__TOPOLOGY__ETCD__PASSWORD", "123");
        let config = load(&etcd("username = \"u\""), &[secret]).unwrap();
        let options = config.topology.etcd.options().unwrap();
        assert_eq!(options.user, Some(("u".to_owned(), "123".to_owned())));
        assert!(!format!("{config:?} {options:?}").contains("123"));
        let config = load(&etcd("endpoints = [\"http://10.0.0.1:2379\"]"), &[]).unwrap();
        assert!(config.warnings().iter().any(|warning| warning.key == "topology.etcd.endpoints[0]"));
    }

    #[test]
    fn a_secret_is_its_bytes_without_the_newline_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        std::fs::write(&path, b" a b \n\n").unwrap();
        let key = crate::config::KeyConfig::hs256_file(&path);
        assert_eq!(key.material().unwrap(), KeyMaterial::Hs256(b" a b \n".to_vec()));
        std::fs::write(&path, b"\n").unwrap();
        assert!(key.material().unwrap_err().to_string().contains("is empty"));
    }

    #[test]
    fn trouble_ahead_is_a_warning() {
        let quiet = load("", &[]).unwrap().warnings();
        assert!(quiet.iter().all(|warning| warning.key.starts_with("auth.")), "{quiet:?}");
        let config = load(
            "[ledger]\npartitions = [\"redis://10.0.0.5:6379\"]\nresponse_timeout_ms = 9000\n\
             [listen]\nadmin = \"0.0.0.0:8081\"\npublic_url = \"http://shop.example\"\n\
             internal_url = \"http://in.example\"",
            &[],
        )
        .unwrap();
        let warnings = config.warnings();
        for key in [
            "ledger.partitions[0]",
            "ledger.response_timeout_ms",
            "listen.admin",
            "listen.public_url",
            "listen.internal_url",
        ] {
            assert!(warnings.iter().any(|warning| warning.key == key), "{key} in {warnings:?}");
        }
    }
}
