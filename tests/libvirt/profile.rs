// SPDX-License-Identifier: GPL-2.0-or-later
//! The file rules of an AppArmor profile, and the file accesses in the output of strace.
//!
//! It decides without the kernel whether the profile permits an access. It ignores capabilities, `owner` and `deny`.
//! AppArmor checks neither `stat` nor a descriptor with O_PATH.

#![forbid(unsafe_code)]

/// Path patterns, each with its permissions.
pub(crate) struct Rules(Vec<(String, String)>);

impl Rules {
    /// Reads the output of `apparmor_parser -p`, which has no includes left.
    pub(crate) fn parse(text: &str) -> Self {
        let mut variables: Vec<(String, String)> = Vec::new();
        let mut rules = Vec::new();
        for line in text.lines().map(str::trim) {
            let Some(rule) = line.strip_suffix(',') else {
                if let Some((name, values)) =
                    line.split_once('=').filter(|_| line.starts_with("@{"))
                {
                    let values = values.split_whitespace().map(|value| value.trim_end_matches('/'));
                    let values = values.collect::<Vec<_>>().join(",");
                    let values = expand(&format!("{{{values}}}"), &variables);
                    variables.push((name.trim().to_owned(), values));
                }
                continue;
            };
            let rule = rule.strip_prefix("owner ").unwrap_or(rule);
            let words: Vec<&str> = rule.split_whitespace().collect();
            if let [path, permissions] = words[..] {
                if path.starts_with(['/', '@']) {
                    rules.push((expand(path, &variables), permissions.to_owned()));
                }
            }
        }
        Self(rules)
    }

    /// Whether the rules together permit each of the accesses, which are letters of AppArmor.
    pub(crate) fn permit(&self, path: &str, accesses: &str) -> bool {
        accesses.chars().all(|access| {
            self.0.iter().any(|(pattern, permissions)| {
                permissions.contains(access) && matches(pattern.as_bytes(), path.as_bytes())
            })
        })
    }
}

/// Replaces variables by their values.
fn expand(text: &str, variables: &[(String, String)]) -> String {
    variables.iter().fold(text.to_owned(), |text, (name, values)| text.replace(name, values))
}

/// Whether a pattern of AppArmor matches the whole path.
fn matches(pattern: &[u8], path: &[u8]) -> bool {
    match pattern {
        [] => path.is_empty(),
        [b'*', rest @ ..] => {
            let (deep, rest) = match rest {
                [b'*', rest @ ..] => (true, rest),
                rest => (false, rest),
            };
            let most = path.iter().take_while(|byte| deep || **byte != b'/').count();
            (0..=most).any(|length| matches(rest, &path[length..]))
        }
        [b'{', rest @ ..] => {
            let (choices, rest) = alternatives(rest);
            choices.iter().any(|choice| matches(&[*choice, rest].concat(), path))
        }
        [b'[', rest @ ..] => {
            let end = rest.iter().position(|byte| *byte == b']').expect("a valid pattern");
            let [byte, path @ ..] = path else { return false };
            contains(&rest[..end], *byte) && matches(&rest[end + 1..], path)
        }
        [literal, rest @ ..] => path.split_first().is_some_and(|(byte, path)| {
            let same = byte == literal || *literal == b'?' && *byte != b'/';
            same && matches(rest, path)
        }),
    }
}

/// What is between braces, of which the first has been read, and what follows.
fn alternatives(text: &[u8]) -> (Vec<&[u8]>, &[u8]) {
    let (mut depth, mut begin, mut choices) = (0, 0, Vec::new());
    for (at, byte) in text.iter().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth > 0 => depth -= 1,
            b'}' => {
                choices.push(&text[begin..at]);
                return (choices, &text[at + 1..]);
            }
            b',' if depth == 0 => {
                choices.push(&text[begin..at]);
                begin = at + 1;
            }
            _ => {}
        }
    }
    panic!("no closing brace in {:?}", String::from_utf8_lossy(text));
}

/// Whether a set such as `a-z_` has the byte.
fn contains(set: &[u8], byte: u8) -> bool {
    match set {
        [first, b'-', last, rest @ ..] => (*first..=*last).contains(&byte) || contains(rest, byte),
        [one, rest @ ..] => *one == byte || contains(rest, byte),
        [] => false,
    }
}

/// The path and the letters of each access in the output of `strace -f -y`.
pub(crate) fn accesses(trace: &str) -> Vec<(String, &'static str)> {
    trace.lines().flat_map(accesses_of).collect()
}

fn accesses_of(line: &str) -> Vec<(String, &'static str)> {
    let call = line.split_once(' ').map_or("", |(_, call)| call.trim_start());
    let (call, result) = call.rsplit_once(" = ").unwrap_or((call, ""));
    let Some((name, arguments)) = call.split_once('(').filter(|_| !result.starts_with("-1")) else {
        return Vec::new();
    };
    let (descriptor, paths) = paths(arguments);
    let has = |flag| arguments.contains(flag);
    let path = |index: usize, end: &str| format!("{}{end}", paths[index]);
    match name {
        "execve" => vec![(path(0, ""), "rx")],
        // The unnamed file of O_TMPFILE has a name that strace does not know.
        "open" | "openat" if has("O_PATH") || has("O_TMPFILE") => Vec::new(),
        "open" | "openat" => {
            let resolved = result.split_once('<').and_then(|(_, path)| path.strip_suffix('>'));
            let end = if has("O_DIRECTORY") { "/" } else { "" };
            let letters = match () {
                () if has("O_RDWR") => "rw",
                () if has("O_WRONLY") => "w",
                () if has("O_CREAT") => "rw",
                () => "r",
            };
            vec![(format!("{}{end}", resolved.unwrap_or(&paths[0])), letters)]
        }
        "mkdir" | "mkdirat" | "rmdir" => vec![(path(0, "/"), "w")],
        "unlinkat" if has("AT_REMOVEDIR") => vec![(path(0, "/"), "w")],
        "unlink" | "unlinkat" => vec![(path(0, ""), "w")],
        "link" | "linkat" => vec![(path(1, ""), "l")],
        "rename" | "renameat" | "renameat2" => vec![(path(0, ""), "rw"), (path(1, ""), "w")],
        "bind" | "connect" if has("sun_path=\"/") => vec![(path(0, ""), "w")],
        "flock" => vec![(descriptor, "k")],
        _ => Vec::new(),
    }
}

/// The path of the last descriptor, and all paths of the arguments of a call.
fn paths(arguments: &str) -> (String, Vec<String>) {
    let (mut descriptor, mut paths) = (String::new(), Vec::new());
    let mut rest = arguments;
    while let Some(at) = rest.find(['<', '"']) {
        let end = if rest[at..].starts_with('<') { '>' } else { '"' };
        let Some((text, after)) = rest[at + 1..].split_once(end) else { break };
        match end {
            '>' => text.clone_into(&mut descriptor),
            _ if text.is_empty() => paths.push(descriptor.clone()),
            _ if text.starts_with('/') => paths.push(text.to_owned()),
            _ => paths.push(format!("{descriptor}/{text}")),
        }
        rest = after;
    }
    (descriptor, paths)
}

#[test]
fn patterns_match_as_in_apparmor() {
    for (pattern, path, expected) in [
        ("/run/*", "/run/red", true),
        ("/run/*", "/run/red/blue", false),
        ("/run/**", "/run/red/blue", true),
        ("/{usr/,}lib/**.so*", "/lib/x/libc.so.6", true),
        ("/{usr/,}lib/**.so*", "/opt/lib/libc.so.6", false),
        ("/dev/shm/{,.lock.}red*", "/dev/shm/.lock.red", true),
        ("/proc/{[1-9],[1-9][0-9]}/comm", "/proc/42/comm", true),
        ("/proc/{[1-9],[1-9][0-9]}/comm", "/proc/self/comm", false),
    ] {
        assert_eq!(matches(pattern.as_bytes(), path.as_bytes()), expected, "{pattern} {path}");
    }
}
