//! A target that does nothing but answer: what a generator costs shows against it. Prints its URL. One thread,
//! one read and one write for each request; none may be larger than the buffer.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;

use rustix::event::epoll;

const ANSWER: &[u8] = b"HTTP/1.1 409 Conflict\r\ncontent-type: application/problem+json\r\ncontent-length: 37\r\n\r\n{\"code\":\"sold_out\",\"retryable\":false}";
const LISTENER: u64 = u64::MAX;

fn main() -> std::io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    println!("http://{}", listener.local_addr()?);
    let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&set, listener.as_fd(), epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
    let mut streams: Vec<Option<TcpStream>> = Vec::new();
    let mut events = Vec::with_capacity(256);
    let mut buf = [0; 4096];
    loop {
        events.clear();
        epoll::wait(&set, rustix::buffer::spare_capacity(&mut events), None)?;
        for event in &events {
            let at = event.data.u64();
            if at == LISTENER {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nodelay(true)?;
                    stream.set_nonblocking(true)?;
                    let data = epoll::EventData::new_u64(streams.len() as u64);
                    epoll::add(&set, &stream, data, epoll::EventFlags::IN)?;
                    streams.push(Some(stream));
                }
                continue;
            }
            let Some(stream) = streams[at as usize].as_mut() else { continue };
            if !stream.read(&mut buf).is_ok_and(|read| read > 0) || stream.write_all(ANSWER).is_err() {
                streams[at as usize] = None;
            }
        }
    }
}
