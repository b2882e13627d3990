//! What the registry holds about nodes and volumes, beside the record.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::host::Capacity;
use super::settings::Wishes;
use crate::replication::ids::{BootId, ClusterId, CopyId, Instance, NodeName, VolumeId};

/// Labels of a node or volume.
pub type Labels = BTreeMap<String, String>;

/// The namespace of a volume that names none.
pub const DEFAULT_NAMESPACE: &str = "default";
/// The longest name of a node, namespace or volume: a DNS label, and a socket path with two of them still fits the
/// kernel's 107 bytes.
pub const NAME_MAX: usize = 63;

/// A name that breaks the rules.
#[derive(Debug, thiserror::Error)]
#[error(
    "'{0}' is not a name: use 1 to 63 letters, digits, '-', '_' or '.', beginning with a letter or digit"
)]
pub struct BadName(pub String);

/// Checks the name of a node, namespace or volume. Names become file names and URL segments.
pub fn check_name(name: &str) -> Result<(), BadName> {
    let good = (1..=NAME_MAX).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if good {
        Ok(())
    } else {
        Err(BadName(name.into()))
    }
}

/// `namespace/name` of a volume.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName {
    /// Its namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
}

impl VolumeName {
    /// Checked parts.
    pub fn new(namespace: &str, name: &str) -> Result<Self, BadName> {
        check_name(namespace)?;
        check_name(name)?;
        Ok(Self {
            namespace: namespace.into(),
            name: name.into(),
        })
    }

    /// `NS/NAME`, or `NAME` in `namespace`.
    pub fn parse(text: &str, namespace: &str) -> Result<Self, BadName> {
        match text.split_once('/') {
            Some((ns, name)) => Self::new(ns, name),
            None => Self::new(namespace, text),
        }
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for VolumeName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        Self::parse(text, DEFAULT_NAMESPACE)
    }
}

/// One node, written by its process when it starts and refreshed with its capacity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub name: NodeName,
    /// The run of its process.
    pub instance: Instance,
    /// The boot of its kernel.
    pub boot_id: BootId,
    /// `HOST:PORT` where other nodes reach its replication.
    pub address: String,
    /// `HOST:PORT` where other nodes reach its HTTP.
    pub http: String,
    /// Its labels: those it was started with, as people changed them.
    pub labels: Labels,
    /// What people changed of its labels while it ran; `None`: taken away. Outlives the process.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub relabelled: BTreeMap<String, Option<String>>,
    /// It gets no copies, and none of its copies is made the master on purpose.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cordoned: bool,
    /// It is being emptied, or is empty and to stay so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining: Option<Draining>,
    /// The version it runs.
    pub version: String,
    /// When its process started, milliseconds since 1970.
    pub started: u64,
    /// Capacity at that time: a hint while the node is not reachable.
    pub capacity: Capacity,
}

impl NodeRecord {
    /// Takes over what people decided about the node of that name, whichever process runs as it.
    pub fn inherit(&mut self, before: &Self) {
        self.relabelled.clone_from(&before.relabelled);
        self.cordoned = before.cordoned;
        self.draining = before.draining;
        for (key, value) in &before.relabelled {
            match value {
                Some(value) => self.labels.insert(key.clone(), value.clone()),
                None => self.labels.remove(key),
            };
        }
    }
}

/// A node that every copy is to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draining {
    /// Since when, milliseconds since 1970.
    pub since: u64,
}

/// What people asked of a volume, beside what the record decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// When it was created, milliseconds since 1970.
    pub created: u64,
    /// The labels that people gave it.
    pub labels: Labels,
    /// The labels that rules gave it, when it was created or they were last applied.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub from_rules: RuleLabels,
    /// What was said by flags, which no label or rule overrides.
    #[serde(default, skip_serializing_if = "Wishes::is_empty")]
    pub flags: Wishes,
    /// Where it should be served.
    pub attachment: Option<Desired>,
    /// The comparison of its copies that was asked for and has not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubWish>,
    /// Who creates it: a record that stays in `Creating` is cleaned up when this process is gone.
    pub creator: Creator,
}

impl VolumeSpec {
    /// `namespace/name`.
    pub fn full_name(&self) -> VolumeName {
        VolumeName {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }

    /// All its labels; those that people gave win.
    pub fn all_labels(&self) -> Labels {
        let mut labels = values(&self.from_rules);
        labels.extend(self.labels.clone());
        labels
    }
}

/// A label that a rule set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FromRule {
    /// Its value.
    pub value: String,
    /// The rule's name in the volume's namespace.
    pub rule: String,
}

/// Labels with the rules that set them.
pub type RuleLabels = BTreeMap<String, FromRule>;

/// The same without the rules.
pub fn values(labels: &RuleLabels) -> Labels {
    let pair = |(k, v): (&String, &FromRule)| (k.clone(), v.value.clone());
    labels.iter().map(pair).collect()
}

/// A namespace that somebody made, or that was made with its first volume or rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceRecord {
    /// Its name.
    pub name: String,
    /// When it was made, milliseconds since 1970.
    pub created: u64,
}

/// What a rule does with its labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Sets them.
    #[default]
    Add,
    /// Takes away what rules of lower weight set: a label of this value, or of any if none is given here.
    Remove,
}

impl Action {
    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
        }
    }
}

/// A policy of a namespace: volumes that the selector selects get the labels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleRecord {
    /// Its namespace.
    pub namespace: String,
    /// Its name there.
    pub name: String,
    /// When it was created, milliseconds since 1970.
    pub created: u64,
    /// Which volumes; a [`super::selector::Selector`].
    pub selector: String,
    /// Add or remove.
    pub action: Action,
    /// Which labels.
    pub labels: Labels,
    /// Its turn: the lowest first, so that of two rules which set one label the heavier wins.
    pub weight: i32,
    /// Whether it is applied.
    pub active: bool,
}

impl RuleRecord {
    /// `namespace/name`.
    pub fn full_name(&self) -> VolumeName {
        VolumeName {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }
}

/// The process that carries out a creation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Creator {
    /// Its node.
    pub node: NodeName,
    /// The run of its process.
    pub instance: Instance,
}

/// A comparison of a volume's copies that somebody asked for. It is one process' task: when that ends, so does the scrub.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubWish {
    /// Names it: when it was asked for, and chance.
    pub id: u64,
    /// What differs is to become what the master holds.
    pub repair: bool,
    /// On this node.
    pub node: NodeName,
    /// By this run of its process.
    pub instance: Instance,
}

/// Where and how a volume should be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// On this node.
    pub node: NodeName,
    /// Listening there.
    pub socket: PathBuf,
    /// With so many virtqueues.
    pub num_queues: u16,
    /// Read-only.
    pub read_only: bool,
    /// Asked to stop. The node stops serving and then clears the whole attachment, or clears only this when it
    /// refuses, so that whoever asked learns the outcome from the spec alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<Release>,
    /// The machine may move there while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub successor: Option<Successor>,
}

/// Where a running machine may move to: the volume is served there, instead of where it is, as soon as the machine runs
/// there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Successor {
    /// On this node.
    pub node: NodeName,
    /// Listening there.
    pub socket: PathBuf,
}

/// A request to stop serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Even under a running virtual machine.
    pub force: bool,
}

/// One node's answer in a creation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The kernel boot under which the copy was made.
    pub boot_id: BootId,
    /// Why it could not be made.
    pub error: Option<String>,
}

/// What is left of a removed volume until every node deleted its copy. A node deletes data only when it sees this:
/// a missing record alone may also mean a registry that was restored from an old backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The volume.
    pub volume: VolumeId,
    /// Its name at the time.
    pub name: String,
    /// The copies still to be deleted.
    pub copies: Vec<(NodeName, CopyId)>,
    /// When it was removed, milliseconds since 1970.
    pub removed: u64,
}

/// The cluster's own key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Its identity.
    pub id: ClusterId,
    /// When it was made, milliseconds since 1970.
    pub created: u64,
    /// How long a missing copy is waited for before another node gets one, in milliseconds; 0: for ever.
    #[serde(default = "replace_after_ms")]
    pub replace_after_ms: u64,
    /// Since when people work on the nodes, milliseconds since 1970: no lost copy is replaced meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub maintenance: Option<u64>,
}

/// PROTOCOL 6: long enough for a node to be restarted, short enough not to be without a replica for long.
const REPLACE_AFTER_MS: u64 = 60_000;

fn replace_after_ms() -> u64 {
    REPLACE_AFTER_MS
}

impl ClusterRecord {
    /// A new cluster with the defaults.
    pub fn new(id: ClusterId, created: u64) -> Self {
        Self {
            id,
            created,
            replace_after_ms: REPLACE_AFTER_MS,
            maintenance: None,
        }
    }

    /// How long a missing copy is waited for; `None`: for ever.
    pub fn replace_after(&self) -> Option<Duration> {
        (self.replace_after_ms > 0).then(|| Duration::from_millis(self.replace_after_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_of_before_waits_as_long_as_a_new_one() {
        let id = ClusterId([1; 16]);
        let old = format!("{{\"id\": \"{id}\", \"created\": 5}}");
        let old: ClusterRecord = serde_json::from_str(&old).unwrap();
        assert_eq!(old, ClusterRecord::new(id, 5));
        assert_eq!(old.replace_after(), Some(Duration::from_secs(60)));
    }

    #[test]
    fn a_volume_is_named_with_or_without_its_namespace() {
        let name = VolumeName::parse("vm1", "prod").unwrap();
        assert_eq!(name.to_string(), "prod/vm1");
        assert_eq!(VolumeName::parse("a/b", "prod").unwrap().to_string(), "a/b");
        assert_eq!(
            "vm1".parse::<VolumeName>().unwrap().to_string(),
            "default/vm1"
        );
        let long = "x".repeat(NAME_MAX + 1);
        for bad in [
            "", "/", "a/", "/b", "a/b/c", "..", ".a", "-a", "a b", "ä", &long,
        ] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad}");
        }
    }
}
