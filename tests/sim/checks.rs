//! The rules of PROTOCOL 9 that are read off the world, by name.

use lockstep::replication::ids::Span;

use super::disk::sectors;
use super::oracle::Moment;
use super::world::World;

impl World {
    pub fn left(&mut self) {
        self.seen.detaches += 1;
        for c in (0..self.copies).filter(|c| self.is_in_sync(*c)) {
            let node = &self.nodes[c];
            let disk = node.disk.as_ref().unwrap();
            if node.cut + 1_000_000 > self.moment && node.cut > 0 && disk.cache != disk.durable {
                continue;
            }
            assert!(
                disk.superblock.clean && disk.log.is_empty(),
                "5: left cleanly, but copy {c} has regions {:?} (clean: {})",
                disk.log,
                disk.superblock.clean
            );
            assert!(
                disk.cache == disk.durable,
                "S5: left cleanly, but copy {c} is not flushed"
            );
        }
    }

    /// S3, S4: every member of the in-sync set in the registry has it.
    pub fn check_applied(&mut self, by: usize, id: u64, span: Span, fua: bool, start: Moment) {
        for c in (0..self.copies).filter(|c| self.is_in_sync(*c)) {
            let node = &self.nodes[c];
            if node.cut > start {
                continue;
            }
            let disk = node.disk.as_ref().unwrap();
            for s in sectors(span) {
                assert!(
                    self.oracle.holds(s, disk.cache[s], by, id),
                    "S3: write {id} completed, but in-sync copy {c} has {} in sector {s}",
                    disk.cache[s]
                );
                assert!(
                    !fua || self.oracle.holds(s, disk.durable[s], by, id),
                    "S5: write-through {id} completed, but copy {c} has it not durable in sector {s}"
                );
            }
        }
    }

    /// Whether every in-sync copy lost power since it was last whole: then the guest may miss what no flush covered.
    pub fn weigh_power(&mut self) {
        let all = (0..self.copies)
            .filter(|c| self.is_in_sync(*c))
            .all(|c| self.gapped[c]);
        if all {
            self.oracle.power_lost(self.moment);
            self.seen.power_losses += 1;
            self.say(|_| "every in-sync copy lost power".into());
            for c in 0..self.copies {
                self.gapped[c] &= !self.is_in_sync(c);
            }
            self.disk_errors = true;
        }
    }
}
