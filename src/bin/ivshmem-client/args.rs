// SPDX-License-Identifier: GPL-2.0-or-later
//! The command line: the options of the reference, each with a long form, and some more.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;

/// Joins an ivshmem server as a peer of the guests: interrupts them, receives their interrupts, and
/// reads and writes the shared memory. Commands come from stdin; the command "help" lists them.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ivshmem-client",
    version,
    disable_help_flag = true,
    args_override_self = true,
    after_help = "Exit status: 0 success; 1 a command failed, an option was wrong, or there was no \
                  server; 2 a wait timed out"
)]
pub(crate) struct Args {
    /// Show this help
    #[arg(short = 'h', long, action = clap::ArgAction::Help)]
    help: Option<bool>,

    /// Print more events
    #[arg(short, long)]
    pub(crate) verbose: bool,

    /// The server's UNIX socket
    #[arg(short = 'S', long, value_name = "PATH", default_value = "/tmp/ivshmem_socket")]
    pub(crate) socket: PathBuf,

    /// Run this command and do not read stdin; may be given several times: the commands run in
    /// order, until one fails
    #[arg(short, long = "exec", value_name = "COMMAND")]
    pub(crate) exec: Vec<String>,

    /// Write one JSON object a line, and no prompt
    #[arg(short, long)]
    pub(crate) json: bool,

    /// After the end of the input, exit if there is no server for this long
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub(crate) give_up: Duration,

    /// Number of vectors that the server gives to each peer, 1 to 2048; must not be larger than
    /// that number [default: detected]
    #[arg(short = 'n', long, value_name = "VECTORS",
          value_parser = clap::value_parser!(u32).range(1..=2048))]
    pub(crate) vectors: Option<u32>,
}

/// Parses the command line. Help and version are returned as errors, as usual with clap.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Args, clap::Error> {
    Args::try_parse_from(arguments)
}

/// Parses a number of seconds, such as `2` or `0.5`.
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
    fn defaults_are_those_of_the_reference() {
        let args = args("ivshmem-client").unwrap();
        assert_eq!(args.socket, PathBuf::from("/tmp/ivshmem_socket"));
        assert!(!args.verbose && !args.json && args.exec.is_empty());
    }

    #[test]
    fn the_options_of_the_reference_are_accepted() {
        let args = args("ivshmem-client -v -S /a -S /b").unwrap();
        assert!(args.verbose);
        assert_eq!(args.socket, PathBuf::from("/b"), "the last one wins");
    }

    #[test]
    fn seconds_are_numbers_without_sign_or_exponent() {
        assert_eq!(seconds("2"), Ok(Duration::from_secs(2)));
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for text in ["", ".", "-1", "inf", "nan", "1e3", "2s", "99999999999"] {
            assert!(seconds(text).is_err(), "{text:?}");
        }
    }
}
