// SPDX-License-Identifier: GPL-2.0-or-later
//! `watch`: prints the events of one or several servers until they end.

#![forbid(unsafe_code)]

use std::fmt::Write;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use crate::client::{Client, Failure};
use crate::output::Output;
use crate::servers::Server;
use crate::table::word;
use crate::warn;

/// Returns whether each server could be watched, and none has ended.
pub(crate) fn run(servers: &[Server], out: &mut Output) -> Result<bool, Failure> {
    let mut is_complete = true;
    let mut clients: Vec<(&Server, Client)> = Vec::new();
    for server in servers {
        let watching = server.connect().and_then(|mut client| {
            client.call_more("Watch")?;
            Ok(client)
        });
        match watching {
            Ok(client) => clients.push((server, client)),
            Err(error) => {
                warn(&error);
                is_complete = false;
            }
        }
    }
    let several = servers.len() > 1;
    while !clients.is_empty() && !out.closed {
        let ready: Vec<bool> = {
            let mut fds: Vec<PollFd<'_>> = clients
                .iter()
                .map(|(_, client)| PollFd::new(client.as_fd(), PollFlags::POLLIN))
                .collect();
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                result => result.map_err(|errno| format!("cannot poll: {}", errno.desc()))?,
            };
            fds.iter().map(|fd| fd.any().unwrap_or(true)).collect()
        };
        let mut ready = ready.into_iter();
        clients.retain_mut(|(server, client)| {
            if !ready.next().unwrap_or(false) {
                return true;
            }
            let result = print_events(server, client, several, out);
            if let Err(error) = &result {
                warn(error);
                is_complete = false;
            }
            result.is_ok()
        });
    }
    Ok(is_complete)
}

fn print_events(
    server: &Server,
    client: &mut Client,
    several: bool,
    out: &mut Output,
) -> Result<(), Failure> {
    let goes_on = client.read()?;
    while let Some(mut reply) = client.next_reply()? {
        let event = &mut reply["event"];
        if out.json {
            event["control"] = server.name().into();
            out.print(&format!("{event}\n"));
        } else {
            let name = if several { server.name() } else { String::new() };
            out.print(&line(event, &name));
        }
    }
    if goes_on {
        Ok(())
    } else {
        Err(format!("the server of {:?} has ended", server.control).into())
    }
}

/// An event as a line.
fn line(event: &Value, name: &str) -> String {
    let time = event["time"].as_u64().unwrap_or(0) % 86_400;
    let mut line = format!("{:02}:{:02}:{:02} UTC", time / 3600, time / 60 % 60, time % 60);
    if !name.is_empty() {
        let _ = write!(line, "  {name}");
    }
    let kind = word(&event["kind"]);
    if kind == "ready" {
        let _ = writeln!(line, "  watching; peers: {}", event["peers"]);
        return line;
    }
    let _ = write!(line, "  {kind}");
    let mut separator = " ";
    for field in ["id", "pid", "uid", "program"] {
        if !event[field].is_null() {
            let _ = write!(line, "{separator}{field} {}", word(&event[field]));
            separator = ", ";
        }
    }
    if !event["text"].is_null() {
        let _ = write!(line, ": {}", word(&event["text"]));
    }
    let _ = writeln!(line, "; peers: {}", event["peers"]);
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_event_is_one_line() {
        let joined = json!({"kind": "joined", "time": 86_400 + 3661, "id": 3, "pid": 7, "uid": 0,
            "program": "q\n", "peers": 1});
        assert_eq!(
            line(&joined, ""),
            "01:01:01 UTC  joined id 3, pid 7, uid 0, program q\\n; peers: 1\n"
        );
        let left = json!({"kind": "left", "time": 0, "id": 3, "reason": "hung_up",
            "text": "it hung up", "peers": 0});
        assert_eq!(line(&left, "/s"), "00:00:00 UTC  /s  left id 3: it hung up; peers: 0\n");
        let ready = json!({"kind": "ready", "time": 0, "peers": 2});
        assert_eq!(line(&ready, ""), "00:00:00 UTC  watching; peers: 2\n");
    }
}
