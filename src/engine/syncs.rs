//! Places for syncs: how many copies one node brings up to date at once, and how many on it are brought up to date, over all
//! volumes and workers. A node that is lost may have had a copy of every volume; without a bound all of them would be copied
//! at once when it is back, by the disks that serve the guests.
//!
//! A place of the source is taken before that of the target, and whoever has both gets on by himself, so nobody waits in a
//! circle.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::replication::ids::{Nanos, NodeName};
use crate::replication::throttle::SYNCS_MAX;

/// How long a target that had no place is left alone.
const BUSY: Nanos = Nanos::from_ms(500);
/// A place is kept this long for a sync that has not begun yet: its first message may wait behind others.
const BEGINS: Nanos = Nanos::from_ms(2_000);

/// Which end of a sync this node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It brings a copy up to date.
    Source,
    /// A copy on it is brought up to date.
    Target,
}

/// Syncs of one end.
#[derive(Debug, Default)]
struct Count {
    now: AtomicUsize,
    most: AtomicUsize,
}

/// All places of a node, shared by its workers.
#[derive(Debug, Default)]
pub struct Places {
    source: Count,
    target: Count,
}

/// How many syncs there are, and were at once at most, since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Syncs {
    /// Now.
    pub now: usize,
    /// At most.
    pub most: usize,
}

impl Places {
    fn count(&self, end: End) -> &Count {
        match end {
            End::Source => &self.source,
            End::Target => &self.target,
        }
    }

    /// A place, if one is free.
    pub fn take(self: &Arc<Self>, end: End) -> Option<Place> {
        let count = self.count(end);
        let one_more = |now| (now < SYNCS_MAX).then_some(now + 1);
        // The counters guard nothing but themselves.
        let before = count.now.fetch_update(Relaxed, Relaxed, one_more).ok()?;
        count.most.fetch_max(before + 1, Relaxed);
        Some(Place {
            of: Arc::clone(self),
            end,
        })
    }

    /// Whether one is free at this moment.
    pub fn is_free(&self, end: End) -> bool {
        self.count(end).now.load(Relaxed) < SYNCS_MAX
    }

    /// For the counters.
    pub fn syncs(&self, end: End) -> Syncs {
        let count = self.count(end);
        Syncs {
            now: count.now.load(Relaxed),
            most: count.most.load(Relaxed),
        }
    }
}

/// A place that is taken. Dropped, it is free.
#[derive(Debug)]
pub struct Place {
    of: Arc<Places>,
    end: End,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of.count(self.end).now.fetch_sub(1, Relaxed);
    }
}

/// A place for a sync that is about to begin, or goes on.
#[derive(Debug)]
pub struct Held {
    _place: Place,
    since: Nanos,
    begun: bool,
}

impl Held {
    /// Since now.
    pub fn new(place: Place, now: Nanos) -> Self {
        Self {
            _place: place,
            since: now,
            begun: false,
        }
    }

    /// For another sync than the one before.
    pub fn renew(&mut self, now: Nanos) {
        (self.since, self.begun) = (now, false);
    }

    /// Whether it is still needed, `runs` being whether the sync goes on now.
    pub fn is_needed(&mut self, runs: bool, now: Nanos) -> bool {
        self.begun |= runs;
        runs || !self.begun && now.since(self.since) < BEGINS
    }
}

/// What one worker does about places of its syncs.
#[derive(Debug, Default)]
pub struct Turns {
    /// The node's places.
    pub places: Arc<Places>,
    /// Connections being made to targets, by token. A dead node lets them wait for long, so they take no place; but not more
    /// than a few to each node are made at once.
    dials: HashMap<usize, NodeName>,
    /// Targets that had no place, and until when they are left alone.
    busy: HashMap<NodeName, Nanos>,
}

impl Turns {
    /// Whether a target on `node` may be connected to, or what it waits for.
    pub fn may_dial(&mut self, node: &NodeName, now: Nanos) -> Result<(), String> {
        self.busy.retain(|_, until| *until > now);
        if !self.places.is_free(End::Source) {
            return Err(waits_here());
        }
        if self.busy.contains_key(node) {
            return Err(format!(
                "it waits for its turn: {SYNCS_MAX} other copies on {node} are brought up to date"
            ));
        }
        match self.dials.values().filter(|n| *n == node).count() {
            SYNCS_MAX.. => Err(format!(
                "it waits for its turn: {node} is being connected to for other volumes"
            )),
            _ => Ok(()),
        }
    }

    /// A connection to a target is being made.
    pub fn dialing(&mut self, token: usize, node: NodeName) {
        self.dials.insert(token, node);
    }

    /// It was made, or is gone. Whether it was one to a target.
    pub fn dialed(&mut self, token: usize) -> bool {
        self.dials.remove(&token).is_some()
    }

    /// A target had no place.
    pub fn is_busy(&mut self, node: NodeName, now: Nanos) {
        self.busy.insert(node, now.after(BUSY));
    }
}

/// What a copy waits for when this node has no place.
pub fn waits_here() -> String {
    format!("it waits for its turn: {SYNCS_MAX} other copies are brought up to date from here")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_places_at_each_end_and_they_come_back() {
        let places = Arc::new(Places::default());
        let mut taken: Vec<Place> = (0..SYNCS_MAX)
            .map(|_| places.take(End::Source).unwrap())
            .collect();
        assert!(places.take(End::Source).is_none() && !places.is_free(End::Source));
        let other = places.take(End::Target);
        assert!(other.is_some() && places.is_free(End::Target));
        taken.pop();
        assert!(places.is_free(End::Source));
        let syncs = places.syncs(End::Source);
        assert_eq!((syncs.now, syncs.most), (SYNCS_MAX - 1, SYNCS_MAX));
        taken.push(places.take(End::Source).unwrap());
        assert!(places.take(End::Source).is_none());
        drop(taken);
        assert_eq!(places.syncs(End::Source).now, 0);
    }

    #[test]
    fn a_place_is_held_while_the_sync_runs_and_a_moment_for_one_that_never_begins() {
        let places = Arc::new(Places::default());
        let at = Nanos::from_ms;
        let hold = || Held::new(places.take(End::Target).unwrap(), at(0));
        let mut one = hold();
        assert!(one.is_needed(false, at(1_999)));
        assert!(!one.is_needed(false, at(2_000)));
        let mut other = hold();
        assert!(other.is_needed(true, at(5_000)));
        assert!(!other.is_needed(false, at(5_001)));
        other.renew(at(6_000));
        assert!(other.is_needed(false, at(7_999)));
    }

    #[test]
    fn a_target_is_connected_to_when_there_is_a_place_here_and_it_is_not_known_to_have_none() {
        let mut turns = Turns::default();
        let (n1, n2) = (NodeName("n1".into()), NodeName("n2".into()));
        let now = Nanos::from_ms(1_000);
        for token in 0..SYNCS_MAX {
            assert_eq!(turns.may_dial(&n1, now), Ok(()));
            turns.dialing(token, n1.clone());
        }
        assert!(turns.may_dial(&n1, now).is_err());
        assert_eq!(turns.may_dial(&n2, now), Ok(()));
        assert!(turns.dialed(0) && !turns.dialed(0));
        assert_eq!(turns.may_dial(&n1, now), Ok(()));
        turns.is_busy(n1.clone(), now);
        assert!(turns.may_dial(&n1, now).unwrap_err().contains("on n1"));
        assert_eq!(turns.may_dial(&n1, now.after(BUSY)), Ok(()));
        let places = Arc::clone(&turns.places);
        let all: Vec<_> = (0..SYNCS_MAX).map(|_| places.take(End::Source)).collect();
        assert!(turns.may_dial(&n2, now).is_err());
        drop(all);
        assert_eq!(turns.may_dial(&n2, now), Ok(()));
    }
}
