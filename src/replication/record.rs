//! The record: a volume's small configuration value in the registry, changed only by compare-and-swap (PROTOCOL 1).

use serde::{Deserialize, Serialize};

use super::failure_mode::FailureMode;
use super::ids::{BootId, CopyId, Epoch, Instance, NodeName, Tag, VolumeId};

/// How many past (epoch, tag) pairs a record keeps. A copy that left longer ago gets a full sync.
pub const LINEAGE_MAX: usize = 64;

/// The volume's configuration. Everything that decides who may serve, read or write is here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The volume.
    pub volume_id: VolumeId,
    /// Bytes, a multiple of 512. S20: every in-sync copy has room for it. It only grows.
    pub size: u64,
    /// Logical block size shown to the guest, 512 or 4096.
    pub block_size: u32,
    /// R: replicas asked for, 0..=5 (copies − 1).
    pub replicas_wanted: u8,
    /// When the volume may serve with fewer.
    pub failure_mode: FailureMode,
    /// How long a volume that may not serve holds its requests before it fails them, in milliseconds.
    pub suspend_deadline_ms: u64,
    /// lz4 on the wire (label `nocompress` turns it off).
    pub compress: bool,
    /// The epoch in force.
    pub epoch: Epoch,
    /// Its random companion.
    pub epoch_tag: Tag,
    /// See [`State`].
    pub state: State,
    /// Who serves the volume.
    pub attachment: Option<Attachment>,
    /// The copy that reads are served from.
    pub master: CopyId,
    /// The operator wants this copy to be the master. The attachment switches to it while it is in sync, then clears this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preferred: Option<CopyId>,
    /// The operator wants the volume to be larger. See `growth`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grow: Option<Growth>,
    /// All copies. A place never moves, so that an index names a copy; the place of a removed one is taken by the next
    /// new copy.
    pub copies: Vec<CopyEntry>,
    /// The last (epoch, tag) pairs, oldest first, the present one included: a returning copy is known by them.
    pub lineage: Vec<(Epoch, Tag)>,
}

/// A wish for more bytes. It stays until the attachment has fulfilled it, or says why it cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    /// The size asked for, in bytes, a multiple of 512.
    pub to: u64,
    /// Why the volume keeps its size; asking again tries again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// What the copies may have in their logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// The copies are being made; nothing may attach yet.
    Creating,
    /// Detached after a flush: copies are identical, logs empty.
    Clean,
    /// An attachment took over and decides the regions in which copies may differ.
    Recovering,
    /// Served.
    Active,
}

/// The process that serves the volume's virtqueues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Its node.
    pub node: NodeName,
    /// The kernel boot it runs under.
    pub boot_id: BootId,
    /// The run of the node's process.
    pub instance: Instance,
}

/// One copy as the record sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyEntry {
    /// Its identity.
    pub copy_id: CopyId,
    /// Where it lives.
    pub node: NodeName,
    /// See [`CopyStatus`].
    pub status: CopyStatus,
    /// The epochs in which it was continuously in sync: first, and last once it left.
    pub base: Base,
    /// The kernel boot under which it was last made in sync: another one now means that the node lost power (or its
    /// kernel crashed) since, and completed writes that no flush covered may be gone from it.
    pub boot_id: Option<BootId>,
    /// To be removed as soon as enough others are in sync; at once when it is not in sync itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

impl CopyEntry {
    /// A copy that is being made on `node`: blank, in sync in no epoch so far (S18).
    pub fn blank(copy_id: CopyId, node: NodeName) -> Self {
        Self {
            copy_id,
            node,
            status: CopyStatus::Missing,
            base: Base {
                since: Epoch(0),
                last: Some(Epoch(0)),
            },
            boot_id: None,
            leaving: false,
        }
    }
}

/// The span of epochs in which a copy held every completed write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The epoch that took it in.
    pub since: Epoch,
    /// The last epoch it was in; `None` while it is in sync.
    pub last: Option<Epoch>,
}

/// Whether a copy counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyStatus {
    /// Holds every completed write; may be read and promoted.
    InSync,
    /// Is being brought up to date.
    Syncing,
    /// Lost, or new; its bitmap grows.
    Missing,
    /// No longer a copy of the volume: its node deletes it, and its place may be taken by a new one.
    Removed,
}

impl Record {
    /// The in-sync copies.
    pub fn in_sync(&self) -> impl Iterator<Item = &CopyEntry> {
        self.copies
            .iter()
            .filter(|c| c.status == CopyStatus::InSync)
    }

    /// Healthy replicas: in-sync copies − 1; syncing and missing never count (PROTOCOL 7).
    pub fn healthy_replicas(&self) -> usize {
        self.in_sync().count().saturating_sub(1)
    }

    /// Whether any copy besides one exists or is remembered. Then the activity log is kept; a volume with a single
    /// copy has nothing to differ from (PROTOCOL 2.3).
    pub fn logged(&self) -> bool {
        self.present().count() > 1
    }

    /// The copies that were not removed.
    pub fn present(&self) -> impl Iterator<Item = &CopyEntry> {
        self.copies
            .iter()
            .filter(|c| c.status != CopyStatus::Removed)
    }

    /// Puts a new copy into the place of a removed one, or behind the others. `None` when there are
    /// [`COPIES_MAX`](super::ids::COPIES_MAX) already.
    pub fn add_copy(&mut self, entry: CopyEntry) -> Option<usize> {
        let free = self
            .copies
            .iter()
            .position(|c| c.status == CopyStatus::Removed);
        match free {
            Some(at) => {
                self.copies[at] = entry;
                Some(at)
            }
            None if self.copies.len() < super::ids::COPIES_MAX => {
                self.copies.push(entry);
                Some(self.copies.len() - 1)
            }
            None => None,
        }
    }

    /// The entry of `copy`.
    pub fn copy(&self, copy: CopyId) -> Option<&CopyEntry> {
        self.copies.iter().find(|c| c.copy_id == copy)
    }

    /// The entry of the copy on `node`.
    pub fn copy_on(&self, node: &NodeName) -> Option<&CopyEntry> {
        self.present().find(|c| c.node == *node)
    }

    /// Takes over what others than the attachment may change at any time: what the operator asks for, new copies in free
    /// places or in those of absent ones.
    pub fn take_edits(&mut self, from: &Self) {
        self.failure_mode = from.failure_mode;
        self.suspend_deadline_ms = from.suspend_deadline_ms;
        self.replicas_wanted = from.replicas_wanted;
        self.compress = from.compress;
        self.preferred = from.preferred;
        self.grow.clone_from(&from.grow);
        for (i, theirs) in from.copies.iter().enumerate() {
            match self.copies.get_mut(i) {
                None => self.copies.push(theirs.clone()),
                Some(mine) if mine.copy_id == theirs.copy_id => mine.leaving = theirs.leaving,
                Some(mine) if mine.status != CopyStatus::InSync => *mine = theirs.clone(),
                Some(_) => {}
            }
        }
    }

    /// Enters the next epoch under `tag`, remembering it in the lineage.
    pub fn advance(&mut self, epoch: Epoch, tag: Tag) {
        assert!(epoch > self.epoch, "S2: an epoch never decreases");
        self.epoch = epoch;
        self.epoch_tag = tag;
        self.lineage.push((epoch, tag));
        let surplus = self.lineage.len().saturating_sub(LINEAGE_MAX);
        self.lineage.drain(..surplus);
    }
}
