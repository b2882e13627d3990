//! Compression of payloads: once for all replicas, and only where it pays.

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use super::WireError;
use super::frame::PayloadRef;

/// A block must lose at least one part in this many, or it is sent raw: less does not pay for expanding it.
const MARGIN: usize = 8;
/// From this length on lz4_flex needs the large table.
const LARGE: usize = u16::MAX as usize;

/// Payloads in a row that do not shrink, after which one thinks of a stream as incompressible.
const MISSES: u8 = 8;
/// Payloads that are then sent raw before the next one is tried: what a stream that shrinks again pays at most, and one
/// sixteenth of the cost of compressing in vain.
const SKIP: u8 = 15;

/// Whether compressing a volume's writes is worth trying: finding out in vain that 4 KiB do not shrink takes two
/// microseconds, and encrypted or compressed guest data never does. One for each volume.
#[derive(Clone, Copy, Debug, Default)]
pub struct Worth {
    misses: u8,
    skip: u8,
}

impl Worth {
    /// Whether to try the next payload; counts it.
    pub fn worth_trying(&mut self) -> bool {
        let skip = self.skip > 0;
        self.skip -= u8::from(skip);
        !skip
    }

    /// A payload was tried, and `shrank` or did not.
    pub fn tried(&mut self, shrank: bool) {
        self.misses = if shrank {
            0
        } else {
            (self.misses + 1).min(MISSES)
        };
        if self.misses == MISSES {
            self.skip = SKIP;
        }
    }
}

/// Compresses payloads. One for each worker: it owns hash tables (24 KiB in all), so that no call allocates them.
pub struct Compressor {
    small: CompressTable,
    /// Of its own: a single table would be swapped for the large one by the first long payload, and each short one after it
    /// would then clear twice the memory.
    large: CompressTable,
}

impl Default for Compressor {
    fn default() -> Self {
        Self {
            small: CompressTable::small(),
            large: CompressTable::large(),
        }
    }
}

impl Compressor {
    /// Tables not yet used.
    pub fn new() -> Self {
        Self::default()
    }

    /// `raw` (1..=`IO_MAX` bytes) as an lz4 block, at the front of `out`; `None` when that would save less than an eighth.
    ///
    /// `out` is scratch: it grows to what the worst case needs and is never shrunk or cleared, so that a reused one costs nothing.
    pub fn compress<'o>(&mut self, raw: &[u8], out: &'o mut Vec<u8>) -> Option<&'o [u8]> {
        let bound = get_maximum_output_size(raw.len());
        if out.len() < bound {
            out.resize(bound, 0);
        }
        let table = if raw.len() < LARGE {
            &mut self.small
        } else {
            &mut self.large
        };
        // It can only fail for want of room, which there is.
        let len = compress_into_with_table(raw, out, table).ok()?;
        (len <= raw.len() - raw.len().div_ceil(MARGIN)).then(|| &out[..len])
    }
}

/// Puts the bytes that `payload` stands for into `raw`.
///
/// Errors: [`WireError::Malformed`] when its lz4 block does not expand to exactly that many. Content of `raw` is then undefined.
///
/// Panics when `raw` is not `payload.raw_len` bytes long: the caller sized it.
pub fn expand(payload: PayloadRef<'_>, raw: &mut [u8]) -> Result<(), WireError> {
    assert_eq!(
        raw.len(),
        payload.raw_len as usize,
        "the buffer has the payload's length"
    );
    if !payload.lz4 {
        if payload.bytes.len() != raw.len() {
            return Err(WireError::Malformed("payload: not of its length"));
        }
        raw.copy_from_slice(payload.bytes);
        return Ok(());
    }
    match decompress_into(payload.bytes, raw) {
        Ok(len) if len == raw.len() => Ok(()),
        _ => Err(WireError::Malformed(
            "payload: its lz4 block does not expand to its length",
        )),
    }
}
