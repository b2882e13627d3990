//! Where things are in `meta`. Sizes in bytes unless the name says otherwise.

use crate::replication::copy_state::BITMAPS_MAX;
use crate::replication::ids::CHUNK;

/// The unit of every metadata write: the largest logical block that disks have, so that no write ever needs a
/// read-modify-write and all of them may go through O_DIRECT.
pub const BLOCK: u64 = 4096;
/// Superblock A; B follows it.
pub const SUPERBLOCKS: u64 = 0;
/// The activity log's ring.
pub const LOG: u64 = 2 * BLOCK;
/// Blocks in the ring. It must hold the [`LOG_SLICES`] transactions that together state the whole table and, after
/// them, the longest batch one call can make (see `log.rs`), which may be torn.
pub const LOG_BLOCKS: u64 = 64;
/// Transactions that together state the whole slot table.
pub const LOG_SLICES: u64 = 8;
/// The bitmap pages.
pub const BITMAPS: u64 = LOG + LOG_BLOCKS * BLOCK;
/// Sectors in a block; each of them verifies by itself.
pub const SECTORS: usize = 8;
/// Bytes of one sector's header (see `sector.rs`).
pub const SECTOR_HEADER: usize = 32;
/// Bytes that a sector carries.
pub const SECTOR_PAYLOAD: usize = 512 - SECTOR_HEADER;
/// Bytes that a block of sealed sectors carries.
pub const PAYLOAD: usize = SECTORS * SECTOR_PAYLOAD;
/// Bits of one bitmap page: one chunk each, so that a page covers 1920 MiB of the volume.
pub const BITS_PER_PAGE: u32 = PAYLOAD as u32 * 8;
/// 64-bit words of one bitmap page.
pub const WORDS_PER_PAGE: usize = PAYLOAD / 8;

/// Chunks of a volume of `size` bytes.
pub fn chunks(size: u64) -> u64 {
    size.div_ceil(CHUNK)
}

/// Pages one slot needs for a volume of `size` bytes.
pub fn pages(size: u64) -> u64 {
    chunks(size).div_ceil(u64::from(BITS_PER_PAGE))
}

/// Where page `index` of bitmap `slot` is. The pages of the slots take turns, so that growing a volume appends.
pub fn page_offset(slot: usize, index: u64) -> u64 {
    BITMAPS + (index * BITMAPS_MAX as u64 + slot as u64) * BLOCK
}

/// Length of `meta` for a volume of `size` bytes.
pub fn meta_len(size: u64) -> u64 {
    page_offset(0, pages(size))
}

/// Length of `data` for a volume of `size` bytes: one block more than is ever written, so that a file that was cut short
/// stays too short, whatever is written to it later.
pub fn data_len(size: u64) -> u64 {
    size.next_multiple_of(BLOCK) + BLOCK
}
