// SPDX-License-Identifier: GPL-2.0-or-later
//! The daemon's command line: whole lines of any bytes, and its two number formats, sizes and
//! vectors. Each number is compared with a second parser, written from the manual.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::Input;

#[path = "../../src/bin/ivshmem-server/args.rs"]
mod args;

/// Parses arguments that are separated by newlines. It must never panic, and accepted values must be
/// in range. Returns whether the line was accepted.
pub(crate) fn line(bytes: &[u8]) -> bool {
    let arguments = bytes.split(|&byte| byte == b'\n').map(|part| OsString::from_vec(part.into()));
    match args::parse(std::iter::once("ivshmem-server".into()).chain(arguments)) {
        Ok(args) => {
            assert!((1..=ivshmem::MAX_VECTORS).contains(&args.vectors));
            assert!(args.foreground || !args.verbose, "-v without -F");
            let _: args::Memory = args.memory();
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty(), "an error without text");
            false
        }
    }
}

/// Parses a line of valid options, in any order, with likely values. Returns whether it was accepted.
pub(crate) fn likely_line(bytes: &[u8]) -> bool {
    const OPTIONS: [&str; 24] = [
        "-h",
        "-v",
        "-F",
        "-p",
        "-S",
        "-M",
        "-m",
        "-l",
        "-n",
        "--memfd",
        "--hint",
        "--size",
        "--vectors",
        "--socket",
        "--shm-name=x",
        "-l4M",
        "-n=8",
        "--",
        "-Fv",
        "--version",
        "-FvS",
        "--pid-file",
        "--detached",
        "-",
    ];
    const VALUES: [&[u8]; 8] =
        [b"4M", b"1.5G", b"0x10", b"/tmp/x", b"", b"\xff\xfe", b"-1", b"99999999999999999999"];
    let mut input = Input::new(bytes);
    let mut text = Vec::new();
    while !input.is_empty() {
        match input.byte() {
            value @ 0..80 => text.extend_from_slice(VALUES[usize::from(value) % VALUES.len()]),
            option => {
                text.extend_from_slice(OPTIONS[usize::from(option) % OPTIONS.len()].as_bytes());
            }
        }
        text.push(b'\n');
    }
    text.pop();
    line(&text)
}

/// Characters that occur in sizes and vectors, and some that do not.
const LETTERS: &[u8] = b"00112345678990..xXbBkKmMgGtTpPeEaAfF+- _,\xc3";

/// Parses the same text as a size and as a number of vectors. Returns how many of the two were accepted.
pub(crate) fn number(bytes: &[u8]) -> usize {
    let letters = |byte: &u8| LETTERS[usize::from(*byte) % LETTERS.len()];
    let text: Vec<u8> = bytes.iter().take(64).map(letters).collect();
    let option = |name: &str| {
        let mut argument = OsString::from(name);
        argument.push(OsString::from_vec(text.clone()));
        args::parse(["ivshmem-server".into(), argument]).ok()
    };
    let size = option("--size=").and_then(|args| args.size.map(u128::from));
    let vectors = option("--vectors=").map(|args| args.vectors);
    let text = String::from_utf8_lossy(&text);
    match (size, expected_size(&text)) {
        (Some(size), Some((low, high))) => {
            assert!((low..=high).contains(&size), "size {text:?}: {size}, not {low} to {high}");
        }
        (None, None) => {}
        (size, expected) => panic!("size {text:?}: {size:?}, not {expected:?}"),
    }
    assert_eq!(vectors, expected_vectors(&text), "vectors {text:?}");
    usize::from(size.is_some()) + usize::from(vectors.is_some())
}

/// The size in bytes that `text` means, as the least and the greatest correct value. They differ only
/// if there are more than 18 fraction digits.
fn expected_size(text: &str) -> Option<(u128, u128)> {
    let fits = |bytes: u128| bytes <= u128::from(u64::MAX);
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return value(hex, 16).filter(|&bytes| fits(bytes)).map(|bytes| (bytes, bytes));
    }
    let upper = text.to_ascii_uppercase();
    let power = "BKMGTPE".chars().position(|suffix| upper.ends_with(suffix));
    let number = if power.is_some() { &upper[..upper.len() - 1] } else { &upper[..] };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if power.unwrap_or(0) > 0 => (whole, Some(fraction)),
        Some(_) => return None,
        None => (number, None),
    };
    let doublings = 10 * power.unwrap_or(0);
    let mut bytes = value(whole, 10)?;
    // Doubles the whole part and the fraction digits once for each power of two of the suffix.
    let mut digits: Vec<u8> = match fraction {
        Some(fraction) => {
            value(fraction, 10)?;
            fraction.bytes().map(|digit| digit - b'0').collect()
        }
        None => Vec::new(),
    };
    let slack = if digits.len() > 18 { 2 } else { 0 };
    for _ in 0..doublings {
        let mut carry = 0;
        for digit in digits.iter_mut().rev() {
            let doubled = *digit * 2 + carry;
            (*digit, carry) = (doubled % 10, doubled / 10);
        }
        bytes = bytes.checked_mul(2)?.checked_add(u128::from(carry))?;
    }
    fits(bytes).then_some((bytes.saturating_sub(slack), bytes))
}

fn expected_vectors(text: &str) -> Option<u32> {
    let number = if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        value(hex, 16)
    } else if text.starts_with('0') && text.len() > 1 {
        value(text, 8)
    } else {
        value(text, 10)
    }?;
    u32::try_from(number).ok().filter(|number| (1..=2048).contains(number))
}

/// Parses digits only. A number that is far too large gives some value that is too large.
fn value(text: &str, base: u32) -> Option<u128> {
    if text.is_empty() {
        return None;
    }
    text.chars().try_fold(0_u128, |sum, digit| {
        Some((sum * u128::from(base) + u128::from(digit.to_digit(base)?)).min(1 << 100))
    })
}
