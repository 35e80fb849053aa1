//! What the service tells its operators: structured logs and metrics.

#[cfg(test)]
mod deployed;
mod metrics;

pub use metrics::{InFlight, Metrics, PurchaseOutcome, Registration, RequestTimer, StatusClass};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogStyle {
    /// One readable line per event.
    Text,
    /// One JSON object per event.
    Json,
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter is not one of `tracing`'s.
    #[error("telemetry.log is not a log filter: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// Another subscriber is in place.
    #[error("logging is set up already")]
    Installed(#[from] tracing_subscriber::util::TryInitError),
}

/// Sets logging up for the whole process: to standard error, because standard output belongs to the commands'
/// answers (`seckill up` prints its `ready` there). `filter` is a directive list such as `info,seckill=debug`.
pub fn init(filter: &str, style: LogStyle) -> Result<(), Error> {
    let filter = EnvFilter::try_new(filter)?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(true);
    let registry = tracing_subscriber::registry().with(filter);
    match style {
        LogStyle::Text => registry.with(lines.with_ansi(false)).try_init()?,
        LogStyle::Json => {
            registry.with(lines.json().flatten_event(true).with_current_span(false)).try_init()?;
        }
    }
    Ok(())
}
