// SPDX-License-Identifier: GPL-2.0-or-later
//! The client against servers that are wrong, late or hostile: an error that says what, no panic, no descriptor left
//! over, no endless wait.
//!
//! The server is one end of a socket pair with messages written by hand. Every test counts the descriptors of this
//! process, so they run one after another.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ivshmem::client::{Builder, Client, Error, Event};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{Backlog, ControlMessage, MsgFlags, sendmsg};

/// How long a thing that needs a moment may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// The greeting may take this long where it is to fail for being late.
const SHORT: Duration = Duration::from_millis(300);

/// Runs a test alone, and checks that it leaves no descriptor over.
fn alone(test: impl FnOnce()) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = descriptors();
    test();
    assert_eq!(descriptors(), before, "descriptors left over");
}

/// What each descriptor of this process is, the one that reads the directory excepted.
fn descriptors() -> Vec<String> {
    let entries = std::fs::read_dir("/proc/self/fd").expect("Linux with /proc");
    let mut all: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.expect("an entry").path();
            let target = std::fs::read_link(&path).ok()?;
            (!target.starts_with("/proc")).then(|| format!("{path:?} {target:?}"))
        })
        .collect();
    all.sort();
    all
}

/// The server's end.
struct Wrong(UnixStream);

impl Wrong {
    fn pair() -> (Self, UnixStream) {
        let (server, client) = UnixStream::pair().expect("a socket pair");
        (Self(server), client)
    }

    fn bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(bytes)];
        let sent = sendmsg::<()>(self.0.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None);
        assert_eq!(sent, Ok(bytes.len()));
    }

    fn say(&self, value: i64) {
        self.bytes(&value.to_le_bytes(), &[]);
    }

    fn give(&self, value: i64, fd: impl AsFd) {
        self.bytes(&value.to_le_bytes(), &[fd.as_fd()]);
    }

    fn vectors(&self, id: u16, count: usize) {
        for _ in 0..count {
            self.give(i64::from(id), eventfd());
        }
    }

    /// Version, id 3 and memory.
    fn greet(&self) {
        self.say(0);
        self.say(3);
        self.give(-1, memory(4096));
    }
}

fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).expect("an eventfd")
}

fn memory(size: u64) -> File {
    let fd = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).expect("a memfd");
    let file = File::from(fd);
    file.set_len(size).expect("it grows");
    file
}

fn client() -> Builder {
    Client::builder().connect_timeout(PATIENCE)
}

/// What a client that has this many vectors makes of what the server says before it goes.
fn refused(speak: impl FnOnce(&Wrong)) -> Error {
    let (server, socket) = Wrong::pair();
    speak(&server);
    match client().vectors(1).adopt(socket) {
        Err(error) => error,
        Ok(client) => panic!("it took that for a greeting: {client:?}"),
    }
}

/// A connected client with one vector, and its server.
fn connected() -> (Wrong, Client) {
    let (server, socket) = Wrong::pair();
    server.greet();
    server.vectors(3, 1);
    (server, client().vectors(1).adopt(socket).expect("a right greeting"))
}

/// How a connected client ends after what the server says.
fn disconnected(speak: impl FnOnce(&Wrong)) -> (Vec<Event>, Error) {
    let (server, mut client) = connected();
    speak(&server);
    let mut all = Vec::new();
    loop {
        let events = client.wait(Some(PATIENCE)).expect("what a server does is no error");
        assert!(!events.is_empty(), "nothing happened");
        all.extend(events);
        if matches!(all.last(), Some(Event::Disconnected { .. })) {
            break;
        }
    }
    assert!(!client.is_connected());
    assert!(client.dispatch().expect("it still works").is_empty(), "it comes once");
    // What needs no server still works.
    client.ring(3, 0).expect("its own vector");
    assert!(matches!(client.dispatch().as_deref(), Ok([Event::Rung { vector: 0, count: 1 }])));
    client.memory().write(0, b"x").expect("the memory is there");
    match all.pop() {
        Some(Event::Disconnected { reason }) => (all, reason),
        other => panic!("{other:?}"),
    }
}

/// Checks what an error says: the thing, its value, what would be right.
#[track_caller]
fn says(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "no {part:?} in {text:?}");
    }
}

#[test]
fn a_wrong_version_is_an_error() {
    alone(|| {
        for version in [1, -1, 7, i64::MAX, i64::MIN] {
            let error = refused(|server| server.say(version));
            assert!(matches!(error, Error::Version { version: v } if v == version), "{error:?}");
            says(&error, &["version", &version.to_string(), "knows 0"]);
        }
    });
}

#[test]
fn a_version_or_an_id_with_a_descriptor_is_an_error() {
    alone(|| {
        let error = refused(|server| server.give(0, eventfd()));
        assert!(matches!(error, Error::SurplusDescriptors { count: 1, right: 0, .. }), "{error:?}");
        let error = refused(|server| {
            server.say(0);
            server.give(5, eventfd());
        });
        assert!(matches!(error, Error::SurplusDescriptors { value: 5, .. }), "{error:?}");
    });
}

#[test]
fn an_id_out_of_range_is_an_error() {
    alone(|| {
        for id in [-1, -2, 65_536, i64::MAX, i64::MIN] {
            let error = refused(|server| {
                server.say(0);
                server.say(id);
            });
            assert!(matches!(error, Error::Unexpected { value, .. } if value == id), "{error:?}");
            says(&error, &[&id.to_string(), "0 to 65535"]);
        }
        for id in [-2, 65_536, i64::MAX, i64::MIN] {
            let error = refused(|server| {
                server.greet();
                server.give(id, eventfd());
            });
            assert!(matches!(error, Error::Unexpected { value, .. } if value == id), "{error:?}");
        }
    });
}

#[test]
fn memory_without_a_descriptor_is_an_error() {
    alone(|| {
        let error = refused(|server| {
            server.say(0);
            server.say(3);
            server.say(-1);
        });
        assert!(matches!(error, Error::NoDescriptor { value: -1, .. }), "{error:?}");
        says(&error, &["-1", "shared memory", "must come with one"]);
    });
}

#[test]
fn memory_that_comes_twice_is_an_error() {
    alone(|| {
        let error = refused(|server| {
            server.greet();
            server.give(-1, memory(4096));
        });
        assert!(matches!(error, Error::Unexpected { value: -1, .. }), "{error:?}");
        let (_, error) = disconnected(|server| server.give(-1, memory(4096)));
        assert!(matches!(error, Error::Unexpected { value: -1, .. }), "{error:?}");
    });
}

#[test]
fn memory_that_is_no_file_or_is_empty_is_an_error() {
    alone(|| {
        let with = |fd: BorrowedFd<'_>| {
            refused(|server| {
                server.say(0);
                server.say(3);
                server.give(-1, fd);
            })
        };
        let (pipe, _other) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        let directory = File::open("/").expect("a directory");
        let device = File::open("/dev/zero").expect("a device");
        let (socket, _other_end) = UnixStream::pair().expect("a socket pair");
        for (fd, kind) in [
            (pipe.as_fd(), "a pipe"),
            (directory.as_fd(), "a directory"),
            (device.as_fd(), "a device"),
            (socket.as_fd(), "a socket"),
            (eventfd().as_fd(), "not a file"),
            (memory(0).as_fd(), "empty"),
        ] {
            let error = with(fd);
            assert!(matches!(error, Error::MemoryKind { .. }), "{kind}: {error:?}");
            says(&error, &[kind, "at least 1 byte"]);
        }
    });
}

#[test]
fn memory_that_cannot_be_written_is_an_error() {
    alone(|| {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(4096).expect("it grows");
        let read_only = File::open(file.path()).expect("it opens");
        let error = refused(|server| {
            server.say(0);
            server.say(3);
            server.give(-1, read_only);
        });
        assert!(matches!(error, Error::Memory { action: "map", .. }), "{error:?}");
    });
}

#[test]
fn memory_of_another_size_than_asked_for_is_an_error() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 1);
        let error = client().memory_size(8192).adopt(socket).unwrap_err();
        assert!(matches!(error, Error::MemorySize { size: 4096, wanted: 8192 }), "{error:?}");
    });
}

#[test]
fn memory_that_shrinks_later_is_an_error_and_not_a_sigbus() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        let object = memory(1 << 20);
        server.say(0);
        server.say(3);
        server.give(-1, &object);
        server.vectors(3, 1);
        let client = client().vectors(1).adopt(socket).expect("a right greeting");
        client.memory().write(1 << 19, b"there").expect("it is there");
        assert!(!client.memory().is_sealed());
        object.set_len(4096).expect("nothing keeps it from shrinking");
        let mut bytes = [0; 5];
        for error in [
            client.memory().check().unwrap_err(),
            client.memory().read(1 << 19, &mut bytes).unwrap_err(),
            client.memory().write(1 << 19, b"gone?").unwrap_err(),
        ] {
            assert!(
                matches!(error, Error::MemoryShrank { mapped: 0x10_0000, size: 4096 }),
                "{error:?}"
            );
            says(&error, &["1048576", "4096", "--memfd"]);
        }
    });
}

#[test]
fn a_vector_with_two_descriptors_is_an_error() {
    alone(|| {
        let two = [eventfd(), eventfd()];
        let error = refused(|server| {
            server.greet();
            server.bytes(&3i64.to_le_bytes(), &[two[0].as_fd(), two[1].as_fd()]);
        });
        assert!(
            matches!(error, Error::SurplusDescriptors { value: 3, count: 2, right: 1, .. }),
            "{error:?}"
        );
        // The same, with each half of the message bringing one.
        let error = refused(|server| {
            server.greet();
            server.bytes(&3i64.to_le_bytes()[..4], &[two[0].as_fd()]);
            server.bytes(&3i64.to_le_bytes()[4..], &[two[1].as_fd()]);
        });
        assert!(matches!(error, Error::SurplusDescriptors { count: 2, .. }), "{error:?}");
    });
}

#[test]
fn more_descriptors_than_there_is_room_for_are_an_error_and_are_closed() {
    alone(|| {
        let many: Vec<_> = (0..100).map(|_| eventfd()).collect();
        let many: Vec<_> = many.iter().map(AsFd::as_fd).collect();
        let error = refused(|server| {
            server.greet();
            server.bytes(&3i64.to_le_bytes(), &many);
        });
        assert!(matches!(error, Error::Truncated), "{error:?}");
        let (_, error) = disconnected(|server| server.bytes(&4i64.to_le_bytes(), &many));
        assert!(matches!(error, Error::Truncated), "{error:?}");
    });
}

#[test]
fn with_no_descriptor_left_it_is_an_error_that_names_the_limit() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 1);
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        // One more can be opened, and that will be the memory; a vector cannot.
        let next = File::open("/").expect("one can be opened").as_raw_fd();
        setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(next).expect("a number") + 1, hard)
            .expect("a lower limit");
        let error = client().vectors(1).adopt(socket).map(drop);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("the old limit");
        let error = error.expect_err("it has no descriptor for its vector");
        assert!(matches!(error, Error::Truncated), "{error:?}");
        says(&error, &["RLIMIT_NOFILE"]);
    });
}

#[test]
fn a_vector_that_is_no_eventfd_is_an_error() {
    alone(|| {
        let (_reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("a pipe");
        let (socket, _other_end) = UnixStream::pair().expect("a socket pair");
        for fd in [writer, OwnedFd::from(socket), OwnedFd::from(memory(4096))] {
            let error = refused(|server| {
                server.greet();
                server.vectors(9, 1);
                server.give(9, &fd);
            });
            assert!(matches!(error, Error::NotAnEventfd { peer: 9, vector: 1 }), "{error:?}");
        }
    });
}

#[test]
fn a_blocking_eventfd_is_made_non_blocking() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        let blocking = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("an eventfd");
        server.greet();
        server.give(3, &blocking);
        let client = client().vectors(1).adopt(socket).expect("a right greeting");
        assert_eq!(client.vector(0).expect("it has one").take().expect("an eventfd"), 0);
        // A full one is as good as rung, and nobody waits for room in it.
        blocking.write(u64::MAX - 1).expect("there is room");
        client.ring(3, 0).expect("it does not wait");
        assert_eq!(client.vector(0).expect("it has one").take().expect("it"), u64::MAX - 1);
    });
}

#[test]
fn a_vector_that_was_made_blocking_later_is_looked_at_without_waiting() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        let shared = eventfd();
        server.greet();
        server.give(3, &shared);
        let mut client = client().vectors(1).adopt(socket).expect("a right greeting");
        // As QEMU does to each that it receives, for a moment.
        fcntl(&shared, FcntlArg::F_SETFL(OFlag::empty())).expect("it is an open file");
        let vector = client.vector(0).expect("it has one");
        assert_eq!(vector.take().expect("it does not wait"), 0);
        assert!(!vector.spin(SHORT).wait(Some(SHORT)).expect("nor for ever"));
        assert!(client.dispatch().expect("nor here").is_empty());
        shared.write(2).expect("there is room");
        let events = client.dispatch().expect("it works");
        assert!(matches!(events[..], [Event::Rung { vector: 0, count: 2 }]), "{events:?}");
    });
}

#[test]
fn more_vectors_than_msix_has_are_an_error() {
    alone(|| {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
        let (server, socket) = Wrong::pair();
        // They do not fit in the socket, so somebody has to go on sending.
        let sending = thread::spawn(move || {
            server.greet();
            let one = eventfd();
            for _ in 0..=2048 {
                server.give(9, &one);
            }
        });
        let error = client().vectors(1).adopt(socket).map(drop).unwrap_err();
        sending.join().expect("it could send");
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("the old limit");
        assert!(matches!(error, Error::TooManyVectors { peer: 9 }), "{error:?}");
        says(&error, &["2048", "9"]);
    });
}

#[test]
fn the_leaving_of_who_was_not_here_is_an_error() {
    alone(|| {
        let error = refused(|server| {
            server.greet();
            server.say(7);
        });
        assert!(matches!(error, Error::UnknownLeft { peer: 7 }), "{error:?}");
        let (events, error) = disconnected(|server| {
            server.vectors(7, 1);
            server.say(7);
            server.say(7);
        });
        assert!(
            matches!(events[..], [Event::Joined { peer: 7, vectors: 1 }, Event::Left { peer: 7 }]),
            "{events:?}"
        );
        assert!(matches!(error, Error::UnknownLeft { peer: 7 }), "{error:?}");
    });
}

#[test]
fn the_leaving_of_oneself_is_an_error() {
    alone(|| {
        let (_, error) = disconnected(|server| server.say(3));
        assert!(matches!(error, Error::SelfLeft { peer: 3 }), "{error:?}");
    });
}

#[test]
fn a_server_that_ends_in_the_middle_is_an_error() {
    alone(|| {
        for length in 0..8 {
            let error = refused(|server| {
                server.greet();
                server.bytes(&3i64.to_le_bytes()[..length], &[]);
                server.0.shutdown(std::net::Shutdown::Both).expect("it is connected");
            });
            match length {
                0 => assert!(matches!(error, Error::Closed), "{error:?}"),
                _ => {
                    assert!(matches!(error, Error::CutShort { bytes } if bytes == length));
                    says(&error, &[&length.to_string(), "has 8"]);
                }
            }
        }
        let (_, error) = disconnected(|server| {
            server.0.shutdown(std::net::Shutdown::Both).expect("it is connected");
        });
        assert!(error.is_closed(), "{error:?}");
    });
}

#[test]
fn messages_that_come_byte_by_byte_are_whole_messages() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        let sending = thread::spawn(move || {
            let memory = memory(4096);
            let eventfd = eventfd();
            for (value, fd) in [
                (0i64, None),
                (3, None),
                (-1, Some(memory.as_fd())),
                (9, Some(eventfd.as_fd())),
                (3, Some(eventfd.as_fd())),
            ] {
                for (place, byte) in value.to_le_bytes().iter().enumerate() {
                    let fds = fd.filter(|_| place == 0);
                    server.bytes(&[*byte], fds.as_slice());
                }
            }
            server
        });
        let client = client().vectors(1).adopt(socket).expect("a right greeting");
        assert_eq!((client.id(), client.vectors(), client.peers().len()), (3, 1, 1));
        drop(sending.join().expect("it could send"));
    });
}

/// What a server says before it falls silent, and what is missing then.
type Stage = (&'static dyn Fn(&Wrong), &'static str);

#[test]
fn a_server_that_says_nothing_is_an_error_in_time() {
    alone(|| {
        let stages: [Stage; 5] = [
            (&|_| (), "protocol version"),
            (&|server| server.say(0), "client's id"),
            (
                &|server| {
                    server.say(0);
                    server.say(3);
                },
                "shared memory",
            ),
            (&Wrong::greet, "own first vector"),
            (
                &|server| {
                    server.greet();
                    server.vectors(3, 1);
                },
                "own vector 1, of 2 asked for",
            ),
        ];
        for (speak, missing) in stages {
            let (server, socket) = Wrong::pair();
            speak(&server);
            let start = Instant::now();
            let error = client().vectors(2).connect_timeout(SHORT).adopt(socket).unwrap_err();
            assert!(start.elapsed() >= SHORT, "it waits as long as it may");
            assert!(start.elapsed() < PATIENCE, "and no longer");
            assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
            says(&error, &[missing, "300ms"]);
        }
    });
}

#[test]
fn a_server_that_never_ends_its_greeting_is_an_error_in_time() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        let sending = thread::spawn(move || {
            server.say(0);
            server.say(3);
            let one = eventfd();
            let parts = [IoSlice::new(&[7, 0, 0, 0, 0, 0, 0, 0])];
            let number = [one.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&number)];
            // A peer that joins and leaves for ever, until the client has enough.
            for turn in 0u64.. {
                let rights = if turn % 2 == 0 { &rights[..] } else { &[] };
                let flags = MsgFlags::MSG_NOSIGNAL;
                if sendmsg::<()>(server.0.as_raw_fd(), &parts, rights, flags, None).is_err() {
                    return;
                }
            }
        });
        let error = client().connect_timeout(SHORT).adopt(socket).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        sending.join().expect("it ends when the client is gone");
    });
}

#[test]
fn a_server_that_does_not_accept_is_an_error_in_time() {
    alone(|| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).expect("a socket");
        nix::sys::socket::listen(&listener, Backlog::new(0).expect("0 is one")).expect("listen");
        let _queued = UnixStream::connect(&path).expect("the one that may wait");
        let error = client().connect_timeout(SHORT).connect(&path).unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        says(&error, &["the acceptance of the connection"]);
    });
}

#[test]
fn a_path_that_cannot_be_is_an_error() {
    alone(|| {
        let long = "x".repeat(108);
        assert!(matches!(Client::connect(&long), Err(Error::SocketPathLength { .. })));
        assert!(matches!(Client::connect(""), Err(Error::SocketPathLength { .. })));
        for path in ["/nowhere/at/all", "/etc/passwd", "a\0b", "\0abstract"] {
            let error = Client::connect(path).unwrap_err();
            assert!(matches!(error, Error::Connect { .. }), "{path:?}: {error:?}");
        }
        let file = File::open("/etc/passwd").expect("a file");
        assert!(Client::adopt(file).is_err(), "a file is no socket");
        assert!(!Path::new("a").exists());
    });
}

#[test]
fn vectors_that_come_after_the_quiet_time_are_added() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 1);
        let mut client = client().quiet_time(SHORT / 10).adopt(socket).expect("a right greeting");
        assert_eq!(client.vectors(), 1);
        server.vectors(3, 1);
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(matches!(events[..], [Event::Vector { vector: 1 }]), "{events:?}");
        client.ring(3, 1).expect("it is there now");
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(matches!(events[..], [Event::Rung { vector: 1, count: 1 }]), "{events:?}");
    });
}

#[test]
fn the_greeting_is_complete_when_the_server_goes_on_to_another_peer() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 2);
        server.vectors(4, 1);
        let long = Duration::from_secs(3600);
        let mut client = client().quiet_time(long).adopt(socket).expect("a right greeting");
        assert_eq!(client.vectors(), 2);
        assert!(client.dispatch().expect("it works").is_empty(), "half of a peer is no news");
        server.vectors(4, 1);
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(matches!(events[..], [Event::Joined { peer: 4, vectors: 2 }]), "{events:?}");
    });
}

#[test]
fn a_peer_that_left_before_it_was_whole_says_nothing_about_how_many_there_are() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(9, 1);
        server.say(9);
        server.vectors(8, 3);
        server.vectors(3, 3);
        let long = Duration::from_secs(3600);
        let client = client().quiet_time(long).adopt(socket).expect("a right greeting");
        assert_eq!((client.vectors(), client.peers().len()), (3, 1));
    });
}

#[test]
fn a_peer_with_fewer_vectors_has_joined_when_the_next_one_comes() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 2);
        let mut client = client().vectors(2).adopt(socket).expect("a right greeting");
        server.vectors(4, 1);
        server.vectors(5, 2);
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(
            matches!(
                events[..],
                [Event::Joined { peer: 4, vectors: 1 }, Event::Joined { peer: 5, vectors: 2 }]
            ),
            "{events:?}"
        );
    });
}

#[test]
fn a_goodbye_between_two_vectors_of_a_peer_does_not_make_it_whole() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 2);
        server.vectors(4, 2);
        let mut client = client().vectors(2).adopt(socket).expect("a right greeting");
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(matches!(events[..], [Event::Joined { peer: 4, vectors: 2 }]), "{events:?}");
        server.vectors(5, 1);
        server.say(4);
        server.vectors(5, 1);
        let events = client.wait(Some(PATIENCE)).expect("it can wait");
        assert!(
            matches!(events[..], [Event::Left { peer: 4 }, Event::Joined { peer: 5, vectors: 2 }]),
            "{events:?}"
        );
    });
}

/// No mode tells an epoll from an eventfd.
#[test]
fn a_vector_of_its_own_that_cannot_be_read_ends_the_connection() {
    alone(|| {
        let ready = eventfd();
        ready.write(1).expect("it takes a number");
        let (events, reason) = disconnected(|server| {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll");
            epoll.add(&ready, EpollEvent::new(EpollFlags::EPOLLIN, 0)).expect("it takes that");
            server.give(3, &epoll.0);
        });
        assert!(matches!(events[..], [Event::Vector { vector: 1 }]), "{events:?}");
        assert!(matches!(reason, Error::NotAnEventfd { peer: 3, vector: 1 }), "{reason:?}");
    });
}

#[test]
fn a_doorbell_that_is_full_and_blocking_does_not_block_the_client() {
    alone(|| {
        let (server, mut client) = connected();
        let shared = eventfd();
        server.give(7, &shared);
        client.wait(Some(PATIENCE)).expect("it joins");
        let doorbell = client.doorbell(7, 0).expect("it has joined");
        shared.write(u64::MAX - 1).expect("there is room");
        doorbell.ring().expect("full and non-blocking");
        fcntl(&shared, FcntlArg::F_SETFL(OFlag::empty())).expect("it is an open file");
        let (done, waits) = std::sync::mpsc::channel();
        let ringing = thread::spawn(move || done.send(doorbell.ring().is_ok()));
        let rung = waits.recv_timeout(PATIENCE);
        // So that the thread ends in any case.
        let count = shared.read().expect("it is full");
        assert_eq!((rung, count), (Ok(true), u64::MAX - 1));
        ringing.join().expect("no panic").expect("it was heard");
        client.ring(7, 0).expect("blocking, but not full");
        assert_eq!(shared.read(), Ok(1));
    });
}

#[test]
fn a_greeting_costs_the_same_for_each_message_however_many_peers_there_are() {
    const PEERS: u16 = 10_000;
    const MORE: usize = 100_000;
    alone(|| {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
        let (server, socket) = Wrong::pair();
        let sending = thread::spawn(move || {
            server.say(0);
            server.say(PEERS.into());
            server.give(-1, memory(4096));
            let one = eventfd();
            (0..PEERS).for_each(|peer| server.give(peer.into(), &one));
            for _ in 0..MORE {
                server.give(60_000, &one);
                server.say(60_000);
            }
            server.vectors(PEERS, 1);
            server
        });
        let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
        let before = clock.now().expect("a clock");
        // It is not told how many vectors there are, so each message may complete the greeting.
        let client = client().connect_timeout(6 * PATIENCE).adopt(socket);
        let took = Duration::from(clock.now().expect("a clock") - before);
        assert_eq!(client.as_ref().map(|client| client.peers().len()).ok(), Some(PEERS.into()));
        drop((client, sending.join().expect("it could send")));
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).expect("the old limit");
        assert!(took < Duration::from_secs(3), "{took:?}");
    });
}

#[test]
fn a_client_may_wait_for_ever() {
    alone(|| {
        let (server, socket) = Wrong::pair();
        server.greet();
        server.vectors(3, 1);
        let client = client().connect_timeout(Duration::MAX).adopt(socket);
        assert_eq!(client.expect("a right greeting").vectors(), 1);
    });
}

#[test]
fn a_client_never_says_a_word_to_the_server() {
    alone(|| {
        let (server, mut client) = connected();
        server.vectors(7, 1);
        client.wait(Some(PATIENCE)).expect("it works");
        client.ring_all().expect("they are there");
        drop(client);
        let mut left = Vec::new();
        let read = std::io::Read::read_to_end(&mut &server.0, &mut left);
        assert_eq!(read.expect("its end"), 0);
        assert!((&server.0).write(&[0]).is_err(), "and it is gone");
    });
}
