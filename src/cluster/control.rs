//! The control loop: makes this node do what the records say.
//!
//! Level-triggered: it compares what is wished for with what the host does and acts on the difference, whatever
//! brought it about, so a lost notice or a restart costs time and nothing else. A watch brings every change of the
//! registry, without a gap, and is told when it has missed some; so everything is listed only at the start, then, and once
//! in minutes in case of a mistake of ours. Between two comparisons it rests for some times as long as one took: with many
//! volumes and many changes it does more at once, not more. It runs one action after the other on one thread. Each failure
//! is logged once, until it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::control_copies::Copies;
use super::control_creation::Creations;
use super::control_drain::Drains;
use super::control_replace::Replacements;
use super::control_scrub::Scrubs;
use super::control_seen::Seen;
use super::control_tend::Tending;
use super::host::Capacity;
use super::model::NodeRecord;
use super::names::Known;
use super::plane::Plane;
use super::snapshot::Snapshot;
use super::store::MaybeRace;
use crate::registry::{CasError, RegistryError, Revision, Watch};
use crate::replication::ids::{NodeName, VolumeId};

/// Everything is compared anew this often, notice or not.
const TICK: Duration = Duration::from_secs(5);
/// Everything is listed anew this often, more or less: a listing is megabytes with a thousand volumes, and the watch has told
/// all that is in it. Nodes that were started together do not do it together.
const LISTING: Duration = Duration::from_secs(300);
/// A comparison is followed by a rest of so many times what it took: a fifth of a processor is what the loop gets at most.
const REST: u32 = 4;
/// The longest rest: people wait for what they asked for.
const REST_MAX: Duration = Duration::from_millis(500);
/// How long one wait for the watch is, and so how late a stop or a due retry is seen.
const NAP: Duration = Duration::from_millis(200);
/// How long a start waits for the addresses of nodes that go by a name.
const NAMES_WAIT: Duration = Duration::from_secs(1);
/// How often it looks whether they are there.
const NAMES_LOOK: Duration = Duration::from_millis(20);
/// Pause before a registry that failed is asked again.
const REGISTRY_PAUSE: Duration = Duration::from_secs(1);
/// The capacity in the node's record is a hint for when the node is gone; it is not written more often than this.
const CAPACITY_PAUSE: Duration = Duration::from_secs(60);
/// Free space has changed when it differs by this part of the whole.
const CAPACITY_STEP: u64 = 64;

/// The loop's own memory. All of it can be lost: it saves repetition, not state.
pub(super) struct Control {
    pub(super) plane: Arc<Plane>,
    stop: Arc<AtomicBool>,
    pub(super) said: BTreeMap<String, String>,
    pub(super) told_record: BTreeMap<VolumeId, Revision>,
    pub(super) told_peers: Vec<(NodeName, SocketAddr)>,
    /// As of this version of what is known of names.
    told_names: u64,
    pub(super) retry: BTreeMap<VolumeId, (Revision, Instant)>,
    pub(super) creations: Creations,
    pub(super) copies: Copies,
    pub(super) replacements: Replacements,
    pub(super) tending: Tending,
    pub(super) scrubs: Scrubs,
    /// Volumes whose machines may leave, as the host was told.
    pub(super) by_turns: BTreeSet<VolumeId>,
    pub(super) drains: Drains,
    /// The last event of this node that has been looked at.
    heard: u64,
    pub(super) seen: Seen,
    capacity_written: Option<Instant>,
}

impl Control {
    pub(super) fn new(plane: Arc<Plane>, stop: Arc<AtomicBool>) -> Self {
        Self {
            plane,
            stop,
            said: BTreeMap::new(),
            told_record: BTreeMap::new(),
            told_peers: Vec::new(),
            told_names: 0,
            retry: BTreeMap::new(),
            creations: Creations::default(),
            copies: Copies::default(),
            replacements: Replacements::default(),
            tending: Tending::default(),
            scrubs: Scrubs::default(),
            by_turns: BTreeSet::new(),
            drains: Drains::default(),
            heard: 0,
            seen: Seen::default(),
            capacity_written: None,
        }
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
        // Nobody's affairs are looked after under a name that another process may have.
        while !self.stopped() && self.plane.waits().is_some() {
            std::thread::sleep(NAP);
        }
        while !self.stopped() {
            let follow = self.connect();
            match follow {
                Ok((snapshot, watch)) => {
                    self.unsay("registry", "the registry answers again");
                    if let Err(e) = self.follow(snapshot, &watch) {
                        self.say("registry", &format!("{e}; attached volumes go on serving"));
                    }
                }
                Err(e) => self.say("registry", &format!("{e}; attached volumes go on serving")),
            }
            self.pause(REGISTRY_PAUSE);
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn pause(&self, span: Duration) {
        let until = Instant::now() + span;
        while !self.stopped() && Instant::now() < until {
            std::thread::sleep(NAP.min(span));
        }
    }

    fn connect(&self) -> Result<(Snapshot, Watch), RegistryError> {
        let snapshot = self.plane.store.snapshot()?;
        let watch = self.plane.store.watch(snapshot.revision)?;
        Ok((snapshot, watch))
    }

    /// Acts on the snapshot and on every change after it, until the registry fails.
    fn follow(
        &mut self,
        snapshot: Snapshot,
        watch: &Watch,
    ) -> Result<(), crate::registry::WatchError> {
        let mut snapshot = Arc::new(snapshot);
        let (mut changed, mut rested) = (true, Instant::now());
        let mut tick = rested + TICK;
        let mut listing = rested + spread(LISTING, &self.plane.node);
        self.await_names(&snapshot);
        while !self.stopped() {
            let rest = rested.saturating_duration_since(Instant::now());
            let mut patience = if changed { rest } else { NAP };
            // All that is there already is taken in before acting: intermediate states are not worth an action.
            while let Some(batch) = watch.next(patience)? {
                Arc::make_mut(&mut snapshot).apply(batch);
                changed = true;
                patience = Duration::ZERO;
            }
            let now = Instant::now();
            if now >= listing {
                snapshot = Arc::new(self.plane.store.snapshot()?);
                listing = now + spread(LISTING, &self.plane.node);
                changed = true;
            }
            let due = now >= tick
                || self.retry.values().any(|(_, at)| *at <= now)
                || self.creations.due(now)
                || self.copies.due(now)
                || self.replacements.due(now)
                || self.tending.due(now)
                || self.scrubs.due(now)
                || self.drains.due(now)
                || self.plane.names.version() != self.told_names;
            // Something happened here, an attachment was fenced for instance: no change of a record may ever tell.
            let stirred = self.plane.events.last() > self.heard;
            if (changed || due || stirred) && now >= rested {
                self.plane.know(&snapshot);
                self.reconcile(&snapshot)?;
                changed = false;
                rested = Instant::now() + REST_MAX.min(now.elapsed() * REST);
                tick = now + TICK;
            }
        }
        Ok(())
    }

    /// Waits a moment until the addresses of nodes that go by a name are known: volumes are taken over better with them.
    fn await_names(&self, snapshot: &Arc<Snapshot>) {
        self.plane.know(snapshot);
        let until = Instant::now() + NAMES_WAIT;
        while !self.plane.names.all_asked(snapshot) && !self.stopped() && Instant::now() < until {
            std::thread::sleep(NAMES_LOOK);
        }
    }

    /// One comparison of wish and reality. A registry that fails ends it; everything else is noted and left for the
    /// next time.
    fn reconcile(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        self.heard = self.plane.events.last();
        self.look_again();
        for (key, why) in &snapshot.unreadable {
            self.say(key, &format!("registry key {key} is left alone: {why}"));
        }
        if snapshot.cluster.map(|c| c.id) != Some(self.plane.cluster) {
            // Nothing in it is about us, least of all what is missing in it.
            self.say(
                "cluster",
                "the registry now belongs to another cluster or none; its records are ignored. \
                 Restore the registry, or restart the node to join the new cluster",
            );
            return Ok(());
        }
        self.unsay("cluster", "the registry belongs to our cluster again");
        if !self.still_ours(snapshot) {
            return Ok(());
        }
        let peers = self.peers(snapshot);
        if peers != self.told_peers {
            self.plane.host.peers_changed(&peers);
            let me = &self.plane.node;
            self.plane.reach.peers_changed(me, &peers);
            self.told_peers = peers;
        }
        self.create_copies(snapshot)?;
        self.clean_creations(snapshot)?;
        self.tend_copies(snapshot)?;
        self.attachments(snapshot)?;
        self.plane.acted();
        // Machines may be waiting for the above: a node that has just begun serves first.
        self.write_capacity(snapshot)?;
        self.tend(snapshot)?;
        self.scrub_volumes(snapshot)?;
        self.replace_copies(snapshot)?;
        self.drain_copies(snapshot)?;
        self.remove_copies(snapshot)?;
        Ok(())
    }

    /// Whether this process is the node of its name.
    fn still_ours(&mut self, snapshot: &Snapshot) -> bool {
        let mine = snapshot.nodes.get(&self.plane.node).map(|(n, _)| n);
        if mine.is_some_and(|n| n.instance == self.plane.instance) {
            return true;
        }
        let why = match mine {
            Some(_) => format!(
                "another process runs as node {} now; this one manages nothing any more",
                self.plane.node
            ),
            None => format!(
                "node {} is no longer in the registry; this process manages nothing any more",
                self.plane.node
            ),
        };
        self.say("node", &why);
        self.plane.set_fatal(why);
        false
    }

    fn write_capacity(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        let Some((node, revision)) = snapshot.nodes.get(&self.plane.node) else {
            return Ok(());
        };
        if self
            .capacity_written
            .is_some_and(|at| at.elapsed() < CAPACITY_PAUSE)
        {
            return Ok(());
        }
        let now = self.plane.host.capacity();
        if differs(node.capacity, now) {
            let record = NodeRecord {
                capacity: now,
                ..node.clone()
            };
            raced(self.plane.store.cas_node(Some(*revision), &record))?;
        }
        self.capacity_written = Some(Instant::now());
        Ok(())
    }

    /// Where each node takes replication connections. One whose name does not resolve is where it was.
    fn peers(&mut self, snapshot: &Snapshot) -> Vec<(NodeName, SocketAddr)> {
        self.told_names = self.plane.names.version();
        let mut peers = Vec::new();
        for (node, _) in snapshot.nodes.values() {
            let key = format!("address of {}", node.name);
            let name = &node.address;
            let Known { address, trouble } = self.plane.names.known(name).unwrap_or_default();
            let told = self.told_peers.iter().find(|(told, _)| *told == node.name);
            let address = address.or(told.map(|(_, address)| *address));
            match address {
                _ if trouble.is_empty() => self.unsay(&key, &format!("{name} resolves again")),
                Some(at) => self.say(
                    &key,
                    &format!("{name} does not resolve: {trouble}; node {} is taken to be at {at} as before", node.name),
                ),
                None => self.say(&key, &format!("{name} does not resolve: {trouble}")),
            }
            peers.extend(address.map(|at| (node.name.clone(), at)));
        }
        peers
    }

    /// Logs what is wrong with `key`, once until it changes.
    pub(super) fn say(&mut self, key: &str, text: &str) {
        self.say_new(key, text);
    }

    /// The same, and whether it was new.
    pub(super) fn say_new(&mut self, key: &str, text: &str) -> bool {
        if self.said.get(key).is_some_and(|s| s == text) {
            return false;
        }
        log::warn!("{text}");
        self.said.insert(key.into(), text.into());
        true
    }

    pub(super) fn unsay(&mut self, key: &str, text: &str) {
        if self.said.remove(key).is_some() {
            log::info!("{text}");
        }
    }
}

/// Whether a change was made. A lost race or an unknown outcome is no failure of a level-triggered loop: the next
/// comparison shows what is.
pub(super) fn raced<T>(result: Result<T, CasError>) -> Result<bool, RegistryError> {
    match result {
        Ok(_) => Ok(true),
        Err(CasError::Registry(e)) => Err(e),
        Err(e) => {
            debug_assert!(e.is_race());
            Ok(false)
        }
    }
}

/// Between three and five quarters of `span`, for each node another part.
fn spread(span: Duration, node: &NodeName) -> Duration {
    span * 3 / 4 + span / 2 * u32::from(part_of(node.0.as_bytes())) / 256
}

/// A number that is another one for most texts, and the same one for the same text everywhere.
pub(super) fn part_of(bytes: &[u8]) -> u8 {
    (xxhash_rust::xxh3::xxh3_64(bytes) & 0xff) as u8
}

fn differs(a: Capacity, b: Capacity) -> bool {
    a.total != b.total || a.free.abs_diff(b.free) > a.total / CAPACITY_STEP
}
