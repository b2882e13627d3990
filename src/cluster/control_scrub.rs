//! Scrubs that were asked of this process (see `scrub`): begun as soon as the volume is attached here, watched, and their
//! wish taken out of the spec when they have ended.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::control::{Control, raced};
use super::host::{AttachmentStatus, Phase, ScrubState, ScrubStatus};
use super::model::{ScrubWish, VolumeSpec};
use super::plane::whole_volumes;
use super::snapshot::Snapshot;
use super::store::Versioned;
use crate::registry::RegistryError;
use crate::replication::ids::{NodeName, VolumeId};

/// How far a scrub is is no change of the registry: it is looked at this often.
const LOOK: Duration = Duration::from_millis(300);
/// A volume that is not served for so long after a scrub of it was asked for: whoever waits is told. Longer than a takeover
/// may take.
const BEGIN: Duration = Duration::from_secs(60);

/// What this process remembers of the scrubs that it was asked for.
#[derive(Default)]
pub(super) struct Scrubs {
    volumes: BTreeMap<VolumeId, Memory>,
    next: Option<Instant>,
}

struct Memory {
    id: u64,
    since: Instant,
    /// As it was seen last, once it had begun.
    seen: Option<ScrubStatus>,
}

impl Scrubs {
    /// Whether it is time to look.
    pub(super) fn due(&self, now: Instant) -> bool {
        self.next.is_some_and(|at| at <= now)
    }
}

/// What is to be done about a wish.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// The attachment here is to begin.
    Begin,
    /// Nothing yet.
    Wait,
    /// It has ended so.
    Ended(Box<ScrubStatus>),
}

/// What follows from what is attached here, how far the scrub was when it was seen last, whether it has waited for too long,
/// and on which other node the volume is to be served, if on another one.
fn next(
    wish: &ScrubWish,
    here: Option<&AttachmentStatus>,
    seen: Option<&ScrubStatus>,
    late: bool,
    elsewhere: Option<&NodeName>,
) -> Next {
    let ended = |status: ScrubStatus| Next::Ended(Box::new(status));
    let mine = here
        .and_then(|a| a.scrub.as_ref())
        .filter(|s| s.id == wish.id);
    match (mine, seen) {
        (Some(status), _) if status.state == ScrubState::Running => Next::Wait,
        (Some(status), _) => ended(status.clone()),
        (None, Some(seen)) => ended(
            seen.clone()
                .broken_off("the attachment that compared the copies has ended"),
        ),
        (None, None) => {
            let unbegun = ScrubStatus::waiting(wish.id, wish.repair, 0);
            let phase = here.map(|a| a.phase);
            let serves = matches!(
                phase,
                Some(Phase::Serving | Phase::Recovering | Phase::Suspended)
            );
            let why = here.map_or("it is not attached here", |a| a.why.as_str());
            match elsewhere {
                Some(node) => {
                    ended(unbegun.broken_off(format!("the volume is served on {node} now")))
                }
                None if serves => Next::Begin,
                None if late => ended(unbegun.broken_off(format!(
                    "the volume was not served in {}s: {why}",
                    BEGIN.as_secs()
                ))),
                None => Next::Wait,
            }
        }
    }
}

impl Control {
    /// The wish for a scrub by this process.
    pub(super) fn scrub_asked<'a>(&self, spec: &'a VolumeSpec) -> Option<&'a ScrubWish> {
        let mine = |w: &&ScrubWish| w.node == self.plane.node && w.instance == self.plane.instance;
        spec.scrub.as_ref().filter(mine)
    }

    /// Begins, watches and ends scrubs.
    pub(super) fn scrub_volumes(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        self.scrubs.next = None;
        let there = |volume: VolumeId| snapshot.volumes.contains_key(&volume);
        self.scrubs.volumes.retain(|volume, _| there(*volume));
        self.plane.forget_scrubs(there);
        let asked = |spec: &VolumeSpec| self.scrub_asked(spec).is_some();
        let any = whole_volumes(snapshot).any(|(_, spec, _)| asked(&spec.0));
        if !any && self.scrubs.volumes.is_empty() {
            return Ok(());
        }
        let attached = self.attached();
        let now = Instant::now();
        for (id, spec, _) in whole_volumes(snapshot) {
            let here = attached.get(&id);
            let wish = self.scrub_asked(&spec.0).cloned();
            if let Some(memory) = self.scrubs.volumes.get(&id)
                && wish.as_ref().is_none_or(|w| w.id != memory.id)
            {
                // Somebody has enough of it, or gave it up for dead and asked anew.
                self.plane.host.stop_scrub(id, memory.id);
                self.scrub_stopped(id, here);
            }
            if let Some(wish) = wish {
                self.go_on_with_scrub(id, spec, (&wish, here), now)?;
            }
        }
        Ok(())
    }

    /// The wish is gone, and it was not this process that took it out, unless it does not know that it was.
    fn scrub_stopped(&mut self, id: VolumeId, here: Option<&AttachmentStatus>) {
        let Some(memory) = self.scrubs.volumes.remove(&id) else {
            return;
        };
        let kept = self.plane.scrubs();
        if kept.iter().any(|s| s.status.id == memory.id) {
            return;
        }
        let over = |s: &&ScrubStatus| s.id == memory.id && !s.is_open();
        let status = match here.and_then(|a| a.scrub.as_ref()).filter(over) {
            Some(ended) => Some(ended.clone()),
            None => memory.seen.map(|seen| seen.broken_off("it was stopped")),
        };
        if let Some(status) = status {
            self.plane.keep_scrub(id, status);
        }
    }

    fn go_on_with_scrub(
        &mut self,
        id: VolumeId,
        spec: &Versioned<VolumeSpec>,
        (wish, here): (&ScrubWish, Option<&AttachmentStatus>),
        now: Instant,
    ) -> Result<(), RegistryError> {
        let memory = self.scrubs.volumes.entry(id).or_insert(Memory {
            id: wish.id,
            since: now,
            seen: None,
        });
        let late = now >= memory.since + BEGIN;
        let desired = spec.0.attachment.as_ref().map(|a| &a.node);
        let elsewhere = desired.filter(|node| **node != self.plane.node);
        match next(wish, here, memory.seen.as_ref(), late, elsewhere) {
            Next::Wait => {
                let mine = here.and_then(|a| a.scrub.as_ref());
                if let Some(status) = mine.filter(|s| s.id == wish.id) {
                    memory.seen = Some(status.clone());
                }
            }
            Next::Begin => match self.plane.host.scrub(id, wish.id, wish.repair) {
                Ok(()) => memory.seen = Some(ScrubStatus::waiting(wish.id, wish.repair, 0)),
                Err(e) => log::info!("volume {}: no scrub begins: {e}", spec.0.full_name()),
            },
            Next::Ended(status) => {
                self.plane.keep_scrub(id, *status);
                let without = VolumeSpec {
                    scrub: None,
                    ..spec.0.clone()
                };
                if raced(self.plane.store.cas_spec(id, spec.1, &without))? {
                    self.scrubs.volumes.remove(&id);
                    return Ok(());
                }
            }
        }
        self.scrubs.next = Some(now + LOOK);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::{self, node};
    use crate::replication::ids::Instance;

    fn attachment(phase: Phase, scrub: Option<(u64, ScrubState)>) -> AttachmentStatus {
        AttachmentStatus {
            why: "no reason".into(),
            scrub: scrub.map(|(id, state)| ScrubStatus {
                state,
                ..ScrubStatus::waiting(id, false, 0)
            }),
            ..fixture::attachment(phase)
        }
    }

    #[test]
    fn a_scrub_is_begun_when_the_volume_is_served_and_ends_with_its_attachment() {
        use Phase::{Acquiring, Serving, Suspended};
        use ScrubState::{BrokenOff, Done, Running};
        let wish = ScrubWish {
            id: 7,
            repair: false,
            node: node("n1"),
            instance: Instance([1; 16]),
        };
        // (attached here, its scrub, seen before, late, served elsewhere: what follows, or how it ended)
        type Row = (
            Option<Phase>,
            Option<(u64, ScrubState)>,
            bool,
            bool,
            Option<&'static str>,
            Result<Next, (ScrubState, &'static str)>,
        );
        let table: [Row; 13] = [
            (None, None, false, false, None, Ok(Next::Wait)),
            (Some(Acquiring), None, false, false, None, Ok(Next::Wait)),
            (Some(Serving), None, false, false, None, Ok(Next::Begin)),
            (Some(Suspended), None, false, true, None, Ok(Next::Begin)),
            // One of before is no matter.
            (
                Some(Serving),
                Some((5, Done)),
                false,
                false,
                None,
                Ok(Next::Begin),
            ),
            (
                Some(Serving),
                Some((7, Running)),
                true,
                true,
                None,
                Ok(Next::Wait),
            ),
            (
                Some(Serving),
                Some((7, Done)),
                true,
                false,
                None,
                Err((Done, "")),
            ),
            (
                Some(Serving),
                Some((7, BrokenOff)),
                true,
                false,
                None,
                Err((BrokenOff, "")),
            ),
            // Another attachment of the same volume, or none.
            (
                Some(Serving),
                None,
                true,
                false,
                None,
                Err((BrokenOff, "has ended")),
            ),
            (None, None, true, false, None, Err((BrokenOff, "has ended"))),
            (
                None,
                None,
                false,
                true,
                None,
                Err((BrokenOff, "not attached here")),
            ),
            (
                Some(Acquiring),
                None,
                false,
                true,
                None,
                Err((BrokenOff, "no reason")),
            ),
            (
                None,
                None,
                false,
                false,
                Some("n2"),
                Err((BrokenOff, "on n2 now")),
            ),
        ];
        for (phase, scrub, seen, late, elsewhere, expected) in table {
            let here = phase.map(|p| attachment(p, scrub));
            let before = ScrubStatus::waiting(7, false, 0);
            let seen = seen.then_some(&before);
            let elsewhere = elsewhere.map(node);
            let found = next(&wish, here.as_ref(), seen, late, elsewhere.as_ref());
            let what = format!("{phase:?} {scrub:?} {seen:?} {late} {elsewhere:?}");
            match (found, expected) {
                (Next::Ended(status), Err((state, why))) => {
                    assert_eq!(status.state, state, "{what}");
                    assert!(status.why.contains(why), "{what}: {}", status.why);
                }
                (found, Ok(expected)) => assert_eq!(found, expected, "{what}"),
                (found, Err(expected)) => panic!("{what}: {found:?}, not {expected:?}"),
            }
        }
    }
}
