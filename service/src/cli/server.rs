//! `seckill up` and `seckill serve`: the service itself.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use seckill_domain::CenterId;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::exit::{Exit, Failure, Outcome};
use crate::app::{self, Listeners, Start};
use crate::config::{Config, LogFormat, process_env};
use crate::embedded::{self, DEFAULT_BASE_PORT, UpOptions};
use crate::shift::InitPolicy;
use crate::telemetry::{self, LogStyle};
use crate::topology::Durability;

/// The exit code after a second signal: the drain was not waited for. 128 + SIGINT, as shells count.
const CUT_SHORT: i32 = 130;

/// `seckill up …`
#[derive(Debug, Args)]
pub(super) struct UpArgs {
    /// The centers to run, such as `a,b`; the first is the master of a new folder
    #[arg(long, value_delimiter = ',', default_value = "a")]
    centers: Vec<CenterId>,
    /// What an acknowledged purchase survives, when a folder gets its second center
    #[arg(long, value_enum, default_value_t = UpDurability::Replicated)]
    durability: UpDurability,
    /// Where everything lies
    #[arg(long, default_value = "data")]
    data_dir: PathBuf,
    /// First of ten ports for each center: public, +1 admin, +2 internal, +3 Redis
    #[arg(long, default_value_t = DEFAULT_BASE_PORT)]
    base_port: u16,
    /// Address of the public and admin listeners
    #[arg(long, default_value = "127.0.0.1")]
    bind: IpAddr,
    /// Settings that are not about places and keys, which `up` decides itself
    #[arg(long)]
    config: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum UpDurability {
    /// The master's disk has it
    Local,
    /// The other center has it, too
    Replicated,
}

/// `seckill serve …`
#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// The configuration; `seckill config default` prints a commented one. Without it defaults and the environment
    /// (SECKILL__SECTION__KEY) count alone
    #[arg(long)]
    config: Option<PathBuf>,
}

/// Runs `seckill up`.
pub(super) fn up(args: UpArgs) -> Outcome {
    let base = Config::load(args.config.as_deref(), process_env()).map_err(Failure::error)?;
    start_logging(&base)?;
    let options = UpOptions {
        centers: args.centers,
        durability: match args.durability {
            UpDurability::Local => Durability::Local,
            UpDurability::Replicated => Durability::Replicated,
        },
        data_dir: args.data_dir,
        base_port: args.base_port,
        bind: args.bind,
        base,
    };
    runtime()?.block_on(async {
        let shutdown = until_signal()?;
        embedded::up(options, std::io::stdout(), shutdown, |center| {
            let listeners =
                Listeners { public: center.public, admin: center.admin, internal: center.internal };
            let start = Start {
                init: InitPolicy::Automatic,
                process: Some(center.process),
                ready: Some(center.ready),
            };
            app::run(center.config, listeners, start, center.shutdown)
        })
        .await
        .map_err(Failure::error)?;
        Ok(Exit::Done)
    })
}

/// Runs `seckill serve`.
pub(super) fn serve(args: &ServeArgs) -> Outcome {
    let config = Config::load(args.config.as_deref(), process_env()).map_err(Failure::error)?;
    start_logging(&config)?;
    for warning in config.warnings() {
        tracing::warn!(key = warning.key, "{}", warning.text);
    }
    runtime()?.block_on(async {
        let shutdown = until_signal()?;
        let bind = async |address| {
            TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
        };
        let served = async {
            let listeners = Listeners {
                public: bind(config.listen.public).await?,
                admin: bind(config.listen.admin).await?,
                internal: match config.cluster.centers.len() {
                    0 | 1 => None,
                    _ => Some(bind(config.listen.internal).await?),
                },
            };
            let start = Start { init: InitPolicy::Explicit, process: None, ready: None };
            app::run(config, listeners, start, shutdown).await
        };
        served.await.map_err(|error| Failure::error(format!("{error:#}")))?;
        Ok(Exit::Done)
    })
}

fn start_logging(config: &Config) -> Result<(), Failure> {
    let style = match config.telemetry.format {
        LogFormat::Text => LogStyle::Text,
        LogFormat::Json => LogStyle::Json,
    };
    telemetry::init(&config.telemetry.log, style).map_err(Failure::error)
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::error(format!("cannot start: {error}")))
}

/// A token that SIGTERM or SIGINT cancels. The second signal ends the process without waiting for the drain.
fn until_signal() -> Result<CancellationToken, Failure> {
    let failed = |error| Failure::error(format!("cannot listen to signals: {error}"));
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    tokio::spawn(async move {
        for signals in 1.. {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            if signals > 1 {
                tracing::warn!("a second signal: the drain is cut short");
                std::process::exit(CUT_SHORT);
            }
            token.cancel();
        }
    });
    Ok(shutdown)
}
