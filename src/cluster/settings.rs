//! A volume's settings: from flags and labels to checked values.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::fault::Fault;
use super::labels;
use super::model::Labels;
use crate::replication::failure_mode::FailureMode;
use crate::replication::ids::{NodeName, REPLICAS_MAX, SECTOR};

/// The smallest volume, in bytes. Below it a partition table and one file system do not fit.
pub const SIZE_MIN: u64 = 1 << 20;
/// The largest volume, in bytes: a chunk's index is 32 bits wide, and 64 TiB keeps bitmaps within 128 MiB a peer.
pub const SIZE_MAX: u64 = crate::replication::ids::VOLUME_MAX;
/// How long a volume that may not serve holds its requests (PROTOCOL 7).
pub const SUSPEND_DEADLINE: Duration = Duration::from_secs(30);
/// The longest deadline: a guest whose disk hangs for an hour is better told.
pub const SUSPEND_DEADLINE_MAX: Duration = Duration::from_secs(3600);
/// Virtqueues of an attachment that asks for none in particular: what QEMU's examples use.
pub const NUM_QUEUES: u16 = 1;
/// The most virtqueues of one attachment: more than one a virtual CPU gains nothing, and each takes memory.
pub const NUM_QUEUES_MAX: u16 = 64;
/// Logical block size of a new volume, in bytes: every guest boots from it.
pub const BLOCK_SIZE: u32 = 512;

/// What people may say about a volume; `None`: not said. Flags and labels fill it, flags first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Wishes {
    /// R.
    pub replicas: Option<u8>,
    /// `hard`, `soft`, `alwayson` or 0..5 (tolerance of `soft`).
    pub failure_mode: Option<String>,
    /// How many replicas `soft` may lose.
    pub failure_tolerance: Option<u8>,
    /// In milliseconds.
    pub suspend_deadline_ms: Option<u64>,
    /// Whether the wire is compressed.
    pub compress: Option<bool>,
    /// The node that should hold the master.
    pub master: Option<NodeName>,
}

impl Wishes {
    /// What the labels say.
    pub fn of_labels(labels: &Labels) -> Result<Self, Fault> {
        let get = |key: &str| labels.get(&format!("{}{key}", labels::PREFIX));
        let number = |key: &str| -> Result<Option<u8>, Fault> {
            get(key)
                .map(|text| {
                    text.parse().map_err(|_| {
                        Fault::input(format!(
                            "label {}{key}={text}: not a number",
                            labels::PREFIX
                        ))
                    })
                })
                .transpose()
        };
        Ok(Self {
            replicas: number("replicas")?,
            failure_mode: get("failure-mode").cloned(),
            failure_tolerance: number("failure-tolerance")?,
            suspend_deadline_ms: None,
            compress: get("nocompress").map(|v| !labels::is_true(v)),
            master: get("hint.master").map(|name| NodeName(name.clone())),
        })
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// These wishes, and `other`'s where these say nothing.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        // Mode and tolerance are one setting: the stronger source's is not bent by half of the weaker one's.
        let (mode, tolerance) = match (self.failure_mode, self.failure_tolerance) {
            (None, None) => (other.failure_mode, other.failure_tolerance),
            own => own,
        };
        Self {
            replicas: self.replicas.or(other.replicas),
            failure_mode: mode,
            failure_tolerance: tolerance,
            suspend_deadline_ms: self.suspend_deadline_ms.or(other.suspend_deadline_ms),
            compress: self.compress.or(other.compress),
            master: self.master.or(other.master),
        }
    }

    /// These wishes without those that `other` speaks of.
    #[must_use]
    pub fn without(self, other: &Self) -> Self {
        let mode = other.failure_mode.is_none() && other.failure_tolerance.is_none();
        Self {
            replicas: self.replicas.filter(|_| other.replicas.is_none()),
            failure_mode: self.failure_mode.filter(|_| mode),
            failure_tolerance: self.failure_tolerance.filter(|_| mode),
            suspend_deadline_ms: self
                .suspend_deadline_ms
                .filter(|_| other.suspend_deadline_ms.is_none()),
            compress: self.compress.filter(|_| other.compress.is_none()),
            master: self.master.filter(|_| other.master.is_none()),
        }
    }

    /// The failure mode wished for, `present` where nothing is said.
    pub fn failure_mode(&self, present: FailureMode) -> Result<FailureMode, Fault> {
        let mode = match &self.failure_mode {
            Some(text) => parse_failure_mode(text)?,
            None if self.failure_tolerance.is_some() => FailureMode::Soft(None),
            None => return Ok(present),
        };
        match (mode, self.failure_tolerance) {
            (_, Some(t)) if t > REPLICAS_MAX => Err(Fault::input(format!(
                "failure tolerance {t}: at most {REPLICAS_MAX}"
            ))),
            (FailureMode::Soft(None), t) => Ok(FailureMode::Soft(t)),
            (mode, None) => Ok(mode),
            (mode, Some(_)) => Err(Fault::input(format!(
                "a failure tolerance means nothing with the failure mode {}",
                mode
            ))
            .hint("use --failure-mode soft, or leave --failure-tolerance out")),
        }
    }

    /// Replicas wished for.
    pub fn replicas(&self) -> Result<Option<u8>, Fault> {
        match self.replicas {
            Some(r) if r > REPLICAS_MAX => Err(Fault::input(format!(
                "{r} replicas: a volume has 0 to {REPLICAS_MAX}"
            ))),
            other => Ok(other),
        }
    }

    /// The deadline wished for, in milliseconds.
    pub fn suspend_deadline_ms(&self) -> Result<Option<u64>, Fault> {
        match self.suspend_deadline_ms {
            Some(ms) if u128::from(ms) > SUSPEND_DEADLINE_MAX.as_millis() => {
                Err(Fault::input(format!(
                    "a suspend deadline of {}s: at most {}s",
                    ms / 1000,
                    SUSPEND_DEADLINE_MAX.as_secs()
                )))
            }
            other => Ok(other),
        }
    }
}

/// `hard`, `soft`, `alwayson`, or a number: soft with that tolerance.
pub fn parse_failure_mode(text: &str) -> Result<FailureMode, Fault> {
    match text.to_ascii_lowercase().as_str() {
        "hard" => Ok(FailureMode::Hard),
        "soft" => Ok(FailureMode::Soft(None)),
        "alwayson" => Ok(FailureMode::AlwaysOn),
        other => match other.parse::<u8>() {
            Ok(t) if t <= REPLICAS_MAX => Ok(FailureMode::Soft(Some(t))),
            _ => Err(Fault::input(format!(
                "'{text}' is not a failure mode: use hard, soft, alwayson or a tolerance of 0 to {REPLICAS_MAX}"
            ))),
        },
    }
}

/// A size that a volume may have.
pub fn check_size(size: u64) -> Result<u64, Fault> {
    if !size.is_multiple_of(SECTOR) {
        return Err(Fault::input(format!(
            "a size of {size} bytes is not a multiple of {SECTOR}"
        ))
        .hint("give the size in MiB or GiB"));
    }
    if !(SIZE_MIN..=SIZE_MAX).contains(&size) {
        return Err(Fault::input(format!(
            "a size of {} is out of range: 1 MiB to 64 TiB",
            super::units::show_size(size)
        )));
    }
    Ok(size)
}

/// A number of virtqueues that an attachment may have.
pub fn check_num_queues(n: u16) -> Result<u16, Fault> {
    if (1..=NUM_QUEUES_MAX).contains(&n) {
        Ok(n)
    } else {
        Err(Fault::input(format!(
            "{n} queues: an attachment has 1 to {NUM_QUEUES_MAX}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishes(mode: Option<&str>, tolerance: Option<u8>) -> Wishes {
        Wishes {
            failure_mode: mode.map(String::from),
            failure_tolerance: tolerance,
            ..Wishes::default()
        }
    }

    #[test]
    fn a_failure_mode_comes_of_mode_and_tolerance() {
        use FailureMode::{AlwaysOn, Hard, Soft};
        for (mode, tolerance, expected) in [
            (None, None, Some(AlwaysOn)), // the present one
            (Some("hard"), None, Some(Hard)),
            (Some("SOFT"), None, Some(Soft(None))),
            (Some("soft"), Some(2), Some(Soft(Some(2)))),
            (Some("3"), None, Some(Soft(Some(3)))),
            (None, Some(1), Some(Soft(Some(1)))),
            (Some("hard"), Some(1), None),
            (Some("3"), Some(1), None),
            (Some("6"), None, None),
            (Some("soft"), Some(6), None),
            (Some("maybe"), None, None),
        ] {
            let found = wishes(mode, tolerance).failure_mode(AlwaysOn).ok();
            assert_eq!(found, expected, "{mode:?} {tolerance:?}");
        }
    }

    #[test]
    fn flags_win_over_labels() {
        let labels = Labels::from([
            ("lockstep.io/replicas".into(), "2".into()),
            ("lockstep.io/failure-mode".into(), "soft".into()),
            ("lockstep.io/failure-tolerance".into(), "2".into()),
            ("lockstep.io/nocompress".into(), "true".into()),
        ]);
        let of_labels = Wishes::of_labels(&labels).unwrap();
        let both = wishes(Some("hard"), None).or(of_labels);
        assert_eq!(both.replicas, Some(2));
        assert_eq!(both.compress, Some(false));
        assert_eq!(
            both.failure_mode(FailureMode::AlwaysOn).unwrap(),
            FailureMode::Hard
        );
    }

    #[test]
    fn mode_and_tolerance_are_one_setting() {
        use FailureMode::{AlwaysOn, Hard, Soft};
        let none = (None, None);
        for (flags, labels, rules, expected) in [
            ((None, Some(1)), (Some("hard"), None), none, Soft(Some(1))),
            ((Some("hard"), None), (None, Some(2)), none, Hard),
            (none, (None, Some(2)), (Some("hard"), None), Soft(Some(2))),
            (none, none, (Some("soft"), Some(1)), Soft(Some(1))),
            (none, none, none, AlwaysOn), // the present one
        ] {
            let of = |(mode, tolerance)| wishes(mode, tolerance);
            let all = of(flags).or(of(labels)).or(of(rules));
            assert_eq!(all.failure_mode(AlwaysOn).unwrap(), expected, "{all:?}");
        }
    }

    #[test]
    fn what_is_said_anew_is_no_longer_as_it_was_said() {
        let before = Wishes {
            replicas: Some(2),
            compress: Some(true),
            ..wishes(Some("soft"), Some(1))
        };
        let left = before.clone().without(&wishes(None, Some(2)));
        assert_eq!((left.replicas, left.compress), (Some(2), Some(true)));
        assert_eq!((left.failure_mode, left.failure_tolerance), (None, None));
        assert!(before.clone().without(&before).is_empty());
        assert_eq!(before.clone().without(&Wishes::default()), before);
    }

    #[test]
    fn sizes_are_whole_sectors_within_bounds() {
        assert!(check_size(1 << 30).is_ok());
        for bad in [0, 513, SIZE_MIN - 512, SIZE_MAX + 512] {
            assert!(check_size(bad).is_err(), "{bad}");
        }
    }
}
