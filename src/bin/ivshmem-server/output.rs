// SPDX-License-Identifier: GPL-2.0-or-later
//! Lines on stdout and stderr that never block the server.
//!
//! A `write` to a full pipe or to a stopped terminal would block, and so block every client and
//! the signals. So a line is dropped when the stream takes no more, and the next line that is
//! written says how many were dropped. A stream that took everything so far gets a short time for
//! each line, because its reader may only be slow; one that did not gets none.
//!
//! How it is ensured that a `write` does not block depends on the kind of stream:
//! - A terminal or pipe is opened once more, without blocking. Setting O_NONBLOCK on the given
//!   descriptor would change it for the other processes that have it.
//! - A terminal or pipe that belongs to another user cannot be opened again. A thread writes to it:
//!   it may block, and does not keep the process from ending.
//! - On a socket, each call says that it must not block.
//! - Everything else (a file, /dev/null) does not block.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use libc::PIPE_BUF;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::write;

/// The time that one line may wait for a reader that has taken everything so far.
const PATIENCE: Duration = Duration::from_millis(100);

/// One of the two streams.
#[derive(Debug)]
pub(crate) struct Output<F> {
    stream: F,
    way: Way,
    /// The part of the last line that was not written.
    rest: Vec<u8>,
    dropped: u64,
    notice_prefix: String,
}

/// How to write without blocking.
#[derive(Debug)]
enum Way {
    Direct,
    Socket,
    Reopened(File),
    Thread(Writer),
}

impl<F: AsFd + IsTerminal + 'static> Output<F> {
    /// `open` is `io::stdout` or `io::stderr`.
    pub(crate) fn new(open: fn() -> F) -> Self {
        let stream = open();
        let way = match kind(&stream) {
            SFlag::S_IFIFO => reopen(&stream),
            _ if stream.is_terminal() => reopen(&stream),
            _ => Ok(None),
        };
        match way {
            Ok(Some(file)) => Self::with_way(stream, Way::Reopened(file)),
            Ok(None) => Self::passing(open),
            Err(_) => Self::with_way(stream, Way::Thread(Writer::start(open))),
        }
    }

    /// A stream whose descriptor will soon be replaced: it is not opened once more, because that
    /// would keep the terminal or the pipe open.
    pub(crate) fn passing(open: fn() -> F) -> Self {
        let stream = open();
        let way = match kind(&stream) {
            SFlag::S_IFSOCK => Way::Socket,
            _ if stream.is_terminal() => Way::Thread(Writer::start(open)),
            _ => Way::Direct,
        };
        Self::with_way(stream, way)
    }

    fn with_way(stream: F, way: Way) -> Self {
        Self { stream, way, rest: Vec::new(), dropped: 0, notice_prefix: String::new() }
    }

    /// Sets what precedes the line that says how many lines were dropped.
    pub(crate) fn with_notice_prefix(self, notice_prefix: String) -> Self {
        Self { notice_prefix, ..self }
    }

    /// Writes text that ends with a newline. An error, such as a closed pipe or a full disk, is
    /// ignored.
    pub(crate) fn line(&mut self, line: &[u8]) {
        let recovering = self.dropped > 0 || !self.rest.is_empty();
        if recovering && !self.catch_up() {
            self.dropped += 1;
            return;
        }
        match self.put(line, if recovering { Duration::ZERO } else { PATIENCE }) {
            0 => self.dropped += 1,
            written => self.rest = line[written..].to_vec(),
        }
    }

    /// Writes the rest of the last line, and how many lines were dropped. Returns whether both are
    /// written completely.
    fn catch_up(&mut self) -> bool {
        let rest = std::mem::take(&mut self.rest);
        let written = self.put(&rest, Duration::ZERO);
        self.rest = rest[written..].to_vec();
        if !self.rest.is_empty() {
            return false;
        }
        if self.dropped > 0 {
            let (prefix, dropped) = (&self.notice_prefix, self.dropped);
            let notice = format!(
                "{prefix}ivshmem-server: {dropped} lines dropped, because the output was not read\n"
            );
            let written = self.put(notice.as_bytes(), Duration::ZERO);
            if written == 0 {
                return false;
            }
            self.rest = notice.as_bytes()[written..].to_vec();
            self.dropped = 0;
        }
        self.rest.is_empty()
    }

    /// Writes as much of `text` as the stream takes, and returns how much that is. What fails
    /// counts as written.
    fn put(&mut self, text: &[u8], patience: Duration) -> usize {
        if let Way::Thread(writer) = &mut self.way {
            return if writer.write(text, patience) { text.len() } else { 0 };
        }
        let mut written = 0;
        // Where poll reports a pipe as writable, it has room for PIPE_BUF bytes.
        for part in text.chunks(PIPE_BUF) {
            let count = if self.has_room(patience) { self.try_write(part) } else { Ok(0) };
            match count {
                Ok(count) => written += count,
                Err(Errno::EAGAIN) => {}
                Err(_) => return text.len(),
            }
            if count != Ok(part.len()) {
                break;
            }
        }
        written
    }

    fn target(&self) -> BorrowedFd<'_> {
        match &self.way {
            Way::Reopened(file) => file.as_fd(),
            _ => self.stream.as_fd(),
        }
    }

    fn has_room(&self, patience: Duration) -> bool {
        let mut fds = [PollFd::new(self.target(), PollFlags::POLLOUT)];
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::ZERO);
        poll(&mut fds, patience).is_ok_and(|ready| ready > 0)
    }

    fn try_write(&self, part: &[u8]) -> nix::Result<usize> {
        match &self.way {
            Way::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                send(self.target().as_raw_fd(), part, flags)
            }
            _ => write(self.target(), part),
        }
    }
}

/// The type of the file that a stream is. Nothing is known of a closed descriptor.
fn kind(stream: impl AsFd) -> SFlag {
    let mode = fstat(stream).map_or(0, |stat| stat.st_mode);
    SFlag::from_bits_truncate(mode) & SFlag::S_IFMT
}

fn reopen(stream: impl AsFd) -> io::Result<Option<File>> {
    let path = format!("/proc/self/fd/{}", stream.as_fd().as_raw_fd());
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    File::options().write(true).custom_flags(flags).open(path).map(Some)
}

/// A thread that writes to a stream that may block. It inherits the signal mask: signals must be
/// blocked before.
#[derive(Debug)]
struct Writer {
    lines: Sender<Vec<u8>>,
    done: Receiver<()>,
    /// It has not written the last line yet.
    busy: bool,
}

impl Writer {
    fn start<F: AsFd + 'static>(open: fn() -> F) -> Self {
        let (lines, received) = channel::<Vec<u8>>();
        let (ready, done) = channel();
        let run = move || {
            // The caller waits for each line for a short time only, and sends none meanwhile.
            for line in received {
                let mut text = &line[..];
                while let Ok(count @ 1..) = write(open(), text) {
                    text = &text[count..];
                }
                if ready.send(()).is_err() {
                    return;
                }
            }
        };
        // Without the thread, the channel is closed, and every line is lost.
        let _ = thread::Builder::new().name("output".to_owned()).spawn(run);
        Self { lines, done, busy: false }
    }

    /// Returns whether the thread has taken the text.
    fn write(&mut self, text: &[u8], patience: Duration) -> bool {
        if self.busy && self.done.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            return false;
        }
        self.busy = self.lines.send(text.to_vec()).is_ok()
            && self.done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_thread_that_blocks_takes_no_further_line_until_it_goes_on() {
        // `open` is a plain function, so the socket is a static.
        static SOCKET: std::sync::OnceLock<UnixStream> = std::sync::OnceLock::new();
        let (mut reader, socket) = UnixStream::pair().expect("a pair");
        let _ = SOCKET.set(socket);
        let mut writer = Writer::start(|| SOCKET.get().expect("it is set"));
        assert!(writer.write(&vec![b'x'; 1 << 20], Duration::ZERO));
        assert!(writer.busy && !writer.write(b"dropped", Duration::ZERO));
        reader.read_exact(&mut vec![0; 1 << 20]).expect("the whole text");
        assert!(writer.write(b"next", Duration::from_secs(10)));
        let mut next = [0; 4];
        reader.read_exact(&mut next).expect("the next text");
        assert_eq!(&next, b"next");
    }
}
