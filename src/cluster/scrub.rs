//! `volume scrub`: a comparison of all copies that somebody asks for (PROTOCOL 11.6).
//!
//! It is asked of one process: the node that serves the volume or, while it is detached, one that can look after it
//! (`control_tend`). The wish stands in the volume's spec until that process has seen the end of it (`control_scrub`); what it
//! found it keeps in memory. A wish to a process that is no more is void, and the next one takes its place.

use serde::{Deserialize, Serialize};

use super::control_tend::turn;
use super::events::What;
use super::fault::Fault;
use super::host::ScrubStatus;
use super::join::random;
use super::live::{Live, gather};
use super::model::{ScrubWish, VolumeName, VolumeSpec};
use super::plane::{Found, Plane};
use super::store::Race;
use super::units::{show_time, wall_ms};
use crate::replication::ids::{Instance, NodeName, VolumeId};
use crate::replication::record::State;

/// Random bits of an id, below the milliseconds: of two scrubs the one asked for later has the greater id, and every program
/// that reads JSON keeps it exactly (53 bits).
const CHANCE: u32 = 10;

/// A request to compare all copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubRequest {
    /// Make what differs what the master holds.
    #[serde(default)]
    pub repair: bool,
}

/// The scrub that was begun, or that goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubAsked {
    /// `namespace/name`.
    pub volume: String,
    /// Which.
    pub id: u64,
    /// The node that does it.
    pub node: NodeName,
    /// It was asked for before, and goes on.
    pub followed: bool,
}

/// A scrub, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubView {
    /// The node that does it, or did.
    pub node: NodeName,
    /// When it was asked for, UTC.
    pub asked: String,
    /// How far it is, and what it has found.
    #[serde(flatten)]
    pub status: ScrubStatus,
}

fn asked_at(id: u64) -> String {
    show_time(id >> CHANCE)
}

fn new_id() -> Result<u64, Fault> {
    let chance = u16::from_le_bytes(random()?);
    Ok(wall_ms() << CHANCE | u64::from(chance) & ((1 << CHANCE) - 1))
}

/// Whether the process that was asked still runs.
fn is_alive(wish: &ScrubWish, live: &Live) -> bool {
    let status = live.node(&wish.node);
    status.is_some_and(|s| s.identity.instance == wish.instance)
}

/// Whether the process that was asked says that it has ended. A moment later it takes the wish away, too; whoever has seen the
/// end of one scrub and asks for another one must not meet the first.
fn has_ended(wish: &ScrubWish, live: &Live) -> bool {
    let ended = |s: &ScrubStatus| s.id == wish.id && !s.is_open();
    live.node(&wish.node).is_some_and(|status| {
        let attached = status.attachments.iter();
        attached.filter_map(|a| a.scrub.as_ref()).any(ended)
            || status.scrubs.iter().any(|s| ended(&s.status))
    })
}

/// Has all copies of the volume compared. One that goes on is followed if it is of the same kind.
pub fn ask(plane: &Plane, name: &VolumeName, request: ScrubRequest) -> Result<ScrubAsked, Fault> {
    let snapshot = plane.store.snapshot()?;
    let live = gather(plane, snapshot.nodes.values().map(|(n, _)| n));
    let id = new_id()?;
    plane
        .store
        .retry(|| {
            let found = plane.find(name)?;
            let asked = |wish: &ScrubWish| ScrubAsked {
                volume: name.to_string(),
                id: wish.id,
                node: wish.node.clone(),
                followed: wish.id != id,
            };
            let before = found.spec.0.scrub.as_ref();
            let goes_on = |w: &&ScrubWish| is_alive(w, &live) && !has_ended(w, &live);
            if let Some(wish) = before.filter(|w| w.id == id || goes_on(w)) {
                return match wish.repair == request.repair {
                    true => Ok(asked(wish)), // under way, or our own unknown outcome
                    false => Err(Race::Fault(of_another_kind(name, wish))),
                };
            }
            let (node, instance) = who(&found, &live)?;
            let repair = request.repair;
            let wish = ScrubWish {
                id,
                repair,
                node,
                instance,
            };
            let spec = VolumeSpec {
                scrub: Some(wish.clone()),
                ..found.spec.0.clone()
            };
            plane.store.cas_spec(found.id, found.spec.1, &spec)?;
            let what = if repair { ", and repair them" } else { "" };
            plane.events.push(
                What::volume(name, "", "scrubbing", "scrub")
                    .epoch(found.record.0.epoch)
                    .text(format!("{} is to compare all copies{what}", wish.node)),
            );
            Ok(asked(&wish))
        })
        .map_err(|race: Race| Fault::from(race))
}

fn of_another_kind(name: &VolumeName, wish: &ScrubWish) -> Fault {
    let (with, without) = match wish.repair {
        true => ("with", "without"),
        false => ("without", "with"),
    };
    Fault::state(format!(
        "a scrub of volume {name} {with} --repair, asked for at {}, is under way on {}; one {without} it cannot follow it",
        asked_at(wish.id),
        wish.node
    ))
    .hint(format!(
        "wait until it ends, see: lockstep volume inspect {name}; or end it: lockstep volume scrub {name} --stop"
    ))
}

/// The process that is to do it.
fn who(found: &Found, live: &Live) -> Result<(NodeName, Instance), Fault> {
    let (name, spec, record) = (&found.name, &found.spec.0, &found.record.0);
    if record.state == State::Creating {
        return Err(Fault::try_again(format!(
            "volume {name} is still being created"
        )));
    }
    let tends = |node: &&NodeName| {
        let status = live.node(node);
        status.is_some_and(|s| s.attachments.iter().any(|a| a.volume == found.id))
    };
    let node = match &spec.attachment {
        Some(desired) if desired.release.is_some() => {
            return Err(Fault::try_again(format!(
                "volume {name} is being detached from {}",
                desired.node
            )));
        }
        Some(desired) => &desired.node,
        None => {
            let mut holders = record.in_sync().map(|c| &c.node);
            let node = holders.find(tends).or_else(|| turn(record, live));
            node.ok_or_else(|| {
                Fault::try_again(format!(
                    "no node with a copy of volume {name} in sync answers"
                ))
                .hint("see: lockstep node ls")
            })?
        }
    };
    let Some(status) = live.node(node) else {
        return Err(Fault::try_again(format!(
            "node {node}, which serves volume {name}, does not answer: {}",
            live.why_not(node)
        ))
        .hint(format!("see: lockstep volume inspect {name}")));
    };
    Ok((node.clone(), status.identity.instance))
}

/// Takes the wish back: the process that compares stops.
pub fn stop(plane: &Plane, name: &VolumeName) -> Result<(), Fault> {
    plane
        .store
        .retry(|| {
            let found = plane.find(name)?;
            let Some(wish) = &found.spec.0.scrub else {
                return Err(Race::Fault(Fault::state(format!(
                    "no scrub of volume {name} is under way"
                ))));
            };
            let spec = VolumeSpec {
                scrub: None,
                ..found.spec.0.clone()
            };
            plane.store.cas_spec(found.id, found.spec.1, &spec)?;
            plane.events.push(
                What::volume(name, "scrubbing", "", "scrub")
                    .epoch(found.record.0.epoch)
                    .text(format!("the scrub on {} is stopped", wish.node)),
            );
            Ok(())
        })
        .map_err(|race: Race| Fault::from(race))
}

/// The newest scrub of the volume that any node knows of.
pub fn newest(spec: &VolumeSpec, volume: VolumeId, size: u64, live: &Live) -> Option<ScrubView> {
    let view = |node: &NodeName, status: &ScrubStatus| ScrubView {
        node: node.clone(),
        asked: asked_at(status.id),
        status: status.clone(),
    };
    let answers = live
        .0
        .iter()
        .filter_map(|(node, s)| Some((node, s.as_ref().ok()?)));
    let known = answers.flat_map(|(node, status)| {
        let attached = status.attachments.iter().filter(|a| a.volume == volume);
        let ended = status.scrubs.iter().filter(|s| s.volume == volume);
        attached
            .filter_map(|a| a.scrub.as_ref())
            .chain(ended.map(|s| &s.status))
            .map(move |status| (node, status))
    });
    // Of two that say something of one scrub the one that has seen its end.
    let best = known.max_by_key(|(_, s)| (s.id, !s.is_open()));
    match &spec.scrub {
        Some(wish) if best.is_none_or(|(_, s)| s.id < wish.id) => {
            let status = ScrubStatus::waiting(wish.id, wish.repair, size);
            let node = &wish.node;
            let status = match live.node(node) {
                Some(_) if is_alive(wish, live) => status,
                Some(_) => status.broken_off(format!(
                    "the process of node {node} that compared the copies has ended"
                )),
                None => ScrubStatus {
                    why: format!("node {node} does not answer: {}", live.why_not(node)),
                    ..status
                },
            };
            Some(view(&wish.node, &status))
        }
        _ => best.map(|(node, status)| view(node, status)),
    }
}

/// The newest scrub of the volume.
pub fn inspect(plane: &Plane, name: &VolumeName) -> Result<ScrubView, Fault> {
    let found = plane.find(name)?;
    let snapshot = plane.store.snapshot()?;
    let live = gather(plane, snapshot.nodes.values().map(|(n, _)| n));
    let size = found.record.0.size;
    newest(&found.spec.0, found.id, size, &live).ok_or_else(|| {
        Fault::not_found(format!("no node knows of a scrub of volume {name}"))
            .hint(format!("to begin one: lockstep volume scrub {name}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::{attachment, node, spec, status};
    use crate::cluster::host::ScrubState::{self, BrokenOff, Done, Running, Waiting};
    use crate::cluster::host::{AttachmentStatus, Phase};
    use crate::cluster::plane::EndedScrub;

    /// A scrub's state on a node.
    fn scrub(id: u64, state: ScrubState) -> ScrubStatus {
        ScrubStatus {
            state,
            ..ScrubStatus::waiting(id, false, 0)
        }
    }

    #[test]
    fn the_newest_scrub_is_shown_wherever_it_was_and_one_whose_process_is_gone_broke_off() {
        // (what nodes say: node, id, state; the wish: id, node, whether by the process that runs there; shown)
        type Said<'a> = &'a [(&'a str, u64, ScrubState)];
        type Wish<'a> = Option<(u64, &'a str, bool)>;
        type Shown = Option<(&'static str, u64, ScrubState)>;
        let table: &[(Said<'_>, Wish<'_>, Shown)] = &[
            (&[], None, None),
            (&[], Some((5, "n1", true)), Some(("n1", 5, Waiting))),
            // Its process was started anew; its node does not answer.
            (&[], Some((5, "n1", false)), Some(("n1", 5, BrokenOff))),
            (&[], Some((5, "n9", true)), Some(("n9", 5, Waiting))),
            (
                &[("n1", 5, Running)],
                Some((5, "n1", true)),
                Some(("n1", 5, Running)),
            ),
            (
                &[("n1", 5, Done)],
                Some((5, "n1", true)),
                Some(("n1", 5, Done)),
            ),
            (&[("n1", 5, Done)], None, Some(("n1", 5, Done))),
            (
                &[("n1", 5, Done), ("n2", 7, Done)],
                None,
                Some(("n2", 7, Done)),
            ),
            (
                &[("n1", 5, Done)],
                Some((7, "n2", true)),
                Some(("n2", 7, Waiting)),
            ),
            (
                &[("n1", 9, Done)],
                Some((7, "n2", true)),
                Some(("n1", 9, Done)),
            ),
        ];
        for (said, wish, shown) in table {
            let mut live = Live::default();
            for name in ["n1", "n2"] {
                let mut status = status(name);
                let mine = said.iter().filter(|(n, ..)| *n == name);
                status.scrubs.extend(mine.map(|(_, id, state)| EndedScrub {
                    volume: VolumeId([1; 16]),
                    status: scrub(*id, *state),
                }));
                live.0.insert(node(name), Ok(status));
            }
            let mut spec = spec();
            spec.scrub = wish.map(|(id, on, same)| ScrubWish {
                id,
                repair: false,
                node: node(on),
                instance: Instance([if same { 1 } else { 2 }; 16]),
            });
            let found = newest(&spec, VolumeId([1; 16]), 0, &live);
            let found = found.map(|v| (v.node.0, v.status.id, v.status.state));
            let shown = shown.map(|(n, id, state)| (n.to_string(), id, state));
            assert_eq!(found, shown, "{said:?} {wish:?}");
        }
    }

    #[test]
    fn a_later_scrub_has_a_greater_id_that_every_json_reader_keeps() {
        let id = new_id().unwrap();
        assert!(id < 1 << 53);
        let later = (wall_ms() + 1) << CHANCE;
        assert!(later > id || new_id().unwrap() > id);
        assert_eq!(asked_at(1_000 << CHANCE), "1970-01-01T00:00:01.000Z");
    }

    #[test]
    fn a_scrub_whose_process_says_that_it_has_ended_stands_in_nobodys_way() {
        let wish = ScrubWish {
            id: 5,
            repair: true,
            node: node("n1"),
            instance: Instance([1; 16]),
        };
        for (on, id, state, ended) in [
            ("n1", 5, Done, true),
            ("n1", 5, BrokenOff, true),
            ("n1", 5, Running, false),
            ("n1", 5, Waiting, false),
            ("n1", 4, Done, false),
            ("n2", 5, Done, false),
        ] {
            for attached in [false, true] {
                let mut live = Live::default();
                let mut status = status(on);
                if attached {
                    status.attachments.push(AttachmentStatus {
                        scrub: Some(scrub(id, state)),
                        ..attachment(Phase::Serving)
                    });
                } else {
                    status.scrubs.push(EndedScrub {
                        volume: VolumeId([1; 16]),
                        status: scrub(id, state),
                    });
                }
                live.0.insert(node(on), Ok(status));
                assert_eq!(
                    has_ended(&wish, &live),
                    ended,
                    "{on} {id} {state:?} {attached}"
                );
            }
        }
    }
}
