//! The control loop: makes this node do what the records say.
//!
//! Level-triggered: it compares what is wished for with what the host does and acts on the difference, whatever
//! brought it about, so a lost notice or a restart costs time and nothing else. A watch wakes it, and a tick lists
//! everything anew. It runs one action after the other on one thread. Each failure is logged once, until it changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::control_creation::Creations;
use super::events::What;
use super::fault::{Code, Fault};
use super::host::{AttachRequest, Capacity, HostError, Phase};
use super::model::{Desired, NodeRecord, Ready, Tombstone, VolumeName, VolumeSpec};
use super::plane::{Plane, Report};
use super::snapshot::Snapshot;
use super::store::{MaybeRace, Versioned};
use crate::registry::{CasError, RegistryError, Revision, Watch};
use crate::replication::ids::{NodeName, VolumeId};
use crate::replication::record::{Record, State};

/// Everything is compared anew this often, notice or not.
const TICK: Duration = Duration::from_secs(5);
/// How long one wait for the watch is, and so how late a stop or a due retry is seen.
const NAP: Duration = Duration::from_millis(200);
/// Pause before a registry that failed is asked again.
const REGISTRY_PAUSE: Duration = Duration::from_secs(1);
/// Pause before a volume that could not be attached is tried again. A dead attachment's grace is 3 s.
const ATTACH_PAUSE: Duration = Duration::from_millis(500);
/// The capacity in the node's record is a hint for when the node is gone; it is not written more often than this.
const CAPACITY_PAUSE: Duration = Duration::from_secs(60);
/// Free space has changed when it differs by this part of the whole.
const CAPACITY_STEP: u64 = 64;

/// The loop's own memory. All of it can be lost: it saves repetition, not state.
pub(super) struct Control {
    pub(super) plane: Arc<Plane>,
    stop: Arc<AtomicBool>,
    said: BTreeMap<String, String>,
    told_record: BTreeMap<VolumeId, Revision>,
    told_peers: Vec<(NodeName, SocketAddr)>,
    retry: BTreeMap<VolumeId, (Revision, Instant)>,
    pub(super) creations: Creations,
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
            retry: BTreeMap::new(),
            creations: Creations::default(),
            capacity_written: None,
        }
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
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
        mut snapshot: Snapshot,
        watch: &Watch,
    ) -> Result<(), crate::registry::WatchError> {
        self.reconcile(&snapshot)?;
        let mut tick = Instant::now() + TICK;
        while !self.stopped() {
            let mut changed = false;
            let mut patience = NAP;
            // All that is there already is taken in before acting: intermediate states are not worth an action.
            while let Some(batch) = watch.next(patience)? {
                snapshot.apply(batch);
                changed = true;
                patience = Duration::ZERO;
            }
            let now = Instant::now();
            if now >= tick {
                snapshot = self.plane.store.snapshot()?;
                tick = now + TICK;
                changed = true;
            }
            let due = self.retry.values().any(|(_, at)| *at <= now) || self.creations.due(now);
            if changed || due {
                self.reconcile(&snapshot)?;
            }
        }
        Ok(())
    }

    /// One comparison of wish and reality. A registry that fails ends it; everything else is noted and left for the
    /// next time.
    fn reconcile(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
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
        self.write_capacity(snapshot)?;
        let peers = self.peers(snapshot);
        if peers != self.told_peers {
            self.plane.host.peers_changed(&peers);
            self.told_peers = peers;
        }
        self.create_copies(snapshot)?;
        self.clean_creations(snapshot)?;
        self.attachments(snapshot)?;
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

    fn peers(&mut self, snapshot: &Snapshot) -> Vec<(NodeName, SocketAddr)> {
        let mut peers = Vec::new();
        for (node, _) in snapshot.nodes.values() {
            let key = format!("address of {}", node.name);
            match node.address.to_socket_addrs().map(|mut a| a.next()) {
                Ok(Some(address)) => {
                    self.unsay(&key, &format!("{} resolves again", node.address));
                    peers.push((node.name.clone(), address));
                }
                Ok(None) => self.say(&key, &format!("{} has no address", node.address)),
                Err(e) => self.say(&key, &format!("{} does not resolve: {e}", node.address)),
            }
        }
        peers
    }

    /// Makes the copies that a creation wants of this node, and answers it.
    fn create_copies(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        for (id, volume) in &snapshot.volumes {
            let Some((record, revision)) = &volume.record else {
                continue;
            };
            let Some(copy) = record.copy_on(&self.plane.node) else {
                continue;
            };
            if record.state != State::Creating || volume.ready.contains_key(&copy.copy_id) {
                continue;
            }
            let made = self.plane.host.create_copy(
                *id,
                copy.copy_id,
                record.size,
                record.epoch,
                record.epoch_tag,
            );
            let error = made.err().map(|e| e.to_string());
            match &error {
                None => log::info!("volume {id}: made copy {}", copy.copy_id),
                Some(e) => log::warn!("volume {id}: cannot make copy {}: {e}", copy.copy_id),
            }
            let ready = Ready {
                boot_id: self.plane.boot_id,
                error,
            };
            raced(
                self.plane
                    .store
                    .answer_creation(*id, copy.copy_id, *revision, &ready),
            )?;
        }
        Ok(())
    }

    /// Serves what this node should serve, and nothing else.
    fn attachments(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        let serving: BTreeMap<VolumeId, Phase> = self
            .plane
            .host
            .attachments()
            .into_iter()
            .map(|a| (a.volume, a.phase))
            .collect();
        self.told_record.retain(|id, _| serving.contains_key(id));
        self.retry.retain(|id, _| snapshot.volumes.contains_key(id));
        for (id, spec, record) in super::plane::whole_volumes(snapshot) {
            let here = spec
                .0
                .attachment
                .as_ref()
                .filter(|a| a.node == self.plane.node);
            let phase = serving.get(&id).copied();
            match (here, phase) {
                (Some(desired), _) if desired.release.is_some() => {
                    self.release(id, spec, desired)?;
                }
                (Some(_), Some(Phase::Fenced)) => {
                    // The spec still wants it here: take the dead attachment away, the next round attaches anew.
                    self.let_go(id, spec.0.full_name(), "fenced");
                }
                (Some(_), Some(_)) => self.tell(id, record),
                (Some(desired), None) => self.serve(id, spec, desired, record),
                (None, Some(_)) => self.let_go(id, spec.0.full_name(), "not-wanted-here"),
                (None, None) => {
                    self.retry.remove(&id);
                    self.plane.clear_report(id);
                }
            }
        }
        for id in serving.keys() {
            if let Some((tombstone, _)) = snapshot.removed.get(id) {
                self.let_go(*id, &tombstone.name, "removed");
            } else if !snapshot.volumes.contains_key(id) {
                self.say(
                    &id.to_string(),
                    "an attached volume is not in the registry; it is served on",
                );
            }
        }
        Ok(())
    }

    fn tell(&mut self, id: VolumeId, record: &Versioned<Record>) {
        self.retry.remove(&id);
        self.plane.clear_report(id);
        if self.told_record.get(&id) != Some(&record.1) {
            self.plane.host.record_changed(id, &record.0, record.1);
            self.told_record.insert(id, record.1);
        }
    }

    fn serve(
        &mut self,
        id: VolumeId,
        spec: &Versioned<VolumeSpec>,
        desired: &Desired,
        record: &Versioned<Record>,
    ) {
        if record.0.state == State::Creating {
            return;
        }
        let now = Instant::now();
        if let Some((revision, at)) = self.retry.get(&id)
            && *revision == spec.1
            && *at > now
        {
            return;
        }
        let name = spec.0.full_name();
        let started = self.make_socket_dir(desired).and_then(|()| {
            self.plane.host.attach(AttachRequest {
                volume: id,
                name: name.to_string(),
                record: record.0.clone(),
                revision: record.1,
                socket: desired.socket.clone(),
                num_queues: desired.num_queues,
                read_only: desired.read_only,
                peers: self.told_peers.clone(),
            })
        });
        match started {
            Ok(()) => {
                self.retry.remove(&id);
                self.plane.clear_report(id);
                self.told_record.insert(id, record.1);
                self.said.remove(&id.to_string());
                self.plane.events.push(
                    What::volume(&name, "attaching", "attached", "attach")
                        .epoch(record.0.epoch)
                        .text(format!("at {}", desired.socket.display())),
                );
            }
            Err(e) => {
                self.retry.insert(id, (spec.1, now + ATTACH_PAUSE));
                self.failed(id, spec.1, &name, "serve", e);
            }
        }
    }

    fn make_socket_dir(&self, desired: &Desired) -> Result<(), HostError> {
        let Some(dir) = desired.socket.parent() else {
            return Ok(());
        };
        std::fs::create_dir_all(dir)
            .map_err(|e| HostError::Refused(format!("cannot make {}: {e}", dir.display())))
    }

    /// Releases a volume because someone asked for it, and answers in the spec.
    fn release(
        &mut self,
        id: VolumeId,
        spec: &Versioned<VolumeSpec>,
        desired: &Desired,
    ) -> Result<(), RegistryError> {
        let now = Instant::now();
        if let Some((revision, at)) = self.retry.get(&id)
            && *revision == spec.1
            && *at > now
        {
            return Ok(());
        }
        let name = spec.0.full_name();
        let force = desired.release.is_some_and(|r| r.force);
        let attachment = match self.plane.host.detach(id, force) {
            Ok(()) => None,
            // It refuses: the volume stays attached, and whoever asked reads why.
            Err(e @ HostError::Connected) => {
                self.failed(id, spec.1, &name, "release", e);
                Some(Desired {
                    release: None,
                    ..desired.clone()
                })
            }
            Err(e) => {
                self.retry.insert(id, (spec.1, now + ATTACH_PAUSE));
                self.failed(id, spec.1, &name, "release", e);
                return Ok(());
            }
        };
        self.retry.remove(&id);
        let released = attachment.is_none();
        let answer = VolumeSpec {
            attachment,
            ..spec.0.clone()
        };
        let written = raced(self.plane.store.cas_spec(id, spec.1, &answer))?;
        if released && written {
            self.plane.clear_report(id);
            self.plane
                .events
                .push(What::volume(&name, "attached", "detached", "detach"));
        }
        Ok(())
    }

    /// Stops serving what should not be served here (any more). Only a forced detach, a withdrawn attach or a fence
    /// lead here, so a connected virtual machine is no reason to go on.
    fn let_go(&mut self, id: VolumeId, name: impl ToString, rule: &str) {
        let name = name.to_string();
        match self.plane.host.detach(id, true) {
            Ok(()) => {
                self.plane.clear_report(id);
                self.plane
                    .events
                    .push(What::volume(&name, "attached", "detached", rule));
            }
            Err(e) => self.say(&id.to_string(), &format!("{name} cannot be released: {e}")),
        }
    }

    fn failed(
        &mut self,
        id: VolumeId,
        spec: Revision,
        name: &VolumeName,
        what: &str,
        e: HostError,
    ) {
        let fault = Fault::from(e);
        let text = format!("cannot {what} {name}: {}", fault.message);
        // Busy is part of taking over from a dead node: worth a line, not an event.
        if self.say_new(&id.to_string(), &text) && fault.code != Code::TryAgain {
            self.plane
                .events
                .push(What::volume(name, "attaching", "failed", what).text(fault.message.clone()));
        }
        self.plane.report(Report {
            volume: id,
            spec,
            fault,
        });
    }

    /// Destroys the copies of removed volumes. A tombstone is the only reason to: a record that is merely not there
    /// may be in a registry that is damaged, restored or another one.
    fn remove_copies(&mut self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        let copies = self.plane.host.local_copies();
        for (id, (tombstone, _)) in &snapshot.removed {
            let Some((_, copy)) = tombstone
                .copies
                .iter()
                .find(|(node, _)| *node == self.plane.node)
            else {
                continue;
            };
            let local = copies.iter().find(|c| c.volume == *id);
            if let Some(other) = local.filter(|c| c.copy != *copy) {
                let text = format!(
                    "copy {} of removed volume {} stays: the registry removed copy {copy}",
                    other.copy, tombstone.name
                );
                self.say(&id.to_string(), &text);
            } else if self.remove_copy(*id, tombstone) {
                // A race that is lost is no failure: the next round finds the copy gone and notes it again.
                if let Err(CasError::Registry(e)) =
                    self.plane.store.copy_removed(*id, &self.plane.node)
                {
                    return Err(e);
                }
            }
        }
        let known: BTreeSet<VolumeId> = snapshot
            .volumes
            .keys()
            .chain(snapshot.removed.keys())
            .copied()
            .collect();
        for copy in copies.iter().filter(|c| !known.contains(&c.volume)) {
            self.say(
                &copy.volume.to_string(),
                &format!(
                    "copy {} belongs to volume {}, which is not in the registry; it is kept",
                    copy.copy, copy.volume
                ),
            );
        }
        Ok(())
    }

    fn remove_copy(&mut self, id: VolumeId, tombstone: &Tombstone) -> bool {
        match self.plane.host.remove_copy(id) {
            Ok(()) => {
                self.plane
                    .events
                    .push(What::volume(&tombstone.name, "copy", "no copy", "remove"));
                self.said.remove(&id.to_string());
                true
            }
            Err(e) => {
                let text = format!(
                    "the copy of removed volume {} stays for now: {e}",
                    tombstone.name
                );
                self.say(&id.to_string(), &text);
                false
            }
        }
    }

    /// Logs what is wrong with `key`, once until it changes.
    fn say(&mut self, key: &str, text: &str) {
        self.say_new(key, text);
    }

    /// The same, and whether it was new.
    fn say_new(&mut self, key: &str, text: &str) -> bool {
        if self.said.get(key).is_some_and(|s| s == text) {
            return false;
        }
        log::warn!("{text}");
        self.said.insert(key.into(), text.into());
        true
    }

    fn unsay(&mut self, key: &str, text: &str) {
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

fn differs(a: Capacity, b: Capacity) -> bool {
    a.total != b.total || a.free.abs_diff(b.free) > a.total / CAPACITY_STEP
}
