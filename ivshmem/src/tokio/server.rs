// SPDX-License-Identifier: GPL-2.0-or-later
//! [`AsyncServer`]: a server as a future that yields between dispatches.

#![forbid(unsafe_code)]

use std::io;

use super::{Dispatch, Driver};
use crate::{Error, Event, Server};

impl Dispatch for Server {
    type Event = Event;
    type Error = Error;

    fn is_ready(&self) -> bool {
        self.is_ready()
    }

    fn dispatch(&mut self) -> Result<Vec<Event>, Error> {
        self.dispatch()
    }

    fn failed(action: &'static str, source: io::Error) -> Error {
        Error::System { action, source }
    }
}

/// A [`Server`] in a tokio runtime. It needs the feature `tokio`.
///
/// It works only while [`run`](Self::run) or [`next_event`](Self::next_event) is awaited. It gives
/// the runtime back after each dispatch, which takes some milliseconds at most, so other tasks and
/// timers keep time however many clients connect.
///
/// Dropping it disconnects every client, as with [`Server`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// use std::time::Duration;
/// use ivshmem::{AsyncServer, Event, Server};
///
/// let server = Server::builder().socket_path(&path).vectors(2).start()?;
/// let mut server = AsyncServer::new(server)?;
/// # let _client = std::os::unix::net::UnixStream::connect(&path)?;
/// let mut second = tokio::time::interval(Duration::from_secs(1));
/// loop {
///     tokio::select! {
///         event = server.next_event() => match event? {
///             Event::Joined { id, .. } => {
///                 println!("{id} joined");
/// #               return Ok(());
///             }
///             other => println!("{other:?}"),
///         },
///         _ = second.tick() => println!("{} peers", server.get_ref().peers().len()),
///     }
/// }
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a server serves only while `run` or `next_event` is awaited"]
pub struct AsyncServer(Driver<Server>);

impl AsyncServer {
    /// Registers a server with the runtime. It uses one more descriptor.
    ///
    /// # Errors
    /// [`Error::System`] when no descriptor is left, or the runtime cannot watch it.
    ///
    /// # Panics
    /// Outside a tokio runtime, or if the runtime's I/O is not enabled
    /// (`tokio::runtime::Builder::enable_io`).
    pub fn new(server: Server) -> Result<Self, Error> {
        Driver::new(server).map(Self)
    }

    /// Serves until a [`Stopper`](crate::Stopper) is used, or a descriptor of
    /// [`Server::wake_on`] is readable. It drops the events.
    ///
    /// It may be cancelled: the server keeps its clients, and the next call goes on.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// use ivshmem::{AsyncServer, Server};
    ///
    /// let mut server = AsyncServer::new(Server::builder().socket_path(&path).start()?)?;
    /// let stopper = server.get_mut().stopper()?;
    /// let serving = tokio::spawn(async move { server.run().await });
    /// stopper.stop();
    /// serving.await??;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::System`] when the system no longer lets the server wait for events. What a client
    /// does is never an error.
    pub async fn run(&mut self) -> Result<(), Error> {
        loop {
            match self.next_event().await? {
                Event::Stopped => {
                    // `Server::run` uses up the stop. One more makes sure that it returns at once,
                    // even if the caller has used up the first since it was reported.
                    let server = &mut self.0.inner;
                    server.stopper()?.stop();
                    return server.run();
                }
                Event::Woken { .. } => return Ok(()),
                _ => {}
            }
        }
    }

    /// Waits for the next event, and serves meanwhile.
    ///
    /// It may be cancelled, for example by `tokio::select!`: no event is lost.
    ///
    /// [`Event::Stopped`] is returned again and again until [`run`](Self::run) or [`Server::run`]
    /// has used it up, and [`Event::Woken`] for as long as its descriptor is readable.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub async fn next_event(&mut self) -> Result<Event, Error> {
        self.0.next_event().await
    }

    /// The server.
    pub fn get_ref(&self) -> &Server {
        &self.0.inner
    }

    /// The server, to change it, for example by [`Server::disconnect`]. Do not exchange it for
    /// another server: that one would not be served. Events that the caller takes by
    /// [`Server::dispatch`] are not returned by [`next_event`](Self::next_event).
    pub fn get_mut(&mut self) -> &mut Server {
        &mut self.0.inner
    }

    /// Takes the server out of the runtime. Events that [`next_event`](Self::next_event) did not
    /// return yet are dropped.
    pub fn into_inner(self) -> Server {
        self.0.inner
    }
}
