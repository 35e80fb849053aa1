//! A TCP link in user space that can be cut, healed and delayed while it carries traffic.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use crate::timeline::LinkSpec;

/// Pieces on their way through one direction of one connection; more wait in the sender's socket.
const PIECES_MAX: usize = 256;
const PIECE_BYTES: usize = 16 * 1024;

#[derive(Debug, Clone, Copy)]
struct Weather {
    cut: bool,
    delay: Duration,
}

/// An open link. Dropping it ends its connections.
pub struct Link {
    name: String,
    addr: SocketAddr,
    weather: Arc<watch::Sender<Weather>>,
    accepting: AbortHandle,
}

impl Link {
    /// Listens, and forwards what comes.
    pub async fn open(spec: &LinkSpec) -> io::Result<Link> {
        let listener = TcpListener::bind(&spec.listen).await?;
        let addr = listener.local_addr()?;
        let weather = Arc::new(watch::Sender::new(Weather { cut: false, delay: spec.delay }));
        let (to, seen) = (spec.to.clone(), Arc::clone(&weather));
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                connections.spawn(carry(near, to.clone(), seen.subscribe()));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Link { name: spec.name.clone(), addr, weather, accepting: accepting.abort_handle() })
    }

    /// What the timeline calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Nothing gets through any more: what is under way is held, new connections get no answer.
    pub fn cut(&self) {
        self.weather.send_modify(|weather| weather.cut = true);
    }

    /// Everything gets through again, what was held included.
    pub fn heal(&self) {
        self.weather.send_modify(|weather| weather.cut = false);
    }

    /// Each direction takes this long from now on.
    pub fn delay(&self, time: Duration) {
        self.weather.send_modify(|weather| weather.delay = time);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn carry(near: TcpStream, to: String, mut weather: watch::Receiver<Weather>) {
    if fair(&mut weather).await.is_err() {
        return;
    }
    let Ok(far) = TcpStream::connect(to).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let mut directions = JoinSet::new();
    directions.spawn(direction(near_read, far_write, weather.clone()));
    directions.spawn(direction(far_read, near_write, weather));
    // Each direction shuts its own end down; both together end the connection.
    while directions.join_next().await.is_some() {}
}

/// Waits until the link is not cut.
async fn fair(weather: &mut watch::Receiver<Weather>) -> Result<Weather, watch::error::RecvError> {
    weather.wait_for(|weather| !weather.cut).await.map(|weather| *weather)
}

async fn direction(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
) {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES_MAX);
    let reading = async move {
        loop {
            let mut piece = vec![0; PIECE_BYTES];
            match from.read(&mut piece).await {
                Ok(0) | Err(_) => return,
                Ok(read) => piece.truncate(read),
            }
            if sender.send((Instant::now(), piece)).await.is_err() {
                return;
            }
        }
    };
    let writing = async move {
        while let Some((came, piece)) = pieces.recv().await {
            let Ok(now) = fair(&mut weather).await else { return };
            tokio::time::sleep_until(came + now.delay).await;
            if fair(&mut weather).await.is_err() || to.write_all(&piece).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_link_delays_holds_and_lets_through() {
        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = echo.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            let (mut stream, _) = echo.accept().await.unwrap();
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        });
        let spec =
            LinkSpec { name: "wan".to_owned(), listen: "127.0.0.1:0".to_owned(), to, delay: Duration::ZERO };
        let link = Link::open(&spec).await.unwrap();
        let mut stream = TcpStream::connect(link.addr()).await.unwrap();
        let mut buf = [0; 4];
        let mut round_trip = async |link: &Link, cut_for: Option<Duration>| {
            let began = Instant::now();
            if let Some(time) = cut_for {
                link.cut();
                stream.write_all(b"ping").await.unwrap();
                let silent = tokio::time::timeout(time, stream.read_exact(&mut buf)).await;
                assert!(silent.is_err(), "nothing gets through a cut link");
                link.heal();
            } else {
                stream.write_all(b"ping").await.unwrap();
            }
            stream.read_exact(&mut buf).await.unwrap();
            began.elapsed()
        };
        round_trip(&link, None).await;
        link.delay(Duration::from_millis(40));
        assert!(round_trip(&link, None).await >= Duration::from_millis(80));
        link.delay(Duration::ZERO);
        assert!(round_trip(&link, Some(Duration::from_millis(100))).await >= Duration::from_millis(100));
    }
}
