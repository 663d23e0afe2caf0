// SPDX-License-Identifier: GPL-2.0-or-later
//! Tests the C API with C programs. Each file in `c-tests/` checks one behaviour, and is run with the static library,
//! with the shared library, under ASan and UBSan, and under valgrind.

#![forbid(unsafe_code)]

mod c;

use std::collections::BTreeSet;

use c::{Mode, build, project, run};

#[track_caller]
fn check(name: &str, mode: Mode) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let program = build(&format!("c-tests/{name}.c"), mode, dir.path());
    let output = run(&program, mode);
    if mode == Mode::Valgrind {
        let report = String::from_utf8_lossy(&output.stderr);
        assert_eq!(leaked(&report), Vec::<&str>::new(), "descriptors in\n{report}");
    }
}

/// Descriptors that were open at the end and were not there at the start.
fn leaked(report: &str) -> Vec<&str> {
    let lines: Vec<&str> = report.lines().collect();
    let open = lines.windows(2).filter(|pair| pair[0].contains("Open "));
    open.filter(|pair| !pair[1].contains("<inherited from parent>")).map(|pair| pair[0]).collect()
}

#[test]
fn the_report_of_valgrind_is_understood() {
    let report = "==7== FILE DESCRIPTORS: 4 open (3 std) at exit.\n\
        ==7== Open AF_UNIX socket 5: <unknown>\n==7==    at 0x49A7A07: socket\n==7== \n\
        ==7== Open file descriptor 3: /x\n==7==    <inherited from parent>\n";
    assert_eq!(leaked(report), ["==7== Open AF_UNIX socket 5: <unknown>"]);
}

macro_rules! c_tests {
    ($($name:ident: $($how:ident = $mode:ident)*;)*) => {
        $(mod $name {
            use super::{Mode, check};

            $(#[test]
            fn $how() {
                check(stringify!($name), Mode::$mode);
            })*
        })*

        const NAMES: &[&str] = &[$(stringify!($name)),*];
    };
    (everywhere: $($name:ident)*; without_valgrind: $($other:ident)*) => {
        c_tests! {
            $($name:
                static_library = Static shared_library = Shared sanitizers = Sanitized
                valgrind = Valgrind;)*
            $($other:
                static_library = Static shared_library = Shared sanitizers = Sanitized;)*
        }
    };
}

c_tests! {
    everywhere:
        arguments back_pressure budget crowd daemon fd_sets foreign init_over last_error layout
        lifecycle list_walk log_threads logging one_descriptor
        parallel poll_loop refusals scribble select_loop threaded verbose;
    // Under valgrind no limit of descriptors is reached: valgrind only simulates the limit.
    without_valgrind: exhaustion
}

#[test]
fn every_c_test_is_run() {
    let files = std::fs::read_dir(project("c-tests")).expect("a directory");
    let files: BTreeSet<String> = files
        .filter_map(|entry| entry.expect("an entry").file_name().into_string().ok())
        .filter_map(|name| name.strip_suffix(".c").map(String::from))
        .filter(|name| name != "twin")
        .collect();
    assert_eq!(files, NAMES.iter().map(|&name| name.into()).collect());
}
