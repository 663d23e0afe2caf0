// SPDX-License-Identifier: GPL-2.0-or-later
//! What a caller sees of a client's error: its kind, its source, and each text once.

#![forbid(unsafe_code)]

use std::error::Error as _;
use std::io;

use anyhow::anyhow;
use ivshmem::client::{Client, Error, ErrorKind};

/// One error of each sort that has a source.
fn with_sources() -> Vec<Error> {
    let source = || io::Error::other("SOURCE");
    vec![
        Error::Connect { path: "/socket".into(), source: source() },
        Error::Receive { source: source() },
        Error::Memory { action: "map", source: source() },
        Error::System { action: "wait for events", source: source() },
    ]
}

#[test]
fn anyhow_prints_the_text_of_a_source_exactly_once() {
    for error in with_sources() {
        assert_eq!(error.source().map(ToString::to_string).as_deref(), Some("SOURCE"));
        let own = error.to_string();
        assert!(!own.contains("SOURCE"), "{own}");
        let text = format!("{:#}", anyhow!(error));
        assert_eq!(text, format!("{own}: SOURCE"));
    }
}

#[test]
fn an_error_of_a_system_call_gives_its_errno() {
    let error = Client::connect("/nowhere/at/all").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Connect);
    let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    assert_eq!(source.map(io::Error::kind), Some(io::ErrorKind::NotFound));
}

#[test]
fn the_kind_of_an_error_says_who_is_to_act() {
    for (error, kind) in [
        (Error::UnknownPeer { peer: 1 }, ErrorKind::InvalidArgument),
        (Error::Closed, ErrorKind::Closed),
        (Error::Version { version: 2 }, ErrorKind::Protocol),
        (Error::Refused { value: 1, what: "the protocol version" }, ErrorKind::Refused),
        (Error::MemoryKind { kind: "a pipe" }, ErrorKind::Memory),
        (Error::Truncated, ErrorKind::System),
    ] {
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.source().is_none());
    }
    let long = Client::connect("x".repeat(200)).unwrap_err();
    assert_eq!(long.kind(), ErrorKind::InvalidArgument);
}
