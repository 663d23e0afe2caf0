// SPDX-License-Identifier: GPL-2.0-or-later
//! The command line: the reference's options, each with a long form, and some more.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Joins an ivshmem server as a peer of the guests: rings them, is rung by them, and reads and
/// writes the memory. Takes commands from stdin; "help" lists them.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ivshmem-client",
    version,
    disable_help_flag = true,
    args_override_self = true,
    after_help = "exit status: 0 all went well, 1 a command failed or there was no server, 2 a \
                  wait was in vain"
)]
pub(crate) struct Args {
    /// Show this help
    #[arg(short = 'h', long, action = clap::ArgAction::Help)]
    help: Option<bool>,

    /// Say more of what happens
    #[arg(short, long)]
    pub(crate) verbose: bool,

    /// The server's UNIX socket
    #[arg(short = 'S', long, value_name = "PATH", default_value = "/tmp/ivshmem_socket")]
    pub(crate) socket: PathBuf,

    /// Carry out this command instead of those from stdin; more than one are carried out in
    /// order, until one fails
    #[arg(short, long = "exec", value_name = "COMMAND")]
    pub(crate) exec: Vec<String>,

    /// Write one JSON object a line, and no prompt
    #[arg(short, long)]
    pub(crate) json: bool,

    /// Once there is no more input, give up after so long without a server
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub(crate) give_up: Duration,

    /// Vectors that the server gives to each peer, and no more than it gives: 1 to 2048; found
    /// out if it is not said
    #[arg(short = 'n', long, value_name = "VECTORS",
          value_parser = clap::value_parser!(u32).range(1..=2048))]
    pub(crate) vectors: Option<u32>,
}

/// Reads the command line. Help and version come as errors, as clap has it.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Args, clap::Error> {
    Args::try_parse_from(arguments)
}

/// A time such as `2` or `0.5`.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let plain = !text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || c == '.');
    let number = text.parse().ok().filter(|_| plain);
    number
        .and_then(|number| Duration::try_from_secs_f64(number).ok())
        .filter(|time| time.as_secs() <= 1_000_000_000)
        .ok_or_else(|| "a time is a number of seconds, such as 2 or 0.5".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Args, String> {
        parse(line.split_whitespace().map(OsString::from)).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_the_references() {
        let args = args("ivshmem-client").unwrap();
        assert_eq!(args.socket, PathBuf::from("/tmp/ivshmem_socket"));
        assert!(!args.verbose && !args.json && args.exec.is_empty());
    }

    #[test]
    fn the_references_options_are_taken() {
        let args = args("ivshmem-client -v -S /a -S /b").unwrap();
        assert!(args.verbose);
        assert_eq!(args.socket, PathBuf::from("/b"), "the last one wins");
    }

    #[test]
    fn seconds_are_plain_numbers() {
        assert_eq!(seconds("2"), Ok(Duration::from_secs(2)));
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for text in ["", ".", "-1", "inf", "nan", "1e3", "2s", "99999999999"] {
            assert!(seconds(text).is_err(), "{text:?}");
        }
    }
}
