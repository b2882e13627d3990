//! The superblock: [`CopyState`] as bytes, twice, the newer one in force.

use super::layout::BLOCK;
use super::metadata::{FormatError, Half, MetaWrite, ReadAt, Warning};
use super::sector::{array_at, u32_at, u64_at};
use crate::replication::copy_state::{BITMAPS_MAX, Bitmap, CopyState, Standing};
use crate::replication::ids::{CopyId, Epoch, SECTOR, Tag, VolumeId};

/// The format this program writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"LOCKSTEP";

const VERSION_AT: usize = 8;
const CRC_AT: usize = 12;
const GENERATION_AT: usize = 16;
const SLOTS_AT: usize = 96;
const SLOT_LEN: usize = 32;

/// One half's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub generation: u64,
    pub state: CopyState,
    /// For each bitmap slot in use, the generation that assigned it; 0 for a free one.
    pub assigned: [u64; BITMAPS_MAX],
}

/// What both halves say together.
#[derive(Debug)]
pub(super) struct Found {
    pub superblock: Superblock,
    pub half: Half,
    pub warning: Option<Warning>,
}

/// Whether generation `a` is newer than `b`: serial-number arithmetic, right across the wrap of the counter.
pub(super) fn newer(a: u64, b: u64) -> bool {
    (a.wrapping_sub(b) as i64) > 0
}

/// The generation after `g`; never 0, which marks a free slot.
pub(super) fn next(g: u64) -> u64 {
    g.wrapping_add(1).max(1)
}

impl Half {
    pub(super) fn other(self) -> Self {
        match self {
            Half::A => Half::B,
            Half::B => Half::A,
        }
    }

    fn offset(self) -> u64 {
        match self {
            Half::A => super::layout::SUPERBLOCKS,
            Half::B => super::layout::SUPERBLOCKS + BLOCK,
        }
    }
}

impl Superblock {
    pub fn write(&self, half: Half) -> MetaWrite {
        let mut bytes = vec![0; BLOCK as usize].into_boxed_slice();
        bytes[..8].copy_from_slice(MAGIC);
        let s = &self.state;
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(VERSION_AT, &FORMAT_VERSION.to_le_bytes());
        put(GENERATION_AT, &self.generation.to_le_bytes());
        put(24, &s.volume_id.0);
        put(40, &s.copy_id.0);
        put(56, &s.size.to_le_bytes());
        put(64, &s.epoch.0.to_le_bytes());
        put(72, &s.tag.0.to_le_bytes());
        put(80, &s.promised.0.to_le_bytes());
        let standing = match s.standing {
            Standing::InSync => 1,
            Standing::Inconsistent => 2,
            Standing::Failed => 3,
        };
        put(88, &[standing, u8::from(s.clean)]);
        for (i, (slot, assigned)) in s.bitmaps.iter().zip(self.assigned).enumerate() {
            if let Some(bitmap) = slot {
                let at = SLOTS_AT + i * SLOT_LEN;
                put(at, &bitmap.copy_id.0);
                put(at + 16, &bitmap.last.0.to_le_bytes());
                put(at + 24, &assigned.to_le_bytes());
            }
        }
        let crc = crc(&bytes);
        bytes[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        MetaWrite {
            offset: half.offset(),
            bytes,
        }
    }

    /// Reads one half. The inner error says what is wrong with it; the outer one ends the load.
    fn read(meta: &dyn ReadAt, half: Half) -> Result<Result<Self, String>, FormatError> {
        let bytes = match meta.read(half.offset(), SECTOR as usize) {
            Ok(bytes) => bytes,
            Err(e) => return Ok(Err(format!("cannot be read: {e}"))),
        };
        if bytes.len() as u64 != SECTOR {
            return Ok(Err("the file ends before it".into()));
        }
        if bytes.iter().all(|b| *b == 0) {
            return Ok(Err("blank".into()));
        }
        if bytes[..8] != *MAGIC {
            return Ok(Err("not a superblock".into()));
        }
        if u32_at(&bytes, CRC_AT) != crc(&bytes) {
            return Ok(Err("checksum mismatch".into()));
        }
        // After the CRC, which every version has in this place: a rotten version number is rot, not a newer program.
        let found = u32_at(&bytes, VERSION_AT);
        if found > FORMAT_VERSION {
            return Err(FormatError::Newer {
                found,
                reads: FORMAT_VERSION,
            });
        }
        Ok(Self::fields(&bytes).ok_or_else(|| "a field is out of range".into()))
    }

    /// The fields of a sector whose CRC verified, or `None` when one has a value that this version never writes.
    fn fields(bytes: &[u8]) -> Option<Self> {
        let standing = match bytes[88] {
            1 => Standing::InSync,
            2 => Standing::Inconsistent,
            3 => Standing::Failed,
            _ => return None,
        };
        let (epoch, promised) = (Epoch(u64_at(bytes, 64)), Epoch(u64_at(bytes, 80)));
        if bytes[89] > 1 || promised < epoch {
            return None;
        }
        let mut bitmaps = [None; BITMAPS_MAX];
        let mut assigned = [0; BITMAPS_MAX];
        for i in 0..BITMAPS_MAX {
            let at = SLOTS_AT + i * SLOT_LEN;
            assigned[i] = u64_at(bytes, at + 24);
            if assigned[i] != 0 {
                bitmaps[i] = Some(Bitmap {
                    copy_id: CopyId(array_at(bytes, at)),
                    last: Epoch(u64_at(bytes, at + 16)),
                });
            }
        }
        Some(Self {
            generation: u64_at(bytes, GENERATION_AT),
            state: CopyState {
                volume_id: VolumeId(array_at(bytes, 24)),
                copy_id: CopyId(array_at(bytes, 40)),
                size: u64_at(bytes, 56),
                epoch,
                tag: Tag(u64_at(bytes, 72)),
                promised,
                standing,
                clean: bytes[89] == 1,
                bitmaps,
            },
            assigned,
        })
    }
}

/// CRC of the sector with its CRC field as zero.
fn crc(block: &[u8]) -> u32 {
    let head = crc32c::crc32c(&block[..CRC_AT]);
    let zeroed = crc32c::crc32c_append(head, &[0; 4]);
    crc32c::crc32c_append(zeroed, &block[CRC_AT + 4..SECTOR as usize])
}

/// The newer half that verifies.
pub(super) fn load(meta: &dyn ReadAt) -> Result<Found, FormatError> {
    match (
        Superblock::read(meta, Half::A)?,
        Superblock::read(meta, Half::B)?,
    ) {
        (Ok(a), Ok(b)) if newer(a.generation, b.generation) => Ok(Found {
            superblock: a,
            half: Half::A,
            warning: None,
        }),
        (Ok(_), Ok(b)) => Ok(Found {
            superblock: b,
            half: Half::B,
            warning: None,
        }),
        (Ok(a), Err(why)) => Ok(survivor(a, Half::A, why)),
        (Err(why), Ok(b)) => Ok(survivor(b, Half::B, why)),
        (Err(a), Err(b)) => Err(FormatError::NoSuperblock { a, b }),
    }
}

/// The next superblock takes the generation that the damaged half may have had: bitmap pages written under that one then
/// have a generation in force and read as they are or, if the slot went to another copy, as set; never as a former one's.
fn survivor(superblock: Superblock, half: Half, why: String) -> Found {
    let warning = Warning::Superblock {
        damaged: half.other(),
        why,
        generation: superblock.generation,
    };
    Found {
        superblock,
        half,
        warning: Some(warning),
    }
}
