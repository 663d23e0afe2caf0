// SPDX-License-Identifier: GPL-2.0-or-later
//! The server to measure with: the program starts one, or uses the one of `--socket`.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use ivshmem::{Chain, Client, Error, Server, Stopper};
use nix::unistd::mkdtemp;

use crate::Failure;
use crate::args::Args;

/// A server and the address at which clients join it.
pub(crate) struct Host {
    socket: PathBuf,
    vectors: u32,
    own: Option<Own>,
}

/// A server in a thread. Dropping it stops the server.
struct Own {
    directory: PathBuf,
    stopper: Stopper,
    thread: Option<JoinHandle<Result<(), Error>>>,
}

impl Host {
    /// Starts a server, or checks that the given one answers.
    pub(crate) fn open(args: &Args) -> Result<Self, Failure> {
        if let Some(socket) = &args.socket {
            let client = Client::connect(socket).map_err(|error| {
                format!("cannot join the server at {socket:?}: {}", Chain(&error))
            })?;
            if client.vectors() == 0 {
                return Err(format!("the server at {socket:?} gives no vectors").into());
            }
            return Ok(Self { socket: socket.clone(), vectors: client.vectors(), own: None });
        }
        let directory = mkdtemp(&std::env::temp_dir().join("ivshmem-bench.XXXXXX"))
            .map_err(|errno| format!("cannot make a directory for the socket: {errno}"))?;
        let socket = directory.join("socket");
        let started = (|| {
            let mut server =
                Server::builder().socket_path(&socket).vectors(args.vectors).start()?;
            let stopper = server.stopper()?;
            Ok::<_, Error>((server, stopper))
        })();
        let (mut server, stopper) = started.inspect_err(|_| {
            let _ = fs::remove_dir(&directory);
        })?;
        let thread = thread::spawn(move || server.run());
        let own = Own { directory, stopper, thread: Some(thread) };
        Ok(Self { socket, vectors: args.vectors, own: Some(own) })
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn vectors(&self) -> u32 {
        self.vectors
    }

    /// Whether this program started the server.
    pub(crate) fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// Joins the server as a client that knows the number of vectors.
    pub(crate) fn join(&self) -> Result<Client, Failure> {
        Ok(Client::builder().vectors(self.vectors).connect(&self.socket)?)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        self.stopper.stop();
        // The thread removes the socket when it ends. Only then is the directory empty.
        let _ = self.thread.take().map(JoinHandle::join);
        let _ = fs::remove_dir(&self.directory);
    }
}
