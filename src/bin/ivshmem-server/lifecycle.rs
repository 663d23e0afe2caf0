// SPDX-License-Identifier: GPL-2.0-or-later
//! Log lines about the server as a whole: start, ready, end. The library logs joins, departures and refusals.
//!
//! None of them is on the path of a message.

#![forbid(unsafe_code)]

use ivshmem::Server;
use nix::sys::resource::{Resource, getrlimit};

use crate::args::Args;

/// The configuration of a server that is about to start. The service manager may have bound the socket.
pub(crate) fn starting(args: &Args, has_socket: bool) {
    if log::log_enabled!(log::Level::Info) {
        let version = env!("CARGO_PKG_VERSION");
        log::info!("version {version} starts: {}", configuration(args, has_socket));
    }
}

fn configuration(args: &Args, has_socket: bool) -> String {
    let socket = if has_socket {
        "socket of the service manager".to_owned()
    } else {
        format!("socket {:?}", args.socket)
    };
    let mut text = format!(
        "{socket}, {}, {}, vectors: {}, first id: {}",
        args.memory().description(),
        args.size.map_or_else(|| "default size".to_owned(), |size| format!("{size} bytes")),
        args.vectors,
        args.first_id
    );
    if let Some(clients) = args.max_clients {
        text.push_str(&format!(", clients: {clients} at most"));
    }
    if let Some(clients) = args.max_clients_per_uid {
        text.push_str(&format!(", clients of one user: {clients} at most"));
    }
    let access = args.access();
    if access.is_limited() {
        text.push_str(&format!(", only for users {:?} and groups {:?}", access.uids, access.gids));
    }
    if let Ok((files, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
        text.push_str(&format!(", open files: {files} at most"));
    }
    text
}

/// The server listens.
pub(crate) fn ready(server: &Server) {
    let at = match server.socket_path() {
        Some(path) => format!("at {path:?}"),
        None => "at a socket of the service manager".to_owned(),
    };
    log::info!(
        "ready: listens {at}; {} bytes of shared memory, {}",
        server.memory_size(),
        clients(server.peers().len())
    );
}

/// The next server goes on with the clients.
pub(crate) fn hands_over(server: &Server) {
    log::info!("hands over {} to the next server", clients(server.peers().len()));
}

/// The connections of all clients are about to end.
pub(crate) fn ending(server: &Server) {
    log::info!("ends for good, with {}", clients(server.peers().len()));
}

fn clients(count: usize) -> String {
    format!("{count} {}", if count == 1 { "client" } else { "clients" })
}
