// SPDX-License-Identifier: GPL-2.0-or-later
//! The units for Prometheus, below a real systemd.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use crate::common::PATIENCE;
use crate::common::daemon::program;
use crate::common::systemd::Systemd;

/// A unit file of this project with other values.
fn unit(name: &str, changes: &[(&str, &str)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd").join(name);
    let mut text = fs::read_to_string(path).expect("it is there");
    for (old, new) in changes {
        assert!(text.contains(old), "no {old:?} in {name}");
        text = text.replace(old, new);
    }
    text
}

fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("systemd listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("not zero");
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).expect("TCP");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer in time");
    answer
}

#[test]
fn the_units_answer_prometheus_for_each_server_of_the_host() {
    // No other process has this port now.
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = free.expect("a port").port();
    let dir = Systemd::directory();
    let server = program();
    let service = format!(
        "[Service]\nType=notify\nRuntimeDirectory=ivshmem-server/red\nExecStart={} -F --memfd \
         -S /run/ivshmem-server/red/socket --control=/run/ivshmem-server/red/red.control\n",
        server.display()
    );
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("ours");
    write("red.service", &service);
    // The test's program, and no user that the package makes.
    let ctl = env!("CARGO_BIN_EXE_ivshmem-ctl");
    let changes = [
        ("/usr/bin/ivshmem-ctl", ctl),
        ("User=ivshmem", "User=root"),
        ("Group=ivshmem", "Group=root"),
        // The test's program may be below one of these directories.
        ("PrivateTmp=yes", "PrivateTmp=no"),
        ("ProtectHome=yes", "ProtectHome=no"),
    ];
    write("ivshmem-metrics@.service", &unit("ivshmem-metrics@.service", &changes));
    let address = format!("127.0.0.1:{port}");
    let socket = unit(
        "ivshmem-metrics.socket",
        &[("127.0.0.1:9733\nAccept", &format!("{address}\nAccept"))],
    );
    write("ivshmem-metrics.socket", &socket);
    let Some(systemd) = Systemd::boot(dir.path()) else { return };
    let source = dir.path().join("ivshmem-metrics.socket");
    let copied = systemd.run(&["cp", source.to_str().expect("UTF-8"), "/etc/systemd/system/"]);
    assert!(copied.status.success(), "{copied:?}");
    systemd.must(&["daemon-reload"]);
    systemd.must(&["start", "ivshmem-metrics.socket"]);
    let answer = get(port, "/metrics");
    assert!(answer.starts_with("HTTP/1.1 503 "), "there is no server yet: {answer}");
    systemd.must(&["start", "red"]);
    for _ in 0..2 {
        let answer = get(port, "/metrics");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(
            answer.contains("\nivshmem_peers{socket=\"/run/ivshmem-server/red/socket\"} 0\n"),
            "{answer}"
        );
        assert!(answer.ends_with("# EOF\n"), "{answer}");
    }
    assert!(get(port, "/").starts_with("HTTP/1.1 404 "));
    systemd.must(&["stop", "red"]);
    let analyzed = systemd.run(&[
        "systemd-analyze",
        "verify",
        "/etc/systemd/system/ivshmem-metrics.socket",
        "/etc/systemd/system/ivshmem-metrics@.service",
    ]);
    assert_eq!((analyzed.stdout.as_str(), analyzed.stderr.as_str()), ("", ""), "{analyzed:?}");
}
