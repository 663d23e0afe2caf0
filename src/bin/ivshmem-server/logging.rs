// SPDX-License-Identifier: GPL-2.0-or-later
//! The log: to stderr in the foreground, to the system log in the background.
//!
//! `--log-level` or else `RUST_LOG` selects the levels. Without them, the journal and the system log get each start, end,
//! join and departure (info), and every other stderr gets warnings and errors: the caller of a server may compare what it
//! prints. Each line has the severity of
//! syslog(3). The journal reads it from a prefix `<N>` on stderr; every other stderr gets no prefix.

#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io::{self, Stderr, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

use env_logger::{Builder, Env, Target};
use log::Level;
use nix::sys::stat::fstat;

use crate::args::Args;
use crate::output::Output;

pub(crate) fn start(args: &Args) {
    let in_background = args.detached || args.supervised;
    let is_default = args.log_level.is_none() && std::env::var_os("RUST_LOG").is_none();
    let mut builder = match &args.log_level {
        Some(level) => {
            let mut builder = Builder::new();
            builder.parse_filters(level);
            builder
        }
        None => {
            let default = if in_background || is_in_journal() { "info" } else { "warn" };
            Builder::from_env(Env::default().default_filter_or(default))
        }
    };
    builder.format(|out, record| {
        let level = record.level();
        let name = level.as_str().to_ascii_lowercase();
        writeln!(out, "{}ivshmem-server: {name}: {}", prefix(level), record.args())
    });
    builder.target(Target::Pipe(if in_background {
        let stderr = Journaled::new(Output::passing(io::stderr));
        Box::new(SystemLog { socket: None, stderr, is_default })
    } else {
        Box::new(Journaled::new(Output::new(io::stderr)))
    }));
    builder.init();
}

/// Prints the error that ends the program.
pub(crate) fn report(error: impl Display) {
    let line = format!("{}ivshmem-server: {error}\n", prefix(Level::Error));
    Journaled::new(Output::new(io::stderr)).line(line.as_bytes());
}

/// The severity of syslog(3).
fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// What the journal expects at the beginning of a line. Each line of the log has it until it is
/// written.
fn prefix(level: Level) -> String {
    format!("<{}>", severity(level))
}

/// Splits a line that begins with a [`prefix`] into the severity and the text.
fn split(line: &[u8]) -> (u8, &[u8]) {
    match line {
        [b'<', digit @ b'0'..=b'7', b'>', text @ ..] => (digit - b'0', text),
        // An incomplete line.
        _ => (severity(Level::Warn), line),
    }
}

/// Whether `stream` is the connection to the journal that systemd made for this process.
fn is_journal(stream: impl AsFd, variable: Option<&str>) -> bool {
    let name = |stat: nix::sys::stat::FileStat| format!("{}:{}", stat.st_dev, stat.st_ino);
    fstat(stream).is_ok_and(|stat| variable == Some(&name(stat)))
}

/// Whether stderr is the journal.
pub(crate) fn is_in_journal() -> bool {
    is_journal(io::stderr(), std::env::var("JOURNAL_STREAM").ok().as_deref())
}

/// Stderr, which may be the journal.
struct Journaled {
    stderr: Output<Stderr>,
    journal: bool,
}

impl Journaled {
    fn new(stderr: Output<Stderr>) -> Self {
        let journal = is_in_journal();
        let stderr = if journal { stderr.with_notice_prefix(prefix(Level::Warn)) } else { stderr };
        Self { stderr, journal }
    }

    fn line(&mut self, line: &[u8]) {
        self.stderr.line(if self.journal { line } else { split(line).1 });
    }
}

/// For the logger, which writes one line at a time.
impl Write for Journaled {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The socket of syslog(3), which journald serves as well, and stderr, which stays open in the
/// background only if it is a file.
struct SystemLog {
    socket: Option<UnixDatagram>,
    stderr: Journaled,
    /// Nobody has asked for more than warnings on stderr.
    is_default: bool,
}

/// The facility "daemon" of syslog(3).
const FACILITY: u8 = 3;

impl Write for SystemLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let (severity, text) = split(line);
        let text = String::from_utf8_lossy(text);
        let text = text.trim_end();
        let text = text.strip_prefix("ivshmem-server").unwrap_or(text);
        let (priority, pid) = (FACILITY << 3 | severity, std::process::id());
        let message = format!("<{priority}>ivshmem-server[{pid}]{text}");
        let send = |socket: &UnixDatagram| socket.send(message.as_bytes());
        // The system log may have been restarted; then a new connection is needed.
        if self.socket.as_ref().is_none_or(|socket| send(socket).is_err()) {
            self.socket = UnixDatagram::unbound()
                .and_then(|socket| {
                    socket.set_nonblocking(true)?;
                    socket.connect("/dev/log")?;
                    send(&socket)?;
                    Ok(socket)
                })
                .ok();
        }
        if self.stderr.journal || !self.is_default || severity <= self::severity(Level::Warn) {
            self.stderr.line(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_level_has_its_severity_of_syslog() {
        let severities = [Level::Error, Level::Warn, Level::Info, Level::Debug, Level::Trace];
        assert_eq!(severities.map(severity), [3, 4, 6, 7, 7]);
    }

    #[test]
    fn the_severity_is_split_from_the_text() {
        let line = format!("{}a <3> b\n", prefix(Level::Info));
        assert_eq!(split(line.as_bytes()), (6, &b"a <3> b\n"[..]));
        assert_eq!(split(b"text\n"), (4, &b"text\n"[..]));
    }

    #[test]
    fn a_stream_is_the_journal_only_if_device_and_inode_are_equal() {
        let file = tempfile::tempfile().expect("a file");
        let stat = fstat(&file).expect("it is open");
        let named = format!("{}:{}", stat.st_dev, stat.st_ino);
        assert!(is_journal(&file, Some(&named)));
        for other in [None, Some(""), Some("1:1"), Some(&*format!("{named}1"))] {
            assert!(!is_journal(&file, other), "{other:?}");
        }
    }
}
