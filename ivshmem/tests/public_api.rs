// SPDX-License-Identifier: GPL-2.0-or-later
//! The public types can be sent to other threads and shared with them.

#![forbid(unsafe_code)]

use ivshmem::client;

const fn is_send_and_sync<T: Send + Sync>() {}

#[test]
fn public_types_can_be_sent_to_and_shared_with_other_threads() {
    const {
        is_send_and_sync::<ivshmem::Builder>();
        is_send_and_sync::<ivshmem::Client>();
        is_send_and_sync::<ivshmem::Credentials>();
        is_send_and_sync::<ivshmem::Error>();
        is_send_and_sync::<ivshmem::ErrorKind>();
        is_send_and_sync::<ivshmem::Event>();
        is_send_and_sync::<ivshmem::LeaveReason>();
        is_send_and_sync::<ivshmem::Applicant<'_>>();
        is_send_and_sync::<ivshmem::Keeper>();
        is_send_and_sync::<ivshmem::ListenerError>();
        is_send_and_sync::<ivshmem::MemoryError>();
        is_send_and_sync::<ivshmem::MemorySource>();
        is_send_and_sync::<ivshmem::PathListener>();
        is_send_and_sync::<ivshmem::Peer<'_>>();
        is_send_and_sync::<ivshmem::Refusal>();
        is_send_and_sync::<ivshmem::Server>();
        is_send_and_sync::<ivshmem::Stats>();
        is_send_and_sync::<ivshmem::Stopper>();
        is_send_and_sync::<client::Builder>();
        is_send_and_sync::<client::Client>();
        is_send_and_sync::<client::Doorbell>();
        is_send_and_sync::<client::Error>();
        is_send_and_sync::<client::ErrorKind>();
        is_send_and_sync::<client::Event>();
        is_send_and_sync::<client::Memory>();
        is_send_and_sync::<client::Peer>();
        is_send_and_sync::<client::Vector>();
    }
}

#[cfg(feature = "tokio")]
#[test]
fn futures_of_the_asynchronous_types_can_be_spawned() {
    fn is_send<T: Send>(_: T) {}
    fn check(server: &mut ivshmem::AsyncServer, client: &mut ivshmem::AsyncClient) {
        is_send(server.next_event());
        is_send(server.run());
        is_send(client.next_event());
        is_send(ivshmem::AsyncClient::connect("/socket"));
    }
    let _ = check;
    const {
        is_send_and_sync::<ivshmem::AsyncClient>();
        is_send_and_sync::<ivshmem::AsyncServer>();
    }
}

/// `Chain` refers to an error of any type, which need not be Send.
#[test]
fn no_public_type_is_missing_here() {
    for (module, source) in
        [("ivshmem", include_str!("../src/lib.rs")), ("client", include_str!("../src/client.rs"))]
    {
        let exports = source.split("\npub use ").skip(1).filter_map(|rest| rest.split(';').next());
        let names = exports.flat_map(|list| list.split([':', ',', '{', '}', ' ', '\n']));
        let mut types = 0;
        for name in names.filter(|name| name.contains(char::is_uppercase)) {
            if name.chars().all(|letter| letter.is_uppercase() || letter == '_') || name == "Chain"
            {
                continue;
            }
            // A type that is renamed by `as` has the name of another one.
            let wanted = [format!("<{module}::{name}>"), format!("<{module}::{name}<'_>>")];
            let here = include_str!("public_api.rs");
            assert!(wanted.iter().any(|wanted| here.contains(wanted)), "{module}::{name}");
            types += 1;
        }
        assert!(types >= 8, "{module}: {types}");
    }
}
