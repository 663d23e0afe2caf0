// SPDX-License-Identifier: GPL-2.0-or-later
//! Which directories are safe, and what is removed from them.

#![forbid(unsafe_code)]

use super::*;
use std::os::unix::fs::symlink;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("it is ours");
}

#[test]
fn a_directory_is_safe_if_nobody_else_can_exchange_its_entries_or_its_path() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let outer = dir.path().join("outer");
    let inner = outer.join("inner");
    fs::create_dir_all(&inner).expect("two directories");
    symlink("outer/../outer/inner", dir.path().join("link")).expect("a link");
    set_mode(&outer, 0o755);
    for (of_outer, of_inner, safe) in [
        (0o755, 0o755, true),
        (0o755, 0o1777, true),
        (0o1777, 0o755, true),
        (0o755, 0o775, false),
        (0o755, 0o777, false),
        (0o777, 0o755, false),
        (0o775, 0o700, false),
    ] {
        set_mode(&outer, of_outer);
        set_mode(&inner, of_inner);
        for path in [inner.clone(), dir.path().join("link")] {
            let directory = Directory::open(&path).expect("it is there");
            assert_eq!(directory.is_safe(), safe, "{of_outer:o} {of_inner:o} {path:?}");
        }
    }
}

#[test]
fn a_path_must_end_in_a_name() {
    for path in ["", "/", "/tmp/", "..", "/tmp/..", "."] {
        let error = Directory::of(Path::new(path)).expect_err(path);
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}");
    }
    let name = |path| Directory::of(Path::new(path)).map(|(_, name)| name).expect(path);
    assert_eq!((name("name"), name("/name")), ("name".into(), "name".into()));
}

#[test]
fn only_the_object_that_is_meant_is_removed_and_nothing_else_stays() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("name");
    for mode in [0o755, 0o777] {
        set_mode(dir.path(), mode);
        let (directory, name) = Directory::of(&path).expect("it is there");
        let directory = directory.park();
        assert_eq!(directory.fd.is_none(), directory.is_safe());
        fs::write(&path, "one").expect("it can be written");
        let one = File::open(&path).expect("it is there");
        let entry = Entry::of(&one).expect("fstat works");
        fs::remove_file(&path).expect("it is ours");
        fs::write(&path, "two").expect("it can be written");
        assert!(!directory.remove(&name, &entry).expect("it is another"), "{mode:o}");
        assert_eq!(fs::read(&path).expect("it is left alone"), b"two");
        let two = File::open(&path).expect("it is there");
        let entry = Entry::of(&two).expect("fstat works");
        assert!(directory.remove(&name, &entry).expect("it can be removed"), "{mode:o}");
        assert!(!directory.remove(&name, &entry).expect("it is gone"), "{mode:o}");
        assert_eq!(fs::read_dir(dir.path()).expect("it is ours").count(), 0, "{mode:o}");
    }
}
