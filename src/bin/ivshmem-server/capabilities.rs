// SPDX-License-Identifier: GPL-2.0-or-later
//! `--print-capabilities`: what this program can do, as one JSON object.
//!
//! Management software asks QEMU's helper programs this way before it starts one. As there, a feature has the name of the
//! option that it is about, and all other options are ignored.
//!
//! It must not know what an option means.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::CommandFactory;
use ivshmem::{MAX_VECTORS, PROTOCOL_VERSION};
use serde_json::{Value, json};

use crate::args::Args;
use crate::logging;

const OPTION: &str = "--print-capabilities";

/// Features that have no option: sockets and descriptors from the service manager, and what it is told.
const WITHOUT_OPTION: [&str; 3] = ["fd-store", "socket-activation", "systemd-notify"];

/// Whether the arguments contain the option. It is looked for before they are parsed, because errors in the others do not
/// count.
pub(crate) fn are_asked_for(mut arguments: impl Iterator<Item = OsString>) -> bool {
    arguments.any(|argument| argument == OPTION)
}

pub(crate) fn print() -> ExitCode {
    match writeln!(io::stdout(), "{:#}", capabilities()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            logging::report(format_args!("cannot print the capabilities: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn capabilities() -> Value {
    let command = Args::command();
    let options = command.get_arguments().filter(|option| !option.is_hide_set());
    let options = options.filter_map(|option| option.get_long());
    let is_feature = |name: &&str| !["help", "version", "print-capabilities"].contains(name);
    let mut features: Vec<&str> = options.filter(is_feature).collect();
    features.extend(WITHOUT_OPTION);
    features.sort_unstable();
    json!({
        "type": "ivshmem-server",
        "version": env!("CARGO_PKG_VERSION"),
        "protocol-version": PROTOCOL_VERSION,
        "features": features,
        // The options that select it.
        "memory": ["memfd", "shm-dir", "shm-file", "shm-name"],
        "limits": {
            "vectors": MAX_VECTORS,
            "ids": u32::from(u16::MAX) + 1,
            "socket-path-bytes": 107,
        },
    })
}
