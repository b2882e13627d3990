//! A detached volume that is not as its record asks is looked after without a guest: taken over like any other, its
//! copies brought up to date, and released.
//!
//! The node of the master copy does it, or of the next copy in sync when that node does not answer; a node whose disk
//! no longer has the copy that the record counts on does it itself, since nobody else knows. Should two views of who
//! answers differ and two nodes begin, the protocol lets one through (PROTOCOL 5.1). Whoever attaches the volume goes
//! first: a tended one is released as soon as its spec says so.
//!
//! The record of a detached volume says nothing of a node that has died since. So a volume one of whose copies in sync is
//! on a node that was silent for as long as lost copies are waited for is looked after as well, if another node could take
//! its place: that puts the copy out by the protocol, and `control_replace` does the rest. Should the copy promise after
//! all, it is in sync, and taking the volume over was in vain: not again soon, since it costs an epoch.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::control::Control;
use super::control_replace::stagger;
use super::events::What;
use super::fault::Fault;
use super::host::{AttachRequest, AttachmentStatus, Phase, ScrubState, ScrubStatus};
use super::live::Live;
use super::membership::{lacking, staying};
use super::model::VolumeSpec;
use super::plane::{Found, whole_volumes};
use super::replicas::{Room, place_more};
use super::snapshot::Snapshot;
use super::store::Versioned;
use crate::registry::RegistryError;
use crate::replication::growth;
use crate::replication::ids::{NodeName, VolumeId};
use crate::replication::record::{CopyStatus, Record, State};

/// Volumes that one node tends at once: after a node returned there may be hundreds, each with a sync to run.
const TENDED_MAX: usize = 8;
/// A volume is left alone this long after it was found wanting: who detached it may be about to attach it elsewhere.
const START: Duration = Duration::from_secs(2);
/// Tended, and nothing to do for this long: the copies that are missing cannot be brought up to date now.
const SETTLE: Duration = Duration::from_secs(5);
/// A takeover may take this long: a dead attachment's grace, and promises from busy disks.
const ACQUIRE: Duration = Duration::from_secs(30);
/// Pause before a volume is looked at again that could not be helped; doubles each time up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// What this node remembers of volumes that are wanting.
#[derive(Default)]
pub(super) struct Tending {
    volumes: BTreeMap<VolumeId, Memory>,
    next: Option<Instant>,
}

struct Memory {
    /// Not before.
    begin: Instant,
    /// Attempts that helped nothing, one after the other.
    vain: u32,
    /// Tended, and nothing under way since.
    idle: Option<Instant>,
    /// A scrub was asked for.
    asked: bool,
}

impl Tending {
    /// Whether a pause may have ended.
    pub(super) fn due(&self, now: Instant) -> bool {
        self.next.is_some_and(|at| at <= now)
    }

    fn look_at(&mut self, at: Instant) {
        self.next = Some(self.next.map_or(at, |next| next.min(at)));
    }

    fn memory(&mut self, volume: VolumeId, now: Instant) -> &mut Memory {
        self.volumes.entry(volume).or_insert(Memory {
            begin: now + START,
            vain: 0,
            idle: None,
            asked: false,
        })
    }

    /// Something was done for it elsewhere that it waited for.
    pub(super) fn hurry(&mut self, volume: VolumeId, now: Instant) {
        if let Some(memory) = self.volumes.get_mut(&volume) {
            (memory.begin, memory.vain) = (now, 0);
            self.look_at(now);
        }
    }

    /// What it was tended for is done; or, if a copy in sync is still said to be silent, it never was what it seemed.
    fn done(&mut self, volume: VolumeId, still_silent: bool, now: Instant) {
        match still_silent {
            true => self.in_vain(volume, now),
            false => drop(self.volumes.remove(&volume)),
        }
    }

    /// It was of no use: not again soon.
    fn in_vain(&mut self, volume: VolumeId, now: Instant) {
        let memory = self.memory(volume, now);
        memory.begin = now + PAUSE_MAX.min(PAUSE * (1 << memory.vain.min(6)));
        memory.vain += 1;
        memory.idle = None;
    }
}

/// What is to be done about a detached volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanting {
    /// Its last attachment did not release it: copies may differ.
    Unreleased,
    /// The record counts on a copy that this node's disk does not have.
    LostHere,
    /// A copy is to be brought up to date, to be removed or to become the master, or all of them are to grow.
    Copies,
    /// This process was asked to compare its copies.
    Scrub,
    /// All is as the record asks, but for a copy whose node was silent for too long.
    Silent,
}

/// What a detached volume lacks; `None` when it is as its record asks. `silent` says of a node that it was for too long.
fn wanting(
    record: &Record,
    node: &NodeName,
    has_copy: bool,
    scrub: bool,
    silent: impl Fn(&NodeName) -> bool,
) -> Option<Wanting> {
    if record.state == State::Creating {
        return None;
    }
    // First: whatever else is wanting is seen to by the same attachment.
    if scrub {
        return Some(Wanting::Scrub);
    }
    if record.attachment.is_some() || record.state != State::Clean {
        return Some(Wanting::Unreleased);
    }
    let mine = record
        .copy_on(node)
        .is_some_and(|c| c.status == CopyStatus::InSync);
    if mine && !has_copy {
        return Some(Wanting::LostHere);
    }
    let unfinished = |record: &Record| {
        record.present().any(|c| c.leaving)
            || staying(record).any(|c| c.status != CopyStatus::InSync)
            || record.preferred.is_some()
            || growth::wanted(record).is_some()
    };
    if unfinished(record) {
        return Some(Wanting::Copies);
    }
    let gone = staying(record).any(|c| silent(&c.node));
    gone.then_some(Wanting::Silent)
}

/// Whether tending can help at all now: somebody answers who could not before.
fn can_help(record: &Record, wanting: Wanting, live: &Live) -> bool {
    let answers = |node: &NodeName| live.node(node).is_some();
    // With too few to serve a takeover waits for the others, as any attachment does.
    let (usable, silent): (Vec<_>, Vec<_>) = record.in_sync().partition(|c| answers(&c.node));
    let serves = |copies| record.failure_mode.serves(record.replicas_wanted, copies);
    if !silent.is_empty() && !serves(usable.len()) {
        return false;
    }
    match wanting {
        Wanting::Unreleased | Wanting::LostHere | Wanting::Scrub => true,
        // It answers again: nothing is lost.
        Wanting::Silent => !silent.is_empty(),
        Wanting::Copies => {
            record.present().any(|c| c.leaving)
                || staying(record).any(|c| c.status != CopyStatus::InSync && answers(&c.node))
                || record
                    .preferred
                    .and_then(|p| record.copy(p))
                    .is_some_and(|c| c.status == CopyStatus::InSync && answers(&c.node))
                // Not at the price of a copy.
                || growth::wanted(record).is_some() && silent.is_empty()
        }
    }
}

/// The node whose turn it is: of the copies in sync on nodes that answer the master's, otherwise the first.
pub(super) fn turn<'a>(record: &'a Record, live: &Live) -> Option<&'a NodeName> {
    let usable = || record.in_sync().filter(|c| live.node(&c.node).is_some());
    usable()
        .find(|c| c.copy_id == record.master)
        .or_else(|| usable().next())
        .map(|c| &c.node)
}

impl Control {
    /// Begins, goes on with and ends looking after detached volumes.
    pub(super) fn tend(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        let now = Instant::now();
        self.tending.next = None;
        let attached = self.attached();
        let mut tended = attached.values().filter(|a| a.tends()).count();
        let local = self.copies_here();
        let wait = self.replaces_after(snapshot);
        let mut room: Option<Room<'_>> = None;
        for (id, spec, record) in whole_volumes(snapshot) {
            let here = attached.get(&id);
            if spec.0.attachment.is_some() || here.is_some_and(|a| !a.tends()) {
                self.tending.volumes.remove(&id);
                continue;
            }
            let has_copy = record
                .0
                .copy_on(&self.plane.node)
                .is_some_and(|mine| local.get(&id) == Some(&mine.copy_id));
            let silence = &self.plane.silence;
            let silent = |node: &NodeName| {
                let since = silence.since(node);
                since
                    .zip(wait)
                    .is_some_and(|(at, wait)| at + wait + stagger(id, wait) <= now)
            };
            if let Some(status) = here {
                let scrub = self.scrub_asked(&spec.0).is_some();
                let done = finished(&record.0, &self.plane.node, has_copy, scrub)
                    .then(|| record.0.in_sync().any(|c| silent(&c.node)));
                self.go_on(
                    id,
                    &spec.0.full_name().to_string(),
                    record,
                    (status, done),
                    now,
                );
                continue;
            }
            let scrub = self.scrub_asked(&spec.0).is_some();
            let Some(wanting) = wanting(&record.0, &self.plane.node, has_copy, scrub, silent)
            else {
                self.tending.volumes.remove(&id);
                continue;
            };
            if wanting == Wanting::Silent && record.0.copy_on(&self.plane.node).is_none() {
                // Whoever has a copy of it sees the same.
                continue;
            }
            let memory = self.tending.memory(id, now);
            // Somebody waits for a scrub.
            if scrub && !std::mem::replace(&mut memory.asked, true) {
                memory.begin = now;
            }
            let begin = memory.begin;
            if begin > now {
                self.tending.look_at(begin);
                continue;
            }
            if tended >= TENDED_MAX {
                // One of those that are tended ends with a change of its record, which wakes us.
                continue;
            }
            let live = self.live(snapshot);
            let ours = matches!(wanting, Wanting::LostHere | Wanting::Scrub)
                || turn(&record.0, &live) == Some(&self.plane.node);
            let by_another = live.tended(id).is_some();
            let mut helps = || {
                if !can_help(&record.0, wanting, &live) {
                    return false;
                }
                let room = room.get_or_insert_with(|| Room::of(snapshot, &live));
                wanting != Wanting::Silent || has_a_place(id, spec, record, &live, room)
            };
            if !ours || by_another || !helps() {
                // Nothing was tried: soon again, since who answers can change without a word from the registry.
                self.tending.memory(id, now).begin = now + PAUSE;
                self.tending.look_at(now + PAUSE);
                continue;
            }
            if self.begin(id, &spec.0.full_name().to_string(), record) {
                tended += 1;
                self.tending.look_at(now + SETTLE);
            } else {
                self.tending.in_vain(id, now);
            }
        }
        self.tending
            .volumes
            .retain(|id, _| snapshot.volumes.contains_key(id));
        Ok(())
    }

    fn begin(&mut self, id: VolumeId, name: &str, record: &Versioned<Record>) -> bool {
        let request = AttachRequest {
            volume: id,
            name: name.into(),
            record: record.0.clone(),
            revision: record.1,
            front: None,
            by_turns: false,
            peers: self.told_peers.clone(),
        };
        self.look_again();
        match self.plane.host.attach(request) {
            Ok(()) => {
                self.told_record.insert(id, record.1);
                let why = "its copies are looked after until it is as its record asks";
                self.plane.events.push(
                    What::volume(name, "detached", "tended", "6 tend")
                        .epoch(record.0.epoch)
                        .text(why),
                );
                true
            }
            Err(e) => {
                let text = format!(
                    "the copies of {name} cannot be looked after: {}",
                    Fault::from(e).message
                );
                self.say(&format!("tending of {id}"), &text);
                false
            }
        }
    }

    fn go_on(
        &mut self,
        id: VolumeId,
        name: &str,
        record: &Versioned<Record>,
        (status, done): (&AttachmentStatus, Option<bool>),
        now: Instant,
    ) {
        if status.phase == Phase::Fenced {
            // Another node was faster, or a machine is served somewhere by an attachment that was given up by force.
            self.say(
                &format!("tending of {id}"),
                &format!("{name}: {}", status.why),
            );
            self.tending.in_vain(id, now);
            return self.let_go(id, name, "tended", "fenced");
        }
        self.tell(id, record);
        let scrubs = |s: &ScrubStatus| s.state == ScrubState::Running;
        let busy = status.phase == Phase::Recovering
            || status.copies.iter().any(|c| c.sync.is_some())
            || status.scrub.as_ref().is_some_and(scrubs);
        if let Some(still_silent) = done.filter(|_| status.phase == Phase::Serving) {
            self.tending.done(id, still_silent, now);
            self.said.remove(&format!("tending of {id}"));
            return self.let_go(id, name, "tended", "6 tend");
        }
        let memory = self.tending.memory(id, now);
        if busy {
            memory.idle = None;
        }
        // Comparing what a dead attachment left is no use by itself: it ends, or begins anew.
        if busy && status.phase != Phase::Recovering {
            memory.vain = 0;
        }
        let idle = *memory.idle.get_or_insert(now);
        let patience = match status.phase {
            Phase::Acquiring => ACQUIRE,
            _ => SETTLE,
        };
        if !busy && now >= idle + patience {
            self.tending.in_vain(id, now);
            return self.let_go(id, name, "tended", "6 tend");
        }
        // Progress of a sync is no change of the registry.
        self.tending.look_at(now + SETTLE);
    }
}

/// Whether another node could take the place of the copies whose nodes do not answer. Without one the copy is left in the
/// record: should its node return, nothing is lost.
fn has_a_place(
    id: VolumeId,
    spec: &Versioned<VolumeSpec>,
    record: &Versioned<Record>,
    live: &Live,
    room: &Room<'_>,
) -> bool {
    let found = Found {
        id,
        name: spec.0.full_name(),
        spec: spec.clone(),
        record: record.clone(),
    };
    let silent = staying(&record.0).filter(|c| live.node(&c.node).is_none());
    let lost = silent.map(|c| c.copy_id).collect();
    lacking(&record.0, &lost) > 0 && place_more(&found, room, 1, &lost).is_ok()
}

/// Nothing is left to do but to release the volume.
fn finished(record: &Record, node: &NodeName, has_copy: bool, scrub: bool) -> bool {
    let released = Record {
        attachment: None,
        state: State::Clean,
        ..record.clone()
    };
    record.state == State::Active && wanting(&released, node, has_copy, scrub, |_| false).is_none()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cluster::fixture::{copy, node, record, status};
    use crate::replication::record::{Attachment, Growth};

    fn live(nodes: &[&str]) -> Live {
        let answers = nodes.iter().map(|n| (node(n), Ok(status(n))));
        Live(BTreeMap::from_iter(answers))
    }

    #[test]
    fn a_detached_volume_is_tended_by_the_node_whose_turn_it_is_when_that_can_help() {
        use Wanting::{Copies, LostHere, Silent, Unreleased};
        // (copies, released, has its copy, nodes that answer: what n1 finds wanting, whether it helps, whose turn)
        for (copies, released, has, answering, expected) in [
            ("n1:i n2:i", true, true, "n1 n2", None),
            (
                "n1:i n2:i",
                false,
                true,
                "n1 n2",
                Some((Unreleased, true, "n1")),
            ),
            (
                "n1:i n2:i",
                true,
                false,
                "n1 n2",
                Some((LostHere, true, "n1")),
            ),
            ("n1:i n2:m", true, true, "n1 n2", Some((Copies, true, "n1"))),
            ("n1:i n2:m", true, true, "n1", Some((Copies, false, "n1"))),
            // One replica may be missing: with n3 away as well there would be too few to take over.
            (
                "n1:i n2:m n3:i",
                true,
                true,
                "n1 n2",
                Some((Copies, false, "n1")),
            ),
            (
                "n1:i n2:b n3:m",
                true,
                true,
                "n1 n2",
                Some((Copies, true, "n1")),
            ),
            // Removing a copy needs nobody but those that stay.
            ("n1:i n2:ml", true, true, "n1", Some((Copies, true, "n1"))),
            ("n1:i n2:r", true, true, "n1 n2", None),
            // Nobody said so yet, and it is away for too long. The one whose turn it is has the master, or comes next.
            (
                "n1:i n2:i n3:i",
                true,
                true,
                "n1 n2",
                Some((Silent, true, "n1")),
            ),
            (
                "n2:i n1:i n3:i",
                true,
                true,
                "n1 n3",
                Some((Silent, true, "n1")),
            ),
            // Alone it is too few to take over.
            (
                "n1:i n2:i n3:i",
                true,
                true,
                "n1",
                Some((Silent, false, "n1")),
            ),
            // The master's node does not answer.
            (
                "n1:i n2:i n3:i n4:m",
                true,
                true,
                "n2 n3 n4",
                Some((Copies, true, "n2")),
            ),
            // Not in sync itself: nothing is lost here.
            (
                "n1:m n2:i",
                true,
                false,
                "n1 n2",
                Some((Copies, true, "n2")),
            ),
        ] {
            let mut record = Record {
                state: State::Clean,
                ..record(copies)
            };
            if !released {
                record.state = State::Active;
                record.attachment = Some(Attachment {
                    node: node("n9"),
                    boot_id: crate::replication::ids::BootId([1; 16]),
                    instance: crate::replication::ids::Instance([1; 16]),
                });
            }
            let live = live(&answering.split(' ').collect::<Vec<_>>());
            let silent = |n: &NodeName| !answering.split(' ').any(|a| a == n.0);
            // A scrub that this process was asked for goes before all of it.
            let asked = wanting(&record, &node("n1"), has, true, silent);
            assert_eq!(asked, Some(Wanting::Scrub), "{copies}");
            let found = wanting(&record, &node("n1"), has, false, silent).map(|wanting| {
                let turn = turn(&record, &live).map(|n| n.0.clone());
                (wanting, can_help(&record, wanting, &live), turn)
            });
            let expected = expected.map(|(w, helps, turn)| (w, helps, Some(turn.to_string())));
            assert_eq!(found, expected, "{copies}, {answering} answer");
        }
    }

    #[test]
    fn another_master_that_is_wished_for_is_made_when_it_answers() {
        let record = Record {
            state: State::Clean,
            preferred: Some(copy(2)),
            ..record("n1:i n2:i")
        };
        let found = wanting(&record, &node("n1"), true, false, |_| false);
        assert_eq!(found, Some(Wanting::Copies));
        assert!(can_help(&record, Wanting::Copies, &live(&["n1", "n2"])));
        assert!(!can_help(&record, Wanting::Copies, &live(&["n1"])));
    }

    #[test]
    fn a_detached_volume_that_is_to_grow_is_tended_when_all_its_copies_answer() {
        let mut record = Record {
            state: State::Clean,
            ..record("n1:i n2:i")
        };
        let (to, refused) = (record.size * 2, None);
        record.grow = Some(Growth { to, refused });
        let found = wanting(&record, &node("n1"), true, false, |_| false);
        assert_eq!(found, Some(Wanting::Copies));
        assert!(can_help(&record, Wanting::Copies, &live(&["n1", "n2"])));
        assert!(!can_help(&record, Wanting::Copies, &live(&["n1"])));
        // It has no room: not again before somebody asks.
        let refused = Some("full".into());
        record.grow = Some(Growth { to, refused });
        assert_eq!(wanting(&record, &node("n1"), true, false, |_| false), None);
    }

    #[test]
    fn what_did_not_help_is_tried_again_later_and_later() {
        let (mut tending, volume, now) = (Tending::default(), VolumeId([1; 16]), Instant::now());
        let mut pauses = Vec::new();
        for _ in 0..8 {
            tending.in_vain(volume, now);
            pauses.push((tending.memory(volume, now).begin - now).as_secs());
        }
        assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn a_silent_nodes_copy_that_promised_is_not_asked_for_again_soon() {
        let (mut tending, volume, now) = (Tending::default(), VolumeId([1; 16]), Instant::now());
        let mut pauses = Vec::new();
        for still_silent in [true, true, true, false, true] {
            tending.memory(volume, now);
            tending.done(volume, still_silent, now);
            let pause = tending.volumes.get(&volume).map(|m| m.begin - now);
            pauses.push(pause.map(|p| p.as_secs()));
        }
        assert_eq!(pauses, [Some(5), Some(10), Some(20), None, Some(5)]);
    }
}
