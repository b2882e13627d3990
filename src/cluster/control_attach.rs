//! What this node serves is what the specs say.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::control::{Control, raced};
use super::events::What;
use super::fault::{Code, Fault};
use super::host::{AttachRequest, Front, HostError, Phase};
use super::model::{Desired, VolumeName, VolumeSpec};
use super::plane::Report;
use super::snapshot::Snapshot;
use super::store::Versioned;
use crate::registry::{RegistryError, Revision};
use crate::replication::ids::VolumeId;
use crate::replication::record::{Record, State};

/// Pause before a volume that could not be attached is tried again. A dead attachment's grace is 3 s.
const ATTACH_PAUSE: Duration = Duration::from_millis(500);

impl Control {
    /// Serves what this node should serve, and nothing else.
    pub(super) fn attachments(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        let attached = self.attached();
        let (tended, serving): (Vec<_>, Vec<_>) = attached.values().partition(|a| a.tends());
        let tended: BTreeSet<VolumeId> = tended.into_iter().map(|a| a.volume).collect();
        let serving: BTreeMap<VolumeId, Phase> =
            serving.into_iter().map(|a| (a.volume, a.phase)).collect();
        self.told_record
            .retain(|id, _| serving.contains_key(id) || tended.contains(id));
        self.by_turns.retain(|id| serving.contains_key(id));
        self.retry.retain(|id, _| snapshot.volumes.contains_key(id));
        for (id, spec, record) in super::plane::whole_volumes(snapshot) {
            let here = spec
                .0
                .attachment
                .as_ref()
                .filter(|a| a.node == self.plane.node);
            let phase = serving.get(&id).copied();
            if tended.contains(&id) {
                if spec.0.attachment.is_none() {
                    continue;
                }
                // A machine is to be served, here or elsewhere: it goes first. The release changes the record, and the
                // round that follows serves by the new one.
                self.let_go(id, spec.0.full_name(), "tended", "attach");
                continue;
            }
            let incoming = spec.0.attachment.as_ref().and_then(|desired| {
                let successor = desired.successor.as_ref()?;
                (successor.node == self.plane.node).then_some((desired, successor))
            });
            if let Some(move_here) = incoming {
                self.await_machine(id, (spec, record), move_here, phase, snapshot)?;
                continue;
            }
            match (here, phase) {
                (Some(desired), _) if desired.release.is_some() => {
                    self.release(id, spec, desired)?;
                }
                (Some(_), Some(Phase::Fenced)) => {
                    // The spec still wants it here: take the dead attachment away, the next round attaches anew.
                    self.let_go(id, spec.0.full_name(), "attached", "fenced");
                }
                (Some(desired), Some(_)) => {
                    self.may_leave(id, desired.successor.is_some());
                    self.tell(id, record);
                }
                (Some(desired), None) => self.serve(id, spec, desired, record, false),
                (None, Some(_)) => {
                    self.let_go(id, spec.0.full_name(), "attached", "not-wanted-here")
                }
                (None, None) => {
                    self.retry.remove(&id);
                    self.plane.clear_report(id);
                }
            }
        }
        for id in serving.keys().chain(&tended) {
            if let Some((tombstone, _)) = snapshot.removed.get(id) {
                self.let_go(*id, &tombstone.name, "attached", "removed");
            } else if !snapshot.volumes.contains_key(id) {
                self.say(
                    &id.to_string(),
                    "an attached volume is not in the registry; it is served on",
                );
            }
        }
        self.let_held_go(snapshot);
        Ok(())
    }

    /// Machines that were served here before this process, and are not to be any more, have waited in vain.
    fn let_held_go(&mut self, snapshot: &Snapshot) {
        let me = &self.plane.node;
        let is_wanted = |volume: VolumeId| match snapshot.volumes.get(&volume) {
            None => false,
            Some(entry) => entry.spec.as_ref().is_none_or(|(spec, _)| {
                let desired = spec.attachment.as_ref();
                let successor = desired.and_then(|d| d.successor.as_ref());
                desired.is_some_and(|d| d.node == *me) || successor.is_some_and(|s| s.node == *me)
            }),
        };
        let mut held = self.plane.host.held();
        held.retain(|held| !is_wanted(held.volume));
        for held in held {
            log::warn!(
                "{}: it was served at {} before this process began, and is not to be served here any more: {}",
                held.name,
                held.socket.display(),
                match held.connected {
                    true => "the machine that waited for it is let go",
                    false => "no machine waited for it",
                }
            );
            self.let_go(held.volume, held.name, "held", "not-wanted-here");
        }
    }

    pub(super) fn tell(&mut self, id: VolumeId, record: &Versioned<Record>) {
        self.retry.remove(&id);
        self.plane.clear_report(id);
        if self.told_record.get(&id) != Some(&record.1) {
            self.plane.host.record_changed(id, &record.0, record.1);
            self.told_record.insert(id, record.1);
        }
    }

    /// Serves the volume; with `by_turns` only while its machine runs here.
    pub(super) fn serve(
        &mut self,
        id: VolumeId,
        spec: &Versioned<VolumeSpec>,
        desired: &Desired,
        record: &Versioned<Record>,
        by_turns: bool,
    ) {
        if record.0.state == State::Creating {
            return;
        }
        let now = Instant::now();
        if let Some((revision, at)) = self.retry.get(&id)
            && *revision == spec.1
            && *at > now
        {
            return;
        }
        let name = spec.0.full_name();
        let started = self.make_socket_dir(desired).and_then(|()| {
            self.plane.host.attach(AttachRequest {
                volume: id,
                name: name.to_string(),
                record: record.0.clone(),
                revision: record.1,
                front: Some(Front {
                    socket: desired.socket.clone(),
                    num_queues: desired.num_queues,
                    read_only: desired.read_only,
                }),
                by_turns,
                peers: self.told_peers.clone(),
            })
        });
        self.look_again();
        match started {
            Ok(()) => {
                self.retry.remove(&id);
                self.plane.clear_report(id);
                self.told_record.insert(id, record.1);
                self.said.remove(&id.to_string());
                self.plane.events.push(
                    What::volume(&name, "attaching", "attached", "attach")
                        .epoch(record.0.epoch)
                        .text(format!("at {}", desired.socket.display())),
                );
            }
            Err(e) => {
                self.retry.insert(id, (spec.1, now + ATTACH_PAUSE));
                self.failed(id, spec.1, &name, "serve", e);
            }
        }
    }

    fn make_socket_dir(&self, desired: &Desired) -> Result<(), HostError> {
        let Some(dir) = desired.socket.parent() else {
            return Ok(());
        };
        std::fs::create_dir_all(dir)
            .map_err(|e| HostError::Refused(format!("cannot make {}: {e}", dir.display())))
    }

    /// Releases a volume because someone asked for it, and answers in the spec.
    fn release(
        &mut self,
        id: VolumeId,
        spec: &Versioned<VolumeSpec>,
        desired: &Desired,
    ) -> Result<(), RegistryError> {
        let now = Instant::now();
        if let Some((revision, at)) = self.retry.get(&id)
            && *revision == spec.1
            && *at > now
        {
            return Ok(());
        }
        let name = spec.0.full_name();
        let force = desired.release.is_some_and(|r| r.force);
        self.look_again();
        let attachment = match self.plane.host.detach(id, force) {
            Ok(()) => None,
            // It refuses: the volume stays attached, and whoever asked reads why.
            Err(e @ HostError::Connected) => {
                self.failed(id, spec.1, &name, "release", e);
                Some(Desired {
                    release: None,
                    ..desired.clone()
                })
            }
            Err(e) => {
                self.retry.insert(id, (spec.1, now + ATTACH_PAUSE));
                self.failed(id, spec.1, &name, "release", e);
                return Ok(());
            }
        };
        self.retry.remove(&id);
        let released = attachment.is_none();
        let answer = VolumeSpec {
            attachment,
            ..spec.0.clone()
        };
        let written = raced(self.plane.store.cas_spec(id, spec.1, &answer))?;
        if released && written {
            self.plane.clear_report(id);
            self.plane
                .events
                .push(What::volume(&name, "attached", "detached", "detach"));
        }
        Ok(())
    }

    /// Stops serving what should not be served here (any more), or looking after it (`from` says which it was). Only a
    /// forced detach, a withdrawn attach or a fence lead here, so a connected virtual machine is no reason to go on.
    pub(super) fn let_go(&mut self, id: VolumeId, name: impl ToString, from: &str, rule: &str) {
        let name = name.to_string();
        self.look_again();
        match self.plane.host.detach(id, true) {
            Ok(()) => {
                self.plane.clear_report(id);
                self.plane
                    .events
                    .push(What::volume(&name, from, "detached", rule));
            }
            Err(e) => self.say(&id.to_string(), &format!("{name} cannot be released: {e}")),
        }
    }

    fn failed(
        &mut self,
        id: VolumeId,
        spec: Revision,
        name: &VolumeName,
        what: &str,
        e: HostError,
    ) {
        let fault = Fault::from(e);
        let text = format!("cannot {what} {name}: {}", fault.message);
        // Busy is part of taking over from a dead node: worth a line, not an event.
        if self.say_new(&id.to_string(), &text) && fault.code != Code::TryAgain {
            self.plane
                .events
                .push(What::volume(name, "attaching", "failed", what).text(fault.message.clone()));
        }
        self.plane.report(Report {
            volume: id,
            spec,
            fault,
        });
    }
}
