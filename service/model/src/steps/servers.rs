//! Redis servers: replication, and restarts (S1).

use super::Steps;
use crate::actions::Action;
use crate::ledger::{Center, Role};
use crate::rules::Rule;
use crate::state::{Request, Return, State};

impl Steps<'_> {
    pub(super) fn servers(&mut self, center: Center) {
        let (own, master) = (self.from.server(center), self.from.server(center.other()));
        match own.role {
            Role::Replica { linked: true } if own.log.end() < master.log.end() => {
                self.then(Action::Copy { center }, |state| {
                    state.server_mut(center).log.copy_next(&master.log);
                });
            }
            Role::Replica { linked: false } if master.role == Role::Master => {
                self.then(Action::Link { center }, |state| {
                    let own = state.server_mut(center);
                    own.role = Role::Replica { linked: true };
                    // What is no beginning of the master's is replaced by all that the master holds.
                    if !own.log.begins(&master.log) {
                        own.log = master.log;
                    }
                });
            }
            Role::Master | Role::Replica { .. } | Role::Isolated => {}
        }
        if self.from.faults.servers > 0 {
            let same_run = self.keep(Rule::K2Fence);
            self.then(Action::RestartServer { center, loses_tail: false }, |state| {
                state.restart_server(center, same_run);
            });
            // A master answers after its write is on the disk, a replica may confirm before.
            if matches!(own.role, Role::Replica { .. }) && own.log.end() > 1 {
                self.then(Action::RestartServer { center, loses_tail: true }, |state| {
                    state.restart_server(center, same_run);
                    state.server_mut(center).log.lose_last();
                });
            }
        }
    }
}

impl State {
    fn restart_server(&mut self, center: Center, same_run: bool) {
        self.faults.servers -= 1;
        self.set_role(center, Role::Isolated);
        self.server_mut(center).noted_run = false;
        for requests in &mut self.requests {
            let request = &mut requests[center as usize];
            match request {
                // What was on the way is gone with the connection; a barrier needs the run of the reply (K2).
                Request::Sent { .. } | Request::Waiting { .. } => *request = Request::None,
                Request::Replied { grant, .. } if grant.replicated && same_run => *request = Request::None,
                Request::None | Request::Replied { .. } | Request::Confirmed { .. } => {}
            }
        }
        self.service_mut(center).order = None;
        let returning = &mut self.service_mut(center.other()).returning;
        if let Some((_, seen)) = returning {
            *seen = match seen {
                Return::Waiting | Return::Failed => Return::Failed,
                Return::Shown | Return::ShownBeforeRestart => Return::ShownBeforeRestart,
            };
        }
    }
}
