//! See the module's documentation.
use std::io;

use crate::replication::copy_state::CopyState;
use crate::replication::ids::Region;

/// Bytes to be put into `meta`. Offset and length are multiples of [`super::BLOCK`]; the memory need not be aligned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaWrite {
    /// Where in `meta`.
    pub offset: u64,
    /// What.
    pub bytes: Box<[u8]>,
}

/// How `meta` is read: a file, or a simulated disk.
pub trait ReadAt {
    /// `len` bytes from `offset`. Fewer when the file ends there; never more.
    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>>;
}

/// The in-memory image of one copy's metadata.
#[derive(Debug)]
pub struct Metadata {}

/// What [`Metadata::load`] found.
#[derive(Debug)]
pub struct Loaded {
    /// To go on with.
    pub metadata: Metadata,
    /// The superblock's content.
    pub state: CopyState,
    /// The active regions.
    pub log: LogImage,
    /// What was damaged and survived; each is worth a line in the log.
    pub warnings: Vec<Warning>,
}

/// What the activity log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogImage {
    /// Only these regions may differ from another in-sync copy; ascending.
    Regions(Vec<Region>),
    /// Damaged: every region must be taken as active.
    Unreadable,
}

/// A superblock's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// At 0.
    A,
    /// At 4096.
    B,
}

/// Damage that was survived.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// One superblock does not verify; the other one is used.
    #[error("superblock {0:?} is damaged; the other half (generation {1}) is used")]
    Superblock(Half, u64),
    /// See [`LogImage::Unreadable`].
    #[error("activity log unreadable ({0}); every region is taken as active")]
    Log(String),
}

/// Why metadata cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// Written by a newer program.
    #[error(
        "metadata format version {found}; this program reads version {reads}: start a newer lockstep"
    )]
    Newer {
        /// Its version.
        found: u32,
        /// Ours.
        reads: u32,
    },
    /// Neither superblock verifies.
    #[error(
        "neither superblock is readable (A: {a}; B: {b}); remove this copy and let it be synced anew"
    )]
    NoSuperblock {
        /// What is wrong with A.
        a: String,
        /// What is wrong with B.
        b: String,
    },
}

#[allow(unused_variables)]
impl Metadata {
    /// A new copy: the image, and all that must be durable before the copy is used.
    pub fn format(state: &CopyState) -> (Metadata, Vec<MetaWrite>) {
        todo!()
    }
    /// Reads everything but the bitmaps.
    pub fn load(meta: &dyn ReadAt) -> Result<Loaded, FormatError> {
        todo!()
    }
    /// The next superblock. Durable (fdatasync) before anything that depends on it.
    pub fn superblock(&mut self, state: &CopyState) -> MetaWrite {
        todo!()
    }
    /// One atomic batch. Durable (RWF_DSYNC, or fdatasync) before a write into an added region is issued (S15), and
    /// before the next call. Empty when nothing changes.
    pub fn log(&mut self, add: &[Region], retire: &[Region]) -> Vec<MetaWrite> {
        todo!()
    }
    /// Writes the whole ring anew with `active`; the only way out of [`LogImage::Unreadable`], in which
    /// [`Metadata::log`] writes nothing.
    pub fn reset_log(&mut self, active: &[Region]) -> Vec<MetaWrite> {
        todo!()
    }
    /// Page `index` of bitmap `slot`; `bits` are its [`super::layout::WORDS_PER_PAGE`] words or fewer (the rest is 0).
    pub fn bitmap_page(&self, slot: usize, index: u32, bits: &[u64]) -> MetaWrite {
        todo!()
    }
    /// The first `chunks` bits of bitmap `slot`, 64 a word, low bit first.
    pub fn load_bitmap(&self, meta: &dyn ReadAt, slot: usize, chunks: u32) -> Vec<u64> {
        todo!()
    }
}
