// SPDX-License-Identifier: GPL-2.0-or-later
//! Where commands come from: `--exec`, a pipe or file, or a terminal with line editing.
//!
//! The editor blocks, so it has a thread of its own, which hands over a line at a time and
//! waits until that has been carried out. All else of the program is one thread with a
//! `poll(2)`, for which each kind of input is a descriptor.

#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use rustyline::{DefaultEditor, ExternalPrinter};

use crate::command;
use crate::output::Printer;

enum Source {
    /// Commands were given on the command line.
    Given,
    Stdin,
    Editor {
        /// A line; none at the end.
        lines: Receiver<Option<String>>,
        /// Says that there is one.
        ready: Arc<EventFd>,
        /// Asks for the next one.
        done: Sender<()>,
    },
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
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let ready = Arc::new(EventFd::from_flags(flags)?);
        let (sender, lines) = channel();
        let (done, carried_out) = channel();
        let mut editor = DefaultEditor::new().map_err(io::Error::other)?;
        let mut printer = editor.create_external_printer().map_err(io::Error::other)?;
        let told = Arc::clone(&ready);
        thread::spawn(move || edit(&mut editor, &sender, &told, &carried_out));
        // A terminal that has gone is found out by the editor.
        let print: Printer = Box::new(move |text| drop(printer.print(text)));
        let source = Source::Editor { lines, ready, done };
        // The first one is to be asked for as well.
        Ok((Self { source, text: Vec::new(), taken: true, ended: false }, Some(print)))
    }

    /// Whether a person types the commands.
    pub(crate) fn is_person(&self) -> bool {
        matches!(self.source, Source::Editor { .. })
    }

    pub(crate) fn is_given(&self) -> bool {
        matches!(self.source, Source::Given)
    }

    /// What is readable when there is more.
    pub(crate) fn descriptor<'a>(&'a self, stdin: &'a io::Stdin) -> Option<BorrowedFd<'a>> {
        match &self.source {
            _ if self.ended => None,
            Source::Given => None,
            Source::Stdin => Some(stdin.as_fd()),
            Source::Editor { ready, .. } => Some(ready.as_fd()),
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
            Source::Editor { lines, ready, .. } => {
                let _ = ready.read();
                match lines.try_recv() {
                    Ok(Some(line)) => {
                        self.text.extend(line.as_bytes());
                        self.text.push(b'\n');
                    }
                    Ok(None) | Err(_) => self.ended = true,
                }
            }
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
        if taken && let Source::Editor { done, .. } = &self.source {
            let _ = done.send(());
        }
        taken
    }
}

/// The editor's thread.
fn edit(
    editor: &mut DefaultEditor,
    lines: &Sender<Option<String>>,
    ready: &EventFd,
    carried_out: &Receiver<()>,
) {
    while carried_out.recv().is_ok() {
        let line = match editor.readline(super::PROMPT) {
            Ok(line) => {
                let _ = editor.add_history_entry(&line);
                Some(line)
            }
            // The end of input, Ctrl-C, or a terminal that has gone.
            Err(_) => None,
        };
        let last = line.is_none();
        let sent = lines.send(line).is_ok() && ready.write(1).is_ok();
        if last || !sent {
            return;
        }
    }
}
