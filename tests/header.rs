// SPDX-License-Identifier: GPL-2.0-or-later
//! The C header: it is made from `src/`, and C and C++ compilers and Doxygen accept it without a
//! warning.

#![forbid(unsafe_code)]

mod c;

use std::fs;
use std::process::Command;

use c::{Compiler, expect_success, finish, need, project};

const SOURCES: [&str; 3] = ["src/abi.rs", "src/functions.rs", "src/additions.rs"];

/// The text before the functions that QEMU's header does not have.
const SECTION: &str = "\
/*
 * Additions: functions that QEMU's header does not have. IVSHMEM_SERVER_VERSION is defined where
 * they are.
 */

";
/// The start of the first of them.
const FIRST_ADDITION: &str = "/**\n * Returns the server's one descriptor";

fn generate() -> String {
    let mut config = cbindgen::Config::from_file(project("cbindgen.toml")).expect("cbindgen.toml");
    let includes = config.after_includes.take().expect("the version is in there");
    let includes = includes
        .replace("@VERSION@", env!("CARGO_PKG_VERSION"))
        .replace("@MAJOR@", env!("CARGO_PKG_VERSION_MAJOR"))
        .replace("@MINOR@", env!("CARGO_PKG_VERSION_MINOR"))
        .replace("@PATCH@", env!("CARGO_PKG_VERSION_PATCH"));
    config.after_includes = Some(includes);
    let sources = SOURCES
        .iter()
        .fold(cbindgen::Builder::new(), |builder, source| builder.with_src(project(source)));
    let bindings = sources.with_config(config).generate().expect("cbindgen reads src");
    let mut header = Vec::new();
    bindings.write(&mut header);
    let header = String::from_utf8(header).expect("a header is text");
    assert_eq!(header.matches(FIRST_ADDITION).count(), 1, "FIRST_ADDITION is out of date");
    header
        // Rustdoc's safety section is a precondition for Doxygen.
        .replace(" * # Safety\n * ", " * @pre ")
        // C89 has no such comments.
        .replace("// __cplusplus", "/* __cplusplus */")
        .replace("// extern \"C\"", "/* extern \"C\" */")
        .replace(FIRST_ADDITION, &format!("{SECTION}{FIRST_ADDITION}"))
}

#[test]
fn the_committed_header_is_what_cbindgen_makes_of_the_source() {
    let path = project("include/ivshmem-server.h");
    let made = generate();
    if std::env::var_os("IVSHMEM_WRITE_HEADER").is_some() {
        fs::write(&path, &made).expect("the header can be written");
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    if committed != made {
        let line = committed.lines().zip(made.lines()).position(|(is, should)| is != should);
        let line = line.unwrap_or_else(|| committed.lines().count().min(made.lines().count()));
        panic!(
            "include/ivshmem-server.h is not what src and cbindgen.toml say, from line {} on\n\
             is:     {:?}\nshould: {:?}\nto mend it: make header",
            line + 1,
            committed.lines().nth(line),
            made.lines().nth(line)
        );
    }
}

const GCC: (Compiler, Compiler) = (Compiler::Named("gcc", "gcc"), Compiler::Named("g++", "g++"));
const CLANG: (Compiler, Compiler) =
    (Compiler::Named("clang", "clang"), Compiler::Named("clang++", "clang"));

/// The definitions of QEMU's own headers, in the same shapes, written for this test.
const QEMUS_EVENT_NOTIFIER: &str = "
#ifndef QEMU_EVENT_NOTIFIER_H
#define QEMU_EVENT_NOTIFIER_H
#include <stdbool.h>
struct EventNotifier { int rfd; int wfd; bool initialized; };
typedef struct EventNotifier EventNotifier;
static inline int event_notifier_get_fd(const EventNotifier *e) { return e->rfd; }
#endif
";
const QEMUS_QUEUE: &str = "
#ifndef QEMU_SYS_QUEUE_H
#define QEMU_SYS_QUEUE_H
typedef struct QTailQLink { void *tql_next; struct QTailQLink *tql_prev; } QTailQLink;
#define QTAILQ_HEAD(name, type) union name { struct type *tqh_first; QTailQLink tqh_circ; }
#define QTAILQ_ENTRY(type) union { struct type *tqe_next; QTailQLink tqe_circ; }
#define QTAILQ_FOREACH(var, head, field) \\
    for ((var) = (head)->tqh_first; (var); (var) = (var)->field.tqe_next)
#define LINK_BEFORE(link) ((link).tql_prev->tql_prev->tql_next)
#define QTAILQ_LAST(head) ((__typeof__((head)->tqh_first)) LINK_BEFORE((head)->tqh_circ))
#define QTAILQ_PREV(elm, field) \\
    ((__typeof__((elm)->field.tqe_next)) LINK_BEFORE((elm)->field.tqe_circ))
#endif
";
const QEMUS_VERSION: &str = "#define IVSHMEM_PROTOCOL_VERSION 0\n";

/// Uses the header with QEMU's macros.
const WALK: &str = "
int walk(IvshmemServer *server);
int walk(IvshmemServer *server)
{
    IvshmemServerPeer *peer;
    int sum = 0;
    QTAILQ_FOREACH(peer, &server->peer_list, next) {
        sum += event_notifier_get_fd(&peer->vectors[0]);
    }
    for (peer = QTAILQ_LAST(&server->peer_list); peer; peer = QTAILQ_PREV(peer, next)) {
        sum += peer->sock_fd;
    }
    return sum;
}
";

/// Uses it alone: all types, all functions.
const ALONE: &str = "
static void note(int level, const char *text, void *opaque)
{
    (void)level;
    (void)text;
    (void)opaque;
}
int use(struct IvshmemServer *server, fd_set *fds);
int use(struct IvshmemServer *server, fd_set *fds)
{
    IvshmemServerPeer *peer = ivshmem_server_search_peer(server, 0);
    EventNotifier *vector = &peer->vectors[IVSHMEM_SERVER_MAX_VECTORS - 1];
    int maxfd = vector->wfd + (int)IVSHMEM_PROTOCOL_VERSION;
    if (ivshmem_server_init(server, \"s\", \"m\", true, 1, 1, false) < 0
        || ivshmem_server_start(server) < 0) {
        return -1;
    }
    ivshmem_server_get_fds(server, fds, &maxfd);
    ivshmem_server_dump(server);
    ivshmem_server_set_log(note, NULL, IVSHMEM_SERVER_VERSION_MAJOR);
    if (ivshmem_server_get_fd(server) < 0 || ivshmem_server_dispatch(server) < 0) {
        note(3, ivshmem_server_last_error(), NULL);
    }
    note(6, ivshmem_server_version(), NULL);
    note(6, IVSHMEM_SERVER_VERSION, NULL);
    ivshmem_server_close(server);
    return ivshmem_server_handle_fds(server, fds, maxfd);
}
";

/// Every language that the header is for, with every compiler.
fn everywhere() -> impl Iterator<Item = (Command, &'static str, &'static str)> {
    [GCC, CLANG].into_iter().flat_map(|(c, cxx)| {
        let c = ["c99", "c11", "gnu17"].map(|standard| (c.strict(), standard, "c"));
        let cxx = ["c++17", "c++20"].map(|standard| (cxx.strict(), standard, "c++"));
        c.into_iter().chain(cxx)
    })
}

/// The oldest C, with every compiler. QEMU's headers are not for it.
fn oldest() -> impl Iterator<Item = (Command, &'static str, &'static str)> {
    [GCC, CLANG].into_iter().map(|(c, _)| {
        let mut command = c.strict();
        // C89 has no bool: that of stdbool.h is an extension, which only clang reports.
        command.arg("-Wno-c99-extensions");
        (command, "c89", "c")
    })
}

/// Compiles a text. Returns the compiler's message if that fails.
fn compile(mut command: Command, standard: &str, language: &str, text: &str) -> Result<(), String> {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("text");
    fs::write(&file, text).expect("a file can be written");
    command.arg(format!("-std={standard}")).arg("-fsyntax-only").args(["-x", language]).arg(file);
    let output = finish(&mut command);
    let name = command.get_program().to_string_lossy();
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{name} -std={standard}:\n{said}")) }
}

#[track_caller]
fn expect(outcome: Result<(), String>) {
    if let Err(said) = outcome {
        panic!("{said}");
    }
}

#[test]
fn it_stands_alone_in_c_and_cxx_with_every_warning_an_error() {
    for (command, standard, language) in everywhere().chain(oldest()) {
        let text = format!("#include \"ivshmem-server.h\"\n#include \"ivshmem-server.h\"\n{ALONE}");
        expect(compile(command, standard, language, &text));
    }
}

#[test]
fn clang_finds_nothing_wrong_in_its_documentation() {
    let mut command = CLANG.0.strict();
    command.args(["-Wdocumentation", "-Wdocumentation-pedantic"]);
    // Doxygen's command, which clang does not know.
    command.arg("-fcomment-block-commands=file");
    expect(compile(command, "c11", "c", "#include \"ivshmem-server.h\"\n"));
}

#[test]
fn doxygen_finds_nothing_wrong_in_its_documentation() {
    need("doxygen", "doxygen");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("Doxyfile");
    let settings = format!(
        "INPUT = {}\nOUTPUT_DIRECTORY = {}\nQUIET = YES\nGENERATE_LATEX = NO\nHAVE_DOT = NO\n\
         OPTIMIZE_OUTPUT_FOR_C = YES\nJAVADOC_AUTOBRIEF = YES\nWARN_NO_PARAMDOC = YES\n\
         WARN_AS_ERROR = FAIL_ON_WARNINGS\n",
        project("include/ivshmem-server.h").display(),
        dir.path().display()
    );
    fs::write(&file, settings).expect("a file can be written");
    expect_success(Command::new("doxygen").arg(&file));
    let page = dir.path().join("html/ivshmem-server_8h.html");
    let page = fs::read_to_string(page).expect("doxygen makes a page of it");
    assert!(page.contains("ivshmem_server_dispatch"), "the page is empty");
}

#[test]
fn it_uses_qemus_definitions_where_they_came_first() {
    for (command, standard, language) in everywhere() {
        let text = [
            QEMUS_EVENT_NOTIFIER,
            QEMUS_QUEUE,
            QEMUS_VERSION,
            "#include \"ivshmem-server.h\"\n",
            WALK,
            "QTailQLink *head(IvshmemServer *s);",
            "QTailQLink *head(IvshmemServer *s) { return &s->peer_list.tqh_circ; }\n",
        ];
        expect(compile(command, standard, language, &text.concat()));
    }
}

#[test]
fn qemus_list_macros_may_come_later_too() {
    for (command, standard, language) in everywhere() {
        let get = "static inline int event_notifier_get_fd(const EventNotifier *e) \
                   { return e->rfd; }\n";
        let text = ["#include \"ivshmem-server.h\"\n", get, QEMUS_QUEUE, QEMUS_VERSION, WALK];
        expect(compile(command, standard, language, &text.concat()));
    }
}

#[test]
fn in_a_qemu_tree_the_order_of_headers_does_not_matter() {
    let tree = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir(tree.path().join("qemu")).expect("a directory");
    for (name, text) in
        [("qemu/event_notifier.h", QEMUS_EVENT_NOTIFIER), ("qemu/queue.h", QEMUS_QUEUE)]
    {
        fs::write(tree.path().join(name), text).expect("a file can be written");
    }
    for (mut command, standard, language) in everywhere() {
        command.arg("-I").arg(tree.path());
        let text = [
            "#define QEMU_OSDEP_H\n#include \"ivshmem-server.h\"\n",
            "#include \"qemu/event_notifier.h\"\n#include \"qemu/queue.h\"\n",
            QEMUS_VERSION,
            WALK,
        ];
        expect(compile(command, standard, language, &text.concat()));
    }
}

#[test]
fn a_wrong_program_does_not_compile() {
    for (command, standard, language) in everywhere() {
        let text = "#include \"ivshmem-server.h\"\n\
                    int *wrong(IvshmemServer *s);\n\
                    int *wrong(IvshmemServer *s) { return &s->cur_id; }\n";
        let said = compile(command, standard, language, text).expect_err("it must say no");
        assert!(said.contains("cur_id"), "{said}");
    }
}
