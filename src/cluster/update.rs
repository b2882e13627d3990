//! A volume's settings change, live; and a volume is removed.

use serde::{Deserialize, Serialize};

use super::attach::detach;
use super::create::abandon;
use super::events::What;
use super::fault::Fault;
use super::labels::{self, Of};
use super::model::{Labels, VolumeName};
use super::plane::{Found, Plane};
use super::replicas::{Around, may_serve, resize};
use super::settings::{Wishes, check_size, show_failure_mode};
use super::store::Race;
use super::units::{show_size, wall_ms};
use crate::replication::record::{Record, State};

/// A request to change a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UpdateRequest {
    /// What the flags say.
    pub wishes: Wishes,
    /// The new size, in bytes.
    pub size: Option<u64>,
    /// Labels to set.
    pub label_add: Labels,
    /// Labels to take away.
    pub label_rm: Vec<String>,
}

/// Changes a volume. All of it happens or nothing.
pub fn update(plane: &Plane, name: &VolumeName, request: &UpdateRequest) -> Result<(), Fault> {
    let added = labels::check(request.label_add.clone(), Of::Volume)?;
    let removed = request
        .label_rm
        .iter()
        .map(|key| labels::own_key(key, Of::Volume))
        .collect::<Result<Vec<_>, _>>()?;
    if let Some(key) = removed.iter().find(|k| added.contains_key(*k)) {
        return Err(Fault::input(format!(
            "label {key} is both added and removed"
        )));
    }
    // A label that means something takes effect when it is set; flags of the same command win.
    let wishes = request.wishes.clone().or(Wishes::of_labels(&added)?);
    if wishes == Wishes::default()
        && request.size.is_none()
        && added.is_empty()
        && removed.is_empty()
    {
        return Err(Fault::input(format!("nothing to change on {name}"))
            .hint("see: lockstep volume update --help"));
    }
    let around = Around::look(plane)?;
    let changes = plane
        .store
        .retry(|| {
            let mut found = plane.find(name)?;
            let (record, mut changes) = change_record(&found, &wishes, request.size, &around)?;
            found.record.0 = record;
            let spec_labels = &mut found.spec.0.labels;
            let before = spec_labels.clone();
            spec_labels.extend(added.clone());
            spec_labels.retain(|k, _| !removed.contains(k));
            if *spec_labels != before {
                changes.push("labels".into());
            }
            if changes.is_empty() {
                return Ok(changes); // it is so already, or our own unknown outcome went through
            }
            // Both keys are guarded: growing a volume that is attached at the same moment loses, or the attach does.
            plane.store.cas_volume(
                found.id,
                (&found.spec.0, found.spec.1),
                (&found.record.0, found.record.1),
            )?;
            Ok(changes)
        })
        .map_err(|race: Race| Fault::from(race))?;
    if !changes.is_empty() {
        plane
            .events
            .push(What::volume(name, "", "updated", "update").text(changes.join(", ")));
    }
    Ok(())
}

/// The record as wished for, and what changed in words.
fn change_record(
    found: &Found,
    wishes: &Wishes,
    size: Option<u64>,
    around: &Around,
) -> Result<(Record, Vec<String>), Fault> {
    let name = &found.name;
    let mut record = found.record.0.clone();
    let mut changes = Vec::new();
    if record.state == State::Creating {
        return Err(Fault::try_again(format!(
            "volume {name} is still being created"
        )));
    }
    if let Some(size) = size {
        let size = check_size(size)?;
        if size < record.size {
            return Err(Fault::input(format!(
                "volume {name} has {} and a volume only grows",
                show_size(record.size)
            )));
        }
        if size > record.size {
            if let Some(attachment) = &found.spec.0.attachment {
                return Err(Fault::state(format!(
                    "volume {name} is attached on {}, and this version grows detached volumes only",
                    attachment.node
                ))
                .hint(format!("first: lockstep volume detach {name}")));
            }
            changes.push(format!(
                "size {} -> {}",
                show_size(record.size),
                show_size(size)
            ));
            record.size = size;
        }
    }
    let mode = wishes.failure_mode(record.failure_mode)?;
    if mode != record.failure_mode {
        changes.push(format!(
            "failure mode {} -> {}",
            show_failure_mode(record.failure_mode),
            show_failure_mode(mode)
        ));
        record.failure_mode = mode;
    }
    if let Some(replicas) = wishes.replicas()?
        && replicas != record.replicas_wanted
    {
        changes.push(resize(found, &mut record, replicas, around)?);
    }
    let policy = |r: &Record| (r.failure_mode, r.replicas_wanted);
    if policy(&record) != policy(&found.record.0) {
        may_serve(found, &record, around)?;
    }
    if let Some(ms) = wishes.suspend_deadline_ms()?
        && ms != record.suspend_deadline_ms
    {
        changes.push(format!(
            "suspend deadline {} ms -> {ms} ms",
            record.suspend_deadline_ms
        ));
        record.suspend_deadline_ms = ms;
    }
    if let Some(compress) = wishes.compress
        && compress != record.compress
    {
        changes.push(format!(
            "compression {}",
            if compress { "on" } else { "off" }
        ));
        record.compress = compress;
    }
    Ok((record, changes))
}

/// Removes a volume and, on every node, its copy. Refused while it is attached, unless `force`: then it is detached
/// first.
pub fn remove(plane: &Plane, name: &VolumeName, force: bool) -> Result<(), Fault> {
    let found = plane.find(name)?;
    if let Some(attachment) = &found.spec.0.attachment {
        if !force {
            return Err(
                Fault::state(format!("volume {name} is attached on {}", attachment.node))
                    .hint(format!("first: lockstep volume detach {name}")),
            );
        }
        detach(plane, name, true, false)?;
    }
    let id = found.id;
    plane
        .store
        .retry(|| {
            let found = match plane.find(name) {
                Ok(found) if found.id == id => found,
                // Gone, or the name is another volume's by now: ours is removed.
                Ok(_) => return Ok(()),
                Err(fault) if fault.code == super::fault::Code::NotFound => return Ok(()),
                Err(fault) => return Err(Race::Fault(fault)),
            };
            if let Some(attachment) = &found.spec.0.attachment {
                return Err(Race::Fault(Fault::state(format!(
                    "volume {name} was attached on {} meanwhile",
                    attachment.node
                ))));
            }
            if found.record.0.state == State::Creating {
                return match force {
                    true => Ok(abandon(plane, &found, "removed while it was created")?),
                    false => Err(Race::Fault(
                        Fault::try_again(format!("volume {name} is still being created"))
                            .hint("wait, or use --force"),
                    )),
                };
            }
            plane.store.remove_volume(
                (&found.spec.0, found.spec.1),
                (&found.record.0, found.record.1),
                wall_ms(),
            )?;
            plane.events.push(
                What::volume(name, "detached", "removed", "remove").epoch(found.record.0.epoch),
            );
            Ok(())
        })
        .map_err(Race::into)
}
