// SPDX-License-Identifier: GPL-2.0-or-later
//! Writes the man pages and the shell completions of all programs, from their command lines: `make papers`.
//!
//! The files are in the repository, because neither a build nor an installation should need this program and its
//! dependencies. `tests/papers.rs` checks that they are up to date. What a command line does not know (signals, files,
//! environment) is in the file `PROGRAM.man` beside this one.
//!
//! It must not know a program's options.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory, ValueHint};
use clap_complete::Shell;
use clap_mangen::Man;

// To add a program, add its `args` module here, and a line to PROGRAMS.
#[allow(dead_code, unused_imports)]
#[path = "../../src/bin/ivshmem-bench/args.rs"]
mod bench;
#[allow(dead_code, unused_imports)]
#[path = "../../src/bin/ivshmem-client/args.rs"]
mod client;
#[allow(dead_code, unused_imports)]
#[path = "../../src/bin/ivshmem-ctl/args.rs"]
mod ctl;
#[allow(dead_code, unused_imports)]
#[path = "../../src/bin/ivshmem-server/args.rs"]
mod server;

struct Program {
    name: &'static str,
    command: fn() -> Command,
    /// The sections of the man page that are written by hand.
    sections: &'static str,
}

const fn program(name: &'static str, command: fn() -> Command, sections: &'static str) -> Program {
    Program { name, command, sections }
}

const PROGRAMS: [Program; 4] = [
    program("ivshmem-server", server::Args::command, include_str!("ivshmem-server.man")),
    program("ivshmem-client", client::Args::command, include_str!("ivshmem-client.man")),
    program("ivshmem-ctl", ctl::Args::command, include_str!("ivshmem-ctl.man")),
    program("ivshmem-bench", bench::Args::command, include_str!("ivshmem-bench.man")),
];

const LICENCE: &str = "SPDX-License-Identifier: GPL-2.0-or-later\n";
const ORIGIN: &str = "Made by `make papers` from the program's options. Do not edit.\n";

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [directory] = arguments.as_slice() else {
        return Err("usage: papers DIRECTORY".into());
    };
    for Program { name, command, sections } in PROGRAMS {
        let command = command();
        let page = man_page(&command, sections)?;
        write(&directory.join("man").join(format!("{name}.1")), &page)?;
        for (shell, file) in [
            (Shell::Bash, format!("{name}.bash")),
            (Shell::Zsh, format!("_{name}")),
            (Shell::Fish, format!("{name}.fish")),
        ] {
            let script = completion(&command, name, shell)?;
            write(&directory.join("completions").join(file), &script)?;
        }
    }
    Ok(())
}

fn write(file: &Path, text: &str) -> Result<(), String> {
    let written = match file.parent() {
        Some(directory) => fs::create_dir_all(directory).and_then(|()| fs::write(file, text)),
        None => fs::write(file, text),
    };
    written.map_err(|error| format!("cannot write {file:?}: {error}"))
}

/// What clap_mangen writes before each section: a name for the apostrophe.
const PREAMBLE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";

/// The man page. Its name section has only the first clause of the description, for apropos(1).
fn man_page(command: &Command, sections: &str) -> Result<String, Box<dyn Error>> {
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let end = about.find([':', '.']).unwrap_or(about.len());
    let name = command.get_name();
    let mut roff = Vec::new();
    let whole = Man::new(command.clone());
    Man::new(command.clone().about(about[..end].to_owned())).render_name_section(&mut roff)?;
    whole.render_synopsis_section(&mut roff)?;
    whole.render_description_section(&mut roff)?;
    whole.render_options_section(&mut roff)?;
    let made = String::from_utf8(roff)?.replace(PREAMBLE, "");
    // The title has no date, so that the page depends on nothing but the source.
    let title = format!(
        ".TH {} 1 \"\" \"{name} {}\" \"User Commands\"\n",
        escaped(&name.to_uppercase()),
        env!("CARGO_PKG_VERSION")
    );
    let notes = command.get_after_help().map(ToString::to_string).map(|notes| {
        let (heading, notes) = match notes.strip_prefix("Exit status: ") {
            Some(statuses) => ("EXIT STATUS", statuses),
            None => ("NOTES", notes.as_str()),
        };
        let (first, rest) = notes.split_once("\n\n").unwrap_or((notes, ""));
        let rest = match rest {
            "" => String::new(),
            rest => format!(".SH NOTES\n.nf\n{}\n.fi\n", escaped(rest)),
        };
        format!(".SH {heading}\n{}\n{rest}", escaped(first))
    });
    let commands = commands_section(command);
    let by_hand = sections.lines().filter(|line| !line.starts_with(".\\\""));
    let made = made.lines().chain(commands.lines());
    let lines = made.chain(notes.iter().flat_map(|notes| notes.lines())).chain(by_hand);
    let text: String = lines.map(|line| format!("{}\n", line.trim_end())).collect();
    Ok(format!(".\\\" {LICENCE}.\\\" {ORIGIN}{PREAMBLE}{title}{text}"))
}

/// Text for roff: a hyphen that is typed as such, and no request at the start of a line.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\\\").replace('-', "\\-");
    let lines = text.lines().map(|line| match line.starts_with(['.', '\'']) {
        true => format!("\\&{line}"),
        false => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The completion script of one shell.
fn completion(
    command: &Command,
    name: &'static str,
    shell: Shell,
) -> Result<String, Box<dyn Error>> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut completed(command, name), name, &mut script);
    let script = String::from_utf8(script)?;
    let comment = format!("# {LICENCE}# {ORIGIN}");
    // zsh knows the command by the first line.
    Ok(match script.split_once('\n') {
        Some((first, rest)) if first.starts_with("#compdef") => format!("{first}\n{comment}{rest}"),
        _ => format!("{comment}{script}"),
    })
}

/// A command without its hidden options, whose values are completed by what their names say.
fn completed(command: &Command, name: &'static str) -> Command {
    let shown = command.get_arguments().filter(|argument| !argument.is_hide_set()).cloned();
    let hinted = shown.map(|argument| {
        let value = argument.get_value_names().and_then(|names| names.first());
        match value.map(|value| value.as_str()) {
            Some("USER") => argument.value_hint(ValueHint::Username),
            Some("DIR") => argument.value_hint(ValueHint::DirPath),
            Some("FILE" | "PATH") => argument.value_hint(ValueHint::FilePath),
            _ => argument,
        }
    });
    // Some programs have a help option of their own.
    let has_help = command.get_arguments().any(|argument| argument.get_id() == "help");
    Command::new(name)
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_flag(has_help)
        .args(hinted.collect::<Vec<_>>())
        .subcommands(command.get_subcommands().cloned())
}

/// The section of a program with commands.
fn commands_section(command: &Command) -> String {
    let mut text = String::new();
    for sub in command.get_subcommands() {
        if text.is_empty() {
            text.push_str(".SH COMMANDS\n");
        }
        let words = sub.get_positionals().map(|argument| {
            format!(" \\fI{}\\fR", escaped(&argument.get_id().as_str().to_uppercase()))
        });
        let options = sub.get_arguments().filter(|argument| !argument.is_positional());
        let options = options
            .filter_map(|option| Some(format!(" [\\fB\\-\\-{}\\fR]", escaped(option.get_long()?))));
        let words: String = words.chain(options).collect();
        let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
        text.push_str(&format!(".TP\n\\fB{}\\fR{words}\n{}\n", sub.get_name(), escaped(&about)));
    }
    text
}
