// SPDX-License-Identifier: GPL-2.0-or-later
//! Configuration files (`--config`): long options without dashes, one a line.
//!
//! Each line becomes an argument that precedes those of the command line, so clap stays the only
//! parser. An option replaces the lines of all files before it that have the same name: the later
//! file wins over the earlier one, and the command line over all files.
//!
//! Each line is also parsed alone, so that an error names the file and the line. An error that only
//! a combination of options has is assigned to a line by the option that the error names.
//!
//! It must not know what an option means.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{ArgMatches, Command};

/// The largest file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Options that are for the command line alone.
const NOT_HERE: [&str; 4] = ["config", "help", "print-capabilities", "version"];

/// One option of a file.
#[derive(Debug)]
struct Line {
    file: PathBuf,
    number: usize,
    /// The option's name, without dashes.
    name: String,
    /// The whole option, for clap.
    argument: OsString,
    /// What an error of this line alone names: options that it needs.
    needs: Vec<String>,
}

/// The options of all files that a command line names.
#[derive(Debug, Default)]
pub(super) struct Lines(Vec<Line>);

impl Lines {
    /// Reads the files that `words`, a whole command line, names.
    pub(super) fn of(words: &[OsString], command: &Command) -> Result<Self, clap::Error> {
        // An error of the command line is reported later, when it is parsed with the lines.
        let given = command.clone().ignore_errors(true).try_get_matches_from(words)?;
        let files = given.try_get_many::<PathBuf>("config").ok().flatten();
        let mut lines: Vec<Line> = Vec::new();
        for file in files.into_iter().flatten() {
            let read = read(file, command)?;
            lines.retain(|line| read.iter().all(|later| later.name != line.name));
            lines.extend(read);
        }
        lines.retain(|line| !is_given(&given, command, &line.name));
        Ok(Self(lines))
    }

    /// Inserts them before the arguments of the command line. The first word is the program.
    pub(super) fn insert_into(&self, words: &mut Vec<OsString>) {
        let at = words.len().min(1);
        words.splice(at..at, self.0.iter().map(|line| line.argument.clone()));
    }

    /// Adds file and line to an error of the whole command line, if an option of a file is its cause.
    pub(super) fn locate(&self, error: clap::Error) -> clap::Error {
        let names = names_in(&error);
        let is_missing = error.kind() == ErrorKind::MissingRequiredArgument;
        let is_cause = |line: &&Line| {
            names.iter().any(|name| {
                (is_missing && line.needs.contains(name)) || option_of(name) == Some(&line.name)
            })
        };
        match self.0.iter().find(is_cause) {
            Some(line) => wrong(&line.file, line.number, text_of(&error)),
            None => error,
        }
    }
}

/// The arguments that an error names, such as `--size <SIZE>`.
fn names_in(error: &clap::Error) -> Vec<String> {
    let named = |kind| match error.get(kind) {
        Some(ContextValue::String(name)) => vec![name.clone()],
        Some(ContextValue::Strings(names)) => names.clone(),
        _ => Vec::new(),
    };
    [named(ContextKind::InvalidArg), named(ContextKind::PriorArg)].concat()
}

/// The option's name in the name of an argument.
fn option_of(name: &str) -> Option<&str> {
    name.strip_prefix("--")?.split([' ', '=']).next()
}

/// Whether the command line has the option of this name.
fn is_given(matches: &ArgMatches, command: &Command, name: &str) -> bool {
    let option = command.get_arguments().find(|option| option.get_long() == Some(name));
    option.is_some_and(|option| {
        let id = option.get_id().as_str();
        matches.value_source(id) == Some(ValueSource::CommandLine)
    })
}

/// The options of one file. A name that begins with `-` may be missing.
fn read(name: &Path, command: &Command) -> Result<Vec<Line>, clap::Error> {
    let bytes = name.as_os_str().as_bytes();
    let (path, may_be_missing) = match bytes.strip_prefix(b"-") {
        Some(path) => (Path::new(OsStr::from_bytes(path)), true),
        None => (name, false),
    };
    let unreadable = |why: &dyn std::fmt::Display| {
        let text = format!("cannot read the configuration file {path:?}: {why}\n");
        clap::Error::raw(ErrorKind::Io, text)
    };
    if path.as_os_str().is_empty() {
        return Err(unreadable(&"it has no name; --config is followed by a path"));
    }
    let mut content = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut content));
    match read {
        Err(error) if may_be_missing && error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(unreadable(&error)),
        Ok(_) => {}
    }
    if content.len() as u64 > MAX_BYTES {
        return Err(unreadable(&format!("it has more than {MAX_BYTES} bytes")));
    }
    let mut lines = Vec::new();
    for (number, text) in (1..).zip(content.split(|&byte| byte == b'\n')) {
        let line = parse(text, command).map_err(|why| wrong(path, number, why))?;
        let Some(Parsed { name, argument, needs }) = line else { continue };
        lines.push(Line { file: path.to_owned(), number, name, argument, needs });
    }
    Ok(lines)
}

/// The error of one line.
fn wrong(file: &Path, number: usize, why: String) -> clap::Error {
    let text = format!("{}:{number}: {why}\n", file.display());
    clap::Error::raw(ErrorKind::ValueValidation, text)
}

/// What a line stands for; the fields are those of [`Line`].
struct Parsed {
    name: String,
    argument: OsString,
    needs: Vec<String>,
}

/// Parses a line; none if it is blank or a comment. The error says what would be right.
fn parse(line: &[u8], command: &Command) -> Result<Option<Parsed>, String> {
    let line = line.trim_ascii();
    let shown = String::from_utf8_lossy(line);
    match line {
        [] | [b'#', ..] => return Ok(None),
        _ if line.contains(&0) => return Err("the line has a zero byte".into()),
        [b'-', ..] => {
            let right = shown.trim_start_matches('-');
            return Err(format!("an option is written without dashes: {right:?}"));
        }
        _ => {}
    }
    let is_end = |byte: &u8| byte.is_ascii_whitespace() || *byte == b'=';
    let (name, rest) = line.split_at(line.iter().position(is_end).unwrap_or(line.len()));
    let value = match rest.trim_ascii_start() {
        [] => None,
        [b'=', value @ ..] => Some(value.trim_ascii_start()),
        value => Some(value),
    };
    if let Some(value) = value {
        if value.windows(2).any(|pair| pair[0].is_ascii_whitespace() && pair[1] == b'#') {
            return Err("a comment is a line of its own that begins with #".into());
        }
        if value.starts_with(b"\"") || value.starts_with(b"'") {
            return Err("a value is written without quotes, up to the end of the line".into());
        }
    }
    let name = String::from_utf8_lossy(name).into_owned();
    let advice = "use the long options of --help, without their dashes";
    if name.is_empty() {
        return Err(format!("{shown:?} has no name of an option; {advice}"));
    }
    if NOT_HERE.contains(&name.as_str()) {
        return Err(format!("option {name:?} is for the command line only"));
    }
    let mut argument = OsString::from(format!("--{name}"));
    if let Some(value) = value {
        argument.push("=");
        argument.push(OsStr::from_bytes(value));
    }
    let alone = [OsString::from(command.get_name()), argument.clone()];
    let result = command.clone().try_get_matches_from(alone);
    let mut options = command.get_arguments().filter(|option| !option.is_hide_set());
    if options.all(|option| option.get_long() != Some(&*name)) {
        let similar = similar_to(&name, command, result.err());
        let advice = similar.map_or(advice.into(), |similar| format!("did you mean {similar:?}?"));
        return Err(format!("there is no option {name:?}; {advice}"));
    }
    let needs = match result {
        Ok(_) => Vec::new(),
        // Another line may have what this one needs.
        Err(error) if error.kind() == ErrorKind::MissingRequiredArgument => names_in(&error),
        Err(error) => return Err(text_of(&error)),
    };
    Ok(Some(Parsed { name, argument, needs }))
}

/// The option that the writer of an unknown name may have meant: its long form if it is a short one, or what clap suggests.
fn similar_to(name: &str, command: &Command, error: Option<clap::Error>) -> Option<String> {
    let mut letters = name.chars();
    if let (Some(letter), None) = (letters.next(), letters.next()) {
        let mut options = command.get_arguments();
        let option = options.find(|option| option.get_short() == Some(letter));
        return option.and_then(clap::Arg::get_long).map(str::to_owned);
    }
    match error?.get(ContextKind::SuggestedArg) {
        Some(ContextValue::String(similar)) => Some(similar.trim_start_matches('-').to_owned()),
        _ => None,
    }
}

/// The text of an error on one line, without the usage.
pub(super) fn text_of(error: &clap::Error) -> String {
    let text = error.to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let ends = ["\n\nUsage:", "\n\nFor more information"];
    let end = ends.iter().filter_map(|end| text.find(end)).min().unwrap_or(text.len());
    let lines: Vec<&str> =
        text[..end].lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parsed(line: &str) -> Result<Option<String>, String> {
        let line = parse(line.as_bytes(), &super::super::Args::command())?;
        Ok(line.map(|line| line.argument.into_string().expect("it was text")))
    }

    #[test]
    fn a_line_is_an_option_with_a_value_or_a_flag_alone() {
        for (line, argument) in [
            ("size 16M", "--size=16M"),
            ("size=16M", "--size=16M"),
            ("  size = 16M \r", "--size=16M"),
            ("size\t16M", "--size=16M"),
            ("memfd", "--memfd"),
            ("shm-name a#b", "--shm-name=a#b"),
            ("socket /run/a b=c", "--socket=/run/a b=c"),
            // It needs another option, which another line may have.
            ("shm-group 0", "--shm-group=0"),
        ] {
            assert_eq!(parsed(line), Ok(Some(argument.into())), "{line:?}");
        }
        for line in ["", " \t", "# size 16M", "  #"] {
            assert_eq!(parsed(line), Ok(None), "{line:?}");
        }
    }

    #[test]
    fn a_wrong_line_is_refused_with_what_would_be_right() {
        for (line, parts) in [
            ("--size 16M", ["without dashes", "\"size 16M\""]),
            ("-l 16M", ["without dashes", "\"l 16M\""]),
            ("sizes 16M", ["no option \"sizes\"", "did you mean \"size\"?"]),
            ("qqq", ["no option \"qqq\"", "long options of --help"]),
            ("l 16M", ["no option \"l\"", "did you mean \"size\"?"]),
            ("z", ["no option \"z\"", "long options"]),
            ("= 16M", ["no name", "long options"]),
            ("size", ["a value is required", "--size <SIZE>"]),
            ("size=", ["--size <SIZE>", "suffix B, K, M"]),
            ("size 5Q", ["'5Q'", "suffix B, K, M"]),
            ("memfd yes", ["'yes'", "--memfd"]),
            ("size 16M # large", ["comment", "line of its own"]),
            ("socket \"/run/x\"", ["without quotes", "end of the line"]),
            ("config /etc/x", ["\"config\"", "command line only"]),
            ("version", ["\"version\"", "command line only"]),
            ("detached", ["no option \"detached\"", ""]),
            ("size\0 1", ["zero byte", ""]),
        ] {
            let error = parsed(line).expect_err(line);
            for part in parts {
                assert!(error.contains(part), "{line:?}: no {part:?} in {error:?}");
            }
            assert!(!error.contains('\n'), "{line:?}: {error:?}");
        }
    }
}
