// SPDX-License-Identifier: GPL-2.0-or-later
//! Stock QEMU with one `ivshmem-doorbell` device, and a guest driver for that device.
//!
//! The guest's processor never runs (`-S`). The test uses qtest to do what a driver would do. The vectors stay
//! masked, so an interrupt that arrives sets a bit in the MSI-X pending bit array, which stays set until
//! [`Vm::clear`]. This works with every accelerator and needs no guest image.

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

/// The time limit for the start of a QEMU. Eight of them may start together on a busy machine.
const START_UP: Duration = Duration::from_secs(30);

// The addresses of the device's three regions, in the range below 4 GiB that the `pc` machine leaves to PCI.
const REGISTERS: u64 = 0xe000_0000;
const MSIX: u64 = 0xe001_0000;
const MEMORY: u64 = 0xd000_0000;

// Registers of the device (QEMU's docs/specs/ivshmem-spec).
const IV_POSITION: u64 = REGISTERS + 8;
const DOORBELL: u64 = REGISTERS + 12;

/// The accelerator: QEMU's processor emulation, or KVM.
#[derive(Clone, Copy)]
pub(crate) enum Accel {
    Tcg,
    Kvm,
}

/// A QEMU that was started and may not be ready yet.
pub(crate) struct Starting {
    /// `None` if another program has started it.
    process: Option<Process>,
    listener: UnixListener,
}

impl Starting {
    /// Waits until QEMU has read its greeting and answers, then sets up its device.
    #[track_caller]
    pub(crate) fn up(mut self) -> Vm {
        self.listener.set_nonblocking(true).expect("fcntl works");
        let stream = wait_up_to(START_UP, || {
            if let Some(process) = &mut self.process {
                process.assert_running();
            }
            self.listener.accept().ok()
        });
        let (stream, _) = stream.expect("QEMU opens its qtest connection");
        stream.set_nonblocking(false).expect("fcntl works");
        let mut qtest = Qtest::new(stream);
        // QEMU's main loop starts after all devices exist, and the ivshmem device exists only after its
        // greeting is complete.
        qtest.set_patience(START_UP);
        if let Err(error) = qtest.try_command("inl 0xcf8") {
            panic!("QEMU did not start within {START_UP:?}; is its greeting complete? {error}");
        }
        qtest.set_patience(PATIENCE);
        let msix = set_up(&mut qtest);
        Vm { process: self.process, qtest, msix }
    }
}

/// The number of MSI-X vectors, and the addresses of the MSI-X table and of the pending bits.
struct Msix {
    vectors: u16,
    table: u64,
    pending: u64,
}

/// A QEMU whose ivshmem device is ready. It is killed when this value is dropped, unless another program has started it.
pub(crate) struct Vm {
    process: Option<Process>,
    qtest: Qtest,
    msix: Msix,
}

impl Vm {
    /// Starts a QEMU and does not wait for it. `vectors` is the device's `vectors` property.
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
            // malloc overwrites freed memory, so a heap error by a wrong message shows at once.
            .env("MALLOC_PERTURB_", "165")
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("dup works"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {PROGRAM}: {error}"));
        let process = Some(Process { child, dir });
        Starting { process, listener }
    }

    /// Starts a QEMU and waits until its device is ready.
    #[track_caller]
    pub(crate) fn start(socket: &Path, vectors: u16) -> Self {
        Self::spawn(socket, vectors, Accel::Tcg).up()
    }

    /// A QEMU that another program has started, with a qtest connection to this socket and with a stopped processor.
    #[track_caller]
    pub(crate) fn attach(listener: UnixListener) -> Self {
        Starting { process: None, listener }.up()
    }

    /// The guest's own id.
    #[track_caller]
    pub(crate) fn id(&mut self) -> u16 {
        let id = self.qtest.readl(IV_POSITION);
        u16::try_from(id).unwrap_or_else(|_| panic!("IVPosition is {id:#x}"))
    }

    /// How many vectors the guest sees.
    pub(crate) fn vectors(&self) -> u16 {
        self.msix.vectors
    }

    /// Rings a peer's doorbell. When this returns, the peer's eventfd is written if this QEMU has received it.
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

    /// The vectors whose pending bit is set, after all rings that were made before this call have arrived. QEMU's main
    /// loop checks all its descriptors in each turn, and answers at most one command per turn. So QEMU processes a ring
    /// from before the first command before it answers the second one. The third is an extra margin.
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

    /// Clears a pending bit. Unmasking the vector delivers its message, which has no effect because the device may not
    /// write to memory (no bus mastering). Then the vector is masked again.
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

    /// Ends QEMU by the monitor's `quit` command, and checks the exit status.
    #[track_caller]
    pub(crate) fn quit(self) {
        let mut process = self.process.expect("this test has started it");
        process.assert_running();
        let monitor = process.child.stdin.as_mut().expect("a pipe");
        monitor.write_all(b"quit\n").expect("QEMU reads its monitor");
        let status = wait_for_exit(&mut process.child, "QEMU");
        assert!(status.success(), "QEMU after quit: {status}");
    }

    /// Ends QEMU by SIGKILL.
    pub(crate) fn kill(self) {
        drop(self);
    }

    /// Sends QEMU a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("this test has started it");
        let pid = i32::try_from(process.child.id()).expect("a pid is an int");
        kill(Pid::from_raw(pid), signal).expect("it is our child");
    }
}

/// A QEMU process. It is killed when this value is dropped.
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

/// Finds the device, sets the addresses of its regions, and enables MSI-X. Every vector stays masked, as after a reset.
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
    // BAR2 has 64 bits; this is the upper half.
    qtest.config_write(device, 0x1c, 0);
    qtest.config_write(device, COMMAND, COMMAND_MEMORY);

    // The capability list ends with 0. The low bytes of each capability are its id and the link to the next one.
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
        let location = qtest.config_read(device, at + offset);
        assert_eq!(location & 7, 1, "MSI-X is in BAR1");
        MSIX + u64::from(location & !7)
    });
    let vectors = u16::try_from((header >> 16 & 0x7ff) + 1).expect("11 bits");
    qtest.config_write(device, at, header | MSIX_ENABLE);
    for vector in 0..u64::from(vectors) {
        // A usual message address. With KVM, QEMU makes a route from it when the vector is unmasked.
        qtest.writel(table + 16 * vector, 0xfee0_0000);
        let control = qtest.readl(table + 16 * vector + 12);
        assert_eq!(control & 1, 1, "vector {vector} is masked after a reset");
    }
    Msix { vectors, table, pending }
}
