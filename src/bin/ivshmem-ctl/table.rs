// SPDX-License-Identifier: GPL-2.0-or-later
//! The state of a server as text that people read.

#![forbid(unsafe_code)]

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::unistd::{Uid, User};
use serde_json::Value;

const BOLD: &str = "\x1b[1m";
const YELLOW: &str = "\x1b[33m";
const PLAIN: &str = "\x1b[0m";

/// The columns of the peers, and whether each is a number.
const COLUMNS: [(&str, bool); 8] = [
    ("ID", true),
    ("PID", true),
    ("USER", false),
    ("PROGRAM", false),
    ("MACHINE", false),
    ("FOR", true),
    ("TO SEND", true),
    ("UNREAD", true),
];

/// The reply of `Status` as text.
pub(crate) fn status(status: &Value, colours: bool) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    text(status, now, colours)
}

fn text(status: &Value, now: u64, colours: bool) -> String {
    let (bold, yellow, plain) = if colours { (BOLD, YELLOW, PLAIN) } else { ("", "", "") };
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let for_ = |since: &Value| age(now.saturating_sub(number(since)));
    let mut out = String::new();
    let restarts = match number(&status["restarts"]) {
        0 => String::new(),
        1 => ", 1 restart".to_owned(),
        count => format!(", {count} restarts"),
    };
    let _ = writeln!(
        out,
        "{bold}{}{plain}: ivshmem-server {}, pid {}, running for {}{restarts}",
        word(&status["socket"]),
        word(&status["version"]),
        status["pid"],
        for_(&status["started"]),
    );
    let memory = &status["memory"];
    let _ = writeln!(
        out,
        "  memory       {} {}, {}; vectors: {}",
        word(&memory["kind"]),
        word(&memory["name"]),
        size(number(&memory["size"])),
        status["vectors"],
    );
    let ids = &status["ids"];
    let _ = writeln!(
        out,
        "  ids          {} free, {} used, {} remembered",
        ids["free"], ids["used"], ids["remembered"],
    );
    let descriptors = &status["descriptors"];
    let _ = writeln!(out, "  descriptors  {} of {}", descriptors["open"], descriptors["limit"]);
    let reasons = status["refused"].as_object();
    let reasons: Vec<(&String, u64)> = reasons
        .map(|reasons| reasons.iter().map(|(name, count)| (name, number(count))))
        .into_iter()
        .flatten()
        .filter(|&(_, count)| count > 0)
        .collect();
    let refused: u64 = reasons.iter().map(|(_, count)| count).sum();
    let _ = write!(
        out,
        "  clients      {} joined, {} left, {refused} refused",
        status["joined"], status["left"],
    );
    if !reasons.is_empty() {
        let reasons: Vec<String> =
            reasons.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let _ = write!(out, " ({})", reasons.join(", "));
    }
    out.push('\n');
    let peers = status["peers"].as_array().map_or(&[][..], |peers| &peers[..]);
    if peers.is_empty() {
        out.push_str("  no peer is connected\n");
        return out;
    }
    let rows: Vec<[String; 8]> = peers
        .iter()
        .map(|peer| {
            // A peer of a server before has been there for longer than that.
            let more = if peer["resumed"] == true { ">" } else { "" };
            [
                peer["id"].to_string(),
                field(&peer["pid"]),
                user(&peer["uid"]),
                field(&peer["program"]),
                field(&peer["name"]),
                format!("{more}{}", for_(&peer["since"])),
                field(&peer["pending"]),
                field(&peer["unread"]),
            ]
        })
        .collect();
    let width = |column: usize| {
        let widths = rows.iter().map(|row| row[column].chars().count());
        widths.chain([COLUMNS[column].0.len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..COLUMNS.len()).map(width).collect();
    let line = |cells: [&str; 8]| {
        let cells = cells.iter().zip(COLUMNS).zip(&widths).map(|((cell, column), &width)| {
            if column.1 { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        cells.collect::<Vec<_>>().join("  ")
    };
    let _ = writeln!(out, "\n  {bold}{}{plain}", line(COLUMNS.map(|(name, _)| name)).trim_end());
    for (row, peer) in rows.iter().zip(peers) {
        let cells = line(std::array::from_fn(|column| row[column].as_str()));
        let is_behind = number(&peer["pending"]) > 0;
        let (colour, plain) = if is_behind { (yellow, plain) } else { ("", "") };
        let _ = writeln!(out, "  {colour}{}{plain}", cells.trim_end());
    }
    out
}

/// A cell of the table.
fn field(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        value => word(value),
    }
}

/// A value for a terminal: without control characters, which a client may have put there.
pub(crate) fn word(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let visible = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
    text.chars().map(visible).collect()
}

fn user(uid: &Value) -> String {
    let Some(number) = uid.as_u64().and_then(|uid| u32::try_from(uid).ok()) else {
        return "-".to_owned();
    };
    match User::from_uid(Uid::from_raw(number)) {
        Ok(Some(user)) => user.name,
        _ => number.to_string(),
    }
}

/// A time in the two largest units.
fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, ..) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// A size in the largest unit that makes it a whole number.
fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut number = bytes;
    while number >= 1024 && number % 1024 == 0 && unit + 1 < units.len() {
        number /= 1024;
        unit += 1;
    }
    format!("{number} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn example() -> Value {
        json!({
            "version": "1.2.3", "pid": 9, "uid": 0, "socket": "/s", "started": 1000, "restarts": 1,
            "vectors": 2, "memory": {"kind": "memfd", "name": "x", "size": 4 << 20},
            "ids": {"free": 65534, "used": 2, "remembered": 0},
            "descriptors": {"open": 21, "limit": 1024},
            "joined": 2, "left": 0, "lingering": 0, "messages": 10,
            "refused": {"busy": 0, "ended": 3},
            "peers": [
                {"id": 0, "pid": 4711, "uid": 0, "gid": 0, "program": "qemu-system-x86",
                 "name": "red", "since": 1000, "resumed": true, "pending": 0, "unread": 0,
                 "unread_bytes": 0},
                {"id": 1, "program": "a\u{1b}[31m", "since": 4600, "resumed": false,
                 "pending": 12345, "unread": 6, "unread_bytes": 4608},
            ],
        })
    }

    #[test]
    fn the_table_is_aligned() {
        let expected = "\
/s: ivshmem-server 1.2.3, pid 9, running for 1 h 1 min, 1 restart
  memory       memfd x, 4 MiB; vectors: 2
  ids          65534 free, 2 used, 0 remembered
  descriptors  21 of 1024
  clients      2 joined, 0 left, 3 refused (ended 3)

  ID   PID  USER  PROGRAM          MACHINE         FOR  TO SEND  UNREAD
   0  4711  root  qemu-system-x86  red      >1 h 1 min        0       0
   1     -  -     a\\u{1b}[31m      -             1 min    12345       6
";
        let found = text(&example(), 4660, false);
        assert_eq!(found, expected);
        assert!(!found.contains('\x1b'));
    }

    #[test]
    fn colours_mark_the_heading_and_the_peers_that_are_behind() {
        let found = text(&example(), 4660, true);
        let marked: Vec<&str> = found.lines().filter(|line| line.contains(YELLOW)).collect();
        assert!(matches!(marked[..], [line] if line.contains("12345")), "{found}");
        assert!(found.starts_with(BOLD));
    }

    #[test]
    fn sizes_and_ages_have_few_digits() {
        assert_eq!(size(4 << 20), "4 MiB");
        assert_eq!(size(1536), "1536 bytes");
        assert_eq!(size(0), "0 bytes");
        assert_eq!([59, 60, 3660, 90_000].map(age), ["59 s", "1 min", "1 h 1 min", "1 d 1 h"]);
    }
}
