// SPDX-License-Identifier: GPL-2.0-or-later
//! Line editing and history on a terminal, in a thread of its own since it blocks.
//!
//! What is printed meanwhile goes in the place of the line, which is then drawn again below;
//! for that the editor tells, at each change, what the line is. (Its own printer for such
//! things would do, but with it what is typed ahead gets stuck.)

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
    /// A line; none at the end.
    lines: Receiver<Option<String>>,
    /// Says that there is one.
    ready: Arc<EventFd>,
    /// Asks for the next one.
    asks: Sender<()>,
}

/// Starts the editor, and says how to print while it is at work.
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
    // A window of another size is for the editor's thread to hear of.
    let mut window = SigSet::empty();
    window.add(Signal::SIGWINCH);
    window.thread_block()?;
    Ok((Editor { lines, ready, asks }, Box::new(move |text| shown.print(&text))))
}

impl Editor {
    /// Asks for a line.
    pub(crate) fn ask(&self) {
        // Without a thread there is no more to ask for, and `line` says so.
        let _ = self.asks.send(());
    }

    /// The line that was asked for, once it is ready; none at the end of input.
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

/// The thread.
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
            // One that cannot be kept is not recalled, no more.
            let _ = editor.add_history_entry(line);
        }
        // The end of input, Ctrl-C, or a terminal that has gone.
        let last = line.is_none();
        if lines.send(line).is_err() || ready.write(1).is_err() || last {
            return;
        }
    }
}

/// The line that is on the terminal.
#[derive(Default)]
struct Line {
    text: String,
    /// The cursor, in bytes.
    place: usize,
}

/// The line that is on the terminal; none while none is being edited.
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
        // It is done; what is printed from here on comes below it.
        self.set(None);
        Ok(ValidationResult::Valid(None))
    }
}
