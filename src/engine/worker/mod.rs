//! One worker: a thread that owns everything of its volumes from the guest's ring to the disk and the wire, and goes
//! round one loop. A turn takes what has arrived, has the state machines decide, then submits once to the disk, writes
//! once to each peer and notifies each guest once.

mod greeting;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use mio::net::TcpListener;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::command::{Command, Event, Mailbox, RegistryRequest, WorkerMetrics};
use super::context::{Context, Identity, Role, next_frame};
use super::disk::Disk;
use super::syncs::Places;
use super::volume::Volume;
use crate::replication::ids::{Nanos, VolumeId};
use crate::wire::WireError;
use crate::wire::frame;
use crate::wire::hello::{Answer, Hello, HelloRefusal, Reason};
use crate::wire::tls::Security;

const MAIL: Token = Token(0);
const DISK: Token = Token(1);
const DOOR: Token = Token(2);
/// Tokens of connections and kicks come after this one.
const FIRST: usize = 16;
/// How often time is told to the state machines. They need it at least every 50 ms.
const TICK: Nanos = Nanos::from_ms(25);
/// The same while nothing is attached and no attachment is connected.
const IDLE_TICK: Nanos = Nanos::from_ms(500);
/// Reads of one connection in one turn; the others have their turn before it goes on.
const READS: usize = 8;

/// A worker that runs.
pub struct Worker {
    /// Reaches it.
    pub mailbox: Mailbox,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// A worker that panicked has broken one of its own rules, and its volumes would hang for ever. Ended
/// at any moment nothing acknowledged is lost; so the whole process ends, and is started again.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            log::error!("a worker broke one of its own rules (see above); the node ends");
            std::process::abort();
        }
    }
}

/// What a worker needs to start.
pub struct Setup {
    /// Its number, and how many there are: a volume belongs to one by its id.
    pub index: usize,
    /// See `index`.
    pub workers: usize,
    /// Who we are.
    pub me: Identity,
    /// What connections with other nodes are secured by.
    pub security: Security,
    /// To the registry's thread.
    pub registry: Sender<RegistryRequest>,
    /// To the node's log of events.
    pub events: Sender<Event>,
    /// The node's places for syncs.
    pub places: Arc<Places>,
}

/// Which of `workers` owns a volume.
pub fn owner(volume: VolumeId, workers: usize) -> usize {
    // Ids are random; any of their bytes spread well.
    usize::from(u16::from_le_bytes([volume.0[0], volume.0[1]])) % workers
}

impl Worker {
    /// Starts a worker thread.
    ///
    /// # Errors
    ///
    /// The system refuses a thread, a poll or an io_uring.
    pub fn spawn(setup: Setup) -> io::Result<Self> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), MAIL)?;
        let (mailbox, commands) = Mailbox::new(waker);
        let (started, start) = std::sync::mpsc::sync_channel(1);
        let name = format!("worker-{}", setup.index);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _guard = AbortOnPanic;
            match Loop::new(setup, poll, commands) {
                Ok(mut l) => {
                    let _ = started.send(Ok(()));
                    l.run();
                }
                Err(e) => drop(started.send(Err(e))),
            }
        })?;
        let thread = Some(thread);
        match start.recv() {
            Ok(result) => result.map(|()| Self { mailbox, thread }),
            Err(_) => Err(io::Error::other("the worker ended before it began")),
        }
    }

    /// Ends the thread.
    pub fn stop(&mut self) {
        self.mailbox.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a worker panicked");
        }
    }
}

struct Loop {
    setup: Setup,
    poll: Poll,
    commands: Receiver<Command>,
    /// Mailboxes of all workers, for connections that belong to another one.
    siblings: Vec<Mailbox>,
    listener: Option<TcpListener>,
    /// Accepting failed; there may be more.
    door_waits: bool,
    disk_event: EventFd,
    ctx: Context,
    volumes: Vec<Volume>,
    by_id: HashMap<VolumeId, usize>,
    /// Volumes that this turn has to do with.
    touched: Vec<usize>,
    /// Connections with bytes to read.
    readable: Vec<usize>,
    /// Volumes that decided in this turn.
    settled: Vec<usize>,
    /// Something here needs time to be told, as of the last tick.
    busy: bool,
    stop: bool,
    ticked: Nanos,
}

impl Loop {
    fn new(setup: Setup, poll: Poll, commands: Receiver<Command>) -> io::Result<Self> {
        let disk_event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let fd = disk_event.as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&fd), DISK, Interest::READABLE)?;
        let disk = Disk::new(fd)?;
        let registry = poll.registry().try_clone()?;
        let mut ctx = Context::new(
            setup.me.clone(),
            setup.security.clone(),
            disk,
            registry,
            FIRST,
            setup.registry.clone(),
            setup.events.clone(),
        );
        ctx.turns.places = Arc::clone(&setup.places);
        Ok(Self {
            setup,
            poll,
            commands,
            siblings: Vec::new(),
            listener: None,
            door_waits: false,
            disk_event,
            ctx,
            volumes: Vec::new(),
            by_id: HashMap::new(),
            touched: Vec::new(),
            readable: Vec::new(),
            settled: Vec::new(),
            busy: true,
            stop: false,
            ticked: Nanos(0),
        })
    }

    fn run(&mut self) {
        let mut events = Events::with_capacity(1024);
        while !self.stop {
            let wait = self.wait();
            match self.poll.poll(&mut events, wait) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => {
                    log::error!("waiting for events failed: {e}; this worker ends");
                    return;
                }
            }
            self.ctx.now = super::now();
            self.ctx.disk.now = self.ctx.now;
            let mut disk = false;
            for event in &events {
                match event.token() {
                    MAIL => {}
                    DISK => disk = true,
                    DOOR => self.accept(),
                    Token(token) => self.on_ready(token, event.is_readable(), event.is_writable()),
                }
            }
            if disk {
                // Nothing to read only when another event of this turn's batch consumed it.
                let _ = self.disk_event.read();
            }
            self.turn();
        }
    }

    fn wait(&self) -> Option<Duration> {
        let more = !self.touched.is_empty()
            || !self.readable.is_empty()
            || !self.ctx.unsent.is_empty()
            || self.ctx.disk.walks();
        if more {
            return Some(Duration::ZERO);
        }
        let tick = if self.busy { TICK } else { IDLE_TICK };
        let left = tick.0.saturating_sub(super::now().since(self.ticked).0);
        // Rounded up by the poll to whole milliseconds.
        Some(Duration::from_nanos(left))
    }

    fn turn(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            self.busy = true;
            self.on_command(command);
        }
        self.read_all();
        if self.ctx.now.since(self.ticked) >= TICK {
            self.ticked = self.ctx.now;
            self.tick();
        }
        self.ctx.disk.walk();
        self.settle();
        self.finish();
    }

    /// Has every touched volume decide, and what the disk did at once come back, until nothing moves.
    fn settle(&mut self) {
        loop {
            while let Some(done) = self.ctx.disk.completed() {
                let at = done.token.volume;
                self.volumes[at].on_disk(&mut self.ctx, done);
                self.touch(at);
            }
            if self.touched.is_empty() {
                return;
            }
            self.touched.sort_unstable();
            self.touched.dedup();
            for at in std::mem::take(&mut self.touched) {
                self.volumes[at].settle(&mut self.ctx);
                self.settled.push(at);
            }
        }
    }

    /// The way out: one submit to the disk, one vectored write a peer, one notification a guest.
    fn finish(&mut self) {
        self.submit();
        let mut tokens: Vec<usize> = self.ctx.unsent.drain().collect();
        for token in tokens.drain(..) {
            let volumes = &self.volumes;
            self.ctx.pack_acks(token, |at| volumes[at].ack_state());
            if let Err(why) = self.ctx.flush(token) {
                self.end(token, &why);
            }
        }
        if !self.touched.is_empty() {
            // A connection broke on the way out.
            self.settle();
            self.submit();
        }
        self.settled.sort_unstable();
        self.settled.dedup();
        for at in std::mem::take(&mut self.settled) {
            if self.volumes[at].finish_turn(&mut self.ctx) {
                self.touched.push(at);
            }
        }
    }

    fn submit(&mut self) {
        if let Err(e) = self.ctx.disk.submit() {
            log::error!("io_uring refuses submissions: {e}");
        }
    }

    fn touch(&mut self, at: usize) {
        if self.touched.last() != Some(&at) {
            self.touched.push(at);
        }
    }

    fn tick(&mut self) {
        self.busy = self.volumes.iter().any(Volume::is_busy) || !self.ctx.peers.is_empty();
        for at in 0..self.volumes.len() {
            if self.volumes[at].wants_time(self.ctx.now) {
                self.volumes[at].on_tick(&mut self.ctx);
                self.touched.push(at);
            }
        }
        if std::mem::take(&mut self.door_waits) {
            self.accept();
        }
        for token in self.ctx.overdue() {
            self.end(token, "no greeting in time");
        }
    }

    // ---- connections

    fn on_ready(&mut self, token: usize, readable: bool, writable: bool) {
        if let Some(&(at, index)) = self.ctx.kicks.get(&token) {
            self.volumes[at].kicked(index);
            return self.touch(at);
        }
        let Some(peer) = self.ctx.peers.get_mut(&token) else {
            return;
        };
        if writable {
            let waits = peer.conn.unblock();
            if let Role::Dialing {
                volume,
                link,
                hello,
                node,
            } = &peer.role
            {
                let (volume, link, node) = (*volume, *link, node.clone());
                match peer
                    .conn
                    .stream
                    .take_error()
                    .and_then(|e| e.map_or(Ok(()), Err))
                    .and_then(|()| peer.conn.stream.peer_addr())
                {
                    Ok(_) => {
                        let _ = peer.conn.stream.set_nodelay(true);
                        let mut bytes = Vec::new();
                        hello.encode(&mut bytes);
                        peer.role = Role::Greeting { volume, link, node };
                        self.ctx.push(token, bytes);
                    }
                    Err(e) if e.kind() == io::ErrorKind::NotConnected => return,
                    Err(e) => return self.end(token, &format!("cannot connect: {e}")),
                }
            } else if waits {
                self.ctx.unsent.insert(token);
            }
        }
        if readable && !self.readable.contains(&token) {
            self.readable.push(token);
        }
    }

    fn read_all(&mut self) {
        for token in std::mem::take(&mut self.readable) {
            if self.read(token) {
                self.readable.push(token);
            }
        }
    }

    /// Reads and understands; `true` when there may be more.
    fn read(&mut self, token: usize) -> bool {
        for _ in 0..READS {
            let Some(peer) = self.ctx.peers.get_mut(&token) else {
                return false;
            };
            let framed = matches!(peer.role, Role::Copy { .. } | Role::Attachment { .. });
            let need = if framed {
                frame::needed(peer.conn.input()).unwrap_or(0)
            } else {
                0
            };
            match peer.conn.read(need) {
                Ok(0) => {
                    // A handshake says things of its own.
                    if peer.conn.waits() {
                        self.ctx.unsent.insert(token);
                    }
                    return false;
                }
                Ok(_) => {}
                Err(e) => {
                    self.end(token, &e.to_string());
                    return false;
                }
            }
            if let Err(why) = self.understand(token) {
                self.end(token, &why);
                return false;
            }
        }
        true
    }

    /// Takes every whole message off a connection's input.
    fn understand(&mut self, token: usize) -> Result<(), String> {
        loop {
            let Some(peer) = self.ctx.peers.get_mut(&token) else {
                return Ok(());
            };
            match &peer.role {
                Role::Copy { volume, link } => {
                    let (volume, link) = (*volume, *link);
                    let Some((message, data, taken)) = next_frame(peer.conn.input())? else {
                        return Ok(());
                    };
                    peer.conn.take(taken);
                    self.volumes[volume].copy_says(&mut self.ctx, link, message, data);
                    self.touch(volume);
                }
                Role::Attachment {
                    volume, session, ..
                } => {
                    let (volume, session) = (*volume, *session);
                    let Some((message, data, taken)) = next_frame(peer.conn.input())? else {
                        return Ok(());
                    };
                    peer.conn.take(taken);
                    self.volumes[volume].attachment_says(&mut self.ctx, session, message, data);
                    self.touch(volume);
                }
                Role::Stranger => {
                    let (hello, taken) = match Hello::decode(peer.conn.input()) {
                        Ok(Some(whole)) => whole,
                        Ok(None) => return Ok(()),
                        // Refused in a form that every version reads.
                        Err(WireError::Versions { theirs, .. }) => {
                            self.refuse(token, HelloRefusal::no_common_version(theirs));
                            return Ok(());
                        }
                        Err(e) => return Err(e.to_string()),
                    };
                    peer.conn.take(taken);
                    self.welcome(token, hello);
                }
                Role::Greeting { volume, link, .. } => {
                    let (volume, link) = (*volume, *link);
                    let Some((answer, taken)) =
                        Answer::decode(peer.conn.input()).map_err(|e| e.to_string())?
                    else {
                        return Ok(());
                    };
                    peer.conn.take(taken);
                    match answer {
                        Answer::Ack(ack) => {
                            peer.role = Role::Copy { volume, link };
                            let boot = Ok(ack.boot_id);
                            self.volumes[volume].copy_link(&mut self.ctx, link, token, boot);
                            self.touch(volume);
                        }
                        Answer::Refusal(HelloRefusal {
                            reason: Reason::UnknownCopy,
                            ..
                        }) => {
                            self.ctx.remove(token);
                            self.volumes[volume].copy_unknown(&self.ctx, link, token);
                            self.touch(volume);
                            return Ok(());
                        }
                        Answer::Refusal(refusal) => {
                            return Err(format!("refused: {}", refusal.text));
                        }
                    }
                }
                Role::Dialing { .. } | Role::Closing => return Ok(()),
            }
        }
    }

    /// Ends a connection and tells whom it concerns.
    fn end(&mut self, token: usize, why: &str) {
        let Some(peer) = self.ctx.remove(token) else {
            return;
        };
        if let Role::Greeting { node, .. } = &peer.role {
            self.ctx.not_greeted(node.clone());
        }
        match peer.role {
            Role::Dialing { volume, link, .. }
            | Role::Greeting { volume, link, .. }
            | Role::Copy { volume, link } => {
                self.volumes[volume].copy_link(&mut self.ctx, link, token, Err(why));
                self.touch(volume);
            }
            Role::Attachment {
                volume, session, ..
            } => {
                log::info!(
                    "volume {}: the attachment's connection ended: {why}",
                    self.volumes[volume].id
                );
                self.volumes[volume].attachment_gone(&self.ctx, session);
                self.touch(volume);
            }
            Role::Stranger => log::debug!("a connection ended before its greeting: {why}"),
            Role::Closing => {}
        }
    }

    // ---- commands

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Siblings(all) => {
                self.ctx.mailbox = all.get(self.setup.index).cloned();
                self.siblings = all;
            }
            Command::Listen(listener) => self.listen(listener),
            Command::Open(open, reply) => {
                let at = self.place(open.state.volume_id);
                if let Err(e) = self.volumes[at].open(&self.ctx, *open) {
                    log::error!("volume {}: {e}", self.volumes[at].id);
                }
                let _ = reply.try_send(());
            }
            Command::Close(volume, reply) => {
                let result = match self.by_id.get(&volume) {
                    Some(&at) => {
                        self.end_sessions_of(at);
                        self.volumes[at].close()
                    }
                    None => Ok(()),
                };
                let _ = reply.try_send(result);
            }
            Command::Hold(hold, reply) => {
                let at = self.place(hold.volume);
                let _ = reply.try_send(self.volumes[at].hold(*hold));
            }
            Command::Attach(attach, reply) => {
                let at = self.place(attach.volume);
                let _ = reply.try_send(self.volumes[at].attach(&self.ctx, *attach));
                self.touch(at);
            }
            Command::Detach(volume, reply) => {
                let at = self.place(volume);
                self.volumes[at].detach(&self.ctx, reply);
                self.touch(at);
            }
            Command::Guest(volume, command, reply) => {
                let at = self.place(volume);
                self.volumes[at].on_guest(&mut self.ctx, command, reply);
                self.touch(at);
            }
            Command::Park(volume, patience, reply) => {
                let at = self.place(volume);
                self.volumes[at].park(self.ctx.now, patience, reply);
                self.touch(at);
            }
            Command::Unpark(volume) => {
                let at = self.place(volume);
                self.volumes[at].unpark();
                self.touch(at);
            }
            Command::DiskAge(reply) => drop(reply.try_send(self.ctx.disk.age())),
            Command::ByTurns(volume, on) => {
                let at = self.place(volume);
                self.volumes[at].by_turns(on);
                self.touch(at);
            }
            Command::Scrub(volume, id, repair, reply) => {
                let mut answer = Err("the volume is not attached here".into());
                self.with_attachment(volume, |a, now| answer = a.scrub(now, id, repair));
                let _ = reply.try_send(answer);
            }
            Command::StopScrub(volume, id) => {
                self.with_attachment(volume, |a, now| a.stop_scrub(now, id))
            }
            Command::Record(volume, found) => {
                let at = self.place(volume);
                self.volumes[at].on_record(&self.ctx, found);
                self.touch(at);
            }
            Command::RecordUnavailable(volume) => {
                self.with_attachment(volume, |a, now| a.on_record_unavailable(now))
            }
            Command::RecordWasRead(volume) => self.ctx.record_was_read(volume),
            Command::Cas(volume, outcome) => {
                self.with_attachment(volume, |a, now| a.on_cas(now, outcome))
            }
            Command::Grown(volume, ticket, result) => {
                if let Some(&at) = self.by_id.get(&volume) {
                    self.volumes[at].files_grown(&self.ctx, ticket, result);
                    self.touch(at);
                }
            }
            Command::Peers(peers) => self.ctx.addresses = peers.into_iter().collect(),
            Command::Adopt(moved, hello) => self.adopt(*moved, &hello),
            Command::Attached(reply) => {
                let all = self.volumes.iter().filter_map(Volume::status);
                let _ = reply.try_send(all.collect());
            }
            Command::Copies(reply) => {
                let all = self.volumes.iter().filter_map(Volume::copy_status);
                let _ = reply.try_send(all.collect());
            }
            Command::CopyIds(volume, reply) => {
                let id = |v: &Volume| Some((v.id, v.copy_id()?));
                let all = match volume {
                    None => self.volumes.iter().filter_map(id).collect(),
                    Some(volume) => {
                        let at = self.by_id.get(&volume);
                        at.and_then(|at| id(&self.volumes[*at]))
                            .into_iter()
                            .collect()
                    }
                };
                let _ = reply.try_send(all);
            }
            Command::Metrics(reply) => {
                let _ = reply.try_send(WorkerMetrics {
                    volumes: self.volumes.iter().filter_map(Volume::metrics).collect(),
                    wire_raw: self.ctx.wire_raw,
                    wire_sent: self.ctx.wire_sent,
                    promotions: self.ctx.promotions,
                    ejections: self
                        .ctx
                        .ejections
                        .iter()
                        .map(|(k, v)| (k.clone(), *v))
                        .collect(),
                    failover: self.ctx.failover.clone(),
                    syncs_started: self.ctx.syncs_started,
                    syncs_completed: self.ctx.syncs_completed,
                });
            }
            Command::Stop => self.stop = true,
        }
    }

    fn with_attachment(
        &mut self,
        volume: VolumeId,
        f: impl FnOnce(&mut crate::replication::attachment::Attachment<super::buffer::Bytes>, Nanos),
    ) {
        let Some(&at) = self.by_id.get(&volume) else {
            return;
        };
        if let Some(s) = &mut self.volumes[at].serving
            && let Some(attachment) = &mut s.attachment
        {
            f(attachment, self.ctx.now);
            self.touch(at);
        }
    }

    fn end_sessions_of(&mut self, at: usize) {
        let of = |role: &Role| matches!(role, Role::Attachment { volume, .. } if *volume == at);
        let tokens: Vec<usize> = self
            .ctx
            .peers
            .iter()
            .filter(|(_, p)| of(&p.role))
            .map(|(t, _)| *t)
            .collect();
        for token in tokens {
            self.end(token, "the copy is removed");
        }
    }

    /// The volume's place, made when it is new here.
    fn place(&mut self, volume: VolumeId) -> usize {
        if let Some(&at) = self.by_id.get(&volume) {
            return at;
        }
        let at = self.volumes.len();
        self.volumes.push(Volume::new(volume, at));
        self.by_id.insert(volume, at);
        at
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        for volume in &mut self.volumes {
            volume.drop_serving(&mut self.ctx);
        }
    }
}
