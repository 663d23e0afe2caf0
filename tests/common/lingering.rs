// SPDX-License-Identifier: GPL-2.0-or-later
//! A TCP socket that makes close(2) sleep.

#![forbid(unsafe_code)]

use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

/// A TCP socket whose last close(2) sleeps, since its peer does not read.
pub(crate) struct Lingering {
    pub(crate) socket: TcpStream,
    pub(crate) peer: TcpStream,
}

impl Lingering {
    pub(crate) fn new(time: Duration) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        setsockopt(&listener, sockopt::RcvBuf, &4096).expect("a small buffer");
        let address = listener.local_addr().expect("it is bound");
        let mut socket = TcpStream::connect(address).expect("it listens");
        setsockopt(&socket, sockopt::SndBuf, &4096).expect("a small buffer");
        let (peer, _) = listener.accept().expect("a connection");
        socket.set_nonblocking(true).expect("it is a socket");
        let full = socket.write_all(&[0; 1 << 20]).expect_err("it takes no more than its buffer");
        assert_eq!(full.kind(), ErrorKind::WouldBlock);
        socket.set_nonblocking(false).expect("it is a socket");
        let seconds = i32::try_from(time.as_secs()).expect("a short time");
        let linger = libc::linger { l_onoff: 1, l_linger: seconds };
        setsockopt(&socket, sockopt::Linger, &linger).expect("it is a socket");
        Self { socket, peer }
    }
}
