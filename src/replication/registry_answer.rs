//! What a record read from the registry says to an attachment that holds one and may have proposed another (PROTOCOL 2.6): a pure
//! function, because an answer may be lost, late, or of a change that somebody else made.

use super::record::Record;

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Asked for before our last swap and answered after it: no news. Taken for somebody else's change it would fence the
    /// attachment that had made the newer one.
    Old,
    /// The proposal was swapped, although nobody had told us.
    Proposed,
    /// Somebody else changed who serves the volume.
    Superseded,
    /// Nobody took the volume. Either nothing changed, or the operator changed what is not the attachment's to decide.
    Held,
}

/// What `found` is to an attachment that holds `held`, each with its revision.
pub fn answer(held: (&Record, u64), proposed: Option<&Record>, found: (&Record, u64)) -> Answer {
    let same = |a: &Record, b: &Record| {
        (a.epoch, a.epoch_tag, a.state, &a.attachment)
            == (b.epoch, b.epoch_tag, b.state, &b.attachment)
    };
    if found.1 < held.1 {
        Answer::Old
    } else if proposed.is_some_and(|p| same(found.0, p)) {
        Answer::Proposed
    } else if !same(found.0, held.0) {
        Answer::Superseded
    } else {
        Answer::Held
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::failure_mode::FailureMode;
    use crate::replication::ids::{CopyId, Epoch, Tag, VolumeId};
    use crate::replication::record::State;

    fn record(epoch: u64, tag: u64) -> Record {
        Record {
            volume_id: VolumeId([1; 16]),
            size: 1 << 30,
            block_size: 512,
            replicas_wanted: 1,
            failure_mode: FailureMode::AlwaysOn,
            suspend_deadline_ms: 0,
            compress: false,
            epoch: Epoch(epoch),
            epoch_tag: Tag(tag),
            state: State::Active,
            attachment: None,
            master: CopyId([0; 16]),
            preferred: None,
            grow: None,
            copies: Vec::new(),
            lineage: Vec::new(),
        }
    }

    #[test]
    fn a_record_read_back_is_known_by_its_tag() {
        let (held, proposed) = (record(5, 50), record(6, 60));
        let mut edited = held.clone();
        edited.failure_mode = FailureMode::Hard;
        let mut activated = held.clone();
        activated.state = State::Recovering;
        // (found, its revision; ours is 9; what it is)
        for (found, revision, is) in [
            (&held, 9, Answer::Held),
            (&edited, 10, Answer::Held),
            (&proposed, 10, Answer::Proposed),
            // Of the same number, and another's.
            (&record(6, 61), 10, Answer::Superseded),
            (&record(7, 70), 11, Answer::Superseded),
            (&activated, 10, Answer::Superseded),
            (&record(4, 40), 8, Answer::Old),
        ] {
            let says = answer((&held, 9), Some(&proposed), (found, revision));
            assert_eq!(says, is, "epoch {} at {revision}", found.epoch);
        }
        let says = answer((&held, 9), None, (&proposed, 10));
        assert_eq!(says, Answer::Superseded, "nothing was proposed");
    }
}
