// SPDX-License-Identifier: GPL-2.0-or-later
//! The output: the lines of the reference, or one JSON object per line.
//!
//! While the user edits a line, the editor owns the terminal. All output then goes through the
//! editor's printer, which puts it above the edited line.

#![forbid(unsafe_code)]

use std::io::{self, Write};

use serde_json::Value;

/// Prints while the user edits a line.
pub(crate) type Printer = Box<dyn FnMut(String) -> io::Result<()>>;

pub(crate) struct Output {
    pub(crate) json: bool,
    pub(crate) verbose: bool,
    pub(crate) printer: Option<Printer>,
    /// A write failed, for example because the reader has closed the pipe.
    pub(crate) closed: bool,
}

impl Output {
    /// Prints a line of text, unless the output is JSON.
    pub(crate) fn print(&mut self, line: impl AsRef<str>) {
        if !self.json {
            self.put(format!("{}\n", line.as_ref()));
        }
    }

    /// Prints a line of text with `-v`.
    pub(crate) fn detail(&mut self, line: impl FnOnce() -> String) {
        if self.verbose {
            self.print(line());
        }
    }

    /// Prints an object if the output is JSON.
    pub(crate) fn object(&mut self, value: impl FnOnce() -> Value) {
        if self.json {
            self.put(format!("{}\n", value()));
        }
    }

    /// Prints a line on stderr.
    pub(crate) fn warn(&mut self, line: &str) {
        match &mut self.printer {
            Some(print) => self.closed |= print(format!("{line}\n")).is_err(),
            // The program goes on without stderr, for example on a full disk.
            None => drop(writeln!(io::stderr(), "{line}")),
        }
    }

    /// Prints the prompt. The editor prints its own.
    pub(crate) fn prompt(&mut self) {
        if !self.json && self.printer.is_none() {
            self.put(super::PROMPT.to_owned());
        }
    }

    fn put(&mut self, text: String) {
        let done = match &mut self.printer {
            Some(print) => print(text),
            None => {
                let mut stdout = io::stdout();
                stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
            }
        };
        self.closed |= done.is_err();
    }
}

/// Formats bytes as text on one line. Other bytes than printable ASCII are escaped in the form that
/// `write` accepts.
pub(crate) fn text(bytes: &[u8]) -> String {
    let mut text = String::new();
    for &byte in bytes {
        match byte {
            b'\n' => text.push_str("\\n"),
            b'\r' => text.push_str("\\r"),
            b'\t' => text.push_str("\\t"),
            b'\\' => text.push_str("\\\\"),
            b'"' => text.push_str("\\\""),
            b' '..=b'~' => text.push(char::from(byte)),
            _ => text.push_str(&format!("\\x{byte:02x}")),
        }
    }
    text
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Formats bytes in lines of 16: offset, hex digits, characters.
pub(crate) fn dump(offset: usize, bytes: &[u8]) -> String {
    let line = |(number, line): (usize, &[u8])| {
        let hex: Vec<_> = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: String = line
            .iter()
            .map(|&byte| if (b' '..=b'~').contains(&byte) { char::from(byte) } else { '.' })
            .collect();
        format!("{:08x}  {:<47}  |{text}|", offset + 16 * number, hex.join(" "))
    };
    let lines: Vec<_> = bytes.chunks(16).enumerate().map(line).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_printed_with_its_source_once() {
        let error = ivshmem::Client::connect("/nowhere").unwrap_err();
        let text = ivshmem::Chain(&error).to_string();
        assert_eq!(text.matches("cannot connect to a server at \"/nowhere\": ").count(), 1);
        assert_eq!(text.matches("No such file or directory").count(), 1, "{text}");
    }

    #[test]
    fn memory_is_printed_in_three_forms() {
        let bytes = b"hello, \"world\"\n\0\xff";
        assert_eq!(hex(bytes), "68656c6c6f2c2022776f726c64220a00ff");
        assert_eq!(text(bytes), r#"hello, \"world\"\n\x00\xff"#);
        assert_eq!(
            dump(0x40, bytes),
            "00000040  68 65 6c 6c 6f 2c 20 22 77 6f 72 6c 64 22 0a 00  |hello, \"world\"..|\n\
             00000050  ff                                               |.|"
        );
    }
}
