// SPDX-License-Identifier: GPL-2.0-or-later
//! Tells the service manager or the supervisor that the server is ready, and how many clients it has
//! (sd_notify(3)). Without one it does nothing.
//!
//! It must not know the protocol of the clients. What survives a restart is the library's `Keeper`.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use crate::supervise::notify;

/// The status is sent once in this time, at most.
const PERIOD: Duration = Duration::from_secs(1);

pub(crate) struct Manager {
    socket: Option<UnixDatagram>,
    /// The number of clients in the last status, and the time of it.
    shown: Option<(usize, Instant)>,
    /// The status has to be sent at the end of the period.
    is_stale: bool,
}

impl Manager {
    /// Connects to the socket in `NOTIFY_SOCKET`, if there is one.
    pub(crate) fn connect() -> Self {
        let socket = notify::connect()
            .and_then(|socket| {
                socket.as_ref().map_or(Ok(()), |socket| socket.set_nonblocking(true))?;
                Ok(socket)
            })
            .unwrap_or_else(|error| {
                log::warn!("cannot notify the service manager: {error}");
                None
            });
        Self { socket, shown: None, is_stale: false }
    }

    /// The server listens.
    pub(crate) fn ready(&mut self, clients: usize) {
        let Some(socket) = &self.socket else { return };
        // It decides whether the server may stay, so it is worth waiting for.
        let _ = socket.set_nonblocking(false);
        self.send(&format!("READY=1\n{}", status(clients)));
        let _ = self.socket.as_ref().map(|socket| socket.set_nonblocking(true));
        self.shown = Some((clients, Instant::now()));
    }

    /// Sends the number of clients if it has changed, now or later.
    pub(crate) fn show(&mut self, clients: usize) {
        let (Some(_), Some((shown, time))) = (&self.socket, self.shown) else { return };
        self.is_stale = shown != clients;
        if self.is_stale && time.elapsed() >= PERIOD {
            self.send(&status(clients));
            self.shown = Some((clients, Instant::now()));
            self.is_stale = false;
        }
    }

    /// How long the server may wait for events.
    pub(crate) fn due(&self) -> Option<Duration> {
        let (_, time) = self.shown.filter(|_| self.is_stale)?;
        Some(PERIOD.saturating_sub(time.elapsed()))
    }

    fn send(&self, text: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = notify::send(socket, text, &[]) {
            log::debug!("cannot notify the service manager: {error}");
        }
    }
}

fn status(clients: usize) -> String {
    format!("STATUS={clients} {}", if clients == 1 { "client" } else { "clients" })
}
