//! `seckill config`: the configuration file before it is used.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use super::exit::{Exit, Failure, Outcome};
use super::output::{Format, print, print_json};
use crate::config::{Config, DEFAULT_TOML, TopologyStoreKind, process_env};
use crate::topology::{FileStore, StoreError};

/// `seckill config …`
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Check a configuration: errors end with 1, warnings are listed
    ///
    /// Reads the file and SECKILL__SECTION__KEY of the environment as `serve` would, and the files of all keys,
    /// certificates and etcd's password. A topology in a file is an error when the centers that it
    /// names are on different hosts.
    Check {
        /// Configuration file
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Print the commented default configuration
    #[command(after_help = "\
Example:
  seckill config default > seckill.toml")]
    Default,
}

/// Runs `seckill config …`.
pub(super) fn run(command: ConfigCommand, format: Format) -> Outcome {
    let ConfigCommand::Check { config: path } = command else {
        match format {
            Format::Text => print(DEFAULT_TOML),
            Format::Json => print_json(&toml::from_str(DEFAULT_TOML).map_err(Failure::error)?),
        }
        return Ok(Exit::Done);
    };
    let config = Config::load(path.as_deref(), process_env()).map_err(Failure::error)?;
    config.read_keys().map_err(Failure::error)?;
    let mut warnings = config.warnings();
    match config.topology.store {
        TopologyStoreKind::File => match FileStore::new(&config.topology.path).load() {
            Ok(found) => warnings.extend(config.check_centers(&found.topology).map_err(Failure::error)?),
            // The first start creates it.
            Err(StoreError::Missing { .. }) => {}
            Err(error) => return Err(Failure::error(error)),
        },
        TopologyStoreKind::Etcd => {
            config.topology.etcd.options().map_err(Failure::error)?;
        }
    }
    match format {
        Format::Json => {
            let warnings: Vec<_> = warnings
                .iter()
                .map(|warning| json!({ "key": warning.key, "warning": warning.text }))
                .collect();
            print_json(&json!({ "ok": true, "warnings": warnings }));
        }
        Format::Text => {
            for warning in &warnings {
                print(&format!("warning: {warning}"));
            }
            print(&match warnings.len() {
                0 => "ok".to_owned(),
                1 => "ok, 1 warning".to_owned(),
                many => format!("ok, {many} warnings"),
            });
        }
    }
    Ok(Exit::Done)
}
