//! What tests do to the course of a shift: the service that runs it is stopped or killed at a step, the command follows
//! it as a process of its own, and somebody writes down all the while what either center says of it.

use std::collections::BTreeMap;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::centers::{BOTH, Centers, Which};
use crate::support::{PATIENCE, eventually};

/// Between two questions of a [`Witness`].
const ASK_EVERY: Duration = Duration::from_millis(50);
/// A service that says nothing for so long is asked anew: it may stand still.
const ASK_WITHIN: Duration = Duration::from_secs(1);

/// The next service that comes to this place is killed there, or stands still.
pub(super) fn arm(centers: &Centers, place: &str, action: &str) {
    let (file, new) = (centers.fail_point(), centers.fail_point().with_extension("new"));
    std::fs::write(&new, format!("{place} 1 {action}")).unwrap();
    std::fs::rename(new, file).unwrap();
}

/// Waits until a center's service stands still in the place for which it was armed.
pub(super) async fn until_still(centers: &Centers, which: Which) {
    let stat = format!("/proc/{}/stat", centers.pid(which).as_raw_nonzero());
    eventually("the service stands still", async || {
        let stat = std::fs::read_to_string(&stat).unwrap();
        stat.rsplit_once(')')?.1.trim_start().starts_with('T').then_some(())
    })
    .await;
}

/// Asks a center for a planned shift of the master that stands still at a place, and waits until it does.
pub(super) async fn shift_until(centers: &Centers, asked: Which, to: Which, place: &str) -> Asked {
    arm(centers, place, "stop");
    let command = Asked::for_master(centers, asked, to, &["--reason", place]);
    until_still(centers, to).await;
    command
}

/// A command that runs.
pub(super) struct Asked {
    pid: rustix::process::Pid,
    out: Arc<Mutex<String>>,
    err: Arc<Mutex<String>>,
    task: JoinHandle<ExitStatus>,
}

impl Asked {
    /// `seckill master shift`, for programs.
    pub(super) fn for_master(centers: &Centers, asked: Which, to: Which, more: &[&str]) -> Asked {
        let args = [&["master", "shift", "--to", to.id(), "--yes", "-o", "json"], more].concat();
        Asked::start(centers, asked, &args)
    }

    /// Any command, asked of a center.
    pub(super) fn start(centers: &Centers, asked: Which, args: &[&str]) -> Asked {
        let mut command = tokio::process::Command::from(centers.prepared(asked, args));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let pid = child.id().and_then(|pid| rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()));
        let (out, err) = (Arc::<Mutex<String>>::default(), Arc::<Mutex<String>>::default());
        let read = (
            read(child.stdout.take().unwrap(), Arc::clone(&out)),
            read(child.stderr.take().unwrap(), Arc::clone(&err)),
        );
        let task = tokio::spawn(async move {
            let (status, (), ()) = tokio::join!(child.wait(), read.0, read.1);
            status.unwrap()
        });
        Asked { pid: pid.unwrap(), out, err, task }
    }

    /// Waits until it has printed this.
    pub(super) async fn until_said(&self, text: &str) {
        eventually("the command says it", async || self.out.lock().unwrap().contains(text).then_some(()))
            .await;
    }

    /// Ctrl-C.
    pub(super) fn interrupt(&self) {
        kill_process(self.pid, Signal::INT).unwrap();
    }

    /// Waits for its end: exit code and what it printed.
    pub(super) async fn ended(self) -> (i32, String, String) {
        let status = tokio::time::timeout(PATIENCE, self.task).await;
        let (out, err) = (self.out.lock().unwrap().clone(), self.err.lock().unwrap().clone());
        let status = status.unwrap_or_else(|_| panic!("it does not end:\n{out}\n{err}")).unwrap();
        (status.code().unwrap_or(-1), out, err)
    }

    /// The same for a command that prints a document.
    pub(super) async fn answered(self) -> (i32, Value) {
        let (code, out, err) = self.ended().await;
        let answer = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{code}: {out}\n{err}"));
        (code, answer)
    }
}

async fn read(mut from: impl AsyncRead + Unpin, into: Arc<Mutex<String>>) {
    let mut buffer = vec![0; 4096];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        into.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
}

/// Writes down what either center says of each shift.
pub(super) struct Witness {
    stop: CancellationToken,
    tasks: [JoinHandle<Seen>; 2],
}

/// By the shift's id: its states, one after the other, without repetitions.
type Seen = BTreeMap<String, Vec<String>>;

impl Witness {
    pub(super) fn start(centers: &Centers) -> Witness {
        let stop = CancellationToken::new();
        let tasks = BOTH.map(|which| {
            let client = centers.client(which);
            let stop = stop.clone();
            tokio::spawn(async move {
                let mut seen = Seen::new();
                while !stop.is_cancelled() {
                    let asked = tokio::time::timeout(ASK_WITHIN, client.look("/admin/v1/shifts")).await;
                    if let Ok(Some(answer)) = asked
                        && answer.status == 200
                    {
                        note(&mut seen, &answer.body);
                    }
                    tokio::time::sleep(ASK_EVERY).await;
                }
                seen
            })
        });
        Witness { stop, tasks }
    }

    /// Nobody ever called over what was not: a shift was running, or not known, until it had its one end, and both
    /// centers say the same. None failed but those of which `failed` knows. Returns the ends.
    pub(super) async fn assert_truthful(self, failed: &[&str]) -> BTreeMap<String, String> {
        self.stop.cancel();
        let mut told = Vec::new();
        for task in self.tasks {
            let mut ends = BTreeMap::new();
            for (id, states) in task.await.unwrap() {
                let (end, before) = states.split_last().unwrap();
                let open = |state: &String| ["running", "unknown"].contains(&state.as_str());
                assert!(before.iter().all(open) && !open(end), "{id} was told as {states:?}");
                assert!(end != "failed" || failed.contains(&id.as_str()), "{id} was told as {states:?}");
                ends.insert(id, end.clone());
            }
            told.push(ends);
        }
        let of_b = told.pop().unwrap();
        assert_eq!(told[0], of_b, "the centers do not agree");
        of_b
    }
}

fn note(seen: &mut Seen, list: &Value) {
    let history = list["history"].as_array().into_iter().flatten();
    for shift in history.chain(Some(&list["running"]).filter(|running| !running.is_null())) {
        let (id, state) = (shift["id"].as_str().unwrap(), shift["state"].as_str().unwrap());
        let states = seen.entry(id.to_owned()).or_default();
        if states.last().is_none_or(|last| last != state) {
            states.push(state.to_owned());
        }
    }
}
