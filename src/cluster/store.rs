//! The registry with types: nobody else knows keys or their JSON.
//!
//! | key | value |
//! | --- | --- |
//! | `cluster` | [`ClusterRecord`] |
//! | `nodes/<name>` | [`NodeRecord`] |
//! | `namespaces/<name>` | [`NamespaceRecord`]; `default` has none |
//! | `rules/<namespace>/<name>` | [`RuleRecord`] |
//! | `names/<namespace>/<name>` | the volume's id |
//! | `volumes/<id>/spec` | [`VolumeSpec`]: what people asked |
//! | `volumes/<id>/record` | [`Record`]: what the protocol decided |
//! | `volumes/<id>/ready/<copy>` | [`Ready`]: a node's answer while the volume is created |
//! | `removed/<id>` | [`Tombstone`] |

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::fault::Fault;
use super::metrics::Histogram;
use super::model::{
    ClusterRecord, NamespaceRecord, NodeRecord, Ready, RuleRecord, Tombstone, VolumeName,
    VolumeSpec,
};
use super::snapshot::Snapshot;
use crate::registry::{
    CasError, Change, Entry, Guard, PRESENCE, Presence, Present, Registry, RegistryError, Revision,
    Watch,
};
use crate::replication::ids::{CopyId, NodeName, VolumeId};
use crate::replication::record::Record;

/// How often a change is computed anew because someone else changed the same key. Each round lets one other writer
/// through, and a volume has few.
const ROUNDS_MAX: u32 = 20;
/// Pause before the next round, so that two writers do not keep step.
const ROUND_PAUSE: Duration = Duration::from_millis(5);

pub(super) const CLUSTER: &str = "cluster";
pub(super) const NODES: &str = "nodes/";
pub(super) const NAMESPACES: &str = "namespaces/";
pub(super) const RULES: &str = "rules/";
pub(super) const NAMES: &str = "names/";
pub(super) const VOLUMES: &str = "volumes/";
pub(super) const REMOVED: &str = "removed/";
pub(super) const SPEC: &str = "spec";
pub(super) const RECORD: &str = "record";
pub(super) const READY: &str = "ready/";

fn node_key(name: &NodeName) -> String {
    format!("{NODES}{name}")
}

fn name_key(name: &VolumeName) -> String {
    format!("{NAMES}{}/{}", name.namespace, name.name)
}

fn namespace_key(name: &str) -> String {
    format!("{NAMESPACES}{name}")
}

fn rule_key(name: &VolumeName) -> String {
    format!("{RULES}{}/{}", name.namespace, name.name)
}

fn volume_key(volume: VolumeId, part: &str) -> String {
    format!("{VOLUMES}{volume}/{part}")
}

fn ready_key(volume: VolumeId, copy: CopyId) -> String {
    format!("{VOLUMES}{volume}/{READY}{copy}")
}

fn removed_key(volume: VolumeId) -> String {
    format!("{REMOVED}{volume}")
}

/// A value with the revision that wrote it.
pub type Versioned<T> = (T, Revision);

/// What the engine needs of the registry: one volume's record. Blocking; call it from a thread that may wait.
pub trait Registrar: Send + Sync {
    /// The record as it is now; `None`: the volume was removed.
    fn get_record(&self, volume: VolumeId) -> Result<Option<Versioned<Record>>, RegistryError>;

    /// Replaces the record if it is still at `expected`. After [`CasError::Ambiguous`] read back until it is known.
    fn cas_record(
        &self,
        volume: VolumeId,
        expected: Revision,
        record: &Record,
    ) -> Result<Revision, CasError>;
}

/// The typed registry. Cheap to share.
pub struct Store {
    registry: Arc<dyn Registry>,
    seconds: Mutex<[Histogram; 2]>,
}

/// Which of the two kinds of registry calls took how long.
#[derive(Clone, Debug)]
pub struct RegistrySeconds {
    /// Gets and lists.
    pub read: Histogram,
    /// Transactions.
    pub write: Histogram,
}

impl Registrar for Store {
    fn get_record(&self, volume: VolumeId) -> Result<Option<Versioned<Record>>, RegistryError> {
        self.get(&volume_key(volume, RECORD))
    }

    fn cas_record(
        &self,
        volume: VolumeId,
        expected: Revision,
        record: &Record,
    ) -> Result<Revision, CasError> {
        let key = volume_key(volume, RECORD);
        let change = put(&key, record)?;
        self.txn(&[at(&key, expected)], &[change])
    }
}

impl Store {
    /// Over `registry`.
    pub fn new(registry: Arc<dyn Registry>) -> Self {
        Self {
            registry,
            seconds: Mutex::default(),
        }
    }

    /// How people name the registry.
    pub fn registry_name(&self) -> String {
        self.registry.name()
    }

    /// Says that the node's process lives, until the answer is dropped. A hint for people, never a fence.
    pub fn announce(&self, node: &NodeName) -> Result<Presence, RegistryError> {
        self.registry.announce(&node.0, PRESENCE)
    }

    /// Which nodes are announced.
    pub fn present(&self) -> Result<Present, RegistryError> {
        self.timed(0, || self.registry.present())
    }

    /// How long the registry's calls took so far.
    pub fn seconds(&self) -> RegistrySeconds {
        let [read, write] = self
            .seconds
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        RegistrySeconds { read, write }
    }

    /// Everything, at one instant.
    pub fn snapshot(&self) -> Result<Snapshot, RegistryError> {
        let listing = self.timed(0, || self.registry.list(""))?;
        Ok(Snapshot::of(&listing))
    }

    /// What a new volume in `namespace` depends on: nodes, namespaces, and the rules of this one; no volumes, of which there
    /// may be thousands. Each kind is of one instant.
    pub fn surroundings(&self, namespace: &str) -> Result<Snapshot, RegistryError> {
        let mut snapshot = Snapshot::default();
        let rules = format!("{RULES}{namespace}/");
        for prefix in [NODES, NAMESPACES, &rules] {
            snapshot.add(&self.timed(0, || self.registry.list(prefix))?);
        }
        Ok(snapshot)
    }

    /// One volume's keys, at one instant.
    pub fn of_volume(&self, volume: VolumeId) -> Result<Snapshot, RegistryError> {
        let prefix = volume_key(volume, "");
        let listing = self.timed(0, || self.registry.list(&prefix))?;
        Ok(Snapshot::of(&listing))
    }

    /// Every change after `from`; feed them to [`Snapshot::apply`].
    pub fn watch(&self, from: Revision) -> Result<Watch, RegistryError> {
        self.registry.watch("", from)
    }

    /// Every change of one volume's keys after `from`.
    pub fn watch_volume(&self, volume: VolumeId, from: Revision) -> Result<Watch, RegistryError> {
        self.registry.watch(&volume_key(volume, ""), from)
    }

    /// The cluster's own record.
    pub fn cluster(&self) -> Result<Option<Versioned<ClusterRecord>>, RegistryError> {
        self.get(CLUSTER)
    }

    /// Replaces the cluster's record if it is still at `expected`.
    pub fn cas_cluster(
        &self,
        expected: Revision,
        record: &ClusterRecord,
    ) -> Result<Revision, CasError> {
        let change = put(CLUSTER, record)?;
        self.txn(&[at(CLUSTER, expected)], &[change])
    }

    /// Makes the cluster's record if there is none.
    pub fn create_cluster(&self, record: &ClusterRecord) -> Result<(), CasError> {
        let change = put(CLUSTER, record)?;
        self.txn(&[absent(CLUSTER)], &[change]).map(drop)
    }

    /// One node.
    pub fn node(&self, name: &NodeName) -> Result<Option<Versioned<NodeRecord>>, RegistryError> {
        self.get(&node_key(name))
    }

    /// Writes a node's record if it is still at `expected` (`None`: absent).
    pub fn cas_node(
        &self,
        expected: Option<Revision>,
        record: &NodeRecord,
    ) -> Result<Revision, CasError> {
        let key = node_key(&record.name);
        let change = put(&key, record)?;
        self.txn(
            &[Guard {
                key: &key,
                expected,
            }],
            &[change],
        )
    }

    /// Removes a node's record if it is still at `expected`.
    pub fn remove_node(&self, name: &NodeName, expected: Revision) -> Result<Revision, CasError> {
        let key = node_key(name);
        self.txn(&[at(&key, expected)], &[gone(key.clone())])
    }

    /// The id behind a name.
    pub fn volume_id(&self, name: &VolumeName) -> Result<Option<VolumeId>, RegistryError> {
        Ok(self.get(&name_key(name))?.map(|(id, _)| id))
    }

    /// What people asked of a volume.
    pub fn spec(&self, volume: VolumeId) -> Result<Option<Versioned<VolumeSpec>>, RegistryError> {
        self.get(&volume_key(volume, SPEC))
    }

    /// Replaces the spec if it is still at `expected`.
    pub fn cas_spec(
        &self,
        volume: VolumeId,
        expected: Revision,
        spec: &VolumeSpec,
    ) -> Result<Revision, CasError> {
        let key = volume_key(volume, SPEC);
        let change = put(&key, spec)?;
        self.txn(&[at(&key, expected)], &[change])
    }

    /// Replaces both, or neither.
    pub fn cas_volume(
        &self,
        volume: VolumeId,
        spec: (&VolumeSpec, Revision),
        record: (&Record, Revision),
    ) -> Result<Revision, CasError> {
        let (spec_key, record_key) = (volume_key(volume, SPEC), volume_key(volume, RECORD));
        let changes = [put(&spec_key, spec.0)?, put(&record_key, record.0)?];
        self.txn(
            &[at(&spec_key, spec.1), at(&record_key, record.1)],
            &changes,
        )
    }

    /// Makes a namespace. A conflict means that it exists.
    pub fn create_namespace(&self, record: &NamespaceRecord) -> Result<Revision, CasError> {
        let key = namespace_key(&record.name);
        let change = put(&key, record)?;
        self.txn(&[absent(&key)], &[change])
    }

    /// Removes a namespace and its rules, if nothing was made in it since `record` (`None`: it has none) was read:
    /// whoever makes something in a namespace writes its record as well.
    pub fn remove_namespace(
        &self,
        name: &str,
        record: Option<Revision>,
        rules: &[Versioned<RuleRecord>],
    ) -> Result<Revision, CasError> {
        let keys: Vec<(String, Option<Revision>)> = rules
            .iter()
            .map(|(rule, revision)| (rule_key(&rule.full_name()), Some(*revision)))
            .chain([(namespace_key(name), record)])
            .collect();
        let guards: Vec<Guard<'_>> = keys
            .iter()
            .map(|(key, expected)| Guard {
                key,
                expected: *expected,
            })
            .collect();
        let changes: Vec<Change> = keys.iter().map(|(key, _)| gone(key.clone())).collect();
        self.txn(&guards, &changes)
    }

    /// One rule.
    pub fn rule(&self, name: &VolumeName) -> Result<Option<Versioned<RuleRecord>>, RegistryError> {
        self.get(&rule_key(name))
    }

    /// Writes a rule, and its namespace's record, if it is still at `expected` (`None`: absent).
    pub fn cas_rule(
        &self,
        expected: Option<Revision>,
        rule: &RuleRecord,
        namespace: Option<&NamespaceRecord>,
    ) -> Result<Revision, CasError> {
        let key = rule_key(&rule.full_name());
        let mut changes = vec![put(&key, rule)?];
        changes.extend(put_namespace(namespace)?);
        let guard = Guard {
            key: &key,
            expected,
        };
        self.txn(&[guard], &changes)
    }

    /// Removes a rule if it is still at `expected`.
    pub fn remove_rule(&self, name: &VolumeName, expected: Revision) -> Result<Revision, CasError> {
        let key = rule_key(name);
        self.txn(&[at(&key, expected)], &[gone(key.clone())])
    }

    /// Takes the name and writes spec, record and the namespace's record in one step. A conflict means that the name is
    /// taken.
    pub fn create_volume(
        &self,
        spec: &VolumeSpec,
        record: &Record,
        namespace: Option<&NamespaceRecord>,
    ) -> Result<Revision, CasError> {
        let volume = record.volume_id;
        let (name, spec_key, record_key) = (
            name_key(&spec.full_name()),
            volume_key(volume, SPEC),
            volume_key(volume, RECORD),
        );
        let mut changes = vec![
            put(&name, &volume)?,
            put(&spec_key, spec)?,
            put(&record_key, record)?,
        ];
        changes.extend(put_namespace(namespace)?);
        self.txn(
            &[absent(&name), absent(&spec_key), absent(&record_key)],
            &changes,
        )
    }

    /// A node's answer in a creation; only while the record is still at `record`, so that none appears under a
    /// volume that was given up meanwhile.
    pub fn answer_creation(
        &self,
        volume: VolumeId,
        copy: CopyId,
        record: Revision,
        ready: &Ready,
    ) -> Result<Revision, CasError> {
        let (record_key, key) = (volume_key(volume, RECORD), ready_key(volume, copy));
        let change = put(&key, ready)?;
        self.txn(&[at(&record_key, record)], &[change])
    }

    /// Ends a creation: the record with all copies in sync, the nodes' answers gone.
    pub fn finish_creation(
        &self,
        expected: Revision,
        record: &Record,
    ) -> Result<Revision, CasError> {
        let key = volume_key(record.volume_id, RECORD);
        let mut changes = vec![put(&key, record)?];
        changes.extend(
            record
                .copies
                .iter()
                .map(|c| gone(ready_key(record.volume_id, c.copy_id))),
        );
        self.txn(&[at(&key, expected)], &changes)
    }

    /// Removes all keys of a volume, if spec and record are as seen, and leaves a tombstone for its copies.
    pub fn remove_volume(
        &self,
        spec: (&VolumeSpec, Revision),
        record: (&Record, Revision),
        removed: u64,
    ) -> Result<Revision, CasError> {
        let volume = record.0.volume_id;
        let (name, spec_key, record_key) = (
            name_key(&spec.0.full_name()),
            volume_key(volume, SPEC),
            volume_key(volume, RECORD),
        );
        let tombstone = Tombstone {
            volume,
            name: spec.0.full_name().to_string(),
            copies: record
                .0
                .copies
                .iter()
                .map(|c| (c.node.clone(), c.copy_id))
                .collect(),
            removed,
        };
        let mut changes = vec![
            gone(name),
            gone(spec_key.clone()),
            gone(record_key.clone()),
            put(&removed_key(volume), &tombstone)?,
        ];
        changes.extend(
            record
                .0
                .copies
                .iter()
                .map(|c| gone(ready_key(volume, c.copy_id))),
        );
        self.txn(
            &[at(&spec_key, spec.1), at(&record_key, record.1)],
            &changes,
        )
    }

    /// Notes that `node` holds nothing of a removed volume any more; the last node's note ends the tombstone.
    pub fn copy_removed(&self, volume: VolumeId, node: &NodeName) -> Result<(), CasError> {
        let key = removed_key(volume);
        self.retry(|| {
            let Some((mut tombstone, revision)) = self.get::<Tombstone>(&key)? else {
                return Ok(());
            };
            tombstone.copies.retain(|(n, _)| n != node);
            let change = if tombstone.copies.is_empty() {
                gone(key.clone())
            } else {
                put(&key, &tombstone)?
            };
            self.txn(&[at(&key, revision)], &[change]).map(drop)
        })
    }

    /// Runs `attempt` again while it loses races or its outcome is unknown. `attempt` reads first, so that a change
    /// of its own that went through unnoticed is seen and not made twice.
    pub fn retry<T, E>(&self, mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E>
    where
        E: MaybeRace,
    {
        let mut round = 1;
        loop {
            match attempt() {
                Err(e) if e.is_race() && round < ROUNDS_MAX => {
                    std::thread::sleep(ROUND_PAUSE * round);
                    round += 1;
                }
                other => return other,
            }
        }
    }

    fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<Versioned<T>>, RegistryError> {
        match self.timed(0, || self.registry.get(key))? {
            Some(entry) => decode(key, &entry).map(Some),
            None => Ok(None),
        }
    }

    fn txn(&self, guards: &[Guard<'_>], changes: &[Change]) -> Result<Revision, CasError> {
        self.timed(1, || self.registry.txn(guards, changes))
    }

    fn timed<T>(&self, kind: usize, call: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = call();
        let mut seconds = self.seconds.lock().unwrap_or_else(PoisonError::into_inner);
        seconds[kind].observe(begun.elapsed().as_secs_f64());
        result
    }
}

/// An error that may mean no more than that someone else was faster.
pub trait MaybeRace {
    /// Whether reading again and trying again is the answer.
    fn is_race(&self) -> bool;
}

impl MaybeRace for CasError {
    fn is_race(&self) -> bool {
        matches!(self, Self::Conflict { .. } | Self::Ambiguous { .. })
    }
}

/// A failure in which losing a race is told apart.
pub enum Race {
    /// From the registry's compare-and-swap.
    Cas(CasError),
    /// Anything else: final.
    Fault(Fault),
}

impl From<CasError> for Race {
    fn from(error: CasError) -> Self {
        Self::Cas(error)
    }
}

impl From<RegistryError> for Race {
    fn from(error: RegistryError) -> Self {
        Self::Fault(error.into())
    }
}

impl From<Fault> for Race {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<Race> for Fault {
    fn from(race: Race) -> Self {
        match race {
            Race::Cas(e) => e.into(),
            Race::Fault(fault) => fault,
        }
    }
}

impl MaybeRace for Race {
    fn is_race(&self) -> bool {
        matches!(self, Self::Cas(e) if e.is_race())
    }
}

pub(super) fn decode<T: DeserializeOwned>(
    key: &str,
    entry: &Entry,
) -> Result<Versioned<T>, RegistryError> {
    serde_json::from_slice(&entry.value)
        .map(|value| (value, entry.revision))
        .map_err(|e| RegistryError::Malformed {
            key: key.into(),
            why: e.to_string(),
        })
}

fn put<T: Serialize>(key: &str, value: &T) -> Result<Change, RegistryError> {
    let bytes = serde_json::to_vec(value).map_err(|e| RegistryError::Malformed {
        key: key.into(),
        why: e.to_string(),
    })?;
    Ok(Change {
        key: key.into(),
        value: Some(bytes),
    })
}

fn put_namespace(record: Option<&NamespaceRecord>) -> Result<Option<Change>, RegistryError> {
    record.map(|r| put(&namespace_key(&r.name), r)).transpose()
}

fn gone(key: String) -> Change {
    Change { key, value: None }
}

fn at(key: &str, revision: Revision) -> Guard<'_> {
    Guard {
        key,
        expected: Some(revision),
    }
}

fn absent(key: &str) -> Guard<'_> {
    Guard {
        key,
        expected: None,
    }
}
