// SPDX-License-Identifier: GPL-2.0-or-later
//! The shared memory as a client has it: mapped, and read and written in ways that stay
//! right while other processes do the same.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::stat::{FileStat, SFlag, fstat};

use super::Error;
use crate::sys::Mapping;

/// The shared memory, mapped whole.
///
/// Others, guests among them, read and write it at the same time, so there is no slice of it
/// to be had in safe Rust: bytes are copied in and out, and numbers are atomics. Numbers are
/// in the byte order of this machine, which is the guests' on the same hardware.
///
/// # Memory that shrinks
/// To touch what lies behind the end of a file that was truncated is SIGBUS, the end of the
/// process, and any client of a server whose memory is not sealed can truncate it. Sealed
/// memory ([`MemorySource::Sealed`](crate::MemorySource::Sealed), `ivshmem-server --memfd`)
/// cannot shrink; whether it is sealed, [`is_sealed`](Self::is_sealed) says. Otherwise
/// [`read`](Self::read) and [`write`](Self::write) look at the size before each copy, and
/// [`check`](Self::check) does nothing else. The atomics do not look: a system call for each
/// would cost fifty times the access. Against an attacker who shrinks the memory in the
/// moment between, only a seal helps.
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
/// # stopper.stop();
/// # serving.join().unwrap()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Memory {
    object: OwnedFd,
    mapping: Mapping,
    sealed: bool,
}

/// The methods for numbers of one size.
macro_rules! numbers {
    ($bits:literal, $number:ty, $atomic:ty, $name:ident, $load:ident, $store:ident) => {
        #[doc = concat!("The ", $bits, "-bit number at `offset`, for whatever an atomic can do.")]
        ///
        /// # Errors
        /// [`Error::MemoryBounds`]; [`Error::MemoryAlignment`] where `offset` is not a multiple
        /// of its size.
        #[inline]
        pub fn $name(&self, offset: usize) -> Result<&$atomic, Error> {
            const SIZE: usize = size_of::<$number>();
            self.mapping.$name(offset).ok_or_else(|| match self.mapping.has(offset, SIZE) {
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
    /// Maps an object that came as the shared memory.
    pub(super) fn new(object: OwnedFd) -> Result<Self, Error> {
        let stat = look_at(&object)?;
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
        let failed = |action| move |source| Error::Memory { action, source };
        let len =
            usize::try_from(stat.st_size).map_err(|_| failed("map")(Errno::EOVERFLOW.into()))?;
        let mapping = Mapping::new(object.as_fd(), len).map_err(failed("map"))?;
        // What has no seals cannot be sealed; whatever the reason, it is then not.
        let sealed = fcntl(&object, FcntlArg::F_GET_SEALS)
            .is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK));
        let memory = Self { object, mapping, sealed };
        // It may have shrunk while it was being mapped.
        memory.check()?;
        Ok(memory)
    }

    /// Its size, in bytes.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    #[inline]
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// Whether its size is sealed, so that nobody can shrink it.
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Looks whether all that is mapped is still there.
    ///
    /// # Errors
    /// [`Error::MemoryShrank`].
    pub fn check(&self) -> Result<(), Error> {
        if self.sealed {
            return Ok(());
        }
        let mapped = self.mapping.len() as u64;
        let size = u64::try_from(look_at(&self.object)?.st_size).unwrap_or(0);
        if size < mapped { Err(Error::MemoryShrank { mapped, size }) } else { Ok(()) }
    }

    /// Copies from `offset` on into `buffer`. Where somebody else writes there meanwhile, the
    /// bytes may be of before and after.
    ///
    /// # Errors
    /// [`Error::MemoryBounds`], [`Error::MemoryShrank`].
    pub fn read(&self, offset: usize, buffer: &mut [u8]) -> Result<(), Error> {
        self.check()?;
        let len = buffer.len();
        let done = self.mapping.read(offset, buffer);
        if done { Ok(()) } else { Err(self.out_of_bounds(offset, len)) }
    }

    /// Copies `bytes` to `offset` and on.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        self.check()?;
        let done = self.mapping.write(offset, bytes);
        if done { Ok(()) } else { Err(self.out_of_bounds(offset, bytes.len())) }
    }

    numbers!("8", u8, AtomicU8, atomic_u8, load_u8, store_u8);
    numbers!("16", u16, AtomicU16, atomic_u16, load_u16, store_u16);
    numbers!("32", u32, AtomicU32, atomic_u32, load_u32, store_u32);
    numbers!("64", u64, AtomicU64, atomic_u64, load_u64, store_u64);

    /// Its first byte, for code that is `unsafe` anyway: good for [`len`](Self::len) bytes,
    /// aligned to a page, until the client is dropped.
    ///
    /// A slice made of it is sound only while nobody at all, in any process or guest, writes
    /// to that part of the memory (and for a mutable slice, nobody reads it), and while it
    /// does not shrink; nothing in here can make sure of that.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }

    #[cold]
    fn out_of_bounds(&self, offset: usize, len: usize) -> Error {
        Error::MemoryBounds { offset, len, size: self.mapping.len() }
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.object.as_fd()
    }
}

fn look_at(object: &OwnedFd) -> Result<FileStat, Error> {
    fstat(object).map_err(|errno| Error::Memory { action: "look at", source: errno.into() })
}
