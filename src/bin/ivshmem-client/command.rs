// SPDX-License-Identifier: GPL-2.0-or-later
//! The syntax of the commands.
//!
//! A newline, a carriage return or a semicolon ends a command, as in the reference; but a semicolon
//! within "quotes" does not. The first four commands of the help are those of the reference.

#![forbid(unsafe_code)]

use std::time::Duration;

use crate::args::seconds;

/// The text of `help`: the four lines of the reference, then our own commands.
pub(crate) const HELP: &str = "\
dump: dump peers (including us)
int <peer> <vector>: notify one vector on a peer
int <peer> all: notify all vectors of a peer
int all: notify all vectors of all peers (excepting us)
wait <vector> [<seconds>]: wait until one of our vectors is notified
read <offset> <length> [hex|text]: read the shared memory
write <offset> <data>: write to it; data is hex digits (0a1b) or \"text\\n\"
watch [<seconds>]: also print which peers join and leave
quit: exit";

/// The vectors that an `int` interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    One(i64, u32),
    Peer(i64),
    All,
}

/// The format in which memory is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Dump,
    Hex,
    Text,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Help,
    Dump,
    Int(Target),
    Wait { vector: u32, time: Option<Duration> },
    Read { offset: usize, len: usize, form: Form },
    Write { offset: usize, bytes: Vec<u8> },
    Watch { time: Option<Duration> },
    Quit,
}

/// Removes the first command and its separator from `text`. Returns `None` if there is no complete
/// command. At the `end` of the input, a command needs no separator.
pub(crate) fn next(text: &mut Vec<u8>, end: bool) -> Option<String> {
    let mut quoted = false;
    let mut escaped = false;
    let place = text.iter().position(|&byte| {
        let separates = matches!(byte, b'\n' | b'\r') || (byte == b';' && !quoted);
        quoted ^= byte == b'"' && !escaped;
        escaped = quoted && byte == b'\\' && !escaped;
        separates
    });
    let line: Vec<u8> = match place {
        Some(place) => text.drain(..=place).take(place).collect(),
        None if end && !text.is_empty() => std::mem::take(text),
        None => return None,
    };
    Some(String::from_utf8_lossy(&line).trim().to_owned())
}

/// Parses a command.
pub(crate) fn parse(line: &str) -> Result<Command, String> {
    let unknown = || "invalid command, type help".to_owned();
    let wrong = |usage: &str| format!("invalid command, type help (it is: {usage})");
    let (name, rest) = split(line);
    let words: Vec<&str> = rest.split_whitespace().collect();
    match (name, &words[..]) {
        ("help" | "?", []) => Ok(Command::Help),
        ("dump", []) => Ok(Command::Dump),
        ("quit" | "exit", []) => Ok(Command::Quit),
        ("int", ["all"]) => Ok(Command::Int(Target::All)),
        ("int", [peer, vector]) => {
            let usage = || wrong("int <peer> <vector>, int <peer> all, or int all");
            let peer = peer.parse().map_err(|_| usage())?;
            match *vector {
                "all" => Ok(Command::Int(Target::Peer(peer))),
                vector => Ok(Command::Int(Target::One(peer, vector.parse().map_err(|_| usage())?))),
            }
        }
        ("wait", [vector, time @ ..]) => {
            let usage = || wrong("wait <vector> [<seconds>]");
            let vector = vector.parse().map_err(|_| usage())?;
            Ok(Command::Wait { vector, time: optional_time(time).ok_or_else(usage)? })
        }
        ("watch", time) => {
            let time = optional_time(time).ok_or_else(|| wrong("watch [<seconds>]"))?;
            Ok(Command::Watch { time })
        }
        ("read", [offset, len, form @ ..]) => {
            let usage = || wrong("read <offset> <length> [hex|text]");
            let form = match form {
                [] => Form::Dump,
                ["hex"] => Form::Hex,
                ["text"] => Form::Text,
                _ => return Err(usage()),
            };
            let offset = number(offset).ok_or_else(usage)?;
            Ok(Command::Read { offset, len: number(len).ok_or_else(usage)?, form })
        }
        ("write", [_, _, ..]) => {
            let (offset, data) = split(rest);
            let bytes = data_of(data)
                .ok_or_else(|| wrong("write <offset> <data>, hex digits or \"text\""))?;
            let offset = number(offset).ok_or_else(|| wrong("write <offset> <data>"))?;
            Ok(Command::Write { offset, bytes })
        }
        ("read", _) => Err(wrong("read <offset> <length> [hex|text]")),
        ("write", _) => Err(wrong("write <offset> <data>")),
        ("wait", _) => Err(wrong("wait <vector> [<seconds>]")),
        _ => Err(unknown()),
    }
}

/// The first word and the rest of the line.
fn split(line: &str) -> (&str, &str) {
    let line = line.trim();
    line.split_once(char::is_whitespace).map_or((line, ""), |(word, rest)| (word, rest.trim()))
}

fn optional_time(words: &[&str]) -> Option<Option<Duration>> {
    match words {
        [] => Some(None),
        [time] => seconds(time).ok().map(Some),
        _ => None,
    }
}

/// Parses a decimal number, or a hexadecimal one after `0x`.
fn number(text: &str) -> Option<usize> {
    let (digits, base) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let only = !digits.is_empty() && digits.chars().all(|c| c.is_digit(base));
    usize::from_str_radix(digits, base).ok().filter(|_| only)
}

/// Parses the data of `write`: `"text"` or hex digits.
fn data_of(data: &str) -> Option<Vec<u8>> {
    match data.strip_prefix('"') {
        Some(rest) => unescape(rest.strip_suffix('"')?),
        None => {
            let digits: String = data.split_whitespace().collect();
            hex(digits.strip_prefix("0x").unwrap_or(&digits))
        }
    }
}

fn hex(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    let value = |digit: u8| char::from(digit).to_digit(16).map(|value| value as u8);
    pairs
        .map(|pair| match pair {
            [high, low] => Some(value(*high)? << 4 | value(*low)?),
            _ => None,
        })
        .collect()
}

/// Replaces `\n`, `\r`, `\t`, `\0`, `\\`, `\"` and `\xNN` in a text by the bytes.
fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'"' => return None,
            b'\\' => match rest.next()? {
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'0' => 0,
                b'x' => {
                    let digits = [rest.next()?, rest.next()?];
                    hex(std::str::from_utf8(&digits).ok()?)?[0]
                }
                byte @ (b'\\' | b'"') => byte,
                _ => return None,
            },
            byte => byte,
        });
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split_up(text: &str) -> Vec<String> {
        let mut text = text.as_bytes().to_vec();
        std::iter::from_fn(|| next(&mut text, true)).collect()
    }

    #[test]
    fn commands_are_separated_as_in_the_reference() {
        assert_eq!(split_up("dump;int 0 1\r\nhelp"), ["dump", "int 0 1", "", "help"]);
        assert_eq!(split_up(";;"), ["", ""]);
    }

    #[test]
    fn a_semicolon_within_quotes_separates_nothing() {
        assert_eq!(split_up(r#"write 0 "a;\";b";dump"#), [r#"write 0 "a;\";b""#, "dump"]);
        assert_eq!(
            split_up("write 0 \"a\ndump"),
            ["write 0 \"a", "dump"],
            "a newline ends the quotes"
        );
    }

    #[test]
    fn the_last_command_needs_no_separator_at_the_end_of_input_only() {
        let mut text = b"dump\nint".to_vec();
        assert_eq!(next(&mut text, false).as_deref(), Some("dump"));
        assert_eq!(next(&mut text, false), None);
        assert_eq!(next(&mut text, true).as_deref(), Some("int"));
        assert_eq!(next(&mut text, true), None);
    }

    #[test]
    fn every_command_is_parsed() {
        use Command::*;
        let time = |seconds| Some(Duration::from_secs(seconds));
        for (line, command) in [
            ("help", Help),
            ("?", Help),
            ("dump", Dump),
            ("int all", Int(Target::All)),
            ("int 3 all", Int(Target::Peer(3))),
            ("int  3   1", Int(Target::One(3, 1))),
            ("int -1 0", Int(Target::One(-1, 0))),
            ("wait 2", Wait { vector: 2, time: None }),
            ("wait 2 5", Wait { vector: 2, time: time(5) }),
            ("watch", Watch { time: None }),
            ("watch 1", Watch { time: time(1) }),
            ("read 0 16", Read { offset: 0, len: 16, form: Form::Dump }),
            ("read 0x10 0x20 hex", Read { offset: 16, len: 32, form: Form::Hex }),
            ("read 1 2 text", Read { offset: 1, len: 2, form: Form::Text }),
            ("write 0 00ff", Write { offset: 0, bytes: vec![0, 255] }),
            ("write 0 0x00 ff", Write { offset: 0, bytes: vec![0, 255] }),
            (r#"write 4 "a b\n\x00\"""#, Write { offset: 4, bytes: b"a b\n\0\"".to_vec() }),
            ("quit", Quit),
        ] {
            assert_eq!(parse(line), Ok(command), "{line}");
        }
    }

    #[test]
    fn an_unknown_command_gives_the_error_of_the_reference() {
        for line in [
            "dumb",
            "int",
            "int x 0",
            "int 0 x",
            "int 0 -1",
            "int 0 0 0",
            "wait",
            "wait x",
            "wait 0 x",
            "read",
            "read 0",
            "read 0 +1",
            "read 0 1 bin",
            "write",
            "write 0",
            "write 0 0",
            "write 0 0g",
            "write 0 é0",
            r#"write 0 "a"#,
            r#"write 0 "a"b""#,
            r#"write 0 "\q""#,
            "quit now",
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.starts_with("invalid command, type help"), "{line}: {error}");
        }
    }
}
