//! The line between two centers.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use seckill_parts::{Link, LinkState};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const DEADLINE: Duration = Duration::from_secs(20);
/// Long enough to see that nothing comes.
const SILENCE: Duration = Duration::from_millis(150);

/// A server that sends back what it gets.
async fn echo() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            });
        }
    });
    address
}

async fn connect(link: &Link) -> TcpStream {
    let stream = TcpStream::connect(link.address()).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

async fn round_trip(stream: &mut TcpStream) -> Duration {
    let sent = Instant::now();
    stream.write_all(b"ping").await.unwrap();
    let mut answer = [0; 4];
    tokio::time::timeout(DEADLINE, stream.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"ping");
    sent.elapsed()
}

#[tokio::test]
async fn a_delay_counts_both_ways_and_can_be_changed_while_connected() {
    let link = Link::start(echo().await).unwrap();
    let mut stream = connect(&link).await;
    let undelayed = round_trip(&mut stream).await;
    link.set_delay(Duration::from_millis(30), Duration::ZERO);
    let mut fastest = DEADLINE;
    for _ in 0..5 {
        fastest = fastest.min(round_trip(&mut stream).await);
    }
    assert!(fastest >= Duration::from_millis(60), "{fastest:?}");
    assert!(fastest < Duration::from_millis(60) + undelayed + Duration::from_millis(40), "{fastest:?}");
    link.set_delay(Duration::ZERO, Duration::ZERO);
    let mut fastest = DEADLINE;
    for _ in 0..5 {
        fastest = fastest.min(round_trip(&mut stream).await);
    }
    assert!(fastest < Duration::from_millis(60), "{fastest:?}");
}

#[tokio::test]
async fn many_bytes_under_jitter_arrive_whole_and_in_order() {
    const BYTES: usize = 8 << 20;
    let link = Link::start(echo().await).unwrap();
    link.set_delay(Duration::from_millis(5), Duration::from_millis(5));
    let mut stream = connect(&link).await;
    let (mut from, mut to) = stream.split();
    let sent: Vec<u8> = (0..BYTES).map(|n| u8::try_from(n * 31 % 251).unwrap()).collect();
    let send = async {
        for part in sent.chunks(10_007) {
            to.write_all(part).await.unwrap();
        }
        to.shutdown().await.unwrap();
    };
    let mut received = Vec::new();
    let receive = async {
        from.read_to_end(&mut received).await.unwrap();
    };
    tokio::time::timeout(DEADLINE, async { tokio::join!(send, receive) }).await.unwrap();
    assert!(received == sent);
}

#[tokio::test]
async fn a_reader_who_does_not_read_holds_the_writer_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let link = Link::start(listener.local_addr().unwrap()).unwrap();
    let mut stream = connect(&link).await;
    let (_silent, _) = listener.accept().await.unwrap();
    let chunk = vec![0; 1 << 20];
    let mut written = 0;
    // The line holds 16 MiB, the kernel's buffers a few more.
    while tokio::time::timeout(Duration::from_secs(1), stream.write_all(&chunk)).await.is_ok() {
        written += chunk.len();
        assert!(written < 64 << 20, "nothing holds the writer up");
    }
}

#[tokio::test]
async fn a_cut_resets_what_is_open_and_refuses_what_is_new() {
    let link = Link::start(echo().await).unwrap();
    let mut stream = connect(&link).await;
    round_trip(&mut stream).await;
    link.cut();
    let mut byte = [0];
    let read = tokio::time::timeout(DEADLINE, stream.read(&mut byte)).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let deadline = Instant::now() + DEADLINE;
    while TcpStream::connect(link.address()).await.is_ok() {
        assert!(Instant::now() < deadline, "it still accepts");
    }
    link.heal();
    let mut stream = loop {
        match TcpStream::connect(link.address()).await {
            Ok(stream) => break stream,
            Err(_) => assert!(Instant::now() < deadline, "it does not accept again"),
        }
    };
    round_trip(&mut stream).await;
}

#[tokio::test]
async fn a_stalled_line_is_silent_and_loses_nothing() {
    for (state, reaches_server) in
        [(LinkState::Stalled, false), (LinkState::StalledToServer, false), (LinkState::StalledToClient, true)]
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let link = Link::start(listener.local_addr().unwrap()).unwrap();
        let mut client = connect(&link).await;
        client.write_all(b"a").await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let mut byte = [0];
        server.read_exact(&mut byte).await.unwrap();
        link.set(state);
        client.write_all(b"b").await.unwrap();
        let arrived = tokio::time::timeout(SILENCE, server.read_exact(&mut byte)).await.is_ok();
        assert_eq!(arrived, reaches_server, "{state:?}");
        server.write_all(b"c").await.unwrap();
        let mut answer = [0];
        let answered = tokio::time::timeout(SILENCE, client.read_exact(&mut answer)).await.is_ok();
        assert_eq!(answered, state == LinkState::StalledToServer, "{state:?}");
        link.heal();
        if !arrived {
            tokio::time::timeout(DEADLINE, server.read_exact(&mut byte)).await.unwrap().unwrap();
        }
        assert_eq!(&byte, b"b");
        if !answered {
            tokio::time::timeout(DEADLINE, client.read_exact(&mut answer)).await.unwrap().unwrap();
        }
        assert_eq!(&answer, b"c");
    }
}

#[tokio::test]
async fn a_connection_made_over_a_stalled_line_works_once_it_is_healed() {
    let link = Link::start(echo().await).unwrap();
    link.stall();
    let mut stream = connect(&link).await;
    stream.write_all(b"x").await.unwrap();
    let mut byte = [0];
    assert!(tokio::time::timeout(SILENCE, stream.read_exact(&mut byte)).await.is_err());
    link.heal();
    tokio::time::timeout(DEADLINE, stream.read_exact(&mut byte)).await.unwrap().unwrap();
    assert_eq!(&byte, b"x");
}
