//! A volume comes into being: name, spec and record in one step, a copy on each chosen node, then the record is clean.
//!
//! Either all of it happens or nothing remains. The record is in `Creating` until every node said that its copy is
//! made; a creator that fails removes it, and one that dies is cleaned up after by the control loops.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::events::What;
use super::fault::{Code, Fault};
use super::join::random;
use super::labels::{self, Of, PREFIX};
use super::live::{Live, gather_brief};
use super::model::{
    Creator, DEFAULT_NAMESPACE, Labels, NamespaceRecord, Ready, RuleLabels, VolumeName, VolumeSpec,
    values,
};
use super::namespaces;
use super::placement::{Candidate, Wanted, place};
use super::plane::{Found, Plane};
use super::rules;
use super::settings::{BLOCK_SIZE, SUSPEND_DEADLINE, Wishes, check_size};
use super::snapshot::Snapshot;
use super::store::Registrar;
use super::units::wall_ms;
use crate::registry::{CasError, Revision};
use crate::replication::failure_mode::FailureMode;
use crate::replication::ids::{CopyId, Epoch, NodeName, Tag, VolumeId};
use crate::replication::record::{Base, CopyEntry, CopyStatus, Record, State};

/// How long the chosen nodes have to make their copies. Making one writes some megabytes; a disk that takes longer
/// is not fit for a copy.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether the node stops or the time is up.
const LOOK: Duration = Duration::from_millis(500);
/// The first epoch of every volume.
const FIRST_EPOCH: Epoch = Epoch(1);

/// A request to create a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateRequest {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Its labels.
    #[serde(default)]
    pub labels: Labels,
    /// What the flags say.
    #[serde(default)]
    pub wishes: Wishes,
    /// Return as soon as name and record are written.
    #[serde(default)]
    pub no_wait: bool,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    /// Its id.
    pub id: VolumeId,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The nodes that hold a copy, the master's first.
    pub nodes: Vec<NodeName>,
    /// What was wished for and could not be had, and what else is worth knowing.
    pub remarks: Vec<String>,
    /// The labels that rules gave it.
    #[serde(default)]
    pub rules: RuleLabels,
}

/// Creates a volume. On a failure nothing remains of it.
pub fn create(plane: &Arc<Plane>, request: CreateRequest) -> Result<Created, Fault> {
    let name = VolumeName::new(&request.namespace, &request.name)?;
    let labels = labels::check(request.labels, Of::Volume)?;
    let by_label = Wishes::of_labels(&labels)?;
    let size = check_size(request.size)?;
    let snapshot = plane.store.surroundings(&name.namespace)?;
    let from_rules = rules::evaluate(&rules::of_namespace(&snapshot, &name.namespace), &labels)?;
    let by_rule = Wishes::of_labels(&values(&from_rules))?;
    let master_is_hint = request.wishes.master.is_none();
    let flags = request.wishes;
    let asked_for = flags.clone().or(by_label);
    let by_rule = by_rule.without(&asked_for);
    let wishes = asked_for.or(by_rule.clone());
    let replicas = wishes.replicas()?.unwrap_or(0);
    let new_namespace = (name.namespace != DEFAULT_NAMESPACE
        && !snapshot.namespaces.contains_key(&name.namespace))
    .then(|| {
        format!(
            "namespace {} is new: it has no rules yet; see: lockstep namespace ls",
            name.namespace
        )
    });
    if plane.store.volume_id(&name)?.is_some() {
        return Err(exists(&name));
    }
    let wanted = Wanted {
        copies: usize::from(replicas) + 1,
        master: wishes.master.clone(),
        master_is_hint,
        topology_key: topology_key(&labels).or_else(|| topology_key(&values(&from_rules))),
        beside: Vec::new(),
    };
    let live = gather_brief(plane, snapshot.nodes.values().map(|(n, _)| n));
    let placement = place(&wanted, &candidates(&snapshot, &live)).map_err(|e| {
        let mut hint = String::new();
        let replicas = from_rules.get(&format!("{PREFIX}replicas"));
        if let Some(label) = replicas.filter(|_| by_rule.replicas.is_some()) {
            hint = format!("rule {} asks for {} replicas; ", label.rule, label.value);
        }
        hint += "ask for fewer --replicas, or start more nodes; see: lockstep node ls";
        Fault::state(format!("volume {name} was not created: {e}")).hint(hint)
    })?;

    let tag = Tag(u64::from_le_bytes(random()?));
    let copies: Vec<CopyEntry> = placement
        .nodes
        .iter()
        .map(|node| {
            Ok(CopyEntry {
                copy_id: CopyId(random()?),
                node: node.clone(),
                // Counts for nothing until it is made.
                status: CopyStatus::Missing,
                base: Base {
                    since: FIRST_EPOCH,
                    last: None,
                },
                boot_id: None,
                leaving: false,
            })
        })
        .collect::<Result<_, Fault>>()?;
    let record = Record {
        volume_id: VolumeId(random()?),
        size,
        block_size: BLOCK_SIZE,
        replicas_wanted: replicas,
        failure_mode: wishes.failure_mode(FailureMode::Soft(None))?,
        suspend_deadline_ms: wishes
            .suspend_deadline_ms()?
            .unwrap_or(SUSPEND_DEADLINE.as_millis() as u64),
        compress: wishes.compress.unwrap_or(true),
        epoch: FIRST_EPOCH,
        epoch_tag: tag,
        state: State::Creating,
        attachment: None,
        master: copies[0].copy_id,
        preferred: None,
        grow: None,
        copies,
        lineage: vec![(FIRST_EPOCH, tag)],
    };
    let spec = VolumeSpec {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        created: wall_ms(),
        labels,
        from_rules,
        flags,
        attachment: None,
        scrub: None,
        creator: Creator {
            node: plane.node.clone(),
            instance: plane.instance,
        },
    };
    let created = Created {
        id: record.volume_id,
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        nodes: placement.nodes,
        remarks: new_namespace.into_iter().chain(placement.remarks).collect(),
        rules: spec.from_rules.clone(),
    };
    let namespace = namespaces::record(&snapshot, &name.namespace);
    // Noted before the record can be seen, or our own control loop would take it for one left behind.
    let creating = plane.creating(record.volume_id);
    let revision = write(plane, &name, &spec, &record, namespace.as_ref())?;
    if !request.no_wait {
        complete(plane, &name, record, revision)?;
        return Ok(created);
    }
    let plane = plane.clone();
    thread::spawn(move || {
        if let Err(fault) = complete(&plane, &name, record, revision) {
            log::error!("{fault}");
        }
        drop(creating);
    });
    Ok(created)
}

fn exists(name: &VolumeName) -> Fault {
    Fault::new(Code::Exists, format!("volume {name} exists already"))
        .hint("choose another name, or see: lockstep volume inspect")
}

/// The label over whose values a volume's copies are spread.
pub(super) fn topology_key(labels: &Labels) -> Option<String> {
    labels.get(&format!("{PREFIX}topology-key")).cloned()
}

/// The nodes as placement sees them: a copy needs one that answers and that others reach where data goes. Copies are counted where the node says how many it has; a listing of all volumes knows
/// better (`replicas::Room`).
pub(super) fn candidates(snapshot: &Snapshot, live: &Live) -> Vec<Candidate> {
    snapshot
        .nodes
        .values()
        .map(|(node, _)| Candidate {
            name: node.name.clone(),
            free: match (live.node(&node.name), live.cut_off(&node.name)) {
                (Some(status), None) => Ok(status.capacity.free),
                (Some(_), Some(cut)) => Err(cut),
                (None, _) => Err(format!(
                    "it cannot be reached ({})",
                    live.why_not(&node.name)
                )),
            },
            copies: live.node(&node.name).map_or(0, |status| status.copies_held),
            labels: node.labels.clone(),
            cordoned: node.cordoned,
            draining: node.draining.is_some(),
        })
        .collect()
}

fn write(
    plane: &Plane,
    name: &VolumeName,
    spec: &VolumeSpec,
    record: &Record,
    namespace: Option<&NamespaceRecord>,
) -> Result<Revision, Fault> {
    match plane.store.create_volume(spec, record, namespace) {
        Ok(revision) => {
            plane.events.push(
                What::volume(name, "", "creating", "create")
                    .epoch(record.epoch)
                    .text(format!("{} copies", record.copies.len())),
            );
            Ok(revision)
        }
        Err(CasError::Conflict { .. }) => Err(exists(name)),
        // The id is ours alone: if the record is there, it went through.
        Err(CasError::Ambiguous { why }) => match plane.store.get_record(record.volume_id)? {
            Some((_, revision)) => Ok(revision),
            None => Err(Fault::try_again(format!(
                "volume {name} was not created: {why}"
            ))),
        },
        Err(CasError::Registry(e)) => Err(e.into()),
    }
}

/// Waits for the nodes and ends the creation, one way or the other.
fn complete(
    plane: &Plane,
    name: &VolumeName,
    record: Record,
    revision: Revision,
) -> Result<(), Fault> {
    let volume = record.volume_id;
    let done = await_copies(plane, &record, revision)
        .and_then(|ready| finish(plane, record, revision, &ready));
    let Err(fault) = done else {
        plane
            .events
            .push(What::volume(name, "creating", "clean", "create").epoch(FIRST_EPOCH));
        return Ok(());
    };
    let text = format!("volume {name} was not created: {}", fault.message);
    // If the registry does not answer now, the control loop does it later.
    if let Err(e) = give_up(plane, name, volume, &text) {
        log::warn!("what is left of {name} will be removed later: {e}");
    }
    Err(Fault {
        message: text,
        ..fault
    })
}

/// Removes what a failed creation left.
fn give_up(plane: &Plane, name: &VolumeName, volume: VolumeId, why: &str) -> Result<(), Fault> {
    plane.store.retry(|| {
        let (Some(spec), Some(record)) =
            (plane.store.spec(volume)?, plane.store.get_record(volume)?)
        else {
            return Ok(());
        };
        let found = Found {
            id: volume,
            name: name.clone(),
            spec,
            record,
        };
        abandon(plane, &found, why)
    })?;
    Ok(())
}

/// Removes a volume whose creation was given up. A creator that completes it meanwhile wins: the record changed.
pub(super) fn abandon(plane: &Plane, found: &Found, why: &str) -> Result<(), CasError> {
    let (spec, record) = (&found.spec, &found.record);
    if record.0.state != State::Creating {
        return Ok(());
    }
    plane
        .store
        .remove_volume((&spec.0, spec.1), (&record.0, record.1), wall_ms())?;
    plane
        .events
        .push(What::volume(&found.name, "creating", "removed", "create-given-up").text(why));
    Ok(())
}

/// Every copy's answer, or who did not give a good one.
fn await_copies(
    plane: &Plane,
    record: &Record,
    revision: Revision,
) -> Result<BTreeMap<CopyId, Ready>, Fault> {
    let deadline = Instant::now() + PATIENCE;
    let volume = record.volume_id;
    // The watch tells every change since, without a gap: nothing needs to be read.
    let mut seen = Snapshot::just_made(record, revision);
    let mut watch = plane.store.watch_volume(volume, revision)?;
    loop {
        plane.still_running()?;
        let answers: BTreeMap<CopyId, Ready> = seen
            .volumes
            .get(&volume)
            .filter(|v| v.record.is_some())
            .ok_or_else(|| Fault::try_again("another node gave the creation up"))?
            .ready
            .iter()
            .map(|(copy, (ready, _))| (*copy, ready.clone()))
            .collect();
        let late = Instant::now() >= deadline;
        let failed = answers.values().any(|r| r.error.is_some());
        if failed || late {
            return Err(who_failed(record, &answers));
        }
        if answers.len() == record.copies.len() {
            return Ok(answers);
        }
        match watch.next(LOOK) {
            Ok(Some(batch)) => seen.apply(batch),
            Ok(None) => {}
            Err(_) => {
                seen = plane.store.of_volume(volume)?;
                watch = plane.store.watch_volume(volume, seen.revision)?;
            }
        }
    }
}

fn who_failed(record: &Record, answers: &BTreeMap<CopyId, Ready>) -> Fault {
    let errors: Vec<String> = record
        .copies
        .iter()
        .filter_map(|c| {
            let error = answers.get(&c.copy_id)?.error.as_ref()?;
            Some(format!("{}: {error}", c.node))
        })
        .collect();
    if !errors.is_empty() {
        return Fault::state(errors.join("; "));
    }
    let silent: Vec<String> = record
        .copies
        .iter()
        .filter(|c| !answers.contains_key(&c.copy_id))
        .map(|c| format!("{}: made no copy within {}s", c.node, PATIENCE.as_secs()))
        .collect();
    Fault::try_again(silent.join("; ")).hint("look at the log of the nodes named")
}

fn finish(
    plane: &Plane,
    mut record: Record,
    mut revision: Revision,
    ready: &BTreeMap<CopyId, Ready>,
) -> Result<(), Fault> {
    record.state = State::Clean;
    for copy in &mut record.copies {
        copy.status = CopyStatus::InSync;
        copy.boot_id = ready.get(&copy.copy_id).map(|r| r.boot_id);
    }
    plane.store.retry(|| {
        match plane.store.finish_creation(revision, &record) {
            Ok(_) => Ok(()),
            Err(e) => {
                // An outcome that was unknown is known now: is it our record that stands?
                match plane.store.get_record(record.volume_id)? {
                    Some((found, _)) if found.state != State::Creating => Ok(()),
                    Some((_, at)) => {
                        revision = at;
                        Err(e)
                    }
                    None => Err(e),
                }
            }
        }
    })?;
    Ok(())
}
