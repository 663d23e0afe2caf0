// SPDX-License-Identifier: GPL-2.0-or-later
//! Where commands come from: `--exec`, a pipe or file, or a terminal with line editing.
//!
//! The editor blocks, so it has a thread of its own, which hands over a line at a time and
//! waits until that has been carried out. All else of the program is one thread with a
//! `poll(2)`, for which each kind of input is a descriptor.
//!
//! On a terminal, `editor` has the line.

#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use crate::command;
use crate::editor::{self, Editor};
use crate::output::Printer;

enum Source {
    /// Commands were given on the command line.
    Given,
    Stdin,
    Editor(Editor),
}

pub(crate) struct Input {
    source: Source,
    text: Vec<u8>,
    /// A line was taken since the last `done`.
    taken: bool,
    /// There will be no more.
    pub(crate) ended: bool,
}

impl Input {
    /// Commands that are all here.
    pub(crate) fn given(commands: &[String]) -> Self {
        let text = commands.join("\n").into_bytes();
        Self { source: Source::Given, text, taken: false, ended: true }
    }

    /// Stdin, by the line editor if a person is there.
    pub(crate) fn stdin(plain: bool) -> io::Result<(Self, Option<Printer>)> {
        if plain || !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            let source = Source::Stdin;
            return Ok((Self { source, text: Vec::new(), taken: false, ended: false }, None));
        }
        let (editor, printer) = editor::start()?;
        let source = Source::Editor(editor);
        // The first line is to be asked for as well.
        Ok((Self { source, text: Vec::new(), taken: true, ended: false }, Some(printer)))
    }

    /// Whether a person types the commands.
    pub(crate) fn is_person(&self) -> bool {
        matches!(self.source, Source::Editor(_))
    }

    pub(crate) fn is_given(&self) -> bool {
        matches!(self.source, Source::Given)
    }

    /// Whether more may be taken in than can be carried out now.
    pub(crate) fn has_room(&self) -> bool {
        const ENOUGH: usize = 1 << 20;
        self.text.len() < ENOUGH
    }

    /// What is readable when there is more.
    pub(crate) fn descriptor<'a>(&'a self, stdin: &'a io::Stdin) -> Option<BorrowedFd<'a>> {
        match &self.source {
            _ if self.ended => None,
            Source::Given => None,
            Source::Stdin => Some(stdin.as_fd()),
            Source::Editor(editor) => Some(editor.as_fd()),
        }
    }

    /// Takes in what is there.
    pub(crate) fn receive(&mut self) -> io::Result<()> {
        match &mut self.source {
            Source::Given => {}
            Source::Stdin => {
                let mut bytes = [0; 4096];
                match nix::unistd::read(io::stdin(), &mut bytes) {
                    Ok(0) => self.ended = true,
                    Ok(count) => self.text.extend(&bytes[..count]),
                    Err(Errno::EINTR | Errno::EAGAIN) => {}
                    // What a terminal says that has been hung up.
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

    /// The next command that is here.
    pub(crate) fn next(&mut self) -> Option<String> {
        loop {
            let line = command::next(&mut self.text, self.ended)?;
            self.taken = true;
            if !line.is_empty() {
                return Some(line);
            }
        }
    }

    /// All that was there has been carried out, and the editor may go on. Whether there was
    /// something.
    pub(crate) fn done(&mut self) -> bool {
        let taken = std::mem::take(&mut self.taken);
        match &self.source {
            Source::Editor(editor) if taken => editor.ask(),
            _ => {}
        }
        taken
    }
}
