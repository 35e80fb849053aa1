//! The guardian: the task that gives one partition's server its role and keeps looking at it.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use seckill_domain::{CenterId, Epoch, OutboxId};
use seckill_ledger::admin::FenceChange;
use seckill_ledger::roles::{Role, Standing};
use seckill_ledger::{Fence, load_all};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ledger::{InitError, Ledger, LedgerError};
use super::peers::{Access, Peers};
use super::reclaim::{AdoptReport, Recovery};
use super::settle;
use super::status::{GuardianMetrics, ServerState};
use super::sync::Replicas;
use super::verdict::{InitPolicy, Seen, Verdict, isolates, judge};
use crate::orders::OrderStore;
use crate::topology::{Authority, Cause, NoAuthority, Topology, TopologyHandle, TopologyState};

mod requests;
mod settings;

use requests::Request;
pub use requests::{GuardianHandle, RequestError};

/// How often the server is looked at: a ledger that is emptied or replaced stops sales within this time. (Its
/// scripts refuse by their fence from the first moment.)
const CHECK_INTERVAL: Duration = Duration::from_millis(200);
/// How long a server that was admitted may leave questions unanswered before sales stop: a slow disk holds up
/// purchases and questions alike and is no reason to refuse what is waiting.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// After a promotion or adoption failed, the next waits this long, then twice as long, up to the second: each
/// attempt uses up an epoch.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Requests that wait for the guardian.
const REQUESTS: usize = 4;

/// Which server, and how it may be used.
#[derive(Debug, Clone)]
pub struct GuardianOptions {
    /// The center of this service.
    pub center: CenterId,
    /// The inventory partition.
    pub partition: u8,
    /// The server's URL.
    pub redis_url: String,
    /// Who creates the ledger.
    pub init: InitPolicy,
    /// Where the tail of a ledger that went another way is saved before the server becomes a replica.
    pub diverged_dir: Arc<Path>,
    /// A replica that is in sync and lost for this long is taken off (D1).
    pub degrade_after: Duration,
    /// What is known about the server's process by whoever runs it, to say why it does not answer.
    pub process: Option<watch::Receiver<ServerProcess>>,
}

/// What whoever runs the server's process knows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerProcess {
    /// It runs.
    Up,
    /// It ended and will be started again.
    Down(Arc<str>),
    /// It runs, but its data is gone: nothing that it acknowledges would survive.
    Lost(Arc<str>),
}

/// Looks after one partition's server.
pub struct Guardian {
    pub(super) ledger: Ledger,
    pub(super) options: GuardianOptions,
    pub(super) topology: TopologyHandle,
    pub(super) authority: Authority,
    orders: OrderStore,
    pub(super) peers: Peers,
    pub(super) replicas: Replicas,
    pub(super) metrics: GuardianMetrics,
    pub(super) state: State,
    server: watch::Sender<ServerState>,
    /// Since when a replica that is in sync is waited for before this server is opened.
    pub(super) waiting_since: Option<Instant>,
    /// Since when the server does not answer.
    silent_since: Option<Instant>,
    /// When the next promotion may be tried, and how many failed in a row.
    retry: Option<(Instant, u32)>,
    /// What was logged last, so that it is logged once.
    said: Option<NoAuthority>,
}

pub(super) enum State {
    /// The server is not in use.
    Out,
    /// It is the master.
    Admitted { fence: Fence, text: String, run_id: String, seq: u64 },
}

impl Guardian {
    /// Starts the guardian. It ends with the token and leaves the server as it is.
    pub fn spawn(
        options: GuardianOptions,
        topology: TopologyHandle,
        authority: Authority,
        orders: OrderStore,
        tracker: &TaskTracker,
        token: CancellationToken,
    ) -> Result<GuardianHandle, LedgerError> {
        let (requests, mut inbox) = mpsc::channel(REQUESTS);
        let mut guardian = Guardian::new(options, topology, authority, orders, tracker, &token)?;
        let (follows, metrics) = (guardian.server.subscribe(), guardian.metrics.clone());
        tracker.spawn(async move {
            // After a panic nothing that it remembers counts: it looks at everything anew.
            while AssertUnwindSafe(guardian.run(&mut inbox, &token)).catch_unwind().await.is_err() {
                tracing::error!(
                    partition = guardian.options.partition,
                    "the guardian panicked; it starts anew"
                );
                guardian.ledger.disconnect();
                guardian.withdraw(NoAuthority::new(Cause::Starting, "the guardian starts anew"));
                token.run_until_cancelled(tokio::time::sleep(RETRY_MAX)).await;
            }
        });
        Ok(GuardianHandle { requests, server: follows, metrics })
    }

    /// A guardian that has looked at nothing yet.
    pub(super) fn new(
        options: GuardianOptions,
        topology: TopologyHandle,
        authority: Authority,
        orders: OrderStore,
        tracker: &TaskTracker,
        token: &CancellationToken,
    ) -> Result<Guardian, LedgerError> {
        let ledger =
            Ledger::new(options.center.clone(), options.partition, &options.redis_url, topology.clone())?;
        let peers = Peers::new(Access::like(&options.redis_url)?, tracker, token);
        Ok(Guardian {
            ledger,
            options,
            topology,
            authority,
            orders,
            peers,
            replicas: Replicas::default(),
            metrics: GuardianMetrics::default(),
            state: State::Out,
            server: watch::Sender::new(ServerState::Unknown),
            waiting_since: None,
            silent_since: None,
            retry: None,
            said: None,
        })
    }

    async fn run(&mut self, inbox: &mut mpsc::Receiver<Request>, token: &CancellationToken) {
        let mut ticks = tokio::time::interval(CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let authority = self.authority.clone();
        let mut changes = self.topology.subscribe();
        loop {
            // Each step is bounded by the connection's timeouts, so the token is only looked at in between: a
            // promotion is never cut in half by a shutdown.
            let mut thorough = false;
            tokio::select! {
                () = token.cancelled() => break,
                request = inbox.recv() => {
                    let Some(request) = request else { break };
                    self.serve(request).await;
                    continue;
                }
                _ = ticks.tick() => {}
                // A shift that is over: purchases that are held wait for this center's server to be admitted.
                Ok(()) = changes.changed() => {}
                () = authority.suspected() => thorough = true,
            }
            if let Err(error) = self.check(thorough).await {
                self.failed(&error);
            }
        }
    }

    async fn serve(&mut self, request: Request) {
        match request {
            Request::Init(answer) => {
                let stored = match self.stored().await {
                    Ok(stored) => stored,
                    Err(refusal) => {
                        let _ = answer.send(Err(InitError::Refused(refusal)));
                        return;
                    }
                };
                let outcome = self.ledger.init(stored).await;
                if outcome.is_err() {
                    self.ledger.disconnect();
                }
                if let Err(error) = self.check(false).await {
                    self.failed(&error);
                }
                let _ = answer.send(outcome);
            }
            Request::Adopt(answer) => {
                let outcome = self.adopt().await;
                let _ = answer.send(outcome);
            }
        }
    }

    async fn adopt(&mut self) -> Result<AdoptReport, Recovery> {
        self.withdraw(NoAuthority::new(Cause::Adopting, "the ledger is being adopted"));
        // What a tail was saved of it knows the keys that order tables do not have.
        let keys = settle::keys(&self.options.diverged_dir).await;
        let outcome = self.ledger.adopt(&self.orders, &keys).await;
        match &outcome {
            Ok(report) => {
                tracing::warn!(
                    partition = self.options.partition,
                    epoch = report.epoch,
                    released = report.released,
                    held = report.held,
                    reclaimed = report.reclaimed,
                    cancelled = report.cancelled,
                    paid_without_claim = report.paid_without_claim,
                    "the ledger is adopted"
                );
                if let Err(error) = self.check(false).await {
                    self.failed(&error);
                }
            }
            Err(error) => {
                self.ledger.disconnect();
                self.back_off();
                self.refuse(NoAuthority::new(
                    Cause::Adopting,
                    format!("the adoption of the ledger came to no end: {error}. It is tried again"),
                ));
            }
        }
        outcome
    }

    async fn check(&mut self, thorough: bool) -> Result<(), LedgerError> {
        let topology = self.topology.current();
        self.show(&topology);
        self.peers.keep(&topology, &self.options.center, self.options.partition);
        // Not this center's server to promote: what it was admitted for is over.
        if topology.master != self.options.center {
            self.withdraw(NoAuthority::new(
                Cause::NotMaster,
                format!("center {} is the master", topology.master),
            ));
            // S3: whoever runs a shift gives the servers their roles.
            if topology.master_shift().is_none() {
                self.look_after_replica(&topology).await;
            }
            return Ok(());
        }
        if topology.master_shift().is_some() {
            self.withdraw(NoAuthority::new(Cause::Shifting, "a shift is recorded in the topology"));
            return Ok(());
        }
        if let Some(ServerProcess::Lost(reason)) = self.process() {
            self.refuse(NoAuthority::new(Cause::Empty, reason));
            return Ok(());
        }
        let standing = self.ledger.standing().await?;
        self.silent_since = None;
        let as_before = self.is_as_before(&standing, &topology.fence());
        if as_before && !thorough && topology.adopting.is_empty() {
            if let State::Admitted { seq, .. } = &mut self.state {
                *seq = standing.seq;
            }
            self.care_for_replicas(&topology, &standing).await;
            return Ok(());
        }
        if !as_before {
            self.withdraw(NoAuthority::new(Cause::Promoting, "the ledger's server is being looked at"));
        }
        let stored = match self.stored().await {
            Ok(stored) => stored,
            Err(refusal) => {
                self.refuse(refusal);
                return Ok(());
            }
        };
        let seen = self.ledger.look(stored).await?;
        let verdict = judge(self.ledger.place(), &self.topology.current(), &seen, self.options.init);
        if matches!(verdict, Verdict::Lift { .. } | Verdict::Init | Verdict::Adopt) && self.must_wait() {
            return Ok(());
        }
        if !self.is_behind_nobody(&topology, &seen, &verdict).await? {
            return Ok(());
        }
        match verdict {
            Verdict::Admit => {
                let fence = topology.fence();
                let run_id = seen.standing.run_id.clone();
                self.admit(fence, run_id, &seen).await?;
            }
            Verdict::Lift { from } => self.promote(&seen, FenceChange::Lift { from }).await?,
            Verdict::Init => self.promote(&seen, FenceChange::Init).await?,
            Verdict::Adopt => {
                // Its outcome is logged and shown by itself.
                let _ = Box::pin(self.adopt()).await;
            }
            Verdict::Refuse(refusal) => {
                let isolate = isolates(refusal.cause, &seen) && !seen.standing.role.is_isolated();
                self.refuse(refusal);
                if isolate {
                    self.ledger.isolate().await?;
                }
            }
        }
        Ok(())
    }

    fn is_as_before(&self, standing: &Standing, fence: &Fence) -> bool {
        match &self.state {
            State::Out => false,
            State::Admitted { fence: admitted, text, run_id, seq } => {
                standing.run_id == *run_id
                    && standing.fence.as_ref() == Some(text)
                    && matches!(standing.role, Role::Master { .. })
                    && standing.seq >= *seq
                    && admitted == fence
            }
        }
    }

    async fn promote(&mut self, seen: &Seen, change: FenceChange) -> Result<(), LedgerError> {
        let came_up_as_master = matches!(seen.standing.role, Role::Master { .. })
            && matches!(change, FenceChange::Lift { .. })
            && !self.ledger.is_recorded_master(&seen.standing);
        if came_up_as_master {
            tracing::warn!(
                partition = self.options.partition,
                address = self.ledger.address(),
                "the ledger's Redis was a master before it was checked; put `replicaof 127.0.0.1 1` into its \
                 configuration, so that it starts isolated"
            );
        }
        let (fence, run_id) = match self.ledger.promote(seen, change).await {
            Ok(promoted) => promoted,
            Err(error) => {
                self.back_off();
                return Err(error);
            }
        };
        self.admit(fence, run_id, seen).await
    }

    async fn admit(&mut self, fence: Fence, run_id: String, seen: &Seen) -> Result<(), LedgerError> {
        let conn = self.ledger.conn().await?;
        load_all(conn).await?;
        let risks = settings::risks(conn).await;
        if !matches!(&self.state, State::Admitted { run_id: known, .. } if *known == run_id) {
            for risk in risks {
                tracing::warn!(partition = self.options.partition, address = self.ledger.address(), "{risk}");
            }
        }
        let (partition, Epoch(epoch)) = (self.options.partition, fence.epoch);
        if !matches!(&self.state, State::Admitted { fence: known, .. } if *known == fence) {
            tracing::info!(partition, epoch, run_id, "the ledger's server is the master");
        }
        self.readmit(fence, run_id, seen.standing.seq);
        Ok(())
    }

    /// Puts the server into use at a fence.
    pub(super) fn readmit(&mut self, fence: Fence, run_id: String, seq: u64) {
        let replicas = match &*self.server.borrow() {
            ServerState::Master { replicas, .. } => *replicas,
            _ => 0,
        };
        self.authority.admit(self.options.partition, fence.clone(), &run_id, replicas);
        self.replicas.begin(&fence);
        self.state = State::Admitted { text: fence.to_string(), fence, run_id, seq };
        self.said = None;
        self.retry = None;
        self.waiting_since = None;
    }

    /// Says what the server is, in the log when it is something else than before.
    pub(super) fn report(&mut self, server: &ServerState) {
        self.metrics.show(server);
        let changed = self.server.send_if_modified(|current| {
            let changed = *current != *server;
            current.clone_from(server);
            changed
        });
        if !changed {
            return;
        }
        let partition = self.options.partition;
        match server {
            ServerState::Refused(reason) => tracing::error!(partition, "this Redis is not used: {reason}"),
            ServerState::Waiting(reason) => tracing::info!(partition, "this Redis is not attached: {reason}"),
            ServerState::Attached => tracing::info!(partition, "this Redis has what the master has"),
            ServerState::Unknown | ServerState::Master { .. } | ServerState::Source => {}
        }
    }

    fn show(&self, topology: &Topology) {
        let Epoch(epoch) = topology.epoch;
        self.metrics.epoch.set(i64::try_from(epoch).unwrap_or(i64::MAX));
        self.metrics.degraded.set(i64::from(topology.state == TopologyState::Degraded));
        self.metrics.in_sync.set(i64::try_from(topology.in_sync.len()).unwrap_or(i64::MAX));
    }

    fn back_off(&mut self) {
        let failures = self.retry.map_or(0, |(_, failures)| failures);
        let wait = RETRY_MIN.saturating_mul(1 << failures.min(16)).min(RETRY_MAX);
        self.retry = Some((Instant::now() + wait, failures + 1));
    }

    fn must_wait(&self) -> bool {
        self.retry.is_some_and(|(at, _)| Instant::now() < at)
    }

    fn process(&self) -> Option<ServerProcess> {
        self.options.process.as_ref().map(|process| process.borrow().clone())
    }

    async fn stored(&self) -> Result<OutboxId, NoAuthority> {
        self.orders.highest(self.options.partition).await.map_err(|error| {
            NoAuthority::new(
                Cause::OrdersUnreadable,
                format!("the order database does not say how far it has stored: {error}"),
            )
        })
    }

    fn failed(&mut self, error: &LedgerError) {
        // What is still on its way on this connection is anybody's guess.
        self.ledger.disconnect();
        let since = *self.silent_since.get_or_insert_with(Instant::now);
        let timed_out = matches!(error, LedgerError::Server(seckill_ledger::Error::NoAnswer(error)) if error.is_timeout());
        let admitted = matches!(self.state, State::Admitted { .. });
        if admitted && timed_out && since.elapsed() < SILENCE_MAX {
            return;
        }
        let address = self.ledger.address();
        let refusal = match error {
            LedgerError::Address(_) | LedgerError::Server(_) => {
                let detail = match self.process() {
                    Some(ServerProcess::Down(reason) | ServerProcess::Lost(reason)) => format!(" ({reason})"),
                    Some(ServerProcess::Up) | None => String::new(),
                };
                NoAuthority::new(
                    Cause::Unreachable,
                    format!("the ledger's Redis at {address} does not answer: {error}{detail}"),
                )
            }
            LedgerError::Topology(error) => NoAuthority::new(
                Cause::TopologyUnwritable,
                format!("a new epoch cannot be written down: {error}. Sales go on when it can"),
            ),
            LedgerError::Changed
            | LedgerError::NotOurs(_)
            | LedgerError::Peer(_)
            | LedgerError::Tail { .. } => {
                NoAuthority::new(Cause::Promoting, format!("{error}; it is looked at again"))
            }
            LedgerError::Schema(error) => NoAuthority::new(Cause::Schema, error.to_string()),
        };
        self.refuse(refusal);
    }

    /// Takes the server out of use and says why.
    pub(super) fn refuse(&mut self, refusal: NoAuthority) {
        self.withdraw(refusal.clone());
        if self.said.as_ref().map(|said| said.cause) != Some(refusal.cause) {
            tracing::error!(
                partition = self.options.partition,
                cause = refusal.cause.as_str(),
                "no sales: {}",
                refusal.reason
            );
            self.said = Some(refusal);
        }
    }

    pub(super) fn withdraw(&mut self, refusal: NoAuthority) {
        // While something known is wrong, looking again does not make it a different answer.
        let refusal = match (&self.said, refusal.cause) {
            (Some(said), Cause::Promoting) => said.clone(),
            _ => refusal,
        };
        self.state = State::Out;
        self.replicas.forget_told();
        self.authority.refuse(self.options.partition, refusal);
    }
}
