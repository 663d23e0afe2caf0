// SPDX-License-Identifier: GPL-2.0-or-later
//! A small client of QEMU's qtest protocol: lines of text that replace the guest's processor.
//!
//! It accesses ports, guest-physical memory and PCI configuration space, and knows nothing about ivshmem. Each command
//! waits for its answer, so QEMU's main loop has done the access when a method returns.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The test's end of QEMU's `-qtest` socket.
pub(crate) struct Qtest {
    stream: BufReader<UnixStream>,
}

impl Qtest {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream: BufReader::new(stream) }
    }

    /// Sets how long QEMU may take to answer a command.
    pub(crate) fn set_patience(&mut self, limit: Duration) {
        self.stream.get_ref().set_read_timeout(Some(limit)).expect("the limit is not zero");
    }

    /// Sends one command and returns what follows `OK`.
    pub(crate) fn try_command(&mut self, command: &str) -> io::Result<String> {
        self.stream.get_mut().write_all(format!("{command}\n").as_bytes())?;
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match line.trim_end().strip_prefix("OK") {
            Some(rest) => Ok(rest.trim_start().to_owned()),
            None => Err(io::Error::other(format!("unexpected answer {line:?}"))),
        }
    }

    #[track_caller]
    fn command(&mut self, command: &str) -> String {
        match self.try_command(command) {
            Ok(answer) => answer,
            Err(error) => panic!("QEMU did not execute {command:?}: {error}"),
        }
    }

    #[track_caller]
    fn command_u32(&mut self, command: &str) -> u32 {
        let answer = self.command(command);
        answer
            .strip_prefix("0x")
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .and_then(|value| u32::try_from(value).ok())
            .unwrap_or_else(|| panic!("{command:?} returned {answer:?}"))
    }

    /// Writes to an I/O port.
    #[track_caller]
    pub(crate) fn outl(&mut self, port: u16, value: u32) {
        self.command(&format!("outl {port:#x} {value:#x}"));
    }

    /// Reads an I/O port.
    #[track_caller]
    pub(crate) fn inl(&mut self, port: u16) -> u32 {
        self.command_u32(&format!("inl {port:#x}"))
    }

    /// Writes four bytes of guest-physical memory in one access.
    #[track_caller]
    pub(crate) fn writel(&mut self, address: u64, value: u32) {
        self.command(&format!("writel {address:#x} {value:#x}"));
    }

    /// Reads four bytes of guest-physical memory in one access.
    #[track_caller]
    pub(crate) fn readl(&mut self, address: u64) -> u32 {
        self.command_u32(&format!("readl {address:#x}"))
    }

    /// Writes a range of guest-physical memory.
    #[track_caller]
    pub(crate) fn write(&mut self, address: u64, bytes: &[u8]) {
        let mut command = format!("write {address:#x} {:#x} 0x", bytes.len());
        for byte in bytes {
            write!(command, "{byte:02x}").expect("writing to a String succeeds");
        }
        self.command(&command);
    }

    /// Reads a range of guest-physical memory.
    #[track_caller]
    pub(crate) fn read(&mut self, address: u64, len: usize) -> Vec<u8> {
        let answer = self.command(&format!("read {address:#x} {len:#x}"));
        let digits = answer.strip_prefix("0x").unwrap_or(&answer).as_bytes();
        assert_eq!(digits.len(), 2 * len, "length of {answer:?}");
        digits
            .chunks(2)
            .map(|pair| {
                std::str::from_utf8(pair)
                    .ok()
                    .and_then(|pair| u8::from_str_radix(pair, 16).ok())
                    .unwrap_or_else(|| panic!("not hexadecimal: {answer:?}"))
            })
            .collect()
    }

    /// Reads a register of PCI configuration space on bus 0. `register` is a multiple of four.
    #[track_caller]
    pub(crate) fn config_read(&mut self, device: u8, register: u8) -> u32 {
        self.outl(CONFIG_ADDRESS, config_address(device, register));
        self.inl(CONFIG_DATA)
    }

    /// Writes a register of PCI configuration space on bus 0. `register` is a multiple of four.
    #[track_caller]
    pub(crate) fn config_write(&mut self, device: u8, register: u8, value: u32) {
        self.outl(CONFIG_ADDRESS, config_address(device, register));
        self.outl(CONFIG_DATA, value);
    }
}

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;

/// The value that selects a register of function 0 of a device on bus 0.
fn config_address(device: u8, register: u8) -> u32 {
    assert!(device < 32 && register % 4 == 0);
    1 << 31 | u32::from(device) << 11 | u32::from(register)
}
