// SPDX-License-Identifier: GPL-2.0-or-later
//! `metrics --http`: one HTTP request from stdin, and its response. systemd or inetd accepts the
//! connection, so this program never listens to a network.

#![forbid(unsafe_code)]

use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::client::Failure;

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The bytes of a request, at most.
const MAX_REQUEST: usize = 16 << 10;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";

/// Reads a request up to the empty line behind its headers. Returns what came before the end, or
/// in time.
pub(crate) fn read_request(mut input: impl Read + AsFd) -> Vec<u8> {
    let until = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    while !is_complete(&request) && request.len() < MAX_REQUEST {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, timeout) == Ok(0) {
            break;
        }
        let mut part = [0; 4096];
        match input.read(&mut part) {
            Ok(0) => break,
            Ok(count) => request.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    request
}

/// Whether the headers are complete. A body is not read.
fn is_complete(request: &[u8]) -> bool {
    request.windows(4).any(|end| end == b"\r\n\r\n") || request.windows(2).any(|end| end == b"\n\n")
}

/// The response to a request. `metrics` is called only if it is needed.
pub(crate) fn answer(request: &[u8], metrics: impl FnOnce() -> Result<String, Failure>) -> Vec<u8> {
    let line = request.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let (method, path) = match words[..] {
        [method, path, version] if is_complete(request) && version.starts_with("HTTP/1.") => {
            (method, path)
        }
        _ => return response("400 Bad Request", "", PLAIN, "this is no HTTP request\n", true),
    };
    let has_body = method != "HEAD";
    if method != "GET" && method != "HEAD" {
        let text = "only GET and HEAD are supported\n";
        return response("405 Method Not Allowed", "Allow: GET, HEAD\r\n", PLAIN, text, true);
    }
    if path.split('?').next() != Some("/metrics") {
        let text = "the metrics are at /metrics\n";
        return response("404 Not Found", "", PLAIN, text, has_body);
    }
    match metrics() {
        Ok(text) => response("200 OK", "", OPENMETRICS, &text, has_body),
        Err(error) => {
            response("503 Service Unavailable", "", PLAIN, &format!("{error}\n"), has_body)
        }
    }
}

fn response(status: &str, headers: &str, kind: &str, body: &str, has_body: bool) -> Vec<u8> {
    let length = body.len();
    let body = if has_body { body } else { "" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\
         {headers}Connection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn status_of(request: &str) -> String {
        let answer = answer(request.as_bytes(), || Ok("text".to_owned()));
        let answer = String::from_utf8(answer).expect("it is text");
        let (head, body) = answer.split_once("\r\n\r\n").expect("it has a head");
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.and_then(|length| length.parse().ok()).expect("it has a length");
        assert!(body.is_empty() || body.len() == length, "{answer}");
        assert_eq!(body.is_empty(), request.starts_with("HEAD"), "{answer}");
        head.lines().next().expect("it has a line").to_owned()
    }

    #[test]
    fn each_request_has_its_status() {
        for (request, status) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK"),
            ("HEAD /metrics HTTP/1.0\r\n\r\n", "HTTP/1.1 200 OK"),
            ("GET /metrics?a=b HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK"),
            ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 404 Not Found"),
            ("HEAD / HTTP/1.1\r\n\r\n", "HTTP/1.1 404 Not Found"),
            ("POST /metrics HTTP/1.1\r\n\r\nx", "HTTP/1.1 405 Method Not Allowed"),
            ("GET /metrics HTTP/1.1\r\n", "HTTP/1.1 400 Bad Request"),
            ("GET /metrics SMTP\r\n\r\n", "HTTP/1.1 400 Bad Request"),
            ("", "HTTP/1.1 400 Bad Request"),
            ("\u{fffd}\0\n\n", "HTTP/1.1 400 Bad Request"),
        ] {
            assert_eq!(status_of(request), status, "{request:?}");
        }
    }

    #[test]
    fn a_request_is_read_up_to_its_empty_line_and_not_without_end() {
        let (mut writer, reader) = UnixStream::pair().expect("a pair");
        writer.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("it is read");
        assert_eq!(read_request(&reader), b"GET / HTTP/1.1\r\n\r\n", "the connection stays open");
        writer.write_all(&vec![b'x'; 2 * MAX_REQUEST]).expect("it is read");
        assert!(read_request(&reader).len() < MAX_REQUEST + 4096);
    }
}
