// SPDX-License-Identifier: GPL-2.0-or-later
//! Goes on where a server stopped whose process has ended: sorts the descriptors that the keeper
//! gave back, by what they are and not by their names, and joins them with the state file.
//!
//! Everything that can fail comes before anything is changed, so that a program that cannot go on
//! leaves all as it was for the one that can.

#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::sys::stat::fstat;

use super::connection::{Clients, Connection};
use super::in_flight;
use super::keeping::{LISTENER, MEMORY, STATE, eventfd_id, is_client_name, name_of};
use super::roster::{GREETING, Roster, SavedDeparture};
use super::send::{self, Partial};
use super::state::{Image, SavedClient, State, Things, is_state};
use crate::keeper::{Keeper, Returned};
use crate::{Error, sys};

/// What came back, sorted.
pub(super) struct Resumed {
    state: State,
    image: Image,
    memory: Option<OwnedFd>,
    listener: Option<OwnedFd>,
    sockets: HashMap<u64, Returned>,
    eventfds: HashMap<u32, OwnedFd>,
}

/// A client that cannot go on.
struct Ended {
    departure: SavedDeparture,
    slot: u32,
    socket: Option<Returned>,
    /// It was surely sent the whole greeting.
    is_greeted: bool,
    reason: &'static str,
}

impl Resumed {
    /// Sorts what the keeper gave back. None if there is no state file among it.
    pub(super) fn find(keeper: &mut Keeper) -> Result<Option<Self>, Error> {
        let returned = keeper.take_returned();
        let count = returned.len() as u64;
        let failed = |source| {
            let action = "identify a descriptor that the keeper gave back";
            Error::System { action, source }
        };
        let kinds = returned.iter().map(|thing| kind_of(thing.fd.as_fd()));
        let kinds = kinds.collect::<io::Result<Vec<_>>>().map_err(failed)?;
        let mut things: Vec<_> = kinds.into_iter().zip(returned).collect();
        let states = things.iter().filter(|(kind, _)| matches!(kind, Kind::State)).count();
        let Some(index) = things.iter().position(|(kind, _)| matches!(kind, Kind::State)) else {
            discard(keeper, things.into_iter().map(|(_, thing)| thing).collect());
            return Ok(None);
        };
        if states > 1 {
            let problem = format!("{states} state files came back");
            return Err(Error::State { problem });
        }
        let file = things.swap_remove(index).1.fd;
        let (state, image) = State::open(file).map_err(|problem| Error::State { problem })?;
        let Things { memory: object, listener: cookie, .. } = image.things;
        let (mut memory, mut listener) = (None, None);
        let (mut sockets, mut eventfds) = (HashMap::new(), HashMap::new());
        let mut others = Vec::new();
        for (kind, thing) in things {
            match kind {
                Kind::Socket { cookie: found, .. } if found == cookie => listener = Some(thing.fd),
                Kind::Socket { cookie: found, is_connection: true } => {
                    sockets.insert(found, thing);
                }
                Kind::Eventfd(id) => {
                    eventfds.insert(id, thing.fd);
                }
                Kind::File(found) if found == object => memory = Some(thing.fd),
                _ => others.push(thing),
            }
        }
        // A socket unit's, maybe.
        keeper.give_back(others);
        let found = Self { state, image, memory, listener, sockets, eventfds };
        if found.is_stillborn() {
            let sockets = found.sockets.into_values();
            found.state.retire();
            let listener = found.listener.map(|fd| Returned { fd, name: None });
            discard(keeper, listener.into_iter().chain(sockets).collect());
            return Ok(None);
        }
        keeper.count(count);
        Ok(Some(found))
    }

    pub(super) fn things(&self) -> Things {
        self.image.things
    }

    /// Whether the server before was killed while it started.
    fn is_stillborn(&self) -> bool {
        self.image.clients.is_empty() && self.memory.is_none()
    }

    /// Refuses a configuration that clients cannot live with.
    pub(super) fn check(&self, vectors: u32) -> Result<(), Error> {
        let has = self.image.roster.vectors;
        if has != vectors {
            let problem = format!(
                "its clients have {has} vectors each, and this server is to have {vectors}; stop \
                 the service for good before a change"
            );
            return Err(Error::State { problem });
        }
        Ok(())
    }

    /// The memory, which must have come back.
    pub(super) fn take_memory(&mut self) -> Result<OwnedFd, Error> {
        self.memory.take().ok_or_else(|| {
            let (device, inode) = self.image.things.memory;
            let problem = format!("its memory (device {device}, inode {inode}) did not come back");
            Error::State { problem }
        })
    }

    pub(super) fn take_listener(&mut self) -> Option<OwnedFd> {
        self.listener.take()
    }

    /// Counts this restart, and returns the number of restarts. Cannot fail.
    pub(super) fn count_restart(&self) -> u64 {
        self.state.count_restart()
    }

    /// Ends the clients that cannot go on, and gives the others. Cannot fail.
    pub(super) fn finish(self, keeper: &mut Keeper) -> (State, Clients) {
        let Self { mut state, mut image, mut sockets, mut eventfds, .. } = self;
        let (mut connections, mut ended) = (Vec::new(), Vec::new());
        let per_client = 1 + image.roster.vectors;
        let usual = in_flight::usual_size();
        for saved in image.clients {
            let index = connections.len();
            let socket = sockets.remove(&saved.cookie);
            let SavedClient { slot, partial, is_unknown, .. } = saved;
            let vectors: Vec<OwnedFd> =
                saved.eventfds.iter().filter_map(|id| eventfds.remove(id)).collect();
            let is_complete = vectors.len() == saved.eventfds.len();
            match socket {
                Some(socket) if is_complete && !is_unknown => {
                    let mut connection = Connection::new(socket.fd.into(), vectors.into());
                    connection.resumed = true;
                    connection.slot = slot;
                    connection.kept = per_client;
                    connection.partial = partial.map(Partial::from_parts);
                    connection.unread.resume(&connection.socket, usual);
                    connections.push(connection);
                }
                socket => {
                    let reason = match (&socket, is_unknown) {
                        (_, true) => "the server before was killed while it sent to it",
                        (None, _) => "its connection did not come back",
                        _ => "its eventfds did not all come back",
                    };
                    let member = &image.roster.members[index];
                    let is_greeted = member.progress.greeted == GREETING;
                    let departure = image.roster.leave(index);
                    ended.push(Ended { departure, slot, socket, is_greeted, reason });
                }
            }
        }
        for Ended { departure, slot, socket, is_greeted, reason } in ended {
            log::warn!("peer {} is ended at the restart: {reason}", departure.id);
            if let Some(Returned { fd, .. }) = socket {
                let socket = UnixStream::from(fd);
                if is_greeted {
                    let _ = socket.shutdown(Shutdown::Both);
                } else {
                    end(socket);
                }
            }
            state.left(slot, &departure);
            remove(keeper, &name_of(slot), u64::from(per_client));
        }
        let names: Vec<String> =
            connections.iter().map(|connection| name_of(connection.slot)).collect();
        for (_, Returned { fd, name }) in sockets {
            log::info!("a connection is refused that the server before had not admitted");
            end(fd.into());
            if let Some(name) = name.filter(|name| !names.contains(name)) {
                remove(keeper, &name, 1);
            }
        }
        (state, Roster::restore(image.roster, connections))
    }
}

/// Ends what belongs to no state, and leaves what has a name of others: a socket unit's sockets.
fn discard(keeper: &mut Keeper, returned: Vec<Returned>) {
    let things = [STATE, MEMORY, LISTENER];
    let is_ours = |name: &str| things.contains(&name) || is_client_name(name);
    let (ours, others): (Vec<_>, Vec<_>) =
        returned.into_iter().partition(|thing| thing.name.as_deref().is_none_or(is_ours));
    let mut names: BTreeSet<String> = ours.iter().filter_map(|thing| thing.name.clone()).collect();
    names.extend(things.map(str::to_owned));
    let mut holds_path = false;
    for thing in ours {
        if is_connection(&thing.fd) {
            end(thing.fd.into());
        } else {
            // A listening socket that is open anywhere keeps its path from being bound again.
            holds_path |= is_listener(&thing.fd);
        }
    }
    for name in names {
        remove(keeper, &name, 0);
    }
    if holds_path {
        keeper.wait();
    }
    keeper.give_back(others);
}

fn remove(keeper: &mut Keeper, name: &str, count: u64) {
    if let Err(error) = keeper.remove(name, count) {
        log::warn!("cannot have the keeper close {name:?}: {error}");
    }
}

/// Ends a connection whose client was told nobody knows what.
fn end(socket: UnixStream) {
    send::refuse_anywhere(socket.as_fd());
    let _ = socket.shutdown(Shutdown::Both);
}

/// What a descriptor is, as far as a server has such.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Socket {
        /// `SO_COOKIE`.
        cookie: u64,
        is_connection: bool,
    },
    Eventfd(u32),
    /// A state file, of any format.
    State,
    /// Another file or device: its device and inode.
    File((u64, u64)),
    Other,
}

/// An error means that the kernel does not tell now: the descriptor may be of any kind.
fn kind_of(fd: BorrowedFd<'_>) -> io::Result<Kind> {
    let status = fstat(fd)?;
    match status.st_mode & libc::S_IFMT {
        libc::S_IFSOCK => {
            let cookie = sys::socket_cookie(fd)?;
            let is_connection = is_stream(fd)? && !getsockopt(&fd, sockopt::AcceptConn)?;
            Ok(Kind::Socket { cookie, is_connection })
        }
        libc::S_IFREG if is_state(fd)? => Ok(Kind::State),
        libc::S_IFREG | libc::S_IFCHR | libc::S_IFBLK => {
            Ok(Kind::File((status.st_dev, status.st_ino)))
        }
        // What has no file type, as an eventfd.
        0 => match eventfd_id(fd) {
            Ok(id) => Ok(Kind::Eventfd(id)),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(Kind::Other),
            Err(error) => Err(error),
        },
        _ => Ok(Kind::Other),
    }
}

fn is_stream(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(getsockopt(&fd, sockopt::SockType)? == SockType::Stream)
}

fn is_listener(fd: &OwnedFd) -> bool {
    getsockopt(fd, sockopt::AcceptConn) == Ok(true)
}

fn is_connection(fd: &OwnedFd) -> bool {
    is_stream(fd.as_fd()).unwrap_or(false) && !is_listener(fd)
}
