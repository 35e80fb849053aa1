//! Those who send: threads of this process, or processes of their own that report over pipes.

mod child;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

pub use child::serve_parent;

use crate::client::Target;
use crate::outcome::Codes;
use crate::part::Part;
use crate::plan::{CouponTerms, Gate, Plan};
use crate::scenario::Scenario;
use crate::stats::Interval;
use crate::worker::Worker;

/// Between the opening of the gate and the first arrival.
const LEAD: Duration = Duration::from_millis(50);
/// Seconds of all workers that may wait to be shown.
const INTERVALS_WAITING: usize = 4096;
/// How often is looked whether everybody is warm.
const GATE_PAUSE: Duration = Duration::from_millis(5);
/// Processes sign their tokens and connect within this time.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// Threads that send.
struct Threads {
    gate: Arc<Gate>,
    handles: Vec<JoinHandle<io::Result<Part>>>,
}

/// Where a process keeps its records, and which of the workers are its own.
struct Share<'a> {
    folder: &'a Path,
    first: u32,
    count: u32,
}

impl Threads {
    fn start(
        plan: &Arc<Plan>,
        codes: &Codes,
        share: &Share<'_>,
        intervals: &mpsc::Sender<Interval>,
    ) -> io::Result<Threads> {
        let gate = Arc::new(Gate::default());
        let mut handles = Vec::new();
        for number in share.first..share.first + share.count {
            let worker =
                Worker::new(Arc::clone(plan), number, codes.clone(), share.folder, intervals.clone())?;
            let gate = Arc::clone(&gate);
            let thread = std::thread::Builder::new().name(format!("worker-{number}"));
            handles.push(thread.spawn(move || worker.run(&gate))?);
        }
        Ok(Threads { gate, handles })
    }

    /// Waits until every worker is warm.
    async fn warm(&self) {
        while (self.gate.ready() as usize) < self.handles.len()
            && !self.handles.iter().any(JoinHandle::is_finished)
        {
            tokio::time::sleep(GATE_PAUSE).await;
        }
    }

    /// Every worker has ended, or is about to: waits and adds up.
    fn join(self) -> io::Result<Part> {
        let mut all = Part::new();
        for handle in self.handles {
            match handle.join() {
                Ok(part) => all.merge(part?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(all)
    }
}

/// The generators of a run, started and waiting at the gate.
pub struct Generators {
    plan: Arc<Plan>,
    source: Source,
    receiver: mpsc::Receiver<Interval>,
}

enum Source {
    Threads(Threads),
    Processes(child::Processes),
}

impl Generators {
    /// Starts them. Their records go to `folder`.
    pub async fn start(
        scenario: &Scenario,
        plan: &Arc<Plan>,
        coupons: &[(String, CouponTerms)],
        codes: &Codes,
        folder: &Path,
    ) -> io::Result<Generators> {
        let (sender, receiver) = mpsc::channel(INTERVALS_WAITING);
        let source = if scenario.processes == 1 {
            let share = Share { folder, first: 0, count: scenario.workers };
            Source::Threads(Threads::start(plan, codes, &share, &sender)?)
        } else {
            Source::Processes(child::Processes::start(scenario, coupons, folder, sender).await?)
        };
        Ok(Generators { plan: Arc::clone(plan), source, receiver })
    }

    /// Waits until all of them are warm and opens the gate; returns the time of the first arrival.
    pub async fn open(&mut self) -> io::Result<Instant> {
        match &mut self.source {
            Source::Threads(threads) => {
                threads.warm().await;
                let start = Instant::now() + LEAD;
                threads.gate.open(start);
                Ok(start)
            }
            Source::Processes(processes) => {
                tokio::time::timeout(READY_WITHIN, processes.open()).await.map_err(io::Error::other)?
            }
        }
    }

    /// The next second of one of them; `None` when all have ended. Cancel safe.
    pub async fn next(&mut self) -> Option<Interval> {
        self.receiver.recv().await
    }

    /// No more arrivals.
    pub fn interrupt(&mut self) {
        self.plan.interrupted.store(true, Ordering::Relaxed);
        if let Source::Processes(processes) = &mut self.source {
            processes.interrupt();
        }
    }

    /// What they counted, after [`Generators::next`] has ended.
    pub async fn finish(self, codes: &mut Codes) -> io::Result<Part> {
        match self.source {
            Source::Threads(threads) => threads.join(),
            Source::Processes(processes) => processes.finish(codes).await,
        }
    }
}

/// The folder of the records: the one that was asked for, or a temporary one that goes with the value.
pub struct LedgerFolder {
    path: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

impl LedgerFolder {
    /// Creates it.
    pub fn create(wanted: Option<&Path>) -> io::Result<LedgerFolder> {
        match wanted {
            Some(path) => {
                std::fs::create_dir_all(path)?;
                Ok(LedgerFolder { path: path.to_owned(), _temporary: None })
            }
            None => {
                let folder = tempfile::Builder::new().prefix("seckill-loadtest-").tempdir()?;
                Ok(LedgerFolder { path: folder.path().to_owned(), _temporary: Some(folder) })
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Resolves every target of a scenario.
pub async fn resolve(scenario: &Scenario) -> Result<Vec<Target>, crate::client::Error> {
    let mut targets = Vec::new();
    for url in &scenario.targets {
        targets.push(Target::resolve(url).await?);
    }
    Ok(targets)
}
