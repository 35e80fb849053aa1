//! A small asynchronous HTTP/1.1 client: one connection, one request in flight. The books use it after the
//! run; integration tests and benches of the service can too.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::wire::{self, Malformed};

/// The largest answer that is read.
const ANSWER_MAX_BYTES: usize = 16 * 1024 * 1024;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not `http://host[:port]`.
    #[error("{0:?} is not a URL of the form http://host[:port]")]
    Url(String),
    /// The host's name has no address.
    #[error("cannot resolve {0}: {1}")]
    Resolve(String, io::Error),
    /// No connection: nothing was sent.
    #[error("cannot connect to {0}: {1}")]
    Connect(String, io::Error),
    /// The connection broke: whether the request was carried out is unknown.
    #[error("connection lost: {0}")]
    Lost(#[from] io::Error),
    /// No answer in time: whether the request was carried out is unknown.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The answer is not HTTP.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The answer is larger than this client reads.
    #[error("the answer is larger than {ANSWER_MAX_BYTES} bytes")]
    TooLarge,
}

/// Where a service listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    authority: String,
    addr: SocketAddr,
}

impl Target {
    /// Resolves `http://host[:port]`. TLS is not spoken: the load belongs next to the service, behind its proxy.
    pub async fn resolve(url: &str) -> Result<Target, Error> {
        let invalid = || Error::Url(url.to_owned());
        let authority = url.strip_prefix("http://").ok_or_else(invalid)?.trim_end_matches('/');
        if authority.is_empty() || authority.contains(['/', '?', '#', '@', ' ']) {
            return Err(invalid());
        }
        let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let dialled = if has_port { authority.to_owned() } else { format!("{authority}:80") };
        let addr = tokio::net::lookup_host(&dialled)
            .await
            .and_then(|mut found| found.next().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound)))
            .map_err(|err| Error::Resolve(dialled, err))?;
        Ok(Target { authority: authority.to_owned(), addr })
    }

    /// What goes into the `Host` header.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// The address that is dialled.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The bytes of a request to this target.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        wire::write_request(&mut out, method, &self.authority, path, headers, body);
        out
    }
}

/// An answer that owns its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// `Idempotent-Replayed: true` was there.
    pub replayed: bool,
    /// `Retry-After` in seconds.
    pub retry_after_s: Option<u32>,
    /// The body.
    pub body: Vec<u8>,
}

/// One keep-alive connection.
pub struct Connection {
    stream: TcpStream,
    buf: Vec<u8>,
    usable: bool,
}

impl Connection {
    /// Connects.
    pub async fn connect(target: &Target) -> Result<Connection, Error> {
        let failed = |err| Error::Connect(target.authority.clone(), err);
        let stream = TcpStream::connect(target.addr).await.map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        Ok(Connection { stream, buf: Vec::with_capacity(4096), usable: true })
    }

    /// Sends the bytes of one request and reads its answer. Not cancel safe: a connection whose call was
    /// dropped half-way is no longer [usable](Connection::is_usable).
    pub async fn call(&mut self, request: &[u8]) -> Result<Answer, Error> {
        self.usable = false;
        self.buf.clear();
        self.stream.write_all(request).await?;
        let mut eof = false;
        loop {
            if let Some(answer) = wire::parse_answer(&self.buf, eof)? {
                self.usable = !answer.close && !eof && answer.consumed == self.buf.len();
                return Ok(Answer {
                    status: answer.status,
                    replayed: answer.replayed,
                    retry_after_s: answer.retry_after_s,
                    body: answer.body.into_owned(),
                });
            }
            if eof {
                return Err(Error::Lost(io::ErrorKind::UnexpectedEof.into()));
            }
            if self.buf.len() > ANSWER_MAX_BYTES {
                return Err(Error::TooLarge);
            }
            eof = self.stream.read_buf(&mut self.buf).await? == 0;
        }
    }

    /// Another call can go over this connection.
    pub fn is_usable(&self) -> bool {
        self.usable
    }
}

/// A target with a connection that is made again when it is gone, and a timeout for each call.
pub struct Client {
    target: Target,
    timeout: Duration,
    connection: Option<Connection>,
}

impl Client {
    /// A client without a connection yet.
    pub fn new(target: Target, timeout: Duration) -> Client {
        Client { target, timeout, connection: None }
    }

    /// The target.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// One call; connects first where needed. An idle connection that the server closed meanwhile shows as
    /// [`Error::Lost`]: only the caller knows whether the request may be sent twice.
    pub async fn call(&mut self, request: &[u8]) -> Result<Answer, Error> {
        let Client { target, timeout, connection } = self;
        let exchange = async {
            let mut open = match connection.take() {
                Some(open) => open,
                None => Connection::connect(target).await?,
            };
            let answer = open.call(request).await?;
            if open.is_usable() {
                *connection = Some(open);
            }
            Ok(answer)
        };
        tokio::time::timeout(*timeout, exchange).await.unwrap_or(Err(Error::Timeout(*timeout)))
    }

    /// A GET that is sent once more over a new connection if the old one turned out to be closed.
    pub async fn get(&mut self, path: &str, bearer: Option<&str>) -> Result<Answer, Error> {
        let authorization = bearer.map(|token| format!("Bearer {token}"));
        let headers: Vec<_> = authorization.iter().map(|value| ("authorization", value.as_str())).collect();
        let request = self.target.request("GET", path, &headers, None);
        let reused = self.connection.is_some();
        match self.call(&request).await {
            Err(Error::Lost(_)) if reused => self.call(&request).await,
            result => result,
        }
    }
}
