//! Strong sessions: a key that only two processes have, for ten minutes.
//!
//! The caller sends a nonce, the receiver answers with one of its own; both derive the session's key with
//! HKDF-SHA256 (RFC 5869) from the long-term secret, salted with both nonces and bound to both centers, the
//! receiving process, the session's name and the protocol version. The answer carries a proof that the receiver
//! has the key. A recorded request for a session, sent again, is refused where its nonce is remembered; where it
//! is not (after a restart) it opens a session whose key the sender cannot derive, because the receiver's nonce is
//! a new one.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hkdf::Hkdf;
use http::request::Parts;
use seckill_domain::CenterId;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::keyring::{CrossKey, Keyring, MacKey};
use super::refusal::Refusal;
use super::signature::{Presented, TOLERANCE_S};
use super::window::ReplayWindow;
use super::{HIGHEST_VERSION, LOWEST_VERSION};

/// A session ends after this long.
pub const LIFETIME: Duration = Duration::from_secs(600);
/// A caller opens the next session when this one has this little left: no request is signed for the last moment.
pub const RENEW_BEFORE: Duration = Duration::from_secs(60);
/// Sessions of one peer center at the same time: two for each of a hundred instances. Beyond it the one that was
/// idle for longest ends; its owner opens another one.
pub const MAX_PER_PEER: usize = 200;
/// Nonces of callers that are remembered; beyond it the oldest is forgotten.
const MAX_NONCES: usize = 4096;
/// For how long a recorded request for a session could pass as fresh: twice the tolerance, and some.
const NONCE_MEMORY: Duration = Duration::from_secs(2 * TOLERANCE_S as u64 + 10);
/// Part of the key derivation, so that no other use of the same secrets gives the same keys.
const PURPOSE: &[u8] = b"seckill cross-center session";
const NONCE_BYTES: usize = 32;

/// The body of `POST /internal/v1/sessions`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The calling center.
    pub from: CenterId,
    /// The center that is called.
    pub to: CenterId,
    /// The process that is called, where the caller knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// 32 random bytes in base64.
    pub nonce: String,
    /// Oldest protocol version that the caller speaks.
    pub lowest: u16,
    /// Newest protocol version that the caller speaks.
    pub highest: u16,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The process that answered.
    pub instance: String,
    /// The session's name there.
    pub session: String,
    /// 32 random bytes in base64.
    pub nonce: String,
    /// The protocol version of this session.
    pub version: u16,
    /// How long it lives, seconds.
    pub expires_in_s: u64,
    /// Code of the words `seckill session` and both nonces under the session's key, in base64: the receiver has it.
    pub proof: String,
}

/// What both sides derive a session's key from, besides the secret.
struct Binding<'a> {
    from: &'a CenterId,
    to: &'a CenterId,
    key_id: &'a str,
    instance: &'a str,
    session: &'a str,
    version: u16,
    caller_nonce: [u8; NONCE_BYTES],
    receiver_nonce: [u8; NONCE_BYTES],
}

impl Binding<'_> {
    fn nonces(&self) -> [u8; 2 * NONCE_BYTES] {
        let mut both = [0; 2 * NONCE_BYTES];
        both[..NONCE_BYTES].copy_from_slice(&self.caller_nonce);
        both[NONCE_BYTES..].copy_from_slice(&self.receiver_nonce);
        both
    }

    fn key(&self, secret: &[u8]) -> MacKey {
        let mut info = PURPOSE.to_vec();
        for part in [self.from.as_str(), self.to.as_str(), self.key_id, self.instance, self.session] {
            // Lengths keep two neighbours from being mistaken for two others.
            info.extend_from_slice(&(part.len() as u32).to_be_bytes());
            info.extend_from_slice(part.as_bytes());
        }
        info.extend_from_slice(&self.version.to_be_bytes());
        let mut key = [0; 32];
        match Hkdf::<Sha256>::new(Some(&self.nonces()), secret).expand(&info, &mut key) {
            Ok(()) => MacKey::new(&key),
            Err(_) => unreachable!("HKDF gives up to 255 hashes, and this is one"),
        }
    }

    fn proof(&self, key: &MacKey) -> [u8; 32] {
        key.sign(&[b"seckill session".as_slice(), &self.nonces()].concat())
    }
}

/// The time, as signatures and as sessions count it.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Seconds since 1970.
    pub unix_s: i64,
    /// The process' own clock.
    pub instant: Instant,
}

impl Now {
    /// Now.
    pub fn read() -> Now {
        use seckill_domain::{Clock, SystemClock};
        Now { unix_s: SystemClock.now().0.div_euclid(1000), instant: Instant::now() }
    }
}

/// The sessions that others have with this process. Clones share them.
#[derive(Debug, Clone)]
pub struct Sessions(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    keys: Keyring,
    instance: String,
    lifetime: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    sessions: HashMap<String, Session>,
    nonces: HashSet<[u8; NONCE_BYTES]>,
    nonces_by_age: VecDeque<(Instant, [u8; NONCE_BYTES])>,
}

#[derive(Debug)]
struct Session {
    from: CenterId,
    key: MacKey,
    version: u16,
    opened: Instant,
    used: Instant,
    window: ReplayWindow,
}

/// Who sent a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The calling center.
    pub center: CenterId,
    /// The epoch that it believes in.
    pub epoch: u64,
    /// The protocol version of its session.
    pub version: u16,
}

/// A request whose head is genuine. Its body is still to be compared.
#[derive(Debug)]
pub struct Genuine {
    sessions: Sessions,
    presented: Presented,
    session: String,
    caller: Caller,
}

impl Sessions {
    /// No sessions yet. `instance` names this process: no other ever had or gets the name.
    pub fn new(keys: Keyring, instance: String) -> Sessions {
        Sessions::with_lifetime(keys, instance, LIFETIME)
    }

    /// Sessions that end earlier than after [`LIFETIME`].
    pub fn with_lifetime(keys: Keyring, instance: String, lifetime: Duration) -> Sessions {
        let lifetime = lifetime.min(LIFETIME);
        Sessions(Arc::new(Inner { keys, instance, lifetime, state: Mutex::default() }))
    }

    /// The name of this process.
    pub fn instance(&self) -> &str {
        &self.0.instance
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a session: the request is signed with a long-term key and its number is 0.
    pub fn open(&self, parts: &Parts, body: &[u8], now: Now) -> Result<Welcome, Refusal> {
        let presented = Presented::of(parts, now.unix_s)?;
        let key = self.0.keys.of_others(&presented.key_id).ok_or(Refusal::KeyUnknown)?;
        presented.signed_with(&MacKey::new(&key.secret))?;
        presented.covers_body(body)?;
        if presented.seq != 0 {
            return Err(Refusal::FieldInvalid);
        }
        let hello: Hello = serde_json::from_slice(body).map_err(|_| Refusal::SessionMalformed)?;
        if hello.from != key.center {
            return Err(Refusal::KeyUnknown);
        }
        if hello.to != *self.0.keys.center() {
            return Err(Refusal::CenterWrong);
        }
        if hello.instance.as_ref().is_some_and(|instance| *instance != self.0.instance) {
            return Err(Refusal::InstanceOther);
        }
        let version = hello.highest.min(HIGHEST_VERSION);
        if hello.lowest > hello.highest || version < hello.lowest.max(LOWEST_VERSION) {
            return Err(Refusal::VersionMismatch);
        }
        let caller_nonce = nonce_of(&hello.nonce).ok_or(Refusal::SessionMalformed)?;
        let (receiver_nonce, name): ([u8; NONCE_BYTES], u128) = (rand::random(), rand::random());
        let session = format!("{name:032x}");
        let binding = Binding {
            from: &hello.from,
            to: &hello.to,
            key_id: &key.id,
            instance: &self.0.instance,
            session: &session,
            version,
            caller_nonce,
            receiver_nonce,
        };
        let session_key = binding.key(&key.secret);
        let proof = STANDARD.encode(binding.proof(&session_key));
        let mut state = self.state();
        if !state.remember(caller_nonce, now.instant) {
            return Err(Refusal::Replayed);
        }
        state.make_room(&hello.from, now.instant);
        state.sessions.insert(
            session.clone(),
            Session {
                from: hello.from,
                key: session_key,
                version,
                opened: now.instant,
                used: now.instant,
                window: ReplayWindow::default(),
            },
        );
        drop(state);
        Ok(Welcome {
            instance: self.0.instance.clone(),
            session,
            nonce: STANDARD.encode(receiver_nonce),
            version,
            expires_in_s: self.0.lifetime.as_secs(),
            proof,
        })
    }

    /// Judges a request's head, before its body is read.
    pub fn authenticate(&self, parts: &Parts, now: Now) -> Result<Genuine, Refusal> {
        let presented = Presented::of(parts, now.unix_s)?;
        let Some((instance, session)) = presented.key_id.split_once('.') else {
            // A long-term key signs requests for sessions and nothing else.
            return Err(Refusal::SessionUnknown);
        };
        if instance != self.0.instance {
            return Err(Refusal::InstanceOther);
        }
        let session = session.to_owned();
        let (key, caller) = {
            let mut state = self.state();
            let found = state.sessions.get_mut(&session).ok_or(Refusal::SessionUnknown)?;
            if now.instant.saturating_duration_since(found.opened) >= self.0.lifetime {
                return Err(Refusal::SessionExpired);
            }
            found.used = now.instant;
            let (center, version) = (found.from.clone(), found.version);
            (found.key.clone(), Caller { center, epoch: presented.epoch, version })
        };
        presented.signed_with(&key)?;
        Ok(Genuine { sessions: self.clone(), presented, session, caller })
    }
}

impl Genuine {
    /// Compares the body with its digest and takes note of the request's number. What this returns may be executed,
    /// once.
    pub fn with_body(self, body: &[u8]) -> Result<Caller, Refusal> {
        // First the digest: a request with another body must not use up the number of the genuine one.
        self.presented.covers_body(body)?;
        let mut state = self.sessions.state();
        let session = state.sessions.get_mut(&self.session).ok_or(Refusal::SessionUnknown)?;
        if session.window.admit(self.presented.seq) { Ok(self.caller) } else { Err(Refusal::Replayed) }
    }
}

impl State {
    /// Takes note of a nonce. False if it was seen before.
    fn remember(&mut self, nonce: [u8; NONCE_BYTES], now: Instant) -> bool {
        while let Some((seen, oldest)) = self.nonces_by_age.front().copied() {
            let old = now.saturating_duration_since(seen) > NONCE_MEMORY;
            if !old && self.nonces_by_age.len() < MAX_NONCES {
                break;
            }
            self.nonces.remove(&oldest);
            self.nonces_by_age.pop_front();
        }
        let new = self.nonces.insert(nonce);
        if new {
            self.nonces_by_age.push_back((now, nonce));
        }
        new
    }

    /// Drops what has ended, and what was idle for longest if the peer has too many.
    fn make_room(&mut self, peer: &CenterId, now: Instant) {
        // An ended session is known for as long again, so that its owner hears what happened to it.
        self.sessions.retain(|_, session| now.saturating_duration_since(session.opened) < 2 * LIFETIME);
        while self.sessions.values().filter(|session| session.from == *peer).count() >= MAX_PER_PEER {
            let idle = self.sessions.iter().filter(|(_, session)| session.from == *peer);
            let Some(name) = idle.min_by_key(|(_, session)| session.used).map(|(name, _)| name.clone())
            else {
                return;
            };
            self.sessions.remove(&name);
        }
    }
}

/// The caller's half of a handshake that is under way.
#[derive(Debug)]
pub struct Opening {
    hello: Hello,
    key: CrossKey,
    nonce: [u8; NONCE_BYTES],
}

/// Why an answer to a request for a session is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Not in its form.
    #[error("the answer to the request for a session cannot be understood")]
    Malformed,
    /// A version that was not offered.
    #[error("the other side chose protocol version {0}")]
    Version(u16),
    /// The receiver does not have the key, or somebody changed the answer.
    #[error("the other side does not have the key")]
    Proof,
}

impl Opening {
    /// Begins a session with a process of another center.
    pub fn new(key: &CrossKey, to: &CenterId, instance: Option<&str>) -> Opening {
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let hello = Hello {
            from: key.center.clone(),
            to: to.clone(),
            instance: instance.map(str::to_owned),
            nonce: STANDARD.encode(nonce),
            lowest: LOWEST_VERSION,
            highest: HIGHEST_VERSION,
        };
        Opening { hello, key: key.clone(), nonce }
    }

    /// What is sent, signed with the long-term key under number 0.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// The session, if the answer is genuine. `asked` is when the request was sent.
    pub fn finish(self, welcome: &Welcome, asked: Instant) -> Result<ClientSession, HandshakeError> {
        let Opening { hello, key, nonce } = self;
        if !(hello.lowest..=hello.highest).contains(&welcome.version) {
            return Err(HandshakeError::Version(welcome.version));
        }
        let text = |text: &str| {
            (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        };
        if !text(&welcome.instance) || !text(&welcome.session) {
            return Err(HandshakeError::Malformed);
        }
        let binding = Binding {
            from: &hello.from,
            to: &hello.to,
            key_id: &key.id,
            instance: &welcome.instance,
            session: &welcome.session,
            version: welcome.version,
            caller_nonce: nonce,
            receiver_nonce: nonce_of(&welcome.nonce).ok_or(HandshakeError::Malformed)?,
        };
        let session_key = binding.key(&key.secret);
        let proof = STANDARD.decode(&welcome.proof).map_err(|_| HandshakeError::Malformed)?;
        let message = [b"seckill session".as_slice(), &binding.nonces()].concat();
        if !session_key.verifies(&message, &proof) {
            return Err(HandshakeError::Proof);
        }
        let lifetime = Duration::from_secs(welcome.expires_in_s).min(LIFETIME);
        Ok(ClientSession {
            key_id: format!("{}.{}", welcome.instance, welcome.session),
            key: session_key,
            last_seq: AtomicU64::new(0),
            renew_at: asked + lifetime.saturating_sub(RENEW_BEFORE),
        })
    }
}

/// A session with a process of another center, as the caller has it.
#[derive(Debug)]
pub struct ClientSession {
    key_id: String,
    key: MacKey,
    last_seq: AtomicU64,
    renew_at: Instant,
}

impl ClientSession {
    /// The key's name in signatures.
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// The session's key.
    pub fn key(&self) -> &MacKey {
        &self.key
    }

    /// The number of the next request.
    pub fn next_seq(&self) -> u64 {
        self.last_seq.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether it is time for the next session.
    pub fn wants_renewal(&self, now: Instant) -> bool {
        now >= self.renew_at
    }
}

fn nonce_of(text: &str) -> Option<[u8; NONCE_BYTES]> {
    STANDARD.decode(text).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests;
