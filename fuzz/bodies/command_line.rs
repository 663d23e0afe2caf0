// SPDX-License-Identifier: GPL-2.0-or-later
//! The daemon's command line: whole lines of any bytes, and its two small languages, sizes
//! and vectors, each held against a second reading of what the manual says.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use super::Input;

#[path = "../../src/bin/ivshmem-server/args.rs"]
mod args;

/// Arguments out of bytes, a newline between two: never a panic, and what is accepted is in
/// range. Whether it was accepted.
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
            assert!(!error.to_string().is_empty(), "an error that says nothing");
            false
        }
    }
}

/// A line made of our own options, in any order, with likely values. Whether it was accepted.
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

/// Letters that sizes and vectors are made of, and some that they are not.
const LETTERS: &[u8] = b"00112345678990..xXbBkKmMgGtTpPeEaAfF+- _,\xc3";

/// A size, and the same text as a number of vectors. How many of the two were accepted.
pub(crate) fn number(bytes: &[u8]) -> usize {
    let letters = |byte: &u8| LETTERS[usize::from(*byte) % LETTERS.len()];
    let text: Vec<u8> = bytes.iter().take(64).map(letters).collect();
    let option = |name: &str| {
        let mut argument = OsString::from(name);
        argument.push(OsString::from_vec(text.clone()));
        args::parse(["ivshmem-server".into(), argument]).ok()
    };
    let size = option("--size=").map(|args| u128::from(args.size));
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

/// What `text` is in bytes: the least and the most that is right. They differ only by what
/// digits beyond the 18th are worth.
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
    // The fraction, a digit at a time, doubled as often as the suffix says.
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

/// A number of digits only; one that is far too large is some number that is too large.
fn value(text: &str, base: u32) -> Option<u128> {
    if text.is_empty() {
        return None;
    }
    text.chars().try_fold(0_u128, |sum, digit| {
        Some((sum * u128::from(base) + u128::from(digit.to_digit(base)?)).min(1 << 100))
    })
}
