//! What is looked at after a shift happened, outside of the freeze.

use std::time::{Duration, Instant};

use seckill_ledger::roles::{self, Role};
use seckill_ledger::{Fence, missing, read};

use super::coordinator::{Coordinator, Stop, passed};
use super::ledger::LedgerError;
use super::precheck::{Checks, connect, verdict};
use super::record;
use crate::topology::{Check, CheckVerdict, ShiftKind, ShiftMode, ShiftState, StepState};

/// How long the old master may take to be attached.
const ATTACHED_WITHIN: Duration = Duration::from_secs(5);
/// How often it is looked at.
const ATTACHED_POLL: Duration = Duration::from_millis(20);
/// Sales that are compared at once.
const PAGE: usize = 256;

impl Coordinator {
    /// Looks at both servers and the ledger, and writes the outcome into the history. `unpromoted` says why the target
    /// could not be made the master.
    pub(super) async fn verify(&mut self, unpromoted: Option<String>) -> Result<(), Stop> {
        let step = self.begin_step("verify");
        if let Some(next) = self.successor() {
            return self.conclude_superseded(step, &next).await;
        }
        let (checks, silent) = self.compare().await;
        let unpromoted = unpromoted.or(silent);
        let passed = passed(&checks) && unpromoted.is_none();
        self.passes("verified")?;
        // What did not fit may be the next shift's work.
        if let Some(next) = self.successor().filter(|_| !passed) {
            return self.conclude_superseded(step, &next).await;
        }
        let state = if passed { StepState::Done } else { StepState::Failed };
        self.finish_step(step, state, None, checks);
        let (from, to) = (&self.shift.from, &self.shift.to);
        let lossy = self.shift.exposure.as_ref().filter(|exposure| !exposure.lossless);
        self.shift.message = Some(match (unpromoted, passed, lossy) {
            (Some(reason), ..) => format!(
                "center {to} is the master, but its Redis does not serve: {reason}. Sales go on when it is \
                 back; or go back with `seckill master shift --to {from} --mode forced`"
            ),
            (None, false, _) => format!(
                "center {to} is the master; something is not as it should be, see the failed checks of `verify`"
            ),
            (None, true, Some(exposure)) => format!(
                "center {to} is the master; accepted loss: {}. Compare the books with `seckill audit`",
                exposure.reason
            ),
            (None, true, None) => format!("center {to} is the master"),
        });
        self.shift.state = if passed { ShiftState::Done } else { ShiftState::Failed };
        self.shift.ended_at = Some(record::now());
        self.conclude().await
    }

    async fn conclude(&mut self) -> Result<(), Stop> {
        self.change(None, record::conclude).await?;
        self.shared.show(&self.shift);
        self.passes("concluded")
    }

    /// The shift of the master that began after this one happened, if its coordinator died and nobody verified it before
    /// the next was asked for.
    fn successor(&self) -> Option<String> {
        let topology = self.shared.topology.current();
        let later = topology.shift.as_deref().into_iter().chain(&topology.history);
        let next = later.into_iter().find(|shift| {
            shift.kind == ShiftKind::Master
                && shift.epoch > self.shift.epoch
                && shift.state != ShiftState::Aborted
        });
        next.map(|shift| shift.id.clone())
    }

    /// The servers show what the next shift made of them, and nothing about this one: it happened, and that is said.
    async fn conclude_superseded(&mut self, step: usize, next: &str) -> Result<(), Stop> {
        self.finish_step(step, StepState::Done, Some(format!("not looked at: {next} followed")), Vec::new());
        let to = &self.shift.to;
        self.shift.message =
            Some(format!("center {to} became the master; {next} followed before that was verified"));
        self.shift.state = ShiftState::Done;
        self.shift.ended_at = Some(record::now());
        self.conclude().await
    }

    /// The comparisons, and why the target's server does not answer them.
    async fn compare(&mut self) -> (Vec<Check>, Option<String>) {
        let mut checks = Checks(Vec::new());
        let mut silent = None;
        if let Err(error) = self.compare_target(&mut checks).await {
            checks.add("target_answers", format!("no: {error}"), "yes", CheckVerdict::Failed);
            silent = Some(error.to_string());
        }
        if self.shift.mode == ShiftMode::Planned {
            self.compare_source(&mut checks).await;
        }
        (checks.0, silent)
    }

    async fn compare_target(&mut self, checks: &mut Checks) -> Result<(), LedgerError> {
        let topology = self.shared.topology.current();
        let mut target = connect(&self.shared, &topology, &self.shift.to).await?;
        let standing = roles::standing(&mut target).await?;
        let role = if matches!(standing.role, Role::Master { .. }) { "master" } else { "replica" };
        checks.add("target_role", role, "master", verdict(role == "master"));
        // Since then another epoch may have begun, for a reason of its own.
        let wanted = self.fence();
        let held = standing.fence.as_deref().and_then(|text| text.parse::<Fence>().ok());
        let fits = held.is_some_and(|held| held.at(wanted.epoch) == wanted && held.epoch >= wanted.epoch);
        let found = standing.fence.clone().unwrap_or_else(|| "none".to_owned());
        checks.add("target_fence", found, format!(">= {wanted}"), verdict(fits));
        let same = Some(&standing.run_id) == self.shift.target_run.as_ref();
        let run_verdict = if same { CheckVerdict::Ok } else { CheckVerdict::Warning };
        checks.add("target_run", if same { "as checked" } else { "restarted" }, "as checked", run_verdict);
        let missing = missing(&mut target).await?;
        checks.add("target_scripts", format!("{missing} missing"), "0 missing", verdict(missing == 0));
        let (mut since, mut sales, mut wrong) = (0, 0_u64, Vec::new());
        loop {
            let page = read::snapshot(&mut target, since, PAGE).await?;
            for sale in &page.sales {
                sales += 1;
                if sale.total != sale.remaining + sale.claimed {
                    wrong.push(sale.spec.sale_id.to_string());
                }
            }
            wrong.extend(page.unreadable.iter().map(|(id, _)| id.clone()));
            match page.sales.last() {
                Some(last) if page.sales.len() + page.unreadable.len() >= PAGE => since = last.touched,
                _ => break,
            }
        }
        let value = if wrong.is_empty() {
            format!("{sales} sales, total = remaining + claimed")
        } else {
            format!("{} of {sales} sales do not add up: {}", wrong.len(), wrong.join(", "))
        };
        checks.add("sales", value, "total = remaining + claimed", verdict(wrong.is_empty()));
        Ok(())
    }

    /// The old master follows the new one, or will: its guardian sees to it.
    async fn compare_source(&mut self, checks: &mut Checks) {
        let topology = self.shared.topology.current();
        let until = Instant::now() + ATTACHED_WITHIN;
        let partition = usize::from(self.shared.options.partition);
        let address = topology.center(&self.shift.to).and_then(|center| center.ledger.get(partition));
        let mut conn = None;
        let last = loop {
            let seen = async {
                let mut source = match conn.take() {
                    Some(source) => source,
                    None => connect(&self.shared, &topology, &self.shift.from).await?,
                };
                let standing = roles::standing(&mut source).await?;
                conn = Some(source);
                Ok::<_, LedgerError>(standing)
            }
            .await;
            let value = match seen {
                Ok(standing) => match &standing.role {
                    Role::Replica { of, .. } if Some(of) == address && standing.replication.linked => {
                        break "replica of the new master".to_owned();
                    }
                    Role::Replica { of, link, .. } => format!("replica of {of}, {link}"),
                    Role::Master { .. } => "master".to_owned(),
                },
                Err(error) => format!("no answer: {error}"),
            };
            if Instant::now() >= until || self.shared.token.is_cancelled() {
                break value;
            }
            tokio::time::sleep(ATTACHED_POLL).await;
        };
        let fits = last == "replica of the new master";
        checks.add("source_role", last, "replica of the new master", verdict(fits));
    }
}
