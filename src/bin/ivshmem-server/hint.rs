// SPDX-License-Identifier: GPL-2.0-or-later
//! The text of `--hint`: commands that attach a QEMU, list the peers and interrupt them.
//!
//! Each command works as it is printed, in a shell in the same directory.

#![forbid(unsafe_code)]

use std::path::Path;

use ivshmem::Server;

use crate::args::Args;

/// How to use `server`.
pub(crate) fn text(args: &Args, server: &Server) -> String {
    let socket = server.socket_path().unwrap_or(&args.socket).display().to_string();
    let vectors = server.vectors();
    // In QEMU's option syntax a comma in a value is doubled.
    let chardev = quoted(&format!("socket,id=ivshmem,path={}", socket.replace(',', ",,")));
    let client = client_beside(std::env::args_os().next().as_deref().map(Path::new));
    let (client, socket) = (quoted(&client), quoted(&socket));
    format!(
        "listening; {} bytes of shared memory, vectors: {vectors}. Attach a guest:\n\
         \n    qemu-system-x86_64 -accel kvm -accel tcg -machine pc -m 256 \\\n        \
         -chardev {chardev} \\\n        \
         -device ivshmem-doorbell,chardev=ivshmem,vectors={vectors}\n\
         \nList the peers, and interrupt all of them ('int ID VECTOR' interrupts one vector of one peer):\n\
         \n    {client} -S {socket} -e dump\n    {client} -S {socket} -e 'int all'\n\n",
        server.memory_size(),
    )
}

/// The command of the client program. If this program was started by a path, as by `make run`, the
/// client is in the same directory.
fn client_beside(program: Option<&Path>) -> String {
    const NAME: &str = "ivshmem-client";
    program
        .filter(|program| program.parent().is_some_and(|parent| parent != Path::new("")))
        .map(|program| program.with_file_name(NAME))
        .filter(|client| client.is_file())
        .map_or_else(|| NAME.to_owned(), |client| client.display().to_string())
}

/// One word for the shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_the_shell_would_change_is_quoted() {
        assert_eq!(quoted("/run/ivshmem/red"), "/run/ivshmem/red");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn the_client_is_named_by_its_path_only_if_it_is_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let program = dir.path().join("ivshmem-server");
        assert_eq!(client_beside(Some(&program)), "ivshmem-client");
        let client = dir.path().join("ivshmem-client");
        std::fs::write(&client, "").expect("a file");
        assert_eq!(client_beside(Some(&program)), client.display().to_string());
        for found_in_path in [None, Some(Path::new("ivshmem-server"))] {
            assert_eq!(client_beside(found_in_path), "ivshmem-client");
        }
    }
}
