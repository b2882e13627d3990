//! A cluster of real management planes in one process: real registry file, ports and sockets, and a host whose copies
//! are small files.
#![allow(dead_code)] // each test file uses its part

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use hyper::Method;
use lockstep::api::client::{Answer, Target, ask, runtime};
use lockstep::cluster::config::{NodeConfig, Serve};
use lockstep::cluster::events::{EventLog, What};
use lockstep::cluster::fault::Fault;
use lockstep::cluster::host::{
    AttachRequest, AttachmentStatus, Birth, Capacity, CopyState, Difference, Host, HostError,
    LocalCopy, Phase, ScrubState, ScrubStatus, SyncProgress,
};
use lockstep::cluster::join::{Doors, Membership, join, open_registry};
use lockstep::cluster::metrics::{Metrics, VolumeMetrics};
use lockstep::cluster::model::Labels;
use lockstep::cluster::store::{Registrar, Store};
use lockstep::cluster::{Cluster, start};
use lockstep::registry::{Access, Location, Revision};
use lockstep::replication::attachment::SyncView;
use lockstep::replication::ids::{BootId, CopyId, Instance, NodeName, Tag, VolumeId};
use lockstep::replication::record::{Attachment, Base, CopyEntry, CopyStatus, Record, State};
use lockstep::wire::hello::{Answer as GreetingAnswer, Hello, HelloRefusal, Reason};
use serde_json::Value;

/// Generous: only something broken takes this long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `check` gives something.
pub fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// What a test tells a host to do wrong, and what it saw.
#[derive(Default)]
pub struct Levers {
    pub create_error: Option<HostError>,
    pub attach_error: Option<HostError>,
    pub connected: BTreeSet<VolumeId>,
    pub phase: Option<Phase>,
    pub changes: Vec<(VolumeId, Record)>,
    pub peers: Vec<(NodeName, SocketAddr)>,
    pub by_turns: BTreeSet<VolumeId>,
    pub write_caches: BTreeMap<VolumeId, bool>,
    pub free: Option<u64>,
    pub made: BTreeSet<CopyId>,
    pub syncs: BTreeMap<CopyId, SyncProgress>,
    pub lags: BTreeMap<CopyId, String>,
    /// What attachments say of their scrubs, and what they find in the next one.
    pub scrubs: BTreeMap<VolumeId, ScrubStatus>,
    pub differences: Vec<Difference>,
    /// Scrubs go on for ever.
    pub endless: bool,
}

struct Served {
    request: AttachRequest,
    record: Record,
    _listener: Option<UnixListener>,
}

/// A host whose copies are files and whose attachments are a listening socket and a record.
pub struct TestHost {
    dir: PathBuf,
    node: NodeName,
    boot_id: BootId,
    instance: Instance,
    records: Arc<Store>,
    events: Arc<EventLog>,
    served: Mutex<BTreeMap<VolumeId, Served>>,
    pub levers: Mutex<Levers>,
    door: Arc<AtomicBool>,
    porter: Option<thread::JoinHandle<()>>,
}

/// Refuses whoever greets, as an engine does that has no such copy, until `door` is shut.
fn greeted(listener: TcpListener, name: NodeName, door: &AtomicBool) {
    listener.set_nonblocking(true).unwrap();
    while !door.load(Ordering::Acquire) {
        let Ok((mut stream, _)) = listener.accept() else {
            thread::sleep(Duration::from_millis(5));
            continue;
        };
        stream.set_nonblocking(false).unwrap();
        let (mut input, mut buffer) = (Vec::new(), [0; 1024]);
        while let Ok(None) = Hello::decode(&input) {
            match stream.read(&mut buffer) {
                Ok(n) if n > 0 => input.extend_from_slice(&buffer[..n]),
                _ => break,
            }
        }
        let mut answer = Vec::new();
        let refusal = HelloRefusal::new(Reason::UnknownCopy, "none here").by(&name);
        GreetingAnswer::Refusal(refusal).encode(&mut answer);
        let _ = stream.write_all(&answer);
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        self.door.store(true, Ordering::Release);
        let _ = self.porter.take().unwrap().join();
    }
}

impl TestHost {
    fn new(joined: &Membership) -> Self {
        let dir = joined.config.data_dir.join("copies");
        fs::create_dir_all(&dir).unwrap();
        let door = Arc::new(AtomicBool::new(false));
        let porter = {
            let listener = joined.replication.try_clone().unwrap();
            let (name, door) = (joined.node.clone(), door.clone());
            thread::spawn(move || greeted(listener, name, &door))
        };
        Self {
            door,
            porter: Some(porter),
            dir,
            node: joined.node.clone(),
            boot_id: joined.boot_id,
            instance: joined.instance,
            records: joined.store.clone(),
            events: joined.events.clone(),
            served: Mutex::default(),
            levers: Mutex::default(),
        }
    }

    fn path(&self, volume: VolumeId) -> PathBuf {
        self.dir.join(volume.to_string())
    }

    /// Changes the record until it takes.
    fn change(&self, volume: VolumeId, change: impl Fn(&mut Record)) -> Result<Record, HostError> {
        loop {
            let (mut record, at) = self
                .records
                .get_record(volume)
                .map_err(|e| HostError::Busy(e.to_string()))?
                .ok_or_else(|| HostError::Refused("the volume is gone".into()))?;
            change(&mut record);
            if self.records.cas_record(volume, at, &record).is_ok() {
                return Ok(record);
            }
        }
    }
}

impl Host for TestHost {
    fn create_copy(
        &self,
        volume: VolumeId,
        copy: CopyId,
        _size: u64,
        birth: Birth,
    ) -> Result<(), HostError> {
        let mut levers = self.levers.lock().unwrap();
        if let Some(e) = levers.create_error.clone() {
            return Err(e);
        }
        // S18, over the life of the whole host: no identity is ever made a second time as a blank copy.
        assert!(levers.made.insert(copy) || birth != Birth::Blank);
        fs::write(self.path(volume), copy.to_string()).map_err(|e| HostError::Io(e.to_string()))
    }

    fn has_files(&self, volume: VolumeId) -> bool {
        self.path(volume).exists()
    }

    fn set_aside(&self, volume: VolumeId) -> Result<String, HostError> {
        let aside = self.dir.with_file_name(format!("aside-{volume}"));
        fs::rename(self.path(volume), &aside).map_err(|e| HostError::Io(e.to_string()))?;
        Ok(aside.display().to_string())
    }

    fn remove_copy(&self, volume: VolumeId) -> Result<(), HostError> {
        let _ = fs::remove_file(self.path(volume));
        Ok(())
    }

    fn local_copies(&self) -> Vec<LocalCopy> {
        let entries = fs::read_dir(&self.dir).unwrap().flatten();
        entries
            .map(|e| LocalCopy {
                volume: e.file_name().to_str().unwrap().parse().unwrap(),
                copy: fs::read_to_string(e.path()).unwrap().parse().unwrap(),
                epoch: lockstep::replication::ids::Epoch(1),
                standing: "in sync".into(),
                trouble: None,
                allocated: 4096,
            })
            .collect()
    }

    fn attach(&self, request: AttachRequest) -> Result<(), HostError> {
        if let Some(e) = self.levers.lock().unwrap().attach_error.clone() {
            return Err(e);
        }
        let me = Attachment {
            node: self.node.clone(),
            boot_id: self.boot_id,
            instance: self.instance,
        };
        let record = self.change(request.volume, |r| {
            r.advance(r.epoch.next(), Tag(r.epoch.0 * 31));
            r.state = State::Active;
            r.attachment = Some(me.clone());
        })?;
        let listener = match &request.front {
            Some(front) => {
                let _ = fs::remove_file(&front.socket);
                let bound = UnixListener::bind(&front.socket);
                Some(bound.map_err(|e| HostError::Io(e.to_string()))?)
            }
            None => None,
        };
        self.events
            .push(What::volume(&request.name, "acquiring", "serving", "test").epoch(record.epoch));
        self.served.lock().unwrap().insert(
            request.volume,
            Served {
                request,
                record,
                _listener: listener,
            },
        );
        Ok(())
    }

    fn detach(&self, volume: VolumeId, force: bool) -> Result<(), HostError> {
        let mut served = self.served.lock().unwrap();
        if !served.contains_key(&volume) {
            return Ok(());
        }
        if !force && self.levers.lock().unwrap().connected.contains(&volume) {
            return Err(HostError::Connected);
        }
        let Some(gone) = served.remove(&volume) else {
            return Ok(());
        };
        self.levers.lock().unwrap().scrubs.remove(&volume);
        if let Some(front) = &gone.request.front {
            let _ = fs::remove_file(&front.socket);
        }
        // Somebody else's record by now: theirs to change.
        let mine = |r: &Record| {
            r.attachment
                .as_ref()
                .is_some_and(|a| a.instance == self.instance)
        };
        let _ = self.change(volume, |r| {
            if mine(r) {
                r.state = State::Clean;
                r.attachment = None;
            }
        });
        Ok(())
    }

    fn by_turns(&self, volume: VolumeId, on: bool) {
        let mut levers = self.levers.lock().unwrap();
        match on {
            true => levers.by_turns.insert(volume),
            false => levers.by_turns.remove(&volume),
        };
    }

    fn set_write_cache(&self, volume: VolumeId, writeback: bool) {
        let mut levers = self.levers.lock().unwrap();
        levers.write_caches.insert(volume, writeback);
    }

    fn record_changed(&self, volume: VolumeId, record: &Record, _revision: Revision) {
        if let Some(served) = self.served.lock().unwrap().get_mut(&volume) {
            served.record = record.clone();
        }
        let mut levers = self.levers.lock().unwrap();
        levers.changes.push((volume, record.clone()));
    }

    fn scrub(&self, volume: VolumeId, id: u64, repair: bool) -> Result<(), HostError> {
        let mut levers = self.levers.lock().unwrap();
        if levers.scrubs.get(&volume).is_some_and(|s| s.id == id) {
            return Ok(());
        }
        let mut status = ScrubStatus::waiting(id, repair, 1 << 30);
        status.state = ScrubState::Running;
        status.differences = levers.differences.clone();
        for d in &mut status.differences {
            d.repaired = repair;
            status.differing_bytes += d.length;
            status.repaired_bytes += if repair { d.length } else { 0 };
        }
        levers.scrubs.insert(volume, status);
        Ok(())
    }

    fn stop_scrub(&self, volume: VolumeId, id: u64) {
        let mut levers = self.levers.lock().unwrap();
        if let Some(s) = levers
            .scrubs
            .get_mut(&volume)
            .filter(|s| s.id == id && s.is_open())
        {
            *s = s.clone().broken_off("it was stopped");
        }
    }

    fn peers_changed(&self, peers: &[(NodeName, SocketAddr)]) {
        self.levers.lock().unwrap().peers = peers.to_vec();
    }

    fn attachments(&self) -> Vec<AttachmentStatus> {
        let mut levers = self.levers.lock().unwrap();
        if !levers.endless {
            let open = levers.scrubs.values_mut().filter(|s| s.is_open());
            open.for_each(|s| s.state = ScrubState::Done);
        }
        let served = self.served.lock().unwrap();
        served
            .iter()
            .map(|(volume, s)| AttachmentStatus {
                volume: *volume,
                phase: levers.phase.unwrap_or(Phase::Serving),
                why: String::new(),
                socket: s.request.front.as_ref().map(|f| f.socket.clone()),
                connected: levers.connected.contains(volume),
                epoch: s.record.epoch,
                copies: s
                    .record
                    .present()
                    .map(|c| CopyState {
                        copy: c.copy_id,
                        node: c.node.clone(),
                        role: if c.copy_id == s.record.master {
                            "master"
                        } else {
                            "replica"
                        }
                        .into(),
                        state: match c.status {
                            CopyStatus::InSync => "in_sync",
                            _ if levers.syncs.contains_key(&c.copy_id) => "syncing",
                            _ => "missing",
                        }
                        .into(),
                        lag: levers.lags.get(&c.copy_id).cloned().unwrap_or_default(),
                        sync: levers.syncs.get(&c.copy_id).cloned(),
                    })
                    .collect(),
                inflight: 0,
                writeback: true,
                scrub: levers.scrubs.get(volume).cloned(),
            })
            .collect()
    }

    fn capacity(&self) -> Capacity {
        Capacity {
            total: 100 << 30,
            free: self.levers.lock().unwrap().free.unwrap_or(50 << 30),
        }
    }

    fn metrics(&self) -> Metrics {
        let levers = self.levers.lock().unwrap();
        let served = self.served.lock().unwrap();
        let mut metrics = Metrics::default();
        metrics.ejections.push(("late".into(), 3));
        (metrics.syncs_started, metrics.syncs_completed) = (2, 1);
        metrics.volumes.extend(served.values().map(|s| {
            let mut volume = VolumeMetrics {
                volume: s.request.volume,
                name: s.request.name.clone(),
                frontend: Default::default(),
                network: Default::default(),
                backend: Default::default(),
                inflight: 2,
                sync: levers.syncs.values().fold(SyncView::default(), |sum, s| {
                    sum.plus(SyncView {
                        remaining_bytes: s.remaining_bytes,
                        total_bytes: s.total_bytes,
                        bytes_per_second: s.bytes_per_second,
                    })
                }),
                scrub: Default::default(),
                read_repairs: 1,
            };
            volume.frontend.write.total = 7;
            volume.frontend.write.seconds.observe(0.001);
            volume
        }));
        metrics
    }
}

/// One node; stopped when it is dropped.
pub struct Node {
    pub name: String,
    pub run_dir: PathBuf,
    pub host: Arc<TestHost>,
    pub store: Arc<Store>,
    pub http: String,
    cluster: Option<Cluster>,
}

impl Node {
    pub fn api(&self) -> Target {
        Target::Unix(self.run_dir.join("api.sock"))
    }

    pub fn ask(&self, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
        request(&self.api(), method, path, body)
    }

    pub fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask(Method::GET, path, None);
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    pub fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.ask(Method::POST, path, Some(body))
    }

    pub fn create(&self, name: &str, replicas: u8) -> (u16, Value) {
        let body = serde_json::json!({
            "namespace": "default", "name": name, "size": 1 << 30, "wishes": {"replicas": replicas},
        });
        self.post("/api/v1/volumes", body)
    }

    pub fn volume(&self, name: &str) -> Value {
        self.get(&format!("/api/v1/volumes/default/{name}"))
    }

    pub fn volume_id(&self, name: &str) -> VolumeId {
        self.volume(name)["id"].as_str().unwrap().parse().unwrap()
    }

    /// The record as the registry has it.
    pub fn record(&self, name: &str) -> Record {
        let id = self.volume_id(name);
        self.store.get_record(id).unwrap().unwrap().0
    }

    /// Changes the record as an attachment or another node's management would.
    pub fn edit(&self, name: &str, change: impl Fn(&mut Record)) {
        self.host.change(self.volume_id(name), change).unwrap();
    }

    /// One change of the copies as an attachment makes it (RESYNC: membership): admits the copies `synced`, removes those
    /// that leave once there are enough, and has the preferred one be the master.
    pub fn settle(&self, name: &str, synced: &[CopyId]) {
        self.edit(name, |r| {
            let (epoch, tag) = (r.epoch.next(), Tag(r.epoch.0 * 31));
            r.advance(epoch, tag);
            for copy in r.copies.iter_mut().filter(|c| synced.contains(&c.copy_id)) {
                copy.status = CopyStatus::InSync;
                copy.base = Base {
                    since: epoch,
                    last: None,
                };
            }
            let stay = |c: &&CopyEntry| c.status == CopyStatus::InSync && !c.leaving;
            let staying: Vec<CopyId> = r.copies.iter().filter(stay).map(|c| c.copy_id).collect();
            let enough = staying.len() > usize::from(r.replicas_wanted);
            for copy in r.copies.iter_mut() {
                let absent = copy.status == CopyStatus::Missing;
                if (copy.leaving && (absent || enough)) || (absent && enough) {
                    copy.status = CopyStatus::Removed;
                }
            }
            if let Some(wish) = r.preferred.take().filter(|p| staying.contains(p)) {
                r.master = wish;
            }
            if r.copy(r.master).unwrap().status != CopyStatus::InSync {
                r.master = staying[0];
            }
        });
    }

    /// What the events of the volume say, all nodes', oldest first: `rule: text`.
    pub fn events(&self, name: &str) -> Vec<String> {
        let events = self.get(&format!("/api/v1/events?volume={name}"));
        let line = |e: &Value| Some(format!("{}: {}", e["rule"].as_str()?, e["text"].as_str()?));
        events.as_array().unwrap().iter().filter_map(line).collect()
    }

    pub fn fatal(&self) -> Option<String> {
        self.cluster.as_ref().and_then(Cluster::fatal)
    }

    pub fn stop(mut self) {
        self.cluster.take().unwrap().stop();
    }

    /// Ends it as a crash does, as far as the records go: nothing is released.
    pub fn crash(self) {
        self.stop();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(cluster) = self.cluster.take() {
            cluster.stop();
        }
    }
}

/// Asks, and reads the answer as JSON.
pub fn request(target: &Target, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
    let answer = raw(target, method, path, body);
    let value = serde_json::from_slice(&answer.body)
        .unwrap_or_else(|e| panic!("{path}: {e}: {:?}", answer.body));
    (answer.status.as_u16(), value)
}

pub fn raw(target: &Target, method: Method, path: &str, body: Option<Value>) -> Answer {
    let body = body.map(|b| b.to_string().into_bytes());
    runtime()
        .unwrap()
        .block_on(ask(target, method, path, body, Some(PATIENCE * 2)))
        .unwrap()
}

/// The directory of a cluster.
pub struct Lab {
    pub dir: tempfile::TempDir,
}

impl Lab {
    pub fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub fn registry(&self) -> PathBuf {
        self.dir.path().join("registry.db")
    }

    pub fn config(&self, name: &str) -> NodeConfig {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        NodeConfig {
            name: NodeName(name.into()),
            data_dir: self.dir.path().join(name),
            run_dir: self.dir.path().join(format!("{name}.run")),
            listen: any,
            advertise: None,
            http: any,
            registry: Location::Sqlite(self.registry()),
            access: Access::default(),
            insecure_plaintext: false,
            labels: Labels::new(),
            serve: Vec::new(),
        }
    }

    pub fn node(&self, name: &str) -> Node {
        self.start(self.config(name)).unwrap()
    }

    pub fn node_serving(&self, name: &str, serve: &[&str]) -> Node {
        let mut config = self.config(name);
        config.serve = serve.iter().map(|s| s.parse::<Serve>().unwrap()).collect();
        self.start(config).unwrap()
    }

    pub fn start(&self, config: NodeConfig) -> Result<Node, Fault> {
        let registry = open_registry(&config)?;
        let joined = join(config, registry, Doors::default())?;
        let (name, run_dir, store) = (
            joined.node.0.clone(),
            joined.config.run_dir.clone(),
            joined.store.clone(),
        );
        let host = Arc::new(TestHost::new(&joined));
        let cluster = start(joined, host.clone())?;
        let record = store.node(&NodeName(name.clone()))?.unwrap().0;
        Ok(Node {
            name,
            run_dir,
            host,
            store,
            http: record.http,
            cluster: Some(cluster),
        })
    }

    pub fn nodes<const N: usize>(&self) -> [Node; N] {
        std::array::from_fn(|i| self.node(&format!("n{}", i + 1)))
    }

    /// Which copy of `volume` the node's disk holds.
    pub fn copy_on(&self, node: &str, volume: VolumeId) -> Option<CopyId> {
        let path = self.dir.path().join(node).join("copies");
        let text = fs::read_to_string(path.join(volume.to_string())).ok()?;
        text.parse().ok()
    }

    pub fn copies(&self, name: &str) -> Vec<String> {
        let dir: &Path = &self.dir.path().join(name).join("copies");
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}
