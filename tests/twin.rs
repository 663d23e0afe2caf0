// SPDX-License-Identifier: GPL-2.0-or-later
//! The twin run: one C program makes the same calls on this library and on QEMU's, and prints
//! results, descriptors, the list, and every message.
//!
//! `c-tests/twin.txt` is what QEMU 8.2.7's printed. Where `IVSHMEM_REFERENCE_OBJ` holds what to
//! give the linker for QEMU's (its object and what that needs), it is run and compared again.

#![forbid(unsafe_code)]

mod c;

use std::fs;
use std::path::Path;
use std::process::Command;

use c::{Compiler, PRIVATE_LIBRARIES, expect_success, project, static_library};

/// What is known to differ, and stands in docs/compatibility.md: the line of the reference,
/// and ours.
const DIFFERENCES: [(&str, &str); 1] = [
    // At close the reference tells those who are left of each one it closes.
    ("a receives 2, end", "a receives, end"),
];

fn transcript(object: &Path, libraries: &[String]) -> Vec<String> {
    let program = object.with_extension("program");
    expect_success(Command::new("cc").arg(object).arg("-o").arg(&program).args(libraries));
    let output = expect_success(&mut Command::new(&program));
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().map(String::from).collect()
}

#[test]
fn the_same_calls_give_the_same_as_on_the_reference() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let object = dir.path().join("twin.o");
    let mut compile = Compiler::Default.strict();
    compile.args(["-std=c11", "-D_GNU_SOURCE", "-c", "-o"]).arg(&object);
    expect_success(compile.arg(project("c-tests/twin.c")));

    let reference = fs::read_to_string(project("c-tests/twin.txt")).expect("the transcript");
    let reference: Vec<String> = reference.lines().map(String::from).collect();
    let mut ours = vec![static_library().to_string_lossy().into_owned()];
    ours.extend(PRIVATE_LIBRARIES.map(String::from));
    let ours = transcript(&object, &ours);
    let differ = reference.iter().zip(&ours).filter(|(theirs, ours)| theirs != ours);
    let differ: Vec<_> = differ.map(|(theirs, ours)| (theirs.as_str(), ours.as_str())).collect();
    assert_eq!(differ, DIFFERENCES);
    assert_eq!(reference.len(), ours.len());

    if let Ok(libraries) = std::env::var("IVSHMEM_REFERENCE_OBJ") {
        let libraries: Vec<String> = libraries.split_whitespace().map(String::from).collect();
        assert_eq!(transcript(&object, &libraries), reference);
    }
}
