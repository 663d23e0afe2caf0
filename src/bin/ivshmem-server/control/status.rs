// SPDX-License-Identifier: GPL-2.0-or-later
//! The values of the interface's types, from the server's state.
//!
//! The peers of a reply are made some at a time, because there may be 65,536 of them: the text of
//! the reply is never complete in memory, and no call keeps the server long.

#![forbid(unsafe_code)]

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use ivshmem::{Chain, Credentials, Event, Server};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::geteuid;
use serde_json::{Map, Value, json};

use super::memory;
use super::programs::{Program, program_of};

/// What does not change while the server runs.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    /// The path of the server's socket.
    pub(super) socket: String,
    pub(super) started: SystemTime,
}

/// Seconds since 1970.
pub(super) fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// The number of open descriptors of this process.
pub(super) fn open_descriptors() -> u64 {
    // Since Linux 6.2 the size of the directory is that number.
    match fs::metadata("/proc/self/fd").map(|meta| meta.len()) {
        Ok(count @ 1..) => count,
        // One is the directory itself.
        _ => fs::read_dir("/proc/self/fd").map_or(0, |fds| fds.count().saturating_sub(1) as u64),
    }
}

pub(super) fn descriptor_limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft)
}

/// The reply of `Status` without the peers.
pub(super) fn head(server: &Server, facts: &Facts) -> Value {
    let stats = server.stats();
    let (kind, name) = memory::describe(server.memory());
    let refused: Map<String, Value> =
        stats.refusals().map(|(reason, count)| (reason.to_owned(), count.into())).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "uid": geteuid().as_raw(),
        "socket": facts.socket,
        "started": unix(facts.started),
        "restarts": stats.restarts,
        "vectors": server.vectors(),
        "memory": {"kind": kind, "name": name, "size": server.memory_size()},
        "ids": {
            "free": stats.ids_free, "used": stats.ids_used, "remembered": stats.ids_remembered,
        },
        "descriptors": {"open": open_descriptors(), "limit": descriptor_limit()},
        "joined": stats.joined,
        "left": stats.left,
        "lingering": stats.lingering,
        "messages": stats.messages,
        "refused": refused,
    })
}

/// The text before the peers, between two of them, and after the last.
pub(super) fn begin(head: &Value) -> Vec<u8> {
    let head = head.to_string();
    let fields = head.strip_suffix('}').unwrap_or(&head);
    format!("{{\"parameters\":{fields},\"peers\":[").into_bytes()
}

pub(super) const SEPARATOR: &[u8] = b",";
pub(super) const END: &[u8] = b"]}}\0";

/// One peer. None if it has left.
pub(super) fn peer(server: &Server, id: u16, program: &Program) -> Option<Value> {
    let peer = server.peer(id)?;
    let mut value = json!({
        "id": id,
        "since": unix(peer.since()),
        "resumed": peer.is_resumed(),
        "pending": peer.behind(),
        "unread": peer.unread().unwrap_or(0),
        "unread_bytes": peer.unread_bytes().unwrap_or(0),
    });
    add_credentials(&mut value, peer.credentials().ok());
    add(&mut value, "program", program.program.as_deref());
    add(&mut value, "name", program.name.as_deref());
    Some(value)
}

/// The process that a peer connected from; 0 if it is not known.
pub(super) fn pid_of(server: &Server, id: u16) -> i32 {
    let credentials = server.peer(id).and_then(|peer| peer.credentials().ok());
    credentials.map_or(0, |credentials| credentials.pid)
}

/// The first event of a stream.
pub(super) fn ready(server: &Server) -> Value {
    event("ready", server)
}

fn event(kind: &str, server: &Server) -> Value {
    json!({"kind": kind, "time": unix(SystemTime::now()), "peers": server.peers().len()})
}

/// An event of the server as one of the interface. None if the interface does not have it.
pub(super) fn event_of(happened: &Event, server: &Server) -> Option<Value> {
    let value = match happened {
        Event::Joined { id, .. } => {
            let mut value = event("joined", server);
            add(&mut value, "id", Some(*id));
            // It may have left since then.
            let credentials = server.peer(*id).and_then(|peer| peer.credentials().ok());
            add_process(&mut value, credentials);
            value
        }
        Event::Left { id, reason, .. } => {
            let mut value = event("left", server);
            add(&mut value, "id", Some(*id));
            add(&mut value, "reason", Some(reason.name()));
            add(&mut value, "text", Some(Chain(reason).to_string()));
            value
        }
        Event::Refused { reason, credentials, .. } => {
            let mut value = event("refused", server);
            add(&mut value, "reason", Some(reason.name()));
            add(&mut value, "text", Some(Chain(reason).to_string()));
            add_process(&mut value, *credentials);
            value
        }
        _ => return None,
    };
    Some(value)
}

fn add_process(value: &mut Value, credentials: Option<Credentials>) {
    add_credentials(value, credentials);
    let program = credentials.and_then(|credentials| program_of(credentials.pid));
    add(value, "program", program);
}

fn add_credentials(value: &mut Value, credentials: Option<Credentials>) {
    let Some(Credentials { pid, uid, gid, .. }) = credentials else { return };
    add(value, "pid", (pid > 0).then_some(pid));
    add(value, "uid", Some(uid));
    add(value, "gid", Some(gid));
}

/// Adds a field whose value is known.
fn add(object: &mut Value, name: &str, value: Option<impl Into<Value>>) {
    if let (Value::Object(object), Some(value)) = (object, value) {
        object.insert(name.to_owned(), value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_reply_are_one_message() {
        for count in 0..3 {
            let mut text = begin(&json!({"a": 1, "b": {}}));
            for number in 0..count {
                if number > 0 {
                    text.extend(SEPARATOR);
                }
                text.extend(number.to_string().bytes());
            }
            text.extend(END);
            assert_eq!(text.pop(), Some(0));
            let value: Value = serde_json::from_slice(&text).expect("it is JSON");
            let peers: Vec<i32> = (0..count).collect();
            assert_eq!(value, json!({"parameters": {"a": 1, "b": {}, "peers": peers}}));
        }
    }

    #[test]
    fn open_descriptors_are_counted() {
        let before = open_descriptors();
        let file = tempfile::tempfile().expect("a file");
        let with_file = open_descriptors();
        // Other tests of this process open and close files.
        assert!(before > 2 && with_file > 2 && with_file <= descriptor_limit());
        drop(file);
    }
}
