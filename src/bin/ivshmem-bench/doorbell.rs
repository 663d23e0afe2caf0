// SPDX-License-Identifier: GPL-2.0-or-later
//! Doorbell round trips: one peer rings; the other peer, another process, rings back.
//!
//! One pair of peers uses the library, the other uses bare eventfds. The pairs take turns, and
//! ratios are computed within a round, so that other work on the machine affects both pairs.
//!
//! Two peers that sleep run on the same processor. Otherwise the scheduler might place one pair
//! on one processor and the other pair on two. On two processors each ring has to wake an idle
//! processor, which takes seven times as long.

#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use ivshmem::Client;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::Failure;
use crate::bell::{Bare, Bell, Library, Receiver};
use crate::host::Host;
use crate::stats::{Spread, median};

/// The time limit for the other peer to join.
const PATIENCE: Duration = Duration::from_secs(10);

/// The result for one kind of receiver.
pub(crate) struct Outcome {
    pub(crate) receiver: Receiver,
    pub(crate) library: Spread,
    pub(crate) bare: Spread,
    /// The ratio of the medians in each round; the median of the rounds.
    pub(crate) ratio: f64,
}

/// The other peer's process. Dropping it kills the process.
struct Echo(Child);

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Echo {
    fn start(
        words: &[&str],
        stdin: OwnedFd,
        stdout: Stdio,
    ) -> Result<(Self, Option<ChildStdout>), Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("--echo")
            .args(words)
            .stdin(stdin)
            .stdout(stdout)
            .spawn()
            .map_err(|error| format!("cannot start the other peer: {error}"))?;
        let output = child.stdout.take();
        Ok((Self(child), output))
    }
}

/// Binds this thread, and the processes that it starts, to one processor until it is dropped.
struct OneProcessor(CpuSet);

impl OneProcessor {
    fn keep_to() -> Result<Self, Failure> {
        let this = Pid::from_raw(0);
        let all = sched_getaffinity(this)?;
        let first = (0..CpuSet::count()).find(|&cpu| all.is_set(cpu).unwrap_or(false));
        let mut one = CpuSet::new();
        one.set(first.ok_or("there is no processor to run on")?)?;
        sched_setaffinity(this, &one)?;
        Ok(Self(all))
    }
}

impl Drop for OneProcessor {
    fn drop(&mut self) {
        // This set of processors was allowed before, so this cannot fail.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}

/// Measures both pairs. Calls `tick` after each round.
pub(crate) fn measure(
    host: &Host,
    receiver: Receiver,
    trips: u32,
    rounds: u32,
    tick: impl Fn(),
) -> Result<Outcome, Failure> {
    let _kept = match receiver {
        Receiver::Blocking => Some(OneProcessor::keep_to()?),
        Receiver::Busy => None,
    };
    // Both pairs stay alive to the end. The pair whose turn it is not sleeps.
    let (_bare_echo, mut bare) = bare(receiver, trips)?;
    let (_client, _library_echo, mut library) = library(host, receiver, trips)?;
    let mut all = (Vec::new(), Vec::new());
    let mut ratios = Vec::new();
    for round in 0..rounds {
        let (by_library, by_hand) = if round % 2 == 0 {
            let by_library = turn(&mut library, receiver, trips)?;
            (by_library, turn(&mut bare, receiver, trips)?)
        } else {
            let by_hand = turn(&mut bare, receiver, trips)?;
            (turn(&mut library, receiver, trips)?, by_hand)
        };
        ratios.push(median(&by_library) / median(&by_hand));
        all.0.extend(by_library);
        all.1.extend(by_hand);
        tick();
    }
    Ok(Outcome {
        receiver,
        library: Spread::of(all.0),
        bare: Spread::of(all.1),
        ratio: median(&ratios),
    })
}

/// One pair's turn. Returns the seconds of each round trip except the first, which woke the other
/// peer.
fn turn(bell: &mut impl Bell, receiver: Receiver, trips: u32) -> Result<Vec<f64>, Failure> {
    let mut times = Vec::with_capacity(trips as usize);
    for _ in 0..trips {
        let start = Instant::now();
        bell.ring()?;
        bell.wait(receiver)?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.remove(0);
    Ok(times)
}

fn bare(receiver: Receiver, trips: u32) -> Result<(Echo, Bare), Failure> {
    let eventfd = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
    let (there, here) = (eventfd()?, eventfd()?);
    let words = ["bare", receiver.name(), &trips.to_string()];
    let (stdin, stdout) = (there.as_fd().try_clone_to_owned()?, here.as_fd().try_clone_to_owned()?);
    let (echo, _) = Echo::start(&words, stdin, stdout.into())?;
    Ok((echo, Bare { other: there.into(), own: here.into() }))
}

fn library(
    host: &Host,
    receiver: Receiver,
    trips: u32,
) -> Result<(Client, Echo, Library), Failure> {
    let mut client = host.join()?;
    let (trips, id) = (trips.to_string(), client.id().to_string());
    let vectors = host.vectors().to_string();
    let words = ["library", receiver.name(), &trips, &id, &vectors];
    let socket = UnixStream::connect(host.socket())?;
    let (echo, output) = Echo::start(&words, socket.into(), Stdio::piped())?;
    let mut line = String::new();
    BufReader::new(output.ok_or("the other peer has no output")?).read_line(&mut line)?;
    let other: u16 = line.trim().parse().map_err(|_| "the other peer could not join")?;
    let deadline = Instant::now() + PATIENCE;
    while client.peer(other).is_none() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("the server does not tell of peer {other}").into());
        }
        client.wait(Some(left))?;
    }
    // No polling before it sleeps, because the bare side does not poll either.
    let own = client.vector(0)?.spin(Duration::ZERO);
    let bell = Library { other: client.doorbell(other, 0)?, own };
    Ok((client, echo, bell))
}

/// Runs as the other peer until it is killed.
pub(crate) fn echo(words: &[String]) -> Result<(), Failure> {
    // When the measuring process ends for any reason, this process must end too.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    match *words {
        ["bare", receiver, trips] => {
            let other = io::stdout().as_fd().try_clone_to_owned()?;
            answer(&mut Bare { other, own: stdin }, receiver, trips)
        }
        ["library", receiver, trips, other, vectors] => {
            let client = Client::builder().vectors(vectors.parse()?).adopt(stdin)?;
            let own = client.vector(0)?.spin(Duration::ZERO);
            let mut bell = Library { other: client.doorbell(other.parse()?, 0)?, own };
            writeln!(io::stdout(), "{}", client.id())?;
            answer(&mut bell, receiver, trips)
        }
        _ => Err("--echo is for this program itself".into()),
    }
}

/// Answers one turn after another. It sleeps until the first ring of a turn.
fn answer(bell: &mut impl Bell, receiver: &str, trips: &str) -> Result<(), Failure> {
    let receiver = Receiver::from_name(receiver).ok_or("a receiver is blocking or busy")?;
    let trips: u32 = trips.parse()?;
    loop {
        while !bell.sleep(None)? {}
        bell.ring()?;
        for _ in 1..trips {
            bell.wait(receiver)?;
            bell.ring()?;
        }
    }
}
