//! How it is done. A few worker threads, each going round one loop (`worker`) that owns the rings, the connections and
//! the disk queue of its volumes: between a guest's kick and its completion there is no lock and no other thread.
//! `volume` carries out what `replication` decides; `plane` brings the vhost-user control threads' calls to the worker.

pub mod buffer;
mod channel;
pub mod command;
mod conn;
mod context;
mod disk;
pub mod exec;
mod extents;
mod fill;
mod plane;
mod rings;
mod syncs;
mod volume;
mod worker;
mod write_cache;
mod zeroes;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, channel};

use crate::replication::attachment::Revision;
use crate::replication::ids::{CopyId, Nanos, NodeName, VolumeId};
use crate::replication::record::Record;
use crate::wire::tls::Security;
use command::GuestCommand;
use syncs::{End, Places};

pub use command::{
    AttachVolume, Command, CopyStatus, Event, Grown, HoldVolume, OpenCopy, Records,
    RegistryRequest, VolumeStatus, WorkerMetrics,
};
pub use context::Identity;
pub use plane::Plane;
pub use syncs::Syncs;
pub use write_cache::WriteCache;

/// How long a worker may take to answer a question: it never blocks, so this is a worker in trouble.
const ANSWER: Nanos = Nanos::from_ms(5_000);
/// How long a clean detach may take: draining the guest, then flushing every copy.
const DETACH: Nanos = Nanos::from_ms(40_000);

/// CLOCK_BOOTTIME.
pub fn now() -> Nanos {
    let mut ts = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `ts` is a valid place for the answer; the clock exists on every Linux since 2.6.39.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut ts) };
    Nanos(ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64)
}

/// The engine of one node: its threads.
pub struct Engine {
    workers: Vec<worker::Worker>,
    handle: Handle,
}

/// Reaches the engine from any thread.
#[derive(Clone)]
pub struct Handle {
    workers: Vec<command::Mailbox>,
    places: Arc<Places>,
}

impl Engine {
    /// Starts `workers` threads and the one that talks to the registry. Gives the events of all
    /// volumes.
    ///
    /// # Errors
    ///
    /// The system refuses a thread or a poll.
    pub fn start(
        me: &Identity,
        security: &Security,
        workers: usize,
        records: Box<dyn Records>,
    ) -> std::io::Result<(Self, Receiver<Event>)> {
        let (registry, requests) = channel();
        let (events, received) = channel();
        let places = Arc::new(Places::default());
        let mut all = Vec::new();
        for index in 0..workers {
            let (registry, events) = (registry.clone(), events.clone());
            let (me, security) = (me.clone(), security.clone());
            all.push(worker::Worker::spawn(worker::Setup {
                index,
                workers,
                me,
                security,
                registry,
                events,
                places: Arc::clone(&places),
            })?);
        }
        let handle = Handle {
            workers: all.iter().map(|w| w.mailbox.clone()).collect(),
            places,
        };
        for mailbox in &handle.workers {
            mailbox.send(Command::Siblings(handle.workers.clone()));
        }
        // It ends with the last worker, whose queue it reads.
        let mailboxes = handle.workers.clone();
        std::thread::Builder::new()
            .name("registry".into())
            .spawn(move || serve_registry(&requests, &*records, &mailboxes))?;
        Ok((
            Self {
                workers: all,
                handle,
            },
            received,
        ))
    }

    /// The way to it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Ends all threads.
    pub fn stop(&mut self) {
        self.workers.iter_mut().for_each(worker::Worker::stop);
    }
}

impl Handle {
    fn owner(&self, volume: VolumeId) -> &command::Mailbox {
        &self.workers[worker::owner(volume, self.workers.len())]
    }

    /// Takes connections of peers. Call it when all copies are open: a copy that is asked for before is "unknown".
    pub fn listen(&self, listener: std::net::TcpListener) {
        self.workers[0].send(Command::Listen(listener));
    }

    /// Serves a copy.
    pub fn open(&self, copy: OpenCopy) {
        let volume = copy.state.volume_id;
        self.owner(volume)
            .ask(ANSWER, |reply| Command::Open(Box::new(copy), reply));
    }

    /// Gives a copy up, so that its files can be removed.
    pub fn close(&self, volume: VolumeId) -> Result<(), String> {
        self.owner(volume)
            .ask(ANSWER, |reply| Command::Close(volume, reply))
            .unwrap_or_else(|| Err(silent()))
    }

    /// Takes the rings of a volume's machine before the volume is attached.
    pub fn hold(&self, hold: HoldVolume) -> Result<(), String> {
        self.owner(hold.volume)
            .ask(ANSWER, |reply| Command::Hold(Box::new(hold), reply))
            .unwrap_or_else(|| Err(silent()))
    }

    /// Attaches a volume.
    pub fn attach(&self, attach: AttachVolume) -> Result<(), String> {
        let volume = attach.volume;
        let owner = self.owner(volume);
        let answer = owner.ask(ANSWER, |reply| Command::Attach(Box::new(attach), reply));
        answer.unwrap_or_else(|| {
            // It may come to it yet: it would hold the volume, nobody would know, and every further attempt be refused.
            let nobody = std::sync::mpsc::sync_channel(1).0;
            owner.send(Command::Detach(volume, nobody));
            Err(silent())
        })
    }

    /// Detaches a volume cleanly. An error says why it was not clean; it is detached all the same.
    pub fn detach(&self, volume: VolumeId) -> Result<(), String> {
        self.owner(volume)
            .ask(DETACH, |reply| Command::Detach(volume, reply))
            .unwrap_or_else(|| Err(silent()))
    }

    /// The machine of this volume may move to another node, or not any more.
    pub fn by_turns(&self, volume: VolumeId, on: bool) {
        self.owner(volume).send(Command::ByTurns(volume, on));
    }

    /// Compares all in-sync copies of a volume that is attached here.
    pub fn scrub(&self, volume: VolumeId, id: u64, repair: bool) -> Result<(), String> {
        self.owner(volume)
            .ask(ANSWER, |reply| Command::Scrub(volume, id, repair, reply))
            .unwrap_or_else(|| Err(silent()))
    }

    /// Ends that.
    pub fn stop_scrub(&self, volume: VolumeId, id: u64) {
        self.owner(volume).send(Command::StopScrub(volume, id));
    }

    /// Whether completed writes of this volume may be in caches, as its machine negotiated elsewhere.
    pub fn write_cache(&self, volume: VolumeId, writeback: bool) {
        let command = GuestCommand::Features { writeback };
        self.owner(volume)
            .ask(ANSWER, |reply| Command::Guest(volume, command, reply));
    }

    /// The data plane for the vhost-user socket of this volume.
    pub fn plane(&self, volume: VolumeId, write_cache: WriteCache) -> Plane {
        Plane {
            mailbox: self.owner(volume).clone(),
            volume,
            write_cache,
        }
    }

    /// The record of a volume changed.
    pub fn record(&self, volume: VolumeId, found: Option<(Record, Revision)>) {
        self.owner(volume).send(Command::Record(volume, found));
    }

    /// Where nodes are reached.
    pub fn peers(&self, peers: &[(NodeName, SocketAddr)]) {
        for w in &self.workers {
            w.send(Command::Peers(peers.to_vec()));
        }
    }

    /// How long the disk has been at its oldest request.
    pub fn disk_age(&self) -> Nanos {
        let ages = self.workers.iter().map(|w| w.ask(ANSWER, Command::DiskAge));
        // A worker that does not say is as bad.
        ages.map(|age| age.unwrap_or(ANSWER))
            .max()
            .unwrap_or_default()
    }

    /// Attached volumes.
    pub fn attached(&self) -> Vec<VolumeStatus> {
        self.ask_all(Command::Attached)
    }

    /// Copies, with a look at the files of each.
    pub fn copies(&self) -> Vec<CopyStatus> {
        self.ask_all(Command::Copies)
    }

    /// The identities of all copies.
    pub fn copy_ids(&self) -> Vec<(VolumeId, CopyId)> {
        self.ask_all(|reply| Command::CopyIds(None, reply))
    }

    /// The identity of the volume's copy, if there is one.
    pub fn copy_of(&self, volume: VolumeId) -> Option<CopyId> {
        let found = self
            .owner(volume)
            .ask(ANSWER, |reply| Command::CopyIds(Some(volume), reply))?;
        found.first().map(|(_, copy)| *copy)
    }

    /// What all workers answer.
    fn ask_all<T>(&self, command: impl Fn(SyncSender<Vec<T>>) -> Command) -> Vec<T> {
        let answers = self.workers.iter().filter_map(|w| w.ask(ANSWER, &command));
        answers.flatten().collect()
    }

    /// Syncs from this node, and to it.
    pub fn syncs(&self) -> [Syncs; 2] {
        [End::Source, End::Target].map(|end| self.places.syncs(end))
    }

    /// Counters, a set for each worker.
    pub fn metrics(&self) -> Vec<WorkerMetrics> {
        self.workers
            .iter()
            .filter_map(|w| w.ask(ANSWER, Command::Metrics))
            .collect()
    }
}

fn silent() -> String {
    "the volume's worker does not answer".into()
}

fn serve_registry(
    requests: &Receiver<RegistryRequest>,
    records: &dyn Records,
    workers: &[command::Mailbox],
) {
    while let Ok(request) = requests.recv() {
        let read = matches!(request, RegistryRequest::Read(_));
        let (volume, answer) = match request {
            RegistryRequest::Cas(volume, expected, record) => (
                volume,
                Command::Cas(volume, records.cas(volume, expected, &record)),
            ),
            RegistryRequest::Read(volume) => {
                let answer = match records.read(volume) {
                    Ok(found) => Command::Record(volume, found),
                    Err(why) => {
                        log::warn!("volume {volume}: the record cannot be read: {why}");
                        // Asked again at once otherwise: the registry is in trouble already.
                        std::thread::sleep(std::time::Duration::from_millis(100));
                        Command::RecordUnavailable(volume)
                    }
                };
                (volume, answer)
            }
        };
        let worker = &workers[worker::owner(volume, workers.len())];
        worker.send(answer);
        if read {
            worker.send(Command::RecordWasRead(volume));
        }
    }
}
