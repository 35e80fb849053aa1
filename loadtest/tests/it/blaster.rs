//! A target that does nothing but answer, so that the generator is what gives way first.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

const ANSWER: &[u8] =
    b"HTTP/1.1 409 Conflict\r\ncontent-length: 37\r\n\r\n{\"code\":\"sold_out\",\"retryable\":false}";

/// Starts it and returns its URL; its threads end with their connections.
pub(crate) fn start() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            std::thread::spawn(move || serve(stream));
        }
    });
    url
}

/// One request in flight per connection, and none is larger than the buffer: a read is a request.
fn serve(mut stream: TcpStream) {
    let mut buf = [0; 4096];
    let _ = stream.set_nodelay(true);
    while stream.read(&mut buf).is_ok_and(|read| read > 0) && stream.write_all(ANSWER).is_ok() {}
}
