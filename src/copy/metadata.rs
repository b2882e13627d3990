//! One copy's metadata as a whole: superblock, activity log and bitmaps, in memory and as writes into `meta`.

use std::io;

use super::bitmap::{self, Assignment};
use super::layout::{BLOCK, LOG, LOG_BLOCKS};
use super::log::Log;
use super::sector::Salt;
use super::superblock::{self, Superblock};
use crate::replication::copy_state::{BITMAPS_MAX, CopyState};
use crate::replication::ids::Region;

/// Bytes to be put into `meta`. Offset and length are multiples of [`BLOCK`], as O_DIRECT wants them; the memory is not
/// aligned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaWrite {
    /// Where in `meta`, in bytes.
    pub offset: u64,
    /// What.
    pub bytes: Box<[u8]>,
}

/// How `meta` is read: a file, or a simulated disk.
pub trait ReadAt {
    /// `len` bytes from `offset`; fewer only when the file ends before them. Bytes never written within the file are
    /// zero. An error means that these bytes are lost; it is survived where the format allows.
    fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>>;
}

/// The in-memory image of one copy's metadata: [`format`](Self::format) or [`load`](Self::load) it, then let each change
/// make the writes that state it. Nothing here performs I/O. What must be durable before what is the table "Order of
/// writes" in docs/DISK-FORMAT.md; a write that fails ends the copy ([`Standing::Failed`]), for memory and disk then differ.
///
/// [`Standing::Failed`]: crate::replication::copy_state::Standing::Failed
#[derive(Debug)]
pub struct Metadata {
    salt: Salt,
    superblock: Superblock,
    /// The half that holds `superblock`.
    half: Half,
    log: Log,
}

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
    /// Only in these regions may the copy differ from another in-sync copy (S11); ascending.
    Regions(Vec<Region>),
    /// Damaged: every region must be taken as active.
    Unreadable,
}

/// One of the two superblocks.
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
    /// One superblock does not verify. The state is the other one's, which may be one write older than what the copy last
    /// promised or acknowledged: not to be counted on while there is another in-sync copy.
    #[error(
        "superblock {damaged:?} is damaged ({why}); the other one, generation {generation}, is used"
    )]
    Superblock {
        /// Which.
        damaged: Half,
        /// What is wrong with it.
        why: String,
        /// Of the half that is used.
        generation: u64,
    },
    /// See [`LogImage::Unreadable`].
    #[error("activity log unreadable ({why}); every region is taken as active")]
    Log {
        /// What is wrong with it.
        why: String,
    },
}

/// Why metadata cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Written by a newer program.
    #[error(
        "format version {found}, but this program reads version {reads} only: run the lockstep that wrote it, or a newer one"
    )]
    Newer {
        /// Its version.
        found: u32,
        /// Ours.
        reads: u32,
    },
    /// Neither superblock verifies.
    #[error("no superblock is readable (A: {a}; B: {b})")]
    NoSuperblock {
        /// What is wrong with A.
        a: String,
        /// What is wrong with B.
        b: String,
    },
}

impl Metadata {
    /// A new copy: its image, and all that must be durable, in any order, before the copy exists. The file must be
    /// [`layout::meta_len`](super::layout::meta_len) long and zero wherever these writes leave it.
    pub fn format(state: &CopyState) -> (Metadata, Vec<MetaWrite>) {
        let salt = Salt::of(state.copy_id);
        let superblock = |generation| Superblock {
            generation,
            state: state.clone(),
            assigned: state.bitmaps.map(|slot| u64::from(slot.is_some())),
        };
        let mut log = Log::new();
        let mut writes = vec![superblock(1).write(Half::A), superblock(2).write(Half::B)];
        writes.extend(log.reset(salt, &[]));
        (
            Metadata {
                salt,
                superblock: superblock(2),
                half: Half::B,
                log,
            },
            writes,
        )
    }

    /// Reads superblock and log. Whatever an earlier process wrote must have been made durable first (fsync `meta`),
    /// for what is built on it may not vanish in a power cut.
    ///
    /// Errors: see [`FormatError`]; all other damage is survived and told in [`Loaded::warnings`].
    pub fn load(meta: &dyn ReadAt) -> Result<Loaded, FormatError> {
        let found = superblock::load(meta)?;
        let mut warnings: Vec<Warning> = found.warning.into_iter().collect();
        let state = found.superblock.state.clone();
        let salt = Salt::of(state.copy_id);
        // An I/O error on any of it leaves nothing to read, which is one more way of being unreadable.
        let ring = meta.read(LOG, (LOG_BLOCKS * BLOCK) as usize);
        let (log, outcome) = Log::load(salt, ring.as_deref().unwrap_or(&[]));
        let image = match outcome {
            Ok(()) => LogImage::Regions(log.regions()),
            Err(why) => {
                let why = ring.err().map_or(why, |e| e.to_string());
                warnings.push(Warning::Log { why });
                LogImage::Unreadable
            }
        };
        let metadata = Metadata {
            salt,
            superblock: found.superblock,
            half: found.half,
            log,
        };
        Ok(Loaded {
            metadata,
            state,
            log: image,
            warnings,
        })
    }

    /// The next superblock, into the half that does not hold the present one. Durable before anything that depends on
    /// it (S2: before a promise or a configuration is acknowledged), and before the next superblock is written.
    ///
    /// A bitmap slot whose assignment differs from the present superblock's starts clear; its pages may be written
    /// once this superblock is durable.
    ///
    /// Panics when `state` is another copy's, or its promise is below its epoch: own state, never input.
    pub fn superblock(&mut self, state: &CopyState) -> MetaWrite {
        assert_eq!(
            state.copy_id, self.superblock.state.copy_id,
            "metadata belongs to one copy"
        );
        assert!(
            state.promised >= state.epoch,
            "S2: a copy in epoch {} has promised it",
            state.epoch
        );
        let generation = superblock::next(self.superblock.generation);
        let mut assigned = [0; BITMAPS_MAX];
        for (i, out) in assigned.iter_mut().enumerate() {
            *out = match (state.bitmaps[i], self.superblock.state.bitmaps[i]) {
                (None, _) => 0,
                (new, old) if new == old => self.superblock.assigned[i],
                _ => generation,
            };
        }
        self.superblock = Superblock {
            generation,
            state: state.clone(),
            assigned,
        };
        self.half = self.half.other();
        self.superblock.write(self.half)
    }

    /// One batch that retires `retire`, then activates `add` (a region in both is active afterwards). It counts as a
    /// whole or, if a crash tears it, not at all. Empty when nothing changes, or while the log is unreadable: on disk every
    /// region is then active anyway.
    ///
    /// All of it durable (RWF_DSYNC, or an fdatasync) before a write into an added region is issued (S15) and before the
    /// next call's writes are. Regions may be retired only after a flush on all in-sync copies (S11).
    ///
    /// Panics when more than `REGIONS_MAX` regions would be active: the caller's own state bounds them.
    pub fn log(&mut self, add: &[Region], retire: &[Region]) -> Vec<MetaWrite> {
        self.log.batch(self.salt, add, retire)
    }

    /// Writes the whole ring anew, with `active` as all there is; ends [`LogImage::Unreadable`]. To be called when the caller
    /// knows that copies differ in no other region. A crash leaves the log unreadable or new.
    ///
    /// Panics when `active` has more than `REGIONS_MAX` regions.
    pub fn reset_log(&mut self, active: &[Region]) -> Vec<MetaWrite> {
        self.log.reset(self.salt, active)
    }

    /// Page `index` of the bitmap in `slot`: the chunks from `index` × [`BITS_PER_PAGE`](super::BITS_PER_PAGE) on, 64 a word,
    /// lowest bit first. Words that are not given are clear. Pages may be written in any order and while others are in flight,
    /// but one page not twice at once.
    ///
    /// Panics when the present superblock has `slot` free, or `bits` has more than
    /// [`WORDS_PER_PAGE`](super::layout::WORDS_PER_PAGE) words.
    pub fn bitmap_page(&self, slot: usize, index: u32, bits: &[u64]) -> MetaWrite {
        bitmap::page(self.salt, slot, index, self.assignment(slot), bits)
    }

    /// The first `chunks` bits of the bitmap in `slot`, 64 a word; bits beyond are clear. What does not verify reads as
    /// set: never an error.
    ///
    /// Panics when the present superblock has `slot` free.
    pub fn load_bitmap(&self, meta: &dyn ReadAt, slot: usize, chunks: u32) -> Vec<u64> {
        bitmap::load(self.salt, meta, slot, self.assignment(slot), chunks)
    }

    fn assignment(&self, slot: usize) -> Assignment {
        let copy = self.superblock.state.bitmaps[slot]
            .expect("the bitmap slot is assigned")
            .copy_id;
        Assignment {
            copy,
            generation: self.superblock.assigned[slot],
        }
    }
}
