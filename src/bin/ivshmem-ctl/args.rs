// SPDX-License-Identifier: GPL-2.0-or-later
//! The command line.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

/// Shows ivshmem servers without joining them, and disconnects clients.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ivshmem-ctl",
    version,
    args_override_self = true,
    after_help = "Exit status: 0 success; 1 a server could not be reached, or refused; 2 the command line \
                  was wrong\n\n\
                  Examples:\n  \
                  ivshmem-ctl status -S /run/ivshmem/red\n  \
                  ivshmem-ctl status --directory /run/ivshmem\n  \
                  ivshmem-ctl watch --json -S /run/ivshmem/red\n  \
                  ivshmem-ctl disconnect 3 -S /run/ivshmem/red\n\n\
                  Only root and the user of the server may use its control socket."
)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,

    /// The server's socket; its control socket has the same path and ".control" [default:
    /// /tmp/ivshmem_socket]
    #[arg(short = 'S', long, global = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,

    /// The control socket itself, for a server with --control
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,

    /// All control sockets in DIR and in its directories: those whose name ends in ".control"
    #[arg(short, long, global = true, value_name = "DIR")]
    pub(crate) directory: Option<PathBuf>,

    /// Write one JSON object a line
    #[arg(short, long, global = true)]
    pub(crate) json: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub(crate) enum Command {
    /// Show the server and its peers: process, user, program, name of the virtual machine, since
    /// when, and how many messages are not sent or not read
    Status,
    /// Print each client that joins, leaves or is refused, until the server ends
    Watch,
    /// End the connection of a client. Its virtual machine goes on, but hears of no peer any more,
    /// and cannot connect again
    Disconnect {
        /// The id of the client
        id: u16,
    },
    /// Print counters as OpenMetrics text, which Prometheus reads
    Metrics {
        /// Read an HTTP request from stdin and write the response to stdout, for a systemd socket
        /// unit with Accept=yes, or inetd
        #[arg(long)]
        http: bool,
    },
}

/// Parses the command line. Help and version are returned as errors, as usual with clap.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Args, clap::Error> {
    let args = Args::try_parse_from(arguments)?;
    let wrong = |text: &str| Err(Args::command().error(ErrorKind::ArgumentConflict, text));
    let targets = [args.socket.is_some(), args.control.is_some(), args.directory.is_some()];
    if targets.into_iter().filter(|&is_given| is_given).count() > 1 {
        return wrong("--socket, --control and --directory exclude each other");
    }
    match args.command {
        Command::Disconnect { .. } if args.directory.is_some() => {
            wrong("disconnect needs one server: use --socket or --control, not --directory")
        }
        Command::Metrics { http: true } if args.json => {
            wrong("--http and --json exclude each other")
        }
        _ => Ok(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Args, clap::Error> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn options_come_before_or_after_the_command() {
        for line in ["ctl -S /a -j status", "ctl status -j --socket /a", "ctl -j status -S /a"] {
            let args = args(line).expect(line);
            assert_eq!((args.command, args.json), (Command::Status, true));
            assert_eq!(args.socket, Some("/a".into()));
        }
    }

    #[test]
    fn a_wrong_command_line_has_exit_status_2() {
        for line in [
            "ctl",
            "ctl other",
            "ctl status -S a -d b",
            "ctl -S a status --control b",
            "ctl disconnect",
            "ctl disconnect x",
            "ctl disconnect 65536",
            "ctl disconnect 1 -d /run",
            "ctl metrics --http --json",
        ] {
            assert_eq!(args(line).expect_err(line).exit_code(), 2, "{line}");
        }
        assert_eq!(args("ctl --help").expect_err("help").exit_code(), 0);
    }
}
