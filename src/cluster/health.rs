//! A volume's health in one word, and why: a pure function of its record and of what nodes say.

use serde::{Deserialize, Serialize};

use super::fault::Fault;
use super::host::{AttachmentStatus, CopyState, Phase};
use super::model::Desired;
use super::settings::show_failure_mode;
use super::units::show_size;
use crate::replication::ids::NodeName;
use crate::replication::record::{CopyStatus, Record, State};

/// The five words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Master and all replicas in sync.
    Healthy,
    /// A copy is being made or brought up to date; it serves.
    Syncing,
    /// It serves, or could, with fewer replicas than asked for.
    Degraded,
    /// Its failure mode forbids serving.
    Suspended,
    /// It cannot be served.
    Offline,
}

impl Health {
    /// All words, best first.
    pub const ALL: [Self; 5] = [
        Self::Healthy,
        Self::Syncing,
        Self::Degraded,
        Self::Suspended,
        Self::Offline,
    ];

    /// The word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Syncing => "syncing",
            Self::Degraded => "degraded",
            Self::Suspended => "suspended",
            Self::Offline => "offline",
        }
    }
}

/// What is known of a volume.
pub struct Facts<'a> {
    /// Its record.
    pub record: &'a Record,
    /// Where it should be served.
    pub desired: Option<&'a Desired>,
    /// What the node that should serve it says, or why it says nothing; `None` when nothing is desired.
    pub serving: Option<Result<Option<&'a AttachmentStatus>, String>>,
    /// Why that node failed to serve it.
    pub failure: Option<&'a Fault>,
    /// Nodes of its copies that do not answer.
    pub unreachable: &'a [NodeName],
}

/// The word and one sentence why; the sentence is empty when all is well.
pub fn assess(facts: &Facts<'_>) -> (Health, String) {
    if facts.record.state == State::Creating {
        return (Health::Syncing, "its copies are being made".into());
    }
    match (facts.desired, &facts.serving) {
        (Some(desired), Some(Err(why))) => (
            Health::Offline,
            format!(
                "it is attached on {}, which cannot be reached ({why})",
                desired.node
            ),
        ),
        (Some(desired), Some(Ok(None)) | None) => {
            let why = facts
                .failure
                .map_or("it has not begun to", |f| f.message.as_str());
            (
                Health::Offline,
                format!("{} does not serve it: {why}", desired.node),
            )
        }
        (Some(_), Some(Ok(Some(attachment)))) => attached(facts.record, attachment),
        (None, _) => detached(facts),
    }
}

fn attached(record: &Record, attachment: &AttachmentStatus) -> (Health, String) {
    let why = |default: &str| {
        if attachment.why.is_empty() {
            default.to_string()
        } else {
            attachment.why.clone()
        }
    };
    match attachment.phase {
        Phase::Acquiring => (Health::Offline, why("it is being taken over")),
        Phase::Fenced => (Health::Offline, why("another attachment took it over")),
        Phase::Suspended => (
            Health::Suspended,
            why(&suspended(record, record.in_sync().count())),
        ),
        Phase::Recovering => (
            Health::Syncing,
            why("the regions in which copies may differ are being decided"),
        ),
        Phase::Serving => by_copies(record, attachment),
    }
}

fn by_copies(record: &Record, attachment: &AttachmentStatus) -> (Health, String) {
    let is = |state: &'static str| move |c: &&CopyState| c.state == state;
    let in_sync = attachment.copies.iter().filter(is("in_sync")).count();
    let wanted = usize::from(record.replicas_wanted) + 1;
    let rest: Vec<String> = attachment
        .copies
        .iter()
        .filter(|c| c.state != "in_sync")
        .map(describe)
        .collect();
    if in_sync >= wanted && rest.is_empty() {
        return (Health::Healthy, attachment.why.clone());
    }
    let why = if rest.is_empty() {
        format!("{} of {wanted} copies exist", attachment.copies.len())
    } else {
        rest.join("; ")
    };
    if attachment.copies.iter().any(|c| c.state == "syncing") {
        (Health::Syncing, why)
    } else if in_sync >= wanted {
        (Health::Healthy, why)
    } else {
        (Health::Degraded, why)
    }
}

fn describe(copy: &CopyState) -> String {
    let mut text = format!("the copy on {} is {}", copy.node, copy.state);
    if let Some(sync) = &copy.sync {
        text += &format!(", {} left", show_size(sync.remaining_bytes));
    }
    if !copy.lag.is_empty() {
        text += &format!(" ({})", copy.lag);
    }
    text
}

fn detached(facts: &Facts<'_>) -> (Health, String) {
    let record = facts.record;
    let usable = record
        .in_sync()
        .filter(|c| !facts.unreachable.contains(&c.node))
        .count();
    let reasons: Vec<String> = record
        .copies
        .iter()
        .filter_map(|c| {
            if facts.unreachable.contains(&c.node) {
                return Some(format!("{} cannot be reached", c.node));
            }
            match c.status {
                CopyStatus::InSync => None,
                CopyStatus::Syncing => Some(format!("the copy on {} is not up to date", c.node)),
                CopyStatus::Missing => Some(format!("the copy on {} is missing", c.node)),
                CopyStatus::Removed => None,
            }
        })
        .collect();
    let reasons = reasons.join("; ");
    if usable == 0 {
        return (
            Health::Offline,
            format!("no copy that is in sync can be reached: {reasons}"),
        );
    }
    if !record.failure_mode.serves(record.replicas_wanted, usable) {
        return (
            Health::Suspended,
            format!("{}: {reasons}", suspended(record, usable)),
        );
    }
    if usable < usize::from(record.replicas_wanted) + 1 {
        return (Health::Degraded, reasons);
    }
    (Health::Healthy, reasons)
}

fn suspended(record: &Record, in_sync: usize) -> String {
    format!(
        "failure mode {} forbids serving with {} of {} replicas",
        show_failure_mode(record.failure_mode),
        in_sync.saturating_sub(1),
        record.replicas_wanted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::failure_mode::FailureMode;
    use crate::replication::ids::{CopyId, Epoch, Tag, VolumeId};
    use crate::replication::record::{Base, CopyEntry};

    fn record(mode: FailureMode, copies: &[CopyStatus]) -> Record {
        let copies: Vec<CopyEntry> = copies
            .iter()
            .enumerate()
            .map(|(i, status)| CopyEntry {
                copy_id: CopyId([i as u8; 16]),
                node: NodeName(format!("n{}", i + 1)),
                status: *status,
                base: Base {
                    since: Epoch(1),
                    last: None,
                },
                boot_id: None,
                leaving: false,
            })
            .collect();
        Record {
            volume_id: VolumeId([1; 16]),
            size: 1 << 30,
            block_size: 512,
            replicas_wanted: copies.len() as u8 - 1,
            failure_mode: mode,
            suspend_deadline_ms: 30_000,
            compress: true,
            epoch: Epoch(1),
            epoch_tag: Tag(7),
            state: State::Clean,
            attachment: None,
            master: copies[0].copy_id,
            preferred: None,
            copies,
            lineage: vec![(Epoch(1), Tag(7))],
        }
    }

    #[test]
    fn a_detached_volume_is_as_well_as_its_reachable_copies() {
        use CopyStatus::{InSync, Missing};
        use FailureMode::{AlwaysOn, Hard, Soft};
        for (mode, copies, gone, expected) in [
            (Hard, vec![InSync, InSync], vec![], Health::Healthy),
            (Hard, vec![InSync, Missing], vec![], Health::Suspended),
            (Soft(None), vec![InSync, Missing], vec![], Health::Degraded),
            (
                Soft(None),
                vec![InSync, InSync],
                vec!["n2"],
                Health::Degraded,
            ),
            (
                AlwaysOn,
                vec![InSync, InSync, InSync],
                vec!["n1", "n2"],
                Health::Degraded,
            ),
            (AlwaysOn, vec![InSync, Missing], vec!["n1"], Health::Offline),
        ] {
            let record = record(mode, &copies);
            let gone: Vec<NodeName> = gone.iter().map(|n| NodeName(n.to_string())).collect();
            let (health, why) = assess(&Facts {
                record: &record,
                desired: None,
                serving: None,
                failure: None,
                unreachable: &gone,
            });
            assert_eq!(health, expected, "{mode:?} {copies:?} {gone:?}: {why}");
            assert_eq!(why.is_empty(), health == Health::Healthy, "{why}");
        }
    }

    #[test]
    fn an_attached_volume_is_as_its_attachment_says() {
        let record = record(FailureMode::Soft(None), &[CopyStatus::InSync; 2]);
        let desired = Desired {
            node: NodeName("n1".into()),
            socket: "/s".into(),
            num_queues: 1,
            read_only: false,
            release: None,
        };
        let copy = |i: u8, state: &str| CopyState {
            copy: CopyId([i; 16]),
            node: NodeName(format!("n{}", i + 1)),
            role: "replica".into(),
            state: state.into(),
            lag: String::new(),
            sync: None,
        };
        let status = |phase, second: &str| AttachmentStatus {
            volume: record.volume_id,
            phase,
            why: String::new(),
            socket: "/s".into(),
            connected: false,
            epoch: Epoch(2),
            copies: vec![copy(0, "in_sync"), copy(1, second)],
            inflight: 0,
        };
        for (status, expected) in [
            (Ok(Some(status(Phase::Serving, "in_sync"))), Health::Healthy),
            (Ok(Some(status(Phase::Serving, "syncing"))), Health::Syncing),
            (
                Ok(Some(status(Phase::Serving, "missing"))),
                Health::Degraded,
            ),
            (
                Ok(Some(status(Phase::Recovering, "in_sync"))),
                Health::Syncing,
            ),
            (
                Ok(Some(status(Phase::Suspended, "missing"))),
                Health::Suspended,
            ),
            (
                Ok(Some(status(Phase::Acquiring, "in_sync"))),
                Health::Offline,
            ),
            (Ok(Some(status(Phase::Fenced, "in_sync"))), Health::Offline),
            (Ok(None), Health::Offline),
            (Err("connection refused".to_string()), Health::Offline),
        ] {
            let (health, why) = assess(&Facts {
                record: &record,
                desired: Some(&desired),
                serving: Some(status.as_ref().map(Option::as_ref).map_err(Clone::clone)),
                failure: None,
                unreachable: &[],
            });
            assert_eq!(health, expected, "{status:?}: {why}");
            assert_eq!(why.is_empty(), health == Health::Healthy, "{why}");
        }
    }
}
