// SPDX-License-Identifier: GPL-2.0-or-later
//! The source of the commands: `--exec`, a pipe or file, or a terminal with line editing.
//!
//! The main thread waits in one `poll(2)`, so each kind of input is a descriptor. The line editor
//! (`editor`) blocks, so it runs in a thread of its own: it sends one line at a time, and waits
//! until the command has run.

#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use crate::command;
use crate::editor::{self, Editor};
use crate::output::Printer;

enum Source {
    /// Commands from the command line.
    Given,
    Stdin,
    Editor(Editor),
}

pub(crate) struct Input {
    source: Source,
    text: Vec<u8>,
    /// A line was taken since the last `done`.
    taken: bool,
    /// No more commands will come.
    pub(crate) ended: bool,
}

impl Input {
    /// Commands from the command line, all known from the start.
    pub(crate) fn given(commands: &[String]) -> Self {
        let text = commands.join("\n").into_bytes();
        Self { source: Source::Given, text, taken: false, ended: true }
    }

    /// Stdin, with the line editor if stdin and stdout are a terminal.
    pub(crate) fn stdin(plain: bool) -> io::Result<(Self, Option<Printer>)> {
        if plain || !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            let source = Source::Stdin;
            return Ok((Self { source, text: Vec::new(), taken: false, ended: false }, None));
        }
        let (editor, printer) = editor::start()?;
        let source = Source::Editor(editor);
        // `taken` makes the first `done` ask for a line.
        Ok((Self { source, text: Vec::new(), taken: true, ended: false }, Some(printer)))
    }

    /// Whether the commands are typed with the line editor.
    pub(crate) fn is_interactive(&self) -> bool {
        matches!(self.source, Source::Editor(_))
    }

    pub(crate) fn is_given(&self) -> bool {
        matches!(self.source, Source::Given)
    }

    /// Whether more input may be buffered.
    pub(crate) fn has_room(&self) -> bool {
        const ENOUGH: usize = 1 << 20;
        self.text.len() < ENOUGH
    }

    /// The descriptor that becomes readable when input arrives.
    pub(crate) fn descriptor<'a>(&'a self, stdin: &'a io::Stdin) -> Option<BorrowedFd<'a>> {
        match &self.source {
            _ if self.ended => None,
            Source::Given => None,
            Source::Stdin => Some(stdin.as_fd()),
            Source::Editor(editor) => Some(editor.as_fd()),
        }
    }

    /// Reads available input into the buffer.
    pub(crate) fn receive(&mut self) -> io::Result<()> {
        match &mut self.source {
            Source::Given => {}
            Source::Stdin => {
                let mut bytes = [0; 4096];
                match nix::unistd::read(io::stdin(), &mut bytes) {
                    Ok(0) => self.ended = true,
                    Ok(count) => self.text.extend(&bytes[..count]),
                    Err(Errno::EINTR | Errno::EAGAIN) => {}
                    // The terminal was hung up.
                    Err(Errno::EIO) => self.ended = true,
                    Err(errno) => return Err(errno.into()),
                }
            }
            Source::Editor(editor) => match editor.line() {
                Some(line) => self.text.extend(line.bytes().chain([b'\n'])),
                None => self.ended = true,
            },
        }
        Ok(())
    }

    /// The next complete command in the buffer.
    pub(crate) fn next(&mut self) -> Option<String> {
        loop {
            let line = command::next(&mut self.text, self.ended)?;
            self.taken = true;
            if !line.is_empty() {
                return Some(line);
            }
        }
    }

    /// Tells the editor that all commands so far have run. Returns whether there was one since the
    /// last call.
    pub(crate) fn done(&mut self) -> bool {
        let taken = std::mem::take(&mut self.taken);
        match &self.source {
            Source::Editor(editor) if taken => editor.ask(),
            _ => {}
        }
        taken
    }
}
