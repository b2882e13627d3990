//! What must hold in every state (PROTOCOL 9), and what some state must show, or the rest were true of nothing.

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::copy_state::Standing;
use lockstep::replication::record::State as RecordState;
use lockstep::replication::resync;
use stateright::Property;

use super::bounds::Bound;
use super::state::{CHUNKS, COPIES, Phase, Rule, State, Sync, has};

/// Whether attachment `a` would complete a read of chunk `k` now.
fn can_read(s: &State, a: usize, k: usize, b: &Bound) -> bool {
    let at = s.at(a);
    let asked = at.held.in_sync.iter().filter(|c| Some(*c) != at.local());
    let mistaken = b.makes(lockstep::replication::mutants::Mutant::ReadWithoutLease);
    at.phase == Phase::Serving
        && at.mode_serves()
        && !has(at.undecided, k)
        && s.ready(a).has(at.held.master)
        && (mistaken || asked.into_iter().all(|c| at.lease.has(c)))
}

fn s1(_: &Bound, s: &State) -> bool {
    let owns = |a: &usize| s.at(*a).owns();
    let key = |a: usize| (s.at(a).held.record.epoch, s.at(a).held.record.epoch_tag);
    let keys: Vec<_> = s.alive().filter(owns).map(key).collect();
    (1..keys.len()).all(|i| !keys[..i].contains(&keys[i]))
}

fn s8(b: &Bound, s: &State) -> bool {
    let newest = s
        .alive()
        .filter(|a| s.at(*a).phase == Phase::Serving)
        .last();
    let older = |a: &usize| newest.is_some_and(|n| *a < n);
    s.alive()
        .filter(older)
        .all(|a| (0..CHUNKS).all(|k| !can_read(s, a, k, b)))
}

fn s9(_: &Bound, s: &State) -> bool {
    let Some(a) = s
        .registry
        .record
        .attachment
        .filter(|a| s.attachments[*a].is_some())
    else {
        return true;
    };
    let at = s.at(a);
    let ready = s.ready(a);
    let one_value = |k: usize| {
        let mut values = ready.iter().map(|c| s.copies[c].data[k]);
        let first = values.next();
        values.all(|v| Some(v) == first)
    };
    at.phase != Phase::Serving
        || (0..CHUNKS).all(|k| has(at.undecided, k) || at.writes[k].is_some() || one_value(k))
}

fn s10(b: &Bound, s: &State) -> bool {
    s.broken != Some(Rule::S10)
        && s.alive().all(|a| {
            let master = s.at(a).held.master;
            let value = |k: usize| usize::from(s.copies[master].data[k]);
            (0..CHUNKS).all(|k| !can_read(s, a, k, b) || has(s.oracle.may[k], value(k)))
        })
}

/// `durable`: what is on the disk of `x` counts, otherwise what is read from it. Nothing between `x` and member `y` differs but
/// what is marked or in a log.
fn known(s: &State, x: usize, y: usize, durable: bool) -> bool {
    let (there, here) = (&s.copies[x], &s.copies[y]);
    let marks = if here.maps.has(x) {
        here.marked_on_disk[x]
    } else {
        0
    };
    let known = marks | here.log | there.log;
    let theirs = if durable { &there.on_disk } else { &there.data };
    let same = |k: usize| theirs[k] == here.data[k] && here.data[k] == here.on_disk[k];
    (0..CHUNKS).all(|k| has(known, k) || same(k))
}

/// Of every member and every copy that would get a delta.
fn all_known(s: &State, durable: bool) -> bool {
    let held = &s.registry.record;
    let gets_delta = |x: &usize| {
        s.copies[*x].standing != Standing::Failed
            && resync::delta(&held.record, *x, &s.disk_state(*x)).is_some()
    };
    let absent: CopySet = held.absent.iter().filter(gets_delta).collect();
    let mut pairs = held.in_sync.iter().flat_map(|y| {
        let others = absent.or(held.in_sync).without(CopySet::one(y));
        others.iter().map(move |x| (x, y))
    });
    pairs.all(|(x, y)| known(s, x, y, durable))
}

fn s11(_: &Bound, s: &State) -> bool {
    all_known(s, false)
}

fn s12(_: &Bound, s: &State) -> bool {
    all_known(s, true)
}

/// Of a rule that is checked at the step that may break it.
macro_rules! at_step {
    ($rule:ident) => {
        |_: &Bound, s: &State| s.broken != Some(Rule::$rule)
    };
}

fn syncs(s: &State) -> impl Iterator<Item = (usize, usize, &Sync)> {
    let of = move |a| (0..COPIES).filter_map(move |c| Some((a, c, s.at(a).syncs[c].as_ref()?)));
    s.alive().flat_map(of)
}

pub fn properties() -> Vec<Property<Bound>> {
    vec![
        Property::always("S1", s1),
        Property::always("S2", at_step!(S2)),
        Property::always("S3 and S4", at_step!(S3)),
        Property::always("S5", at_step!(S5)),
        Property::always("S6", at_step!(S6)),
        Property::always("S7", at_step!(S7)),
        Property::always("S8", s8),
        Property::always("S9", s9),
        Property::always("S10", s10),
        Property::always("S11", s11),
        Property::always("S12", s12),
        Property::always("S13", at_step!(S13)),
        Property::always("S18", at_step!(S18)),
        Property::always(
            "nobody gives up over a record that names it",
            at_step!(Liveness),
        ),
        Property::sometimes("copies differ at a takeover", |_: &Bound, s: &State| {
            s.alive().any(|a| {
                let at = s.at(a);
                let of = |k| s.copies[at.held.master].data[k];
                let differs = |k| at.held.in_sync.iter().any(|c| s.copies[c].data[k] != of(k));
                at.phase == Phase::Serving
                    && (0..CHUNKS).any(|k| has(at.undecided, k) && differs(k))
            })
        }),
        Property::sometimes("a copy is synced by a delta", |_: &Bound, s: &State| {
            syncs(s).any(|(_, _, sync)| sync.is_synced() && sync.own.is_some())
        }),
        Property::sometimes("a new copy is synced in full", |_: &Bound, s: &State| {
            syncs(s).any(|(_, _, sync)| sync.is_synced() && sync.own.is_none())
        }),
        Property::sometimes(
            "a write is mirrored to a copy that is synced",
            |_: &Bound, s: &State| {
                let goes = |a: usize, c| s.at(a).writes.iter().flatten().any(|w| w.waiting.has(c));
                syncs(s).any(|(a, c, sync)| sync.is_mirrored() && goes(a, c))
            },
        ),
        Property::sometimes(
            "a copy is ejected and back in sync",
            |b: &Bound, s: &State| {
                let held = &s.registry.record;
                let back = |c: usize| held.record.copies[c].base.since.0 > 1 && !b.blank.has(c);
                held.in_sync.iter().any(back)
            },
        ),
        Property::sometimes(
            "a swap was done and nobody knows",
            |_: &Bound, s: &State| {
                let swapped = |a: usize| {
                    let change = s.at(a).change.as_ref();
                    change.is_some_and(|c| c.unknown && c.proposed == s.registry.record)
                };
                s.alive().any(swapped)
            },
        ),
        Property::sometimes(
            "a swap is asked for again while the first may arrive",
            |_: &Bound, s: &State| {
                let asked = |a: usize| {
                    let change = s.at(a).change.as_ref();
                    change.is_some_and(|c| c.in_doubt && !c.unknown)
                };
                s.registry.late.is_some() && s.alive().any(asked)
            },
        ),
        Property::sometimes(
            "the master is lost under a live attachment",
            |_: &Bound, s: &State| {
                let held = &s.registry.record;
                held.master != 0 && held.attachment == Some(0) && s.attachments[0].is_some()
            },
        ),
        Property::sometimes("a lease runs out", |b: &Bound, s: &State| {
            s.alive().any(|a| {
                let at = s.at(a);
                at.phase == Phase::Serving
                    && at.held.record.state == RecordState::Active
                    && s.ready(a).has(at.held.master)
                    && !can_read(s, a, 0, b)
            })
        }),
        Property::sometimes(
            "a power cut takes completed writes",
            |_: &Bound, s: &State| s.oracle.taken,
        ),
        Property::sometimes(
            "a copy that lost power serves on",
            |_: &Bound, s: &State| {
                s.alive()
                    .any(|a| s.at(a).accepted.iter().any(Option::is_some))
            },
        ),
    ]
}
