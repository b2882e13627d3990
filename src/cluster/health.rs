//! A volume's health in one word, and why: a pure function of its record and of what nodes say.

use serde::{Deserialize, Serialize};

use super::fault::Fault;
use super::host::{AttachmentStatus, CopyState, Phase};
use super::model::Desired;
use super::units::show_size;
use crate::replication::ids::NodeName;
use crate::replication::record::{CopyEntry, CopyStatus, Record, State};

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
    /// The attachment that looks after a detached volume's copies.
    pub tending: Option<&'a AttachmentStatus>,
    /// Why that node failed to serve it.
    pub failure: Option<&'a Fault>,
    /// Nodes of its copies that do not answer.
    pub unreachable: &'a [NodeName],
    /// Nodes that answer and do not have the copy that the record has in sync on them.
    pub lost: &'a [NodeName],
    /// Nodes that have a copy and cannot use it, and why.
    pub troubled: &'a [(NodeName, String)],
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
        (None, _) => match facts.tending {
            Some(a) if matches!(a.phase, Phase::Serving | Phase::Recovering) => {
                attached(facts.record, a)
            }
            _ => detached(facts),
        },
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
        Phase::Acquiring => (
            Health::Offline,
            with_waits(why("it is being taken over"), attachment),
        ),
        Phase::Fenced => (Health::Offline, why("another attachment took it over")),
        // As well as its copies: nobody asks for anything now.
        Phase::Waiting => by_copies(record, attachment),
        Phase::Suspended => (
            Health::Suspended,
            with_waits(
                why(&suspended(record, record.in_sync().count())),
                attachment,
            ),
        ),
        Phase::Recovering => (
            Health::Syncing,
            why("the regions in which copies may differ are being decided"),
        ),
        Phase::Serving => by_copies(record, attachment),
    }
}

/// The sentence, and which copies are waited for: those that hold every completed write and cannot be reached.
pub(super) fn with_waits(why: String, attachment: &AttachmentStatus) -> String {
    let waits: Vec<String> = attachment
        .copies
        .iter()
        .filter(|c| c.state == "in_sync" && !c.lag.is_empty())
        .map(|c| format!("the copy on {} ({})", c.node, c.lag))
        .collect();
    if waits.is_empty() {
        return why;
    }
    format!("{why}; it waits for {}", waits.join(" and "))
}

fn by_copies(record: &Record, attachment: &AttachmentStatus) -> (Health, String) {
    let is = |state: &'static str| move |c: &&CopyState| c.state == state;
    let copies = || attachment.copies.iter().filter(|c| c.state != "removed");
    let in_sync = copies().filter(is("in_sync")).count();
    let wanted = usize::from(record.replicas_wanted) + 1;
    let rest: Vec<String> = copies()
        .filter(|c| c.state != "in_sync")
        .map(describe)
        .collect();
    if in_sync >= wanted && rest.is_empty() {
        return (Health::Healthy, attachment.why.clone());
    }
    let why = if rest.is_empty() {
        format!("{in_sync} of {wanted} copies exist")
    } else {
        rest.join("; ")
    };
    if copies().any(|c| c.state == "syncing") {
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
    let trouble = |c: &CopyEntry| facts.troubled.iter().find(|(node, _)| *node == c.node);
    let gone = |c: &CopyEntry| {
        facts.unreachable.contains(&c.node) || facts.lost.contains(&c.node) || trouble(c).is_some()
    };
    let usable = record.in_sync().filter(|c| !gone(c)).count();
    let reasons: Vec<String> = record
        .present()
        .filter_map(|c| {
            if facts.unreachable.contains(&c.node) {
                return Some(format!("{} cannot be reached", c.node));
            }
            if let Some((node, why)) = trouble(c) {
                return Some(format!("the copy on {node} cannot be used: {why}"));
            }
            match c.status {
                CopyStatus::InSync if facts.lost.contains(&c.node) => Some(format!(
                    "the copy on {} is not on its disk (was it wiped?) and will be made anew",
                    c.node
                )),
                CopyStatus::InSync | CopyStatus::Removed => None,
                CopyStatus::Syncing => Some(format!("the copy on {} is not up to date", c.node)),
                CopyStatus::Missing => Some(format!("the copy on {} is missing", c.node)),
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
        record.failure_mode,
        in_sync.saturating_sub(1),
        record.replicas_wanted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::{copy, node, record};
    use crate::replication::failure_mode::FailureMode;
    use crate::replication::ids::Epoch;

    #[test]
    fn a_detached_volume_is_as_well_as_its_reachable_copies() {
        use FailureMode::{AlwaysOn, Hard, Soft};
        for (mode, copies, gone, expected) in [
            (Hard, "n1:i n2:i", vec![], Health::Healthy),
            // A word that begins with '!': its disk was wiped; with '?': its copy cannot be used.
            (Hard, "n1:i n2:i", vec!["?n2"], Health::Suspended),
            (Soft(None), "n1:i n2:m", vec!["?n2"], Health::Degraded),
            (Soft(None), "n1:i", vec!["?n1"], Health::Offline),
            (Hard, "n1:i n2:i", vec!["!n2"], Health::Suspended),
            (Soft(None), "n1:i n2:i", vec!["!n2"], Health::Degraded),
            (Soft(None), "n1:i n2:i", vec!["n1", "!n2"], Health::Offline),
            (Hard, "n1:i n2:m", vec![], Health::Suspended),
            (Soft(None), "n1:i n2:m", vec![], Health::Degraded),
            (Soft(None), "n1:i n2:i", vec!["n2"], Health::Degraded),
            (
                AlwaysOn,
                "n1:i n2:i n3:i",
                vec!["n1", "n2"],
                Health::Degraded,
            ),
            (AlwaysOn, "n1:i n2:m", vec!["n1"], Health::Offline),
        ] {
            let record = Record {
                failure_mode: mode,
                ..record(copies)
            };
            let named = |sign: char| -> Vec<NodeName> {
                let signed = |n: &&&str| n.chars().next().filter(|c| !c.is_alphabetic());
                let names = gone.iter().filter(|n| signed(n).unwrap_or(' ') == sign);
                names.map(|n| node(n.trim_start_matches(sign))).collect()
            };
            let troubled: Vec<(NodeName, String)> = named('?')
                .into_iter()
                .map(|n| (n, "no superblock is readable".into()))
                .collect();
            let (health, why) = assess(&Facts {
                record: &record,
                desired: None,
                serving: None,
                failure: None,
                tending: None,
                unreachable: &named(' '),
                lost: &named('!'),
                troubled: &troubled,
            });
            assert_eq!(health, expected, "{mode:?} {copies:?} {gone:?}: {why}");
            let said = why.contains("no superblock is readable");
            assert_eq!(said, !troubled.is_empty(), "{why}");
            assert_eq!(why.is_empty(), health == Health::Healthy, "{why}");
        }
    }

    #[test]
    fn an_attached_volume_is_as_its_attachment_says() {
        let record = record("n1:i n2:i");
        let desired = Desired {
            node: node("n1"),
            socket: "/s".into(),
            num_queues: 1,
            read_only: false,
            release: None,
            successor: None,
        };
        let state_of = |i: u8, state: &str| CopyState {
            copy: copy(i),
            node: node(&format!("n{i}")),
            role: "replica".into(),
            state: state.into(),
            lag: String::new(),
            sync: None,
        };
        let status = |phase, second: &str| AttachmentStatus {
            volume: record.volume_id,
            phase,
            why: String::new(),
            socket: Some("/s".into()),
            connected: false,
            epoch: Epoch(2),
            copies: vec![state_of(1, "in_sync"), state_of(2, second)],
            inflight: 0,
            writeback: true,
            scrub: None,
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
                tending: None,
                failure: None,
                unreachable: &[],
                lost: &[],
                troubled: &[],
            });
            assert_eq!(health, expected, "{status:?}: {why}");
            assert_eq!(why.is_empty(), health == Health::Healthy, "{why}");
        }
    }

    #[test]
    fn it_is_said_which_copies_an_attachment_waits_for() {
        let record = record("n1:i n2:i n3:m n4:r");
        let state_of = |i: u8, state: &str, lag: &str| CopyState {
            copy: copy(i),
            node: node(&format!("n{i}")),
            role: "replica".into(),
            state: state.into(),
            lag: lag.into(),
            sync: None,
        };
        let mut status = AttachmentStatus {
            volume: record.volume_id,
            phase: Phase::Acquiring,
            why: "the attachment is joining".into(),
            socket: Some("/s".into()),
            connected: false,
            epoch: Epoch(2),
            copies: vec![
                state_of(1, "in_sync", ""),
                state_of(2, "in_sync", "connection refused"),
                state_of(3, "missing", "silent for 2000 ms"),
                state_of(4, "removed", "it moved"),
            ],
            inflight: 0,
            writeback: true,
            scrub: None,
        };
        for phase in [Phase::Acquiring, Phase::Suspended] {
            status.phase = phase;
            let (_, why) = attached(&record, &status);
            assert_eq!(
                why,
                "the attachment is joining; it waits for the copy on n2 (connection refused)"
            );
        }
        status.phase = Phase::Serving;
        let (health, why) = attached(&record, &status);
        assert_eq!(health, Health::Degraded);
        assert_eq!(why, "the copy on n3 is missing (silent for 2000 ms)");
    }
}
