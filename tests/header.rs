// SPDX-License-Identifier: GPL-2.0-or-later
//! The C header: it is what `src/capi/` says, and every C and C++ compiler likes it.

use std::fs;
use std::path::Path;

const SOURCES: [&str; 2] = ["src/capi/abi.rs", "src/capi/functions.rs"];

fn generate() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    let sources = SOURCES
        .iter()
        .fold(cbindgen::Builder::new(), |builder, source| builder.with_src(root.join(source)));
    let bindings = sources.with_config(config).generate().expect("cbindgen reads src/capi");
    let mut header = Vec::new();
    bindings.write(&mut header);
    String::from_utf8(header).expect("a header is text")
}

#[test]
fn the_committed_header_is_what_cbindgen_makes_of_the_source() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/ivshmem-server.h");
    let made = generate();
    if std::env::var_os("IVSHMEM_WRITE_HEADER").is_some() {
        fs::write(&path, &made).expect("the header can be written");
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    if committed != made {
        let line = committed.lines().zip(made.lines()).position(|(is, should)| is != should);
        let line = line.unwrap_or_else(|| committed.lines().count().min(made.lines().count()));
        panic!(
            "include/ivshmem-server.h is not what src/capi and cbindgen.toml say, from line {} on\n\
             is:     {:?}\nshould: {:?}\nto mend it: make header",
            line + 1,
            committed.lines().nth(line),
            made.lines().nth(line)
        );
    }
}
