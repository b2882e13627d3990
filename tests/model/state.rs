//! What the model keeps of a cluster: the registry, three copies, attachments, and what the guest was told.
//!
//! A chunk stands for a whole region of the activity log. Values of a chunk are numbered in the order in which they were
//! written, 0 being what was there at first. A message that makes no difference how late it comes is not modelled: an answer
//! arrives with what it answers; what a broken session had not delivered is lost, and is sent again on the next one.

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::copy_state::Standing;
use lockstep::replication::ids::{Epoch, Tag};

use super::record::Rec;

pub const COPIES: usize = 3;
pub const CHUNKS: usize = 2;
/// Attachments there ever are.
pub const ATTACHMENTS: usize = 3;

pub type Value = u8;

/// A set of chunks, or of values: one bit each.
pub type Bits = u8;
pub const ALL: Bits = (1 << CHUNKS) - 1;

pub fn has(set: Bits, bit: usize) -> bool {
    set & (1 << bit) != 0
}

pub fn chunks(set: Bits) -> impl Iterator<Item = usize> {
    (0..CHUNKS).filter(move |k| has(set, *k))
}

/// One copy. What is not said to be on its disk is forgotten by a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Disk {
    // Superblock.
    pub epoch: Epoch,
    pub tag: Tag,
    pub promised: Epoch,
    pub standing: Standing,
    /// The copies for which it keeps a bitmap.
    pub maps: CopySet,
    // The rest of the disk.
    pub log: Bits,
    pub marked_on_disk: [Bits; COPIES],
    pub on_disk: [Value; CHUNKS],
    /// Data as read: survives a crash of the process, not of the machine.
    pub data: [Value; CHUNKS],
    /// Power cuts of its machine.
    pub boot: u8,
    // Memory.
    pub marked: [Bits; COPIES],
    pub mirrored: CopySet,
    /// The epoch and tag in which it is being brought up to date.
    pub target: Option<(Epoch, Tag)>,
    /// The attachment whose requests it takes.
    pub bound: Option<usize>,
    /// Whom it promised last.
    pub holder: Option<Holder>,
    pub unclaimed: Option<Epoch>,
    /// The grace has not passed since it heard its attachment.
    pub heard: bool,
    // What only the checker knows.
    /// It held everything at some time: made with the volume, or fully synced.
    pub whole: bool,
    /// The promise that a crash leaves; only mistaken copies differ.
    pub promise_on_disk: Epoch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Holder {
    pub instance: usize,
    pub node: usize,
}

impl Disk {
    /// The epoch and tag of the configuration it has.
    pub fn configured(&self) -> (Epoch, Tag) {
        self.target.unwrap_or((self.epoch, self.tag))
    }

    /// Its process ended: what it will know when it is started again.
    pub fn forget(&mut self) {
        for peer in 0..COPIES {
            if self.maps.has(peer) {
                // Bits of active regions may have been in memory only.
                self.marked[peer] = self.marked_on_disk[peer] | self.log;
            }
        }
        self.promised = self.promise_on_disk;
        self.mirrored = CopySet::EMPTY;
        (self.target, self.bound, self.holder, self.unclaimed) = (None, None, None, None);
        self.heard = true;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    Joining,
    Claiming,
    Configuring,
    Serving,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    Claim,
    Members,
    Raise,
    Activate,
}

/// A change of the record under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Change {
    pub purpose: Purpose,
    pub proposed: Rec,
    /// To be read back first.
    pub unknown: bool,
    /// Was unknown once: the proposal stays.
    pub in_doubt: bool,
}

/// What a copy said when it promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vote {
    Promised {
        boot: u8,
        epoch: Epoch,
        tag: Tag,
        log: Bits,
    },
    Out,
}

/// A write under way: the guest's, or one that makes a chunk the same everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Write {
    pub value: Value,
    pub waiting: CopySet,
    /// Copies to which it was sent before a configuration that they do not have yet.
    pub before: CopySet,
    pub reconciles: bool,
    /// The members changed meanwhile: the chunk is compared again.
    pub stale: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flush {
    pub waiting: CopySet,
    /// Ends a reconciliation.
    pub reconciles: bool,
    /// The chunks whose writes are all before it.
    pub covers: Bits,
    /// What had been completed then, and what that had replaced.
    pub completed: [Value; CHUNKS],
    pub replaced: [Bits; CHUNKS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    Marking,
    Copying,
    Synced,
}

/// A copy that is brought up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sync {
    pub stage: Stage,
    /// What its own log says; `None`: nothing is known of it.
    pub own: Option<Bits>,
    pub todo: Bits,
    /// Not flushed there so far.
    pub copied: Bits,
    pub boot: u8,
    /// Lost while the record may already call it in sync.
    pub lost: bool,
}

impl Sync {
    pub fn is_synced(&self) -> bool {
        self.stage == Stage::Synced && !self.lost
    }

    pub fn is_mirrored(&self) -> bool {
        self.stage >= Stage::Copying
    }
}

impl PartialOrd for Stage {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        (*self as u8).partial_cmp(&(*other as u8))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Attachment {
    pub node: usize,
    /// The one before it, on the same node, is dead.
    pub proven: bool,
    pub phase: Phase,
    pub held: Rec,
    pub revision: u64,
    pub outbid: Epoch,
    pub change: Option<Change>,
    /// Changes proposed, counted only where a mistake makes two of one epoch.
    pub attempts: u64,
    // Joining.
    pub asks: Epoch,
    pub votes: [Option<Vote>; COPIES],
    // Links.
    pub failing: CopySet,
    pub lease: CopySet,
    pub gaps: CopySet,
    pub accepted: [Option<u8>; COPIES],
    // Requests.
    pub writes: [Option<Write>; CHUNKS],
    pub flush: Option<Flush>,
    /// Chunks of which everything is durable on all copies that count, targets among them.
    pub stable: Bits,
    pub unflushed: Bits,
    pub lost_unflushed: bool,
    // Reconciliation.
    pub undecided: Bits,
    pub flushed: bool,
    pub syncs: [Option<Sync>; COPIES],
}

impl Attachment {
    pub fn owns(&self) -> bool {
        matches!(self.phase, Phase::Configuring | Phase::Serving)
    }

    /// The copy on its node.
    pub fn local(&self) -> Option<usize> {
        (self.node < COPIES).then_some(self.node)
    }

    pub fn mirrors(&self) -> CopySet {
        let mirrored = |c: &usize| self.syncs[*c].as_ref().is_some_and(Sync::is_mirrored);
        (0..COPIES).filter(mirrored).collect()
    }

    pub fn mode_serves(&self) -> bool {
        let r = &self.held.record;
        r.failure_mode
            .serves(r.replicas_wanted, self.held.in_sync.len())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Registry {
    pub record: Rec,
    pub revision: u64,
    /// A swap that may still arrive, for this revision.
    pub late: Option<(u64, Rec)>,
}

/// What the guest may see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Oracle {
    /// The next value to be written.
    pub next: Value,
    /// Per chunk: the last value completed, those written since and not completed.
    pub may: [Bits; CHUNKS],
    /// Besides, when a power cut took completed writes: those since the last completed flush.
    pub lost: [Bits; CHUNKS],
    pub completed: [Value; CHUNKS],
    /// A power cut took completed writes.
    pub taken: bool,
}

/// What happened so far of what is bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Spent {
    pub writes: u8,
    pub flushes: u8,
    pub crashes: u8,
    pub power_cuts: u8,
    pub partitions: u8,
    pub breaks: u8,
    pub disks: u8,
    pub ambiguous: u8,
}

impl Spent {
    /// All but what the guest asks.
    pub fn faults(&self) -> u8 {
        self.crashes + self.power_cuts + self.partitions + self.breaks + self.disks + self.ambiguous
    }
}

/// The rules of PROTOCOL 9 that are checked at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    S2,
    S3,
    S5,
    S6,
    S7,
    S10,
    S13,
    S18,
    /// An attachment gives up over a record that names it.
    Liveness,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Nodes whose process runs; the last one has no copy.
    pub up: CopySet,
    /// The node that reaches no other.
    pub cut_off: Option<usize>,
    pub copies: [Disk; COPIES],
    pub attachments: [Option<Attachment>; ATTACHMENTS],
    pub started: usize,
    pub registry: Registry,
    pub oracle: Oracle,
    pub spent: Spent,
    pub broken: Option<Rule>,
}

impl State {
    pub fn reaches(&self, from: usize, to: usize) -> bool {
        from == to || self.cut_off != Some(from) && self.cut_off != Some(to)
    }

    pub fn at(&self, a: usize) -> &Attachment {
        self.attachments[a].as_ref().expect("it has not ended")
    }

    pub fn at_mut(&mut self, a: usize) -> &mut Attachment {
        self.attachments[a].as_mut().expect("it has not ended")
    }

    /// Attachments that have not ended.
    pub fn alive(&self) -> impl Iterator<Item = usize> {
        (0..ATTACHMENTS).filter(|a| self.attachments[*a].is_some())
    }

    /// Copies that take `a`'s requests, targets among them.
    pub fn linked(&self, a: usize) -> CopySet {
        let bound = |c: &usize| self.copies[*c].bound == Some(a);
        (0..COPIES).filter(bound).collect()
    }

    pub fn ready(&self, a: usize) -> CopySet {
        self.linked(a).and(self.at(a).held.in_sync)
    }

    pub fn breaks(&mut self, rule: Rule) {
        self.broken.get_or_insert(rule);
    }
}
