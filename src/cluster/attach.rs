//! A volume is served, or stops being: the wish goes into the spec, the node named there acts on it, and whoever asked
//! waits until spec and live status say that it happened.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::events::What;
use super::fault::{Code, Fault};
use super::health::with_waits;
use super::host::{AttachmentStatus, Phase};
use super::live::{LocalStatus, gather_brief, gather_volume};
use super::model::{Desired, NodeRecord, Release, VolumeName, VolumeSpec};
use super::plane::{Plane, check_socket};
use super::settings::{NUM_QUEUES, check_num_queues};
use super::store::Race;
use crate::registry::{CasError, Revision};
use crate::replication::ids::{NodeName, VolumeId};
use crate::replication::record::State;

/// How long an attach or detach is waited for. Taking over from a dead node takes its grace of 3 s; a flush of every
/// copy before a release may take long on a busy disk.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often the outcome is looked for.
const LOOK: Duration = Duration::from_millis(100);

/// A request to serve a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttachOptions {
    /// Where; the node that is asked when not said.
    pub node: Option<NodeName>,
    /// Listening there; the default path when not said.
    pub socket: Option<PathBuf>,
    /// Virtqueues.
    pub num_queues: Option<u16>,
    /// Read-only.
    pub read_only: bool,
    /// Return as soon as the wish is written.
    pub no_wait: bool,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// `namespace/name`.
    pub volume: String,
    /// The node that serves it.
    pub node: NodeName,
    /// Where.
    pub socket: PathBuf,
    /// Virtqueues.
    pub num_queues: u16,
    /// Read-only.
    pub read_only: bool,
    /// How far it is; `None` when it was not waited for.
    pub phase: Option<Phase>,
    /// Why it is not (fully) serving; empty when all is well.
    pub why: String,
}

/// Has a volume served. Asking again for what is already so is `Ok`.
pub fn attach(plane: &Plane, name: &VolumeName, options: AttachOptions) -> Result<Attached, Fault> {
    let node = options.node.clone().unwrap_or_else(|| plane.node.clone());
    let record = reachable(plane, &node)?;
    let desired = Desired {
        socket: match &options.socket {
            Some(path) => path.clone(),
            None if node == plane.node => plane.default_socket(name),
            None => default_socket_of(plane, &record, name)?,
        },
        node,
        num_queues: check_num_queues(options.num_queues.unwrap_or(NUM_QUEUES))?,
        read_only: options.read_only,
        release: None,
        successor: None,
    };
    check_socket(&desired.socket)?;
    let (id, revision, desired) = want(plane, name, &desired, &options)?;
    let attached = |phase, why: &str| Attached {
        volume: name.to_string(),
        node: desired.node.clone(),
        socket: desired.socket.clone(),
        num_queues: desired.num_queues,
        read_only: desired.read_only,
        phase,
        why: why.into(),
    };
    if options.no_wait {
        return Ok(attached(None, ""));
    }
    let status = await_serving(plane, name, id, revision, &record)?;
    Ok(attached(Some(status.phase), &status.why))
}

/// The node's record, if it answers.
pub(super) fn reachable(plane: &Plane, node: &NodeName) -> Result<NodeRecord, Fault> {
    let Some((record, _)) = plane.store.node(node)? else {
        return Err(
            Fault::not_found(format!("there is no node {node}")).hint("see: lockstep node ls")
        );
    };
    let live = gather_brief(plane, [&record].into_iter());
    if live.node(node).is_none() {
        return Err(Fault::try_again(format!(
            "node {node} cannot be reached: {}",
            live.why_not(node)
        ))
        .hint("start it, or name another --node"));
    }
    Ok(record)
}

/// Another node's run directory is its own business: it says where its sockets are.
pub(super) fn default_socket_of(
    plane: &Plane,
    node: &NodeRecord,
    name: &VolumeName,
) -> Result<PathBuf, Fault> {
    let live = gather_brief(plane, [node].into_iter());
    live.node(&node.name)
        .map(|status| super::plane::socket_under(&status.run_dir, name))
        .ok_or_else(|| {
            Fault::try_again(format!(
                "node {} cannot be reached: {}",
                node.name,
                live.why_not(&node.name)
            ))
        })
}

/// Writes the wish. What comes back is the attachment that stands, ours or an equal one made before.
fn want(
    plane: &Plane,
    name: &VolumeName,
    desired: &Desired,
    options: &AttachOptions,
) -> Result<(VolumeId, Revision, Desired), Fault> {
    plane
        .store
        .retry(|| {
            let found = plane.find(name)?;
            if found.record.0.state == State::Creating {
                return Err(Race::Fault(
                    Fault::try_again(format!("volume {name} is still being created"))
                        .hint("see: lockstep volume inspect"),
                ));
            }
            if let Some(present) = &found.spec.0.attachment {
                may_join(name, present, desired, options)?;
                return Ok((found.id, found.spec.1, present.clone()));
            }
            refuse_taken_socket(plane, found.id, &desired.node, &desired.socket)?;
            not_drained(plane, &desired.node)?;
            let spec = VolumeSpec {
                attachment: Some(desired.clone()),
                ..found.spec.0.clone()
            };
            let revision = plane.store.cas_spec(found.id, found.spec.1, &spec)?;
            plane.events.push(
                What::volume(name, "detached", "attaching", "attach")
                    .epoch(found.record.0.epoch)
                    .text(format!("on {}", desired.node)),
            );
            Ok((found.id, revision, desired.clone()))
        })
        .map_err(Race::into)
}

/// Another volume may not be served there.
pub(super) fn refuse_taken_socket(
    plane: &Plane,
    volume: VolumeId,
    node: &NodeName,
    socket: &Path,
) -> Result<(), Fault> {
    // The path that a volume has by its name is another one's only by an odd wish: what the control loop knows does for that,
    // and the node that binds it finds out in any case.
    let usual = *node == plane.node && socket.starts_with(plane.run_dir.join("vhost"));
    let snapshot = match plane.known().filter(|_| usual) {
        Some(known) => known,
        None => Arc::new(plane.store.snapshot()?),
    };
    let takes = |a: &Desired| {
        let successor = a.successor.as_ref();
        (a.node == *node && a.socket == socket)
            || successor.is_some_and(|s| s.node == *node && s.socket == socket)
    };
    let other = super::plane::whole_volumes(&snapshot)
        .find(|(id, (spec, _), _)| *id != volume && spec.attachment.as_ref().is_some_and(takes));
    match other {
        Some((_, (spec, _), _)) => Err(Fault::state(format!(
            "{} is the socket of volume {} already",
            socket.display(),
            spec.full_name()
        ))
        .hint("give another --socket")),
        None => Ok(()),
    }
}

/// A node that is emptied so that it can go serves no more machines.
pub(super) fn not_drained(plane: &Plane, node: &NodeName) -> Result<(), Fault> {
    let record = plane.store.node(node)?.map(|(record, _)| record);
    match record.is_some_and(|n| n.draining.is_some()) {
        true => Err(
            Fault::state(format!("node {node} is drained")).hint(format!(
                "name another --node, or first: lockstep node undrain {node}"
            )),
        ),
        false => Ok(()),
    }
}

/// Whether the attachment that stands is what was asked for.
fn may_join(
    name: &VolumeName,
    present: &Desired,
    desired: &Desired,
    options: &AttachOptions,
) -> Result<(), Fault> {
    if present.release.is_some() {
        return Err(Fault::try_again(format!(
            "volume {name} is being detached from {}",
            present.node
        )));
    }
    let same = present.node == desired.node
        && present.read_only == desired.read_only
        && options.socket.as_ref().is_none_or(|s| *s == present.socket)
        && options.num_queues.is_none_or(|n| n == present.num_queues);
    if same {
        return Ok(());
    }
    Err(Fault::state(format!(
        "volume {name} is attached on {} at {} with {} queues{}",
        present.node,
        present.socket.display(),
        present.num_queues,
        if present.read_only { ", read-only" } else { "" }
    ))
    .hint(format!("detach it first: lockstep volume detach {name}")))
}

fn await_serving(
    plane: &Plane,
    name: &VolumeName,
    id: VolumeId,
    revision: Revision,
    node: &NodeRecord,
) -> Result<AttachmentStatus, Fault> {
    let deadline = Instant::now() + PATIENCE;
    let mut last = String::from("it has not begun");
    while Instant::now() < deadline {
        plane.still_running()?;
        let live = gather_volume(plane, [node].into_iter(), id);
        match live.node(&node.name) {
            None => last = live.why_not(&node.name),
            Some(status) => {
                if let Some(attachment) = status.attachment(id) {
                    if !matches!(attachment.phase, Phase::Acquiring | Phase::Fenced) {
                        return Ok(attachment.clone());
                    }
                    last = with_waits(attachment.why.clone(), attachment);
                }
                if let Some(fault) = failure(status, id, revision) {
                    if fault.code != Code::TryAgain {
                        take_back(plane, id, revision);
                        return Err(Fault {
                            message: format!(
                                "volume {name} cannot be served on {}: {}",
                                node.name, fault.message
                            ),
                            ..fault
                        });
                    }
                    last = fault.message;
                }
            }
        }
        match plane.store.spec(id)? {
            Some((spec, _)) if spec.attachment.is_some() => {}
            _ => {
                return Err(Fault::state(format!(
                    "volume {name} was detached by someone else meanwhile"
                )));
            }
        }
        thread::sleep(LOOK);
    }
    Err(Fault::try_again(format!(
        "volume {name} is not served on {} after {}s: {last}",
        node.name,
        PATIENCE.as_secs()
    ))
    .hint(format!(
        "the node goes on trying; see: lockstep volume inspect {name}; to give up: lockstep volume detach {name}"
    )))
}

/// The node's failure to do what `revision` of the spec says.
pub(super) fn failure(status: &LocalStatus, id: VolumeId, revision: Revision) -> Option<Fault> {
    status
        .reports
        .iter()
        .find(|r| r.volume == id && r.spec >= revision)
        .map(|r| r.fault.clone())
}

/// Withdraws a wish that cannot be fulfilled, if it is still ours.
fn take_back(plane: &Plane, id: VolumeId, revision: Revision) {
    let withdrawn = plane
        .store
        .spec(id)
        .map_err(CasError::from)
        .and_then(|spec| match spec {
            Some((spec, at)) if at == revision => {
                let spec = VolumeSpec {
                    attachment: None,
                    ..spec
                };
                plane.store.cas_spec(id, at, &spec).map(drop)
            }
            _ => Ok(()),
        });
    if let Err(e) = withdrawn {
        log::warn!("volume {id}: the failed attachment stays in its spec: {e}");
    }
}

/// Has a volume no longer served; flushed and released on return.
pub fn detach(plane: &Plane, name: &VolumeName, force: bool, no_wait: bool) -> Result<(), Fault> {
    let found = plane.find(name)?;
    let Some(present) = &found.spec.0.attachment else {
        return Err(Fault::state(format!("volume {name} is not attached")));
    };
    let node = plane.store.node(&present.node)?.map(|(record, _)| record);
    let live = gather_volume(plane, node.iter(), found.id);
    let Some(status) = live.node(&present.node) else {
        return detach_unreachable(
            plane,
            name,
            force,
            &present.node,
            &live.why_not(&present.node),
        );
    };
    if !force && status.attachment(found.id).is_some_and(|a| a.connected) {
        return Err(connected(name));
    }
    let revision = plane
        .store
        .retry(|| {
            let found = plane.find(name)?;
            let Some(desired) = found.spec.0.attachment.clone() else {
                return Ok(None); // someone else was faster
            };
            let spec = VolumeSpec {
                attachment: Some(Desired {
                    release: Some(Release { force }),
                    ..desired
                }),
                ..found.spec.0
            };
            Ok(Some(plane.store.cas_spec(found.id, found.spec.1, &spec)?))
        })
        .map_err(|race: Race| Fault::from(race))?;
    match (revision, node) {
        (Some(revision), Some(node)) if !no_wait => {
            await_release(plane, name, found.id, revision, &node)
        }
        _ => Ok(()),
    }
}

fn connected(name: &VolumeName) -> Fault {
    Fault::state(format!("a virtual machine is connected to volume {name}")).hint(format!(
        "stop the machine first, or pull its disk away: lockstep volume detach {name} --force"
    ))
}

/// The node that serves the volume does not answer. It may still serve: replication fences it when the volume is
/// attached elsewhere, so clearing the wish is safe for the data, but not for its virtual machine.
fn detach_unreachable(
    plane: &Plane,
    name: &VolumeName,
    force: bool,
    node: &NodeName,
    why: &str,
) -> Result<(), Fault> {
    if !force {
        return Err(Fault::try_again(format!(
            "volume {name} is attached on {node}, which cannot be reached: {why}"
        ))
        .hint(format!(
            "if that node is gone: lockstep volume detach {name} --force"
        )));
    }
    plane
        .store
        .retry(|| {
            let found = plane.find(name)?;
            let spec = VolumeSpec {
                attachment: None,
                ..found.spec.0
            };
            plane.store.cas_spec(found.id, found.spec.1, &spec)?;
            plane.events.push(
                What::volume(name, "attached", "detached", "detach-forced")
                    .epoch(found.record.0.epoch)
                    .text(format!("{node} cannot be reached: {why}")),
            );
            Ok(())
        })
        .map_err(|race: Race| race.into())
}

fn await_release(
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
        let Some((spec, _)) = plane.store.spec(id)? else {
            return Ok(()); // removed meanwhile
        };
        let Some(desired) = &spec.attachment else {
            return Ok(());
        };
        let live = gather_volume(plane, [node].into_iter(), id);
        let fault = live
            .node(&node.name)
            .and_then(|status| failure(status, id, revision));
        if desired.release.is_none() {
            // The node took the request back: it refuses.
            return Err(match fault {
                Some(fault) if fault.code != Code::InvalidState => fault,
                _ => connected(name),
            });
        }
        match fault {
            Some(fault) => last = fault.message,
            None if live.node(&node.name).is_none() => last = live.why_not(&node.name),
            None => {}
        }
        thread::sleep(LOOK);
    }
    Err(Fault::try_again(format!(
        "volume {name} is not released by {} after {}s: {last}",
        node.name,
        PATIENCE.as_secs()
    ))
    .hint(format!(
        "the node goes on trying; see: lockstep volume inspect {name}"
    )))
}
