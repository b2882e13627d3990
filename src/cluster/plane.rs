//! What the operations and the control loop of one node share.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::events::EventLog;
use super::fault::Fault;
use super::host::{Host, ScrubStatus};
use super::model::{NodeRecord, VolumeName};
use super::names::Names;
use super::reach::Reach;
use super::silence::Silence;
use super::snapshot::{Snapshot, VolumeEntry};
use super::store::{Store, Versioned};
use crate::registry::Revision;
use crate::replication::ids::{BootId, ClusterId, Instance, NodeName, VolumeId};
use crate::replication::record::Record;

use super::model::VolumeSpec;

/// The longest path of a Unix socket, in bytes (`sun_path` with its final zero is 108).
const SOCKET_PATH_MAX: usize = 107;

/// What became of a node's last attempt to serve (or release) a volume as its spec says; only failures are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The volume.
    pub volume: VolumeId,
    /// The revision of the spec that was acted on: whoever wrote it knows that the report is about it.
    pub spec: Revision,
    /// Why it failed.
    pub fault: Fault,
}

/// How a scrub on this node ended. Nobody else knows, and the node only while its process runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedScrub {
    /// The volume.
    pub volume: VolumeId,
    /// What it found.
    pub status: ScrubStatus,
}

/// One node's management plane.
pub struct Plane {
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeName,
    /// This run of its process.
    pub instance: Instance,
    /// This boot of its kernel.
    pub boot_id: BootId,
    /// When the process started, milliseconds since 1970.
    pub started: u64,
    /// Where sockets are made.
    pub run_dir: PathBuf,
    /// The registry.
    pub store: Arc<Store>,
    /// The engine.
    pub host: Arc<dyn Host>,
    /// The node's events.
    pub events: Arc<EventLog>,
    /// Since when each node does not answer.
    pub(super) silence: Silence,
    /// Where nodes are that go by a name.
    pub(super) names: Names,
    /// Which other nodes this one reaches.
    pub reach: Reach,
    stop: Arc<AtomicBool>,
    known: Mutex<Option<Arc<Snapshot>>>,
    creating: Mutex<BTreeSet<VolumeId>>,
    reports: Mutex<BTreeMap<VolumeId, Report>>,
    scrubs: Mutex<BTreeMap<VolumeId, ScrubStatus>>,
    fatal: Mutex<Option<String>>,
    waits: Mutex<Option<String>>,
    acted: AtomicBool,
}

/// A volume as one listing of the registry shows it, with both keys.
pub struct Found {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: VolumeName,
    /// What people asked.
    pub spec: Versioned<VolumeSpec>,
    /// What the protocol decided.
    pub record: Versioned<Record>,
}

impl Plane {
    /// The plane of a node that joined.
    pub(super) fn new(joined: &super::join::Membership, host: Arc<dyn Host>) -> Self {
        Self {
            cluster: joined.cluster,
            node: joined.node.clone(),
            instance: joined.instance,
            boot_id: joined.boot_id,
            started: joined.started,
            run_dir: joined.config.run_dir.clone(),
            store: joined.store.clone(),
            host,
            events: joined.events.clone(),
            silence: Silence::default(),
            names: Names::default(),
            reach: Reach::default(),
            stop: Arc::default(),
            known: Mutex::default(),
            creating: Mutex::default(),
            reports: Mutex::default(),
            scrubs: Mutex::default(),
            fatal: Mutex::default(),
            waits: Mutex::new(joined.waits.clone()),
            acted: AtomicBool::new(false),
        }
    }

    /// The volume of that name.
    pub fn find(&self, name: &VolumeName) -> Result<Found, Fault> {
        let missing = || {
            Fault::not_found(format!("there is no volume {name}"))
                .hint("see: lockstep volume ls -A")
        };
        let id = self.store.volume_id(name)?.ok_or_else(missing)?;
        let spec = self.store.spec(id)?.ok_or_else(missing)?;
        let record = super::store::Registrar::get_record(&*self.store, id)?.ok_or_else(missing)?;
        Ok(Found {
            id,
            name: name.clone(),
            spec,
            record,
        })
    }

    /// What the registry held when the control loop acted on it last; `None` before it has read it. Costs the registry
    /// nothing, and may be a moment old: for what repeats itself, not for what people ask.
    pub fn known(&self) -> Option<Arc<Snapshot>> {
        lock(&self.known).clone()
    }

    pub(super) fn know(&self, snapshot: &Arc<Snapshot>) {
        *lock(&self.known) = Some(Arc::clone(snapshot));
    }

    /// Where to ask a node over HTTP.
    pub fn http_of(&self, node: &NodeRecord) -> String {
        self.names.digits(&node.http)
    }

    /// Where a volume's socket is unless people say otherwise.
    pub fn default_socket(&self, name: &VolumeName) -> PathBuf {
        socket_under(&self.run_dir, name)
    }

    /// Whether this process carries out the creation of `volume`.
    pub(super) fn is_creating(&self, volume: VolumeId) -> bool {
        lock(&self.creating).contains(&volume)
    }

    /// Notes that it does, until the guard is dropped.
    pub(super) fn creating(self: &Arc<Self>, volume: VolumeId) -> Creating {
        lock(&self.creating).insert(volume);
        Creating {
            plane: self.clone(),
            volume,
        }
    }

    /// Notes a failure for whoever waits for it.
    pub(super) fn report(&self, report: Report) {
        lock(&self.reports).insert(report.volume, report);
    }

    /// Forgets the failure of a volume.
    pub(super) fn clear_report(&self, volume: VolumeId) {
        lock(&self.reports).remove(&volume);
    }

    /// The failures that stand.
    pub fn reports(&self) -> Vec<Report> {
        lock(&self.reports).values().cloned().collect()
    }

    /// Keeps what a scrub found when it ended.
    pub(super) fn keep_scrub(&self, volume: VolumeId, status: ScrubStatus) {
        lock(&self.scrubs).insert(volume, status);
    }

    /// Forgets the scrubs of volumes that are gone.
    pub(super) fn forget_scrubs(&self, is_there: impl Fn(VolumeId) -> bool) {
        lock(&self.scrubs).retain(|volume, _| is_there(*volume));
    }

    /// The last scrub of each volume that ended here.
    pub fn scrubs(&self) -> Vec<EndedScrub> {
        let all = lock(&self.scrubs);
        let ended = |(volume, status): (&VolumeId, &ScrubStatus)| EndedScrub {
            volume: *volume,
            status: status.clone(),
        };
        all.iter().map(ended).collect()
    }

    /// Set when the node stops.
    pub(super) fn stop_flag(&self) -> Arc<AtomicBool> {
        self.stop.clone()
    }

    /// Ends whatever waits for something to happen in the cluster when the node stops.
    pub(crate) fn still_running(&self) -> Result<(), Fault> {
        if self.stop.load(Ordering::Acquire) {
            return Err(Fault::try_again(format!("node {} is stopping", self.node)));
        }
        Ok(())
    }

    /// Why this process must end, if it must.
    pub fn fatal(&self) -> Option<String> {
        lock(&self.fatal).clone()
    }

    /// Why the cluster does not know this process yet, if so: nothing is done for the records until it does.
    pub fn waits(&self) -> Option<String> {
        lock(&self.waits).clone()
    }

    pub(super) fn set_waits(&self, why: Option<String>) {
        *lock(&self.waits) = why;
    }

    /// Whether what the records say has been served once.
    pub(super) fn has_acted(&self) -> bool {
        self.acted.load(Ordering::Acquire)
    }

    pub(super) fn acted(&self) {
        self.acted.store(true, Ordering::Release);
    }

    pub(super) fn set_fatal(&self, why: String) {
        lock(&self.fatal).get_or_insert(why);
    }
}

/// A creation that this process carries out.
pub(super) struct Creating {
    plane: Arc<Plane>,
    volume: VolumeId,
}

impl Drop for Creating {
    fn drop(&mut self) {
        lock(&self.plane.creating).remove(&self.volume);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each change under these locks is one insertion or removal: there is no half of it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a node with this run directory makes a volume's socket.
pub fn socket_under(run_dir: &Path, name: &VolumeName) -> PathBuf {
    run_dir
        .join("vhost")
        .join(&name.namespace)
        .join(format!("{}.sock", name.name))
}

/// Refuses a socket path that the kernel would.
pub fn check_socket(path: &Path) -> Result<(), Fault> {
    let len = path.as_os_str().len();
    if !path.is_absolute() {
        return Err(Fault::input(format!(
            "the socket {} is not an absolute path",
            path.display()
        )));
    }
    if len > SOCKET_PATH_MAX {
        return Err(Fault::input(format!(
            "the socket path {} has {len} bytes; the kernel allows {SOCKET_PATH_MAX}",
            path.display()
        ))
        .hint("give a shorter --socket, or run the node with a shorter --run-dir"));
    }
    Ok(())
}

/// The volumes of a snapshot that have both keys.
pub fn whole_volumes(
    snapshot: &Snapshot,
) -> impl Iterator<Item = (VolumeId, &Versioned<VolumeSpec>, &Versioned<Record>)> {
    snapshot
        .volumes
        .iter()
        .filter_map(|(id, VolumeEntry { spec, record, .. })| {
            Some((*id, spec.as_ref()?, record.as_ref()?))
        })
}
