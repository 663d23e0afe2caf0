// SPDX-License-Identifier: GPL-2.0-or-later
//! A greeting that breaks the protocol, or ends too early, is an error that names what was wrong.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use ivshmem::client::{Error, ErrorKind};
use nix::fcntl::OFlag;

use super::{Wrong, alone, client, disconnected, eventfd, memory, refused, says};

#[test]
fn a_wrong_version_is_an_error() {
    alone(|| {
        for version in [2, -1, 7, i64::MAX, i64::MIN] {
            let error = refused(|server| server.say(version));
            assert!(matches!(error, Error::Version { version: v } if v == version), "{error:?}");
            says(&error, &["version", &version.to_string(), "knows 0"]);
        }
    });
}

#[test]
fn a_refusal_by_the_server_is_an_error_of_its_own() {
    alone(|| {
        for (sent_before, value, what) in [
            (0, 1, "the protocol version"),
            (1, -2, "the client's id"),
            (2, -2, "the shared memory"),
        ] {
            let error = refused(|server| {
                [0, 3].iter().take(sent_before).for_each(|&value| server.say(value));
                server.say(value);
            });
            assert!(matches!(error, Error::Refused { value: v, .. } if v == value), "{error:?}");
            assert_eq!(error.kind(), ErrorKind::Refused);
            says(&error, &["refused this client", &value.to_string(), what, "its log"]);
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
        for id in [-1, -3, 65_536, i64::MAX, i64::MIN] {
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
        object.set_len(4096).expect("it is not sealed");
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
fn a_server_that_ends_during_the_greeting_is_an_error() {
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
fn messages_that_come_byte_by_byte_are_understood() {
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
