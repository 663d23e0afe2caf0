// SPDX-License-Identifier: GPL-2.0-or-later
//! What the fuzz targets do, apart from any fuzzer.
//!
//! Each body takes bytes, makes of them what it is about, and panics when something does not
//! hold. cargo-fuzz drives them with coverage (`fuzz_targets/`), and `tests/fuzz_short.rs`
//! with seeds and pseudo-random bytes in every `make check`.

// Each fuzz target compiles this for itself and uses one body.
#![allow(dead_code)]

pub(crate) mod client;
pub(crate) mod command_line;
pub(crate) mod interleave;

#[path = "../../tests/common/checked_client.rs"]
pub(crate) mod checked_client;

#[path = "../../tests/common/view.rs"]
pub(crate) mod view;

/// Bytes read one after another; after the last one come zeros.
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    /// One of these.
    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }
}
