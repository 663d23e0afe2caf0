// SPDX-License-Identifier: GPL-2.0-or-later
//! A server and a client in tokio's event loop.
//!
//! Both are one descriptor and one `dispatch`, so one loop serves both: [`Driver`]. tokio reports
//! changes only (it is edge-triggered), so the loop dispatches until nothing is left, and it must
//! not keep the runtime while it does so:
//!
//! - A client that connects and closes without end makes a server ready again at once, for ever.
//!   So the loop yields between two dispatches. A future that only wakes itself is not enough: the
//!   runtime polls it many times before it looks at its timers and descriptors. `yield_now` makes
//!   the runtime look at them first.
//! - A caller may drop the future at each `await`. So events are stored in the driver before they
//!   are returned, and nothing else is kept in a future.
//!
//! This module must not know what an event means, apart from the end of [`AsyncServer::run`].

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use ::tokio::io::Interest;
use ::tokio::io::unix::AsyncFd;
use ::tokio::task::yield_now;

mod client;
mod server;

pub use client::AsyncClient;
pub use server::AsyncServer;

/// What a [`Driver`] drives: one descriptor that is readable while `dispatch` has work.
trait Dispatch: AsFd {
    type Event;
    type Error;

    fn is_ready(&self) -> bool;
    fn dispatch(&mut self) -> Result<Vec<Self::Event>, Self::Error>;
    /// The error for a failed system call.
    fn failed(action: &'static str, source: io::Error) -> Self::Error;
}

/// A server or a client, and what is needed to wait for it.
#[derive(Debug)]
struct Driver<T: Dispatch> {
    /// A copy of the descriptor. tokio demands that what it watches stays open, and a caller could
    /// exchange `inner` for another value.
    descriptor: AsyncFd<OwnedFd>,
    inner: T,
    /// Events that were not returned yet.
    events: VecDeque<T::Event>,
    /// Whether there was a dispatch after the last yield.
    dispatched: bool,
}

impl<T: Dispatch> Driver<T> {
    fn new(inner: T) -> Result<Self, T::Error> {
        let failed = |source| T::failed("register a descriptor with tokio", source);
        let descriptor = inner.as_fd().try_clone_to_owned().map_err(failed)?;
        // Newer versions of tokio have an unsafe function instead, because not everything with a
        // descriptor number keeps the descriptor open. An OwnedFd does.
        #[allow(deprecated, reason = "its successor is unsafe, and older versions lack it")]
        let descriptor = AsyncFd::with_interest(descriptor, Interest::READABLE).map_err(failed)?;
        Ok(Self { descriptor, inner, events: VecDeque::new(), dispatched: false })
    }

    /// Waits for the next event.
    async fn next_event(&mut self) -> Result<T::Event, T::Error> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            if !self.inner.is_ready() {
                let mut ready = self
                    .descriptor
                    .readable()
                    .await
                    .map_err(|source| T::failed("wait for a descriptor with tokio", source))?;
                ready.clear_ready();
            } else if std::mem::take(&mut self.dispatched) {
                // The flag is cleared first. A caller may drop this future here each time, for
                // another future that is always ready; the next call then dispatches.
                yield_now().await;
            }
            self.dispatched = true;
            self.events.extend(self.inner.dispatch()?);
        }
    }
}
