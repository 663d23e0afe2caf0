// SPDX-License-Identifier: GPL-2.0-or-later
//! A server is resumed from what its keeper gives back, and no client hears a message twice or
//! misses one. The servers of these tests end in order; `killed` has those that do not.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ivshmem::{Error, ErrorKind, MemorySource, Server};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tempfile::TempDir;

#[path = "../../tests/common/checked_client.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod checked_client;
mod holder;
#[path = "../../tests/common/view.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod view;

use checked_client::CheckedClient;
use holder::{Holder, PATIENCE};

/// A server in this process, with its keeper.
struct House {
    directory: TempDir,
    holder: Holder,
    vectors: u32,
    memory: fn() -> MemorySource,
    capacity: u64,
    /// The server listens at a socket of the caller's.
    gives_listener: bool,
}

impl House {
    fn new(vectors: u32) -> Self {
        // The server, the keeper and the clients are in one process.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("it may be raised so far");
        let directory = tempfile::tempdir().expect("a temporary directory");
        let holder = Holder::new(directory.path());
        let memory = || MemorySource::Sealed;
        Self { directory, holder, vectors, memory, capacity: 10_000, gives_listener: false }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    fn start(&mut self) -> Result<Server, Error> {
        self.holder.update();
        let builder = match self.gives_listener {
            true => {
                let _ = std::fs::remove_file(self.path());
                Server::builder().listener(UnixListener::bind(self.path()).expect("a free path"))
            }
            false => Server::builder().socket_path(self.path()),
        };
        let server = builder
            .memory((self.memory)())
            .vectors(self.vectors)
            .size(8192)
            .keeper(self.holder.keeper(self.capacity))
            .start();
        self.holder.update();
        server
    }

    fn connect(&self) -> CheckedClient {
        self.connect_and_keep(false)
    }

    /// Connects a client that keeps the eventfds that it receives, or does not.
    fn connect_and_keep(&self, keep_eventfds: bool) -> CheckedClient {
        let socket = UnixStream::connect(self.path()).expect("the server listens");
        CheckedClient::new(socket, self.vectors as usize, keep_eventfds)
    }

    fn restart(&mut self, server: Server) -> Server {
        server.hand_over();
        self.start().expect("it goes on")
    }
}

/// Dispatches and reads until there is nothing to do.
fn settle(server: &mut Server, clients: &mut [CheckedClient]) {
    let until = Instant::now() + PATIENCE;
    loop {
        while server.is_ready() {
            server.dispatch().expect("the call succeeds");
            assert!(Instant::now() < until, "it never comes to rest");
        }
        let read: usize =
            clients.iter_mut().map(|client| client.drain().expect("a right stream")).sum();
        if read == 0 && !server.is_ready() {
            return;
        }
    }
}

fn ids_of(clients: &[CheckedClient]) -> BTreeSet<u16> {
    clients.iter().map(|client| client.view().id().expect("it is greeted")).collect()
}

fn assert_complete(clients: &[CheckedClient]) {
    let ids = ids_of(clients);
    assert_eq!(ids.len(), clients.len(), "the ids differ");
    for client in clients {
        assert!(client.knows_exactly(&ids), "{:?} knows {:?}", client.view().id(), client.view());
    }
}

#[test]
fn clients_ids_eventfds_and_memory_outlive_the_server() {
    let mut house = House::new(3);
    let mut server = house.start().expect("it starts");
    let inode = |server: &Server| {
        let memory = server.memory().try_clone_to_owned().expect("a descriptor");
        std::fs::File::from(memory).metadata().expect("a file").ino()
    };
    let memory = inode(&server);
    let mut clients: Vec<_> = (0..5).map(|_| house.connect_and_keep(true)).collect();
    settle(&mut server, &mut clients);
    assert_complete(&clients);
    house.holder.update();
    assert_eq!(house.holder.len(), 3 + 5 * 4, "state, memory, listener, and the clients'");

    for round in 0..4 {
        server = house.restart(server);
        assert_eq!(inode(&server), memory);
        let mut sorted: Vec<u16> = server.peers().map(|peer| peer.id()).collect();
        sorted.sort_unstable();
        assert_eq!(sorted, ids_of(&clients).into_iter().collect::<Vec<_>>());
        // One leaves and one joins.
        drop(clients.remove(round));
        clients.push(house.connect_and_keep(true));
        settle(&mut server, &mut clients);
        assert_complete(&clients);
    }
    let id = clients[0].view().id().expect("it is greeted");
    let peer = server.peer(id).expect("it is connected");
    let own: Vec<_> = peer.vectors().map(|fd| fd.try_clone_to_owned().expect("one")).collect();
    nix::unistd::write(&own[2], &1u64.to_ne_bytes()).expect("an eventfd");
    assert!(clients[4].ring(id, 2));
    assert_eq!(clients[0].rung(2), 2, "by the server, and by the newest client");

    house.holder.update();
    assert_eq!(house.holder.len(), 3 + 5 * 4);
    drop(server);
    house.holder.update();
    assert_eq!(house.holder.len(), 0, "the end for good");
    assert!(!house.path().exists());
    for client in &mut clients {
        while client.drain().expect("a right stream") > 0 {}
        assert!(client.has_ended());
    }
    house.start().expect("a new server");
}

/// A server closes such clients differently: they may have passed descriptors whose close waits.
/// The same holds for all clients on kernels before Linux 6.16.
#[test]
fn clients_of_a_listener_of_the_caller_outlive_a_hand_over() {
    let mut house = House::new(2);
    house.gives_listener = true;
    let mut server = house.start().expect("it starts");
    let mut clients = vec![house.connect(), house.connect()];
    settle(&mut server, &mut clients);
    for _ in 0..3 {
        server = house.restart(server);
        clients.push(house.connect());
        settle(&mut server, &mut clients);
        assert_complete(&clients);
    }
    assert_eq!(server.peers().len(), 5);
}

#[test]
fn a_client_that_does_not_read_over_restarts_misses_nothing() {
    let mut house = House::new(16);
    let mut server = house.start().expect("it starts");
    let mut stalled = [house.connect()];
    while server.peers().count() == 0 {
        server.dispatch().expect("the call succeeds");
    }
    let mut others = Vec::new();
    for round in 0..60 {
        others.push(house.connect());
        settle(&mut server, &mut others);
        if round % 3 == 2 {
            drop(others.remove(round % others.len()));
            settle(&mut server, &mut others);
        }
        if round % 10 == 9 {
            server = house.restart(server);
            settle(&mut server, &mut others);
        }
    }
    assert!(server.peer(0).expect("it is connected").behind() > 100);
    loop {
        settle(&mut server, &mut stalled);
        if server.peer(0).expect("it is connected").behind() == 0 {
            break;
        }
        server.wait(Some(Duration::from_millis(20))).expect("the call succeeds");
    }
    settle(&mut server, &mut others);
    others.extend(stalled);
    assert_complete(&others);
}

#[test]
fn a_configuration_or_a_state_that_does_not_fit_is_refused_and_left_as_it_is() {
    let mut house = House::new(2);
    let mut server = house.start().expect("it starts");
    let mut clients = vec![house.connect(), house.connect()];
    settle(&mut server, &mut clients);
    server.hand_over();
    house.vectors = 3;
    let error = house.start().expect_err("clients have two vectors");
    assert_eq!(error.kind(), ErrorKind::State);
    assert!(error.to_string().contains("2 vectors each, and this server is to have 3"), "{error}");
    assert!(house.path().exists());
    house.vectors = 2;

    // Another format.
    let state = std::fs::File::from(house.holder.stored["state"][0].try_clone().expect("one"));
    state.write_all_at(&99u32.to_ne_bytes(), 8).expect("it may be written");
    let error = house.start().expect_err("an unknown format").to_string();
    assert!(error.contains("its format is 99; this program knows format 1 only"), "{error}");
    state.write_all_at(&1u32.to_ne_bytes(), 8).expect("it may be written");

    let memory = house.holder.stored.remove("mem").expect("it is stored");
    let error = house.start().expect_err("no memory").to_string();
    assert!(error.contains("did not come back"), "{error}");
    house.holder.stored.insert("mem".into(), memory);

    let mut server = house.start().expect("all is as it was");
    clients.push(house.connect());
    settle(&mut server, &mut clients);
    assert_complete(&clients);
}

#[test]
fn what_did_not_come_back_is_ended_and_the_others_are_told() {
    let mut house = House::new(2);
    let mut server = house.start().expect("it starts");
    let mut clients: Vec<_> = (0..4).map(|_| house.connect()).collect();
    settle(&mut server, &mut clients);
    house.holder.update();
    server.hand_over();
    // A client's record has the number of its name: no socket of 1, no eventfd of 2.
    house.holder.stored.get_mut("c1").expect("it is stored").remove(0);
    house.holder.stored.get_mut("c2").expect("it is stored").pop();
    // And a connection that nobody knows.
    let (theirs, ours) = UnixStream::pair().expect("two descriptors");
    house.holder.stored.insert("c9".into(), vec![ours.into()]);
    let mut server = house.start().expect("it goes on");
    house.holder.update();
    assert!(!house.holder.stored.contains_key("c1") && !house.holder.stored.contains_key("c2"));
    let mut clients: Vec<_> = clients.into_iter().collect();
    let mut gone = clients.remove(2);
    drop(clients.remove(1));
    settle(&mut server, &mut clients);
    assert_complete(&clients);
    while gone.drain().expect("a right stream") > 0 {}
    assert!(gone.has_ended());
    let mut stranger = CheckedClient::new(theirs, 2, false);
    let error = stranger.drain().expect_err("-2, at which a QEMU ends");
    assert!(error.contains("-2"), "{error}");
}

#[test]
fn a_client_that_the_server_may_have_been_sending_to_is_ended_and_the_others_go_on() {
    let mut house = House::new(2);
    let mut server = house.start().expect("it starts");
    let mut clients: Vec<_> = (0..4).map(|_| house.connect()).collect();
    settle(&mut server, &mut clients);
    house.holder.update();
    server.hand_over();
    // As if the server was killed inside of a send to the third client: the place of the number of
    // messages that are about to go, in the format 1.
    let state = std::fs::File::from(house.holder.stored["state"][0].try_clone().expect("one"));
    let record = 4096 + 65_536 * 32 + 2 * (64 + 2 * 4);
    state.write_all_at(&1u32.to_ne_bytes(), record + 48).expect("it may be written");
    let mut server = house.start().expect("it goes on");
    let mut ended = clients.remove(2);
    assert!(server.peer(2).is_none());
    clients.push(house.connect());
    settle(&mut server, &mut clients);
    assert_complete(&clients);
    // It was greeted long ago, so nothing is sent to it.
    while ended.drain().expect("a right stream") > 0 {}
    assert!(ended.has_ended());
    house.holder.update();
    assert_eq!(house.holder.len(), 3 + 4 * 3);
}

#[test]
fn a_panic_does_not_end_the_service() {
    let mut house = House::new(1);
    let mut server = house.start().expect("it starts");
    let mut clients = vec![house.connect()];
    settle(&mut server, &mut clients);
    let panicking = std::thread::spawn(move || {
        let _server = server;
        panic!("as if by a defect");
    });
    panicking.join().expect_err("a panic");
    let mut server = house.start().expect("it goes on");
    clients.push(house.connect());
    settle(&mut server, &mut clients);
    assert_complete(&clients);
}

#[test]
fn a_named_memory_and_a_lost_path_are_found_again_or_made_again() {
    let mut house = House::new(1);
    house.memory = || MemorySource::posix(format!("ivshmem-resume-{}", std::process::id()));
    let object = PathBuf::from(format!("/dev/shm/ivshmem-resume-{}", std::process::id()));
    let mut server = house.start().expect("it starts");
    let mut clients = vec![house.connect()];
    settle(&mut server, &mut clients);
    server = house.restart(server);
    assert!(object.exists());
    server.hand_over();
    std::fs::remove_file(house.path()).expect("the socket's path is there");
    server = house.start().expect("it binds anew");
    clients.push(house.connect());
    settle(&mut server, &mut clients);
    assert_complete(&clients);
    server = house.restart(server);
    clients.push(house.connect());
    settle(&mut server, &mut clients);
    assert_complete(&clients);
    drop(server);
    assert!(!object.exists() && !house.path().exists());
}

#[test]
fn a_keeper_that_takes_no_more_is_waited_for_and_nothing_is_lost() {
    let mut house = House::new(1);
    let mut server = house.start().expect("it starts");
    // More messages than a datagram socket queues.
    let total = 560;
    let mut clients: Vec<_> = (0..total).map(|_| house.connect()).collect();
    let until = Instant::now() + PATIENCE;
    while server.peers().count() < total {
        server.wait(Some(Duration::from_millis(20))).expect("the call succeeds");
        house.holder.update();
        clients.iter_mut().for_each(|client| _ = client.drain().expect("a right stream"));
        assert!(Instant::now() < until);
    }
    settle(&mut server, &mut clients);
    house.holder.update();
    assert_eq!(house.holder.len(), 3 + 2 * total);
    server = house.restart(server);
    settle(&mut server, &mut clients);
    assert_complete(&clients);
}

#[test]
fn clients_beyond_what_the_keeper_keeps_are_served_and_do_not_outlive_the_server() {
    let mut house = House::new(1);
    // Room for two clients.
    house.capacity = 3 + 2 * 2 + 1;
    let mut server = house.start().expect("it starts");
    let mut clients: Vec<_> = (0..3).map(|_| house.connect()).collect();
    settle(&mut server, &mut clients);
    assert_complete(&clients);
    house.holder.update();
    assert_eq!(house.holder.len(), 3 + 2 * 2);
    server = house.restart(server);
    let mut third = clients.remove(2);
    settle(&mut server, &mut clients);
    assert_complete(&clients);
    while third.drain().expect("a right stream") > 0 {}
    assert!(third.has_ended());
    // A place becomes free.
    drop(clients.remove(1));
    settle(&mut server, &mut clients);
    clients.push(house.connect());
    settle(&mut server, &mut clients);
    server = house.restart(server);
    settle(&mut server, &mut clients);
    assert_complete(&clients);
}

#[test]
fn a_server_whose_keeper_has_ended_goes_on_without_it() {
    let mut house = House::new(2);
    let mut server = house.start().expect("it starts");
    let mut clients = vec![house.connect()];
    settle(&mut server, &mut clients);
    let House { directory, holder, .. } = house;
    drop(holder);
    for _ in 0..3 {
        let socket = UnixStream::connect(directory.path().join("socket")).expect("it listens");
        clients.push(CheckedClient::new(socket, 2, false));
        settle(&mut server, &mut clients);
        assert_complete(&clients);
        drop(clients.remove(0));
        settle(&mut server, &mut clients);
    }
    drop(server);
}

#[test]
fn what_is_left_of_a_start_that_was_killed_does_not_keep_a_server_from_starting() {
    for lost in [&["mem", "sock"][..], &["sock"]] {
        let mut house = House::new(1);
        let server = house.start().expect("it starts");
        house.holder.update();
        server.hand_over();
        for name in lost {
            house.holder.stored.remove(*name).expect("it was stored");
        }
        let mut server = house.start().unwrap_or_else(|error| panic!("{lost:?}: {error}"));
        let mut clients = vec![house.connect()];
        settle(&mut server, &mut clients);
        house.holder.update();
        assert_eq!(house.holder.len(), 3 + 2, "{lost:?}");
        server = house.restart(server);
        clients.push(house.connect());
        settle(&mut server, &mut clients);
        assert_complete(&clients);
    }
}

#[test]
fn restarts_are_counted_and_peers_know_that_they_were_resumed() {
    let mut house = House::new(1);
    let mut server = house.start().expect("it starts");
    assert_eq!(server.stats().restarts, 0);
    let mut clients = vec![house.connect()];
    settle(&mut server, &mut clients);
    assert!(server.peers().all(|peer| !peer.is_resumed()));
    for restarts in 1..4 {
        let before = std::time::SystemTime::now();
        server = house.restart(server);
        assert_eq!(server.stats().restarts, restarts);
        let peer = server.peer(0).expect("it goes on");
        assert!(peer.is_resumed() && peer.since() >= before);
    }
    clients.push(house.connect());
    settle(&mut server, &mut clients);
    assert!(!server.peer(1).expect("it joined").is_resumed());
    // The end for good is the end of the count.
    drop(server);
    assert_eq!(house.start().expect("it starts").stats().restarts, 0);
}
