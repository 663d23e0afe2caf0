// SPDX-License-Identifier: GPL-2.0-or-later
//! Stdout: text or JSON, with colours on a terminal only.

#![forbid(unsafe_code)]

use std::io::{self, IsTerminal, Write};

pub(crate) struct Output {
    pub(crate) json: bool,
    pub(crate) colours: bool,
    /// A write failed, for example because the reader has closed the pipe.
    pub(crate) closed: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let colours = io::stdout().is_terminal() && !is_set("NO_COLOR") && !is_dumb;
        Self { json, colours, closed: false }
    }

    pub(crate) fn print(&mut self, text: &str) {
        self.print_bytes(text.as_bytes());
    }

    pub(crate) fn print_bytes(&mut self, bytes: &[u8]) {
        let mut stdout = io::stdout();
        self.closed |= stdout.write_all(bytes).and_then(|()| stdout.flush()).is_err();
    }
}
