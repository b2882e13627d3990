//! What nodes are doing now: asked of each over its HTTP port, with little patience.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Method;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::host::{AttachmentStatus, Capacity, Held, LocalCopy, Phase};
use super::model::NodeRecord;
use super::plane::{EndedScrub, Plane, Report};
use super::reach::Way;
use super::sight::{self, Facts, Sight};
use super::units::wall_ms;
use crate::api::client::{Target, ask, runtime};
use crate::registry::Present;
use crate::replication::ids::{BootId, ClusterId, Instance, NodeName, VolumeId};

/// How long a node has to answer. On a LAN it takes milliseconds; `volume ls` must not hang for one that is gone.
const PATIENCE: Duration = Duration::from_secs(1);
/// Where a node answers for itself.
pub const STATUS_PATH: &str = "/api/v1/local/status";
/// The same without its copies and attachments: short, however many there are.
const BRIEF_PATH: &str = "/api/v1/local/status?brief=true";
/// The same with what it says of one volume's attachment.
fn volume_path(volume: VolumeId) -> String {
    format!("{STATUS_PATH}?volume={volume}")
}

/// Who answers on an address: the answer of `/healthz`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its name.
    pub node: NodeName,
    /// The run of its process.
    pub instance: Instance,
}

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LocalStatus {
    /// Who it is.
    #[serde(flatten)]
    pub identity: Identity,
    /// The boot of its kernel.
    pub boot_id: BootId,
    /// Its version.
    pub version: String,
    /// When its process started, milliseconds since 1970.
    pub started: u64,
    /// The time by its clock, milliseconds since 1970.
    #[serde(default)]
    pub now: u64,
    /// Where it makes sockets.
    pub run_dir: PathBuf,
    /// Its disk.
    pub capacity: Capacity,
    /// How many copies are on it.
    #[serde(default)]
    pub copies_held: usize,
    /// The copies on it.
    pub copies: Vec<LocalCopy>,
    /// What it serves.
    pub attachments: Vec<AttachmentStatus>,
    /// What it does not serve, and is connected to the machine of, until the registry says whether it is to be served.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub held: Vec<Held>,
    /// What it could not do.
    pub reports: Vec<Report>,
    /// The last scrub that ended on it, of each volume.
    #[serde(default)]
    pub scrubs: Vec<EndedScrub>,
    /// Its ways to other nodes, as far as it knows them.
    #[serde(default)]
    pub ways: Vec<Way>,
}

impl LocalStatus {
    /// This node's.
    pub fn of(plane: &Plane) -> Self {
        let copies = plane.host.local_copies();
        let copies_held = copies.len();
        Self {
            copies,
            attachments: plane.host.attachments(),
            held: plane.host.held(),
            reports: plane.reports(),
            ..Self::holding(plane, copies_held)
        }
    }

    /// The same without its copies, and with what concerns this volume only.
    pub fn of_volume(plane: &Plane, volume: VolumeId) -> Self {
        let mut status = Self {
            attachments: plane.host.attachments(),
            reports: plane.reports(),
            ..Self::brief(plane)
        };
        status.attachments.retain(|a| a.volume == volume);
        status.reports.retain(|r| r.volume == volume);
        status
    }

    /// The same without its copies, attachments and reports.
    pub fn brief(plane: &Plane) -> Self {
        Self::holding(plane, plane.host.copies_here().len())
    }

    fn holding(plane: &Plane, copies_held: usize) -> Self {
        Self {
            identity: Identity {
                cluster: plane.cluster,
                node: plane.node.clone(),
                instance: plane.instance,
            },
            boot_id: plane.boot_id,
            version: env!("CARGO_PKG_VERSION").into(),
            started: plane.started,
            now: wall_ms(),
            run_dir: plane.run_dir.clone(),
            capacity: plane.host.capacity(),
            copies_held,
            copies: Vec::new(),
            attachments: Vec::new(),
            held: Vec::new(),
            reports: Vec::new(),
            scrubs: plane.scrubs(),
            ways: plane.reach.ways(),
        }
    }

    /// The attachment by which the node serves `volume` to a machine.
    pub fn attachment(&self, volume: VolumeId) -> Option<&AttachmentStatus> {
        let mut all = self.attachments.iter();
        all.find(|a| a.volume == volume && !a.tends())
    }
}

/// What each asked node said, or why it said nothing.
#[derive(Clone, Debug, Default)]
pub struct Live(pub BTreeMap<NodeName, Result<LocalStatus, String>>);

impl Live {
    /// The node's answer.
    pub fn node(&self, name: &NodeName) -> Option<&LocalStatus> {
        self.0.get(name)?.as_ref().ok()
    }

    /// The attachment that looks after the copies of `volume`, on whichever node.
    pub fn tended(&self, volume: VolumeId) -> Option<&AttachmentStatus> {
        let nodes = self.0.values().filter_map(|status| status.as_ref().ok());
        let mut all = nodes.flat_map(|status| &status.attachments);
        all.find(|a| a.volume == volume && a.tends() && a.phase != Phase::Fenced)
    }

    /// The ways that are cut where data goes: from, to, why.
    pub(super) fn cuts(&self) -> impl Iterator<Item = (&NodeName, &NodeName, &str)> {
        let all = self
            .0
            .iter()
            .filter_map(|(from, status)| Some((from, status.as_ref().ok()?)));
        all.flat_map(|(from, status)| {
            let lost = status.ways.iter().filter(|way| !way.reached);
            lost.map(move |way| (from, &way.node, way.why.as_str()))
        })
    }

    /// Why nobody can write to a copy on the node, if no other one reaches it and at least one says so.
    pub(super) fn cut_off(&self, node: &NodeName) -> Option<String> {
        let mut lost = Vec::new();
        for (from, status) in &self.0 {
            let Ok(status) = status else { continue };
            match status.ways.iter().find(|way| way.node == *node) {
                Some(way) if way.reached => return None,
                Some(way) => lost.push(format!("{from}: {}", way.why)),
                None => {}
            }
        }
        let why = lost.join(", ");
        (!lost.is_empty()).then(|| format!("no node reaches its replication port ({why})"))
    }

    /// Why the node said nothing, one clause.
    pub fn why_not(&self, name: &NodeName) -> String {
        match self.0.get(name) {
            Some(Ok(_)) => String::new(),
            Some(Err(why)) => why.clone(),
            None => "it is not a node of this cluster".into(),
        }
    }
}

/// Asks `nodes` at once, this one without a detour.
pub fn gather<'a>(plane: &Plane, nodes: impl Iterator<Item = &'a NodeRecord>) -> Live {
    gather_as(plane, nodes, STATUS_PATH, LocalStatus::of)
}

/// The same without copies and attachments.
pub fn gather_brief<'a>(plane: &Plane, nodes: impl Iterator<Item = &'a NodeRecord>) -> Live {
    gather_as(plane, nodes, BRIEF_PATH, LocalStatus::brief)
}

/// What one node says of one volume's attachment, and nothing else.
pub fn gather_volume<'a>(
    plane: &Plane,
    node: impl Iterator<Item = &'a NodeRecord>,
    volume: VolumeId,
) -> Live {
    gather_as(plane, node, &volume_path(volume), |plane| {
        LocalStatus::of_volume(plane, volume)
    })
}

fn gather_as<'a>(
    plane: &Plane,
    nodes: impl Iterator<Item = &'a NodeRecord>,
    path: &str,
    own: impl Fn(&Plane) -> LocalStatus,
) -> Live {
    let (mine, others): (Vec<_>, Vec<_>) = nodes.partition(|n| n.name == plane.node);
    let questions = others.iter().map(|n| Question {
        node: n.name.clone(),
        address: plane.http_of(n),
        path: path.into(),
    });
    let mut live: BTreeMap<_, _> = fan_out::<LocalStatus>(questions.collect())
        .into_iter()
        .map(|(name, answer)| {
            let answer = answer.and_then(|status| check(plane, &name, status));
            (name, answer)
        })
        .collect();
    for node in mine {
        live.insert(node.name.clone(), Ok(own(plane)));
    }
    Live(live)
}

/// How the nodes that were asked are, for showing. The registry is asked who is announced if one of them does not answer.
pub fn sight(plane: &Plane, live: &Live) -> Sight {
    let silent = live.0.values().any(Result::is_err);
    let present = silent.then(|| plane.store.present());
    let present = present.and_then(|asked| match asked {
        Ok(present) => Some(present),
        Err(e) => {
            log::debug!("who is announced is not known: {e}");
            None
        }
    });
    sight_with(plane, live, present.as_ref())
}

/// The same with what the registry said.
pub(super) fn sight_with(plane: &Plane, live: &Live, present: Option<&Present>) -> Sight {
    sight::assess(&Facts {
        here: &plane.node,
        nodes: live
            .0
            .iter()
            .map(|(name, status)| match status {
                Ok(status) => (name, Ok(status.ways.as_slice())),
                Err(why) => (name, Err(why.clone())),
            })
            .collect(),
        present,
    })
}

fn check(plane: &Plane, name: &NodeName, status: LocalStatus) -> Result<LocalStatus, String> {
    if status.identity.cluster != plane.cluster || status.identity.node != *name {
        return Err(format!(
            "its address now belongs to node {} of cluster {}",
            status.identity.node, status.identity.cluster
        ));
    }
    Ok(status)
}

/// One question to one node.
#[derive(Clone, Debug)]
pub struct Question {
    /// Whom.
    pub node: NodeName,
    /// Its `HOST:PORT`.
    pub address: String,
    /// What: path and query.
    pub path: String,
}

/// Asks all questions at once and reads the answers; at most as long as one takes.
pub fn fan_out<T: DeserializeOwned>(
    questions: Vec<Question>,
) -> Vec<(NodeName, Result<T, String>)> {
    if questions.is_empty() {
        return Vec::new();
    }
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(e) => {
            let why = format!("nobody could be asked: {e}");
            return questions
                .into_iter()
                .map(|q| (q.node, Err(why.clone())))
                .collect();
        }
    };
    let answers = runtime.block_on(async {
        let mut asked = JoinSet::new();
        for question in questions {
            asked.spawn(async move {
                let Question {
                    node,
                    address,
                    path,
                } = question;
                let target = Target::Tcp(address.clone());
                let answer = ask(&target, Method::GET, &path, None, Some(PATIENCE)).await;
                (node, answer.map_err(|e| format!("{address}: {e}")))
            });
        }
        let mut answers = Vec::new();
        while let Some(done) = asked.join_next().await {
            let Ok((node, answer)) = done else { continue };
            let read = answer.and_then(|a| {
                serde_json::from_slice(&a.body)
                    .map_err(|e| format!("its answer ({}) is not understood: {e}", a.status))
            });
            answers.push((node, read));
        }
        answers
    });
    // A name that does not resolve keeps a thread of its runtime busy, for which a drop would wait.
    runtime.shutdown_background();
    answers
}
