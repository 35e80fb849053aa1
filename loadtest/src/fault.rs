//! Faults: signals to processes of the target, and links that are cut or slow.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::process::{Pid, Signal};

use crate::link::Link;
use crate::scenario::parse_duration;

/// `kill`, `stop` or `cont` a process, or `cut`, `heal` or `delay` a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    text: String,
    action: Action,
    place: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Kill,
    Stop,
    Cont,
    Cut,
    Heal,
    Delay(Duration),
}

/// What a fault is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// A link of the scenario.
    Link(&'a str),
    /// A process by number.
    Pid(i32),
    /// A process by the file that holds its number.
    PidFile(&'a str),
    /// A process under the data folder: its program's name, with `center/` before it where that matters.
    Process(&'a str),
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Fault, String> {
        let usage = "a fault is kill|stop|cont PROCESS, cut|heal LINK, or delay LINK TIME";
        let words: Vec<&str> = text.split_whitespace().collect();
        let (action, place) = match words[..] {
            ["kill", place] => (Action::Kill, place),
            ["stop", place] => (Action::Stop, place),
            ["cont", place] => (Action::Cont, place),
            ["cut", place] => (Action::Cut, place),
            ["heal", place] => (Action::Heal, place),
            ["delay", place, time] => (Action::Delay(parse_duration(time)?), place),
            _ => return Err(usage.to_owned()),
        };
        if let Some(pid) = place.strip_prefix("pid:") {
            pid.parse::<i32>().ok().filter(|pid| *pid > 1).ok_or(usage)?;
        }
        Ok(Fault { text: text.to_owned(), action, place: place.to_owned() })
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl serde::Serialize for Fault {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> serde::Deserialize<'de> for Fault {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Fault, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Fault {
    /// What it is about.
    pub fn place(&self) -> Place<'_> {
        match self.action {
            Action::Cut | Action::Heal | Action::Delay(_) => Place::Link(&self.place),
            Action::Kill | Action::Stop | Action::Cont => {
                if let Some(pid) = self.place.strip_prefix("pid:") {
                    Place::Pid(pid.parse().unwrap_or_default())
                } else if let Some(file) = self.place.strip_prefix("pidfile:") {
                    Place::PidFile(file)
                } else {
                    Place::Process(&self.place)
                }
            }
        }
    }

    /// Does it; says what was done.
    pub fn inflict(&self, links: &[Link], data_dir: Option<&Path>) -> Result<String, String> {
        let signal = match self.action {
            Action::Kill => Signal::KILL,
            Action::Stop => Signal::STOP,
            Action::Cont => Signal::CONT,
            Action::Cut | Action::Heal | Action::Delay(_) => {
                let link = links.iter().find(|link| link.name() == self.place);
                let link = link.ok_or_else(|| format!("there is no link {}", self.place))?;
                match self.action {
                    Action::Cut => link.cut(),
                    Action::Delay(time) => link.delay(time),
                    Action::Heal | Action::Kill | Action::Stop | Action::Cont => link.heal(),
                }
                return Ok(String::new());
            }
        };
        let pids = match self.place() {
            Place::Pid(pid) => vec![pid],
            Place::PidFile(file) => vec![
                fs::read_to_string(file)
                    .map_err(|err| format!("cannot read {file}: {err}"))?
                    .trim()
                    .parse::<i32>()
                    .map_err(|err| format!("{file}: {err}"))?,
            ],
            Place::Process(name) => {
                find(name, data_dir.ok_or("the data folder is not known")?).map_err(|err| err.to_string())?
            }
            Place::Link(_) => Vec::new(),
        };
        if pids.is_empty() {
            return Err(format!("there is no process {}", self.place));
        }
        for pid in &pids {
            let target = Pid::from_raw(*pid).filter(|pid| !pid.is_init()).ok_or("no such process")?;
            rustix::process::kill_process(target, signal).map_err(|err| format!("process {pid}: {err}"))?;
        }
        Ok(format!("process {}", pids.iter().map(i32::to_string).collect::<Vec<_>>().join(", ")))
    }
}

/// Processes of a program that work in the data folder, or name something in it on their command line.
fn find(name: &str, data_dir: &Path) -> std::io::Result<Vec<i32>> {
    let (folder, program) = match name.split_once('/') {
        Some((center, program)) => (data_dir.join(center), program),
        None => (data_dir.to_owned(), name),
    };
    let folder = folder.canonicalize()?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // Processes come and go while this looks at them, and others' are none of ours.
        let proc = entry.path();
        let Ok(comm) = fs::read_to_string(proc.join("comm")) else { continue };
        // The kernel keeps 15 bytes of a name.
        if comm.trim_end() != &program[..program.len().min(15)] || pid == std::process::id() as i32 {
            continue;
        }
        let (Ok(cwd), Ok(cmdline)) = (fs::read_link(proc.join("cwd")), fs::read(proc.join("cmdline"))) else {
            continue;
        };
        let names_it = |argument: &[u8]| {
            let argument = String::from_utf8_lossy(argument);
            let path = argument.split_once('=').map_or(&*argument, |(_, value)| value);
            !path.is_empty()
                && cwd.join(PathBuf::from(path)).canonicalize().is_ok_and(|path| path.starts_with(&folder))
        };
        if cwd.starts_with(&folder) || cmdline.split(|byte| *byte == 0).any(names_it) {
            found.push(pid);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_read_or_refused() {
        for (text, place) in [
            ("kill a/redis-server", Place::Process("a/redis-server")),
            ("stop pid:42", Place::Pid(42)),
            ("cont pidfile:/run/x.pid", Place::PidFile("/run/x.pid")),
            ("cut wan", Place::Link("wan")),
            ("delay wan 30ms", Place::Link("wan")),
        ] {
            assert_eq!(text.parse::<Fault>().unwrap().place(), place);
        }
        for text in ["", "kill", "kill pid:1", "kill pid:0", "kill pid:-3", "delay wan", "explode a"] {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_process_is_found_by_its_folder_and_name_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("a")).unwrap();
        fs::create_dir(folder.path().join("b")).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .current_dir(folder.path().join("a"))
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        // Between fork and exec the child still bears the name of this program.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while find("a/sleep", folder.path()).unwrap() != [pid] && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(find("a/sleep", folder.path()).unwrap(), [pid]);
        assert_eq!(find("sleep", folder.path()).unwrap(), [pid]);
        assert!(find("b/sleep", folder.path()).unwrap().is_empty());
        let fault: Fault = "kill a/sleep".parse().unwrap();
        fault.inflict(&[], Some(folder.path())).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(fault.inflict(&[], Some(folder.path())).is_err());
    }
}
