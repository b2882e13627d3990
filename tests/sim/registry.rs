//! The registry: one record behind a compare-and-swap, and what must be true of every value it takes.

use std::collections::HashMap;

use lockstep::replication::attachment::Revision;
use lockstep::replication::ids::{Epoch, Instance, Tag};
use lockstep::replication::record::{CopyStatus, Record, State};

pub struct Registry {
    pub record: Record,
    pub revision: Revision,
    owners: HashMap<(Epoch, Tag), Option<Instance>>,
    pub promotions: u64,
    pub ejections: u64,
}

impl Registry {
    pub fn new(record: Record) -> Self {
        Self {
            record,
            revision: 1,
            owners: HashMap::new(),
            promotions: 0,
            ejections: 0,
        }
    }

    /// Swaps if the revision is still `expected`.
    pub fn swap(&mut self, expected: Revision, next: &Record) -> bool {
        if self.revision != expected {
            return false;
        }
        self.check(next);
        if next.master != self.record.master {
            self.promotions += 1;
        }
        if next.in_sync().count() < self.record.in_sync().count() {
            self.ejections += 1;
        }
        self.record = next.clone();
        self.revision += 1;
        true
    }

    fn check(&mut self, next: &Record) {
        let old = &self.record;
        let owner = next.attachment.as_ref().map(|a| a.instance);
        let of = self
            .owners
            .entry((next.epoch, next.epoch_tag))
            .or_insert(owner);
        assert_eq!(*of, owner, "S1: two attachments in epoch {}", next.epoch);
        let changed = next.attachment != old.attachment
            || next.master != old.master
            || !next
                .in_sync()
                .map(|c| c.copy_id)
                .eq(old.in_sync().map(|c| c.copy_id));
        assert!(
            next.epoch >= old.epoch && (!changed || next.epoch > old.epoch),
            "S1: a change of attachment, master or in-sync set without an epoch of its own"
        );
        let was = |id| old.copy(id).is_some_and(|c| c.status == CopyStatus::InSync);
        assert!(
            was(next.master) && next.copy(next.master).unwrap().status == CopyStatus::InSync,
            "S6: the master was not in the committed in-sync set"
        );
        assert!(
            next.in_sync().all(|c| was(c.copy_id)) && next.in_sync().count() > 0,
            "S6, S13: a copy joined the in-sync set without a sync"
        );
        if next.state == State::Clean {
            assert!(next.attachment.is_none(), "5: clean while attached");
        }
    }
}
