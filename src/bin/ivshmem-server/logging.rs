// SPDX-License-Identifier: GPL-2.0-or-later
//! Where the library's log lines go: stderr in the foreground, the system log in the
//! background. `RUST_LOG` says which; warnings and errors if it does not.

#![forbid(unsafe_code)]

use std::io::{self, Stderr, Write};
use std::os::unix::net::UnixDatagram;

use env_logger::{Builder, Env, Target};

use crate::args::Args;
use crate::output::Output;

pub(crate) fn start(args: &Args) {
    let mut builder = Builder::from_env(Env::default().default_filter_or("warn"));
    builder.format(|out, record| {
        let level = record.level().as_str().to_ascii_lowercase();
        writeln!(out, "ivshmem-server: {level}: {}", record.args())
    });
    builder.target(Target::Pipe(if args.detached || args.supervised {
        Box::new(SystemLog { socket: None, stderr: Output::passing(io::stderr()) })
    } else {
        Box::new(Output::new(io::stderr()))
    }));
    builder.init();
}

/// The socket of syslog(3), which journald serves as well, and stderr: that is only open to
/// a file once we are in the background.
struct SystemLog {
    socket: Option<UnixDatagram>,
    stderr: Output<Stderr>,
}

/// Facility "daemon", severity "warning".
const PRIORITY: &str = "<28>";

impl Write for SystemLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let text = text.trim_end();
        let text = text.strip_prefix("ivshmem-server").unwrap_or(text);
        let message = format!("{PRIORITY}ivshmem-server[{}]{text}", std::process::id());
        let send = |socket: &UnixDatagram| socket.send(message.as_bytes());
        // A system log that was restarted has to be found again.
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
        self.stderr.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
