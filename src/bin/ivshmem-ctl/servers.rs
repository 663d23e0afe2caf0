// SPDX-License-Identifier: GPL-2.0-or-later
//! The servers that the command line names, by their control sockets.

#![forbid(unsafe_code)]

use std::fs::{self, DirEntry};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::args::Args;
use crate::client::{Client, Failure};

/// The default of the server.
const SOCKET: &str = "/tmp/ivshmem_socket";

const SUFFIX: &str = ".control";

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    /// The path of its control socket.
    pub(crate) control: PathBuf,
}

impl Server {
    /// The path as text.
    pub(crate) fn name(&self) -> String {
        self.control.display().to_string()
    }

    pub(crate) fn connect(&self) -> Result<Client, Failure> {
        Client::connect(&self.control)
    }
}

pub(crate) fn find(args: &Args) -> Result<Vec<Server>, Failure> {
    if let Some(directory) = &args.directory {
        return in_directory(directory);
    }
    if let Some(control) = &args.control {
        return Ok(vec![Server { control: control.clone() }]);
    }
    let socket = args.socket.clone().unwrap_or_else(|| SOCKET.into());
    let mut control = socket.into_os_string();
    control.push(SUFFIX);
    Ok(vec![Server { control: control.into() }])
}

fn in_directory(directory: &Path) -> Result<Vec<Server>, Failure> {
    let failed = |error: std::io::Error| {
        Failure::from(format!("cannot read the directory {directory:?}: {error}"))
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        add_control_socket(&entry, &mut found);
        if entry.file_type().is_ok_and(|file| file.is_dir()) {
            // One that cannot be read is another user's.
            let inside = fs::read_dir(entry.path()).into_iter().flatten().flatten();
            inside.for_each(|entry| add_control_socket(&entry, &mut found));
        }
    }
    if found.is_empty() {
        return Err(format!(
            "the directory {directory:?} has no control socket: no socket whose name ends in \
             {SUFFIX:?}"
        )
        .into());
    }
    found.sort();
    Ok(found.into_iter().map(|control| Server { control }).collect())
}

fn add_control_socket(entry: &DirEntry, found: &mut Vec<PathBuf>) {
    let is_socket = entry.file_type().is_ok_and(|file| file.is_socket());
    if is_socket && entry.file_name().as_encoded_bytes().ends_with(SUFFIX.as_bytes()) {
        found.push(entry.path());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn control_sockets_of_a_directory_are_found_by_type_and_name() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(in_directory(dir.path()).is_err(), "there is none");
        let path = |name| dir.path().join(name);
        fs::write(path("file.control"), "").expect("a file");
        fs::create_dir_all(path("c/deeper")).expect("a directory");
        let names = ["b.control", "a.control", "a", "c/red.control", "c/deeper/x.control"];
        let _sockets = names.map(|name| UnixListener::bind(path(name)).expect("a socket"));
        let found = in_directory(dir.path()).expect("there are three");
        let expected = ["a.control", "b.control", "c/red.control"];
        assert_eq!(found, expected.map(|name| Server { control: path(name) }));
    }
}
