// SPDX-License-Identifier: GPL-2.0-or-later
//! A client while it is connected: what happens to it, in the program's words, and commands
//! carried out.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};

use ivshmem::Chain;
use ivshmem::client::{Client, Error, Event, Peer};
use serde_json::{Value, json};

use crate::command::{Command, Form, HELP, Target};
use crate::output::{self, Output};

/// The most that one `read` shows.
const MOST: usize = 1 << 20;

/// How a command that needs no time went.
pub(crate) enum Done {
    Well,
    /// It can be carried out, which takes time or is not a session's business.
    Later,
    /// It failed, and that has been said. The flag: the program's exit status is to tell.
    Failed(bool),
}

pub(crate) struct Session {
    pub(crate) client: Client,
    /// Rings of each vector that no `wait` has taken.
    pub(crate) rung: BTreeMap<u32, u64>,
}

impl Session {
    /// Says who we are and who is here.
    pub(crate) fn begin(client: Client, out: &mut Output) -> Self {
        let id = client.id();
        out.detail(|| format!("our_id={id}"));
        out.detail(|| format!("shm_fd={}", client.memory().as_fd().as_raw_fd()));
        if let Some(socket) = client.socket() {
            out.say(format!("listen on server socket {}", socket.as_raw_fd()));
        }
        for peer in client.peers() {
            tell_peer(&client, peer, out, false);
        }
        tell_vectors(&client, id, out, false);
        out.object(|| {
            json!({"event": "connected", "id": id, "vectors": client.vectors(),
                "memory": client.memory().len(), "peers": peers(&client)})
        });
        Self { client, rung: BTreeMap::new() }
    }

    /// Says what happened since the last time; false when the server has gone.
    pub(crate) fn news(&mut self, watching: bool, out: &mut Output) -> Result<bool, Error> {
        let mut connected = true;
        for event in self.client.dispatch()? {
            let client = &self.client;
            match event {
                Event::Joined { peer, vectors } => {
                    if let Some(peer) = client.peer(peer) {
                        tell_peer(client, peer, out, watching);
                    }
                    out.object(|| json!({"event": "joined", "peer": peer, "vectors": vectors}));
                }
                Event::Left { peer } => {
                    if watching || out.verbose {
                        out.say(format!("delete peer id = {peer}"));
                    }
                    out.object(|| json!({"event": "left", "peer": peer}));
                }
                Event::Rung { vector, count } => {
                    let id = client.id();
                    *self.rung.entry(vector).or_default() += count;
                    out.detail(|| {
                        let doorbell = client.doorbell(id, vector);
                        let fd = doorbell.map_or(-1, |doorbell| doorbell.as_fd().as_raw_fd());
                        format!("received event on fd {fd} vector {vector}: {count}")
                    });
                    out.say(format!("receive notification from peer_id={id} vector={vector}"));
                    out.object(|| json!({"event": "rung", "vector": vector, "count": count}));
                }
                Event::Disconnected { reason } => {
                    if !reason.is_closed() {
                        out.warn(&format!("ivshmem-client: {}", Chain(&reason)));
                    }
                    out.say("disconnected from server");
                    let reason = Chain(&reason).to_string();
                    out.object(|| json!({"event": "disconnected", "reason": reason}));
                    connected = false;
                }
                _ => {}
            }
        }
        Ok(connected)
    }

    /// Carries out a command that is done at once; waiting is the caller's.
    pub(crate) fn carry_out(&self, line: &str, command: &Command, out: &mut Output) -> Done {
        let outcome = match command {
            Command::Help => {
                out.say(HELP);
                Ok(json!({"help": HELP.lines().collect::<Vec<_>>()}))
            }
            Command::Dump => Ok(self.dump(out)),
            Command::Int(target) => self.int(*target, out).map(|()| json!({})),
            Command::Read { offset, len, form } => self.read(*offset, *len, *form, out),
            Command::Write { offset, bytes } => self
                .client
                .memory()
                .write(*offset, bytes)
                .map(|()| json!({"length": bytes.len()}))
                .map_err(|error| Chain(&error).to_string()),
            Command::Wait { vector, .. } if *vector >= self.client.vectors() => {
                let id = self.client.id();
                Err(format!("invalid vector {vector} on peer {id}"))
            }
            Command::Wait { .. } | Command::Watch { .. } | Command::Quit => return Done::Later,
        };
        match outcome {
            Ok(result) => {
                out.object(|| done(line, Ok(result)));
                Done::Well
            }
            Err(error) => {
                fail(line, &error, out);
                // With the reference's own commands a script goes on as it did with the reference.
                Done::Failed(!matches!(command, Command::Int(_)))
            }
        }
    }

    fn dump(&self, out: &mut Output) -> Value {
        let client = &self.client;
        out.say(format!("our_id = {}", client.id()));
        say_vectors(client, client.id(), out);
        for peer in client.peers() {
            out.say(format!("peer_id = {}", peer.id()));
            say_vectors(client, peer.id(), out);
        }
        json!({"id": client.id(), "vectors": client.vectors(), "memory": client.memory().len(),
            "peers": peers(client)})
    }

    fn int(&self, target: Target, out: &mut Output) -> Result<(), String> {
        let client = &self.client;
        let known = |peer: i64| {
            let id = u16::try_from(peer).ok();
            id.filter(|&id| id == client.id() || client.peer(id).is_some())
                .ok_or_else(|| format!("cannot find peer_id = {peer}"))
        };
        match target {
            Target::One(peer, vector) => {
                let peer = known(peer)?;
                let doorbell = client
                    .doorbell(peer, vector)
                    .map_err(|_| format!("invalid vector {vector} on peer {peer}"))?;
                out.detail(|| {
                    let fd = doorbell.as_fd().as_raw_fd();
                    format!("notify peer {peer} on vector {vector}, fd {fd}")
                });
                doorbell.ring()
            }
            Target::Peer(peer) => client.ring_peer(known(peer)?),
            Target::All => client.ring_all(),
        }
        .map_err(|error| Chain(&error).to_string())
    }

    fn read(
        &self,
        offset: usize,
        len: usize,
        form: Form,
        out: &mut Output,
    ) -> Result<Value, String> {
        if len > MOST {
            return Err(format!("{len} bytes are more than one read can show; {MOST} are not"));
        }
        let mut bytes = vec![0; len];
        self.client.memory().read(offset, &mut bytes).map_err(|error| Chain(&error).to_string())?;
        out.say(match form {
            Form::Dump => output::dump(offset, &bytes),
            Form::Hex => output::hex(&bytes),
            Form::Text => output::text(&bytes),
        });
        Ok(match form {
            Form::Text => json!({"offset": offset, "text": String::from_utf8_lossy(&bytes)}),
            Form::Dump | Form::Hex => json!({"offset": offset, "hex": output::hex(&bytes)}),
        })
    }
}

/// Says that a command failed.
pub(crate) fn fail(line: &str, error: &str, out: &mut Output) {
    out.say(error);
    out.object(|| done(line, Err(error)));
}

/// How a command went, for JSON.
pub(crate) fn done(line: &str, outcome: Result<Value, &str>) -> Value {
    let mut object = json!({"command": line, "ok": outcome.is_ok()});
    match outcome {
        Ok(Value::Object(mut result)) => {
            if let Value::Object(object) = &mut object {
                object.append(&mut result);
            }
        }
        Ok(_) => {}
        Err(error) => object["error"] = error.into(),
    }
    object
}

fn peers(client: &Client) -> Vec<Value> {
    client.peers().map(|peer| json!({"id": peer.id(), "vectors": peer.vectors()})).collect()
}

fn say_vectors(client: &Client, peer: u16, out: &mut Output) {
    for (vector, fd) in descriptors(client, peer) {
        out.say(format!("  vector {vector} is enabled (fd={fd})"));
    }
}

/// A newcomer, in the reference's words.
fn tell_peer(client: &Client, peer: Peer, out: &mut Output, watching: bool) {
    if watching || out.verbose {
        out.say(format!("new peer id = {}", peer.id()));
    }
    tell_vectors(client, peer.id(), out, watching);
}

fn tell_vectors(client: &Client, peer: u16, out: &mut Output, watching: bool) {
    if !watching {
        for (vector, fd) in descriptors(client, peer) {
            out.detail(|| format!("  new vector {vector} (fd={fd}) for peer id {peer}"));
        }
    }
}

/// The vectors of a peer, or of ourselves, and their descriptors' numbers.
fn descriptors(client: &Client, peer: u16) -> impl Iterator<Item = (u32, i32)> + '_ {
    (0..).map_while(move |vector| {
        let doorbell = client.doorbell(peer, vector).ok()?;
        Some((vector, doorbell.as_fd().as_raw_fd()))
    })
}
