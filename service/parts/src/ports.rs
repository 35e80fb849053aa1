//! Ports that stay free: below the range that the kernel takes for outgoing connections.
//!
//! A server that is killed and started again needs its port back. One out of the ephemeral range could meanwhile have
//! become the local end of anybody's connection.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::BuildHasher;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use crate::error::{PartError, file_error};

/// Linux hands out 32768 and up; below 20000 people put servers of their own.
const FIRST: u16 = 20_000;
const LAST: u16 = 32_000;
/// A machine with fewer free ports than one in so many has other troubles.
const ATTEMPTS: u64 = 200;

/// Free ports on 127.0.0.1, all different. Others may be faster: a start that fails is tried again with others.
pub(crate) fn free<const N: usize>() -> Result<[u16; N], PartError> {
    let mut held = Vec::with_capacity(N);
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = listener().ok_or(PartError::NoPort(FIRST, LAST))?;
        *port = listener.local_addr().map_err(|_| PartError::NoPort(FIRST, LAST))?.port();
        held.push(listener);
    }
    Ok(ports)
}

/// Whether nobody listens there.
pub(crate) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// The ports that a folder's data was made for, if it has any yet.
pub(crate) fn remembered<const N: usize>(dir: &Path) -> Option<[u16; N]> {
    let text = fs::read_to_string(dir.join("ports")).ok()?;
    let ports: Vec<u16> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    ports.try_into().ok()
}

/// Writes down which ports a folder's data belongs to.
pub(crate) fn remember<const N: usize>(dir: &Path, ports: [u16; N]) -> Result<(), PartError> {
    let path = dir.join("ports");
    let text: Vec<String> = ports.iter().map(u16::to_string).collect();
    fs::write(&path, format!("{}\n", text.join(" "))).map_err(file_error("write", &path))
}

/// Listens on a port of its own on 127.0.0.1; none if a great many were tried in vain.
pub(crate) fn listener() -> Option<TcpListener> {
    (0..ATTEMPTS).find_map(listen)
}

fn listen(attempt: u64) -> Option<TcpListener> {
    // A hash with random keys: as good as dice, and without a crate for them.
    let range = u64::from(LAST - FIRST);
    let offset = RandomState::new().hash_one(attempt) % range;
    let port = FIRST + u16::try_from(offset).ok()?;
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()
}
