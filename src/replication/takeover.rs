//! Who counts when a volume is taken over (PROTOCOL 5.2, 5.3): pure functions from the record and what the copies promised to
//! the record that claims it.

use super::copy_set::CopySet;
use super::ids::{BootId, Epoch, Tag};
use super::message::DiskState;
use super::mutants::{self, Mutant};
use super::record::{Attachment, CopyStatus, Record, State};

/// A copy that promised, and what its disk said then.
pub type Promised<'a> = (usize, &'a DiskState);

/// Why a copy that the record calls in sync cannot be: its disk tells another history.
pub fn misfit(record: &Record, epoch: Epoch, tag: Tag) -> Option<String> {
    let known = record.lineage.iter().find(|(e, _)| *e == epoch);
    if epoch > record.epoch {
        Some(format!(
            "its disk is in epoch {epoch}, the record in {}: is the registry an old one?",
            record.epoch
        ))
    } else if known.is_some_and(|(_, t)| *t != tag) {
        Some(format!("its disk is of another history of epoch {epoch}"))
    } else {
        None
    }
}

/// The members of the claim, of the in-sync copies that promised: who, under which boot, and whether its log can be read. `silent`:
/// others have not answered, and were waited for. `None`: there are too few to go on.
pub fn members(
    record: &Record,
    promised: impl Iterator<Item = (usize, BootId, bool)>,
    silent: bool,
) -> Option<CopySet> {
    let (mut whole, mut without_log, mut with_gap) =
        (CopySet::EMPTY, CopySet::EMPTY, CopySet::EMPTY);
    for (copy, boot_id, log) in promised {
        let known = record.copies[copy].boot_id;
        // Another boot than the one it was taken in under: unflushed completed writes may be gone (PROTOCOL 5).
        // After a clean detach there were none.
        let gap = record.state != State::Clean && known.is_some_and(|b| b != boot_id);
        if gap && !mutants::on(Mutant::HighestCounter) {
            with_gap.insert(copy)
        } else if log {
            whole.insert(copy)
        } else {
            without_log.insert(copy)
        }
    }
    // One that does not know where it may differ is compared whole by a sync, which reads only what is there; as a member only
    // when nobody else holds everything.
    let members = [whole, without_log, with_gap]
        .into_iter()
        .find(|set| !set.is_empty())
        .unwrap_or_default();
    // With too few to serve nothing is won by giving the others up: wait for them.
    let serves = record
        .failure_mode
        .serves(record.replicas_wanted, members.len());
    (!members.is_empty() && (!silent || serves)).then_some(members)
}

/// Whether the master stays: nothing is won by another one, unless that is on the attachment's node.
pub fn keeps_master(members: CopySet, master: usize, local: Option<usize>) -> bool {
    members.has(master) && local.is_none_or(|l| !members.has(l))
}

/// The record that makes `me` the attachment, with `members` in sync and `master`, in `epoch`.
pub fn claim<'a>(
    record: &Record,
    me: &Attachment,
    members: CopySet,
    promised: impl Iterator<Item = Promised<'a>>,
    master: usize,
    (epoch, tag): (Epoch, Tag),
) -> Record {
    let mut next = record.clone();
    for entry in (0..next.copies.len()).filter(|c| !members.has(*c)) {
        let entry = &mut next.copies[entry];
        if entry.status == CopyStatus::InSync {
            entry.status = CopyStatus::Missing;
            entry.base.last = Some(record.epoch);
        }
    }
    let mut clean = record.state == State::Clean;
    for (copy, disk) in promised.filter(|(c, _)| members.has(*c)) {
        clean &= disk.clean;
        next.copies[copy].boot_id = Some(disk.boot_id);
    }
    next.master = next.copies[master].copy_id;
    next.attachment = Some(me.clone());
    next.state = if clean || members.len() == 1 {
        State::Active
    } else {
        State::Recovering
    };
    next.advance(epoch, tag);
    next
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::failure_mode::FailureMode::{self, *};
    use crate::replication::ids::{CopyId, Instance, NodeName, VolumeId};
    use crate::replication::record::{Base, CopyEntry};

    const BOOT: BootId = BootId([1; 16]);
    const OTHER: BootId = BootId([2; 16]);

    /// One letter a copy: I in sync, M missing. In epoch 5, which has tag 50, after 4 with tag 40.
    fn record(copies: &str, mode: FailureMode, state: State) -> Record {
        let entry = |(i, c): (usize, char)| CopyEntry {
            copy_id: CopyId([i as u8; 16]),
            node: NodeName(format!("n{i}")),
            status: match c {
                'I' => CopyStatus::InSync,
                _ => CopyStatus::Missing,
            },
            base: Base {
                since: Epoch(1),
                last: (c != 'I').then_some(Epoch(3)),
            },
            boot_id: Some(BOOT),
            leaving: false,
        };
        Record {
            volume_id: VolumeId([1; 16]),
            size: 1 << 30,
            block_size: 512,
            replicas_wanted: copies.len() as u8 - 1,
            failure_mode: mode,
            suspend_deadline_ms: 0,
            compress: false,
            epoch: Epoch(5),
            epoch_tag: Tag(50),
            state,
            attachment: None,
            master: CopyId([0; 16]),
            preferred: None,
            grow: None,
            copies: copies.chars().enumerate().map(entry).collect(),
            lineage: vec![(Epoch(4), Tag(40)), (Epoch(5), Tag(50))],
        }
    }

    #[test]
    fn a_disk_that_tells_another_history_does_not_fit() {
        let r = record("II", Hard, State::Active);
        // (epoch, tag on the disk, fits)
        for (epoch, tag, fits) in [
            (5, 50, true),
            (4, 40, true),
            (4, 50, false),
            (5, 51, false),
            (6, 60, false),
            // Older than the record remembers: nothing is known against it.
            (1, 10, true),
        ] {
            let why = misfit(&r, Epoch(epoch), Tag(tag));
            assert_eq!(why.is_none(), fits, "epoch {epoch}, tag {tag}: {why:?}");
        }
    }

    #[test]
    fn the_promises_of_the_table_make_these_members() {
        use State::{Active, Clean};
        // (state, mode, promised: . under the boot known, ! under another one, ? without its log; others silent; members)
        let table: &[(State, FailureMode, &str, bool, Option<&str>)] = &[
            (Active, Soft(None), "...", false, Some("...")),
            (Active, Soft(None), ".-.", true, Some("..")),
            // Soft tolerates the loss of one.
            (Active, Soft(None), ".--", true, None),
            (Active, AlwaysOn, ".--", true, Some(".")),
            (Active, Hard, ".-.", true, None),
            // Refused for good, not silent: nobody else is waited for.
            (Active, Hard, ".-.", false, Some("..")),
            (Active, AlwaysOn, "---", true, None),
            (Active, AlwaysOn, "---", false, None),
            // A gap counts only when there is nobody without.
            (Active, Soft(None), "!..", false, Some("..")),
            (Active, Soft(None), "!!.", false, Some(".")),
            (Active, Soft(None), "!!!", false, Some("!!!")),
            (Active, Soft(None), "!-!", true, Some("!!")),
            // One without its log is a member only when nobody has both.
            (Active, Soft(None), "?..", false, Some("..")),
            (Active, AlwaysOn, "?-.", true, Some(".")),
            (Active, Soft(None), "???", false, Some("???")),
            (Active, AlwaysOn, "?!!", false, Some("?")),
            // Nothing was unflushed.
            (Clean, Soft(None), "!..", false, Some("!..")),
        ];
        for &(state, mode, promised, silent, follows) in table {
            let r = record("III", mode, state);
            let boot = |(i, c)| match c {
                '.' => Some((i, BOOT, true)),
                '!' => Some((i, OTHER, true)),
                '?' => Some((i, BOOT, false)),
                _ => None,
            };
            let voters = promised.chars().enumerate().filter_map(boot);
            let members = members(&r, voters, silent).map(|m| {
                let letters = promised.char_indices().filter(|(i, _)| m.has(*i));
                letters.map(|(_, c)| c).collect::<String>()
            });
            assert_eq!(members.as_deref(), follows, "{state:?} {mode:?} {promised}");
        }
    }

    #[test]
    fn a_claim_leaves_out_who_did_not_promise_and_recovers_unless_all_were_left_clean() {
        let me = Attachment {
            node: NodeName("n1".into()),
            boot_id: BOOT,
            instance: Instance([7; 16]),
        };
        let disk = |clean, boot_id| DiskState {
            promised: Epoch(8),
            probe: false,
            epoch: Epoch(5),
            tag: Tag(50),
            boot_id,
            clean,
            regions: Some(Vec::new()),
        };
        let left_clean = [disk(true, BOOT), disk(true, OTHER), disk(false, BOOT)];
        let in_epoch = (Epoch(8), Tag(80));
        let claimed = |state, members: &[usize]| {
            let promised = left_clean.iter().enumerate();
            let r = record("IIIM", Soft(None), state);
            let set = members.iter().copied().collect();
            claim(&r, &me, set, promised, members[0], in_epoch)
        };
        let r = claimed(State::Active, &[1, 2]);
        let statuses: Vec<CopyStatus> = r.copies.iter().map(|c| c.status).collect();
        use CopyStatus::{InSync, Missing};
        assert_eq!(statuses, [Missing, InSync, InSync, Missing]);
        assert_eq!(r.copies[0].base.last, Some(Epoch(5)));
        assert_eq!(r.copies[3].base.last, Some(Epoch(3)), "left long ago");
        assert_eq!(r.copies[1].boot_id, Some(OTHER));
        assert_eq!((r.epoch, r.epoch_tag), in_epoch);
        assert_eq!(r.lineage.last(), Some(&in_epoch));
        assert_eq!(
            (r.master, r.attachment),
            (CopyId([1; 16]), Some(me.clone()))
        );
        assert_eq!(r.state, State::Recovering);
        // (state before, members, state after)
        for (before, members, after) in [
            (State::Clean, &[0, 1][..], State::Active),
            (State::Clean, &[0, 1, 2], State::Recovering),
            (State::Active, &[0, 1], State::Recovering),
            (State::Active, &[0], State::Active),
        ] {
            assert_eq!(claimed(before, members).state, after, "{members:?}");
        }
    }
}
