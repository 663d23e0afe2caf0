// SPDX-License-Identifier: GPL-2.0-or-later
//! The `ivshmem-client` program: a peer of the guests, for users and scripts. The library is the
//! client; this program adds commands and output. Its manual is docs/client.md.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::process::ExitCode;

mod args;
mod command;
mod editor;
mod input;
mod output;
mod program;
mod session;

use args::Args;
use input::Input;
use output::Output;
use program::Program;

/// The same prompt as the reference's.
const PROMPT: &str = "cmd> ";

fn main() -> ExitCode {
    let args = match args::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            // Like the reference, not 2 like clap.
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match run(&args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            let _ = writeln!(io::stderr(), "ivshmem-client: {}", ivshmem::Chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<u8, Box<dyn std::error::Error>> {
    let (input, printer) = match &args.exec[..] {
        [] => Input::stdin(args.json)?,
        commands => (Input::given(commands), None),
    };
    let out = Output { json: args.json, verbose: args.verbose, printer, closed: false };
    Program::new(args, out, input).run()
}
