//! What people decide about nodes: closed to new copies, labelled, removed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::events::What;
use super::fault::Fault;
use super::labels::{self, Of};
use super::live;
use super::model::{Labels, NodeRecord};
use super::plane::{Plane, whole_volumes};
use super::sight::Health;
use super::snapshot::Snapshot;
use super::store::Race;
use super::whois::alive;
use crate::replication::ids::NodeName;

/// A request to change a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeUpdate {
    /// Close it to new copies, or open it.
    pub cordoned: Option<bool>,
    /// Labels to set.
    pub label_add: Labels,
    /// Labels to take away.
    pub label_rm: Vec<String>,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDone {
    /// The node.
    pub node: NodeName,
    /// Why it still gets no copies, if people may think that it does now.
    pub remark: Option<String>,
}

pub(super) fn missing(name: &NodeName) -> Fault {
    Fault::not_found(format!("there is no node {name}")).hint("see: lockstep node ls")
}

/// Changes the node's record until it takes; `change` says what changed, or nothing.
pub(super) fn change(
    plane: &Plane,
    name: &NodeName,
    rule: &str,
    change: impl Fn(&mut NodeRecord) -> Option<String>,
) -> Result<NodeRecord, Fault> {
    let (record, text) = plane
        .store
        .retry(|| {
            let Some((mut record, revision)) = plane.store.node(name)? else {
                return Err(Race::Fault(missing(name)));
            };
            let text = change(&mut record);
            if text.is_some() {
                plane.store.cas_node(Some(revision), &record)?;
            }
            Ok((record, text))
        })
        .map_err(|race: Race| Fault::from(race))?;
    if let Some(text) = text {
        plane
            .events
            .push(What::node("", &text, rule).text(format!("node {name}")));
    }
    Ok(record)
}

/// Cordons, uncordons or labels a node. Outlives its process.
pub fn update(plane: &Plane, name: &NodeName, request: &NodeUpdate) -> Result<NodeDone, Fault> {
    let added = labels::check(request.label_add.clone(), Of::Node)?;
    let removed = request
        .label_rm
        .iter()
        .map(|key| labels::own_key(key, Of::Node))
        .collect::<Result<Vec<_>, _>>()?;
    if let Some(key) = removed.iter().find(|k| added.contains_key(*k)) {
        return Err(Fault::input(format!(
            "label {key} is both set and taken away"
        )));
    }
    if request.cordoned.is_none() && added.is_empty() && removed.is_empty() {
        return Err(Fault::input(format!("nothing to change on node {name}"))
            .hint("see: lockstep node label --help"));
    }
    let record = change(plane, name, "node", |node| {
        let before = node.clone();
        let mut words = Vec::new();
        if let Some(cordoned) = request.cordoned.filter(|c| *c != node.cordoned) {
            node.cordoned = cordoned;
            words.push(if cordoned { "cordoned" } else { "uncordoned" });
        }
        for (key, value) in &added {
            node.labels.insert(key.clone(), value.clone());
            node.relabelled.insert(key.clone(), Some(value.clone()));
        }
        for key in &removed {
            node.labels.remove(key);
            node.relabelled.insert(key.clone(), None);
        }
        if node.labels != before.labels {
            words.push("labelled");
        }
        (*node != before).then(|| words.join(", "))
    })?;
    let still = (request.cordoned == Some(false) && record.draining.is_some()).then(|| {
        format!("node {name} is drained and gets no copies; see: lockstep node undrain {name}")
    });
    Ok(NodeDone {
        node: record.name,
        remark: still,
    })
}

/// What keeps a node from being removed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Held {
    /// Volumes with a copy there and, as far as the record says, another one in sync.
    copies: Vec<String>,
    /// Volumes of which the only copy that counts is there.
    only: Vec<String>,
    /// Volumes that should be served there.
    served: Vec<String>,
    /// Volumes whose machine is to come there.
    awaited: Vec<String>,
}

fn held(snapshot: &Snapshot, name: &NodeName) -> Held {
    let mut held = Held::default();
    for (_, (spec, _), (record, _)) in whole_volumes(snapshot) {
        let volume = spec.full_name().to_string();
        if let Some(desired) = &spec.attachment {
            if desired.node == *name {
                held.served.push(volume.clone());
            }
            if desired.successor.as_ref().is_some_and(|s| s.node == *name) {
                held.awaited.push(volume.clone());
            }
        }
        if record.copy_on(name).is_none() {
            continue;
        }
        match record.in_sync().any(|c| c.node != *name) {
            true => held.copies.push(volume),
            false => held.only.push(volume),
        }
    }
    for list in [
        &mut held.copies,
        &mut held.only,
        &mut held.served,
        &mut held.awaited,
    ] {
        list.sort();
    }
    held
}

/// Why the node stays, and what to do first.
fn refusal(name: &NodeName, held: &Held) -> Option<Fault> {
    let list = |volumes: &[String]| volumes.join(", ");
    if let Some(first) = held.served.first() {
        return Some(
            Fault::state(format!(
                "node {name} is where {} should be served",
                list(&held.served)
            ))
            .hint(format!(
                "it will not be while the node is gone: lockstep volume detach {first} --force"
            )),
        );
    }
    if let Some(first) = held.awaited.first() {
        return Some(
            Fault::state(format!(
                "node {name} is where the machine of {} is to move",
                list(&held.awaited)
            ))
            .hint(format!(
                "take that back: lockstep volume detach {first} --incoming"
            )),
        );
    }
    if let Some(first) = held.only.first() {
        return Some(
            Fault::state(format!(
                "node {name} holds the only copy of {} that has all data",
                list(&held.only)
            ))
            .hint(format!(
                "start the node again and drain it (lockstep node drain {name}); or, if the data may be lost: \
                 lockstep volume rm {first}"
            )),
        );
    }
    held.copies.first().map(|_| {
        Fault::state(format!(
            "node {name} still holds copies of {}",
            list(&held.copies)
        ))
        .hint(format!(
            "have them made elsewhere first: lockstep node drain {name}"
        ))
    })
}

/// Forgets a node that is gone for good.
pub fn remove(plane: &Plane, name: &NodeName) -> Result<(), Fault> {
    if *name == plane.node {
        return Err(Fault::state(format!(
            "node {name} answers this command, so it is not dead"
        ))
        .hint("stop it, and ask another node with --host"));
    }
    let snapshot = plane.store.snapshot()?;
    let (record, _) = snapshot.nodes.get(name).ok_or_else(|| missing(name))?;
    if let Some(how) = alive(plane.cluster, record)? {
        return Err(
            Fault::state(format!("node {name} is not dead: {how}")).hint(format!(
                "empty it with lockstep node drain {name}, stop its process, then remove it"
            )),
        );
    }
    let live = live::gather_brief(plane, snapshot.nodes.values().map(|(n, _)| n));
    let present = plane.store.present()?;
    let sight = live::sight_with(plane, &live, Some(&present));
    if let Some((Health::Unreachable, why)) = sight.nodes.get(name) {
        return Err(
            Fault::try_again(format!("node {name} may be running: {why}")).hint(
                "stop its process, or its machine; some seconds later (30 when it could not end in order) try again",
            ),
        );
    }
    let instance = record.instance;
    let mut seen = false;
    plane
        .store
        .retry(|| {
            let snapshot = plane.store.snapshot()?;
            let Some((record, revision)) = snapshot.nodes.get(name) else {
                return match seen {
                    true => Ok(()), // our own unknown outcome, or another one's
                    false => Err(Race::Fault(missing(name))),
                };
            };
            seen = true;
            if record.instance != instance {
                return Err(Race::Fault(Fault::state(format!(
                    "node {name} was started again meanwhile"
                ))));
            }
            if let Some(fault) = refusal(name, &held(&snapshot, name)) {
                return Err(Race::Fault(fault));
            }
            plane.store.remove_node(name, *revision)?;
            Ok(())
        })
        .map_err(|race: Race| Fault::from(race))?;
    plane
        .events
        .push(What::node("", "removed", "node").text(format!("node {name}")));
    forget_tombstones(plane, &snapshot, name);
    Ok(())
}

/// Nobody will delete its copies of removed volumes any more. Should its disk return, they are kept and named there.
fn forget_tombstones(plane: &Plane, snapshot: &Snapshot, name: &NodeName) {
    for (id, (tombstone, _)) in &snapshot.removed {
        if tombstone.copies.iter().any(|(node, _)| node == name)
            && let Err(e) = plane.store.copy_removed(*id, name)
        {
            log::warn!(
                "the removed volume {} still waits for {name}: {e}",
                tombstone.name
            );
        }
    }
}

/// Why a node gets no copies although it answers, in one word each; empty when it does.
pub(super) fn closed(record: &NodeRecord) -> Vec<&'static str> {
    let compute_only = super::placement::is_compute_only(&record.labels);
    [
        (record.cordoned, "cordoned"),
        (record.draining.is_some(), "drained"),
        (compute_only, "compute-only"),
    ]
    .into_iter()
    .filter_map(|(is, word)| is.then_some(word))
    .collect()
}

/// Which values of the topology label several copies of a volume share: placement is best effort.
pub(super) fn shared(key: Option<&str>, nodes: &[&NodeName], snapshot: &Snapshot) -> Vec<String> {
    let Some(key) = key else {
        return Vec::new();
    };
    let mut places: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for node in nodes {
        let record = snapshot.nodes.get(*node).map(|(record, _)| record);
        if let Some(value) = record.and_then(|n| n.labels.get(key)) {
            places.entry(value).or_default().push(&node.0);
        }
    }
    places.values_mut().for_each(|nodes| nodes.sort_unstable());
    places
        .into_iter()
        .filter(|(_, nodes)| nodes.len() > 1)
        .map(|(value, nodes)| format!("copies share {key}={value}: {}", nodes.join(", ")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::{node, record, spec};
    use crate::cluster::model::{Desired, Successor};
    use crate::cluster::snapshot::VolumeEntry;
    use crate::registry::Revision;
    use crate::replication::ids::VolumeId;

    #[test]
    fn a_node_is_kept_for_what_it_holds_and_the_remedy_is_named() {
        // (copies, served on and awaited on, what stands in the way, remedy)
        for (copies, served, message, remedy) in [
            ("n1:i n2:i", "", "", ""),
            ("n1:i n2:i", "n1", "", ""),
            ("n1:i n3:r", "", "", ""),
            (
                "n1:i n2:i",
                "n3",
                "should be served",
                "volume detach default/vm1 --force",
            ),
            (
                "n1:i n2:i",
                "n1 n3",
                "is to move",
                "volume detach default/vm1 --incoming",
            ),
            (
                "n1:i n3:i",
                "",
                "still holds copies of default/vm1",
                "node drain n3",
            ),
            (
                "n1:i n3:m",
                "",
                "still holds copies of default/vm1",
                "node drain n3",
            ),
            (
                "n3:i n1:m",
                "",
                "the only copy of default/vm1",
                "volume rm default/vm1",
            ),
            ("n3:i", "", "the only copy", "start the node again"),
        ] {
            let mut spec = spec();
            let mut places = served.split_whitespace();
            spec.attachment = places.next().map(|name| Desired {
                node: node(name),
                socket: "/s".into(),
                num_queues: 1,
                read_only: false,
                release: None,
                successor: places.next().map(|name| Successor {
                    node: node(name),
                    socket: "/s".into(),
                }),
            });
            let mut snapshot = Snapshot::default();
            let entry = VolumeEntry {
                spec: Some((spec, Revision(1))),
                record: Some((record(copies), Revision(1))),
                ..VolumeEntry::default()
            };
            snapshot.volumes.insert(VolumeId([1; 16]), entry);
            let fault = refusal(&node("n3"), &held(&snapshot, &node("n3")));
            match fault {
                None => assert_eq!(message, "", "{copies}"),
                Some(fault) => {
                    assert!(
                        !message.is_empty() && fault.message.contains(message),
                        "{fault}"
                    );
                    assert!(fault.hint.as_ref().unwrap().contains(remedy), "{fault:?}");
                }
            }
        }
    }
}
