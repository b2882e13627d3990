//! Records for the tables of tests.

use std::collections::BTreeMap;

use super::host::{AttachmentStatus, Capacity, Phase};
use super::live::{Identity, LocalStatus};
use super::model::{Creator, Labels, VolumeSpec};
use super::settings::Wishes;
use crate::replication::failure_mode::FailureMode;
use crate::replication::ids::{
    BootId, ClusterId, CopyId, Epoch, Instance, NodeName, Tag, VolumeId,
};
use crate::replication::record::{Base, CopyEntry, CopyStatus, Record, State};

/// A node's name.
pub fn node(name: &str) -> NodeName {
    NodeName(name.into())
}

/// The copy with this number.
pub fn copy(number: u8) -> CopyId {
    CopyId([number; 16])
}

/// A record from one word a copy: node, ':' and letters. `i` in sync, `m` missing, `b` blank, `r` removed; `l` leaving
/// besides. The copies are numbered from 1, the first one is the master, and as many replicas are wanted as there are
/// entries behind it.
pub fn record(copies: &str) -> Record {
    let copies: Vec<CopyEntry> = copies
        .split_whitespace()
        .enumerate()
        .map(|(i, word)| {
            let (name, state) = word.split_once(':').expect("NODE:STATE");
            let mut entry = CopyEntry::blank(copy(i as u8 + 1), node(name));
            entry.leaving = state.contains('l');
            entry.status = match &state[..1] {
                "i" => CopyStatus::InSync,
                "m" | "b" => CopyStatus::Missing,
                "r" => CopyStatus::Removed,
                other => panic!("what is a copy that is '{other}'?"),
            };
            if !state.starts_with('b') {
                entry.base = Base {
                    since: Epoch(1),
                    last: (!state.starts_with('i')).then_some(Epoch(3)),
                };
            }
            entry
        })
        .collect();
    Record {
        volume_id: VolumeId([1; 16]),
        size: 1 << 30,
        block_size: 512,
        replicas_wanted: copies.len() as u8 - 1,
        failure_mode: FailureMode::Soft(None),
        suspend_deadline_ms: 30_000,
        compress: true,
        epoch: Epoch(5),
        epoch_tag: Tag(7),
        state: State::Clean,
        attachment: None,
        master: copies[0].copy_id,
        preferred: None,
        grow: None,
        copies,
        lineage: vec![(Epoch(5), Tag(7))],
    }
}

/// What was asked of `default/vm1`: nothing.
pub fn spec() -> VolumeSpec {
    VolumeSpec {
        namespace: "default".into(),
        name: "vm1".into(),
        created: 0,
        labels: Labels::new(),
        from_rules: BTreeMap::new(),
        flags: Wishes::default(),
        attachment: None,
        scrub: None,
        creator: Creator {
            node: node("n1"),
            instance: Instance([1; 16]),
        },
    }
}

/// The answer of a node that holds and serves nothing.
pub fn status(name: &str) -> LocalStatus {
    LocalStatus {
        identity: Identity {
            cluster: ClusterId([1; 16]),
            node: node(name),
            instance: Instance([1; 16]),
        },
        boot_id: BootId([1; 16]),
        version: String::new(),
        started: 0,
        now: 0,
        run_dir: "/run".into(),
        capacity: Capacity::default(),
        copies_held: 0,
        copies: Vec::new(),
        attachments: Vec::new(),
        held: Vec::new(),
        reports: Vec::new(),
        scrubs: Vec::new(),
        ways: Vec::new(),
    }
}

/// What a node says of the volume it serves when nothing is special.
pub fn attachment(phase: Phase) -> AttachmentStatus {
    AttachmentStatus {
        volume: VolumeId([1; 16]),
        phase,
        why: String::new(),
        socket: None,
        connected: false,
        epoch: Epoch(5),
        copies: Vec::new(),
        inflight: 0,
        writeback: false,
        scrub: None,
    }
}
