//! A TCP line that can be slow, silent or cut: the distance between two centers.
//!
//! Bytes arrive in order and late by the delay; a reader who does not read slows the writer down, as on a real line. The
//! delay is added in both directions: 15 ms make a round trip of 30 ms. Timers tick in milliseconds, so bytes come up to
//! 1 ms later than said, never earlier. Connecting itself is not delayed, only what is said.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;

use crate::error::PartError;
use crate::ports;

/// The most that one read takes.
const CHUNK_BYTES: usize = 64 << 10;
/// What one direction of one connection holds on the way; a line of 15 ms carries 1 GB/s with it.
const IN_FLIGHT_BYTES: usize = 16 << 20;
/// The same, in chunks: small ones must not pile up without end.
const IN_FLIGHT_CHUNKS: usize = 64 << 10;

/// How long a healthy line waits for its port before it tries to listen there again.
const LISTEN_AGAIN: Duration = Duration::from_millis(20);

/// What the line does with what is sent over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LinkState {
    /// It carries.
    #[default]
    Healthy,
    /// Nothing arrives, neither way, and nobody is told: connections stay open, new ones are accepted and say nothing.
    /// What was sent meanwhile arrives once the line is healthy again, as with TCP.
    Stalled,
    /// What goes from the client to the server does not arrive; answers do.
    StalledToServer,
    /// What goes from the server to the client does not arrive: requests are executed, answers are lost for now.
    StalledToClient,
    /// Connections are reset, with what was on the way, and new ones are refused.
    Cut,
}

#[derive(Debug, Clone, Copy)]
struct Conditions {
    delay: Duration,
    jitter: Duration,
    state: LinkState,
    target: SocketAddr,
}

/// A proxy from a port of its own to a server. Ends on drop, with its connections.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    conditions: Arc<watch::Sender<Conditions>>,
    /// Dropped first: the thread ends when this is gone.
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Starts a line to `target` without delay. It has a thread of its own, so that a busy test does not slow it down.
    pub fn start(target: SocketAddr) -> Result<Link, PartError> {
        Link::run(target).map_err(|source| PartError::Spawn { part: "link".to_owned(), source })
    }

    fn run(target: SocketAddr) -> io::Result<Link> {
        // A port that nobody else's connection takes while the line is cut.
        let listener = ports::listener().ok_or(io::ErrorKind::AddrInUse)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let conditions =
            Conditions { delay: Duration::ZERO, jitter: Duration::ZERO, state: LinkState::Healthy, target };
        let (conditions, _) = watch::channel(conditions);
        let conditions = Arc::new(conditions);
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = conditions.clone();
        let thread = std::thread::Builder::new().name("link".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = accept(listener, &shared) => {}
                    _ = stopped => {}
                }
            });
            // Dropping the runtime drops the connections' tasks, and so resets the connections.
        })?;
        Ok(Link { address, conditions, stop: Some(stop), thread: Some(thread) })
    }

    /// Where clients connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The port of [`Link::address`].
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Delays each direction by `delay` and up to `jitter` more. For what is sent from now on; what is on the way
    /// arrives as it was going to, and order is kept.
    pub fn set_delay(&self, delay: Duration, jitter: Duration) {
        self.conditions.send_modify(|conditions| {
            conditions.delay = delay;
            conditions.jitter = jitter;
        });
    }

    /// Changes what the line does.
    pub fn set(&self, state: LinkState) {
        self.conditions.send_modify(|conditions| conditions.state = state);
    }

    /// [`LinkState::Cut`].
    pub fn cut(&self) {
        self.set(LinkState::Cut);
    }

    /// [`LinkState::Stalled`]: half-open connections.
    pub fn stall(&self) {
        self.set(LinkState::Stalled);
    }

    /// [`LinkState::Healthy`].
    pub fn heal(&self) {
        self.set(LinkState::Healthy);
    }

    /// New connections go to another server; those that exist stay.
    pub fn set_target(&self, target: SocketAddr) {
        self.conditions.send_modify(|conditions| conditions.target = target);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: std::net::TcpListener, conditions: &Arc<watch::Sender<Conditions>>) {
    let Ok(address) = listener.local_addr() else { return };
    let Ok(mut listener) = TcpListener::from_std(listener).map(Some) else { return };
    let mut changes = conditions.subscribe();
    // Keeps jitter different from connection to connection, and the same from run to run.
    let mut number = 0;
    loop {
        let cut = changes.borrow_and_update().state == LinkState::Cut;
        if cut {
            // A closed port refuses; one that accepts and resets would look like a server that crashes.
            listener = None;
        } else if listener.is_none() {
            listener = TcpListener::bind(address).await.ok();
        }
        let Some(open) = &listener else {
            // Somebody else has the port for a moment, or the line is cut.
            let again = async {
                match cut {
                    true => std::future::pending().await,
                    false => tokio::time::sleep(LISTEN_AGAIN).await,
                }
            };
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = again => {}
            }
            continue;
        };
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            accepted = open.accept() => {
                if let Ok((client, _)) = accepted {
                    number += 1;
                    tokio::spawn(connection(client, number, conditions.clone()));
                }
            }
        }
    }
}

/// Carries one connection until both sides have ended it, or the line is cut.
async fn connection(mut client: TcpStream, number: u64, conditions: Arc<watch::Sender<Conditions>>) {
    let mut server = None;
    let mut changes = conditions.subscribe();
    let ended = tokio::select! {
        biased;
        _ = changes.wait_for(|conditions| conditions.state == LinkState::Cut) => {
            Err(io::ErrorKind::ConnectionReset.into())
        }
        ended = carry(&mut client, &mut server, number, &conditions) => ended,
    };
    if ended.is_err() {
        // One that does not linger is reset, without what was on the way.
        let _ = client.set_zero_linger();
        if let Some(server) = server {
            let _ = server.set_zero_linger();
        }
    }
}

async fn carry(
    client: &mut TcpStream,
    server: &mut Option<TcpStream>,
    number: u64,
    conditions: &watch::Sender<Conditions>,
) -> io::Result<()> {
    let healthy = |conditions: &Conditions| !Direction::ToServer.is_stalled(conditions.state);
    let target = conditions.subscribe().wait_for(healthy).await.map_err(io::Error::other)?.target;
    let server = server.insert(TcpStream::connect(target).await?);
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    tokio::try_join!(
        one_way(from_client, to_server, Direction::ToServer, number, conditions),
        one_way(from_server, to_client, Direction::ToClient, number, conditions),
    )?;
    Ok(())
}

/// Bytes on the way; none at all are the end of the stream.
struct Chunk {
    bytes: Vec<u8>,
    due: Instant,
}

async fn one_way(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    direction: Direction,
    number: u64,
    conditions: &watch::Sender<Conditions>,
) -> io::Result<()> {
    let (send, mut arriving) = mpsc::channel::<Chunk>(IN_FLIGHT_CHUNKS);
    let room = Semaphore::new(IN_FLIGHT_BYTES);
    let take_in = async {
        let mut buffer = vec![0; CHUNK_BYTES];
        let mut dice = Dice::new(number, direction);
        let mut due = Instant::now();
        loop {
            let length = from.read(&mut buffer).await?;
            let (delay, jitter) = {
                let now = conditions.borrow();
                (now.delay, now.jitter)
            };
            // Never before what was sent earlier.
            due = due.max(Instant::now() + delay + dice.up_to(jitter));
            // The writing side gives the room back.
            let needed = u32::try_from(length).map_err(io::Error::other)?;
            room.acquire_many(needed).await.map_err(io::Error::other)?.forget();
            let chunk = Chunk { bytes: buffer[..length].to_vec(), due };
            if send.send(chunk).await.is_err() || length == 0 {
                return Ok::<(), io::Error>(());
            }
        }
    };
    let let_out = async {
        let mut changes = conditions.subscribe();
        while let Some(chunk) = arriving.recv().await {
            loop {
                tokio::time::sleep_until(chunk.due).await;
                let carries = |conditions: &Conditions| !direction.is_stalled(conditions.state);
                if carries(&changes.borrow_and_update()) {
                    break;
                }
                changes.wait_for(carries).await.map_err(io::Error::other)?;
            }
            if chunk.bytes.is_empty() {
                return to.shutdown().await;
            }
            to.write_all(&chunk.bytes).await?;
            room.add_permits(chunk.bytes.len());
        }
        Ok(())
    };
    tokio::try_join!(take_in, let_out)?;
    Ok(())
}

/// A small generator of our own (xorshift64): the same jitter in every run.
struct Dice(u64);

impl Dice {
    fn new(number: u64, direction: Direction) -> Dice {
        let odd = u64::from(direction == Direction::ToClient);
        Dice((number << 1 | odd).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn up_to(&mut self, most: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let nanos = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(self.0.checked_rem(nanos.saturating_add(1)).unwrap_or(0))
    }
}

/// One direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToServer,
    ToClient,
}

impl Direction {
    fn is_stalled(self, state: LinkState) -> bool {
        match state {
            LinkState::Healthy | LinkState::Cut => false,
            LinkState::Stalled => true,
            LinkState::StalledToServer => self == Direction::ToServer,
            LinkState::StalledToClient => self == Direction::ToClient,
        }
    }
}
