//! The registry: one record behind a compare-and-swap, and what must be true of every value it takes.

use std::collections::HashMap;

use lockstep::replication::attachment::{CasOutcome, Revision};
use lockstep::replication::ids::{Epoch, Instance, SECTOR, Tag};
use lockstep::replication::record::{CopyStatus, Record, State};

use super::world::{Ev, MS, World};

pub struct Registry {
    pub record: Record,
    pub revision: Revision,
    owners: HashMap<(Epoch, Tag), Option<Instance>>,
    /// Every epoch the record ever had, and its tag.
    pub epochs: HashMap<Epoch, Tag>,
}

impl Registry {
    pub fn new(record: Record) -> Self {
        Self {
            revision: 1,
            owners: HashMap::new(),
            epochs: HashMap::from([(record.epoch, record.epoch_tag)]),
            record,
        }
    }

    /// Swaps if the revision is still `expected`.
    pub fn swap(&mut self, expected: Revision, next: &Record) -> bool {
        if self.revision != expected {
            return false;
        }
        self.check(next);
        self.record = next.clone();
        self.epochs.insert(next.epoch, next.epoch_tag);
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
            next.copy(next.master).unwrap().status == CopyStatus::InSync,
            "S6: the master is not in the committed in-sync set"
        );
        assert!(
            next.in_sync()
                .all(|c| was(c.copy_id) || old.copy(c.copy_id).is_some()),
            "S18: a copy is in sync that the record did not know"
        );
        assert!(
            next.size == old.size || next.size > old.size && next.epoch > old.epoch,
            "S20: {} bytes in epoch {}, after {} in epoch {}",
            next.size,
            next.epoch,
            old.size,
            old.epoch
        );
        if next.state == State::Clean {
            assert!(next.attachment.is_none(), "5: clean while attached");
        }
    }
}

impl World {
    pub fn registry_gone(&self, a: usize) -> bool {
        let (alone, until) = self.isolated;
        self.registry_down_until > self.now || until > self.now && self.atts[a].node == alone
    }

    pub fn registry_delay(&mut self) -> u64 {
        if self.faults && self.rng.one_in(15) {
            self.rng.between(20, 1_500) * MS
        } else {
            self.rng.between(1, 10) * MS
        }
    }

    pub fn swap(&mut self, expected: Revision, next: &Record) -> bool {
        let before = self.registry.record.clone();
        if !self.registry.swap(expected, next) {
            return false;
        }
        self.check_room();
        self.check_joined(&before);
        self.note_change(&before);
        self.check_all_differences("S11");
        let r = &self.registry;
        let (revision, found) = (r.revision, (r.record.clone(), r.revision));
        self.say(|w| {
            let in_sync: Vec<_> = w.registry.record.in_sync().map(|c| &c.node).collect();
            format!(
                "registry: revision {revision}, epoch {}, in sync {in_sync:?}, {:?} {:?}",
                w.registry.record.epoch, w.registry.record.state, w.registry.record.failure_mode
            )
        });
        self.weigh_power();
        for a in 0..self.atts.len() {
            if !self.atts[a].over {
                let lag = if self.faults {
                    self.weather.watch_lag
                } else {
                    0
                };
                let wait = self.registry_delay() + self.rng.below(lag + 1) * MS;
                self.after(wait, Ev::Watch(a, Box::new(found.clone())));
            }
        }
        true
    }

    pub fn cas(&mut self, a: usize, expected: Revision, record: &Record) {
        let delay = self.registry_delay();
        let gone = self.registry_gone(a);
        if gone {
            self.seen.count("swap asked of a registry that is away");
        }
        let outcome = if gone || self.faults && self.rng.one_in(self.weather.registry_down) {
            CasOutcome::Unavailable
        } else if self.faults && self.rng.one_in(self.weather.ambiguous) {
            match self.rng.below(3) {
                0 => drop(self.swap(expected, record)),
                1 => {
                    let late = self.rng.below(600) * MS;
                    self.after(late, Ev::LateCas(expected, Box::new(record.clone())));
                }
                _ => {}
            }
            CasOutcome::Ambiguous
        } else if self.swap(expected, record) {
            CasOutcome::Done(self.registry.revision)
        } else {
            let r = &self.registry;
            CasOutcome::Conflict(Some(Box::new((r.record.clone(), r.revision))))
        };
        self.after(delay, Ev::CasAnswer(a, Box::new(outcome)));
    }

    fn note_change(&mut self, before: &Record) {
        let now = &self.registry.record;
        let (master, ejected) = (
            now.master != before.master,
            now.in_sync().count() < before.in_sync().count(),
        );
        let caches: Vec<_> = before
            .in_sync()
            .filter_map(|c| self.holder(c))
            .map(|n| &self.disk(n).cache)
            .collect();
        let differ = caches.windows(2).any(|two| two[0] != two[1]);
        let (was, is) = (before.size / SECTOR, now.size / SECTOR);
        if was < is {
            self.seen.count("volume grown");
            // What was the end, what is the end now.
            let last = is as usize - 16;
            self.hot.push((was as usize - 4).min(last));
            self.hot.push(last);
        }
        let refused = |r: &Record| r.grow.as_ref().is_some_and(|g| g.refused.is_some());
        if refused(&self.registry.record) && !refused(before) {
            self.seen.count("growth refused");
        }
        if master {
            self.seen.count("promotion");
        }
        if master && differ {
            self.seen.count("promotion with differing copies");
        }
        if ejected {
            self.seen.count("ejection");
        }
    }
}
