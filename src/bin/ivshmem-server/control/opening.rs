// SPDX-License-Identifier: GPL-2.0-or-later
//! Where the control socket is, and how it is opened while the server starts.
//!
//! It is opened when the server's own socket has its path: of several servers that start at once
//! with the same path, only the one that gets the path opens it. It knows nothing of connections.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};

use ivshmem::{Builder, Chain, Server};

use super::{Control, TOKEN};

/// Where the control socket is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nowhere.
    Off,
    /// At this path, or the start fails.
    At(PathBuf),
    /// Beside the server's socket. If that is not possible, the server serves without.
    Beside(PathBuf),
}

impl Place {
    /// `socket` is the path of the server's socket, if it has one.
    pub(crate) fn choose(is_off: bool, path: Option<&PathBuf>, socket: Option<PathBuf>) -> Self {
        match (is_off, path, socket) {
            (true, ..) => Self::Off,
            (false, Some(path), _) => Self::At(path.clone()),
            (false, None, Some(socket)) => {
                let mut path = socket.into_os_string();
                path.push(".control");
                Self::Beside(path.into())
            }
            (false, None, None) => Self::Off,
        }
    }
}

/// A control socket that is opened while the server starts.
pub(crate) struct Opening(Receiver<Control>);

impl Opening {
    /// Takes the control socket of a server that has started, and has the server watch it.
    pub(crate) fn finish(self, server: &mut Server) -> Option<Control> {
        let mut control = self.0.try_recv().ok()?;
        if let Some(path) = server.socket_path() {
            // Absolute.
            control.facts.socket = path.display().to_string();
        }
        match server.wake_on(&control, TOKEN) {
            Ok(()) => Some(control),
            // The server serves already, and its clients matter more.
            Err(error) => {
                log::error!("the server has no control socket: {}", Chain(&error));
                None
            }
        }
    }
}

/// Has the server open the control socket when its own socket has its path. `socket` is the name of
/// the server's socket in replies, and `owner` the user that the server will run as.
pub(crate) fn open_with(
    builder: Builder,
    place: Place,
    socket: String,
    owner: Option<u32>,
) -> (Builder, Opening) {
    let (sender, receiver) = channel();
    let open = move || {
        let (path, is_optional) = match place {
            Place::Off => return Ok(()),
            Place::At(path) => (path, false),
            Place::Beside(path) => (path, true),
        };
        match Control::open(path, socket, owner) {
            Ok(control) => drop(sender.send(control)),
            Err(error) if is_optional => log::warn!(
                "the server has no control socket, so ivshmem-ctl cannot look at it: {}; choose \
                 another path with --control, or --no-control",
                Chain(&error)
            ),
            Err(error) => return Err(error),
        }
        Ok(())
    };
    (builder.before_listening(open), Opening(receiver))
}

/// The path of a socket that the caller of this program made, for replies and the default path.
pub(crate) fn path_of(listener: &UnixListener) -> Option<PathBuf> {
    let address = listener.local_addr();
    let path = address.ok()?.as_pathname()?.to_owned();
    path.is_absolute().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_beside_the_servers_unless_an_option_says_otherwise() {
        let (path, socket) = (PathBuf::from("/c"), PathBuf::from("/s"));
        for (is_off, path, socket, place) in [
            (false, None, Some(&socket), Place::Beside("/s.control".into())),
            (false, Some(&path), Some(&socket), Place::At(path.clone())),
            (false, Some(&path), None, Place::At(path.clone())),
            (false, None, None, Place::Off),
            (true, None, Some(&socket), Place::Off),
        ] {
            assert_eq!(Place::choose(is_off, path, socket.cloned()), place);
        }
    }
}
