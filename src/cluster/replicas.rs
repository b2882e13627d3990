//! More replicas, fewer, others: what people ask of a volume's copies, written into its record. The new copies' nodes
//! make them, and the attachment brings them up to date, drops those that leave and switches the master.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::create::{candidates, topology_key};
use super::events::What;
use super::fault::Fault;
use super::host::AttachmentStatus;
use super::join::random;
use super::live::{Live, gather};
use super::membership::{self, Known, choose_leaving};
use super::model::VolumeName;
use super::placement::{Beside, Candidate, NoPlace, Placement, Wanted, fitness, place};
use super::plane::{Found, Plane, whole_volumes};
use super::snapshot::Snapshot;
use super::store::{Race, Registrar};
use crate::replication::failure_mode::FailureMode;
use crate::replication::ids::{COPIES_MAX, CopyId, NodeName, VolumeId};
use crate::replication::record::{CopyEntry, CopyStatus, Record, State};

/// How long a switch of the master is waited for: it takes two changes of the record.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the outcome is looked for.
const LOOK: Duration = Duration::from_millis(100);

/// The cluster as it was when a change was asked for.
pub(super) struct Around {
    pub(super) snapshot: Snapshot,
    live: Live,
}

impl Around {
    pub(super) fn look(plane: &Plane) -> Result<Self, Fault> {
        let snapshot = plane.store.snapshot()?;
        let live = gather(plane, snapshot.nodes.values().map(|(n, _)| n));
        Ok(Self { snapshot, live })
    }

    /// What the node that serves the volume, or looks after it while it is detached, says of it.
    fn serving(&self, found: &Found) -> Option<&AttachmentStatus> {
        match &found.spec.0.attachment {
            Some(desired) => self.live.node(&desired.node)?.attachment(found.id),
            None => self.live.tended(found.id),
        }
    }

    fn known(&self, found: &Found) -> Known {
        let syncing = self.serving(found).map(|s| {
            let copies = s.copies.iter().filter(|c| c.sync.is_some());
            copies.map(|c| c.copy).collect()
        });
        let nodes = found.record.0.present().map(|c| &c.node);
        Known {
            syncing: syncing.unwrap_or_default(),
            offline: nodes
                .filter(|n| self.live.node(n).is_none())
                .cloned()
                .collect(),
            served_on: found.spec.0.attachment.as_ref().map(|a| a.node.clone()),
        }
    }

    /// Copies in sync by the record and, while the volume is served, in the eyes of its attachment as well: one that was
    /// lost a moment ago is not out of the record yet.
    fn in_sync(&self, found: &Found) -> usize {
        let by_record = found.record.0.in_sync().count();
        let seen = self.serving(found).map(|status| {
            let well = status
                .copies
                .iter()
                .filter(|c| c.state == "in_sync" && c.lag.is_empty());
            well.count()
        });
        seen.map_or(by_record, |seen| seen.min(by_record))
    }
}

/// What the nodes have room for, with what they were promised already: many copies may be placed by one look at them.
pub(super) struct Room<'a> {
    snapshot: &'a Snapshot,
    /// Ways that are cut: from, to, why.
    cuts: Vec<(NodeName, NodeName, String)>,
    nodes: Vec<Candidate>,
    /// Bytes that a new copy of a volume will take.
    bytes: BTreeMap<VolumeId, u64>,
}

impl<'a> Room<'a> {
    pub(super) fn of(snapshot: &'a Snapshot, live: &Live) -> Self {
        let mut bytes: BTreeMap<VolumeId, u64> = BTreeMap::new();
        let mut has: BTreeMap<CopyId, u64> = BTreeMap::new();
        for status in live.0.values().flatten() {
            for copy in &status.copies {
                let most = bytes.entry(copy.volume).or_default();
                *most = copy.allocated.max(*most);
                has.insert(copy.copy, copy.allocated);
            }
        }
        let mut room = Self {
            snapshot,
            cuts: live
                .cuts()
                .map(|(from, to, why)| (from.clone(), to.clone(), why.into()))
                .collect(),
            nodes: candidates(snapshot, live),
            bytes,
        };
        // The records know of those as well that are not made yet.
        room.nodes.iter_mut().for_each(|n| n.copies = 0);
        for (id, _, (record, _)) in whole_volumes(snapshot) {
            for copy in record.present() {
                let has = has.get(&copy.copy_id).copied().unwrap_or(0);
                let more = match copy.status {
                    CopyStatus::InSync => 0,
                    _ => room.bytes_of(id).saturating_sub(has),
                };
                room.promise(&copy.node, more);
            }
        }
        room
    }

    fn bytes_of(&self, volume: VolumeId) -> u64 {
        self.bytes.get(&volume).copied().unwrap_or(0)
    }

    fn promise(&mut self, node: &NodeName, bytes: u64) {
        if let Some(node) = self.nodes.iter_mut().find(|n| n.name == *node) {
            node.copies += 1;
            node.free = node.free.clone().map(|free| free.saturating_sub(bytes));
        }
    }

    /// The nodes, as whoever brings new copies of the volume up to date sees them: the node that serves it, or the master's.
    fn for_volume(&self, found: &Found) -> Vec<Candidate> {
        let record = &found.record.0;
        let attached = found.spec.0.attachment.as_ref().map(|a| &a.node);
        let server = attached.or_else(|| record.copy(record.master).map(|c| &c.node));
        let mut nodes = self.nodes.clone();
        for (from, to, why) in &self.cuts {
            let node = nodes.iter_mut().find(|n| n.name == *to && n.free.is_ok());
            if let Some(node) = node.filter(|_| Some(from) == server) {
                node.free = Err(format!(
                    "{from}, which serves the volume, does not reach its replication port ({why})"
                ));
            }
        }
        nodes
    }

    /// New copies of the volume go to these nodes.
    pub(super) fn take(&mut self, nodes: &[NodeName], volume: VolumeId) {
        let bytes = self.bytes_of(volume);
        nodes.iter().for_each(|node| self.promise(node, bytes));
    }
}

/// Where `count` more copies of the volume go. Those of `lost` are not counted on any more.
pub(super) fn place_more(
    found: &Found,
    room: &Room<'_>,
    count: usize,
    lost: &BTreeSet<CopyId>,
) -> Result<Placement, NoPlace> {
    let snapshot = room.snapshot;
    let beside = |c: &CopyEntry| Beside {
        node: c.node.clone(),
        stays: !c.leaving && !lost.contains(&c.copy_id) && !snapshot.is_draining(&c.node),
    };
    let wanted = Wanted {
        copies: count,
        topology_key: topology_key(&found.spec.0.all_labels()),
        beside: found.record.0.present().map(beside).collect(),
        ..Wanted::default()
    };
    place(&wanted, &room.for_volume(found))
}

/// Writes blank copies on `nodes` into the record.
pub(super) fn add_all(
    name: &VolumeName,
    record: &mut Record,
    nodes: &[NodeName],
) -> Result<(), Fault> {
    for node in nodes {
        if membership::add(record, CopyId(random()?), node.clone()).is_none() {
            return Err(Fault::state(format!(
                "volume {name} has {COPIES_MAX} copies, those that leave counted, and can have no more"
            ))
            .hint(format!(
                "wait until a copy is gone; see: lockstep volume inspect {name}"
            )));
        }
    }
    Ok(())
}

/// Changes the record to `replicas`, and says how in words.
pub(super) fn resize(
    found: &Found,
    record: &mut Record,
    replicas: u8,
    around: &Around,
) -> Result<String, Fault> {
    let name = &found.name;
    let before = std::mem::replace(&mut record.replicas_wanted, replicas);
    let count = membership::lacking(record, &BTreeSet::new());
    let room = Room::of(&around.snapshot, &around.live);
    let placed = place_more(found, &room, count, &BTreeSet::new());
    let placement = placed.map_err(|e| {
        Fault::state(format!("volume {name} keeps its {before} replicas: {e}")).hint(
            "ask for fewer --replicas, or start more nodes; a copy that leaves occupies its node until it is gone",
        )
    })?;
    add_all(name, record, &placement.nodes)?;
    let leaving = choose_leaving(record, replicas, &around.known(found));
    membership::leave(record, &leaving);
    let mut text = format!("replicas {before} -> {replicas}");
    for node in &placement.nodes {
        text += &format!(", a new copy on {node}");
    }
    for copy in leaving.iter().filter_map(|id| record.copy(*id)) {
        text += &format!(", the copy on {} leaves", copy.node);
    }
    for remark in &placement.remarks {
        text += &format!(" ({remark})");
    }
    Ok(text)
}

/// Refuses what would stop a volume that can serve, or a mode that it does not satisfy.
pub(super) fn may_serve(found: &Found, next: &Record, around: &Around) -> Result<(), Fault> {
    let (name, now) = (&found.name, &found.record.0);
    let in_sync = around.in_sync(found);
    let mode = next.failure_mode;
    let stays_stopped = mode == now.failure_mode && !mode.serves(now.replicas_wanted, in_sync);
    if mode.serves(next.replicas_wanted, in_sync) || stays_stopped {
        return Ok(());
    }
    let fault = Fault::state(format!(
        "volume {name} has {} of {} replicas in sync, with which failure mode {} would suspend it",
        in_sync.saturating_sub(1),
        next.replicas_wanted,
        mode
    ));
    if next.replicas_wanted <= now.replicas_wanted {
        return Err(fault.hint(
            "wait until its replicas are in sync, or choose a mode that tolerates their loss",
        ));
    }
    // A new copy counts only when it is in sync: what would serve meanwhile?
    let mut fewer = now.replicas_wanted + 1..next.replicas_wanted;
    Err(match fewer.rfind(|r| mode.serves(*r, in_sync)) {
        Some(step) => fault.hint(format!(
            "in two steps: --replicas {step} now, --replicas {} when that is in sync",
            next.replicas_wanted
        )),
        None => fault.hint(format!(
            "choose a mode that serves until the new copies are in sync, in the same command: --failure-mode {}",
            if FailureMode::Soft(None).serves(next.replicas_wanted, in_sync) {
                "soft"
            } else {
                "alwayson"
            }
        )),
    })
}

/// A request to move a copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// From this node.
    pub from: NodeName,
    /// To this one.
    pub to: NodeName,
}

/// Has a copy of the volume made on another node and, once that is in sync, removes the one it takes the place of.
/// Asking again for what is under way is `Ok`.
pub fn move_copy(plane: &Plane, name: &VolumeName, request: &MoveRequest) -> Result<(), Fault> {
    let MoveRequest { from, to } = request;
    if from == to {
        return Err(Fault::input(format!(
            "the copy of {name} cannot move from {from} to {to}: they are the same node"
        )));
    }
    let around = Around::look(plane)?;
    let moved = plane
        .store
        .retry(|| {
            let found = plane.find(name)?;
            let (mut record, at) = found.record.clone();
            still_whole(name, &record)?;
            let old = record.copy_on(from).cloned();
            let new = record.copy_on(to);
            let Some(old) = old else {
                return Err(Race::Fault(no_copy(name, from, &record)));
            };
            if old.leaving && new.is_some_and(|c| !c.leaving) {
                return Ok(None); // under way, or our own unknown outcome
            }
            may_go_to(&around, &found, to, new)?;
            add_all(name, &mut record, std::slice::from_ref(to))?;
            membership::leave(&mut record, &[old.copy_id]);
            plane.store.cas_record(found.id, at, &record)?;
            Ok(Some(record.epoch))
        })
        .map_err(|race: Race| Fault::from(race))?;
    if let Some(epoch) = moved {
        plane.events.push(
            What::volume(name, "", "moving", "move")
                .epoch(epoch)
                .text(format!("a copy from {from} to {to}")),
        );
    }
    Ok(())
}

fn still_whole(name: &VolumeName, record: &Record) -> Result<(), Fault> {
    if record.state == State::Creating {
        return Err(Fault::try_again(format!(
            "volume {name} is still being created"
        )));
    }
    Ok(())
}

fn no_copy(name: &VolumeName, node: &NodeName, record: &Record) -> Fault {
    let nodes: Vec<&str> = record.present().map(|c| c.node.0.as_str()).collect();
    Fault::state(format!("volume {name} has no copy on {node}"))
        .hint(format!("its copies are on {}", nodes.join(", ")))
}

/// Why the node takes no copy of the volume, if it does not.
fn may_go_to(
    around: &Around,
    found: &Found,
    to: &NodeName,
    present: Option<&CopyEntry>,
) -> Result<(), Fault> {
    let name = &found.name;
    let refuse = |why: &str| {
        Fault::state(format!("no copy of volume {name} can move to {to}: {why}"))
            .hint("see: lockstep node ls")
    };
    match present {
        Some(copy) if copy.leaving => {
            return Err(refuse(
                "it has one that is leaving; wait until that is gone",
            ));
        }
        Some(_) => return Err(refuse("it has a copy of the volume")),
        None => {}
    }
    let nodes = Room::of(&around.snapshot, &around.live).for_volume(found);
    let Some(node) = nodes.iter().find(|c| c.name == *to) else {
        return Err(
            Fault::not_found(format!("there is no node {to}")).hint("see: lockstep node ls")
        );
    };
    fitness(node).map(drop).map_err(|why| refuse(&why))
}

/// A request for another master.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromoteRequest {
    /// The node of the copy that should be it.
    pub node: NodeName,
    /// Return as soon as the wish is written.
    #[serde(default)]
    pub no_wait: bool,
}

/// Has reads of the volume served from another of its copies.
pub fn promote(plane: &Plane, name: &VolumeName, request: &PromoteRequest) -> Result<(), Fault> {
    let node = &request.node;
    let around = Around::look(plane)?;
    let (copy, found) = plane
        .store
        .retry(|| {
            let found = plane.find(name)?;
            let (mut record, at) = found.record.clone();
            still_whole(name, &record)?;
            let copy = may_be_master(&around, &found, node)?;
            let wish = (record.master != copy).then_some(copy);
            if record.preferred != wish {
                record.preferred = wish;
                plane.store.cas_record(found.id, at, &record)?;
                plane.events.push(
                    What::volume(name, "", "promoting", "promote")
                        .epoch(record.epoch)
                        .text(format!("the copy on {node} should be the master")),
                );
            }
            Ok((copy, found))
        })
        .map_err(|race: Race| Fault::from(race))?;
    if request.no_wait {
        return Ok(());
    }
    await_master(plane, &found, copy, node)
}

/// The copy on `node`, if it may be the master.
fn may_be_master(around: &Around, found: &Found, node: &NodeName) -> Result<CopyId, Fault> {
    let (name, record) = (&found.name, &found.record.0);
    if let Some((there, _)) = around.snapshot.nodes.get(node)
        && (there.cordoned || there.draining.is_some())
    {
        let (word, remedy) = match there.draining {
            Some(_) => ("drained", "undrain"),
            None => ("cordoned", "uncordon"),
        };
        return Err(Fault::state(format!(
            "the copy of volume {name} on {node} cannot be the master: node {node} is {word}"
        ))
        .hint(format!("first: lockstep node {remedy} {node}")));
    }
    let seen = around.serving(found);
    let fit = |c: &CopyEntry| {
        let lag = seen.and_then(|s| s.copies.iter().find(|v| v.copy == c.copy_id));
        c.status == CopyStatus::InSync && !c.leaving && lag.is_none_or(|v| v.lag.is_empty())
    };
    let why = match record.copy_on(node) {
        Some(copy) if fit(copy) => return Ok(copy.copy_id),
        Some(copy) if copy.leaving => "is leaving",
        Some(copy) if copy.status == CopyStatus::InSync => "cannot be reached",
        Some(_) => "is not in sync",
        None => "does not exist",
    };
    let good: Vec<&str> = record
        .present()
        .filter(|c| fit(c))
        .map(|c| c.node.0.as_str())
        .collect();
    let good = match good.is_empty() {
        true => "no copy of it is in sync".into(),
        false => format!("its copies in sync are on {}", good.join(", ")),
    };
    Err(Fault::state(format!(
        "the copy of volume {name} on {node} cannot be the master: it {why}"
    ))
    .hint(good))
}

fn await_master(plane: &Plane, found: &Found, copy: CopyId, node: &NodeName) -> Result<(), Fault> {
    let name = &found.name;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        plane.still_running()?;
        let Some((record, _)) = plane.store.get_record(found.id)? else {
            return Err(Fault::not_found(format!(
                "volume {name} was removed meanwhile"
            )));
        };
        if record.master == copy {
            return Ok(());
        }
        let fit = |c: &CopyEntry| c.status == CopyStatus::InSync && !c.leaving;
        if !record.copy(copy).is_some_and(fit) {
            return Err(Fault::state(format!(
                "the copy of volume {name} on {node} is no longer in sync, so it is not the master"
            ))
            .hint(format!("see: lockstep volume inspect {name}")));
        }
        if record.preferred != Some(copy) {
            return Err(Fault::state(format!(
                "another master was wished for volume {name} meanwhile"
            )));
        }
        thread::sleep(LOOK);
    }
    Err(Fault::try_again(format!(
        "the copy of volume {name} on {node} is not the master after {}s",
        PATIENCE.as_secs()
    ))
    .hint(format!(
        "it becomes the master once the volume is served; see: lockstep volume inspect {name}"
    )))
}
