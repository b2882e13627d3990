//! The whole registry, read: what the control loop acts on and the API answers from.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

use super::model::{
    ClusterRecord, NamespaceRecord, NodeRecord, Ready, RuleRecord, Tombstone, VolumeName,
    VolumeSpec,
};
use super::store::{
    CLUSTER, NAMES, NAMESPACES, NODES, READY, RECORD, REMOVED, RULES, SPEC, VOLUMES, Versioned,
    decode,
};
use crate::registry::{Entry, Event, Listing, Revision};
use crate::replication::ids::{CopyId, NodeName, VolumeId};
use crate::replication::record::Record;

/// One volume's keys.
#[derive(Clone, Debug, Default)]
pub struct VolumeEntry {
    /// What people asked.
    pub spec: Option<Versioned<VolumeSpec>>,
    /// What the protocol decided.
    pub record: Option<Versioned<Record>>,
    /// The nodes' answers while it is created.
    pub ready: BTreeMap<CopyId, Versioned<Ready>>,
}

impl VolumeEntry {
    fn is_empty(&self) -> bool {
        self.spec.is_none() && self.record.is_none() && self.ready.is_empty()
    }
}

/// Everything in the registry at one revision.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The cluster's own record.
    pub cluster: Option<ClusterRecord>,
    /// All nodes that ever joined.
    pub nodes: BTreeMap<NodeName, Versioned<NodeRecord>>,
    /// The namespaces that have a record.
    pub namespaces: BTreeMap<String, Versioned<NamespaceRecord>>,
    /// All rules, by `namespace/name`.
    pub rules: BTreeMap<String, Versioned<RuleRecord>>,
    /// All volumes.
    pub volumes: BTreeMap<VolumeId, VolumeEntry>,
    /// `namespace/name` to id.
    pub names: BTreeMap<String, VolumeId>,
    /// Removed volumes whose copies are not all deleted yet.
    pub removed: BTreeMap<VolumeId, Versioned<Tombstone>>,
    /// Keys whose value could not be read, and why. They are left alone.
    pub unreadable: BTreeMap<String, String>,
    /// The instant.
    pub revision: Revision,
}

impl Snapshot {
    /// Reads a listing of all keys.
    pub fn of(listing: &Listing) -> Self {
        let mut snapshot = Self::default();
        snapshot.add(listing);
        snapshot
    }

    /// Takes in the listing of some keys. Of several listings each is of its own instant, and the snapshot of the last.
    pub(super) fn add(&mut self, listing: &Listing) {
        for (key, entry) in &listing.entries {
            self.set(key, Some(entry));
        }
        self.revision = listing.revision;
    }

    /// Nothing but the record of a volume that was made at `revision`.
    pub(super) fn just_made(record: &Record, revision: Revision) -> Self {
        let volume = VolumeEntry {
            record: Some((record.clone(), revision)),
            ..VolumeEntry::default()
        };
        Self {
            volumes: BTreeMap::from([(record.volume_id, volume)]),
            revision,
            ..Self::default()
        }
    }

    /// Takes in one batch of changes of a watch. Changes come in order; those that a newer listing holds already are
    /// passed over, or they would bring back what came before it.
    pub fn apply(&mut self, batch: Vec<Event>) {
        let known = self.revision;
        for event in batch {
            if event.revision > known {
                self.apply_one(event);
            }
        }
    }

    fn apply_one(&mut self, event: Event) {
        let entry = event.value.map(|value| Entry {
            value,
            revision: event.revision,
        });
        self.set(&event.key, entry.as_ref());
        self.revision = event.revision;
    }

    /// The volume of that name with both its keys.
    pub fn volume(&self, name: &VolumeName) -> Option<(VolumeId, &VolumeEntry)> {
        let id = *self.names.get(&name.to_string())?;
        self.volumes.get(&id).map(|entry| (id, entry))
    }

    /// Whether the node is to be emptied.
    pub fn is_draining(&self, node: &NodeName) -> bool {
        let record = self.nodes.get(node).map(|(record, _)| record);
        record.is_some_and(|n| n.draining.is_some())
    }

    fn set(&mut self, key: &str, entry: Option<&Entry>) {
        self.unreadable.remove(key);
        if key == CLUSTER {
            self.cluster = self.read::<ClusterRecord>(key, entry).map(|(c, _)| c);
        } else if let Some(name) = key.strip_prefix(NODES) {
            let value = self.read(key, entry);
            set(&mut self.nodes, NodeName(name.into()), value);
        } else if let Some(name) = key.strip_prefix(NAMESPACES) {
            let value = self.read(key, entry);
            set(&mut self.namespaces, name.into(), value);
        } else if let Some(name) = key.strip_prefix(RULES) {
            let value = self.read(key, entry);
            set(&mut self.rules, name.into(), value);
        } else if let Some(name) = key.strip_prefix(NAMES) {
            let value = self.read::<VolumeId>(key, entry).map(|(id, _)| id);
            set(&mut self.names, name.into(), value);
        } else if let Some(Ok(id)) = key.strip_prefix(REMOVED).map(str::parse) {
            let value = self.read(key, entry);
            set(&mut self.removed, id, value);
        } else if let Some((id, part)) = key.strip_prefix(VOLUMES).and_then(|k| k.split_once('/'))
            && let Ok(id) = id.parse()
        {
            self.set_volume(id, part, key, entry);
        }
        // Other keys are of a later version; it knows what to do with them.
    }

    fn set_volume(&mut self, id: VolumeId, part: &str, key: &str, entry: Option<&Entry>) {
        let mut volume = self.volumes.remove(&id).unwrap_or_default();
        if part == SPEC {
            volume.spec = self.read(key, entry);
        } else if part == RECORD {
            volume.record = self.read(key, entry);
        } else if let Some(copy) = part.strip_prefix(READY).and_then(|c| c.parse().ok()) {
            let value = self.read(key, entry);
            set(&mut volume.ready, copy, value);
        }
        if !volume.is_empty() {
            self.volumes.insert(id, volume);
        }
    }

    fn read<T: DeserializeOwned>(
        &mut self,
        key: &str,
        entry: Option<&Entry>,
    ) -> Option<Versioned<T>> {
        match decode(key, entry?) {
            Ok(value) => Some(value),
            Err(e) => {
                self.unreadable.insert(key.into(), e.to_string());
                None
            }
        }
    }
}

fn set<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
    match value {
        Some(value) => {
            map.insert(key, value);
        }
        None => {
            map.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(revision: u64, key: &str, value: Option<&str>) -> Event {
        Event {
            key: key.into(),
            revision: Revision(revision),
            value: value.map(Into::into),
        }
    }

    #[test]
    fn what_a_newer_listing_holds_is_not_undone_by_older_changes() {
        let name = "names/default/a";
        let id = |n: u8| format!("\"{}\"", VolumeId([n; 16]));
        let mut snapshot = Snapshot::of(&Listing {
            entries: vec![(
                name.into(),
                Entry {
                    value: id(2).into(),
                    revision: Revision(5),
                },
            )],
            revision: Revision(6),
        });
        snapshot.apply(vec![event(4, name, Some(&id(1))), event(6, name, None)]);
        assert_eq!(snapshot.names["default/a"], VolumeId([2; 16]));
        // Two changes of one transaction are both new.
        snapshot.apply(vec![
            event(7, name, Some(&id(3))),
            event(7, "names/default/b", Some(&id(4))),
        ]);
        assert_eq!(snapshot.names.len(), 2);
        assert_eq!(snapshot.revision, Revision(7));
    }

    #[test]
    fn a_value_that_cannot_be_read_is_named_and_does_no_harm() {
        let mut snapshot = Snapshot::default();
        snapshot.apply(vec![
            event(1, "nodes/n1", Some("{")),
            event(2, "volumes/not-an-id/spec", Some("{}")),
            event(3, "future/key", Some("?")),
        ]);
        assert!(snapshot.nodes.is_empty() && snapshot.volumes.is_empty());
        assert_eq!(snapshot.unreadable.len(), 1);
        snapshot.apply(vec![event(4, "nodes/n1", None)]);
        assert!(snapshot.unreadable.is_empty());
    }
}
