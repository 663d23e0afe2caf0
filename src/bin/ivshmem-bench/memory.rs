// SPDX-License-Identifier: GPL-2.0-or-later
//! The throughput of the shared memory, beside that of memcpy in this process's own memory.

#![forbid(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use ivshmem::client::Memory;

use crate::Failure;
use crate::stats::median;

/// The bytes of a copy: a page, a block that fits in a cache near the core, and one that does not.
const BLOCKS: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];

/// The bytes that are copied in each round, in consecutive blocks.
const TURN: usize = 32 << 20;

/// The direction of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Read,
    Write,
}

/// The result, in bytes a second.
pub(crate) struct Outcome {
    pub(crate) way: Way,
    pub(crate) block: usize,
    pub(crate) library: f64,
    pub(crate) memcpy: f64,
    /// The ratio of the times in each round; the median of the rounds. More than 1 is slower than
    /// memcpy.
    pub(crate) ratio: f64,
}

/// Measures one direction with each block size. Calls `tick` after each round.
pub(crate) fn measure(
    memory: &Memory,
    way: Way,
    rounds: u32,
    tick: impl Fn(),
) -> Result<Vec<Outcome>, Failure> {
    let mut own = vec![1; memory.len().min(TURN)];
    let blocks = BLOCKS.into_iter().filter(|&block| block <= memory.len());
    blocks.map(|block| measure_block(memory, &mut own, way, block, rounds, &tick)).collect()
}

/// The number of block sizes that fit in this memory.
pub(crate) fn blocks(memory: &Memory) -> u64 {
    BLOCKS.into_iter().filter(|&block| block <= memory.len()).count() as u64
}

fn measure_block(
    memory: &Memory,
    own: &mut [u8],
    way: Way,
    block: usize,
    rounds: u32,
    tick: impl Fn(),
) -> Result<Outcome, Failure> {
    let mut buffer = vec![2; block];
    let whole = own.len() / block * block;
    // Use only whole blocks of `own`, whose pages have all been touched.
    let offsets = || (0..TURN / block).map(|n| n * block % whole);
    let by_library = |buffer: &mut [u8]| -> Result<f64, Failure> {
        let start = Instant::now();
        for offset in offsets() {
            match way {
                Way::Read => memory.read(offset, black_box(&mut *buffer))?,
                Way::Write => memory.write(offset, black_box(&*buffer))?,
            }
        }
        Ok(start.elapsed().as_secs_f64())
    };
    let mut by_hand = |buffer: &mut [u8]| {
        let start = Instant::now();
        for offset in offsets() {
            let there = &mut own[offset..offset + block];
            match way {
                Way::Read => buffer.copy_from_slice(black_box(there)),
                Way::Write => there.copy_from_slice(black_box(buffer)),
            }
            black_box((&mut *buffer, there));
        }
        start.elapsed().as_secs_f64()
    };
    by_library(&mut buffer)?;
    by_hand(&mut buffer);
    let (mut library, mut memcpy, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let (ours, bare) = if round % 2 == 0 {
            let ours = by_library(&mut buffer)?;
            (ours, by_hand(&mut buffer))
        } else {
            let bare = by_hand(&mut buffer);
            (by_library(&mut buffer)?, bare)
        };
        ratios.push(ours / bare);
        library.push(ours);
        memcpy.push(bare);
        tick();
    }
    let bytes = (TURN / block * block) as f64;
    Ok(Outcome {
        way,
        block,
        library: bytes / median(&library),
        memcpy: bytes / median(&memcpy),
        ratio: median(&ratios),
    })
}
