// SPDX-License-Identifier: GPL-2.0-or-later
//! The recipes in README.md and docs/libvirt.md: the tests run the commands and use the XML that stand there.

#![forbid(unsafe_code)]

use std::path::Path;

use crate::common::text_of;

/// The code blocks below a heading, up to the next heading, without their indentation of four spaces.
#[track_caller]
pub(crate) fn blocks<const N: usize>(file: &str, heading: &str) -> [String; N] {
    let text = text_of(&Path::new(env!("CARGO_MANIFEST_DIR")).join(file));
    let mut lines = text.lines().skip_while(|line| *line != heading);
    assert!(lines.next().is_some(), "{file} has the heading {heading:?}");
    let mut blocks = vec![String::new()];
    for line in lines.take_while(|line| !line.starts_with('#')) {
        let last = blocks.last_mut().expect("there is one");
        match line.strip_prefix("    ") {
            Some(code) => last.extend([code, "\n"]),
            None if !last.is_empty() => blocks.push(String::new()),
            None => {}
        }
    }
    blocks.retain(|block| !block.is_empty());
    let found = blocks.len();
    blocks.try_into().unwrap_or_else(|_| panic!("{found} code blocks in {file}, {heading:?}"))
}
