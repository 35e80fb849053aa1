//! What is done to the target while the load runs: commands of the `seckill` program, and faults.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::fault::{Fault, Place};
use crate::link::Link;
use crate::scenario::{Scenario, parse_duration};

/// A command may take this long; then it is ended.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(120);
/// This much of a command's output is kept, from its end.
const OUTPUT_KEPT: usize = 2000;

/// Something that happens at a point of the load.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// When, from the first arrival.
    #[serde(with = "as_text")]
    pub at: Duration,
    /// Arguments of the `seckill` program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// A fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
}

/// A link of the harness' own: a port that forwards to another, and that can be cut and delayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkSpec {
    /// What the timeline calls it.
    pub name: String,
    /// Where it listens, `HOST:PORT`.
    pub listen: String,
    /// Where it forwards to, `HOST:PORT`.
    pub to: String,
    /// How long each direction takes.
    #[serde(default, with = "as_text")]
    pub delay: Duration,
}

mod as_text {
    use super::*;

    pub(super) fn serialize<S: serde::Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{}ms", duration.as_millis()))
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(from)?;
        parse_duration(&text).map_err(serde::de::Error::custom)
    }
}

impl Step {
    /// Checks that it can be done: `links` are the names of the scenario's links.
    pub fn validate(&self, links: &[&str], has_data_dir: bool) -> Result<(), String> {
        match (&self.run, &self.fault) {
            (Some(_), None) => Ok(()),
            (None, Some(fault)) => match fault.place() {
                Place::Link(name) if !links.contains(&name) => Err(format!("there is no link {name}")),
                Place::Process(_) if !has_data_dir => {
                    Err(format!("fault {fault}: --data-dir tells where the processes are"))
                }
                Place::Link(_) | Place::Process(_) | Place::Pid(_) | Place::PidFile(_) => Ok(()),
            },
            _ => Err("a step of the timeline has either run or fault".to_owned()),
        }
    }

    /// What it does, in words.
    pub fn name(&self) -> String {
        match (&self.run, &self.fault) {
            (Some(run), _) => run.clone(),
            (None, Some(fault)) => fault.to_string(),
            (None, None) => String::new(),
        }
    }
}

/// A step that was taken.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    /// What.
    pub name: String,
    /// When it began, milliseconds after the first arrival.
    pub at_ms: u64,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// It did what it should.
    pub ok: bool,
    /// What it printed, or why it failed.
    pub output: String,
    /// What it did to the buyers.
    pub impact: Option<crate::impact::Impact>,
}

/// Takes the steps of a scenario.
pub struct Timeline {
    steps: Vec<Step>,
    links: Arc<Vec<Link>>,
    program: PathBuf,
    admin: Option<(String, String)>,
    data_dir: Option<PathBuf>,
}

impl Timeline {
    /// Opens the links.
    pub async fn new(scenario: &Scenario) -> std::io::Result<Timeline> {
        let mut steps = scenario.timeline.clone();
        steps.sort_by_key(|step| step.at);
        let mut links = Vec::new();
        for spec in &scenario.links {
            links.push(Link::open(spec).await?);
        }
        let admin = scenario.admin.as_ref().map(|admin| (admin.url.clone(), admin.token.clone()));
        Ok(Timeline {
            steps,
            links: Arc::new(links),
            program: program(),
            admin,
            data_dir: scenario.data_dir.clone(),
        })
    }

    /// The links: they carry traffic until the last of these is dropped.
    pub fn links(&self) -> Arc<Vec<Link>> {
        Arc::clone(&self.links)
    }

    /// There is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Takes every step at its time after `start`; tells each when it begins and when it is done.
    pub async fn follow(self, start: Instant, told: tokio::sync::mpsc::UnboundedSender<Event>) {
        for step in &self.steps {
            tokio::time::sleep_until((start + step.at).into()).await;
            let began = Instant::now();
            let (ok, output) = match (&step.run, &step.fault) {
                (Some(run), _) => self.run(run).await,
                (None, Some(fault)) => match fault.inflict(&self.links, self.data_dir.as_deref()) {
                    Ok(done) => (true, done),
                    Err(err) => (false, err),
                },
                (None, None) => (true, String::new()),
            };
            let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
            let event = Event {
                name: step.name(),
                at_ms: ms(began.duration_since(start)),
                took_ms: ms(began.elapsed()),
                ok,
                output,
                impact: None,
            };
            if told.send(event).is_err() {
                return;
            }
        }
        // The run ends with its generators, not with its last step.
        std::future::pending::<()>().await;
    }

    async fn run(&self, arguments: &str) -> (bool, String) {
        let mut command = Command::new(&self.program);
        command.args(arguments.split_whitespace()).stdin(Stdio::null()).kill_on_drop(true);
        let token = match &self.admin {
            None => None,
            Some((url, token)) => match token_file(token) {
                Ok(file) => {
                    command.env("SECKILL_ADMIN_URL", url).env("SECKILL_ADMIN_TOKEN_FILE", file.path());
                    Some(file)
                }
                Err(err) => return (false, format!("cannot hand over the admin token: {err}")),
            },
        };
        let result = tokio::time::timeout(COMMAND_TIMEOUT, command.output()).await;
        drop(token);
        match result {
            Err(_) => (false, format!("not done after {} s", COMMAND_TIMEOUT.as_secs())),
            Ok(Err(err)) => (false, format!("cannot run {}: {err}", self.program.display())),
            Ok(Ok(output)) => {
                let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
                text.push_str(&String::from_utf8_lossy(&output.stderr));
                let mut from = text.len().saturating_sub(OUTPUT_KEPT);
                while !text.is_char_boundary(from) {
                    from += 1;
                }
                (output.status.success(), format!("{}: {}", output.status, text[from..].trim()))
            }
        }
    }
}

fn token_file(token: &str) -> std::io::Result<tempfile::NamedTempFile> {
    use std::io::Write as _;
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(token.as_bytes())?;
    file.flush()?;
    Ok(file)
}

/// `SECKILL_PROGRAM`, else the `seckill` beside this program, else the one on the PATH.
fn program() -> PathBuf {
    if let Some(named) = std::env::var_os("SECKILL_PROGRAM") {
        return named.into();
    }
    std::env::current_exe()
        .ok()
        .and_then(|exe| {
            let beside = exe.parent()?.join("seckill");
            beside.exists().then_some(beside)
        })
        .unwrap_or_else(|| "seckill".into())
}
