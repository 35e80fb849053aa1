//! Following a shift that runs in the service: whoever of the centers answers is asked, until it is over.

use std::time::{Duration, Instant};

use crate::topology::{Instance, Shift, Topology};

use super::client::{AdminClient, Call, ServiceArgs};
use super::exit::Failure;

/// Between two questions: a planned shift takes a quarter of a second, and its steps should be seen.
const INTERVAL: Duration = Duration::from_millis(100);
/// How long one admin listener may take for an answer before another one is asked.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// How long nobody may answer: longer than a service takes to restart, and a shift to be taken over.
const SILENCE: Duration = Duration::from_secs(30);
/// Admin listeners that are asked in turns.
const MAX_LISTENERS: usize = 16;

/// Why nobody knows how it ended.
#[derive(Debug)]
pub(super) enum Lost {
    /// The time that the command was given is over, and the shift is not.
    Late,
    /// No admin listener answered for [`SILENCE`]; what the last one said.
    Silent(String),
    /// Somebody pressed Ctrl-C.
    Interrupted,
}

/// The admin listeners that may be asked.
pub(super) struct Follower {
    clients: Vec<AdminClient>,
    turn: usize,
    /// What was seen last.
    pub(super) last: Option<Shift>,
}

impl Follower {
    /// Asks the listener that the command names first, then those of the other instances and centers.
    pub(super) fn new(
        service: &ServiceArgs,
        topology: Option<&Topology>,
        last: Option<Shift>,
    ) -> Result<Follower, Failure> {
        let mut urls = vec![service.admin.trim_end_matches('/').to_owned()];
        if let Some(topology) = topology {
            let instances = topology.extra.get("instances").cloned().unwrap_or_default();
            let instances: Vec<Instance> = serde_json::from_value(instances).unwrap_or_default();
            let centers = topology.centers.values().map(|center| center.admin_url.clone());
            urls.extend(instances.into_iter().map(|instance| instance.admin_url).chain(centers));
        }
        let mut asked: Vec<String> = Vec::new();
        for url in urls {
            if !asked.contains(&url) && asked.len() < MAX_LISTENERS {
                asked.push(url);
            }
        }
        let mut clients = Vec::new();
        for (number, admin) in asked.into_iter().enumerate() {
            match AdminClient::new(&ServiceArgs { admin, token_file: service.token_file.clone() }) {
                Ok(client) => clients.push(client),
                Err(failure) if number == 0 => return Err(failure),
                // Another center's listener may have an address that this command cannot use.
                Err(_) => {}
            }
        }
        Ok(Follower { clients, turn: 0, last })
    }

    /// Sends a call that may be sent again, to one listener after another until one takes it. The first failure
    /// counts where none does.
    pub(super) async fn send(&mut self, call: &Call) -> Result<super::client::Answer, Failure> {
        let mut first = None;
        for _ in 0..self.clients.len() {
            match self.clients[self.turn].call(call).await {
                Ok(answer) => return Ok(answer),
                // Whoever refuses has understood. Where only the way from one center to the other is missing, the other
                // one may be asked itself.
                Err(failure) if failure.body.is_some() && !is_on_the_way(&failure) => return Err(failure),
                Err(failure) => {
                    first.get_or_insert(failure);
                    self.turn = (self.turn + 1) % self.clients.len();
                }
            }
        }
        Err(first.unwrap_or_else(|| Failure::error("no admin listener is known")))
    }

    /// Waits for the end, and shows each change on the way there.
    pub(super) async fn until_over(
        &mut self,
        id: &str,
        within: Duration,
        mut show: impl FnMut(&Shift),
    ) -> Result<Shift, Lost> {
        let following = async {
            let mut heard = Instant::now();
            loop {
                let why = match self.ask(id).await {
                    Ok(shift) => {
                        heard = Instant::now();
                        show(&shift);
                        let over = shift.state.is_over();
                        self.last = Some(shift.clone());
                        if over {
                            return Ok(shift);
                        }
                        None
                    }
                    Err(failure) => {
                        self.turn = (self.turn + 1) % self.clients.len();
                        Some(failure.message)
                    }
                };
                if let Some(why) = why.filter(|_| heard.elapsed() > SILENCE) {
                    return Err(Lost::Silent(why));
                }
                tokio::time::sleep(INTERVAL).await;
            }
        };
        tokio::select! {
            ended = tokio::time::timeout(within, following) => ended.unwrap_or(Err(Lost::Late)),
            _ = tokio::signal::ctrl_c() => Err(Lost::Interrupted),
        }
    }

    async fn ask(&self, id: &str) -> Result<Shift, Failure> {
        let call = Call::get(format!("/admin/v1/shifts/{id}")).timeout(ANSWER_WITHIN);
        let answer = self.clients[self.turn].call(&call).await?.json()?;
        serde_json::from_value(answer).map_err(Failure::error)
    }
}

fn is_on_the_way(failure: &Failure) -> bool {
    failure.body.as_ref().is_some_and(|problem| problem["code"] == "center_unreachable")
}
