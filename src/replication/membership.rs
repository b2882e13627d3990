//! Which copies count and which is the master: one pure function from the record and what the attachment knows of the
//! copies to the next record (PROTOCOL 2.6, 5, 6). It ejects, promotes, takes synced copies in and lets surplus ones go.

use super::copy_set::CopySet;
use super::ids::{BootId, Epoch, Tag};
use super::record::{Base, CopyStatus, Record};

/// What the attachment knows beside the record.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// In-sync copies that are lost.
    pub failing: CopySet,
    /// Absent copies that have everything, and every write since.
    pub synced: CopySet,
    /// Absent copies that are not worth waiting for: another one is nearer to being in sync.
    pub surplus: CopySet,
    /// Copies that take requests now, synced ones among them.
    pub ready: CopySet,
    /// The copy on the attachment's node.
    pub local: Option<usize>,
    /// Whether in-sync copies are known to be the same everywhere; until then copies are only ejected.
    pub settled: bool,
    /// Chooses among equals.
    pub random: u64,
}

/// The copies of a record with this status.
pub fn with_status(record: &Record, status: CopyStatus) -> CopySet {
    let of = |(i, c): (usize, &super::record::CopyEntry)| (c.status == status).then_some(i);
    record.copies.iter().enumerate().filter_map(of).collect()
}

/// The copy to read from: the operator's choice, else the one on the attachment's node, else any.
pub fn choose_master(
    record: &Record,
    among: CopySet,
    local: Option<usize>,
    random: u64,
) -> Option<usize> {
    let preferred = record
        .preferred
        .and_then(|id| record.copies.iter().position(|c| c.copy_id == id));
    preferred
        .into_iter()
        .chain(local)
        .find(|c| among.has(*c))
        .or_else(|| among.iter().nth(random as usize % among.len().max(1)))
}

/// The record with the membership that follows, in the same epoch still; `None` when nothing is to change, or when nobody can
/// tell yet who stays. Asked after every event, so it copies the record only for a change.
pub fn next(record: &Record, f: &Facts) -> Option<Record> {
    let in_sync = with_status(record, CopyStatus::InSync);
    let absent =
        with_status(record, CopyStatus::Missing).or(with_status(record, CopyStatus::Syncing));
    let leaving: CopySet = (0..record.copies.len())
        .filter(|c| record.copies[*c].leaving)
        .collect();
    let out = f.failing.and(in_sync);
    let left = in_sync.without(out);
    // Not in favour of a copy that is not there either.
    if left.and(f.ready).is_empty() || !f.settled && out.is_empty() {
        return None;
    }
    let (mut admitted, mut gone) = (CopySet::EMPTY, CopySet::EMPTY);
    if f.settled {
        admitted = f.synced.and(absent).without(leaving);
        let staying = left.or(admitted).without(leaving);
        gone = absent.and(leaving.or(f.surplus)).without(admitted);
        if staying.and(f.ready).len() > usize::from(record.replicas_wanted) {
            gone = gone.or(left.and(leaving)).or(absent.without(admitted));
        }
    }
    let members = left.or(admitted).without(gone);
    let place = |id| record.copies.iter().position(|c| c.copy_id == id);
    let kept = place(record.master).is_some_and(|m| members.has(m));
    let wanted = choose_master(record, members.and(f.ready), f.local, f.random)?;
    let asked_for = record.preferred == Some(record.copies[wanted].copy_id);
    let came_home = admitted.has(wanted) && f.local == Some(wanted);
    let master = if !kept || f.settled && (asked_for || came_home) {
        record.copies[wanted].copy_id
    } else {
        record.master
    };
    let present = |id| place(id).is_some_and(|c| members.or(absent).or(out).without(gone).has(c));
    let granted = |id| id == master || !present(id);
    let forget_wish = f.settled && record.preferred.is_some_and(granted);
    let changed = out.or(admitted).or(gone);
    if changed.is_empty() && master == record.master && !forget_wish {
        return None;
    }
    let mut next = record.clone();
    for copy in out.iter() {
        next.copies[copy].status = CopyStatus::Missing;
        next.copies[copy].base.last = Some(record.epoch);
    }
    for copy in admitted.iter() {
        next.copies[copy].status = CopyStatus::InSync;
    }
    for copy in gone.iter() {
        next.copies[copy].status = CopyStatus::Removed;
    }
    next.master = master;
    if forget_wish {
        next.preferred = None;
    }
    // S6: only members of the in-sync set are promoted.
    assert!(
        next.in_sync().any(|c| c.copy_id == next.master),
        "S6: the master is in sync"
    );
    Some(next)
}

/// What [`next`] made of `now`, in an epoch of its own. `boot`: under which boot a copy was synced, or a member is used on in spite
/// of a power cut.
pub fn enter(
    now: &Record,
    mut next: Record,
    (epoch, tag): (Epoch, Tag),
    boot: impl Fn(usize) -> Option<BootId>,
) -> Record {
    next.advance(epoch, tag);
    for (copy, entry) in next.copies.iter_mut().enumerate() {
        match (now.copies[copy].status, entry.status) {
            (CopyStatus::InSync, CopyStatus::InSync) => {
                entry.boot_id = boot(copy).or(entry.boot_id);
            }
            (_, CopyStatus::InSync) => {
                entry.base = Base {
                    since: epoch,
                    last: None,
                };
                entry.boot_id = boot(copy);
            }
            _ => {}
        }
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::failure_mode::FailureMode;
    use crate::replication::ids::{CopyId, NodeName, VolumeId};
    use crate::replication::record::{CopyEntry, State};

    /// One letter a copy: I in sync, M missing, R removed; lower case: leaving. The master is the first in-sync one.
    fn record(copies: &str, replicas_wanted: u8) -> Record {
        let copies: Vec<CopyEntry> = copies
            .chars()
            .enumerate()
            .map(|(i, c)| CopyEntry {
                copy_id: CopyId([i as u8; 16]),
                node: NodeName(format!("n{i}")),
                status: match c.to_ascii_uppercase() {
                    'I' => CopyStatus::InSync,
                    'M' => CopyStatus::Missing,
                    _ => CopyStatus::Removed,
                },
                base: Base {
                    since: Epoch(1),
                    last: None,
                },
                boot_id: None,
                leaving: c.is_ascii_lowercase(),
            })
            .collect();
        let master = copies.iter().find(|c| c.status == CopyStatus::InSync);
        Record {
            volume_id: VolumeId([1; 16]),
            size: 1 << 30,
            block_size: 512,
            replicas_wanted,
            failure_mode: FailureMode::AlwaysOn,
            suspend_deadline_ms: 0,
            compress: false,
            epoch: Epoch(5),
            epoch_tag: Tag(1),
            state: State::Active,
            attachment: None,
            master: master.unwrap().copy_id,
            preferred: None,
            grow: None,
            copies,
            lineage: Vec::new(),
        }
    }

    fn show(record: &Record) -> String {
        let letter = |c: &CopyEntry| {
            let l = match c.status {
                CopyStatus::InSync => 'I',
                CopyStatus::Missing | CopyStatus::Syncing => 'M',
                CopyStatus::Removed => 'R',
            };
            match (c.copy_id == record.master, c.leaving) {
                (true, _) => '*',
                (_, true) if l != 'R' => l.to_ascii_lowercase(),
                _ => l,
            }
        };
        record.copies.iter().map(letter).collect()
    }

    fn set(copies: &[usize]) -> CopySet {
        copies.iter().copied().collect()
    }

    #[test]
    fn each_state_of_the_copies_leads_to_the_membership_in_the_table() {
        let all = set(&[0, 1, 2, 3, 4]);
        let f = Facts {
            ready: all,
            settled: true,
            ..Facts::default()
        };
        let failing = |c: &[usize]| Facts {
            failing: set(c),
            ready: all.without(set(c)),
            ..f
        };
        let synced = |c: &[usize]| Facts {
            synced: set(c),
            ..f
        };
        // (copies, R, facts, what follows; the master as *)
        let table: &[(&str, u8, Facts, Option<&str>)] = &[
            ("III", 2, f, None),
            ("IIM", 2, f, None),
            ("III", 2, failing(&[2]), Some("*IM")),
            ("III", 2, failing(&[0]), Some("M*I")),
            ("III", 2, failing(&[0, 1]), Some("MM*")),
            ("III", 2, failing(&[0, 1, 2]), None),
            (
                "II",
                1,
                Facts {
                    ready: set(&[]),
                    ..failing(&[1])
                },
                None,
            ),
            ("IIM", 2, synced(&[2]), Some("*II")),
            // The replacement is in sync first: the one that was lost goes.
            ("IIMM", 2, synced(&[3]), Some("*IRI")),
            // The one that was lost is back first.
            ("IIMM", 2, synced(&[2]), Some("*IIR")),
            // Both race and one is farther away.
            (
                "IIMM",
                2,
                Facts {
                    surplus: set(&[3]),
                    ..f
                },
                Some("*IMR"),
            ),
            // A move: nothing goes before the new copy is in sync.
            ("IiM", 1, f, None),
            ("IiM", 1, synced(&[2]), Some("*RI")),
            ("iIM", 1, synced(&[2]), Some("R*I")),
            ("Iim", 1, f, Some("*iR")),
            // Fewer replicas wanted.
            ("IIi", 1, f, Some("*IR")),
            ("Iii", 0, f, Some("*RR")),
            ("IIM", 1, f, Some("*IR")),
            // Not while one that is to stay is away: it may be about to be ejected.
            (
                "IIi",
                1,
                Facts {
                    ready: set(&[0, 2]),
                    ..f
                },
                None,
            ),
            // A copy that is leaving is not taken in again.
            ("IIm", 2, synced(&[2]), Some("*IR")),
            // Nothing but ejections until copies are the same everywhere.
            (
                "IIi",
                1,
                Facts {
                    settled: false,
                    ..f
                },
                None,
            ),
            (
                "IIi",
                1,
                Facts {
                    settled: false,
                    ..failing(&[0])
                },
                Some("M*i"),
            ),
            // The copy on the attachment's node is the master as soon as it is in sync.
            (
                "IIM",
                2,
                Facts {
                    local: Some(2),
                    ..synced(&[2])
                },
                Some("II*"),
            ),
            (
                "III",
                2,
                Facts {
                    local: Some(2),
                    ..failing(&[0])
                },
                Some("MI*"),
            ),
        ];
        for (copies, wanted, facts, follows) in table {
            let now = record(copies, *wanted);
            let then = next(&now, facts).map(|r| show(&r));
            assert_eq!(then.as_deref(), *follows, "{copies} R={wanted} {facts:?}");
        }
    }

    #[test]
    fn who_is_taken_in_is_in_sync_from_the_new_epoch_on() {
        let mut now = record("IIMM", 3);
        now.copies[0].boot_id = Some(BootId([1; 16]));
        now.copies[1].boot_id = Some(BootId([1; 16]));
        now.copies[3].base.last = Some(Epoch(2));
        let f = Facts {
            synced: set(&[2]),
            ready: set(&[0, 1, 2]),
            settled: true,
            ..Facts::default()
        };
        let next = next(&now, &f).unwrap();
        let boots = [None, Some(BootId([7; 16])), Some(BootId([8; 16])), None];
        let next = enter(&now, next, (Epoch(9), Tag(90)), |c| boots[c]);
        let span = |since, last: Option<u64>| Base {
            since: Epoch(since),
            last: last.map(Epoch),
        };
        // (span, boot) of each copy: of a member, of one that is used under another boot, of the one taken in, of the absent one
        let follows = [
            (span(1, None), Some(BootId([1; 16]))),
            (span(1, None), boots[1]),
            (span(9, None), boots[2]),
            (span(1, Some(2)), None),
        ];
        for (entry, follows) in next.copies.iter().zip(follows) {
            assert_eq!((entry.base, entry.boot_id), follows, "{}", entry.node);
        }
        assert_eq!((next.epoch, next.epoch_tag), (Epoch(9), Tag(90)));
    }

    #[test]
    fn the_preferred_copy_becomes_the_master_when_it_can() {
        let f = Facts {
            ready: set(&[0, 1, 2]),
            settled: true,
            local: Some(0),
            ..Facts::default()
        };
        let mut r = record("IIM", 2);
        r.preferred = Some(CopyId([1; 16]));
        let after = next(&r, &f).unwrap();
        assert_eq!((show(&after).as_str(), after.preferred), ("I*M", None));
        // Not in sync yet: the wish stays.
        r.preferred = Some(CopyId([2; 16]));
        assert!(next(&r, &f).is_none());
        let synced = Facts {
            synced: set(&[2]),
            ..f
        };
        assert_eq!(show(&next(&r, &synced).unwrap()), "II*");
        // A wish that names no copy is dropped.
        r.preferred = Some(CopyId([9; 16]));
        assert_eq!(next(&r, &f).unwrap().preferred, None);
    }
}
