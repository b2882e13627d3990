//! What people are shown of volumes, nodes and the cluster: records and live status put together. The JSON of these
//! is stable: fields are added, not renamed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::create::topology_key;
use super::drain::DrainView;
use super::events::Event;
use super::fault::Fault;
use super::health::{Facts, Health, assess};
use super::host::{AttachmentStatus, Capacity, LocalCopy, Phase, SyncProgress};
use super::live::Live;
use super::membership::staying;
use super::model::{Labels, NodeRecord, RuleLabels, VolumeSpec};
use super::nodes::{closed, shared};
use super::plane::whole_volumes;
use super::reach::Way;
use super::scrub::{self, ScrubView};
use super::sight::{self, Sight};
use super::snapshot::Snapshot;
use super::units::show_time;
use crate::replication::failure_mode::FailureMode;
use crate::replication::ids::{
    BootId, ClusterId, CopyId, Epoch, Instance, NodeName, Tag, VolumeId,
};
use crate::replication::record::{Base, CopyEntry, CopyStatus, Record, State};

/// One volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeView {
    /// Its id.
    pub id: VolumeId,
    /// Its namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The size it is growing to; `None`: it has the size that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growing_to: Option<u64>,
    /// Why it does not grow to that; `None`: it does, or has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growth_refused: Option<String>,
    /// Logical block size, bytes.
    pub block_size: u32,
    /// All its labels.
    pub labels: Labels,
    /// Those that rules gave it, with the rules' names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rules: RuleLabels,
    /// When it was created, UTC.
    pub created: String,
    /// The same in milliseconds since 1970.
    pub created_ms: u64,
    /// R.
    pub replicas: u8,
    /// Replicas that are in sync (the master not counted).
    pub replicas_in_sync: usize,
    /// `hard`, `soft`, `soft(T)`, `alwayson`.
    pub failure_mode: String,
    /// The tolerance in force; `None` unless the mode is soft.
    pub failure_tolerance: Option<u8>,
    /// How long requests wait while it is suspended, in milliseconds.
    pub suspend_deadline_ms: u64,
    /// Whether the wire is compressed.
    pub compress: bool,
    /// The record's state.
    pub state: State,
    /// The epoch in force.
    pub epoch: Epoch,
    /// Its companion.
    pub epoch_tag: Tag,
    /// In one word.
    pub health: Health,
    /// Why it is not healthy; empty when it is.
    pub why: String,
    /// The node of the master copy and whether it answers.
    pub master: MasterView,
    /// The node whose copy should become the master, while it is not yet.
    #[serde(default)]
    pub preferred: Option<NodeName>,
    /// Where it is served.
    pub attachment: Option<AttachmentView>,
    /// The last comparison of its copies that a node remembers, or the one under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubView>,
    /// All copies.
    pub copies: Vec<CopyView>,
    /// What could not be had although it was wished for, one sentence each.
    #[serde(default)]
    pub remarks: Vec<String>,
    /// The last events; only in an inspection.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<Event>,
}

/// The master copy's node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MasterView {
    /// Its name.
    pub node: NodeName,
    /// Whether it answers.
    pub online: bool,
}

/// Where a volume is, or should be, served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttachmentView {
    /// The node.
    pub node: NodeName,
    /// Its socket there.
    pub socket: PathBuf,
    /// Virtqueues.
    pub num_queues: u16,
    /// Read-only.
    pub read_only: bool,
    /// Whether it is being released.
    pub releasing: bool,
    /// Where its machine may move to while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<SuccessorView>,
    /// How far it is; `None`: the node does not serve it (yet) or does not answer.
    pub phase: Option<Phase>,
    /// Whether a virtual machine is connected; `None`: not known.
    pub connected: Option<bool>,
    /// Guest requests taken and not completed.
    pub inflight: Option<u32>,
}

/// The node that a running machine may move to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SuccessorView {
    /// The node.
    pub node: NodeName,
    /// Its socket there.
    pub socket: PathBuf,
    /// How far it is; `None`: the node does not listen (yet) or does not answer.
    pub phase: Option<Phase>,
}

/// One copy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyView {
    /// Its identity.
    pub id: CopyId,
    /// Where.
    pub node: NodeName,
    /// Whether that node answers.
    pub online: bool,
    /// `master` or `replica`.
    pub role: String,
    /// `in_sync`, `syncing`, `missing`, `creating`.
    pub state: String,
    /// What it waits for; empty when nothing.
    pub lag: String,
    /// It is to be removed as soon as enough others are in sync.
    #[serde(default)]
    pub leaving: bool,
    /// The epochs in which it held every completed write.
    pub base: Base,
    /// Bytes on the disk; `None`: the node does not answer or has no such copy.
    pub allocated: Option<u64>,
    /// What its disk says; `None` likewise.
    pub standing: Option<String>,
    /// Progress while it is brought up to date.
    pub sync: Option<SyncProgress>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its name.
    pub name: NodeName,
    /// `online`; `unreachable`: it does not answer here, and something says that it runs; `offline`.
    pub health: String,
    /// Why it is not online; empty when it is.
    pub why: String,
    /// Which ways between it and other nodes are cut although both answer, one sentence each.
    #[serde(default)]
    pub cuts: Vec<String>,
    /// Its ways to other nodes, as it says; only in an inspection of a node that answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ways: Vec<Way>,
    /// Where its replication is reached.
    pub address: String,
    /// Where its HTTP is reached.
    pub http: String,
    /// The run of its process.
    pub instance: Instance,
    /// The boot of its kernel.
    pub boot_id: BootId,
    /// When its process started, UTC.
    pub started: String,
    /// The version it runs.
    pub version: String,
    /// Its labels.
    pub labels: Labels,
    /// Whether new copies may be placed on it.
    pub schedulable: bool,
    /// Why not: `cordoned`, `drained`, `compute-only`.
    #[serde(default)]
    pub closed: Vec<String>,
    /// How far it is emptied, if it is to be; only in an inspection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainView>,
    /// Master copies on it.
    pub masters: usize,
    /// Replica copies on it.
    pub replicas: usize,
    /// `namespace/name` of the volumes it should serve.
    pub serves: Vec<String>,
    /// Its disk, as it says or as last known.
    pub capacity: Capacity,
    /// Copies on its disk; only in an inspection of a node that answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub copies: Vec<NodeCopy>,
}

/// A copy on a node's disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeCopy {
    /// `namespace/name`; `None`: the registry does not know the volume.
    pub name: Option<String>,
    /// What the disk says.
    #[serde(flatten)]
    pub copy: LocalCopy,
}

/// The cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterView {
    /// Its identity.
    pub id: ClusterId,
    /// When it was made, UTC.
    pub created: String,
    /// Its registry.
    pub registry: String,
    /// How long a missing copy is waited for before another node gets one, in milliseconds; 0: for ever.
    pub replace_after_ms: u64,
    /// Since when maintenance is on, UTC; `None`: it is off.
    #[serde(default)]
    pub maintenance: Option<String>,
    /// Nodes that answer.
    pub nodes_online: usize,
    /// All nodes.
    pub nodes: Vec<NodeSummary>,
    /// Volumes in all.
    pub volumes: usize,
    /// How many volumes have each health.
    pub health: BTreeMap<Health, usize>,
    /// What needs attention, one sentence each.
    pub problems: Vec<String>,
}

/// One line about a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeSummary {
    /// Its name.
    pub name: NodeName,
    /// `online`, `unreachable` or `offline`.
    pub health: String,
    /// Its version.
    pub version: String,
}

/// All volumes, in the order of their names.
pub fn volumes(snapshot: &Snapshot, live: &Live) -> Vec<VolumeView> {
    let mut views: Vec<VolumeView> = whole_volumes(snapshot)
        .map(|(_, (spec, _), (record, _))| VolumeView {
            remarks: remarks(spec, record, snapshot),
            ..volume(spec, record, live)
        })
        .collect();
    views.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    views
}

/// One volume.
pub fn volume(spec: &VolumeSpec, record: &Record, live: &Live) -> VolumeView {
    let id = record.volume_id;
    let desired = spec.attachment.as_ref();
    let serving = desired.map(|d| match live.node(&d.node) {
        Some(status) => Ok(status.attachment(id)),
        None => Err(live.why_not(&d.node)),
    });
    let failure: Option<&Fault> = desired.and_then(|d| {
        let reports = &live.node(&d.node)?.reports;
        reports.iter().find(|r| r.volume == id).map(|r| &r.fault)
    });
    let unreachable: Vec<NodeName> = record
        .present()
        .filter(|c| live.node(&c.node).is_none())
        .map(|c| c.node.clone())
        .collect();
    let lost: Vec<NodeName> = record
        .in_sync()
        .filter(|c| is_lost(c, live))
        .map(|c| c.node.clone())
        .collect();
    // What the node of a copy knows of it is more than what its attachment was told.
    let tending = live.tended(id).filter(|_| desired.is_none());
    let served = serving.clone().and_then(Result::ok).flatten();
    let status = served.or(tending).map(|s| {
        let mut status = s.clone();
        for copy in &mut status.copies {
            if let Some(trouble) = trouble(live, id, &copy.node, copy.copy) {
                copy.lag = trouble.into();
            }
        }
        status
    });
    let status = status.as_ref();
    let troubled: Vec<(NodeName, String)> = record
        .present()
        .filter_map(|c| {
            Some((
                c.node.clone(),
                trouble(live, id, &c.node, c.copy_id)?.into(),
            ))
        })
        .collect();
    let (health, why) = assess(&Facts {
        record,
        desired,
        serving: serving.map(|s| s.map(|_| status)),
        tending: status.filter(|_| tending.is_some()),
        failure,
        unreachable: &unreachable,
        lost: &lost,
        troubled: &troubled,
    });
    let copies: Vec<CopyView> = record
        .present()
        .map(|c| copy_view(record, c, status, live))
        .collect();
    let in_sync = copies.iter().filter(|c| c.state == "in_sync").count();
    let master = copies
        .iter()
        .find(|c| c.role == "master")
        .or_else(|| copies.first());
    VolumeView {
        id,
        namespace: spec.namespace.clone(),
        name: spec.name.clone(),
        size: record.size,
        growing_to: record.grow.as_ref().map(|g| g.to),
        growth_refused: record.grow.as_ref().and_then(|g| g.refused.clone()),
        block_size: record.block_size,
        labels: spec.all_labels(),
        rules: spec.from_rules.clone(),
        created: show_time(spec.created),
        created_ms: spec.created,
        replicas: record.replicas_wanted,
        replicas_in_sync: in_sync.saturating_sub(1),
        failure_mode: record.failure_mode.to_string(),
        failure_tolerance: match record.failure_mode {
            FailureMode::Soft(tolerance) => {
                Some(tolerance.unwrap_or(match record.replicas_wanted {
                    1 => 1,
                    r => r.saturating_sub(1),
                }))
            }
            FailureMode::Hard | FailureMode::AlwaysOn => None,
        },
        suspend_deadline_ms: record.suspend_deadline_ms,
        compress: record.compress,
        state: record.state,
        epoch: record.epoch,
        epoch_tag: record.epoch_tag,
        health,
        why,
        master: MasterView {
            node: master.map_or_else(|| NodeName("-".into()), |c| c.node.clone()),
            online: master.is_some_and(|c| c.online),
        },
        preferred: record
            .preferred
            .and_then(|id| record.copy(id))
            .map(|c| c.node.clone()),
        attachment: desired.map(|d| AttachmentView {
            node: d.node.clone(),
            socket: d.socket.clone(),
            num_queues: d.num_queues,
            read_only: d.read_only,
            releasing: d.release.is_some(),
            successor: d.successor.as_ref().map(|s| SuccessorView {
                node: s.node.clone(),
                socket: s.socket.clone(),
                phase: live
                    .node(&s.node)
                    .and_then(|n| Some(n.attachment(id)?.phase)),
            }),
            phase: status.map(|s| s.phase),
            connected: status.map(|s| s.connected),
            inflight: status.map(|s| s.inflight),
        }),
        scrub: scrub::newest(spec, id, record.size, live),
        copies,
        remarks: Vec::new(),
        events: Vec::new(),
    }
}

fn copy_view(
    record: &Record,
    copy: &CopyEntry,
    status: Option<&AttachmentStatus>,
    live: &Live,
) -> CopyView {
    let seen = status.and_then(|s| s.copies.iter().find(|c| c.copy == copy.copy_id));
    let node = live.node(&copy.node);
    let local = node.and_then(|n| n.copies.iter().find(|c| c.copy == copy.copy_id));
    let by_record = match copy.status {
        _ if record.state == State::Creating => "creating",
        CopyStatus::InSync => "in_sync",
        CopyStatus::Syncing => "syncing",
        CopyStatus::Missing => "missing",
        CopyStatus::Removed => "removed",
    };
    let role = if copy.copy_id == record.master {
        "master"
    } else {
        "replica"
    };
    let sync = seen.and_then(|c| c.sync.clone());
    let mut lag = seen.map_or_else(String::new, |c| c.lag.clone());
    if let Some(trouble) = trouble(live, record.volume_id, &copy.node, copy.copy_id) {
        lag = trouble.into();
    }
    if lag.is_empty() && node.is_some() && local.is_none() && record.state != State::Creating {
        lag = "not on its node's disk".into();
    }
    CopyView {
        id: copy.copy_id,
        node: copy.node.clone(),
        online: node.is_some(),
        role: seen.map_or_else(|| role.into(), |c| c.role.clone()),
        state: match seen {
            // The record says so only when it ended.
            Some(_) if sync.is_some() => "syncing".into(),
            Some(seen) => seen.state.clone(),
            None => by_record.into(),
        },
        lag,
        leaving: copy.leaving,
        base: copy.base,
        allocated: local.map(|c| c.allocated),
        standing: local.map(|c| c.standing.clone()),
        sync,
    }
}

/// Why the node of a copy cannot use its files. Of files that cannot be read at all nobody knows whose they are.
fn trouble<'a>(live: &'a Live, volume: VolumeId, node: &NodeName, copy: CopyId) -> Option<&'a str> {
    let local = live
        .node(node)?
        .copies
        .iter()
        .find(|c| c.volume == volume)?;
    let it = local.copy == copy || local.copy == CopyId([0; 16]);
    local.trouble.as_deref().filter(|_| it)
}

/// Whether the copy's node answers and does not have it.
fn is_lost(copy: &CopyEntry, live: &Live) -> bool {
    live.node(&copy.node)
        .is_some_and(|n| !n.copies.iter().any(|c| c.copy == copy.copy_id))
}

/// All nodes, in the order of their names.
pub fn nodes(snapshot: &Snapshot, live: &Live, sight: &Sight) -> Vec<NodeView> {
    snapshot
        .nodes
        .values()
        .map(|(record, _)| node(record, snapshot, live, sight))
        .collect()
}

/// One node.
pub fn node(record: &NodeRecord, snapshot: &Snapshot, live: &Live, sight: &Sight) -> NodeView {
    let status = live.node(&record.name);
    let (mut masters, mut replicas) = (0, 0);
    for (_, _, (volume, _)) in whole_volumes(snapshot) {
        match volume.copy_on(&record.name) {
            Some(copy) if copy.copy_id == volume.master => masters += 1,
            Some(_) => replicas += 1,
            None => {}
        }
    }
    let closed = closed(record);
    // One that joined between the listing and the questions was not asked.
    let unasked = || (sight::Health::Offline, live.why_not(&record.name));
    let (health, why) = sight
        .nodes
        .get(&record.name)
        .cloned()
        .unwrap_or_else(unasked);
    NodeView {
        name: record.name.clone(),
        health: health.word().into(),
        why,
        cuts: sight.cuts_of(&record.name),
        ways: Vec::new(),
        address: record.address.clone(),
        http: record.http.clone(),
        instance: record.instance,
        boot_id: record.boot_id,
        started: show_time(record.started),
        version: record.version.clone(),
        labels: record.labels.clone(),
        schedulable: closed.is_empty(),
        closed: closed.into_iter().map(String::from).collect(),
        drain: None,
        masters,
        replicas,
        serves: served_on(snapshot, &record.name),
        capacity: status.map_or(record.capacity, |s| s.capacity),
        copies: Vec::new(),
    }
}

/// The names of the volumes that the node should serve.
pub(super) fn served_on(snapshot: &Snapshot, node: &NodeName) -> Vec<String> {
    let mut names: Vec<String> = whole_volumes(snapshot)
        .map(|(_, (spec, _), _)| spec)
        .filter(|spec| spec.attachment.as_ref().is_some_and(|a| a.node == *node))
        .map(|spec| spec.full_name().to_string())
        .collect();
    names.sort();
    names
}

/// What is not as it was wished for without harm: copies that share a value of the topology label.
pub fn remarks(spec: &VolumeSpec, record: &Record, snapshot: &Snapshot) -> Vec<String> {
    let nodes: Vec<&NodeName> = staying(record).map(|c| &c.node).collect();
    shared(
        topology_key(&spec.all_labels()).as_deref(),
        &nodes,
        snapshot,
    )
}

/// The copies on a node's disk with the names of their volumes.
pub fn node_copies(copies: &[LocalCopy], snapshot: &Snapshot) -> Vec<NodeCopy> {
    copies
        .iter()
        .map(|copy| NodeCopy {
            name: snapshot
                .volumes
                .get(&copy.volume)
                .and_then(|v| v.spec.as_ref())
                .map(|(spec, _)| spec.full_name().to_string()),
            copy: copy.clone(),
        })
        .collect()
}

/// The cluster at a glance.
pub fn cluster(
    snapshot: &Snapshot,
    live: &Live,
    sight: &Sight,
    id: ClusterId,
    registry: String,
) -> ClusterView {
    let nodes = nodes(snapshot, live, sight);
    let volumes = volumes(snapshot, live);
    let mut health: BTreeMap<Health, usize> = BTreeMap::new();
    let mut problems: Vec<String> = nodes
        .iter()
        .filter(|n| n.health != "online")
        .map(|n| format!("node {} is {}: {}", n.name, n.health, n.why))
        .collect();
    problems.extend(sight.cuts.iter().map(|cut| cut.text.clone()));
    for volume in &volumes {
        *health.entry(volume.health).or_default() += 1;
        if volume.health != Health::Healthy {
            problems.push(format!(
                "volume {}/{} is {}: {}",
                volume.namespace,
                volume.name,
                volume.health.word(),
                volume.why
            ));
        }
    }
    let maintenance = snapshot.cluster.and_then(|c| c.maintenance);
    if let Some(since) = maintenance {
        problems.push(format!(
            "maintenance is on since {}: lost copies are not replaced; when it is over: lockstep cluster maintenance off",
            show_time(since)
        ));
    }
    problems.extend(
        snapshot
            .unreadable
            .iter()
            .map(|(key, why)| format!("registry key {key} cannot be read: {why}")),
    );
    ClusterView {
        id,
        created: snapshot
            .cluster
            .map_or_else(String::new, |c| show_time(c.created)),
        registry,
        replace_after_ms: snapshot.cluster.map_or(0, |c| c.replace_after_ms),
        maintenance: maintenance.map(show_time),
        nodes_online: nodes.iter().filter(|n| n.health == "online").count(),
        nodes: nodes
            .iter()
            .map(|n| NodeSummary {
                name: n.name.clone(),
                health: n.health.clone(),
                version: n.version.clone(),
            })
            .collect(),
        volumes: volumes.len(),
        health,
        problems,
    }
}
