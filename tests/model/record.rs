//! The product's record, held so that a state is cheap to copy and to hash, and the names that the model gives things.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Deref;
use std::sync::Mutex;

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::failure_mode::FailureMode;
use lockstep::replication::ids::{
    BootId, CopyId, Epoch, Instance, NodeName, REGION, Tag, VolumeId,
};
use lockstep::replication::membership;
use lockstep::replication::record::{Attachment, Base, CopyEntry, CopyStatus, Record, State};

use super::state::{CHUNKS, COPIES};

/// A record, and what is asked of it all the time. Each value is kept once, for ever: there are few.
#[derive(Clone, Copy)]
pub struct Rec(&'static Kept);

pub struct Kept {
    pub record: Record,
    print: u64,
    pub in_sync: CopySet,
    pub absent: CopySet,
    pub master: usize,
    /// The instance of the attachment.
    pub attachment: Option<usize>,
}

static ALL: Mutex<BTreeMap<u64, Rec>> = Mutex::new(BTreeMap::new());

impl Rec {
    pub fn new(record: Record) -> Self {
        let mut hasher = DefaultHasher::new();
        let r = &record;
        let attachment = r.attachment.as_ref().map(|a| usize::from(a.instance.0[0]));
        let on = r.attachment.as_ref().map(|a| &a.node);
        let mode = format!("{:?}", r.failure_mode);
        let key = (r.epoch, r.epoch_tag, r.state as u8, attachment, on);
        (key, r.master, mode).hash(&mut hasher);
        for c in &r.copies {
            let base = (c.base.since, c.base.last);
            (c.status == CopyStatus::InSync, base, c.boot_id).hash(&mut hasher);
        }
        r.lineage.hash(&mut hasher);
        let print = hasher.finish();
        let with = |status| membership::with_status(&record, status);
        let (in_sync, missing) = (with(CopyStatus::InSync), with(CopyStatus::Missing));
        let keep = || {
            Rec(Box::leak(Box::new(Kept {
                print,
                in_sync,
                absent: missing.or(with(CopyStatus::Syncing)),
                master: usize::from(record.master.0[0]),
                attachment,
                record: record.clone(),
            })))
        };
        let mut all = ALL.lock().unwrap_or_else(|e| e.into_inner());
        let kept = *all.entry(print).or_insert_with(keep);
        assert_eq!(kept.record, record, "two records of one print");
        kept
    }
}

impl Deref for Rec {
    type Target = Kept;

    fn deref(&self) -> &Kept {
        self.0
    }
}

impl PartialEq for Rec {
    fn eq(&self, other: &Self) -> bool {
        self.print == other.print
    }
}

impl Eq for Rec {}

impl Hash for Rec {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.print.hash(state);
    }
}

impl std::fmt::Debug for Rec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let r = &self.record;
        let letter = |(i, c): (usize, &CopyEntry)| match c.status {
            CopyStatus::InSync if i == self.master => '*',
            CopyStatus::InSync => 'I',
            _ => 'M',
        };
        let copies: String = r.copies.iter().enumerate().map(letter).collect();
        let by = self.attachment;
        write!(
            f,
            "e{}/{} {copies} {:?} by {by:?}",
            r.epoch, r.epoch_tag, r.state
        )
    }
}

pub fn node(n: usize) -> NodeName {
    NodeName(format!("n{n}"))
}

pub fn copy_id(copy: usize) -> CopyId {
    CopyId([copy as u8; 16])
}

pub fn instance(i: usize) -> Instance {
    Instance([i as u8; 16])
}

/// The boot of a node after so many power cuts.
pub fn boot(node: usize, cuts: u8) -> BootId {
    let mut id = [0; 16];
    (id[0], id[1]) = (node as u8, cuts);
    BootId(id)
}

pub fn attachment(i: usize, on: usize) -> Attachment {
    Attachment {
        node: node(on),
        boot_id: boot(on, 0),
        instance: instance(i),
    }
}

/// Epoch 1: instance 0 serves from node `home`; the copies of `blank` are new and not in sync.
pub fn first(home: usize, blank: CopySet, mode: FailureMode) -> Record {
    let entry = |c: usize| {
        let mut entry = CopyEntry::blank(copy_id(c), node(c));
        if !blank.has(c) {
            entry.status = CopyStatus::InSync;
            entry.base = Base {
                since: Epoch(1),
                last: None,
            };
            entry.boot_id = Some(boot(c, 0));
        }
        entry
    };
    Record {
        volume_id: VolumeId([1; 16]),
        size: CHUNKS as u64 * REGION,
        block_size: 512,
        replicas_wanted: COPIES as u8 - 1,
        failure_mode: mode,
        suspend_deadline_ms: 0,
        compress: false,
        epoch: Epoch(1),
        epoch_tag: Tag(1),
        state: State::Active,
        attachment: Some(attachment(0, home)),
        master: copy_id(0),
        preferred: None,
        grow: None,
        copies: (0..COPIES).map(entry).collect(),
        lineage: vec![(Epoch(1), Tag(1))],
    }
}
