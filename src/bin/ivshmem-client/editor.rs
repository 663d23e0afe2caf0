// SPDX-License-Identifier: GPL-2.0-or-later
//! Line editing and history on a terminal. The editor blocks, so it runs in a thread of its own.
//!
//! Output while the user edits a line replaces the line on the terminal, and the line is drawn again
//! below it. For this the editor reports the line at each change. (rustyline's own external printer
//! is not used: with it, text that was typed ahead is not
//! processed.)

#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use rustyline::completion::Completer;
use rustyline::highlight::{CmdKind, Highlighter};
use rustyline::hint::Hinter;
use rustyline::history::MemHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Config, Context, Helper};

use crate::PROMPT;
use crate::output::Printer;

type LineEditor = rustyline::Editor<Shown, MemHistory>;

/// The main thread's end of the editor.
pub(crate) struct Editor {
    /// A line; `None` at the end of the input.
    lines: Receiver<Option<String>>,
    /// Readable when a line is ready.
    ready: Arc<EventFd>,
    /// Asks the editor for the next line.
    asks: Sender<()>,
}

/// Starts the editor. The printer prints while the editor runs.
pub(crate) fn start() -> io::Result<(Editor, Printer)> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let ready = Arc::new(EventFd::from_flags(flags)?);
    let (sender, lines) = channel();
    let (asks, asked) = channel();
    let shown = Shown::default();
    let mut editor =
        LineEditor::with_history(Config::default(), MemHistory::new()).map_err(io::Error::other)?;
    editor.set_helper(Some(shown.clone()));
    let (told, shows) = (Arc::clone(&ready), shown.clone());
    thread::spawn(move || edit(&mut editor, &shows, &sender, &told, &asked));
    // Only the editor's thread handles a change of the window size.
    let mut window = SigSet::empty();
    window.add(Signal::SIGWINCH);
    window.thread_block()?;
    Ok((Editor { lines, ready, asks }, Box::new(move |text| shown.print(&text))))
}

impl Editor {
    /// Asks for a line.
    pub(crate) fn ask(&self) {
        // If the thread has ended, `line` returns `None`.
        let _ = self.asks.send(());
    }

    /// The line that was asked for, when it is ready. Returns `None` at the end of the input.
    pub(crate) fn line(&self) -> Option<String> {
        let _ = self.ready.read();
        self.lines.try_recv().ok().flatten()
    }
}

impl AsFd for Editor {
    /// Readable when there is a line.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

/// The code of the thread.
fn edit(
    editor: &mut LineEditor,
    shown: &Shown,
    lines: &Sender<Option<String>>,
    ready: &EventFd,
    asked: &Receiver<()>,
) {
    while asked.recv().is_ok() {
        shown.set(Some(Line::default()));
        let line = editor.readline(PROMPT).ok();
        shown.set(None);
        if let Some(line) = &line {
            // On an error the line is missing from the history.
            let _ = editor.add_history_entry(line);
        }
        // The end of the input, Ctrl-C, or a closed terminal.
        let last = line.is_none();
        if lines.send(line).is_err() || ready.write(1).is_err() || last {
            return;
        }
    }
}

/// An incomplete line on the terminal.
#[derive(Default)]
struct Line {
    text: String,
    /// The position of the cursor, in bytes.
    place: usize,
}

/// The line that the user edits now, if any.
#[derive(Clone, Default)]
struct Shown(Arc<Mutex<Option<Line>>>);

impl Shown {
    fn lock(&self) -> MutexGuard<'_, Option<Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, line: Option<Line>) {
        *self.lock() = line;
    }

    fn note(&self, text: &str, place: usize) {
        if let Some(line) = &mut *self.lock() {
            *line = Line { text: text.to_owned(), place };
        }
    }

    fn print(&self, text: &str) -> io::Result<()> {
        let line = self.lock();
        let mut stdout = io::stdout();
        match &*line {
            None => write!(stdout, "{text}")?,
            Some(Line { text: typed, place }) => {
                write!(stdout, "\r\x1b[J{text}{PROMPT}{typed}")?;
                let behind = typed.get(*place..).map_or(0, |rest| rest.chars().count());
                if behind > 0 {
                    write!(stdout, "\x1b[{behind}D")?;
                }
            }
        }
        stdout.flush()
    }
}

impl Helper for Shown {}

impl Completer for Shown {
    type Candidate = String;
}

impl Hinter for Shown {
    type Hint = String;

    fn hint(&self, line: &str, place: usize, _: &Context<'_>) -> Option<String> {
        self.note(line, place);
        None
    }
}

impl Highlighter for Shown {
    fn highlight<'l>(&self, line: &'l str, place: usize) -> Cow<'l, str> {
        self.note(line, place);
        Cow::Borrowed(line)
    }

    fn highlight_char(&self, line: &str, place: usize, _: CmdKind) -> bool {
        self.note(line, place);
        false
    }
}

impl Validator for Shown {
    fn validate(&self, _: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        // The line is complete. Further output comes below it.
        self.set(None);
        Ok(ValidationResult::Valid(None))
    }
}
