//! One node process: builds the rooms and joins them. The registry and the control loop say what should be served and
//! stored here; the engine does it; the guest room gives each attached volume its socket.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR2};
use signal_hook::iterator::Signals;

mod handover;
mod shown;
mod status;
mod upgrade;

pub use upgrade::can_take_over;

use crate::cluster;
use crate::cluster::config::NodeConfig;
use crate::cluster::events::{EventLog, What};
use crate::cluster::fault::{Code, Fault};
use crate::cluster::host::{
    AttachRequest, AttachmentStatus, Birth, Capacity, Held, Host, HostError, LocalCopy, UpgradeView,
};
use crate::cluster::join::{Joining, Membership, Place};
use crate::cluster::metrics::Metrics;
use crate::cluster::store::Registrar;
use crate::copy::{LogImage, NodeDir, NodeDirError, Store, StoreError};
use crate::engine::{
    AttachVolume, CopyStatus, Engine, Grown, Handle, HoldVolume, Identity, OpenCopy, Records,
    WriteCache, exec,
};
use crate::guest::{BlockSize, Bound, Capacity as Size, DeviceConfig, Handed, Server};
use crate::registry::{CasError, Revision};
use crate::replication::attachment::{self, CasOutcome};
use crate::replication::copy_state::{BITMAPS_MAX, CopyState, Standing};
use crate::replication::dirty_map::DirtyMap;
use crate::replication::ids::{CHUNK, CopyId, Epoch, NodeName, Tag, VolumeId};
use crate::replication::message::Proof;
use crate::replication::record::{self, Record};
use handover::Inherited;
use shown::{Memory, Shown};

/// How long a registry may take to answer before what needs nothing of it begins. It answers in milliseconds; copies elsewhere
/// wait for ours meanwhile, and machines for their sockets.
const REGISTRY_ANSWERS: Duration = Duration::from_secs(1);
/// How long the control loop may take until it has served what the records say for the first time, before machines that
/// were served here are listened for without it. Ordinarily it knows better and is as quick; cloud-hypervisor waits for a minute.
const ACTS: Duration = Duration::from_secs(5);

/// How often a node looks whether it is to end.
const SIGNAL_LOOK: Duration = Duration::from_millis(50);

/// How long the start waits for the last requests of the process before, all copies together: what a disk takes. Taken for
/// lost meanwhile, a copy would need a sync.
const LAST_REQUESTS: Duration = Duration::from_secs(3);
/// Between two looks whether they have ended.
const LAST_REQUESTS_LOOK: Duration = Duration::from_millis(10);
/// The same once the node has started.
const LATE_LOOK: Duration = Duration::from_millis(500);

/// Runs a node until SIGTERM or SIGINT. At SIGUSR2 the program that is at our path takes our place.
///
/// # Errors
///
/// Why it cannot start, for the person who started it.
pub fn run(config: NodeConfig) -> Result<(), Fault> {
    // Before anything is opened: what the program before left is told from our own by that.
    let mut inherited = Inherited::take();
    // Before any thread starts and anything can be lost.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR2])
        .map_err(|e| Fault::internal(format!("signals cannot be handled: {e}")))?;
    // They are for this thread alone: one that another thread took at the moment when the program is replaced would be lost. So
    // threads begin with signals held back.
    exec::hold_signals(true);
    raise_descriptors();
    let registry = cluster::join::open_registry(&config)?;
    let mut asked_to_end = || {
        exec::hold_signals(false);
        let asked = signals.pending().any(|signal| signal != SIGUSR2);
        exec::hold_signals(true);
        asked
    };
    let mut dir = NodeDir::open(&config.data_dir, &config.name, None).map_err(dir_fault)?;
    let doors = inherited.as_mut().map(|inherited| {
        let names = handover::Names::of(&config);
        inherited.take_doors(&names)
    });
    let place = Place::take(config, registry, doors.unwrap_or_default())?;
    let known = dir.cluster();
    let joining = place.join(known)?;
    let begun = Instant::now();
    let mut joined = joining.wait(Duration::ZERO)?;
    // Ordinarily the registry answers, and who may not be the node of this name ends before anything is opened. If it does not,
    // its part in the data needs nothing of it; but a process that does not know its cluster has no part.
    while joined.is_none() && (known.is_none() || begun.elapsed() < REGISTRY_ANSWERS) {
        if asked_to_end() {
            return Ok(());
        }
        joined = joining.wait(SIGNAL_LOOK)?;
    }
    let Some(cluster) = joined.or(known) else {
        return Err(Fault::internal("this node has no cluster"));
    };
    dir.join(cluster).map_err(dir_fault)?;
    let mut membership = place.member(cluster);
    membership.waits = joined.is_none().then(|| joining.why());
    let host = NodeHost::start(dir, &membership, inherited)?;
    if membership.waits.is_some() {
        host.hold();
    }
    host.open_copies(&membership)?;
    NodeHost::open_late(&host)?;
    let mut waiting = joined.is_none().then(|| Waiting::new(joining));
    let mut running = cluster::start(membership, Arc::clone(&host) as Arc<dyn Host>)?;
    // It answers at all its sockets. What it waits for beyond that, a service manager can do nothing about.
    tell_service_manager(&[NotifyState::Ready]);
    exec::hold_signals(false);
    let mut told = Vec::new();
    let end = loop {
        told.extend(signals.pending());
        if let Some(signal) = told.iter().find(|signal| **signal != SIGUSR2) {
            log::info!("signal {signal}: finishing what is under way");
            break Ok(());
        }
        if !told.is_empty() {
            told.clear();
            if let Err(fault) = host.accept_upgrade() {
                let hint = fault.hint.as_deref().unwrap_or_default();
                log::error!("the program is not replaced: {fault}; {hint}");
            }
        }
        if let Some(why) = running.fatal() {
            break Err(Fault::state(why));
        }
        if let Some(waits) = &mut waiting {
            match waits.look(&mut running) {
                Ok(true) => waiting = None,
                Ok(false) => {}
                Err(fault) => break Err(fault),
            }
        }
        host.look_after(running.has_acted());
        if host.upgrade.is_due() {
            host.replace(|| {
                told.extend(signals.pending().filter(|signal| *signal != SIGUSR2));
                !told.is_empty()
            });
        }
        thread::sleep(SIGNAL_LOOK);
    };
    tell_service_manager(&[NotifyState::Stopping]);
    running.stop();
    host.shut_down();
    end
}

/// A process that does its part without the cluster knowing it yet.
struct Waiting {
    joining: Joining,
    said: String,
}

impl Waiting {
    fn new(joining: Joining) -> Self {
        Self {
            joining,
            said: String::new(),
        }
    }

    /// Whether that has ended.
    ///
    /// # Errors
    ///
    /// The name is another process's.
    fn look(&mut self, running: &mut cluster::Cluster) -> Result<bool, Fault> {
        match self.joining.wait(Duration::ZERO) {
            Ok(Some(_)) => {
                log::info!("the registry answers: what it says is to be served is served");
                running.joined();
                tell_service_manager(&[NotifyState::Status("")]);
                return Ok(true);
            }
            Ok(None) => {}
            Err(fault) if fault.code == Code::Exists => return Err(fault),
            // As for a node that has joined: the copies here are served on, and whoever puts the registry right finds them.
            Err(_) if self.joining.why() == self.said => {}
            Err(_) => log::error!("{}; this node waits on", self.joining.why()),
        }
        let why = self.joining.why();
        if why != self.said {
            running.waits(&why);
            tell_service_manager(&[NotifyState::Status(&format!("waiting: {why}"))]);
            self.said = why;
        }
        Ok(false)
    }
}

/// Four descriptors a copy and three an attachment: the 1,024 that a process is given for the sake of old programs are few,
/// and what it may have is its own to take.
fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        log::warn!("the limit of open files stays as it is: {e}");
    }
}

fn tell_service_manager(state: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(false, state) {
        log::debug!("the service manager was not told: {e}");
    }
}

fn dir_fault(error: NodeDirError) -> Fault {
    Fault::state(error.to_string())
}

/// The records of the registry, as the engine sees them.
struct RegistryRecords {
    store: Arc<dyn Registrar>,
    /// Volumes whose record could not be changed when that was last tried: it is tried several times a second, for hours if need
    /// be, and said once.
    stuck: Mutex<HashSet<VolumeId>>,
}

impl Records for RegistryRecords {
    fn cas(&self, volume: VolumeId, expected: attachment::Revision, record: &Record) -> CasOutcome {
        let answer = self.store.cas_record(volume, Revision(expected), record);
        if answer.is_ok() {
            lock(&self.stuck).remove(&volume);
        }
        match answer {
            Ok(revision) => CasOutcome::Done(revision.0),
            Err(CasError::Conflict { .. }) => match self.read(volume) {
                Ok(found) => CasOutcome::Conflict(found.map(Box::new)),
                Err(_) => CasOutcome::Ambiguous,
            },
            Err(CasError::Ambiguous { .. }) => CasOutcome::Ambiguous,
            Err(e) => {
                if lock(&self.stuck).insert(volume) {
                    log::warn!("volume {volume}: its record cannot be changed: {e}; trying on");
                }
                CasOutcome::Unavailable
            }
        }
    }

    fn read(&self, volume: VolumeId) -> Result<Option<(Record, attachment::Revision)>, String> {
        match self.store.get_record(volume) {
            Ok(found) => Ok(found.map(|(record, revision)| (record, revision.0))),
            Err(e) => Err(e.to_string()),
        }
    }
}

/// A volume served from here.
struct Served {
    front: Option<ServedFront>,
    /// Not served yet: its machine is only listened for.
    held: bool,
}

/// Its side towards the virtual machine.
struct ServedFront {
    server: Server,
    shown: Shown,
}

impl ServedFront {
    fn socket(&self) -> &Path {
        &self.shown.socket
    }
}

/// A volume that is larger than what its guest is shown.
struct Larger {
    volume: VolumeId,
    size: u64,
    capacity: Size,
}

/// This node, as the control loop and the API see it.
pub struct NodeHost {
    me: Identity,
    data_dir: PathBuf,
    engine: Handle,
    threads: Mutex<Engine>,
    dir: NodeDir,
    served: Mutex<HashMap<VolumeId, Served>>,
    /// Copies that could not be opened.
    broken: Mutex<HashMap<VolumeId, Broken>>,
    upgrade: upgrade::Upgrade,
    /// What machines were shown, for the next process.
    memory: Memory,
    sizes: Sender<Larger>,
    began: Instant,
    /// What the process before served is listened for, or need not be.
    listened: AtomicBool,
    /// What is remembered is what is served.
    settled: AtomicBool,
}

/// Why a copy could not be opened.
struct Broken {
    why: String,
    /// A process that has died has requests at its disk (PROTOCOL 5). They end, and then it can be opened.
    in_use: bool,
}

impl From<String> for Broken {
    fn from(why: String) -> Self {
        Self { why, in_use: false }
    }
}

impl From<StoreError> for Broken {
    fn from(error: StoreError) -> Self {
        Self {
            in_use: matches!(error, StoreError::InUse { .. }),
            why: error.to_string(),
        }
    }
}

/// Shows guests the sizes of volumes that have grown. What is remembered of one is never less than what its guest has seen: a
/// process that begins without the registry would show it a disk that has shrunk.
fn show_sizes(host: &Weak<NodeHost>, larger: &Receiver<Larger>) {
    while let Ok(Larger {
        volume,
        size,
        capacity,
    }) = larger.recv()
    {
        let Some(host) = host.upgrade() else { return };
        let mut served = lock(&host.served);
        if let Some(front) = served.get_mut(&volume).and_then(|s| s.front.as_mut()) {
            front.shown.size = front.shown.size.max(size);
            host.memory.note(&front.shown);
        }
        drop(served);
        capacity.grow(size);
    }
}

/// A poisoned lock means that another thread panicked between two whole operations; the map is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl NodeHost {
    fn start(
        dir: NodeDir,
        membership: &Membership,
        inherited: Option<Inherited>,
    ) -> Result<Arc<Self>, Fault> {
        let me = Identity {
            cluster: membership.cluster,
            node: membership.node.clone(),
            boot_id: membership.boot_id,
            instance: membership.instance,
        };
        let records = RegistryRecords {
            store: Arc::clone(&membership.store) as Arc<dyn Registrar>,
            stuck: Mutex::default(),
        };
        let cannot = |e: std::io::Error| Fault::internal(format!("the engine cannot start: {e}"));
        let security = &membership.security;
        let (engine, events) =
            Engine::start(&me, security, workers(), Box::new(records)).map_err(cannot)?;
        let log = Arc::clone(&membership.events);
        let names = Arc::clone(&membership.store);
        thread::Builder::new()
            .name("events".into())
            .spawn(move || note_events(&events, &log, &names))
            .map_err(cannot)?;
        let (sizes, larger) = channel();
        let host = Arc::new(Self {
            me,
            data_dir: membership.config.data_dir.clone(),
            engine: engine.handle(),
            threads: Mutex::new(engine),
            dir,
            served: Mutex::default(),
            broken: Mutex::default(),
            upgrade: upgrade::Upgrade::new(membership, inherited)?,
            memory: Memory::of(&membership.config.data_dir),
            sizes,
            began: Instant::now(),
            listened: AtomicBool::new(false),
            settled: AtomicBool::new(false),
        });
        let shows = Arc::downgrade(&host);
        thread::Builder::new()
            .name("sizes".into())
            .spawn(move || show_sizes(&shows, &larger))
            .map_err(cannot)?;
        Ok(host)
    }

    /// Opens the copies here, then takes connections for them. It needs nothing of the registry: what a copy may accept is on its
    /// disk (docs/PROTOCOL.md 11.7).
    fn open_copies(&self, membership: &Membership) -> Result<(), Fault> {
        let begun = Instant::now();
        for volume in self.dir.volumes().map_err(dir_fault)? {
            while let Err(broken) = self.open(volume) {
                if broken.in_use && begun.elapsed() < LAST_REQUESTS {
                    thread::sleep(LAST_REQUESTS_LOOK);
                    continue;
                }
                // One bad copy stops no other: the volume goes on with its other copies.
                let why = &broken.why;
                log::error!("volume {volume}: the copy here cannot be used: {why}");
                lock(&self.broken).insert(volume, broken);
                break;
            }
        }
        // Only now: a copy that is asked for before it is open would be taken for lost.
        let listener = membership.replication.try_clone();
        let cannot = |e| Fault::internal(format!("the engine cannot start: {e}"));
        self.engine.listen(listener.map_err(cannot)?);
        Ok(())
    }

    /// Does what is due. `acted`: the control loop has served what the records say.
    fn look_after(&self, acted: bool) {
        if !acted && self.began.elapsed() > ACTS {
            self.hold();
        }
        if acted && !self.settled.swap(true, Ordering::Relaxed) {
            self.forget_what_is_not_served();
        }
        self.upgrade.look_after(acted);
    }

    /// What was taken from this node while it was away, and so was never released here.
    fn forget_what_is_not_served(&self) {
        self.listened.store(true, Ordering::Relaxed);
        let served = lock(&self.served);
        for shown in self.memory.recall() {
            if !served.contains_key(&shown.volume) {
                log::info!(
                    "volume {}: it is not served here any more, and no longer remembered",
                    shown.name
                );
                self.memory.forget(shown.volume);
            }
        }
    }

    /// Listens for the machines of what the process before served, once. They are answered, and their requests wait until the registry
    /// says that they are served here (ARCHITECTURE, "Listen first").
    fn hold(&self) {
        if self.listened.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut served = lock(&self.served);
        let mut names = Vec::new();
        for shown in self.memory.recall() {
            let (volume, name) = (shown.volume, shown.name.clone());
            if served.contains_key(&volume) {
                continue;
            }
            match self.listen(shown) {
                Ok(front) => {
                    let front = Some(front);
                    served.insert(volume, Served { front, held: true });
                    names.push(name);
                }
                Err(e) => log::warn!("volume {name}: its machine is not listened for yet: {e}"),
            }
        }
        if !names.is_empty() {
            log::warn!(
                "the registry has not said what is to be served; the machines of {} are listened for meanwhile, and their requests wait",
                names.join(", ")
            );
        }
    }

    fn listen(&self, shown: Shown) -> Result<ServedFront, HostError> {
        let handed = self.upgrade.claim(shown.volume, &shown.socket);
        let bound = bind(&shown, handed)?;
        let held = HoldVolume {
            volume: shown.volume,
            name: shown.name.clone(),
            size: shown.size,
            block_size: BlockSize::of(shown.block_size),
            read_only: shown.read_only,
        };
        self.engine.hold(held).map_err(HostError::Refused)?;
        self.serve(bound, shown)
    }

    /// Serves the machines of a volume that its worker knows.
    fn serve(&self, bound: Bound, shown: Shown) -> Result<ServedFront, HostError> {
        let volume = shown.volume;
        let plane = self.engine.plane(volume, WriteCache::of(&shown.socket));
        match bound.serve(Box::new(plane)) {
            Ok(server) => Ok(ServedFront { server, shown }),
            Err(e) => {
                let _ = self.engine.detach(volume);
                Err(HostError::Refused(e.to_string()))
            }
        }
    }

    /// Who is told that a volume is larger: first what is remembered of it, then its guest.
    fn grown(&self, volume: VolumeId, capacity: Size) -> Grown {
        let sizes = self.sizes.clone();
        Box::new(move |size| {
            // Refused only when the node ends.
            let _ = sizes.send(Larger {
                volume,
                size,
                capacity: capacity.clone(),
            });
        })
    }

    /// Opens copies whose last requests took longer than the start could wait, when they have ended: on a disk that hangs,
    /// after minutes.
    fn open_late(host: &Arc<Self>) -> Result<(), Fault> {
        let host = Arc::downgrade(host);
        let look = move || {
            while let Some(host) = host.upgrade() {
                let in_use =
                    |(volume, broken): (&VolumeId, &Broken)| broken.in_use.then_some(*volume);
                let waiting: Vec<VolumeId> = lock(&host.broken).iter().filter_map(in_use).collect();
                if waiting.is_empty() {
                    return;
                }
                for volume in waiting {
                    match host.open(volume) {
                        Ok(()) => {
                            log::info!(
                                "volume {volume}: the copy here is in use no more, and opened"
                            );
                            lock(&host.broken).remove(&volume);
                        }
                        // Not one that was removed meanwhile.
                        Err(broken) => {
                            if let Some(known) = lock(&host.broken).get_mut(&volume) {
                                *known = broken;
                            }
                        }
                    }
                }
                drop(host);
                thread::sleep(LATE_LOOK);
            }
        };
        let thread = thread::Builder::new().name("late copies".into());
        let cannot = |e| Fault::internal(format!("a thread cannot start: {e}"));
        thread.spawn(look).map(drop).map_err(cannot)
    }

    fn open(&self, volume: VolumeId) -> Result<(), Broken> {
        let (store, loaded) = Store::open(&self.dir.volume_dir(volume))?;
        for warning in &loaded.warnings {
            log::warn!("volume {volume}: {warning}");
        }
        let mut metadata = loaded.metadata;
        let state = loaded.state;
        let regions = match loaded.log {
            LogImage::Regions(regions) => Some(regions),
            // Nothing was active when it was left cleanly.
            LogImage::Unreadable if state.clean => {
                for write in metadata.reset_log(&[]) {
                    write_meta(&store, &write)
                        .map_err(|e| format!("its log cannot be written anew: {e}"))?;
                }
                Some(Vec::new())
            }
            // It stays as it is until nothing can differ any more.
            LogImage::Unreadable => None,
        };
        let mut maps: [Option<DirtyMap>; BITMAPS_MAX] = [const { None }; BITMAPS_MAX];
        for (slot, map) in maps.iter_mut().enumerate() {
            if state.bitmaps[slot].is_some() {
                let chunks = state.size.div_ceil(CHUNK) as u32;
                let words = metadata.load_bitmap(&store.meta, slot, chunks);
                *map = Some(DirtyMap::from_words(state.size, words));
            }
        }
        self.engine.open(OpenCopy {
            store,
            metadata,
            state,
            regions,
            maps,
        });
        Ok(())
    }

    /// Why a copy cannot be used, and what to do about it.
    fn unusable(&self, volume: VolumeId, why: &str) -> String {
        format!(
            "{why}; to have it made anew from another copy on a sound disk, stop node {}, move {} away and start the node",
            self.me.node,
            self.dir.volume_dir(volume).display()
        )
    }

    /// Detaches everything, cleanly where that is possible. What the records ask for stays, so that a restart serves
    /// it again.
    fn shut_down(&self) {
        let volumes: Vec<VolumeId> = lock(&self.served).keys().copied().collect();
        thread::scope(|scope| {
            for volume in volumes {
                scope.spawn(move || {
                    if let Err(e) = self.release(volume) {
                        log::warn!("volume {volume}: {e}");
                    }
                });
            }
        });
        lock(&self.threads).stop();
    }

    /// What the guest asked is finished first, then the volume is left, then the socket goes: a front-end that
    /// reconnects to the next process finds nothing half-done.
    fn release(&self, volume: VolumeId) -> Result<(), String> {
        let detached = self.engine.detach(volume);
        let served = lock(&self.served).remove(&volume);
        Self::close(served);
        detached
    }

    fn close(served: Option<Served>) {
        if let Some(mut front) = served.and_then(|s| s.front) {
            front.server.stop();
        }
    }
}

/// Threads that serve volumes: half of the processors, since guests need the others.
fn workers() -> usize {
    let processors = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (processors / 2).clamp(1, 8)
}

fn write_meta(store: &Store, write: &crate::copy::MetaWrite) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(&store.meta, &write.bytes, write.offset)?;
    store.meta.sync_data()
}

fn note_events(
    events: &Receiver<crate::engine::Event>,
    log: &EventLog,
    names: &cluster::store::Store,
) {
    let mut known: HashMap<VolumeId, String> = HashMap::new();
    while let Ok(event) = events.recv() {
        let name = known.entry(event.volume).or_insert_with(|| {
            let spec = names.spec(event.volume).ok().flatten();
            spec.map_or_else(
                || event.volume.to_string(),
                |(spec, _)| spec.full_name().to_string(),
            )
        });
        let (from, to) = event.text.split_once(" -> ").unwrap_or(("", ""));
        let to = to.split(' ').next().unwrap_or_default();
        log.push(
            What::volume(&*name, from, to, event.rule)
                .epoch(event.epoch)
                .text(event.text.clone()),
        );
    }
}

fn store_error(error: StoreError) -> HostError {
    match error {
        StoreError::NoSpace { .. } => HostError::NoSpace(error.to_string()),
        StoreError::Exists { .. } | StoreError::InUse { .. } => {
            HostError::Refused(error.to_string())
        }
        _ => HostError::Io(error.to_string()),
    }
}

/// Listens for the virtual machine, or goes on to.
fn bind(shown: &Shown, handed: Option<Handed>) -> Result<Bound, HostError> {
    let config = DeviceConfig {
        volume: shown.name.clone(),
        size: shown.size,
        block_size: BlockSize::of(shown.block_size),
        num_queues: shown.num_queues,
        // The rings come later, and a driver that has no indirect tables tries for ever to put in what does not fit.
        seg_max: DeviceConfig::DEFAULT_SEG_MAX,
        read_only: shown.read_only,
        writeback: WriteCache::of(&shown.socket).is_on(),
    };
    let bound = match handed {
        None => Bound::new(config, &shown.socket),
        Some(handed) => Bound::adopt(config, &shown.socket, handed),
    };
    bound.map_err(|e| HostError::Refused(e.to_string()))
}

fn capacity(path: &Path) -> Capacity {
    match rustix::fs::statvfs(path) {
        Ok(fs) => Capacity {
            total: fs.f_blocks * fs.f_frsize,
            free: fs.f_bavail * fs.f_frsize,
        },
        Err(e) => {
            log::warn!("the space of {} is not known: {e}", path.display());
            Capacity::default()
        }
    }
}

impl Host for NodeHost {
    fn create_copy(
        &self,
        volume: VolumeId,
        copy: CopyId,
        size: u64,
        birth: Birth,
    ) -> Result<(), HostError> {
        let engine = &self.engine;
        if let Some(have) = engine.copy_of(volume) {
            return match have == copy {
                true => Ok(()),
                false => Err(HostError::Refused(format!(
                    "node {} has another copy of this volume ({have}) already",
                    self.me.node
                ))),
            };
        }
        let (epoch, tag, standing) = match birth {
            Birth::First { epoch, tag } => (epoch, tag, Standing::InSync),
            Birth::Blank => (Epoch(0), Tag(0), Standing::Inconsistent),
        };
        let state = CopyState {
            volume_id: volume,
            copy_id: copy,
            size,
            epoch,
            tag,
            promised: epoch,
            standing,
            clean: standing == Standing::InSync,
            bitmaps: [None; BITMAPS_MAX],
        };
        let (store, loaded) =
            Store::create(&self.dir.volume_dir(volume), &state, false).map_err(store_error)?;
        let maps = [const { None }; BITMAPS_MAX];
        engine.open(OpenCopy {
            store,
            metadata: loaded.metadata,
            state,
            regions: Some(Vec::new()),
            maps,
        });
        Ok(())
    }

    fn has_files(&self, volume: VolumeId) -> bool {
        match self.dir.volume_dir(volume).symlink_metadata() {
            Ok(_) => true,
            Err(e) => e.kind() != std::io::ErrorKind::NotFound,
        }
    }

    fn set_aside(&self, volume: VolumeId) -> Result<String, HostError> {
        self.engine.close(volume).map_err(HostError::Busy)?;
        let aside = Store::set_aside(&self.dir.volume_dir(volume)).map_err(store_error)?;
        lock(&self.broken).remove(&volume);
        Ok(aside.display().to_string())
    }

    fn remove_copy(&self, volume: VolumeId) -> Result<(), HostError> {
        let engine = &self.engine;
        engine.close(volume).map_err(HostError::Busy)?;
        lock(&self.broken).remove(&volume);
        match Store::remove(&self.dir.volume_dir(volume)) {
            Ok(()) | Err(StoreError::Missing { .. }) => Ok(()),
            Err(e) => Err(store_error(e)),
        }
    }

    fn local_copies(&self) -> Vec<LocalCopy> {
        let open = self.engine.copies().into_iter().map(
            |CopyStatus {
                 volume,
                 state,
                 allocated,
                 cut,
                 ..
             }| LocalCopy {
                volume,
                copy: state.copy_id,
                epoch: state.epoch,
                standing: match state.standing {
                    Standing::InSync => "in sync".into(),
                    Standing::Inconsistent => "inconsistent: its sync has not ended".into(),
                    Standing::Failed => "failed: its disk refused a write or a flush".into(),
                },
                allocated,
                trouble: (state.standing == Standing::Failed).then(|| {
                    self.unusable(
                        volume,
                        match cut {
                            true => "its data file was cut short",
                            false => "its disk failed a write or a flush",
                        },
                    )
                }),
            },
        );
        let broken = lock(&self.broken);
        let broken = broken.iter().map(|(volume, broken)| LocalCopy {
            volume: *volume,
            copy: CopyId([0; 16]),
            epoch: Epoch(0),
            standing: format!("unreadable: {}", broken.why),
            allocated: 0,
            trouble: Some(match broken.in_use {
                true => format!("{}; it is opened then", broken.why),
                false => self.unusable(*volume, &broken.why),
            }),
        });
        open.chain(broken).collect()
    }

    fn copies_here(&self) -> BTreeMap<VolumeId, CopyId> {
        let mut all: BTreeMap<VolumeId, CopyId> = self.engine.copy_ids().into_iter().collect();
        for volume in lock(&self.broken).keys() {
            all.entry(*volume).or_insert(CopyId([0; 16]));
        }
        all
    }

    fn attach(&self, request: AttachRequest) -> Result<(), HostError> {
        let volume = request.volume;
        let shown = request.front.as_ref().map(|f| Shown::of(&request, f));
        let mut served = lock(&self.served);
        let mut held = None;
        if let Some(present) = served.get(&volume) {
            if !present.held {
                return Ok(());
            }
            let becomes = match (&present.front, &shown) {
                (Some(front), Some(now)) => front.shown.becomes(now),
                _ => Err("no machine is to be served".into()),
            };
            match becomes {
                Ok(()) => held = present.front.as_ref().map(|f| f.server.capacity()),
                Err(why) => {
                    log::warn!(
                        "volume {}: {why} since its machine was served here last; the machine is let go, so that it connects again",
                        request.name
                    );
                    let _ = self.engine.detach(volume);
                    Self::close(served.remove(&volume));
                }
            }
        }
        let engine = &self.engine;
        engine.peers(&request.peers);
        if let (Some(shown), true) = (&shown, request.by_turns) {
            // What its guest negotiated is known on the node that it comes from, and until it is told every write
            // is made durable (PROTOCOL 3).
            WriteCache::of(&shown.socket).set(false);
        }
        // The socket first: it may be taken, and then nothing has happened. A front-end that reconnects finds it; it is
        // answered as soon as its worker knows the volume, which is at once and long before that has taken over.
        let bound = match (&shown, &held) {
            (Some(shown), None) => {
                let handed = self.upgrade.claim(volume, &shown.socket);
                Some(bind(shown, handed)?)
            }
            _ => None,
        };
        let capacity = held.or(bound.as_ref().map(Bound::capacity));
        let record = &request.record;
        let mine = record
            .attachment
            .as_ref()
            .is_some_and(|a| a.node == self.me.node);
        let attach = AttachVolume {
            volume,
            name: request.name,
            revision: request.revision.0,
            me: record::Attachment {
                node: self.me.node.clone(),
                boot_id: self.me.boot_id,
                instance: self.me.instance,
            },
            // The lock on this node's directory is ours, so the process that held it has ended (PROTOCOL 5).
            proof: if mine {
                Proof::PredecessorDead
            } else {
                Proof::None
            },
            read_only: request.front.as_ref().is_none_or(|f| f.read_only),
            by_turns: request.by_turns,
            grown: capacity.map(|capacity| self.grown(volume, capacity)),
            record: request.record,
        };
        // Refused, a machine that is held is held on.
        engine.attach(attach).map_err(HostError::Refused)?;
        if let Some(present) = served.get_mut(&volume) {
            present.held = false;
            return Ok(());
        }
        let mut front = None;
        if let (Some(bound), Some(shown)) = (bound, shown) {
            self.memory.note(&shown);
            front = Some(self.serve(bound, shown)?);
        }
        let held = false;
        served.insert(volume, Served { front, held });
        Ok(())
    }

    fn detach(&self, volume: VolumeId, force: bool) -> Result<(), HostError> {
        let connected = lock(&self.served)
            .get(&volume)
            .is_some_and(|s| s.front.as_ref().is_some_and(|f| f.server.connected()));
        if connected && !force {
            return Err(HostError::Connected);
        }
        // The next guest begins with the default; a restart of this process does not come here.
        let socket = lock(&self.served)
            .get(&volume)
            .and_then(|s| Some(s.front.as_ref()?.socket().to_owned()));
        if let Some(Err(e)) = socket.map(|s| WriteCache::of(&s).forget()) {
            log::warn!("volume {volume}: the write-cache switch stays: {e}");
        }
        self.memory.forget(volume);
        self.release(volume).map_err(HostError::Io)
    }

    fn by_turns(&self, volume: VolumeId, on: bool) {
        self.engine.by_turns(volume, on);
    }

    fn set_write_cache(&self, volume: VolumeId, writeback: bool) {
        let served = lock(&self.served);
        if let Some(front) = served.get(&volume).and_then(|s| s.front.as_ref()) {
            WriteCache::of(front.socket()).set(writeback);
            self.engine.write_cache(volume, writeback);
        }
    }

    fn scrub(&self, volume: VolumeId, id: u64, repair: bool) -> Result<(), HostError> {
        let begun = self.engine.scrub(volume, id, repair);
        begun.map_err(HostError::Busy)
    }

    fn stop_scrub(&self, volume: VolumeId, id: u64) {
        self.engine.stop_scrub(volume, id);
    }

    fn record_changed(&self, volume: VolumeId, record: &Record, revision: Revision) {
        self.engine
            .record(volume, Some((record.clone(), revision.0)));
    }

    fn peers_changed(&self, peers: &[(NodeName, SocketAddr)]) {
        self.engine.peers(peers);
    }

    fn attachments(&self) -> Vec<AttachmentStatus> {
        let all = self.engine.attached();
        let served = lock(&self.served);
        all.into_iter()
            .filter_map(|status| Some(status::describe(&status, served.get(&status.volume)?)))
            .collect()
    }

    fn held(&self) -> Vec<Held> {
        let served = lock(&self.served);
        let held = served.values().filter(|served| served.held);
        let fronts = held.filter_map(|served| served.front.as_ref());
        fronts
            .map(|ServedFront { server, shown }| Held {
                volume: shown.volume,
                name: shown.name.clone(),
                socket: shown.socket.clone(),
                connected: server.connected(),
            })
            .collect()
    }

    fn capacity(&self) -> Capacity {
        capacity(&self.data_dir)
    }

    fn metrics(&self) -> Metrics {
        status::metrics(self.engine.metrics(), self.engine.syncs())
    }

    fn upgrade(&self) -> Result<UpgradeView, Fault> {
        self.accept_upgrade()
    }

    fn upgrade_state(&self) -> Result<UpgradeView, Fault> {
        Ok(self.upgrade.view())
    }
}
