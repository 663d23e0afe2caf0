// SPDX-License-Identifier: GPL-2.0-or-later
//! What the errors of a server say, and that each text is printed once.

#![forbid(unsafe_code)]

use std::error::Error as _;

use ivshmem::{Error, ErrorKind, ListenerError, MemoryError, MemorySource, Server};

/// One error of each room, and the errno of its source.
fn errors() -> [Error; 2] {
    let builder = || Server::builder().socket_path("/nowhere/socket");
    let memory = builder().memory(MemorySource::Directory("/nowhere".into())).start();
    let listener = builder().start();
    [memory, listener].map(|started| started.expect_err("there is no such directory"))
}

#[test]
fn anyhow_prints_each_text_of_an_error_once() {
    for error in errors() {
        let own = error.to_string();
        let source = error.source().expect("the system's reason").to_string();
        assert!(!own.contains(&source), "{own:?} repeats {source:?}");
        assert_eq!(error.chain().to_string(), format!("{own}: {source}"));
        let printed = format!("{:#}", anyhow::Error::from(error));
        assert_eq!(printed, format!("{own}: {source}"));
    }
}

#[test]
fn a_composed_error_has_the_kind_and_the_errno_of_what_it_is_made_of() {
    let [memory, listener] = errors();
    assert!(matches!(memory, Error::Memory(MemoryError::System { .. })), "{memory:?}");
    assert!(matches!(listener, Error::Listener(ListenerError::Socket { .. })), "{listener:?}");
    for error in [memory, listener] {
        assert_eq!((error.kind(), error.errno()), (ErrorKind::System, libc::ENOENT), "{error}");
    }
}

#[test]
fn a_socket_mode_with_a_given_listener_is_an_error_and_not_ignored() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("socket"));
    let builder = Server::builder().listener(listener.expect("the place is new"));
    let error = builder.socket_mode(0o660).start().expect_err("the mode is the caller's");
    assert_eq!((error.kind(), error.errno()), (ErrorKind::InvalidInput, libc::EINVAL));
    assert!(error.to_string().contains("660"), "{error}");
}
