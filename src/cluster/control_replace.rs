//! A copy that is missing for too long gets a successor on another node (PROTOCOL 6).
//!
//! The node that serves the volume does it, since it alone knows whether the copy is being brought up to date; for a
//! detached volume the node of the master copy. The old copy stays in the record: should it return, the one of the two
//! that is in sync first stays, and the attachment removes the other.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::control::{Control, part_of, raced};
use super::events::What;
use super::membership::{self, is_blank, lacking, staying};
use super::model::VolumeSpec;
use super::placement::Placement;
use super::plane::{Found, whole_volumes};
use super::replicas::{Room, add_all, place_more};
use super::snapshot::Snapshot;
use super::store::{Registrar, Versioned};
use super::units::show_ms;
use crate::registry::RegistryError;
use crate::replication::ids::{CopyId, NodeName, VolumeId};
use crate::replication::record::{CopyEntry, CopyStatus, Record, State};
use crate::replication::throttle::SYNCS_MAX;

/// New copies on their way at once, over all volumes that one node looks after: as many as it brings up to date at once.
/// A node that is lost may have had a copy of every volume.
pub(super) const UNDER_WAY_MAX: usize = SYNCS_MAX;
/// Volumes that wait for the same copy decide within this part of the wait after it, each at another moment…
const STAGGER_PART: u32 = 4;
/// …but within this.
const STAGGER_MAX: Duration = Duration::from_secs(30);
/// Pause before a place is looked for again where there was none.
const PAUSE: Duration = Duration::from_secs(5);

/// Since when each copy is missing, as far as this process has seen.
#[derive(Default)]
pub(super) struct Replacements {
    missing: BTreeMap<VolumeId, BTreeMap<CopyId, Instant>>,
    next: Option<Instant>,
}

/// How much longer than `wait` this volume waits, so that the volumes of a lost node do not all decide at one moment by
/// the same view of who has room. Its own number, the same on every node.
pub(super) fn stagger(volume: VolumeId, wait: Duration) -> Duration {
    let most = STAGGER_MAX.min(wait / STAGGER_PART);
    most * u32::from(part_of(&volume.0)) / 256
}

impl Replacements {
    /// Whether a wait may have ended.
    pub(super) fn due(&self, now: Instant) -> bool {
        self.next.is_some_and(|at| at <= now)
    }

    /// Notes which copies are missing now, and tells which are so for `wait`.
    fn lost(
        &mut self,
        volume: VolumeId,
        record: &Record,
        syncing: &BTreeSet<CopyId>,
        now: Instant,
        wait: Option<Duration>,
        silent: impl Fn(&NodeName) -> Option<Instant>,
    ) -> BTreeSet<CopyId> {
        let seen = self.missing.entry(volume).or_default();
        let waited_for: BTreeMap<CopyId, &CopyEntry> = staying(record)
            .filter(|c| c.status == CopyStatus::Missing && !syncing.contains(&c.copy_id))
            .map(|c| (c.copy_id, c))
            .collect();
        seen.retain(|copy, _| waited_for.contains_key(copy));
        for (copy, entry) in waited_for {
            seen.entry(copy).or_insert_with(|| {
                // A detached volume's copy is put out when its node was silent for the whole wait already. One that never was
                // in sync was placed there since, by somebody who hears the node, as this one may not yet.
                let silent = silent(&entry.node).filter(|_| !is_blank(entry));
                silent.map_or(now, |since| since.min(now))
            });
        }
        let Some(wait) = wait else {
            return BTreeSet::new();
        };
        let mut lost = BTreeSet::new();
        for (copy, since) in seen {
            let end = *since + wait + stagger(volume, wait);
            if end <= now {
                lost.insert(*copy);
            } else {
                self.next = Some(self.next.map_or(end, |next| next.min(end)));
            }
        }
        lost
    }
}

/// A volume that this node looks after.
struct Tended<'a> {
    id: VolumeId,
    spec: &'a Versioned<VolumeSpec>,
    record: &'a Versioned<Record>,
    lost: BTreeSet<CopyId>,
}

impl Tended<'_> {
    fn found(&self) -> Found {
        Found {
            id: self.id,
            name: self.spec.0.full_name(),
            spec: self.spec.clone(),
            record: self.record.clone(),
        }
    }
}

impl Control {
    /// Gives every volume that this node looks after the copies that it lacks.
    pub(super) fn replace_copies(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        let now = Instant::now();
        self.replacements.next = None;
        if snapshot.cluster.is_some_and(|c| c.maintenance.is_some()) {
            // When the work is over every wait begins anew: the nodes are given the time to come back.
            self.replacements.missing.clear();
            return Ok(());
        }
        let wait = self.replaces_after(snapshot);
        let tended = self.tended(snapshot, now, wait);
        let mut under_way: usize = tended.iter().map(on_their_way).sum();
        let mut room: Option<Room<'_>> = None;
        for volume in &tended {
            let lacks = lacking(&volume.record.0, &volume.lost);
            if lacks == 0 || under_way >= UNDER_WAY_MAX {
                continue;
            }
            let live = self.live(snapshot);
            let room = room.get_or_insert_with(|| Room::of(snapshot, &live));
            let count = lacks.min(UNDER_WAY_MAX - under_way);
            let (found, lost) = (&volume.found(), &volume.lost);
            // Better one of two than none.
            let mut placed = place_more(found, room, count, lost);
            for fewer in (1..count).rev() {
                placed = placed.or_else(|_| place_more(found, room, fewer, lost));
            }
            match placed {
                Ok(placement) => {
                    under_way += placement.nodes.len();
                    let Placement { nodes, remarks } = placement;
                    room.take(&nodes, volume.id);
                    self.replace(found, lost, (&nodes, &remarks), wait)?;
                }
                Err(why) => self.no_place(found, &why.to_string(), now),
            }
        }
        Ok(())
    }

    /// How long a missing copy is waited for; `None`: for ever.
    pub(super) fn replaces_after(&self, snapshot: &Snapshot) -> Option<Duration> {
        let cluster = snapshot.cluster.filter(|c| c.maintenance.is_none())?;
        cluster.replace_after()
    }

    fn tended<'a>(
        &mut self,
        snapshot: &'a Snapshot,
        now: Instant,
        wait: Option<Duration>,
    ) -> Vec<Tended<'a>> {
        let serving = self.attached();
        let mut tended = Vec::new();
        for (id, spec, record) in whole_volumes(snapshot) {
            if record.0.state == State::Creating {
                continue;
            }
            let status = serving.get(&id);
            let master = record.0.copy(record.0.master).map(|c| &c.node);
            let ours = match &spec.0.attachment {
                Some(desired) => desired.node == self.plane.node && status.is_some(),
                None => status.is_some() || master == Some(&self.plane.node),
            };
            if !ours {
                self.replacements.missing.remove(&id);
                continue;
            }
            let syncing = status.map_or_else(BTreeSet::new, |s| {
                let copies = s.copies.iter().filter(|c| c.sync.is_some());
                copies.map(|c| c.copy).collect()
            });
            let silent = |node: &NodeName| self.plane.silence.since(node);
            let lost = self
                .replacements
                .lost(id, &record.0, &syncing, now, wait, silent);
            tended.push(Tended {
                id,
                spec,
                record,
                lost,
            });
        }
        self.replacements
            .missing
            .retain(|id, _| snapshot.volumes.contains_key(id));
        tended
    }

    fn replace(
        &mut self,
        found: &Found,
        lost: &BTreeSet<CopyId>,
        (nodes, remarks): (&[NodeName], &[String]),
        wait: Option<Duration>,
    ) -> Result<(), RegistryError> {
        let mut next = found.record.0.clone();
        if let Err(fault) = add_all(&found.name, &mut next, nodes) {
            self.no_place(found, &fault.message, Instant::now());
            return Ok(());
        }
        // A lost copy that was never in sync has nothing that its return would save.
        let useless: Vec<CopyId> = staying(&next)
            .filter(|c| lost.contains(&c.copy_id) && is_blank(c))
            .map(|c| c.copy_id)
            .collect();
        membership::leave(&mut next, &useless);
        if !raced(self.plane.store.cas_record(found.id, found.record.1, &next))? {
            return Ok(());
        }
        self.said.remove(&format!("replacement of {}", found.id));
        self.tending.hurry(found.id, Instant::now());
        let list = |names: Vec<&str>| names.join(" and ");
        let gone = found.record.0.copies.iter();
        let gone = gone.filter(|c| lost.contains(&c.copy_id));
        let gone = list(gone.map(|c| c.node.0.as_str()).collect());
        let mut text = match gone.is_empty() {
            true => "a copy is lacking".to_string(),
            false => format!(
                "the copy on {gone} is missing for {} and more",
                show_ms(wait.map_or(0, |w| w.as_millis() as u64))
            ),
        };
        text += &format!(
            ": a new one on {}",
            list(nodes.iter().map(|n| n.0.as_str()).collect())
        );
        for remark in remarks {
            text += &format!(" ({remark})");
        }
        self.plane.events.push(
            What::volume(&found.name, "missing", "replacing", "6 replace")
                .epoch(next.epoch)
                .text(text),
        );
        Ok(())
    }

    fn no_place(&mut self, found: &Found, why: &str, now: Instant) {
        let again = now + PAUSE;
        let next = &mut self.replacements.next;
        *next = Some(next.map_or(again, |at| at.min(again)));
        let text = format!("a missing copy of {} is not replaced: {why}", found.name);
        if self.say_new(&format!("replacement of {}", found.id), &text) {
            self.plane.events.push(
                What::volume(&found.name, "missing", "missing", "6 replace")
                    .epoch(found.record.0.epoch)
                    .text(text),
            );
        }
    }
}

/// New copies that are expected to be in sync some time.
fn on_their_way(volume: &Tended<'_>) -> usize {
    staying(&volume.record.0)
        .filter(|c| is_blank(c) && !volume.lost.contains(&c.copy_id))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::{copy, record};

    const WAIT: Duration = Duration::from_secs(60);

    fn nobody(_: &NodeName) -> Option<Instant> {
        None
    }

    /// One that does not wait longer than it must.
    fn volume() -> VolumeId {
        let all = (0..=u8::MAX).map(|n| VolumeId([n; 16]));
        let mut prompt = all.filter(|v| stagger(*v, WAIT).is_zero());
        prompt.next().expect("one in 256 is")
    }

    #[test]
    fn a_copy_is_lost_when_it_was_missing_for_the_whole_wait() {
        let volume = volume();
        let mut seen = Replacements::default();
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        // (at, copies, syncing, lost): one life of a volume, in order.
        for (seconds, copies, syncing, expected) in [
            (0, "n1:i n2:m n3:b", &[][..], &[][..]),
            (30, "n1:i n2:m n3:b", &[3], &[]),
            (60, "n1:i n2:m n3:b", &[3], &[2]),
            // Its sync broke off: the wait begins anew, also for a blank one.
            (70, "n1:i n2:m n3:b", &[], &[2]),
            (129, "n1:i n2:m n3:b", &[], &[2]),
            (130, "n1:i n2:m n3:b", &[], &[2, 3]),
            // Back in sync, and lost again.
            (140, "n1:i n2:i n3:b", &[], &[3]),
            (150, "n1:i n2:m n3:bl", &[], &[]),
            (209, "n1:i n2:m n3:r", &[], &[]),
            (210, "n1:i n2:m n3:r", &[], &[2]),
        ] {
            let syncing = syncing.iter().map(|n| copy(*n)).collect();
            let expected: BTreeSet<CopyId> = expected.iter().map(|n| copy(*n)).collect();
            let record = record(copies);
            let lost = seen.lost(volume, &record, &syncing, at(seconds), Some(WAIT), nobody);
            assert_eq!(lost, expected, "{copies} after {seconds}s");
        }
        let never = seen.lost(
            volume,
            &record("n1:i n2:m"),
            &BTreeSet::new(),
            at(1000),
            None,
            nobody,
        );
        assert_eq!(never, BTreeSet::new());
    }

    #[test]
    fn the_end_of_the_next_wait_is_known() {
        let mut seen = Replacements::default();
        let now = Instant::now();
        let none = BTreeSet::new();
        let record = record("n1:i n2:m");
        seen.lost(volume(), &record, &none, now, Some(WAIT), nobody);
        assert!(!seen.due(now + WAIT - Duration::from_millis(1)));
        assert!(seen.due(now + WAIT));
    }

    #[test]
    fn a_wait_begins_with_the_silence_of_the_node() {
        let (mut seen, none) = (Replacements::default(), BTreeSet::new());
        let begin = Instant::now();
        let now = begin + WAIT;
        let silent = |node: &NodeName| (node.0 == "n2").then_some(begin);
        let record = record("n1:i n2:m n3:m");
        let lost = seen.lost(volume(), &record, &none, now, Some(WAIT), silent);
        assert_eq!(lost, [copy(2)].into());
    }

    /// It was placed there because somebody hears the node; this one may still think what it thought when the node was gone.
    #[test]
    fn a_copy_that_was_just_placed_is_given_the_whole_wait_whatever_was_heard_of_its_node_before() {
        let (mut seen, none) = (Replacements::default(), BTreeSet::new());
        let begin = Instant::now();
        let record = record("n1:i n2:b");
        let mut lost = |at| seen.lost(volume(), &record, &none, at, Some(WAIT), |_| Some(begin));
        assert_eq!(lost(begin + WAIT), none);
        assert_eq!(lost(begin + 2 * WAIT), [copy(2)].into());
    }

    #[test]
    fn volumes_that_lost_the_same_node_decide_one_after_the_other() {
        let ids = (0..600u32).map(|n| {
            let mut id = [7; 16];
            id[..4].copy_from_slice(&n.to_le_bytes());
            VolumeId(id)
        });
        let mut by_second = BTreeMap::new();
        for id in ids {
            let more = stagger(id, WAIT);
            assert!(more < WAIT / STAGGER_PART);
            *by_second.entry(more.as_secs()).or_insert(0) += 1;
        }
        assert_eq!(by_second.len(), 15);
        assert!(by_second.values().all(|n| *n < 80), "{by_second:?}");
        assert!(stagger(volume(), Duration::from_secs(86_400)) <= STAGGER_MAX);
    }
}
