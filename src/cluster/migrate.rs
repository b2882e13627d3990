//! Live migration: a machine moves to another node while it runs, and its volume with it.
//!
//! The spec names a successor beside the attachment that stands. The successor's node listens and waits. Then the engine
//! of each of the two is attached only while the machine's rings run there: where it stops the volume is released, where
//! it starts the volume is taken over, in whichever direction. Once the machine runs at the successor that node makes
//! itself the attachment in the spec, and the former lets go.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::attach::{
    Attached, default_socket_of, failure, not_drained, reachable, refuse_taken_socket,
};
use super::events::What;
use super::fault::Fault;
use super::host::Phase;
use super::live::gather;
use super::model::{Desired, NodeRecord, Successor, VolumeName, VolumeSpec};
use super::plane::{Plane, check_socket};
use super::store::Race;
use crate::registry::Revision;
use crate::replication::ids::{NodeName, VolumeId};

/// How long the successor's node may take to listen: it only has to see the spec.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the outcome is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// A request to let a running machine move to a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// Where it comes to.
    pub node: NodeName,
    /// Listening there; the default path when not said.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

/// Has `request.node` listen for the machine that `name` is served to now.
pub fn prepare(
    plane: &Plane,
    name: &VolumeName,
    request: &MigrateRequest,
) -> Result<Attached, Fault> {
    let record = reachable(plane, &request.node)?;
    let successor = Successor {
        node: request.node.clone(),
        socket: match &request.socket {
            Some(path) => path.clone(),
            None if request.node == plane.node => plane.default_socket(name),
            None => default_socket_of(plane, &record, name)?,
        },
    };
    check_socket(&successor.socket)?;
    let (id, revision, desired) = plane
        .store
        .retry(|| {
            let found = plane.find(name)?;
            let present = may_move(name, found.spec.0.attachment.as_ref(), &successor)?;
            if present.successor.as_ref() == Some(&successor) {
                return Ok((found.id, found.spec.1, present.clone()));
            }
            refuse_taken_socket(plane, found.id, &successor.node, &successor.socket)?;
            not_drained(plane, &successor.node)?;
            let desired = Desired {
                successor: Some(successor.clone()),
                ..present.clone()
            };
            let spec = VolumeSpec {
                attachment: Some(desired.clone()),
                ..found.spec.0.clone()
            };
            let revision = plane.store.cas_spec(found.id, found.spec.1, &spec)?;
            plane.events.push(
                What::volume(name, "attached", "moving", "migrate")
                    .epoch(found.record.0.epoch)
                    .text(format!("from {} to {}", desired.node, successor.node)),
            );
            Ok((found.id, revision, desired))
        })
        .map_err(|race: Race| Fault::from(race))?;
    await_listening(plane, name, id, revision, &record)?;
    Ok(Attached {
        volume: name.to_string(),
        node: successor.node,
        socket: successor.socket,
        num_queues: desired.num_queues,
        read_only: desired.read_only,
        phase: Some(Phase::Waiting),
        why: String::new(),
    })
}

/// The attachment that the machine leaves, if it may.
fn may_move<'a>(
    name: &VolumeName,
    present: Option<&'a Desired>,
    successor: &Successor,
) -> Result<&'a Desired, Fault> {
    let Some(present) = present else {
        return Err(
            Fault::state(format!("volume {name} is not attached")).hint(format!(
                "to serve it there: lockstep volume attach {name} --node {}",
                successor.node
            )),
        );
    };
    if present.release.is_some() {
        return Err(Fault::try_again(format!(
            "volume {name} is being detached from {}",
            present.node
        )));
    }
    if present.node == successor.node {
        return Err(Fault::state(format!(
            "volume {name} is attached on {} already",
            present.node
        )));
    }
    match &present.successor {
        Some(other) if other != successor => Err(Fault::state(format!(
            "volume {name} is prepared to move to {} at {}",
            other.node,
            other.socket.display()
        ))
        .hint(format!(
            "withdraw that first: lockstep volume detach {name} --incoming"
        ))),
        _ => Ok(present),
    }
}

fn await_listening(
    plane: &Plane,
    name: &VolumeName,
    id: VolumeId,
    revision: Revision,
    node: &NodeRecord,
) -> Result<(), Fault> {
    let deadline = Instant::now() + PATIENCE;
    let mut last = String::from("it has not begun");
    while Instant::now() < deadline {
        plane.still_running()?;
        let live = gather(plane, [node].into_iter());
        match live.node(&node.name) {
            None => last = live.why_not(&node.name),
            Some(status) if status.attachment(id).is_some() => return Ok(()),
            Some(status) => {
                if let Some(fault) = failure(status, id, revision) {
                    last = fault.message;
                }
            }
        }
        thread::sleep(LOOK);
    }
    Err(Fault::try_again(format!(
        "{} does not listen for the machine of {name} after {}s: {last}",
        node.name,
        PATIENCE.as_secs()
    ))
    .hint(format!(
        "to give up: lockstep volume detach {name} --incoming"
    )))
}

/// Takes the preparation back: the machine stays where it is.
pub fn withdraw(plane: &Plane, name: &VolumeName) -> Result<(), Fault> {
    plane
        .store
        .retry(|| {
            let found = plane.find(name)?;
            let Some(present) = found.spec.0.attachment.clone() else {
                return Err(Race::Fault(Fault::state(format!(
                    "volume {name} is not attached"
                ))));
            };
            let Some(successor) = &present.successor else {
                return Err(Race::Fault(Fault::state(format!(
                    "volume {name} is on {} and not prepared to move",
                    present.node
                ))));
            };
            let text = format!("it stays on {}, not {}", present.node, successor.node);
            let spec = VolumeSpec {
                attachment: Some(Desired {
                    successor: None,
                    ..present.clone()
                }),
                ..found.spec.0.clone()
            };
            plane.store.cas_spec(found.id, found.spec.1, &spec)?;
            plane.events.push(
                What::volume(name, "moving", "attached", "migrate")
                    .epoch(found.record.0.epoch)
                    .text(text),
            );
            Ok(())
        })
        .map_err(|race: Race| Fault::from(race))
}
