// SPDX-License-Identifier: GPL-2.0-or-later
//! The man pages and the shell completions in packaging/: they are made from the programs' options, have all of them, and
//! man and the shells accept them.

#![forbid(unsafe_code)]

mod c;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use c::{expect_success, need, project};

/// The programs. Each has a man page and a completion for each shell.
const PROGRAMS: [(&str, &str); 4] = [
    ("ivshmem-bench", env!("CARGO_BIN_EXE_ivshmem-bench")),
    ("ivshmem-client", env!("CARGO_BIN_EXE_ivshmem-client")),
    ("ivshmem-ctl", env!("CARGO_BIN_EXE_ivshmem-ctl")),
    ("ivshmem-server", env!("CARGO_BIN_EXE_ivshmem-server")),
];

fn page(program: &str) -> PathBuf {
    project("packaging/man").join(format!("{program}.1"))
}

/// The completion file of a shell.
fn completion(program: &str, shell: &str) -> PathBuf {
    let name = match shell {
        "zsh" => format!("_{program}"),
        _ => format!("{program}.{shell}"),
    };
    project("packaging/completions").join(name)
}

fn text(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{file:?}: {error}"))
}

/// The files below `directory`, with their texts.
fn texts(directory: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    for part in ["man", "completions"] {
        for entry in fs::read_dir(directory.join(part)).expect("a directory") {
            let path = entry.expect("an entry").path();
            let name = path.strip_prefix(directory).expect("it is in there").to_owned();
            found.insert(name, text(&path));
        }
    }
    found
}

#[test]
fn the_committed_files_are_what_make_papers_writes() {
    let made = tempfile::tempdir().expect("a temporary directory");
    // The test's own profile and target directory: most of it is built already.
    let test = std::env::current_exe().expect("a test knows its own file");
    let profile = test.ancestors().nth(2).expect("target/PROFILE/deps/TEST");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "--quiet", "--example", "papers", "--package", "ivshmem-server"]);
    cargo.arg("--manifest-path").arg(project("Cargo.toml"));
    cargo.arg("--target-dir").arg(profile.parent().expect("target"));
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    expect_success(cargo.arg("--").arg(made.path()));
    let (should, is) = (texts(made.path()), texts(&project("packaging")));
    let names = |files: &BTreeMap<PathBuf, String>| files.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&is), names(&should), "to mend it: make papers");
    for (name, should) in should {
        let line = is[&name].lines().zip(should.lines()).find(|(is, should)| is != should);
        assert!(is[&name] == should, "{name:?} is out of date: {line:?}; to mend it: make papers");
    }
}

/// The options in the help of a program: the short form, and the long form.
fn options(program: &str) -> Vec<(Option<char>, String)> {
    let help = expect_success(Command::new(program).arg("--help")).stdout;
    let help = String::from_utf8(help).expect("text");
    let (_, list) = help.split_once("\nOptions:\n").expect("a list of options");
    // Text is further to the right.
    let is_entry = |line: &&str| line.starts_with("  -") || line.starts_with("      --");
    let lines = list.lines().filter(is_entry).map(str::trim);
    let mut found = Vec::new();
    for line in lines {
        let mut words = line.split([' ', ',']).filter(|word| word.starts_with('-'));
        let first = words.next().expect("it starts with a dash");
        let (short, long) = match first.strip_prefix("--") {
            Some(long) => (None, long),
            None => (first.chars().nth(1), words.next().expect("the long form").trim_matches('-')),
        };
        found.push((short, long.to_owned()));
    }
    found
}

#[test]
fn each_option_of_the_help_is_in_the_man_page_and_in_each_completion() {
    for (program, file) in PROGRAMS {
        let options = options(file);
        assert!(options.contains(&(Some('S'), "socket".to_owned())), "{options:?}");
        let page = text(&page(program));
        let synopsis = page.split(".SH SYNOPSIS\n").nth(1).expect("a synopsis");
        let synopsis = synopsis.split(".SH ").next().expect("the part before the next section");
        for (short, long) in &options {
            let name = format!("\\-\\-{}", long.replace('-', "\\-"));
            let entry = match short {
                Some(short) => format!("\n\\fB\\-{short}\\fR, \\fB{name}\\fR"),
                None => format!("\n\\fB{name}\\fR"),
            };
            assert!(page.contains(&entry), "{program}.1 has no entry for --{long}");
            assert!(synopsis.contains(&name), "{program}.1: no --{long} in the synopsis");
            let bash = text(&completion(program, "bash"));
            let bash: BTreeSet<&str> = bash.split([' ', '"', '|', ')', '\n']).collect();
            let zsh = text(&completion(program, "zsh"));
            let fish = text(&completion(program, "fish"));
            let option = format!("--{long}");
            let in_fish = match short {
                Some(short) => format!(" -s {short} -l {long} "),
                None => format!(" -l {long} "),
            };
            let short = short.map(|short| format!("-{short}"));
            for name in [Some(option), short].iter().flatten() {
                assert!(bash.contains(name.as_str()), "{program}: no {name} for bash");
                // A plus sign or an equals sign says how the value follows.
                let entries = ["", "+", "="].map(|value| format!("{name}{value}["));
                assert!(
                    entries.iter().any(|entry| zsh.contains(entry)),
                    "{program}: no {name} for zsh"
                );
            }
            assert!(fish.contains(&in_fish), "{program}: no{in_fish}for fish");
        }
    }
}

#[test]
fn hidden_options_are_in_no_file() {
    for (file, text) in texts(&project("packaging")) {
        for hidden in ["supervised", "detached", "echo"] {
            for option in [format!("--{hidden}"), format!("-l {hidden}")] {
                let option = option.replace('-', "\\-");
                assert!(!text.contains(&option), "{file:?} has {hidden}");
                assert!(!text.contains(&option.replace('\\', "")), "{file:?} has {hidden}");
            }
        }
    }
}

fn output_of(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

#[test]
fn groff_has_no_warning_about_a_man_page_and_apropos_finds_its_summary() {
    need("groff", "groff-base");
    need("man", "man-db");
    for (program, _) in PROGRAMS {
        let page = page(program);
        let groff =
            output_of(Command::new("groff").args(["-man", "-ww", "-z", "-Tutf8"]).arg(&page));
        assert!(groff.status.success(), "{groff:?}");
        assert_eq!(String::from_utf8_lossy(&groff.stderr), "", "{program}");
        let mut man = Command::new("man");
        man.args(["--warnings", "-l"]).arg(&page).env("MANWIDTH", "80").env("LC_ALL", "C.UTF-8");
        let man = expect_success(&mut man);
        assert_eq!(String::from_utf8_lossy(&man.stderr), "", "{program}");
        let shown = String::from_utf8(man.stdout).expect("UTF-8");
        for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"] {
            let is_there = shown.lines().any(|line| line == section);
            assert!(is_there, "{program}: no section {section} in:\n{shown}");
        }
        let summary = expect_success(Command::new("lexgrog").arg(&page)).stdout;
        let summary = String::from_utf8(summary).expect("text");
        assert!(summary.contains(&format!(": \"{program} - ")) && summary.len() < 160, "{summary}");
    }
    let server = text(&page("ivshmem-server"));
    for section in ["SIGNALS", "ENVIRONMENT", "FILES", "EXAMPLES"] {
        assert!(server.contains(&format!("\n.SH {section}\n")), "no section {section}");
    }
}

#[test]
fn the_man_page_of_the_server_names_the_variables_that_the_source_reads() {
    let page = text(&page("ivshmem-server"));
    for variable in ["RUST_LOG", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "JOURNAL_STREAM"] {
        assert!(page.contains(variable), "no {variable}");
    }
}

#[test]
fn each_shell_accepts_its_completions() {
    need("zsh", "zsh");
    need("fish", "fish");
    for (program, _) in PROGRAMS {
        for shell in ["bash", "zsh", "fish"] {
            let ended = output_of(Command::new(shell).arg("-n").arg(completion(program, shell)));
            assert!(ended.status.success() && ended.stderr.is_empty(), "{shell}: {ended:?}");
        }
    }
    let first = text(&completion("ivshmem-server", "zsh"));
    assert_eq!(first.lines().next(), Some("#compdef ivshmem-server"));
}

/// What bash proposes for the last of `words`.
fn bash_proposes(words: &[&str]) -> Vec<String> {
    let script = r#"
        source "$1"; shift
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        function=$(complete -p "$1" | sed 's/.* -F \([^ ]*\) .*/\1/')
        "$function" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
        printf '%s\n' "${COMPREPLY[@]}""#;
    let mut bash = Command::new("bash");
    bash.args(["--norc", "-c", script, "bash"]).arg(completion(words[0], "bash")).args(words);
    let said = String::from_utf8(expect_success(&mut bash).stdout).expect("text");
    said.lines().map(str::to_owned).collect()
}

/// The same for fish, without the descriptions.
fn fish_proposes(line: &str) -> Vec<String> {
    need("fish", "fish");
    let program = line.split(' ').next().expect("a word");
    let home = tempfile::tempdir().expect("a temporary directory");
    let mut fish = Command::new("fish");
    fish.env("HOME", home.path()).args([
        "--no-config",
        "-c",
        "source $argv[1]; complete -C $argv[2]",
    ]);
    let said = expect_success(fish.arg(completion(program, "fish")).arg(line)).stdout;
    let said = String::from_utf8(said).expect("text");
    said.lines().filter_map(|line| line.split('\t').next()).map(str::to_owned).collect()
}

#[test]
fn tab_completes_options_and_values() {
    let options = ["--socket", "--socket-group", "--socket-mode", "--socket-owner"];
    let sorted = |mut found: Vec<String>| {
        found.sort();
        found
    };
    assert_eq!(sorted(bash_proposes(&["ivshmem-server", "--socket"])), options);
    assert_eq!(sorted(fish_proposes("ivshmem-server --socket")), options);
    let levels = ["debug", "error", "info", "trace", "warn"];
    assert_eq!(sorted(bash_proposes(&["ivshmem-server", "--log-level", ""])), levels);
    assert_eq!(sorted(fish_proposes("ivshmem-server --log-level ")), levels);
    assert_eq!(bash_proposes(&["ivshmem-client", "--js"]), ["--json"]);
    assert_eq!(bash_proposes(&["ivshmem-bench", "--only", "d"]), ["doorbell"]);
}

/// The Markdown pages in a directory and in its directory `docs`, with their texts.
fn texts_below(directory: &Path) -> BTreeMap<PathBuf, String> {
    let files = [directory.to_owned(), directory.join("docs")];
    let files = files.iter().flat_map(|directory| fs::read_dir(directory).expect("a directory"));
    let pages = files.map(|entry| entry.expect("an entry").path());
    let pages = pages.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    pages.map(|path| (path.clone(), text(&path))).collect()
}

#[test]
fn man_pages_completions_licence_documents_and_examples_are_installed() {
    need("make", "make");
    need("man", "man-db");
    let root = tempfile::tempdir().expect("a temporary directory");
    let mut make = Command::new("make");
    make.arg("-C").arg(project(".")).args(["install-papers", "PREFIX=/usr"]);
    make.arg(format!("DESTDIR={}", root.path().display()));
    expect_success(make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL"));
    let share = root.path().join("usr/share");
    for (program, _) in PROGRAMS {
        for (file, source) in [
            (format!("man/man1/{program}.1"), format!("packaging/man/{program}.1")),
            (
                format!("bash-completion/completions/{program}"),
                format!("packaging/completions/{program}.bash"),
            ),
            (format!("zsh/site-functions/_{program}"), format!("packaging/completions/_{program}")),
            (
                format!("fish/vendor_completions.d/{program}.fish"),
                format!("packaging/completions/{program}.fish"),
            ),
        ] {
            let file = share.join(file);
            let installed = fs::read(&file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
            assert!(installed == fs::read(project(&source)).expect("a file"), "{file:?}");
        }
        // man finds it by its name.
        let mut man = Command::new("man");
        man.args(["-w", "-M"]).arg(share.join("man")).arg(program);
        let found = String::from_utf8(expect_success(&mut man).stdout).expect("text");
        assert!(found.ends_with(&format!("/usr/share/man/man1/{program}.1\n")), "{found}");
    }
    let documents = share.join("doc/ivshmem-server");
    for file in ["LICENSE", "README.md", "docs/operate.md", "examples/event_loop.c"] {
        assert!(documents.join(file).is_file(), "no {file}");
    }
    // Each link of a page leads to a file that is installed too.
    for (page, text) in texts_below(&documents) {
        for link in text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let target = page.parent().expect("a directory").join(link);
            assert!(link.contains("://") || target.exists(), "{page:?} links to {target:?}");
        }
    }
}
