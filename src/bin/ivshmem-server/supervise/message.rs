// SPDX-License-Identifier: GPL-2.0-or-later
//! The text of a notification, as sd_notify(3) has it: assignments, one a line. Unknown ones are ignored.

#![forbid(unsafe_code)]

/// Names that systemd would not take either are replaced by this one, as it does.
pub(super) const UNNAMED: &str = "stored";

/// What one notification says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Message<'a> {
    pub(super) ready: bool,
    pub(super) status: Option<&'a str>,
    pub(super) barrier: bool,
    pub(super) store: bool,
    pub(super) remove: bool,
    /// `FDPOLL=0`: systemd keeps the descriptors when they hang up. The supervisor's own store always does.
    pub(super) keep_hung_up: bool,
    /// A valid name.
    pub(super) name: Option<&'a str>,
}

impl<'a> Message<'a> {
    pub(super) fn parse(text: &'a str) -> Self {
        let mut message = Self::default();
        for line in text.lines() {
            match line.split_once('=') {
                Some(("READY", "1")) => message.ready = true,
                Some(("STATUS", status)) => message.status = Some(status),
                Some(("BARRIER", "1")) => message.barrier = true,
                Some(("FDSTORE", "1")) => message.store = true,
                Some(("FDSTOREREMOVE", "1")) => message.remove = true,
                Some(("FDPOLL", "0")) => message.keep_hung_up = true,
                Some(("FDNAME", name)) => message.name = Some(name).filter(|name| is_valid(name)),
                _ => {}
            }
        }
        message
    }
}

/// The rule of systemd: printable ASCII without a colon, which separates the names in LISTEN_FDNAMES.
fn is_valid(name: &str) -> bool {
    let allowed = |byte| matches!(byte, b' '..=b'~') && byte != b':';
    !name.is_empty() && name.len() <= 255 && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_are_read_in_any_order_and_unknown_ones_are_ignored() {
        let message = Message::parse("FDNAME=c12\nMAINPID=5\nFDPOLL=0\nX\n\nFDSTORE=1\n");
        let expected =
            Message { store: true, keep_hung_up: true, name: Some("c12"), ..Message::default() };
        assert_eq!(message, expected);
        let message = Message::parse("READY=1\nSTATUS=a=b");
        let expected = Message { ready: true, status: Some("a=b"), ..Message::default() };
        assert_eq!(message, expected);
        assert_eq!(Message::parse("READY=0\nFDSTORE=2\nBARRIER"), Message::default());
    }

    #[test]
    fn a_name_that_would_break_the_list_of_names_is_none() {
        for name in ["", "a:b", "a\tb", "é", &"x".repeat(256)] {
            assert_eq!(Message::parse(&format!("FDNAME={name}")).name, None, "{name:?}");
        }
    }
}
