// SPDX-License-Identifier: GPL-2.0-or-later
//! The messages of Varlink (<https://varlink.org>): JSON objects, each ended by a NUL byte.
//!
//! It is written by hand because it is small, and because the memory that a client can use up must
//! be bounded: the crates for it keep whole replies, and calls of any length and number.
//!
//! This module knows calls, replies and errors. It does not know what the methods do.

#![forbid(unsafe_code)]

use serde_json::{Map, Value, json};

/// A call.
#[derive(Debug, PartialEq)]
pub(super) struct Call {
    /// The name of the interface, a dot, and the name of the method.
    pub(super) method: String,
    pub(super) parameters: Map<String, Value>,
    /// The caller takes several replies.
    pub(super) more: bool,
    /// The caller wants no reply.
    pub(super) oneway: bool,
    /// The caller wants to speak another protocol afterwards.
    pub(super) upgrade: bool,
}

impl Call {
    /// Parses a message without its NUL. None if it is not a call: the connection cannot go on.
    pub(super) fn parse(message: &[u8]) -> Option<Self> {
        let Ok(Value::Object(mut message)) = serde_json::from_slice(message) else { return None };
        let Some(Value::String(method)) = message.remove("method") else { return None };
        let parameters = match message.remove("parameters") {
            Some(Value::Object(parameters)) => parameters,
            None | Some(Value::Null) => Map::new(),
            Some(_) => return None,
        };
        let mut flag = |name| match message.remove(name) {
            Some(Value::Bool(flag)) => Some(flag),
            None | Some(Value::Null) => Some(false),
            Some(_) => None,
        };
        let (more, oneway, upgrade) = (flag("more")?, flag("oneway")?, flag("upgrade")?);
        Some(Self { method, parameters, more, oneway, upgrade })
    }

    /// Takes a parameter that must be there and that `convert` accepts.
    pub(super) fn take<T>(
        &mut self,
        name: &'static str,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T, Error> {
        let value = self.parameters.remove(name);
        value.as_ref().and_then(convert).ok_or_else(|| Error::invalid_parameter(name))
    }

    /// The call may have no parameter that was not taken.
    pub(super) fn finish(&self) -> Result<(), Error> {
        match self.parameters.keys().next() {
            Some(name) => Err(Error::invalid_parameter(name)),
            None => Ok(()),
        }
    }
}

/// An error as a reply.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Error {
    name: String,
    parameters: Value,
}

impl Error {
    pub(super) fn new(name: &str, parameters: Value) -> Self {
        Self { name: name.to_owned(), parameters }
    }

    fn standard(name: &str, parameters: Value) -> Self {
        Self { name: format!("org.varlink.service.{name}"), parameters }
    }

    pub(super) fn interface_not_found(interface: &str) -> Self {
        Self::standard("InterfaceNotFound", json!({"interface": interface}))
    }

    pub(super) fn method_not_found(method: &str) -> Self {
        Self::standard("MethodNotFound", json!({"method": method}))
    }

    pub(super) fn method_not_implemented(method: &str) -> Self {
        Self::standard("MethodNotImplemented", json!({"method": method}))
    }

    pub(super) fn invalid_parameter(parameter: &str) -> Self {
        Self::standard("InvalidParameter", json!({"parameter": parameter}))
    }

    pub(super) fn permission_denied() -> Self {
        Self::standard("PermissionDenied", json!({}))
    }

    pub(super) fn expected_more() -> Self {
        Self::standard("ExpectedMore", json!({}))
    }

    /// The message.
    pub(super) fn message(&self) -> Vec<u8> {
        message(&json!({"error": self.name, "parameters": self.parameters}))
    }
}

/// A reply as a message. `continues` says that another one follows.
pub(super) fn reply(parameters: &Value, continues: bool) -> Vec<u8> {
    if continues {
        message(&json!({"parameters": parameters, "continues": true}))
    } else {
        message(&json!({"parameters": parameters}))
    }
}

fn message(value: &Value) -> Vec<u8> {
    // serde_json escapes a NUL within a string.
    let mut bytes = value.to_string().into_bytes();
    bytes.push(0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_an_object_with_a_method() {
        let call = Call::parse(br#"{"method": "a.b.C", "parameters": {"id": 1}, "more": true}"#);
        let mut call = call.expect("it is a call");
        assert_eq!((call.method.as_str(), call.more, call.oneway), ("a.b.C", true, false));
        assert_eq!(call.take("id", Value::as_u64), Ok(1));
        assert_eq!(call.finish(), Ok(()));
        for text in [
            "",
            "x",
            "1",
            "[]",
            "{}",
            r#"{"method": 1}"#,
            r#"{"method": "a.b.C", "parameters": []}"#,
            r#"{"method": "a.b.C", "more": 1}"#,
            r#"{"method": "a.b.C"} {"method": "a.b.C"}"#,
        ] {
            assert_eq!(Call::parse(text.as_bytes()), None, "{text}");
        }
        assert_eq!(Call::parse(&vec![b'['; 100_000]), None, "too deep");
        assert_eq!(Call::parse(b"{\"method\": \"\xff\"}"), None, "not UTF-8");
    }

    #[test]
    fn a_parameter_that_is_missing_wrong_or_unknown_is_an_error_with_its_name() {
        let call = |parameters: &str| {
            let text = format!(r#"{{"method": "a.b.C", "parameters": {parameters}}}"#);
            Call::parse(text.as_bytes()).expect("it is a call")
        };
        for parameters in ["{}", r#"{"id": "1"}"#, r#"{"id": -1}"#, r#"{"id": 1.5}"#] {
            let error = call(parameters).take("id", Value::as_u64).expect_err("it is wrong");
            assert_eq!(error, Error::invalid_parameter("id"));
        }
        assert_eq!(call(r#"{"x": 1}"#).finish(), Err(Error::invalid_parameter("x")));
    }

    #[test]
    fn a_message_ends_with_its_only_nul() {
        for message in
            [reply(&json!({"text": "a\0b"}), true), Error::method_not_found("a\0b").message()]
        {
            assert_eq!(message.iter().position(|&byte| byte == 0), Some(message.len() - 1));
        }
    }
}
