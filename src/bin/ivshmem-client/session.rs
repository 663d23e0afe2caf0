// SPDX-License-Identifier: GPL-2.0-or-later
//! A connection to a server: prints its events and runs commands on it.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};

use ivshmem::Chain;
use ivshmem::client::{Client, Error, Event, Peer};
use serde_json::{Value, json};

use crate::command::{Command, Form, HELP, Target};
use crate::output::{self, Output};

/// The largest number of bytes that one `read` prints.
const MAX_READ: usize = 1 << 20;

/// The result of [`Session::run`].
pub(crate) enum Done {
    Ok,
    /// The command is valid, and the caller has to run it.
    ByCaller,
    /// The command failed, and the error was printed.
    Failed {
        /// The exit status of the program has to be 1.
        sets_status: bool,
    },
}

pub(crate) struct Session {
    pub(crate) client: Client,
    /// For each vector, the number of interrupts that no `wait` has taken.
    pub(crate) rung: BTreeMap<u32, u64>,
}

impl Session {
    /// Prints our own id and the peers.
    pub(crate) fn begin(client: Client, out: &mut Output) -> Self {
        let id = client.id();
        out.detail(|| format!("our_id={id}"));
        out.detail(|| format!("shm_fd={}", client.memory().as_fd().as_raw_fd()));
        if let Some(socket) = client.socket() {
            out.print(format!("listen on server socket {}", socket.as_raw_fd()));
        }
        for peer in client.peers() {
            print_peer(&client, peer, out, false);
        }
        print_new_vectors(&client, id, out, false);
        out.object(|| {
            json!({"event": "connected", "id": id, "vectors": client.vectors(),
                "memory": client.memory().len(), "peers": peers(&client)})
        });
        Self { client, rung: BTreeMap::new() }
    }

    /// Prints the events since the last call. Returns false if the connection has ended.
    pub(crate) fn print_events(&mut self, watching: bool, out: &mut Output) -> Result<bool, Error> {
        let mut connected = true;
        for event in self.client.dispatch()? {
            let client = &self.client;
            match event {
                Event::Joined { peer, vectors } => {
                    if let Some(peer) = client.peer(peer) {
                        print_peer(client, peer, out, watching);
                    }
                    out.object(|| json!({"event": "joined", "peer": peer, "vectors": vectors}));
                }
                Event::Left { peer } => {
                    if watching || out.verbose {
                        out.print(format!("delete peer id = {peer}"));
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
                    out.print(format!("receive notification from peer_id={id} vector={vector}"));
                    out.object(|| json!({"event": "rung", "vector": vector, "count": count}));
                }
                Event::Disconnected { reason } => {
                    if !reason.is_closed() {
                        out.warn(&format!("ivshmem-client: {}", Chain(&reason)));
                    }
                    out.print("disconnected from server");
                    let reason = Chain(&reason).to_string();
                    out.object(|| json!({"event": "disconnected", "reason": reason}));
                    connected = false;
                }
                _ => {}
            }
        }
        Ok(connected)
    }

    /// Runs a command, except those that take time and `quit`.
    pub(crate) fn run(&self, line: &str, command: &Command, out: &mut Output) -> Done {
        let outcome = match command {
            Command::Help => {
                out.print(HELP);
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
            Command::Wait { .. } | Command::Watch { .. } | Command::Quit => return Done::ByCaller,
        };
        match outcome {
            Ok(result) => {
                out.object(|| done(line, Ok(result)));
                Done::Ok
            }
            Err(error) => {
                fail(line, &error, out);
                // A failed `int` does not change the exit status, as in the reference.
                Done::Failed { sets_status: !matches!(command, Command::Int(_)) }
            }
        }
    }

    fn dump(&self, out: &mut Output) -> Value {
        let client = &self.client;
        out.print(format!("our_id = {}", client.id()));
        print_vectors(client, client.id(), out);
        for peer in client.peers() {
            out.print(format!("peer_id = {}", peer.id()));
            print_vectors(client, peer.id(), out);
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
        if len > MAX_READ {
            return Err(format!(
                "{len} bytes are more than one read can print; the most is {MAX_READ}"
            ));
        }
        let mut bytes = vec![0; len];
        self.client.memory().read(offset, &mut bytes).map_err(|error| Chain(&error).to_string())?;
        out.print(match form {
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

/// Prints the error of a command.
pub(crate) fn fail(line: &str, error: &str, out: &mut Output) {
    out.print(error);
    out.object(|| done(line, Err(error)));
}

/// The JSON object for a command that ended.
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

fn print_vectors(client: &Client, peer: u16, out: &mut Output) {
    for (vector, fd) in descriptors(client, peer) {
        out.print(format!("  vector {vector} is enabled (fd={fd})"));
    }
}

/// Prints a peer that joined, with the text of the reference.
fn print_peer(client: &Client, peer: Peer, out: &mut Output, watching: bool) {
    if watching || out.verbose {
        out.print(format!("new peer id = {}", peer.id()));
    }
    print_new_vectors(client, peer.id(), out, watching);
}

fn print_new_vectors(client: &Client, peer: u16, out: &mut Output, watching: bool) {
    if !watching {
        for (vector, fd) in descriptors(client, peer) {
            out.detail(|| format!("  new vector {vector} (fd={fd}) for peer id {peer}"));
        }
    }
}

/// The vectors of a peer or of our own, with the numbers of their descriptors.
fn descriptors(client: &Client, peer: u16) -> impl Iterator<Item = (u32, i32)> + '_ {
    (0..).map_while(move |vector| {
        let doorbell = client.doorbell(peer, vector).ok()?;
        Some((vector, doorbell.as_fd().as_raw_fd()))
    })
}
