//! Copies leave nodes that are to be emptied.
//!
//! The node that serves a volume moves its copies, one after the other; for a detached volume the node of the master
//! copy, or of the next copy in sync when that one does not answer (as for `control_tend`, which brings the new copy up
//! to date). A move is one change of the record: a blank copy elsewhere, and the old one to leave once that is in sync.
//! So it can be interrupted anywhere, and whoever looks next goes on from the record.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::control::{Control, raced};
use super::control_replace::UNDER_WAY_MAX;
use super::control_tend::turn;
use super::drain::to_move;
use super::events::What;
use super::membership::{self, is_blank, staying};
use super::model::VolumeName;
use super::plane::{Found, whole_volumes};
use super::replicas::{Room, add_all, place_more};
use super::snapshot::Snapshot;
use super::store::Registrar;
use crate::registry::RegistryError;
use crate::replication::ids::NodeName;
use crate::replication::record::{Record, State};

/// Pause before a place is looked for again where there was none, or somebody else's volume is looked at again.
const PAUSE: Duration = Duration::from_secs(5);

/// When the loop looks again without a change of the registry.
#[derive(Default)]
pub(super) struct Drains {
    next: Option<Instant>,
}

impl Drains {
    /// Whether it is time.
    pub(super) fn due(&self, now: Instant) -> bool {
        self.next.is_some_and(|at| at <= now)
    }
}

/// New copies of the volume that are not in sync yet.
fn on_their_way(record: &Record) -> usize {
    staying(record).filter(|c| is_blank(c)).count()
}

impl Control {
    /// Moves copies away from nodes that are to be emptied.
    pub(super) fn drain_copies(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        self.drains.next = None;
        if !snapshot.nodes.values().any(|(n, _)| n.draining.is_some()) {
            return Ok(());
        }
        let (mine, unsure) = self.looked_after(snapshot);
        let mut under_way: usize = mine.values().map(|f| on_their_way(&f.record.0)).sum();
        let mut room: Option<Room<'_>> = None;
        for found in mine.values().chain(unsure.values()) {
            let Some(from) = to_move(found, snapshot).next() else {
                continue;
            };
            // What is on its way goes first: several copies of one volume that move at once are several full syncs.
            if under_way >= UNDER_WAY_MAX || found.record.0.present().any(|c| c.leaving) {
                self.drains.next = Some(Instant::now() + PAUSE);
                continue;
            }
            let live = self.live(snapshot);
            let detached = found.spec.0.attachment.is_none();
            if detached && turn(&found.record.0, &live) != Some(&self.plane.node) {
                self.drains.next = Some(Instant::now() + PAUSE);
                continue;
            }
            let room = room.get_or_insert_with(|| Room::of(snapshot, &live));
            if self.move_away(found, from, room)? {
                under_way += 1;
            }
        }
        Ok(())
    }

    /// The volumes that this node serves; and the detached ones of which it has a copy, so that its turn may come.
    fn looked_after(
        &mut self,
        snapshot: &Snapshot,
    ) -> (BTreeMap<VolumeName, Found>, BTreeMap<VolumeName, Found>) {
        let attached = self.attached();
        let (mut mine, mut unsure) = (BTreeMap::new(), BTreeMap::new());
        for (id, spec, record) in whole_volumes(snapshot) {
            if record.0.state == State::Creating {
                continue;
            }
            let into = match &spec.0.attachment {
                Some(desired) if desired.node == self.plane.node && attached.contains_key(&id) => {
                    &mut mine
                }
                None if record.0.copy_on(&self.plane.node).is_some() => &mut unsure,
                _ => continue,
            };
            let found = Found {
                id,
                name: spec.0.full_name(),
                spec: spec.clone(),
                record: record.clone(),
            };
            into.insert(found.name.clone(), found);
        }
        (mine, unsure)
    }

    /// Whether the copy is on its way now.
    fn move_away(
        &mut self,
        found: &Found,
        from: &NodeName,
        room: &mut Room<'_>,
    ) -> Result<bool, RegistryError> {
        let key = format!("drain of {}", found.id);
        let mut next = found.record.0.clone();
        let Some(old) = next.copy_on(from).map(|c| c.copy_id) else {
            return Ok(false);
        };
        let placed = place_more(found, room, 1, &BTreeSet::new())
            .map_err(|e| e.to_string())
            .and_then(|placement| {
                let added = add_all(&found.name, &mut next, &placement.nodes);
                added.map(|()| placement).map_err(|fault| fault.message)
            });
        let placement = match placed {
            Ok(placement) => placement,
            Err(why) => {
                self.drains.next = Some(Instant::now() + PAUSE);
                let text = format!("the copy of {} cannot leave {from}: {why}", found.name);
                if self.say_new(&key, &text) {
                    self.plane.events.push(
                        What::volume(&found.name, "in place", "in place", "drain")
                            .epoch(found.record.0.epoch)
                            .text(text),
                    );
                }
                return Ok(false);
            }
        };
        room.take(&placement.nodes, found.id);
        membership::leave(&mut next, &[old]);
        if !raced(self.plane.store.cas_record(found.id, found.record.1, &next))? {
            // The watch brings what changed, and it is looked at again.
            return Ok(true);
        }
        self.said.remove(&key);
        let to: Vec<&str> = placement.nodes.iter().map(|n| n.0.as_str()).collect();
        let mut text = format!("{from} is drained: its copy goes to {}", to.join(", "));
        for remark in &placement.remarks {
            text += &format!(" ({remark})");
        }
        self.plane.events.push(
            What::volume(&found.name, "in place", "moving", "drain")
                .epoch(next.epoch)
                .text(text),
        );
        Ok(true)
    }
}
