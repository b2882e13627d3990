//! A volume's settings change, live; and a volume is removed.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::attach::detach;
use super::create::abandon;
use super::events::What;
use super::fault::Fault;
use super::labels::{self, Of};
use super::model::{Labels, RuleRecord, VolumeName, VolumeSpec, values};
use super::plane::{Found, Plane};
use super::replicas::{Around, may_serve, resize};
use super::rules;
use super::settings::{Wishes, check_size};
use super::store::Race;
use super::units::{show_size, wall_ms};
use crate::replication::record::{Growth, Record, State};

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
    /// Apply the namespace's rules again.
    pub reapply: bool,
    /// Only say what would change.
    pub preview: bool,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Updated {
    /// `namespace/name`.
    pub volume: String,
    /// What changed, or in a preview would change, one clause each.
    #[serde(default)]
    pub changes: Vec<String>,
}

/// Changes a volume, all of it or nothing, and says what changed, one clause each.
pub fn update(
    plane: &Plane,
    name: &VolumeName,
    request: &UpdateRequest,
) -> Result<Vec<String>, Fault> {
    let around = Around::look(plane)?;
    update_around(plane, name, request, &around, None)
}

/// The same in a cluster that was looked at before; `rules` are those of the namespace as they would be.
pub(super) fn update_around(
    plane: &Plane,
    name: &VolumeName,
    request: &UpdateRequest,
    around: &Around,
    rules: Option<&[RuleRecord]>,
) -> Result<Vec<String>, Fault> {
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
    let by_label = Wishes::of_labels(&added)?;
    if request.wishes.is_empty()
        && request.size.is_none()
        && added.is_empty()
        && removed.is_empty()
        && !request.reapply
    {
        return Err(Fault::input(format!("nothing to change on {name}"))
            .hint("see: lockstep volume update --help"));
    }
    let changes = plane
        .store
        .retry(|| {
            let mut found = plane.find(name)?;
            let spec = &mut found.spec.0;
            let before = (spec.clone(), spec.all_labels());
            spec.labels.extend(added.clone());
            spec.labels.retain(|k, _| !removed.contains(k));
            // People win over rules, until the rules are applied again.
            spec.from_rules
                .retain(|k, _| !removed.contains(k) && !added.contains_key(k));
            // What a label says now is no longer as a flag once said it.
            let said = request.wishes.clone();
            spec.flags = said.or(std::mem::take(&mut spec.flags).without(&by_label));
            // A label that means something takes effect when it is set; flags of the same command win.
            let mut wishes = request.wishes.clone().or(by_label.clone());
            if request.reapply {
                spec.from_rules = match rules {
                    Some(rules) => rules::evaluate(rules, &spec.labels),
                    None => {
                        let rules = rules::of_namespace(&around.snapshot, &name.namespace);
                        rules::evaluate(&rules, &spec.labels)
                    }
                }?;
                wishes = wishes.or(spec.flags.clone()).or(spoken(spec)?);
            }
            let (record, mut changes) = change_record(&found, &wishes, request.size, around)?;
            found.record.0 = record;
            let spec = &found.spec.0;
            changes.extend(label_changes(&before.1, &spec.all_labels()));
            // Our own unknown outcome may have gone through, or it was so already.
            if request.preview || (changes.is_empty() && *spec == before.0) {
                return Ok(changes);
            }
            // Both keys are guarded: growing a volume that is attached at the same moment loses, or the attach does.
            plane.store.cas_volume(
                found.id,
                (spec, found.spec.1),
                (&found.record.0, found.record.1),
            )?;
            Ok(changes)
        })
        .map_err(|race: Race| Fault::from(race))?;
    if !changes.is_empty() && !request.preview {
        plane
            .events
            .push(What::volume(name, "", "updated", "update").text(changes.join(", ")));
    }
    Ok(changes)
}

/// What the labels of a volume say, people's before rules'. What nobody speaks of any more stays as it is.
fn spoken(spec: &VolumeSpec) -> Result<Wishes, Fault> {
    let by_rule = Wishes::of_labels(&values(&spec.from_rules))?;
    Ok(Wishes::of_labels(&spec.labels)?.or(by_rule))
}

fn label_changes(before: &Labels, after: &Labels) -> Vec<String> {
    let keys: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    keys.into_iter()
        .filter_map(|key| match (before.get(key), after.get(key)) {
            (None, Some(new)) => Some(format!("label {key}={new}")),
            (Some(_), None) => Some(format!("no label {key}")),
            (Some(old), Some(new)) if old != new => Some(format!("label {key} {old} -> {new}")),
            _ => None,
        })
        .collect()
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
        changes.extend(grow(name, &mut record, check_size(size)?)?);
    }
    let mode = wishes.failure_mode(record.failure_mode)?;
    if mode != record.failure_mode {
        changes.push(format!("failure mode {} -> {}", record.failure_mode, mode));
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

/// Wishes for another size; in words, if that changes anything. The size itself is changed by the attachment, when every copy
/// has room for it (PROTOCOL 11.4); a detached volume gets one for that.
fn grow(name: &VolumeName, record: &mut Record, to: u64) -> Result<Option<String>, Fault> {
    let (is, wish) = (record.size, record.grow.take());
    if to < is {
        return Err(Fault::input(format!(
            "volume {name} has {} and a volume only grows",
            show_size(is)
        ))
        .hint("make a smaller volume and copy what you need, in the virtual machine"));
    }
    if to > is {
        let refused = None;
        record.grow = Some(Growth { to, refused });
    }
    let said = match (&record.grow, &wish) {
        (now, before) if now == before => None,
        (Some(_), _) => Some(format!("size {} -> {}", show_size(is), show_size(to))),
        // Its own size takes a wish back.
        (None, _) => Some(format!("size stays {}", show_size(is))),
    };
    Ok(said)
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
