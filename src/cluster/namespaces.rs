//! Namespaces: who shares a cluster keeps volumes and rules apart by them.
//!
//! `default` is always there. Another one comes into being when somebody makes it, or with the first volume or rule in
//! it, as in StorageOS; it stays until it is removed, which is refused while it has volumes. Whatever makes something in
//! a namespace writes the namespace's record in the same transaction: so a removal that saw it empty loses the race.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::events::What;
use super::fault::{Code, Fault};
use super::model::{DEFAULT_NAMESPACE, NamespaceRecord, RuleRecord, check_name};
use super::plane::{Plane, whole_volumes};
use super::snapshot::Snapshot;
use super::store::{Race, Versioned};
use super::units::{show_time, wall_ms};
use crate::registry::CasError;

/// How many names of volumes a refusal lists.
const NAMED: usize = 5;

/// A namespace as people see it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceView {
    /// Its name.
    pub name: String,
    /// When it was made, UTC; `None`: it was always there, or is older than such records.
    pub created: Option<String>,
    /// The same in milliseconds since 1970.
    pub created_ms: Option<u64>,
    /// The names of its volumes.
    pub volumes: Vec<String>,
    /// The names of its rules.
    pub rules: Vec<String>,
}

/// All namespaces, in the order of their names.
pub fn list(snapshot: &Snapshot) -> Vec<NamespaceView> {
    let mut all: BTreeMap<&str, NamespaceView> = BTreeMap::new();
    all.entry(DEFAULT_NAMESPACE).or_default();
    for (record, _) in snapshot.namespaces.values() {
        let view = all.entry(&record.name).or_default();
        view.created = Some(show_time(record.created));
        view.created_ms = Some(record.created);
    }
    let volumes: BTreeSet<(&str, &str)> = whole_volumes(snapshot)
        .map(|(_, (spec, _), _)| (spec.namespace.as_str(), spec.name.as_str()))
        .collect();
    for (namespace, name) in volumes {
        all.entry(namespace).or_default().volumes.push(name.into());
    }
    for (rule, _) in snapshot.rules.values() {
        let view = all.entry(&rule.namespace).or_default();
        view.rules.push(rule.name.clone());
    }
    all.into_iter()
        .map(|(name, view)| NamespaceView {
            name: name.into(),
            ..view
        })
        .collect()
}

/// One namespace.
pub fn inspect(snapshot: &Snapshot, name: &str) -> Result<NamespaceView, Fault> {
    let found = list(snapshot).into_iter().find(|n| n.name == name);
    found.ok_or_else(|| missing(name))
}

fn missing(name: &str) -> Fault {
    Fault::not_found(format!("there is no namespace {name}")).hint("see: lockstep namespace ls")
}

/// The record to write with whatever is made in the namespace.
pub(super) fn record(snapshot: &Snapshot, name: &str) -> Option<NamespaceRecord> {
    if name == DEFAULT_NAMESPACE {
        return None;
    }
    let present = snapshot.namespaces.get(name).map(|(record, _)| record);
    Some(present.cloned().unwrap_or_else(|| NamespaceRecord {
        name: name.into(),
        created: wall_ms(),
    }))
}

/// Makes a namespace.
pub fn create(plane: &Plane, name: &str) -> Result<(), Fault> {
    check_name(name)?;
    let exists = || Fault::new(Code::Exists, format!("namespace {name} exists already"));
    if name == DEFAULT_NAMESPACE {
        return Err(exists());
    }
    let record = NamespaceRecord {
        name: name.into(),
        created: wall_ms(),
    };
    match plane.store.create_namespace(&record) {
        Ok(_) => {}
        Err(CasError::Conflict { .. }) => return Err(exists()),
        Err(e) => return Err(e.into()),
    }
    note(plane, name, "created");
    Ok(())
}

/// Removes a namespace and its rules; refused while it has volumes.
pub fn remove(plane: &Plane, name: &str) -> Result<(), Fault> {
    check_name(name)?;
    if name == DEFAULT_NAMESPACE {
        return Err(Fault::state(format!(
            "namespace {DEFAULT_NAMESPACE} is always there and cannot be removed"
        )));
    }
    let mut seen = false;
    plane
        .store
        .retry(|| {
            let snapshot = plane.store.snapshot()?;
            let namespace = match inspect(&snapshot, name) {
                Ok(namespace) => namespace,
                Err(_) if seen => return Ok(()), // our own unknown outcome, or another one's
                Err(fault) => return Err(Race::Fault(fault)),
            };
            seen = true;
            if !namespace.volumes.is_empty() {
                return Err(Race::Fault(in_use(&namespace)));
            }
            let record = snapshot.namespaces.get(name).map(|(_, revision)| *revision);
            let rules: Vec<Versioned<RuleRecord>> = snapshot
                .rules
                .values()
                .filter(|(rule, _)| rule.namespace == name)
                .cloned()
                .collect();
            plane.store.remove_namespace(name, record, &rules)?;
            Ok(())
        })
        .map_err(|race: Race| Fault::from(race))?;
    note(plane, name, "removed");
    Ok(())
}

fn in_use(namespace: &NamespaceView) -> Fault {
    let NamespaceView { name, volumes, .. } = namespace;
    let some: Vec<String> = volumes.iter().take(NAMED).cloned().collect();
    let more = match volumes.len().saturating_sub(NAMED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    let count = match volumes.len() {
        1 => "1 volume".to_string(),
        n => format!("{n} volumes"),
    };
    Fault::state(format!(
        "namespace {name} has {count}: {}{more}",
        some.join(", ")
    ))
    .hint(format!(
        "remove them first: lockstep volume rm -n {name} {}",
        volumes[0]
    ))
}

fn note(plane: &Plane, name: &str, word: &str) {
    plane
        .events
        .push(What::node("", word, "namespace").text(format!("namespace {name}")));
}
