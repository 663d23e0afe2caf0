// SPDX-License-Identifier: GPL-2.0-or-later
//! The server and the client in a tokio runtime: other tasks keep time, and a cancelled wait loses no event.

#![cfg(feature = "tokio")]
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::future::Future;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ivshmem::client::Event as ClientEvent;
use ivshmem::{AsyncClient, AsyncServer, Event, Server};
use nix::time::ClockId;

/// The time limit for an action that takes a moment; long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// Long enough for a server that has something to report.
const SHORT: Duration = Duration::from_millis(500);

fn start(directory: &Path) -> (PathBuf, Server) {
    let path = directory.join("socket");
    let server = Server::builder().socket_path(&path).size(4096).start().expect("it starts");
    (path, server)
}

/// Runs a test in a runtime of one thread, where a task that does not yield stops all others.
fn in_one_thread<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(test)
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future)
        .await
        .unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// Threads that connect and close until this is dropped.
struct Churn {
    stop: Arc<AtomicBool>,
    connections: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Churn {
    fn start(path: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let connections = Arc::new(AtomicU64::new(0));
        let threads = (0..2)
            .map(|_| {
                let (stop, connections) = (Arc::clone(&stop), Arc::clone(&connections));
                let path = path.to_owned();
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        // While the queue of connections is full, connect(2) waits.
                        drop(UnixStream::connect(&path));
                        connections.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        Self { stop, connections, threads }
    }

    fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_timer_beside_a_server_keeps_time_while_clients_connect_and_close_without_end() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    in_one_thread(async {
        let (path, server) = start(dir.path());
        let mut server = AsyncServer::new(server).expect("a runtime");
        let serving = tokio::spawn(async move { server.run().await });
        let churn = Churn::start(&path);
        // The processor time of this thread, in which the server runs too. Other processes may delay
        // a tick, but they do not count.
        let clock = || Duration::from(ClockId::CLOCK_THREAD_CPUTIME_ID.now().expect("a clock"));
        let start = Instant::now();
        let (mut last, mut longest) = (clock(), Duration::ZERO);
        let mut interval = tokio::time::interval(Duration::from_millis(10));
        while start.elapsed() < Duration::from_secs(2) {
            interval.tick().await;
            longest = longest.max(clock() - last);
            last = clock();
        }
        let connections = churn.connections();
        // The server goes first, so that no connect waits for it.
        serving.abort();
        let _ = serving.await;
        drop(churn);
        assert!(longest < Duration::from_millis(500), "before one tick the thread ran {longest:?}");
        assert!(connections > 100, "{connections} connections are no load");
    });
}

#[test]
fn a_wait_for_an_event_that_is_cancelled_again_and_again_loses_none() {
    const CLIENTS: u16 = 200;
    let dir = tempfile::tempdir().expect("a temporary directory");
    in_one_thread(async {
        let (path, server) = start(dir.path());
        let mut server = AsyncServer::new(server).expect("a runtime");
        let (mut sockets, mut joined, mut cancelled) = (Vec::new(), BTreeSet::new(), 0);
        let mut note = |event| match event {
            Ok(Event::Joined { id, .. }) => assert!(joined.insert(id), "{id} came twice"),
            other => panic!("{other:?}"),
        };
        for _ in 0..CLIENTS {
            sockets.push(UnixStream::connect(&path).expect("it listens"));
            // Each second wait is cancelled while it yields.
            tokio::select! {
                biased;
                event = server.next_event() => note(event),
                () = std::future::ready(()) => cancelled += 1,
            }
        }
        assert!(cancelled > 0, "no wait was cancelled");
        while let Ok(event) = tokio::time::timeout(SHORT, server.next_event()).await {
            note(event);
        }
        assert_eq!(joined, (0..CLIENTS).collect());
        drop(sockets);
        for _ in 0..CLIENTS {
            let event = soon("all clients leave", server.next_event()).await;
            assert!(matches!(event.expect("it serves"), Event::Left { .. }));
        }
        assert_eq!(server.into_inner().stats().left, u64::from(CLIENTS));
    });
}

#[test]
fn a_future_that_is_always_ready_does_not_keep_the_server_from_its_work() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    in_one_thread(async {
        let (path, server) = start(dir.path());
        let mut server = AsyncServer::new(server).expect("a runtime");
        for id in 0..3 {
            let _client = UnixStream::connect(&path).expect("it listens");
            let mut left = false;
            // Both futures are polled once in each turn, and the second one ends each turn.
            for _ in 0..1000 {
                tokio::select! {
                    biased;
                    event = server.next_event() => {
                        left |= matches!(event.expect("it serves"), Event::Joined { id: i, .. } if i == id);
                    }
                    () = std::future::ready(()) => {}
                }
                if left {
                    break;
                }
            }
            assert!(left, "client {id} was not admitted");
        }
    });
}

#[test]
fn a_stopped_server_can_run_again() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    in_one_thread(async {
        let (path, mut server) = start(dir.path());
        let stopper = server.stopper().expect("an eventfd");
        let mut server = AsyncServer::new(server).expect("a runtime");
        for round in 1..=2 {
            stopper.stop();
            soon("the stop", server.run()).await.expect("it serves");
            let _client = UnixStream::connect(&path).expect("it listens");
            let event = soon("a client", server.next_event()).await.expect("it serves");
            assert!(matches!(event, Event::Joined { .. }), "{round}: {event:?}");
            let again = tokio::time::timeout(Duration::from_millis(20), server.run()).await;
            assert!(again.is_err(), "the stop is used up");
        }
        let (here, there) = UnixStream::pair().expect("a pair of sockets");
        server.get_mut().wake_on(&there, 7).expect("a socket can be waited for");
        drop(here);
        soon("the descriptor of the caller", server.run()).await.expect("it serves");
    });
}

#[test]
fn a_client_hears_of_peers_interrupts_and_the_end_of_the_server() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    in_one_thread(async {
        let (path, mut server) = start(dir.path());
        let stopper = server.stopper().expect("an eventfd");
        let mut server = AsyncServer::new(server).expect("a runtime");
        let serving = tokio::spawn(async move { server.run().await });
        let mut one = soon("the first", AsyncClient::connect(&path)).await.expect("a server");
        let two = soon("the second", AsyncClient::connect(&path)).await.expect("a server");
        let event = soon("the second joins", one.next_event()).await.expect("it works");
        assert!(matches!(event, ClientEvent::Joined { peer: 1, vectors: 1 }), "{event:?}");
        two.get_ref().ring(0, 0).expect("it is here");
        let event = soon("an interrupt", one.next_event()).await.expect("it works");
        assert!(matches!(event, ClientEvent::Rung { vector: 0, count: 1 }), "{event:?}");
        drop(two.into_inner());
        let event = soon("the second leaves", one.next_event()).await.expect("it works");
        assert!(matches!(event, ClientEvent::Left { peer: 1 }), "{event:?}");
        stopper.stop();
        soon("the end of the server", serving).await.expect("no panic").expect("it serves");
        let event = soon("the end of the server", one.next_event()).await.expect("it works");
        assert!(matches!(event, ClientEvent::Disconnected { .. }), "{event:?}");
        one.get_mut().ring(0, 0).expect("itself");
        let event = soon("an interrupt", one.next_event()).await.expect("it works");
        assert!(matches!(event, ClientEvent::Rung { vector: 0, count: 1 }), "{event:?}");
    });
}
