// SPDX-License-Identifier: GPL-2.0-or-later
//! Programs that others wrote: a Varlink client, and a parser of OpenMetrics text.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::caller::{control_of, wait_for_status};
use crate::common::daemon::Daemon;
use crate::common::peer::Peer;
use crate::common::skip::skip;

/// Runs a Python script with these modules and arguments.
fn python(script: &str, modules: Option<&Path>, args: &[&str], input: &str) -> Output {
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", script]).args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
    command.stderr(Stdio::piped()).env_remove("PYTHONPATH");
    if let Some(modules) = modules {
        command.env("PYTHONPATH", modules);
    }
    let mut child = command.spawn().expect("python3 (Debian package python3)");
    child.stdin.take().expect("it is piped").write_all(input.as_bytes()).expect("it reads");
    child.wait_with_output().expect("it runs")
}

fn text(output: &Output) -> String {
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    let text = String::from_utf8_lossy(stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(stderr));
    text
}

/// Where scripts/deps installs the Python package varlink.
fn varlink_module() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it is in the target");
    target.join("test-python")
}

#[test]
fn the_varlink_client_of_python_uses_every_method() {
    let modules = varlink_module();
    if !modules.join("varlink").is_dir() {
        return skip("the Python package varlink is not installed (make deps)");
    }
    let daemon = Daemon::builder().vectors(2).start();
    let socket = daemon.socket_path();
    let _peers = [Peer::join(socket, 2), Peer::join(socket, 2)];
    let script = r#"
import json, sys, varlink
found = {}
client = varlink.Client("unix:" + sys.argv[1])
with client.open("org.varlink.service") as service:
    found["info"] = service.GetInfo()
with client.open("org.ivshmem.Server") as server:
    found["status"] = server.Status()
    found["metrics"] = server.Metrics()["text"].splitlines()[-1]
    server.Disconnect(1)
    try:
        server.Disconnect(7)
    except varlink.VarlinkError as error:
        found["error"] = [error.error(), error.parameters()]
    try:
        server.Watch()
    except varlink.VarlinkError as error:
        found["more"] = error.error()
with client.open("org.ivshmem.Server") as server:
    for reply in server.Watch(_more=True):
        found["event"] = reply["event"]["kind"]
        break
print(json.dumps(found))
"#;
    let control = control_of(socket);
    let output = python(script, Some(&modules), &[control.to_str().expect("ours")], "");
    let found: Value = serde_json::from_str(&text(&output)).expect("it printed JSON");
    assert_eq!(found["info"]["interfaces"], json!(["org.varlink.service", "org.ivshmem.Server"]));
    assert_eq!(found["status"]["vectors"], 2);
    assert_eq!(found["status"]["peers"].as_array().map(Vec::len), Some(2));
    assert_eq!(found["metrics"], "# EOF");
    assert_eq!(found["error"], json!(["org.ivshmem.Server.NoSuchPeer", {"id": 7}]));
    assert_eq!(found["more"], "org.varlink.service.ExpectedMore");
    assert_eq!(found["event"], "ready");
    wait_for_status(socket, "peer 1 left", |status| status["left"] == 1);
    daemon.stop();
}

/// Parses OpenMetrics text with the client of Prometheus. Returns [name, labels, value] of each sample.
fn parsed(metrics: &str) -> Vec<(String, Value, f64)> {
    let script = r#"
import json, sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
samples = [sample for family in parse(sys.stdin.read()) for sample in family.samples]
print(json.dumps([[sample.name, sample.labels, sample.value] for sample in samples]))
"#;
    let output = python(script, None, &[], metrics);
    let samples: Value = serde_json::from_str(&text(&output)).expect("it printed JSON");
    let samples = samples.as_array().expect("a list").iter();
    samples
        .map(|sample| {
            let name = sample[0].as_str().expect("a name").to_owned();
            (name, sample[1].clone(), sample[2].as_f64().expect("a number"))
        })
        .collect()
}

fn ctl(args: &[&str], input: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ivshmem-ctl"));
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it was built");
    child.stdin.take().expect("it is piped").write_all(input.as_bytes()).expect("it reads");
    child.wait_with_output().expect("it runs")
}

#[test]
fn the_parser_of_prometheus_reads_the_metrics_of_one_server_and_of_several() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let option = |name: &str| format!("--control={}", directory.path().join(name).display());
    let daemons = [
        Daemon::builder().vectors(2).arg(option("a.control")).start(),
        Daemon::builder().arg(option("b.control")).arg("--max-clients=1").start(),
    ];
    let _peers = daemons.each_ref().map(|daemon| Peer::join(daemon.socket_path(), 1));
    let _refused = std::os::unix::net::UnixStream::connect(daemons[1].socket_path());
    let sockets = daemons.each_ref().map(|daemon| daemon.socket_path().display().to_string());
    let arg = directory.path().to_str().expect("ours");
    let metrics = crate::common::wait_for("the second client was refused", || {
        let metrics = text(&ctl(&["metrics", "--directory", arg], ""));
        metrics.contains("reason=\"too_many_clients\"} 1\n").then_some(metrics)
    });
    let samples = parsed(&metrics);
    let of = |name: &str, socket: &str, label: Option<(&str, &str)>| {
        let is_right = |(found, labels, _): &&(String, Value, f64)| {
            found == name
                && labels["socket"] == socket
                && label.is_none_or(|(label, value)| labels[label] == value)
        };
        let found: Vec<f64> = samples.iter().filter(is_right).map(|sample| sample.2).collect();
        assert_eq!(found.len(), 1, "{name} of {socket}: {found:?}");
        found[0]
    };
    for (number, socket) in sockets.iter().enumerate() {
        assert_eq!(of("ivshmem_peers", socket, None), 1.0);
        assert_eq!(of("ivshmem_joins_total", socket, None), 1.0);
        assert_eq!(of("ivshmem_vectors", socket, None), [2.0, 1.0][number]);
        assert_eq!(of("ivshmem_memory_bytes", socket, None), f64::from(1 << 20));
        assert_eq!(of("ivshmem_ids", socket, Some(("state", "used"))), 1.0);
        assert_eq!(of("ivshmem_server_info", socket, Some(("memory_kind", "posix"))), 1.0);
        let refused = of("ivshmem_refusals_total", socket, Some(("reason", "too_many_clients")));
        assert_eq!(refused, [0.0, 1.0][number]);
    }
    let up = samples.iter().filter(|(name, ..)| name == "ivshmem_up").count();
    assert_eq!(up, 2);

    // One server, as an HTTP response.
    let control = directory.path().join("a.control");
    let args = ["metrics", "--http", "--control", control.to_str().expect("ours")];
    let answer = text(&ctl(&args, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"));
    let (head, body) = answer.split_once("\r\n\r\n").expect("it has a head");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    assert!(parsed(body).iter().any(|(name, ..)| name == "ivshmem_peers"));

    // A server that does not answer is down, and the others are not missing.
    std::fs::write(directory.path().join("x"), "").expect("a file");
    drop(std::os::unix::net::UnixListener::bind(directory.path().join("c.control")).expect("new"));
    let output = ctl(&["metrics", "--directory", arg], "");
    assert_eq!(output.status.code(), Some(1));
    let samples = parsed(&String::from_utf8_lossy(&output.stdout));
    let up: Vec<f64> =
        samples.iter().filter(|(name, ..)| name == "ivshmem_up").map(|sample| sample.2).collect();
    assert_eq!(up, [1.0, 1.0, 0.0]);
    for daemon in daemons {
        daemon.stop();
    }
}
