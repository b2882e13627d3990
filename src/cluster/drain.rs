//! A node is emptied: every copy on it moves to another node, brought up to date there before it goes here, under
//! whatever the volumes are doing.
//!
//! A drain is a wish in the node's record, so it outlives every process: whoever looks after a volume
//! (`control_drain`) moves its copy away, a few at a time, and goes on until the node has none or the wish is taken
//! back. What is already on its way then arrives; nothing else moves.

use serde::{Deserialize, Serialize};

use super::fault::Fault;
use super::host::SyncProgress;
use super::live::Live;
use super::membership::staying;
use super::model::{Draining, NodeRecord};
use super::nodes::{NodeDone, change};
use super::plane::{Found, Plane, whole_volumes};
use super::replicas::{Room, place_more};
use super::snapshot::Snapshot;
use super::units::{show_time, wall_ms};
use super::view;
use crate::replication::ids::NodeName;

/// How far a drain is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrainView {
    /// Since when it is wished for, UTC.
    pub since: String,
    /// No copy is left.
    pub done: bool,
    /// The copies that are left, by the names of their volumes.
    pub copies: Vec<DrainCopy>,
    /// `namespace/name` of the volumes that the node serves: their machines have to go by other means.
    pub attached: Vec<String>,
}

/// One copy that is left.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrainCopy {
    /// `namespace/name`.
    pub volume: String,
    /// `moving`, `waiting` (for its turn) or `blocked`.
    pub state: DrainState,
    /// Where it goes, once that is known.
    pub to: Option<NodeName>,
    /// What it waits for, one sentence; empty when nothing.
    pub why: String,
    /// How far it is.
    pub sync: Option<SyncProgress>,
}

/// Where a copy stands that is to leave a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DrainState {
    /// On its way.
    Moving,
    /// Others go first.
    Waiting,
    /// It cannot go as things are.
    Blocked,
}

/// Has the node emptied, or takes the wish back.
pub fn drain(plane: &Plane, name: &NodeName, wanted: bool) -> Result<NodeDone, Fault> {
    let record = change(plane, name, "drain", |node| {
        if node.draining.is_some() == wanted {
            return None;
        }
        node.draining = wanted.then(|| Draining { since: wall_ms() });
        Some(if wanted { "draining" } else { "undrained" }.into())
    })?;
    let still = (!wanted && record.cordoned).then(|| {
        format!("node {name} is cordoned and gets no copies; see: lockstep node uncordon {name}")
    });
    Ok(NodeDone {
        node: record.name,
        remark: still,
    })
}

/// How far the node's drain is; `None` when it is not drained. `live` knows all nodes.
pub fn progress(node: &NodeRecord, snapshot: &Snapshot, live: &Live) -> Option<DrainView> {
    let draining = node.draining?;
    let room = Room::of(snapshot, live);
    let mut copies: Vec<DrainCopy> = whole_volumes(snapshot)
        .filter(|(_, _, (record, _))| record.copy_on(&node.name).is_some())
        .map(|(id, spec, record)| {
            let found = Found {
                id,
                name: spec.0.full_name(),
                spec: spec.clone(),
                record: record.clone(),
            };
            copy(&node.name, &found, &room, live)
        })
        .collect();
    copies.sort_by(|a, b| a.volume.cmp(&b.volume));
    Some(DrainView {
        since: show_time(draining.since),
        done: copies.is_empty(),
        copies,
        attached: view::served_on(snapshot, &node.name),
    })
}

fn copy(node: &NodeName, found: &Found, room: &Room<'_>, live: &Live) -> DrainCopy {
    let record = &found.record.0;
    let volume = view::volume(&found.spec.0, record, live);
    let leaving = record.copy_on(node).is_some_and(|c| c.leaving);
    let mut copy = DrainCopy {
        volume: found.name.to_string(),
        state: DrainState::Moving,
        to: None,
        why: String::new(),
        sync: None,
    };
    if leaving {
        // The newest place is the one that was made for it.
        let stay = |c: &&view::CopyView| !c.leaving && c.state != "in_sync";
        if let Some(next) = volume.copies.iter().rfind(stay) {
            copy.to = Some(next.node.clone());
            copy.sync.clone_from(&next.sync);
            copy.why.clone_from(&next.lag);
        } else {
            copy.why = "the copy here is about to be dropped".into();
        }
        if copy.sync.is_none() && !volume.why.is_empty() {
            copy.why = volume.why;
        }
        return copy;
    }
    let reachable = record.in_sync().any(|c| live.node(&c.node).is_some());
    if !reachable {
        copy.state = DrainState::Blocked;
        copy.why = volume.why;
        return copy;
    }
    match place_more(found, room, 1, &Default::default()) {
        Ok(_) => {
            copy.state = DrainState::Waiting;
            copy.why = "others go first".into();
        }
        Err(why) => {
            copy.state = DrainState::Blocked;
            copy.why = why.to_string();
        }
    }
    copy
}

/// The staying copies of the volume that are on nodes to be emptied.
pub(super) fn to_move<'a>(
    found: &'a Found,
    snapshot: &'a Snapshot,
) -> impl Iterator<Item = &'a NodeName> {
    staying(&found.record.0)
        .map(|c| &c.node)
        .filter(|node| snapshot.is_draining(node))
}
