// SPDX-License-Identifier: GPL-2.0-or-later
//! The methods: what a call does, and what it is answered.
//!
//! To add a method: describe it in `org.ivshmem.Server.varlink`, and add it to [`answer`].

#![forbid(unsafe_code)]

use ivshmem::Server;
use serde_json::{Value, json};

use super::metrics;
use super::status::Facts;
use super::varlink::{Call, Error};

const SERVICE: &str = "org.varlink.service";
const OWN: &str = "org.ivshmem.Server";

/// The interfaces, and their descriptions.
const INTERFACES: [(&str, &str); 2] = [
    (SERVICE, include_str!("org.varlink.service.varlink")),
    (OWN, include_str!("org.ivshmem.Server.varlink")),
];

/// What a call is answered.
#[derive(Debug, PartialEq)]
pub(super) enum Answer {
    Reply(Value),
    /// The state of the server, of which the connection sends some at a time.
    Status,
    /// The events from now on.
    Watch,
}

/// Does what a call asks for. `caller` is its process, for the log.
pub(super) fn answer(
    call: &mut Call,
    server: &mut Server,
    facts: &Facts,
    caller: &str,
) -> Result<Answer, Error> {
    let method = call.method.clone();
    let Some((interface, name)) = method.rsplit_once('.') else {
        return Err(Error::interface_not_found(&method));
    };
    if !INTERFACES.iter().any(|(known, _)| *known == interface) {
        return Err(Error::interface_not_found(interface));
    }
    if call.upgrade {
        // No method changes the protocol.
        return Err(Error::method_not_implemented(&method));
    }
    match (interface, name) {
        (SERVICE, "GetInfo") => {
            call.finish()?;
            Ok(Answer::Reply(json!({
                "vendor": "ivshmem-server",
                "product": "ivshmem-server",
                "version": env!("CARGO_PKG_VERSION"),
                "url": env!("CARGO_PKG_REPOSITORY"),
                "interfaces": INTERFACES.map(|(name, _)| name),
            })))
        }
        (SERVICE, "GetInterfaceDescription") => {
            let wanted = call.take("interface", |value| value.as_str().map(str::to_owned))?;
            call.finish()?;
            match INTERFACES.iter().find(|(name, _)| *name == wanted) {
                Some((_, text)) => Ok(Answer::Reply(json!({"description": text}))),
                None => Err(Error::interface_not_found(&wanted)),
            }
        }
        (OWN, "Status") => call.finish().map(|()| Answer::Status),
        (OWN, "Watch") => {
            call.finish()?;
            if call.more { Ok(Answer::Watch) } else { Err(Error::expected_more()) }
        }
        (OWN, "Disconnect") => {
            let id = call.take("id", |value| u16::try_from(value.as_u64()?).ok())?;
            call.finish()?;
            if server.disconnect(id) {
                log::info!("peer {id} is disconnected by {caller} at the control socket");
                Ok(Answer::Reply(json!({})))
            } else {
                Err(Error::new("org.ivshmem.Server.NoSuchPeer", json!({"id": id})))
            }
        }
        (OWN, "Metrics") => {
            call.finish()?;
            Ok(Answer::Reply(json!({"text": metrics::text(server, facts)})))
        }
        _ => Err(Error::method_not_found(&method)),
    }
}

/// The reply to a connection that is one too many.
pub(super) fn too_many(limit: usize) -> Error {
    Error::new("org.ivshmem.Server.TooManyConnections", json!({"limit": limit}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, SystemTime};

    fn call(method: &str, rest: &str) -> Call {
        let text = format!(r#"{{"method": "{method}" {rest}}}"#);
        Call::parse(text.as_bytes()).expect("it is a call")
    }

    #[test]
    fn each_call_is_answered_or_has_its_standard_error() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        let mut server = Server::builder().socket_path(&path).start().expect("it starts");
        let _client = UnixStream::connect(&path).expect("it listens");
        server.wait(Some(Duration::from_secs(10))).expect("it serves");
        let facts = Facts { socket: "/s".to_owned(), started: SystemTime::now() };
        let mut answer =
            |method, rest| answer(&mut call(method, rest), &mut server, &facts, "a test");

        assert_eq!(answer("org.ivshmem.Server.Status", ""), Ok(Answer::Status));
        assert_eq!(answer("org.ivshmem.Server.Watch", r#", "more": true"#), Ok(Answer::Watch));
        let disconnect = "org.ivshmem.Server.Disconnect";
        let first = answer(disconnect, r#", "parameters": {"id": 0}"#);
        assert_eq!(first, Ok(Answer::Reply(json!({}))));
        let invalid = |name| Err(Error::invalid_parameter(name));
        for (method, rest, expected) in [
            ("Status", "", Err(Error::interface_not_found("Status"))),
            ("a.b.Status", "", Err(Error::interface_not_found("a.b"))),
            ("org.ivshmem.Server.status", "", {
                Err(Error::method_not_found("org.ivshmem.Server.status"))
            }),
            ("org.ivshmem.Server.Status", r#", "parameters": {"x": 1}"#, invalid("x")),
            ("org.ivshmem.Server.Status", r#", "upgrade": true"#, {
                Err(Error::method_not_implemented("org.ivshmem.Server.Status"))
            }),
            ("org.ivshmem.Server.Watch", "", Err(Error::expected_more())),
            (disconnect, "", invalid("id")),
            (disconnect, r#", "parameters": {"id": 65536}"#, invalid("id")),
            (disconnect, r#", "parameters": {"id": 7}"#, {
                Err(Error::new("org.ivshmem.Server.NoSuchPeer", json!({"id": 7})))
            }),
            ("org.varlink.service.GetInterfaceDescription", "", invalid("interface")),
        ] {
            assert_eq!(answer(method, rest), expected, "{method} {rest}");
        }
    }
}
