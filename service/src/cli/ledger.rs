//! `seckill ledger`: beginning a ledger, and going on with one whose past is in doubt.

use std::time::Duration;

use clap::Subcommand;

use super::client::{AdminClient, Call, Effect, ServiceArgs};
use super::exit::{Exit, Outcome};
use super::output::{Format, print_object};

/// An adoption puts every stored order back into the ledger: some 100,000 a second.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(600);

/// `seckill ledger …`
#[derive(Debug, Subcommand)]
pub(super) enum LedgerCommand {
    /// Create the ledger on an empty Redis
    ///
    /// Refused (exit 2) when there is anything already. `seckill up` does it by itself the first time.
    Init {
        #[command(flatten)]
        service: ServiceArgs,
    },
    /// Go on with whatever the Redis holds, as the truth from here on
    ///
    /// For a ledger that was lost, restored from a backup or brought from elsewhere: sales have stopped and
    /// /readyz says why. A new epoch begins, no order id repeats, and stored orders are claimed again where
    /// stock and limit allow; the others are cancelled if unpaid, and listed if paid. On a ledger that is in
    /// order a new epoch begins and nothing else changes.
    Adopt {
        #[command(flatten)]
        service: ServiceArgs,
    },
}

/// Runs `seckill ledger …`.
pub(super) async fn run(command: LedgerCommand, format: Format) -> Outcome {
    let (service, call) = match command {
        LedgerCommand::Init { service } => (service, Call::post("/admin/v1/ledger/init", Effect::Once)),
        LedgerCommand::Adopt { service } => {
            (service, Call::post("/admin/v1/ledger/adopt", Effect::Once).timeout(ADOPT_TIMEOUT))
        }
    };
    let answer = AdminClient::new(&service)?.call(&call).await?;
    print_object(format, &answer.json()?);
    Ok(Exit::Done)
}
