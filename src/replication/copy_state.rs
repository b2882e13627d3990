//! What one copy must remember across a crash: the content of its superblock (PROTOCOL 1).

use super::ids::{CopyId, Epoch, Tag, VolumeId};

/// Dirty bitmaps one copy keeps: one for each other copy.
pub const BITMAPS_MAX: usize = super::ids::COPIES_MAX - 1;

/// The superblock's content; `copy` gives it bytes, a generation and a CRC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyState {
    /// The volume.
    pub volume_id: VolumeId,
    /// This copy.
    pub copy_id: CopyId,
    /// The volume's size in bytes as this copy last heard.
    pub size: u64,
    /// The last configuration persisted.
    pub epoch: Epoch,
    /// Its tag.
    pub tag: Tag,
    /// Nothing of an epoch below is accepted (S2, S7). Never below `epoch`.
    pub promised: Epoch,
    /// Whether the bytes can be relied on.
    pub standing: Standing,
    /// Left by a clean detach: flushed, the log empty.
    pub clean: bool,
    /// Which bitmap slot belongs to which missing copy.
    pub bitmaps: [Option<Bitmap>; BITMAPS_MAX],
}

/// Whether a copy's bytes can be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// Was in sync in the copy's epoch.
    InSync,
    /// A sync has begun and not ended: neither readable nor promotable.
    Inconsistent,
    /// A write or a flush failed on this disk: never used again (PROTOCOL 3).
    Failed,
}

/// A bitmap slot in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// The copy whose missing chunks it marks.
    pub copy_id: CopyId,
    /// The last epoch in which that copy was in sync: writes of later epochs are marked.
    pub last: Epoch,
}
