// SPDX-License-Identifier: GPL-2.0-or-later
//! The shared memory as a client sees it: one mapping, shared by all handles to it.
//!
//! Other processes and guests access the memory at any time. So this module gives out copies and
//! atomics, never a slice. It checks what a descriptor is before it maps it. It must not know how
//! the descriptor came.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::{FileStat, SFlag, fstat};

use super::Error;
use super::untrusted::Untrusted;
use crate::sys::Mapping;

/// A handle to the shared memory, which is mapped whole.
///
/// A clone costs one reference count and refers to the same mapping. Handles may be used in any
/// thread, also while another thread waits in [`Client::wait`](super::Client::wait). The memory
/// stays mapped until the client and all handles are dropped.
///
/// Other peers read and write the memory at the same time. So safe code gets no slice of it:
/// [`read`](Self::read) and [`write`](Self::write) copy bytes, and numbers are atomics. All of
/// them may be used on the same bytes by several threads. Numbers are in the byte order of this
/// machine, which is also that of guests on the same hardware.
///
/// # Memory that shrinks
/// If a peer truncates the memory, an access behind its new end raises SIGBUS, which ends the
/// process. Sealed memory ([`MemorySource::Sealed`](crate::MemorySource::Sealed),
/// `ivshmem-server --memfd`) cannot shrink; [`is_sealed`](Self::is_sealed) tells whether it is
/// sealed. For memory without a seal, [`read`](Self::read) and [`write`](Self::write) compare the
/// size before each copy, and [`check`](Self::check) does only that. The atomics do not compare
/// it: the system call would cost fifty times the access. An attacker can still shrink the memory
/// between the check and the access. Only a seal prevents that.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("socket");
/// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
/// # let stopper = server.stopper()?;
/// # let serving = std::thread::spawn(move || server.run());
/// # let client = ivshmem::Client::connect(&path)?;
/// use std::sync::atomic::Ordering;
///
/// let memory = client.memory();
/// memory.write(64, b"hello")?;
/// let mut bytes = [0; 5];
/// memory.read(64, &mut bytes)?;
/// assert_eq!(&bytes, b"hello");
///
/// memory.store_u32(0, 7)?;
/// assert_eq!(memory.atomic_u32(0)?.fetch_add(1, Ordering::AcqRel), 7);
/// assert_eq!(memory.load_u32(0)?, 8);
/// assert!(memory.load_u32(2).is_err(), "not a multiple of 4");
/// assert!(memory.load_u8(memory.len()).is_err(), "behind the end");
///
/// let memory = memory.clone();
/// let other = std::thread::spawn(move || memory.write(64, b"HELLO"));
/// other.join().expect("no panic")?;
/// client.memory().read(64, &mut bytes)?;
/// assert_eq!(&bytes, b"HELLO");
/// # stopper.stop();
/// # serving.join().unwrap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Memory(Arc<Object>);

/// The memory's descriptor and its mapping, which is unmapped with the last handle.
#[derive(Debug)]
struct Object {
    descriptor: OwnedFd,
    mapping: Mapping,
    sealed: bool,
}

/// The methods for numbers of one size.
macro_rules! numbers {
    ($bits:literal, $number:ty, $atomic:ty, $name:ident, $load:ident, $store:ident) => {
        #[doc = concat!("The ", $bits, "-bit number at `offset`, as an atomic.")]
        ///
        /// # Errors
        /// [`Error::MemoryBounds`]; [`Error::MemoryAlignment`] if `offset` is not a multiple of
        /// the number's size.
        #[inline]
        pub fn $name(&self, offset: usize) -> Result<&$atomic, Error> {
            const SIZE: usize = size_of::<$number>();
            let mapping = &self.0.mapping;
            mapping.$name(offset).ok_or_else(|| match mapping.contains(offset, SIZE) {
                true => Error::MemoryAlignment { offset, size: SIZE },
                false => self.out_of_bounds(offset, SIZE),
            })
        }

        #[doc = concat!("Reads the ", $bits, "-bit number at `offset` (acquire).")]
        ///
        /// # Errors
        #[doc = concat!("As [`", stringify!($name), "`](Self::", stringify!($name), ").")]
        #[inline]
        pub fn $load(&self, offset: usize) -> Result<$number, Error> {
            Ok(self.$name(offset)?.load(Ordering::Acquire))
        }

        #[doc = concat!("Writes the ", $bits, "-bit number at `offset` (release).")]
        ///
        /// # Errors
        #[doc = concat!("As [`", stringify!($name), "`](Self::", stringify!($name), ").")]
        #[inline]
        pub fn $store(&self, offset: usize, value: $number) -> Result<(), Error> {
            self.$name(offset)?.store(value, Ordering::Release);
            Ok(())
        }
    };
}

impl Memory {
    /// Maps the object that the server sent as the shared memory.
    pub(super) fn new(descriptor: Untrusted) -> Result<Self, Error> {
        let stat = status(descriptor.as_fd())?;
        let kind = match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFREG if stat.st_size > 0 => None,
            SFlag::S_IFREG => Some("empty"),
            SFlag::S_IFDIR => Some("a directory"),
            SFlag::S_IFSOCK => Some("a socket"),
            SFlag::S_IFIFO => Some("a pipe"),
            SFlag::S_IFCHR | SFlag::S_IFBLK => Some("a device"),
            _ => Some("not a file"),
        };
        if let Some(kind) = kind {
            return Err(Error::MemoryKind { kind });
        }
        let descriptor = descriptor.keep();
        let failed = |action| move |source| Error::Memory { action, source };
        let len =
            usize::try_from(stat.st_size).map_err(|_| failed("map")(Errno::EOVERFLOW.into()))?;
        let mapping = Mapping::new(descriptor.as_fd(), len).map_err(failed("map"))?;
        // An object without seals gives an error here; it is not sealed.
        let sealed = fcntl(&descriptor, FcntlArg::F_GET_SEALS)
            .is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK));
        let memory = Self(Arc::new(Object { descriptor, mapping, sealed }));
        // It may have shrunk while it was being mapped.
        memory.check()?;
        Ok(memory)
    }

    /// The size, in bytes.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    #[inline]
    pub fn len(&self) -> usize {
        self.0.mapping.len()
    }

    /// Whether the size is sealed, so that no process can shrink the memory.
    pub fn is_sealed(&self) -> bool {
        self.0.sealed
    }

    /// Checks that the memory is still as large as the mapping. Sealed memory always is, and costs
    /// no system call.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
    /// # std::thread::spawn(move || server.run());
    /// # let client = ivshmem::Client::connect(&path)?;
    /// let memory = client.memory();
    /// if !memory.is_sealed() {
    ///     memory.check()?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::MemoryShrank`].
    pub fn check(&self) -> Result<(), Error> {
        if self.0.sealed {
            return Ok(());
        }
        let mapped = self.len() as u64;
        let size = u64::try_from(status(self.0.descriptor.as_fd())?.st_size).unwrap_or(0);
        if size < mapped { Err(Error::MemoryShrank { mapped, size }) } else { Ok(()) }
    }

    /// Copies from the memory at `offset` into `buffer`. If another thread or process writes there
    /// meanwhile, some bytes may be old and some new.
    ///
    /// The copy orders nothing: use an atomic to tell another peer that the bytes are complete.
    ///
    /// # Errors
    /// [`Error::MemoryBounds`], [`Error::MemoryShrank`].
    pub fn read(&self, offset: usize, buffer: &mut [u8]) -> Result<(), Error> {
        self.check()?;
        let len = buffer.len();
        let done = self.0.mapping.read(offset, buffer);
        if done { Ok(()) } else { Err(self.out_of_bounds(offset, len)) }
    }

    /// Copies `bytes` into the memory at `offset`. As with [`read`](Self::read), a reader may
    /// meanwhile see some bytes old and some new.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        self.check()?;
        let done = self.0.mapping.write(offset, bytes);
        if done { Ok(()) } else { Err(self.out_of_bounds(offset, bytes.len())) }
    }

    numbers!("8", u8, AtomicU8, atomic_u8, load_u8, store_u8);
    numbers!("16", u16, AtomicU16, atomic_u16, load_u16, store_u16);
    numbers!("32", u32, AtomicU32, atomic_u32, load_u32, store_u32);
    numbers!("64", u64, AtomicU64, atomic_u64, load_u64, store_u64);

    /// The address of the first byte, for `unsafe` code. It is aligned to a page and valid for
    /// [`len`](Self::len) bytes until the client and all handles are dropped.
    ///
    /// A slice of it is sound only while no thread, process or guest writes to that part of the
    /// memory (for a mutable slice: or reads it), and while the memory does not shrink. This
    /// library cannot make sure of either. A volatile access needs only that it does not shrink.
    ///
    /// ```
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("socket");
    /// # let mut server = ivshmem::Server::builder().socket_path(&path).start()?;
    /// # std::thread::spawn(move || server.run());
    /// # let client = ivshmem::Client::connect(&path)?;
    /// let memory = client.memory();
    /// memory.store_u8(7, 42)?;
    /// memory.check()?;
    /// // SAFETY: 7 is less than `len`, and the memory did not shrink.
    /// let byte = unsafe { memory.as_ptr().add(7).read_volatile() };
    /// assert_eq!(byte, 42);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.mapping.as_ptr()
    }

    #[cold]
    fn out_of_bounds(&self, offset: usize, len: usize) -> Error {
        Error::MemoryBounds { offset, len, size: self.len() }
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.descriptor.as_fd()
    }
}

impl AsRawFd for Memory {
    fn as_raw_fd(&self) -> RawFd {
        self.0.descriptor.as_raw_fd()
    }
}

fn status(descriptor: BorrowedFd<'_>) -> Result<FileStat, Error> {
    fstat(descriptor).map_err(|errno| Error::Memory { action: "look at", source: errno.into() })
}
