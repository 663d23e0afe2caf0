// SPDX-License-Identifier: GPL-2.0-or-later
//! The `ivshmem-ctl` program: shows servers without joining them, and disconnects clients. It is a
//! client of the control socket, whose interface docs/control.md describes.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use serde_json::{Value, json};

mod args;
mod client;
mod http;
mod metrics;
mod output;
mod servers;
mod table;
mod watch;

use args::{Args, Command};
use client::{Client, Failure};
use output::Output;
use servers::Server;

fn main() -> ExitCode {
    let args = match args::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(error) => error.exit(),
    };
    let mut out = Output::new(args.json);
    let result = match args.command {
        Command::Metrics { http: true } => answer_request(&args, &mut out),
        _ => servers::find(&args).and_then(|servers| run(&args, &servers, &mut out)),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            warn(&error);
            ExitCode::FAILURE
        }
    }
}

/// Prints an error.
fn warn(error: &Failure) {
    let _ = writeln!(io::stderr(), "ivshmem-ctl: {error}");
}

/// Runs the command. Returns whether it succeeded for each server; the errors were printed.
fn run(args: &Args, servers: &[Server], out: &mut Output) -> Result<bool, Failure> {
    match &args.command {
        Command::Status => Ok(each(servers, |server, number| {
            let status = server.connect()?.call("Status", json!({}))?;
            if out.json {
                out.print(&format!("{status}\n"));
            } else {
                let gap = if number > 0 { "\n" } else { "" };
                out.print(&format!("{gap}{}", table::status(&status, out.colours)));
            }
            Ok(())
        })),
        Command::Disconnect { id } => Ok(each(servers, |server, _| {
            server.connect()?.call("Disconnect", json!({"id": id}))?;
            if out.json {
                out.print(&format!("{}\n", json!({"disconnected": id})));
            } else {
                out.print(&format!("peer {id} is disconnected\n"));
            }
            Ok(())
        })),
        Command::Watch => watch::run(servers, out),
        Command::Metrics { .. } => {
            let (text, is_complete) = metrics_of(servers);
            out.print(&if out.json { format!("{}\n", json!({"text": text})) } else { text });
            Ok(is_complete)
        }
    }
}

/// Answers an HTTP request on stdin. Each response is a success, also one that says what is wrong.
fn answer_request(args: &Args, out: &mut Output) -> Result<bool, Failure> {
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    let stdin = stdin.map_err(|error| format!("cannot use stdin: {error}"))?;
    let request = http::read_request(File::from(stdin));
    let metrics = || servers::find(args).map(|servers| metrics_of(&servers).0);
    out.print_bytes(&http::answer(&request, metrics));
    Ok(true)
}

/// Does `act` for each server, and prints its errors. Returns whether there was none.
fn each(servers: &[Server], mut act: impl FnMut(&Server, usize) -> Result<(), Failure>) -> bool {
    let mut is_complete = true;
    for (number, server) in servers.iter().enumerate() {
        if let Err(error) = act(server, number) {
            warn(&error);
            is_complete = false;
        }
    }
    is_complete
}

/// The metrics of all servers as one text, and whether each server answered.
fn metrics_of(servers: &[Server]) -> (String, bool) {
    let mut texts = Vec::new();
    let is_complete = each(servers, |server, _| {
        let text = server.connect().and_then(|mut client: Client| {
            let reply = client.call("Metrics", json!({}))?;
            let text = reply.get("text").and_then(Value::as_str);
            Ok(text.ok_or("the reply of the server has no text")?.to_owned())
        });
        match text {
            Ok(text) => texts.push((server.name(), Some(text))),
            Err(error) => {
                texts.push((server.name(), None));
                return Err(error);
            }
        }
        Ok(())
    });
    (metrics::merge(&texts), is_complete)
}
