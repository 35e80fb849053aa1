//! The shared barrier: whether the other centers have what the ledger answered (K1–K4).
//!
//! Whoever got a reply of the ledger asks here before it counts. Every few milliseconds, while somebody waits, a
//! small fenced write goes out on a connection that nothing else uses, with a `WAIT` behind it. It was sent after
//! the replies of everybody it stands for, so it is later in the replication stream than all they wrote; one
//! round trip covers them all, and several connections in turn keep the delay near one round trip.
//!
//! A barrier covers only what was written under its own fence, on the same run of the server. Everything that can
//! go wrong with it (refused, a replica, reconnected, too late, an unknown replica) means the same: nobody
//! knows. The write is repeated under its own key and asks again.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use seckill_ledger::replication::{self, Replication, WaitCommand, wait_command};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::Target;
use super::metrics::BarrierMetrics;
use crate::tasks::essential;
use crate::topology::{Acknowledge, Authority, Grant};

/// How far apart barriers are sent while somebody waits. Each costs Redis some 30 µs and a sync of its file;
/// half of this is what it adds to the round trip. Unpaced ones bunch up.
const TURN: Duration = Duration::from_millis(2);
/// How long the replicas may take to confirm. Longer than any healthy pair of centers is apart, shorter than a
/// purchase's deadline, so that a purchase gets several barriers.
const WAIT_TIMEOUT: Duration = Duration::from_secs(1);
/// Above the timeout of the `WAIT`, or it would be cut while it still may confirm.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
/// What the round trip is taken for until one was measured.
const USUAL_ROUND_TRIP: Duration = Duration::from_millis(30);
/// Connections beyond those that the round trip keeps busy.
const SPARE_LINES: u32 = 2;
/// Connections at most, however far the centers are apart (124 ms in even turns).
const MAX_LINES: usize = 64;
/// Those that wait for the next turn. Each lane has a bounded number of batches under way, each worker one.
const MAX_TICKETS: usize = 4096;

/// Nobody knows whether the other centers have it, or whether it still counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the other center did not confirm it in time")]
pub struct Unconfirmed;

/// One server's barrier. Clones share it; it ends when the last is gone.
#[derive(Debug, Clone)]
pub struct Barrier {
    tickets: mpsc::Sender<Ticket>,
    authority: Authority,
}

/// A barrier as those see it who do not keep it alive.
#[derive(Debug, Clone)]
pub(super) struct WeakBarrier {
    tickets: mpsc::WeakSender<Ticket>,
    authority: Authority,
}

impl WeakBarrier {
    /// `None` once the service has ended.
    pub(super) fn upgrade(&self) -> Option<Barrier> {
        Some(Barrier { tickets: self.tickets.upgrade()?, authority: self.authority.clone() })
    }
}

/// Somebody whose write was answered.
#[derive(Debug)]
struct Ticket {
    grant: Arc<Grant>,
    run_id: Arc<str>,
    replicas: usize,
    confirmed: oneshot::Sender<bool>,
}

impl Ticket {
    /// Whether one barrier speaks for both.
    fn goes_with(&self, other: &Ticket) -> bool {
        self.replicas == other.replicas
            && self.run_id == other.run_id
            && self.grant.fence == other.grant.fence
    }
}

impl Barrier {
    /// Starts the barrier of a server. Should it panic, `fatal` is cancelled.
    pub(super) fn start(
        target: &Target,
        authority: &Authority,
        metrics: &Arc<BarrierMetrics>,
        tracker: &TaskTracker,
        fatal: &CancellationToken,
    ) -> Barrier {
        let (tickets, inbox) = mpsc::channel(MAX_TICKETS);
        let turns = Turns {
            target: target.with_response_timeout(RESPONSE_TIMEOUT),
            metrics: Arc::clone(metrics),
            authority: authority.clone(),
            idle: Vec::new(),
            sent: JoinSet::new(),
            round_trip: USUAL_ROUND_TRIP,
        };
        essential("barrier", tracker, fatal, turns.run(inbox));
        Barrier { tickets, authority: authority.clone() }
    }

    /// A barrier of the caller's own, for the workers around one server.
    pub fn open(
        client: redis::Client,
        authority: &Authority,
        tracker: &TaskTracker,
        fatal: &CancellationToken,
    ) -> Barrier {
        let target = Target::of(client, RESPONSE_TIMEOUT);
        Barrier::start(&target, authority, &Arc::default(), tracker, fatal)
    }

    pub(super) fn downgrade(&self) -> WeakBarrier {
        WeakBarrier { tickets: self.tickets.downgrade(), authority: self.authority.clone() }
    }

    /// Waits until a write counts whose reply has come, on a connection to the run `run_id` of the server, under
    /// this grant: at once with durability `local`, else behind a barrier. Then the authority is asked once more
    /// (A2); the durability that counts is the one of the grant that the write was made under. An authority that ends
    /// meanwhile ends the wait, too: while the master moves, nobody waits for a replica that is to be the master.
    pub async fn confirm(&self, grant: &Arc<Grant>, run_id: &Arc<str>) -> Result<(), Unconfirmed> {
        match grant.acknowledge {
            Acknowledge::Local => {}
            Acknowledge::Replicated { replicas } => {
                let (confirmed, outcome) = oneshot::channel();
                let ticket =
                    Ticket { grant: Arc::clone(grant), run_id: Arc::clone(run_id), replicas, confirmed };
                self.tickets.send(ticket).await.map_err(|_| Unconfirmed)?;
                let mut status = self.authority.subscribe();
                let ended = status.wait_for(|now| now.as_ref().map_or(true, |now| now.fence != grant.fence));
                let confirmed = tokio::select! {
                    confirmed = outcome => confirmed.unwrap_or(false),
                    _ = ended => false,
                };
                if !confirmed {
                    return Err(Unconfirmed);
                }
            }
        }
        match self.authority.grant() {
            Ok(now) if now.fence == grant.fence => Ok(()),
            Ok(_) | Err(_) => Err(Unconfirmed),
        }
    }
}

/// A connection that carries barriers and nothing else. It never reconnects: a new connection is a new line.
struct Line {
    conn: MultiplexedConnection,
    run_id: Arc<str>,
    command: WaitCommand,
}

struct Turns {
    target: Target,
    metrics: Arc<BarrierMetrics>,
    authority: Authority,
    idle: Vec<Line>,
    /// Barriers under way; each gives its line back if it is still good, and says how long its replicas took.
    sent: JoinSet<Option<(Line, Option<Duration>)>>,
    round_trip: Duration,
}

impl Turns {
    async fn run(mut self, mut inbox: mpsc::Receiver<Ticket>) {
        let mut waiting: Vec<Ticket> = Vec::new();
        let mut next_turn = Instant::now();
        let mut open = true;
        while open || !waiting.is_empty() || !self.sent.is_empty() {
            let due = !waiting.is_empty() && self.sent.len() < self.lines();
            tokio::select! {
                biased;
                Some(ended) = self.sent.join_next() => match ended {
                    Ok(Some((line, took))) => {
                        if let Some(took) = took {
                            self.round_trip = (self.round_trip * 7 + took) / 8;
                        }
                        self.idle.push(line);
                    }
                    Ok(None) => {}
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                () = tokio::time::sleep_until(next_turn), if due => {
                    // Whoever asks up to now got the reply before this barrier is sent (K2).
                    while waiting.len() < MAX_TICKETS && let Ok(ticket) = inbox.try_recv() {
                        waiting.push(ticket);
                    }
                    // In even turns; after a quiet time the first one waited for nobody.
                    next_turn = (next_turn + TURN).max(Instant::now() + TURN / 2);
                    self.send(&mut waiting);
                    self.metrics.waiting.set(i64::try_from(waiting.len()).unwrap_or(i64::MAX));
                }
                taken = inbox.recv_many(&mut waiting, MAX_TICKETS), if open && waiting.len() < MAX_TICKETS => {
                    open = taken > 0;
                }
            }
        }
    }

    /// How many connections the round trip keeps busy, and some to spare.
    fn lines(&self) -> usize {
        let busy = self.round_trip.as_micros().div_ceil(TURN.as_micros());
        usize::try_from(busy).unwrap_or(MAX_LINES).saturating_add(SPARE_LINES as usize).min(MAX_LINES)
    }

    /// Sends a barrier for those who belong together with the one that waits longest; others get the next turn.
    fn send(&mut self, waiting: &mut Vec<Ticket>) {
        let Some(first) = waiting.first() else { return };
        let (group, others): (Vec<Ticket>, Vec<Ticket>) = {
            let marks: Vec<bool> = waiting.iter().map(|ticket| ticket.goes_with(first)).collect();
            let mut marks = marks.into_iter();
            waiting.drain(..).partition(|_| marks.next().unwrap_or(false))
        };
        *waiting = others;
        let line = self.idle.pop();
        let (target, metrics, authority) =
            (self.target.clone(), Arc::clone(&self.metrics), self.authority.clone());
        self.sent.spawn(async move {
            let started = Instant::now();
            let outcome = pass(line, &target, &group[0]).await;
            let took = started.elapsed();
            let (line, confirmed) = match outcome {
                Ok((line, confirmed)) => (Some((line, confirmed.then_some(took))), confirmed),
                Err(error) => {
                    tracing::debug!(%error, "a barrier was lost");
                    (None, false)
                }
            };
            if confirmed {
                metrics.seconds.observe(took.as_secs_f64());
            } else {
                metrics.unknown.inc();
                authority.suspect();
            }
            for ticket in group {
                // Whoever asked may have reached a deadline meanwhile.
                let _ = ticket.confirmed.send(confirmed);
            }
            line
        });
    }
}

/// Sends one barrier and waits for the replicas. An error leaves the line to nobody.
async fn pass(
    line: Option<Line>,
    target: &Target,
    ticket: &Ticket,
) -> Result<(Line, bool), seckill_ledger::Error> {
    let mut line = match line {
        Some(line) if line.run_id == ticket.run_id => line,
        // A line to another run of the server leads nowhere.
        Some(_) | None => open(target, ticket).await?,
    };
    let fence = &ticket.grant.fence;
    let timeout_ms = u64::try_from(WAIT_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
    let outcome =
        replication::barrier(&mut line.conn, fence, ticket.replicas, timeout_ms, line.command).await?;
    match outcome {
        Replication::Confirmed => Ok((line, true)),
        Replication::TooFew { confirmed } => {
            tracing::debug!(confirmed, wanted = ticket.replicas, "the replicas did not confirm in time");
            Ok((line, false))
        }
        Replication::Stranger { attached } => {
            tracing::warn!(
                attached,
                known = ticket.replicas,
                "the ledger has a replica that is not known: what it confirms does not count"
            );
            Ok((line, false))
        }
    }
}

async fn open(target: &Target, ticket: &Ticket) -> Result<Line, seckill_ledger::Error> {
    let (mut conn, run_id) = target.connect_to(Some(&ticket.run_id)).await?;
    let command = wait_command(&mut conn).await?;
    // The server gets the script here if it does not have it.
    seckill_ledger::admin::barrier(&mut conn, &ticket.grant.fence).await?;
    Ok(Line { conn, run_id, command })
}
