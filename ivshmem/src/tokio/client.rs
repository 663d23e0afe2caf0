// SPDX-License-Identifier: GPL-2.0-or-later
//! [`AsyncClient`]: a client whose events are awaited.

#![forbid(unsafe_code)]

use std::io;
use std::path::Path;

use ::tokio::task::spawn_blocking;

use super::{Dispatch, Driver};
use crate::Client;
use crate::client::{Builder, Error, Event};

impl Dispatch for Client {
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

/// A [`Client`] in a tokio runtime. It needs the feature `tokio`.
///
/// To interrupt peers and to use the memory needs no `await`: [`get_ref`](Self::get_ref) has both.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let server = ivshmem::Server::builder().socket_path(&path).start()?;
/// # let mut server = ivshmem::AsyncServer::new(server)?;
/// # tokio::spawn(async move { server.run().await });
/// use ivshmem::AsyncClient;
/// use ivshmem::client::Event;
///
/// let mut client = AsyncClient::connect(&path).await?;
/// client.get_ref().memory().write(0, b"for all peers")?;
/// client.get_ref().ring_all()?;
/// # client.get_ref().ring(0, 0)?;
/// loop {
///     match client.next_event().await? {
///         Event::Joined { peer, .. } => client.get_ref().ring(peer, 0)?,
///         Event::Rung { vector, .. } => {
///             println!("interrupted on vector {vector}");
/// #           return Ok(());
///         }
///         Event::Disconnected { .. } => return Ok(()),
///         _ => {}
///     }
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct AsyncClient(Driver<Client>);

impl AsyncClient {
    /// Connects to the server at this path, within 10 seconds.
    ///
    /// # Errors, Panics
    /// As [`connect_with`](Self::connect_with).
    pub async fn connect(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::connect_with(&Client::builder(), path).await
    }

    /// Connects to the server at this path as the builder says.
    ///
    /// To connect is a blocking call, so it runs in a thread that tokio has for such calls. If this
    /// future is dropped, the call still goes on there, until its time limit.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// # let server = ivshmem::Server::builder().socket_path(&path).vectors(2).start()?;
    /// # let mut server = ivshmem::AsyncServer::new(server)?;
    /// # tokio::spawn(async move { server.run().await });
    /// use ivshmem::{AsyncClient, Client};
    ///
    /// let client = AsyncClient::connect_with(&Client::builder().vectors(2), &path).await?;
    /// assert_eq!(client.get_ref().vectors(), 2);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Builder::connect`].
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub async fn connect_with(builder: &Builder, path: impl AsRef<Path>) -> Result<Self, Error> {
        let builder = builder.clone();
        let path = path.as_ref().to_owned();
        let connected = spawn_blocking(move || builder.connect(path)).await;
        // There is no result if the runtime shuts down first.
        let lost = |error| Error::System {
            action: "connect in a thread of tokio",
            source: io::Error::other(error),
        };
        Self::new(connected.map_err(lost)??)
    }

    /// Registers a connected client with the runtime. It uses one more descriptor.
    ///
    /// # Errors
    /// [`Error::System`] when no descriptor is left, or the runtime cannot watch it.
    ///
    /// # Panics
    /// Outside a tokio runtime, or if the runtime's I/O is not enabled
    /// (`tokio::runtime::Builder::enable_io`).
    pub fn new(client: Client) -> Result<Self, Error> {
        Driver::new(client).map(Self)
    }

    /// Waits for the next event.
    ///
    /// It may be cancelled, for example by `tokio::select!`: no event is lost. After
    /// [`Event::Disconnected`] it still returns [`Event::Rung`]: peers can interrupt a client that
    /// has no server.
    ///
    /// # Errors
    /// As [`Client::dispatch`].
    pub async fn next_event(&mut self) -> Result<Event, Error> {
        self.0.next_event().await
    }

    /// The client, to interrupt peers and to use the memory.
    pub fn get_ref(&self) -> &Client {
        &self.0.inner
    }

    /// The client, to change it. Do not exchange it for another client: events of that one would
    /// not be noticed. Events that the caller takes by [`Client::dispatch`] are not returned by
    /// [`next_event`](Self::next_event).
    pub fn get_mut(&mut self) -> &mut Client {
        &mut self.0.inner
    }

    /// Takes the client out of the runtime. Events that [`next_event`](Self::next_event) did not
    /// return yet are dropped.
    pub fn into_inner(self) -> Client {
        self.0.inner
    }
}
