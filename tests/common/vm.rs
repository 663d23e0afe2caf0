// SPDX-License-Identifier: GPL-2.0-or-later
//! Stock QEMU with one `ivshmem-doorbell` device, and a guest driver for that device.
//!
//! The guest's processor never runs (`-S`): the test does by qtest what a driver would do. The vectors stay masked, so
//! an interrupt that arrives stays visible as its bit in the MSI-X pending bit array until [`Vm::clear`]. That works
//! with every accelerator, and needs no guest image.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::qtest::Qtest;
use super::{PATIENCE, find_in_path, text_of, wait_for, wait_for_exit, wait_up_to};

const PROGRAM: &str = "qemu-system-x86_64";

/// How long a QEMU may take to come up; eight of them may be at it on a busy machine.
const START_UP: Duration = Duration::from_secs(30);

// Where the three regions of the device are put: in the hole below 4 GiB that the `pc` machine leaves to PCI.
const REGISTERS: u64 = 0xe000_0000;
const MSIX: u64 = 0xe001_0000;
const MEMORY: u64 = 0xd000_0000;

// Registers of the device (QEMU's docs/specs/ivshmem-spec).
const IV_POSITION: u64 = REGISTERS + 8;
const DOORBELL: u64 = REGISTERS + 12;

/// QEMU's processor emulation, or the hardware's.
#[derive(Clone, Copy)]
pub(crate) enum Accel {
    Tcg,
    Kvm,
}

/// A QEMU that was started and may still be coming up.
pub(crate) struct Starting {
    process: Process,
    listener: UnixListener,
}

impl Starting {
    /// Waits until it has read its greeting and answers, then sets its device up.
    #[track_caller]
    pub(crate) fn up(mut self) -> Vm {
        self.listener.set_nonblocking(true).expect("fcntl works");
        let stream = wait_up_to(START_UP, || {
            self.process.assert_running();
            self.listener.accept().ok()
        });
        let (stream, _) = stream.expect("QEMU opens its qtest connection");
        stream.set_nonblocking(false).expect("fcntl works");
        let mut qtest = Qtest::new(stream);
        // The main loop starts after the devices are made, and ivshmem is made only when its greeting is complete.
        qtest.set_patience(START_UP);
        if let Err(error) = qtest.try_command("inl 0xcf8") {
            panic!("QEMU did not come up within {START_UP:?}, is its greeting complete? {error}");
        }
        qtest.set_patience(PATIENCE);
        let msix = set_up(&mut qtest);
        Vm { process: self.process, qtest, msix }
    }
}

/// Where the device keeps its interrupts.
struct Msix {
    vectors: u16,
    table: u64,
    pending: u64,
}

/// A QEMU whose ivshmem device is ready for use. Dropped, it is killed.
pub(crate) struct Vm {
    process: Process,
    qtest: Qtest,
    msix: Msix,
}

impl Vm {
    /// Starts a QEMU and does not wait for it. `vectors` is what the device is told to have.
    #[track_caller]
    pub(crate) fn spawn(socket: &Path, vectors: u16, accel: Accel) -> Starting {
        let program = find_in_path(PROGRAM).unwrap_or_else(|| {
            panic!("{PROGRAM} is not installed; on Debian: apt-get install qemu-system-x86")
        });
        let dir = tempfile::tempdir().expect("a temporary directory");
        let qtest = dir.path().join("qtest");
        let listener = UnixListener::bind(&qtest).expect("a socket for qtest");
        let log = File::create(dir.path().join("log")).expect("a file for output");
        let accel = match accel {
            Accel::Tcg => "tcg",
            Accel::Kvm => "kvm",
        };
        let child = Command::new(program)
            .args(["-S", "-accel", accel, "-machine", "pc", "-m", "16"])
            .args(["-no-user-config", "-nodefaults", "-display", "none"])
            .args(["-monitor", "stdio", "-qtest-log", "/dev/null"])
            .args(["-qtest", &format!("unix:{}", qtest.display())])
            .arg("-chardev")
            .arg(format!("socket,id=c,path={}", socket.display()))
            .arg("-device")
            .arg(format!("ivshmem-doorbell,chardev=c,vectors={vectors}"))
            // Freed memory is overwritten: a wrong message from the server shows at once, not some day.
            .env("MALLOC_PERTURB_", "165")
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("dup works"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {PROGRAM}: {error}"));
        let process = Process { child, dir };
        Starting { process, listener }
    }

    /// Starts a QEMU and waits until its device is ready.
    #[track_caller]
    pub(crate) fn start(socket: &Path, vectors: u16) -> Self {
        Self::spawn(socket, vectors, Accel::Tcg).up()
    }

    /// The id that the guest sees as its own.
    #[track_caller]
    pub(crate) fn id(&mut self) -> u16 {
        let id = self.qtest.readl(IV_POSITION);
        u16::try_from(id).unwrap_or_else(|_| panic!("IVPosition is {id:#x}"))
    }

    /// How many vectors the guest sees.
    pub(crate) fn vectors(&self) -> u16 {
        self.msix.vectors
    }

    /// Rings a peer's doorbell. When this returns, the peer's eventfd is written, if this QEMU knows the peer.
    #[track_caller]
    pub(crate) fn ring(&mut self, peer: u16, vector: u16) {
        let value = u32::from(peer) << 16 | u32::from(vector);
        self.qtest.writel(DOORBELL, value);
    }

    /// The vectors whose pending bit is set at this moment.
    #[track_caller]
    pub(crate) fn pending(&mut self) -> BTreeSet<u16> {
        let mut set = BTreeSet::new();
        for first in (0..self.msix.vectors).step_by(32) {
            let word = self.qtest.readl(self.msix.pending + u64::from(first / 8));
            set.extend((0..32).filter(|bit| word >> bit & 1 == 1).map(|bit| first + bit));
        }
        set
    }

    /// The vectors whose pending bit is set once everything that was rung before this call has arrived: QEMU's main
    /// loop looks at all its descriptors in each turn, and answers at most one command per turn. So a ring that was
    /// there before the first command is served before the answer to the second; the third is for good measure.
    #[track_caller]
    pub(crate) fn settled(&mut self) -> BTreeSet<u16> {
        self.pending();
        self.pending();
        self.pending()
    }

    /// Waits for the pending bit of a vector.
    #[track_caller]
    pub(crate) fn wait_pending(&mut self, vector: u16) {
        wait_for(&format!("the pending bit of vector {vector}"), || {
            self.pending().contains(&vector).then_some(())
        });
    }

    /// Clears a pending bit: an unmasked vector delivers its message, which nobody takes (the device may not write to
    /// memory, no bus mastering), and is masked again.
    #[track_caller]
    pub(crate) fn clear(&mut self, vector: u16) {
        let control = self.msix.table + 16 * u64::from(vector) + 12;
        self.qtest.writel(control, 0);
        self.qtest.writel(control, 1);
    }

    /// Writes to the shared memory as the guest sees it.
    #[track_caller]
    pub(crate) fn write_memory(&mut self, offset: u64, bytes: &[u8]) {
        self.qtest.write(MEMORY + offset, bytes);
    }

    /// Reads the shared memory as the guest sees it.
    #[track_caller]
    pub(crate) fn read_memory(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.qtest.read(MEMORY + offset, len)
    }

    /// Ends it by its monitor's `quit`, and checks that it ended well.
    #[track_caller]
    pub(crate) fn quit(mut self) {
        self.process.assert_running();
        let monitor = self.process.child.stdin.as_mut().expect("a pipe");
        monitor.write_all(b"quit\n").expect("QEMU reads its monitor");
        let status = wait_for_exit(&mut self.process.child, "QEMU");
        assert!(status.success(), "QEMU after quit: {status}");
    }

    /// Ends it by SIGKILL.
    pub(crate) fn kill(self) {
        drop(self);
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process.child.id()).expect("a pid is an int");
        kill(Pid::from_raw(pid), signal).expect("it is our child");
    }
}

/// A QEMU process, killed when dropped.
struct Process {
    child: Child,
    dir: TempDir,
}

impl Process {
    #[track_caller]
    fn assert_running(&mut self) {
        if let Some(status) = self.child.try_wait().expect("waitpid works") {
            panic!("QEMU ended: {status}");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let ended = self.child.try_wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = text_of(&self.dir.path().join("log"));
            eprintln!("--- a QEMU ({ended:?}) ---\n{log}\n--- end ---");
        }
    }
}

/// Finds the device, places its regions, and turns on MSI-X with every vector masked, as it is after a reset.
#[track_caller]
fn set_up(qtest: &mut Qtest) -> Msix {
    /// Vendor and device id of ivshmem.
    const IVSHMEM: u32 = 0x1110_1af4;
    const COMMAND: u8 = 0x04;
    const COMMAND_MEMORY: u32 = 1 << 1;
    const BARS: [(u8, u64); 3] = [(0x10, REGISTERS), (0x14, MSIX), (0x18, MEMORY)];
    const CAPABILITIES: u8 = 0x34;
    const CAPABILITY_MSIX: u32 = 0x11;
    const MSIX_ENABLE: u32 = 1 << 31;

    let device = (0..32)
        .find(|device| qtest.config_read(*device, 0) == IVSHMEM)
        .expect("an ivshmem device on bus 0");
    for (register, address) in BARS {
        let address = u32::try_from(address).expect("below 4 GiB");
        qtest.config_write(device, register, address);
    }
    // BAR2 is of 64 bits: the upper half.
    qtest.config_write(device, 0x1c, 0);
    qtest.config_write(device, COMMAND, COMMAND_MEMORY);

    // The list ends with a 0; ids and links are the low bytes of each capability.
    let mut at = qtest.config_read(device, CAPABILITIES).to_le_bytes()[0];
    let header = loop {
        assert_ne!(at, 0, "an MSI-X capability");
        let header = qtest.config_read(device, at);
        if header & 0xff == CAPABILITY_MSIX {
            break header;
        }
        at = header.to_le_bytes()[1];
    };
    let [table, pending] = [4, 8].map(|offset| {
        let place = qtest.config_read(device, at + offset);
        assert_eq!(place & 7, 1, "MSI-X lives in BAR1");
        MSIX + u64::from(place & !7)
    });
    let vectors = u16::try_from((header >> 16 & 0x7ff) + 1).expect("11 bits");
    qtest.config_write(device, at, header | MSIX_ENABLE);
    for vector in 0..u64::from(vectors) {
        // An ordinary message address: with KVM, a vector that is unmasked gets a route made of it.
        qtest.writel(table + 16 * vector, 0xfee0_0000);
        let control = qtest.readl(table + 16 * vector + 12);
        assert_eq!(control & 1, 1, "vector {vector} is masked after a reset");
    }
    Msix { vectors, table, pending }
}
