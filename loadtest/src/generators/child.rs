//! A generator as a process of its own. The parent writes one line of JSON with what to do, then the start; closing
//! the pipe ends the arrivals. The child answers with lines: `ready`, its seconds, at last what it counted.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{INTERVALS_WAITING, LEAD, Share, Threads, resolve};
use crate::outcome::Codes;
use crate::part::{Part, PartText};
use crate::plan::{CouponTerms, Plan};
use crate::scenario::Scenario;
use crate::stats::Interval;

/// What a child is told first. It goes through a pipe: secrets are never arguments.
#[derive(Serialize, Deserialize)]
struct Order {
    scenario: Scenario,
    secret: Vec<u8>,
    payments: Option<String>,
    coupons: Vec<(String, CouponTerms)>,
    folder: PathBuf,
    number: u32,
}

/// What a child is told when everybody is ready.
#[derive(Serialize, Deserialize)]
struct Start {
    /// The first arrival, as a value of the monotonic clock.
    at_ns: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FromChild {
    Ready,
    Interval(Box<Interval>),
    Part(Box<PartText>),
    Failed(String),
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

struct Process {
    child: Child,
    input: Option<ChildStdin>,
    output: Option<Lines<BufReader<ChildStdout>>>,
    reading: Option<JoinHandle<io::Result<PartText>>>,
}

/// The children of a run. They end with this value.
pub(super) struct Processes {
    all: Vec<Process>,
    intervals: Option<mpsc::Sender<Interval>>,
}

fn program() -> io::Result<PathBuf> {
    // The tests run the library from a program of their own.
    match std::env::var_os("SECKILL_LOADTEST_PROGRAM") {
        Some(path) => Ok(path.into()),
        None => std::env::current_exe(),
    }
}

impl Processes {
    pub(super) async fn start(
        scenario: &Scenario,
        coupons: &[(String, CouponTerms)],
        folder: &Path,
        intervals: mpsc::Sender<Interval>,
    ) -> io::Result<Processes> {
        let mut all = Vec::new();
        for number in 0..scenario.processes {
            let mut child = Command::new(program()?)
                .arg("generate")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()?;
            let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
                return Err(io::Error::other("a child has no pipes"));
            };
            let order = Order {
                scenario: scenario.clone(),
                secret: scenario.secret.clone(),
                payments: scenario.payments.clone(),
                coupons: coupons.to_owned(),
                folder: folder.to_owned(),
                number,
            };
            write_line(&mut input, &order).await?;
            let output = Some(BufReader::new(output).lines());
            all.push(Process { child, input: Some(input), output, reading: None });
        }
        Ok(Processes { all, intervals: Some(intervals) })
    }

    pub(super) async fn open(&mut self) -> io::Result<Instant> {
        for process in &mut self.all {
            let Some(lines) = &mut process.output else { continue };
            match read_line(lines).await? {
                FromChild::Ready => {}
                FromChild::Failed(why) => return Err(io::Error::other(why)),
                FromChild::Interval(_) | FromChild::Part(_) => {
                    return Err(io::Error::other("a child began early"));
                }
            }
        }
        let lead_ns = u64::try_from(LEAD.as_nanos()).unwrap_or(u64::MAX);
        let (start, start_ns) = (Instant::now() + LEAD, monotonic_ns() + lead_ns);
        let intervals = self.intervals.take();
        for process in &mut self.all {
            if let Some(input) = &mut process.input {
                write_line(input, &Start { at_ns: start_ns }).await?;
            }
            if let (Some(lines), Some(sender)) = (process.output.take(), intervals.clone()) {
                process.reading = Some(tokio::spawn(read_on(lines, sender)));
            }
        }
        Ok(start)
    }

    pub(super) fn interrupt(&mut self) {
        for process in &mut self.all {
            // A closed pipe says it, and closing cannot block.
            process.input = None;
        }
    }

    pub(super) async fn finish(self, codes: &mut Codes) -> io::Result<Part> {
        let mut all = Part::new();
        for mut process in self.all {
            let Some(reading) = process.reading.take() else {
                return Err(io::Error::other("a child was never started"));
            };
            all.merge(Part::from_text(reading.await.map_err(io::Error::other)??, codes));
            // A child ends when its standard input does: its reader cannot be interrupted otherwise.
            process.input = None;
            process.child.wait().await?;
        }
        Ok(all)
    }
}

/// The rest of what a child says.
async fn read_on(
    mut lines: Lines<BufReader<ChildStdout>>,
    intervals: mpsc::Sender<Interval>,
) -> io::Result<PartText> {
    loop {
        match read_line(&mut lines).await? {
            FromChild::Interval(interval) => {
                // A full channel costs the live view a second, nothing else.
                let _ = intervals.try_send(*interval);
            }
            FromChild::Part(part) => return Ok(*part),
            FromChild::Failed(why) => return Err(io::Error::other(why)),
            FromChild::Ready => return Err(io::Error::other("a child is ready twice")),
        }
    }
}

async fn write_line(to: &mut (impl tokio::io::AsyncWrite + Unpin), value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line).await?;
    to.flush().await
}

async fn read_line<T: serde::de::DeserializeOwned>(
    lines: &mut Lines<impl tokio::io::AsyncBufRead + Unpin>,
) -> io::Result<T> {
    let line = lines.next_line().await?.ok_or_else(|| io::Error::other("the other process ended"))?;
    serde_json::from_str(&line).map_err(io::Error::other)
}

/// The child's side: does what the parent orders over standard input.
pub async fn serve_parent() -> io::Result<()> {
    let mut input = BufReader::new(tokio::io::stdin()).lines();
    let mut output = tokio::io::stdout();
    let order: Order = read_line(&mut input).await?;
    match generate(order, &mut input, &mut output).await {
        Ok(()) => Ok(()),
        Err(err) => {
            write_line(&mut output, &FromChild::Failed(err.to_string())).await?;
            Err(err)
        }
    }
}

async fn generate(
    order: Order,
    input: &mut Lines<impl tokio::io::AsyncBufRead + Unpin>,
    output: &mut tokio::io::Stdout,
) -> io::Result<()> {
    let mut scenario = order.scenario;
    scenario.secret = order.secret;
    scenario.payments = order.payments;
    let targets = resolve(&scenario).await.map_err(io::Error::other)?;
    let plan = Arc::new(Plan::new(&scenario, &targets, &order.coupons, |_| ()));
    let codes = Codes::default();
    let (sender, mut receiver) = mpsc::channel(INTERVALS_WAITING);
    let share =
        Share { folder: &order.folder, first: order.number * scenario.workers, count: scenario.workers };
    let threads = Threads::start(&plan, &codes, &share, &sender)?;
    drop(sender);
    threads.warm().await;
    write_line(output, &FromChild::Ready).await?;
    let start: Start = read_line(input).await?;
    let until_start = Duration::from_nanos(start.at_ns.saturating_sub(monotonic_ns()));
    threads.gate.open(Instant::now() + until_start);
    let mut listening = true;
    loop {
        tokio::select! {
            next = receiver.recv() => match next {
                Some(interval) => write_line(output, &FromChild::Interval(Box::new(interval))).await?,
                None => break,
            },
            // Nothing more is said: what comes is the end of the pipe, and the parent wants no more.
            _ = input.next_line(), if listening => {
                listening = false;
                plan.interrupted.store(true, Ordering::Relaxed);
            }
        }
    }
    let part = threads.join()?.into_text(&codes);
    write_line(output, &FromChild::Part(Box::new(part))).await
}
