//! A worker's connections: an epoll set of keep-alive connections with one request in flight on each. They
//! are opened when a request finds none idle.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;

use rustix::event::{Timespec, epoll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use serde::{Deserialize, Serialize};

use crate::outcome::{Code, Verdict};
use crate::schedule::Due;
use crate::wire::{self, Answer};

/// The largest answer to a purchase that is read.
const ANSWER_MAX_BYTES: usize = 64 * 1024;
const ANSWER_START_BYTES: usize = 2048;
/// Connections being opened at the same time.
const CONNECTING_MAX: usize = 64;
/// After a failed connection attempt the next one waits this long.
const RECONNECT_NS: u64 = 50_000_000;
const EVENTS_MAX: usize = 256;
const SECOND_NS: u64 = 1_000_000_000;

/// A request on its way.
pub struct Flight {
    /// What was sent.
    pub due: Due,
    /// When, nanoseconds after the start.
    pub sent_ns: u64,
    /// The purchase was known to have an order.
    pub knew_order: bool,
    /// The item it is about.
    pub item: u8,
}

/// A slot that had an event.
#[derive(Clone, Copy)]
pub struct Ready {
    at: usize,
    generation: u32,
    flags: epoll::EventFlags,
}

/// Room for the events of one [`Connections::wait`].
pub struct Events(Vec<epoll::Event>);

impl Events {
    /// Room for as many as are taken at once.
    pub fn new() -> Events {
        Events(Vec::with_capacity(EVENTS_MAX))
    }

    /// The events.
    pub fn iter(&self) -> impl Iterator<Item = Ready> + '_ {
        self.0.iter().map(|event| {
            let data = event.data.u64();
            Ready { at: data as u32 as usize, generation: (data >> 32) as u32, flags: event.flags }
        })
    }
}

impl Default for Events {
    fn default() -> Events {
        Events::new()
    }
}

/// What happened since the start.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Connections opened.
    pub opened: u64,
    /// Attempts that failed.
    pub errors: u64,
    /// The most that were open at once.
    pub peak: usize,
}

enum State {
    Connecting { since_ns: u64 },
    Idle,
    Busy(Flight),
}

struct Conn {
    stream: TcpStream,
    /// Tells an event of this connection from one of its predecessor in the slot.
    generation: u32,
    target: usize,
    state: State,
    buf: Vec<u8>,
    filled: usize,
    unsent: Vec<u8>,
}

/// The connections of one worker.
pub struct Connections {
    epoll: OwnedFd,
    targets: Vec<SocketAddr>,
    max: usize,
    slots: Vec<Option<Conn>>,
    free: Vec<usize>,
    idle: Vec<usize>,
    connecting: usize,
    in_flight: usize,
    connect_after_ns: u64,
    next_target: usize,
    generation: u32,
    tally: Tally,
}

impl Connections {
    /// At most `max` connections, spread over `targets` in turn beginning with `first_target`.
    pub fn new(targets: Vec<SocketAddr>, first_target: usize, max: usize) -> io::Result<Connections> {
        Ok(Connections {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            targets,
            max,
            slots: Vec::new(),
            free: Vec::new(),
            idle: Vec::new(),
            connecting: 0,
            in_flight: 0,
            connect_after_ns: 0,
            next_target: first_target,
            generation: 0,
            tally: Tally::default(),
        })
    }

    /// What happened so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Requests without an answer yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// A connection can take a request.
    pub fn has_idle(&self) -> bool {
        !self.idle.is_empty()
    }

    /// Every connection there may be is open and idle.
    pub fn all_idle(&self) -> bool {
        self.idle.len() == self.max
    }

    /// Times before now were counted from another start.
    pub fn forget_time(&mut self) {
        self.connect_after_ns = 0;
    }

    /// When [`Connections::open_more`] should be called again for a request that waits, if no event comes
    /// before.
    pub fn retry_ns(&self) -> Option<u64> {
        (self.connecting == 0 && self.open() < self.max).then_some(self.connect_after_ns)
    }

    /// Waits for events, at most `nap_ns`.
    pub fn wait(&self, nap_ns: u64, events: &mut Events) -> io::Result<()> {
        let timeout = Timespec { tv_sec: (nap_ns / SECOND_NS) as i64, tv_nsec: (nap_ns % SECOND_NS) as i64 };
        events.0.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events.0), Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(err) => Err(err.into()),
        }
    }

    /// The target of the connection that the next [`Connections::send`] uses.
    pub fn next_idle_target(&self) -> Option<usize> {
        self.idle.last().and_then(|at| self.slots[*at].as_ref()).map(|conn| conn.target)
    }

    /// Sends a request over the connection that was idle for the shortest time, so that few stay warm. `Err`
    /// gives the flight back if not a byte of it went out.
    pub fn send(&mut self, request: &[u8], flight: Flight) -> Result<(), Flight> {
        let Some(at) = self.idle.pop() else { return Err(flight) };
        let Some(conn) = self.slots[at].as_mut() else { return Err(flight) };
        let written = loop {
            match conn.stream.write(request) {
                Ok(written) => break written,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => break 0,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.close(at);
                    return Err(flight);
                }
            }
        };
        conn.state = State::Busy(flight);
        self.in_flight += 1;
        if written < request.len() {
            conn.unsent.clear();
            conn.unsent.extend_from_slice(&request[written..]);
            self.watch(at, epoll::EventFlags::IN | epoll::EventFlags::OUT);
        }
        Ok(())
    }

    /// Handles one event. A request that ended by it is returned with what became of it; `judge` understands
    /// its answer.
    pub fn handle(
        &mut self,
        ready: Ready,
        now_ns: u64,
        judge: impl FnOnce(&Flight, &Answer<'_>) -> Verdict,
    ) -> Option<(Flight, Verdict)> {
        let Ready { at, generation, flags } = ready;
        let conn = self.slots[at].as_ref().filter(|conn| conn.generation == generation)?;
        if let State::Connecting { .. } = conn.state {
            self.finish_connecting(at, now_ns);
            return None;
        }
        if flags.contains(epoll::EventFlags::OUT) && self.send_rest(at).is_err() {
            return self.fail(at, Code::CONNECTION_LOST);
        }
        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            return self.receive(at, judge);
        }
        None
    }

    /// Gives up on connections whose time is over; the requests on them are returned, their fate unknown.
    pub fn expire(&mut self, now_ns: u64, timeout_ns: u64) -> Vec<(Flight, Verdict)> {
        let mut expired = Vec::new();
        for at in 0..self.slots.len() {
            let Some(conn) = &self.slots[at] else { continue };
            match &conn.state {
                State::Connecting { since_ns } if now_ns >= since_ns + timeout_ns => {
                    self.connect_failed(at, now_ns);
                }
                State::Busy(flight) if now_ns >= flight.sent_ns + timeout_ns => {
                    expired.extend(self.fail(at, Code::TIMEOUT));
                }
                State::Connecting { .. } | State::Idle | State::Busy(_) => {}
            }
        }
        expired
    }

    /// Opens connections for `waiting` requests, as far as the bounds allow.
    pub fn open_more(&mut self, waiting: usize, now_ns: u64) {
        if now_ns < self.connect_after_ns {
            return;
        }
        let wanted = waiting.clamp(1, CONNECTING_MAX).saturating_sub(self.connecting);
        for _ in 0..wanted.min(self.max - self.open()) {
            if self.connect(now_ns).is_err() {
                self.tally.errors += 1;
                self.connect_after_ns = now_ns + RECONNECT_NS;
                return;
            }
        }
    }

    fn open(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn connect(&mut self, now_ns: u64) -> io::Result<()> {
        let target = self.next_target % self.targets.len();
        self.next_target = self.next_target.wrapping_add(1);
        let addr = self.targets[target];
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        match rustix::net::connect(&socket, &addr) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(err) => return Err(err.into()),
        }
        self.generation = self.generation.wrapping_add(1);
        let at = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let conn = Conn {
            stream: TcpStream::from(socket),
            generation: self.generation,
            target,
            state: State::Connecting { since_ns: now_ns },
            buf: vec![0; ANSWER_START_BYTES],
            filled: 0,
            unsent: Vec::new(),
        };
        let data = event_data(at, conn.generation);
        if let Err(err) = epoll::add(&self.epoll, &conn.stream, data, epoll::EventFlags::OUT) {
            self.free.push(at);
            return Err(err.into());
        }
        self.slots[at] = Some(conn);
        self.connecting += 1;
        self.tally.peak = self.tally.peak.max(self.open());
        Ok(())
    }

    fn finish_connecting(&mut self, at: usize, now_ns: u64) {
        let Some(conn) = self.slots[at].as_mut() else { return };
        if !matches!(conn.stream.take_error(), Ok(None)) {
            return self.connect_failed(at, now_ns);
        }
        conn.state = State::Idle;
        self.connecting -= 1;
        self.tally.opened += 1;
        self.idle.push(at);
        self.watch(at, epoll::EventFlags::IN);
    }

    fn connect_failed(&mut self, at: usize, now_ns: u64) {
        self.connecting -= 1;
        self.tally.errors += 1;
        self.connect_after_ns = now_ns + RECONNECT_NS;
        self.slots[at] = None;
        self.free.push(at);
    }

    fn send_rest(&mut self, at: usize) -> io::Result<()> {
        let Some(conn) = self.slots[at].as_mut() else { return Ok(()) };
        match conn.stream.write(&conn.unsent) {
            Ok(written) => {
                conn.unsent.drain(..written);
                if conn.unsent.is_empty() {
                    self.watch(at, epoll::EventFlags::IN);
                }
                Ok(())
            }
            Err(err) if matches!(err.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Ok(())
            }
            Err(err) => Err(err),
        }
    }

    fn receive(
        &mut self,
        at: usize,
        judge: impl FnOnce(&Flight, &Answer<'_>) -> Verdict,
    ) -> Option<(Flight, Verdict)> {
        loop {
            let conn = self.slots[at].as_mut()?;
            if conn.filled == conn.buf.len() {
                if conn.buf.len() >= ANSWER_MAX_BYTES {
                    return self.fail(at, Code::INVALID_ANSWER);
                }
                conn.buf.resize(conn.buf.len() * 2, 0);
            }
            let mut eof = false;
            match conn.stream.read(&mut conn.buf[conn.filled..]) {
                Ok(0) => eof = true,
                Ok(read) => conn.filled += read,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return None,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return self.fail(at, Code::CONNECTION_LOST),
            }
            if matches!(conn.state, State::Idle) {
                // Closed while idle, or bytes nobody asked for: in both cases nothing is lost.
                self.close(at);
                return None;
            }
            let State::Busy(flight) = &conn.state else { return None };
            let (verdict, reusable) = match wire::parse_answer(&conn.buf[..conn.filled], eof) {
                Ok(Some(answer)) => {
                    let whole = answer.consumed == conn.filled && conn.unsent.is_empty();
                    (judge(flight, &answer), whole && !answer.close && !eof)
                }
                Ok(None) if eof => return self.fail(at, Code::CONNECTION_LOST),
                // Level-triggered: the rest of the answer raises the next event.
                Ok(None) if conn.filled < conn.buf.len() => return None,
                Ok(None) => continue,
                Err(_) => return self.fail(at, Code::INVALID_ANSWER),
            };
            conn.filled = 0;
            let State::Busy(flight) = std::mem::replace(&mut conn.state, State::Idle) else { return None };
            self.in_flight -= 1;
            self.idle.push(at);
            if !reusable {
                self.close(at);
            }
            return Some((flight, verdict));
        }
    }

    /// The connection is of no more use; a request on it has an unknown fate.
    fn fail(&mut self, at: usize, code: Code) -> Option<(Flight, Verdict)> {
        let state = self.close(at)?;
        let State::Busy(flight) = state else { return None };
        self.in_flight -= 1;
        Some((flight, Verdict::unknown(code)))
    }

    fn watch(&mut self, at: usize, flags: epoll::EventFlags) {
        let Some(conn) = &self.slots[at] else { return };
        // A descriptor that is in the set can be changed; if the kernel will not, the timeout ends the request.
        let _ = epoll::modify(&self.epoll, &conn.stream, event_data(at, conn.generation), flags);
    }

    /// Dropping the socket takes it out of the epoll set.
    fn close(&mut self, at: usize) -> Option<State> {
        let conn = self.slots[at].take()?;
        if matches!(conn.state, State::Idle) {
            self.idle.retain(|idle| *idle != at);
        }
        self.free.push(at);
        Some(conn.state)
    }
}

fn event_data(at: usize, generation: u32) -> epoll::EventData {
    epoll::EventData::new_u64(u64::from(generation) << 32 | at as u64)
}
