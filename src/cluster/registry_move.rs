//! A cluster's registry goes from a file to etcd, with no node running: the way from one machine to many.
//!
//! Two registries of one cluster would be two truths. So the file is locked against everybody first, the nodes it names
//! are asked whether they live all the same (the file may be a copy), etcd must hold nothing of anybody else's, and the
//! file is marked when all was read back: from then on no node opens it. Whenever this ends early, the file is what it
//! was, and the same command goes on.

use std::collections::BTreeMap;

use std::sync::Arc;

use serde::Serialize;

use super::fault::Fault;
use super::store::{CLUSTER, Store};
use super::whois::alive;
use crate::registry::{Access, CasError, Change, Entry, Guard, Location, Registry, Sqlite};
use crate::replication::ids::ClusterId;

/// Keys written in one transaction. etcd takes 128 operations unless it is told otherwise.
const BATCH_KEYS: usize = 64;
/// And bytes, unless a single value has more. etcd takes 1.5 MiB.
const BATCH_BYTES: usize = 512 << 10;

/// What was done.
#[derive(Debug, Serialize)]
pub struct Moved {
    /// Where the records were.
    pub from: String,
    /// Where they are.
    pub to: String,
    /// Whose they are.
    pub cluster: ClusterId,
    /// How many.
    pub keys: usize,
}

/// Moves all records of `from`, an SQLite file, to `to`, an etcd that holds none yet.
///
/// # Errors
///
/// What forbids it, and what to do. As long as it fails, `from` is the cluster's registry.
pub fn migrate(from: &Location, to: &Location, access: &Access) -> Result<Moved, Fault> {
    let (Location::Sqlite(path), Location::Etcd(_)) = (from, to) else {
        return Err(Fault::input(format!(
            "a registry is moved from sqlite: to etcd:, not from {from} to {to}"
        ))
        .hint("to move one etcd to other machines, replace its members one after the other"));
    };
    // Opening would make it.
    if !path.is_file() {
        return Err(Fault::not_found(format!("there is no registry {from}"))
            .hint("without --registry a node's is registry.db in its --data-dir"));
    }
    let source = Sqlite::open_alone(path)?.ok_or_else(|| {
        Fault::state(format!("the registry {from} is in use"))
            .hint("stop every node of the cluster first; a process that hangs counts as well")
    })?;
    let source = Arc::new(source);
    let store = Store::new(Arc::clone(&source) as Arc<dyn Registry>);
    let Some((cluster, _)) = store.cluster()? else {
        return Err(
            Fault::state(format!("the registry {from} is of no cluster yet")).hint(format!(
                "there is nothing to move: start the nodes with --registry {to}"
            )),
        );
    };
    for (node, _) in store.snapshot()?.nodes.values() {
        if let Some(how) = alive(cluster.id, node)? {
            return Err(
                Fault::state(format!("node {} of the cluster runs: {how}", node.name)).hint(
                    "stop every node of the cluster first; is FROM the file that they use, and no copy of it?",
                ),
            );
        }
    }
    let entries = source.list("")?.entries;
    let target = to.open(access)?;
    copy(&entries, &*target)?;
    verify(&entries, &*target)?;
    source.mark_moved(&to.to_string())?;
    Ok(Moved {
        from: from.to_string(),
        to: to.to_string(),
        cluster: cluster.id,
        keys: entries.len(),
    })
}

type Entries = [(String, Entry)];

fn values(registry: &dyn Registry) -> Result<BTreeMap<String, Vec<u8>>, Fault> {
    let entries = registry.list("")?.entries;
    Ok(entries.into_iter().map(|(k, e)| (k, e.value)).collect())
}

/// Writes what is not there yet. What is there must be what an earlier attempt wrote.
fn copy(entries: &Entries, target: &dyn Registry) -> Result<(), Fault> {
    let there = values(target)?;
    let ours: BTreeMap<&str, &[u8]> = entries
        .iter()
        .map(|(key, entry)| (key.as_str(), entry.value.as_slice()))
        .collect();
    if let Some((key, _)) = there
        .iter()
        .find(|(key, value)| ours.get(key.as_str()) != Some(&value.as_slice()))
    {
        return Err(
            Fault::state(format!("{} is not empty: it holds '{key}'", target.name())).hint(
                "is it another cluster's? Give this one a name of its own: …:2379/NAME; or remove what is there with \
                 etcdctl del --prefix",
            ),
        );
    }
    let missing = |of_cluster: bool| {
        entries
            .iter()
            .filter(move |(key, _)| (key == CLUSTER) == of_cluster)
            .filter(|(key, _)| !there.contains_key(key))
    };
    // What makes it a registry comes last: a node that is started on a half of one makes another cluster of it, which its
    // data directory refuses, and we notice.
    let mut batch: Vec<Change> = Vec::new();
    let mut bytes = 0;
    for (key, entry) in missing(false) {
        let len = key.len() + entry.value.len();
        if batch.len() == BATCH_KEYS || (bytes + len > BATCH_BYTES && !batch.is_empty()) {
            put(target, &std::mem::take(&mut batch))?;
            bytes = 0;
        }
        bytes += len;
        batch.push(change(key, entry));
    }
    put(target, &batch)?;
    let last: Vec<Change> = missing(true).map(|(k, e)| change(k, e)).collect();
    put(target, &last)
}

fn change(key: &str, entry: &Entry) -> Change {
    Change {
        key: key.into(),
        value: Some(entry.value.clone()),
    }
}

/// Writes keys that are absent. Of what becomes unknown the next attempt takes care.
fn put(target: &dyn Registry, changes: &[Change]) -> Result<(), Fault> {
    if changes.is_empty() {
        return Ok(());
    }
    let guards: Vec<Guard<'_>> = changes
        .iter()
        .map(|change| Guard {
            key: &change.key,
            expected: None,
        })
        .collect();
    match target.txn(&guards, changes) {
        Ok(_) => Ok(()),
        Err(CasError::Conflict { key, .. }) => Err(others(target, &key)),
        Err(CasError::Ambiguous { why }) => {
            Err(Fault::try_again(format!("the move was interrupted: {why}"))
                .hint("the same command goes on"))
        }
        Err(CasError::Registry(e)) => Err(e.into()),
    }
}

fn others(target: &dyn Registry, key: &str) -> Fault {
    Fault::state(format!(
        "somebody else writes to {}: '{key}' changed",
        target.name()
    ))
    .hint("stop whatever uses it, and remove what is there with etcdctl del --prefix; the old registry is as it was")
}

/// All is there, byte by byte, and nothing else.
fn verify(entries: &Entries, target: &dyn Registry) -> Result<(), Fault> {
    let mut there = values(target)?;
    for (key, entry) in entries {
        if there.remove(key).as_ref() != Some(&entry.value) {
            return Err(others(target, key));
        }
    }
    match there.keys().next() {
        Some(key) => Err(others(target, key)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Revision;

    fn entries(count: usize, len: usize) -> Vec<(String, Entry)> {
        let names = (0..count).map(|i| format!("volumes/{i:04}/record"));
        std::iter::once(CLUSTER.to_string())
            .chain(names)
            .map(|key| {
                let value = key.bytes().cycle().take(len).collect();
                let revision = Revision(7);
                (key, Entry { value, revision })
            })
            .collect()
    }

    fn empty() -> (tempfile::TempDir, Sqlite) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Sqlite::open(&dir.path().join("target.db")).unwrap();
        (dir, registry)
    }

    #[test]
    fn everything_is_copied_a_few_at_a_time_and_what_makes_it_a_registry_last() {
        // Many small values, and ones of which two do not fit into one transaction.
        for (count, len) in [(0, 3), (1, 3), (64, 3), (200, 3), (5, 400 << 10)] {
            let (_dir, target) = empty();
            let entries = entries(count, len);
            copy(&entries, &target).unwrap();
            verify(&entries, &target).unwrap();
            let cluster = target.get(CLUSTER).unwrap().unwrap();
            assert_eq!(cluster.revision, target.list("").unwrap().revision);
        }
    }

    #[test]
    fn an_interrupted_copy_goes_on_and_anything_else_is_refused() {
        let (_dir, target) = empty();
        let mut entries = entries(3, 10);
        let half = change(&entries[2].0, &entries[2].1);
        target.txn(&[], &[half]).unwrap();
        copy(&entries, &target).unwrap();
        // Done twice is done.
        let before = target.list("").unwrap().revision;
        copy(&entries, &target).unwrap();
        assert_eq!(target.list("").unwrap().revision, before);
        // Another value, and another key.
        entries[1].1.value.push(0);
        let key = entries[1].0.clone();
        let fault = copy(&entries, &target).unwrap_err();
        assert!(fault.message.contains(&key), "{fault}");
        assert!(
            verify(&entries, &target)
                .unwrap_err()
                .message
                .contains(&key)
        );
        entries[1].1.value.pop();
        target.cas("x", None, Some(b"1")).unwrap();
        assert!(copy(&entries, &target).is_err() && verify(&entries, &target).is_err());
        // Whatever appears while it runs is not overwritten.
        let fault = put(&target, &[change("x", &entries[1].1)]).unwrap_err();
        assert!(fault.message.contains("somebody else"), "{fault}");
        assert_eq!(target.get("x").unwrap().unwrap().value, b"1");
    }

    #[test]
    fn a_registry_is_moved_by_one_who_has_it_alone_and_then_opened_by_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.db");
        let user = Sqlite::open(&path).unwrap();
        user.cas("k", None, Some(b"v")).unwrap();
        assert!(Sqlite::open_alone(&path).unwrap().is_none());
        drop(user);
        let alone = Sqlite::open_alone(&path).unwrap().unwrap();
        let error = Sqlite::open(&path).err().unwrap().to_string();
        assert!(error.contains("is being moved"), "{error}");
        alone.mark_moved("etcd:http://a:2379").unwrap();
        assert_eq!(alone.get("k").unwrap().unwrap().value, b"v");
        drop(alone);
        for error in [
            Sqlite::open(&path).err().unwrap(),
            Sqlite::open_alone(&path).err().unwrap(),
        ] {
            let fault = Fault::from(error);
            assert!(fault.message.contains("etcd:http://a:2379"), "{fault}");
            let hint = fault.hint.unwrap();
            assert!(hint.contains("--registry etcd:http://a:2379"), "{hint}");
        }
    }
}
