//! What a guardian is asked to do, and by what it is asked.

use seckill_ledger::Fence;
use tokio::sync::{mpsc, oneshot, watch};

use crate::shift::ledger::InitError;
use crate::shift::reclaim::{AdoptReport, Recovery};
use crate::shift::status::{GuardianMetrics, ServerState};

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum RequestError<E> {
    /// The guardian has ended: the service shuts down.
    #[error("the service is shutting down")]
    Closed,
    /// Others wait already.
    #[error("the ledger is being worked on already; look at /readyz")]
    Busy,
    /// It failed.
    #[error("{0}")]
    Failed(E),
}

/// What the guardian may be asked to do, and where the answer goes.
pub(super) enum Request {
    Init(oneshot::Sender<Result<Fence, InitError>>),
    Adopt(oneshot::Sender<Result<AdoptReport, Recovery>>),
}

/// Asks the guardian to do something. What was asked is finished even if the asking future is dropped.
#[derive(Debug, Clone)]
pub struct GuardianHandle {
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) server: watch::Receiver<ServerState>,
    pub(super) metrics: GuardianMetrics,
}

impl GuardianHandle {
    /// A handle whose guardian has ended.
    #[cfg(test)]
    pub(crate) fn ended() -> GuardianHandle {
        GuardianHandle {
            requests: mpsc::channel(1).0,
            server: watch::channel(ServerState::Unknown).1,
            metrics: GuardianMetrics::default(),
        }
    }

    /// Follows what this center's server is.
    pub fn server(&self) -> watch::Receiver<ServerState> {
        self.server.clone()
    }

    /// Counters and gauges of the guardian.
    pub fn metrics(&self) -> &GuardianMetrics {
        &self.metrics
    }

    /// Creates the ledger on an empty server: `seckill ledger init`.
    pub async fn init(&self) -> Result<Fence, RequestError<InitError>> {
        let (answer, answered) = oneshot::channel();
        self.ask(Request::Init(answer), answered).await
    }

    /// Goes on with whatever the server holds: `seckill ledger adopt`. Harmless on a ledger that is in order: a
    /// new epoch begins.
    pub async fn adopt(&self) -> Result<AdoptReport, RequestError<Recovery>> {
        let (answer, answered) = oneshot::channel();
        self.ask(Request::Adopt(answer), answered).await
    }

    async fn ask<T, E>(
        &self,
        request: Request,
        answered: oneshot::Receiver<Result<T, E>>,
    ) -> Result<T, RequestError<E>> {
        self.requests.try_send(request).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => RequestError::Busy,
            mpsc::error::TrySendError::Closed(_) => RequestError::Closed,
        })?;
        answered.await.map_err(|_| RequestError::Closed)?.map_err(RequestError::Failed)
    }
}
