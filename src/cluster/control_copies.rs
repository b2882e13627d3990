//! The files on this node's disk are what the records say: made, replaced when the disk was wiped, deleted when the copy
//! was removed. Data is deleted only when a record or a tombstone names it; everything else is kept and named.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::control::{Control, raced};
use super::events::What;
use super::fault::Fault;
use super::host::{Birth, HostError};
use super::join::random;
use super::membership::is_blank;
use super::model::{Ready, Tombstone, VolumeName};
use super::plane::whole_volumes;
use super::snapshot::Snapshot;
use super::store::{Registrar, Versioned};
use crate::registry::{CasError, RegistryError};
use crate::replication::ids::{CopyId, NodeName, VolumeId};
use crate::replication::record::{CopyEntry, CopyStatus, Record, State};

/// Pause before files that could not be made or removed are tried again.
const PAUSE: Duration = Duration::from_secs(2);

/// What the loop remembers about this node's files.
#[derive(Default)]
pub(super) struct Copies {
    /// Identities that this process has drawn and not yet used. Files of a new copy are made under one of these and
    /// under no other, once: an identity that was ever on a disk, or may have been, is never given again (S18).
    drawn: BTreeMap<VolumeId, CopyId>,
    retry: BTreeMap<VolumeId, Instant>,
}

impl Copies {
    /// Whether something should be tried again.
    pub(super) fn due(&self, now: Instant) -> bool {
        self.retry.values().any(|at| *at <= now)
    }
}

/// What is on the disk of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Here {
    /// No file.
    Nothing,
    /// A copy.
    Copy(CopyId),
    /// Files that are no usable copy.
    Unusable,
}

/// What is to be done about the files of a volume on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// All is as it should be, or somebody else's turn.
    Nothing,
    /// The entry at this place has no files here: it becomes that of a new copy.
    Renew(usize),
    /// Make the files of the new copy.
    Make(CopyId),
    /// The record says that this copy was removed.
    Delete(CopyId),
    /// A copy that nobody knows stands where a new one belongs.
    SetAside(CopyId),
    /// Left as it is, and why.
    Keep(String),
}

/// Decides. `drawn` is the identity that this process has for a new copy of the volume, if any.
fn step(record: &Record, node: &NodeName, here: Here, drawn: Option<CopyId>) -> Step {
    if record.state == State::Creating {
        return Step::Nothing;
    }
    let place = record
        .copies
        .iter()
        .position(|c| c.node == *node && c.status != CopyStatus::Removed);
    let entry = place.map(|i| &record.copies[i]);
    match (here, entry) {
        (Here::Copy(id), Some(entry)) if entry.copy_id == id => Step::Nothing,
        (Here::Copy(id), entry) => match (record.copy(id), entry.map(|e| e.status)) {
            (Some(known), _) if known.status == CopyStatus::Removed && known.node == *node => {
                Step::Delete(id)
            }
            (Some(known), _) => Step::Keep(format!(
                "copy {id} is kept: the record has it on node {}",
                known.node
            )),
            (None, Some(CopyStatus::Missing | CopyStatus::Syncing)) => Step::SetAside(id),
            (None, Some(status)) => Step::Keep(format!(
                "copy {id} is kept: the record knows another one here, which is {status:?}"
            )),
            (None, None) => Step::Keep(format!("copy {id} is kept: the record does not know it")),
        },
        (Here::Unusable, Some(_)) => Step::Keep(
            "the copy here cannot be used; `lockstep volume inspect` says why, and what to do"
                .into(),
        ),
        (Here::Unusable, None) => {
            Step::Keep("files that are no usable copy are kept: the record has no copy here".into())
        }
        (Here::Nothing, Some(entry)) => match entry.status {
            // Only the attachment takes a copy out of the in-sync set.
            CopyStatus::InSync => Step::Keep(format!(
                "copy {} is not on this node's disk (was it wiped?): the next attachment ejects it, then it is made anew",
                entry.copy_id
            )),
            // The attachment removes it at once.
            CopyStatus::Missing if entry.leaving => Step::Nothing,
            CopyStatus::Missing if drawn == Some(entry.copy_id) => Step::Make(entry.copy_id),
            CopyStatus::Missing => place.map_or(Step::Nothing, Step::Renew),
            CopyStatus::Syncing | CopyStatus::Removed => Step::Nothing,
        },
        (Here::Nothing, None) => Step::Nothing,
    }
}

impl Control {
    /// Has the disk hold what the records of existing volumes say.
    pub(super) fn tend_copies(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        let local = self.copies_here();
        self.copies
            .drawn
            .retain(|id, _| snapshot.volumes.contains_key(id));
        self.copies
            .retry
            .retain(|id, _| snapshot.volumes.contains_key(id));
        for (id, (spec, _), record) in whole_volumes(snapshot) {
            let concerns_us = record.0.copies.iter().any(|c| c.node == self.plane.node)
                || local.contains_key(&id);
            let later = |at: &Instant| *at > Instant::now();
            if !concerns_us || self.copies.retry.get(&id).is_some_and(later) {
                continue;
            }
            self.copies.retry.remove(&id);
            let here = self.here(id, &local);
            let drawn = self.copies.drawn.get(&id).copied();
            let step = step(&record.0, &self.plane.node, here, drawn);
            self.carry_out(id, &spec.full_name(), record, step)?;
        }
        Ok(())
    }

    fn here(&self, id: VolumeId, local: &BTreeMap<VolumeId, CopyId>) -> Here {
        match local.get(&id) {
            Some(copy) if *copy != CopyId([0; 16]) => Here::Copy(*copy),
            Some(_) => Here::Unusable,
            // Also files that a worker in trouble did not report must not be taken for a wiped disk.
            None if self.plane.host.has_files(id) => Here::Unusable,
            None => Here::Nothing,
        }
    }

    fn carry_out(
        &mut self,
        id: VolumeId,
        name: &VolumeName,
        record: &Versioned<Record>,
        step: Step,
    ) -> Result<(), RegistryError> {
        let key = format!("copy of {id}");
        let host = self.plane.host.clone();
        let (from, to, rule, text, done) = match step {
            Step::Nothing => {
                self.unsay(
                    &key,
                    &format!("{name}: the copy here is as the record says"),
                );
                return Ok(());
            }
            Step::Keep(why) => {
                self.say(&key, &format!("{name}: {why}"));
                return Ok(());
            }
            Step::Renew(place) => return self.renew(id, name, record, place),
            Step::Make(copy) => {
                let made = host.create_copy(id, copy, record.0.size, Birth::Blank);
                if made.is_ok() {
                    self.copies.drawn.remove(&id);
                }
                (
                    "no copy",
                    "blank",
                    "6 new copy",
                    format!("made copy {copy}"),
                    made,
                )
            }
            Step::Delete(copy) => {
                let text = format!("deleted copy {copy}, which the record says was removed");
                ("copy", "no copy", "6 removed", text, host.remove_copy(id))
            }
            Step::SetAside(copy) => {
                let (text, done) = match host.set_aside(id) {
                    Ok(place) => (
                        format!("copy {copy}, which the record does not know, lies in {place} now"),
                        Ok(()),
                    ),
                    Err(e) => (format!("set copy {copy} aside"), Err(e)),
                };
                ("copy", "set aside", "6 unknown copy", text, done)
            }
        };
        self.look_again();
        match done {
            Ok(()) => {
                self.said.remove(&key);
                // What is next for the volume does not wait for a change of the registry.
                self.copies.retry.insert(id, Instant::now());
                self.plane.events.push(
                    What::volume(name, from, to, rule)
                        .epoch(record.0.epoch)
                        .text(text),
                );
            }
            Err(e) => {
                self.copies.retry.insert(id, Instant::now() + PAUSE);
                self.cannot(&key, name, record, rule, &text, e);
            }
        }
        Ok(())
    }

    fn cannot(
        &mut self,
        key: &str,
        name: &VolumeName,
        record: &Versioned<Record>,
        rule: &str,
        what: &str,
        error: HostError,
    ) {
        let busy = matches!(error, HostError::Busy(_));
        let text = format!("{name}: not {what}: {}", Fault::from(error).message);
        if self.say_new(key, &text) && !busy {
            self.plane.events.push(
                What::volume(name, "", "failed", rule)
                    .epoch(record.0.epoch)
                    .text(text),
            );
        }
    }

    /// Gives the entry at `place`, whose files are not here, to a new copy (S18).
    fn renew(
        &mut self,
        id: VolumeId,
        name: &VolumeName,
        record: &Versioned<Record>,
        place: usize,
    ) -> Result<(), RegistryError> {
        let copy = match self.copies.drawn.get(&id) {
            Some(copy) => *copy,
            None => match random() {
                Ok(bytes) => CopyId(bytes),
                Err(fault) => {
                    self.say(&format!("copy of {id}"), &format!("{name}: {fault}"));
                    return Ok(());
                }
            },
        };
        self.copies.drawn.insert(id, copy);
        let mut next = record.0.clone();
        let old = std::mem::replace(
            &mut next.copies[place],
            CopyEntry::blank(copy, self.plane.node.clone()),
        );
        // It can no longer become the master.
        next.preferred = next.preferred.filter(|p| *p != old.copy_id);
        if !raced(self.plane.store.cas_record(id, record.1, &next))? {
            // Somebody else changed the record: the watch tells, and it is looked at again.
            return Ok(());
        }
        let text = if is_blank(&old) {
            format!("a new copy, {copy}, begins here")
        } else {
            format!(
                "the files of copy {} are not on this node's disk (was it wiped?): copy {copy} takes its place and gets \
                 a full sync",
                old.copy_id
            )
        };
        self.plane.events.push(
            What::volume(name, "missing", "blank", "S18 new identity")
                .epoch(record.0.epoch)
                .text(text),
        );
        Ok(())
    }

    /// Makes the copies that a creation wants of this node, and answers it.
    pub(super) fn create_copies(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        for (id, volume) in &snapshot.volumes {
            let Some((record, revision)) = &volume.record else {
                continue;
            };
            let Some(copy) = record.copy_on(&self.plane.node) else {
                continue;
            };
            if record.state != State::Creating || volume.ready.contains_key(&copy.copy_id) {
                continue;
            }
            let made = self.plane.host.create_copy(
                *id,
                copy.copy_id,
                record.size,
                Birth::First {
                    epoch: record.epoch,
                    tag: record.epoch_tag,
                },
            );
            self.look_again();
            let error = made.err().map(|e| e.to_string());
            match &error {
                None => log::info!("volume {id}: made copy {}", copy.copy_id),
                Some(e) => log::warn!("volume {id}: cannot make copy {}: {e}", copy.copy_id),
            }
            let ready = Ready {
                boot_id: self.plane.boot_id,
                error,
            };
            raced(
                self.plane
                    .store
                    .answer_creation(*id, copy.copy_id, *revision, &ready),
            )?;
        }
        Ok(())
    }

    /// Destroys the copies of removed volumes. A tombstone is the only reason to: a record that is merely not there
    /// may be in a registry that is damaged, restored or another one.
    pub(super) fn remove_copies(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        let copies = self.copies_here();
        for (id, (tombstone, _)) in &snapshot.removed {
            // More than one when an earlier copy of this node was removed before the volume was.
            let mut ours = tombstone
                .copies
                .iter()
                .filter(|(node, _)| *node == self.plane.node)
                .map(|(_, copy)| *copy)
                .peekable();
            if ours.peek().is_none() {
                continue;
            }
            let local = copies.get(id);
            if let Some(other) = local.filter(|c| !ours.any(|copy| copy == **c)) {
                let text = format!(
                    "copy {other} of removed volume {} stays: the registry removed another one",
                    tombstone.name
                );
                self.say(&id.to_string(), &text);
            } else if self.remove_copy(*id, tombstone) {
                // A race that is lost is no failure: the next round finds the copy gone and notes it again.
                if let Err(CasError::Registry(e)) =
                    self.plane.store.copy_removed(*id, &self.plane.node)
                {
                    return Err(e);
                }
            }
        }
        for (volume, copy) in copies.iter() {
            if snapshot.volumes.contains_key(volume) || snapshot.removed.contains_key(volume) {
                continue;
            }
            self.say(
                &volume.to_string(),
                &format!(
                    "copy {copy} belongs to volume {volume}, which is not in the registry; it is kept"
                ),
            );
        }
        Ok(())
    }

    fn remove_copy(&mut self, id: VolumeId, tombstone: &Tombstone) -> bool {
        self.look_again();
        match self.plane.host.remove_copy(id) {
            Ok(()) => {
                self.plane
                    .events
                    .push(What::volume(&tombstone.name, "copy", "no copy", "remove"));
                self.said.remove(&id.to_string());
                true
            }
            Err(e) => {
                let text = format!(
                    "the copy of removed volume {} stays for now: {e}",
                    tombstone.name
                );
                self.say(&id.to_string(), &text);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::{copy, node, record};
    use crate::replication::record::State;

    #[test]
    fn files_are_made_once_under_an_identity_drawn_here_and_deleted_only_when_named() {
        use Here::{Copy, Nothing, Unusable};
        let keep = || Step::Keep(String::new());
        let (first, second, other) = (copy(1), copy(2), copy(9));
        for (copies, here, drawn, expected) in [
            // As it should be.
            ("n1:i n2:i", Copy(second), None, Step::Nothing),
            ("n1:i n2:m", Copy(second), None, Step::Nothing),
            ("n1:i n2:b", Copy(second), None, Step::Nothing),
            ("n1:i n3:i", Nothing, None, Step::Nothing),
            // A new copy: first an identity of our own, then files.
            ("n1:i n2:b", Nothing, None, Step::Renew(1)),
            ("n1:i n2:b", Nothing, Some(other), Step::Renew(1)),
            ("n1:i n2:b", Nothing, Some(second), Step::Make(second)),
            // A wiped disk.
            ("n1:i n2:m", Nothing, None, Step::Renew(1)),
            ("n1:i n2:i", Nothing, None, keep()),
            ("n1:i n2:ml", Nothing, None, Step::Nothing),
            ("n1:i n2:m", Unusable, None, keep()),
            ("n1:i n3:i", Unusable, None, keep()),
            // Removed: deleted, and then a new one of the same node can be made.
            ("n1:i n2:r", Copy(second), None, Step::Delete(second)),
            ("n1:i n2:r", Nothing, None, Step::Nothing),
            ("n1:i n2:r n2:b", Copy(second), None, Step::Delete(second)),
            ("n1:i n2:r n2:b", Nothing, None, Step::Renew(2)),
            ("n2:i n1:r", Copy(second), None, keep()),
            // Nobody knows it.
            ("n1:i n2:b", Copy(other), None, Step::SetAside(other)),
            ("n1:i n2:m", Copy(other), None, Step::SetAside(other)),
            ("n1:i n2:i", Copy(other), None, keep()),
            ("n1:i n3:i", Copy(other), None, keep()),
            // The record says that it is another node's.
            ("n1:i n2:b", Copy(first), None, keep()),
        ] {
            let found = step(&record(copies), &node("n2"), here, drawn);
            let found = match found {
                Step::Keep(why) if !why.is_empty() => keep(),
                other => other,
            };
            assert_eq!(found, expected, "{copies} with {here:?}, drawn {drawn:?}");
        }
        let creating = Record {
            state: State::Creating,
            ..record("n1:b n2:b")
        };
        assert_eq!(step(&creating, &node("n2"), Nothing, None), Step::Nothing);
    }
}
