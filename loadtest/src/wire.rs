//! HTTP/1.1 as bytes: building requests and recognising answers, with no I/O. The workers and
//! [`crate::client`] share it.

use std::borrow::Cow;

/// Headers an answer may have; more is not an answer of the service.
const HEADERS_MAX: usize = 64;

/// What is wrong with the bytes of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Not the head of an HTTP/1.1 answer.
    #[error("the answer's head is not HTTP/1.1")]
    Head,
    /// A length or a chunk that cannot be read.
    #[error("the answer's body has no readable length")]
    Body,
}

/// One complete answer inside a buffer.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    /// The status code.
    pub status: u16,
    /// The peer closes the connection after this answer.
    pub close: bool,
    /// `Idempotent-Replayed: true` was there.
    pub replayed: bool,
    /// `Retry-After` in seconds, where it was a number.
    pub retry_after_s: Option<u32>,
    /// The body, with any chunking removed.
    pub body: Cow<'a, [u8]>,
    /// How many bytes of the buffer the answer took.
    pub consumed: usize,
}

/// Reads one answer from the start of `buf`; `None` while it is incomplete. `eof`: the peer has closed, which
/// ends a body without a length.
pub fn parse_answer(buf: &[u8], eof: bool) -> Result<Option<Answer<'_>>, Malformed> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let head_len = match head.parse(buf) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(Malformed::Head),
    };
    let status = head.code.ok_or(Malformed::Head)?;
    let mut close = head.version != Some(1);
    let (mut replayed, mut chunked) = (false, false);
    let (mut retry_after_s, mut length) = (None, None);
    for header in head.headers.iter() {
        let value = header.value.trim_ascii();
        // The length of the name tells the few interesting ones apart before anything is compared.
        match header.name.len() {
            10 if header.name.eq_ignore_ascii_case("connection") => {
                close |= value.eq_ignore_ascii_case(b"close");
            }
            11 if header.name.eq_ignore_ascii_case("retry-after") => {
                retry_after_s = number(value).and_then(|seconds| u32::try_from(seconds).ok());
            }
            14 if header.name.eq_ignore_ascii_case("content-length") => {
                length = Some(number(value).ok_or(Malformed::Body)?);
            }
            17 if header.name.eq_ignore_ascii_case("transfer-encoding") => {
                chunked = value.eq_ignore_ascii_case(b"chunked");
            }
            19 if header.name.eq_ignore_ascii_case("idempotent-replayed") => {
                replayed = value.eq_ignore_ascii_case(b"true");
            }
            _ => {}
        }
    }
    let rest = &buf[head_len..];
    let (body, taken) = if status == 204 || status == 304 {
        (Cow::Borrowed(&rest[..0]), 0)
    } else if chunked {
        match dechunk(rest)? {
            Some((body, taken)) => (Cow::Owned(body), taken),
            None => return Ok(None),
        }
    } else if let Some(length) = length {
        let length = usize::try_from(length).map_err(|_| Malformed::Body)?;
        match rest.get(..length) {
            Some(body) => (Cow::Borrowed(body), length),
            None => return Ok(None),
        }
    } else if eof {
        (Cow::Borrowed(rest), rest.len())
    } else {
        return Ok(None);
    };
    Ok(Some(Answer { status, close, replayed, retry_after_s, body, consumed: head_len + taken }))
}

fn number(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The body and the bytes it took, `None` while the last chunk is missing.
fn dechunk(buf: &[u8]) -> Result<Option<(Vec<u8>, usize)>, Malformed> {
    let mut body = Vec::new();
    let mut at = 0;
    loop {
        let (line, size) = match httparse::parse_chunk_size(&buf[at..]) {
            Ok(httparse::Status::Complete(found)) => found,
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(Malformed::Body),
        };
        let start = at + line;
        let size = usize::try_from(size).map_err(|_| Malformed::Body)?;
        let end = start.checked_add(size).and_then(|end| end.checked_add(2)).ok_or(Malformed::Body)?;
        if buf.len() < end {
            return Ok(None);
        }
        if &buf[end - 2..end] != b"\r\n" {
            return Err(Malformed::Body); // trailers, which the service does not send, end up here too
        }
        if size == 0 {
            return Ok(Some((body, end)));
        }
        body.extend_from_slice(&buf[start..start + size]);
        at = end;
    }
}

/// Appends one request to `out`. `headers` are lines without their line ends; the length is added for a body.
pub fn write_request(
    out: &mut Vec<u8>,
    method: &str,
    host: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Option<&[u8]>,
) {
    for part in [method, " ", path, " HTTP/1.1\r\nhost: ", host, "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    for (name, value) in headers {
        for part in [name, ": ", value, "\r\n"] {
            out.extend_from_slice(part.as_bytes());
        }
    }
    if let Some(body) = body {
        out.extend_from_slice(format!("content-length: {}\r\n", body.len()).as_bytes());
    }
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(body.unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCEPTED: &[u8] =
        b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\nIdempotent-Replayed: true\r\nRetry-After: 7\r\n\r\n{}HTTP";

    #[test]
    fn an_answer_is_complete_only_with_its_last_byte() {
        let whole = ACCEPTED.len() - 4;
        for cut in 0..whole {
            assert_eq!(parse_answer(&ACCEPTED[..cut], false), Ok(None), "{cut}");
        }
        let answer = parse_answer(ACCEPTED, false).unwrap().unwrap();
        assert_eq!((answer.status, answer.consumed, &*answer.body), (202, whole, &b"{}"[..]));
        assert_eq!((answer.replayed, answer.retry_after_s, answer.close), (true, Some(7), false));
    }

    #[test]
    fn chunks_are_put_together() {
        let bytes = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n";
        for cut in 0..bytes.len() {
            assert_eq!(parse_answer(&bytes[..cut], false), Ok(None), "{cut}");
        }
        let answer = parse_answer(bytes, false).unwrap().unwrap();
        assert_eq!((&*answer.body, answer.consumed), (&b"abc0123456789"[..], bytes.len()));
    }

    #[test]
    fn a_body_without_a_length_ends_with_the_connection() {
        let bytes = b"HTTP/1.0 500 Oops\r\n\r\nwhat";
        assert_eq!(parse_answer(bytes, false), Ok(None));
        let answer = parse_answer(bytes, true).unwrap().unwrap();
        assert_eq!((answer.status, answer.close, &*answer.body), (500, true, &b"what"[..]));
    }

    #[test]
    fn what_is_not_http_is_refused() {
        assert_eq!(parse_answer(b"SSH-2.0-OpenSSH\r\n\r\n", false), Err(Malformed::Head));
        assert_eq!(
            parse_answer(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", false),
            Err(Malformed::Body)
        );
        assert_eq!(
            parse_answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", false),
            Err(Malformed::Body)
        );
    }
}
