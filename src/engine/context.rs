//! What all volumes of one worker share: the disk queue, the connections, the clock of the turn, the way out.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::rc::Rc;
use std::sync::mpsc::Sender;

use mio::net::TcpStream;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};

use super::buffer::{Buffer, Bytes};
use super::channel::Channel;
use super::command::{Event, Mailbox, RegistryRequest};
use super::conn::{Conn, OUT_MAX, Piece};
use super::disk::Disk;
use super::syncs::Turns;
use crate::cluster::metrics::Histogram;
use crate::replication::attachment::CopySet;
use crate::replication::ids::{
    BootId, COPIES_MAX, ClusterId, CopyId, Epoch, Instance, LINKS_MAX, Nanos, NodeName, Seq,
    VolumeId,
};
use crate::replication::message::{Message, Status};
use crate::replication::replica::SessionId;
use crate::wire::frame::{self, Payload};
use crate::wire::hello::{Hello, Purpose, VERSIONS};
use crate::wire::lz4::{self, Compressor};
use crate::wire::tls::Security;

/// Answers in one AckVec; `wire` takes no more.
const ACKS: usize = 512;
/// A connection that was made and does not greet, or whose greeting is not answered, is closed after this.
const GREETING: Nanos = Nanos::from_ms(2_000);

/// Who this node is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its name.
    pub node: NodeName,
    /// Its kernel boot.
    pub boot_id: BootId,
    /// This run of its process.
    pub instance: Instance,
}

/// What a connection is.
#[derive(Debug)]
pub enum Role {
    /// Accepted; the greeting has not come.
    Stranger,
    /// The attachment's `link` to a copy; the greeting is sent when the socket is connected.
    Dialing {
        volume: usize,
        link: usize,
        hello: Box<Hello>,
        node: NodeName,
    },
    /// The same; the answer to the greeting has not come.
    Greeting {
        volume: usize,
        link: usize,
        node: NodeName,
    },
    /// The same.
    Copy { volume: usize, link: usize },
    /// From an attachment, with the answers of this turn.
    Attachment {
        volume: usize,
        session: SessionId,
        acks: Vec<(Seq, Status)>,
    },
    /// Sends what is queued, then ends.
    Closing,
}

/// A connection in its role.
#[derive(Debug)]
pub struct Peer {
    /// The socket.
    pub conn: Conn,
    /// What it is for.
    pub role: Role,
    /// When it was made.
    pub since: Nanos,
}

/// The worker's common part.
pub struct Context {
    /// Who we are.
    pub me: Identity,
    /// The turn's time.
    pub now: Nanos,
    /// Disk operations.
    pub disk: Disk,
    /// Connections by token.
    pub peers: HashMap<usize, Peer>,
    /// Sessions of attachments elsewhere, and their connections.
    pub sessions: HashMap<SessionId, usize>,
    /// Where nodes are reached.
    pub addresses: HashMap<NodeName, SocketAddr>,
    /// What connections with them are secured by.
    pub security: Security,
    /// While a cluster changes to TLS: nodes that did not speak it when they were last dialed.
    plaintext: HashSet<NodeName>,
    /// Connections with something to send.
    pub unsent: HashSet<usize>,
    /// Rings by token: volume and queue.
    pub kicks: HashMap<usize, (usize, u16)>,
    /// This worker's own, for threads that work for it; known once all workers run.
    pub mailbox: Option<Mailbox>,
    /// To the registry's thread.
    pub registry: Sender<RegistryRequest>,
    /// Records that are being read, and whether each is to be read again then.
    reads: HashMap<VolumeId, bool>,
    /// To the node's log of events.
    pub events: Sender<Event>,
    /// Payload bytes before compression, and as sent.
    pub wire_raw: u64,
    /// See `wire_raw`.
    pub wire_sent: u64,
    /// Masters switched.
    pub promotions: u64,
    /// Copies ejected, by reason.
    pub ejections: HashMap<String, u64>,
    /// From the loss of a copy or an attachment until the volume served again.
    pub failover: Histogram,
    /// Copies that were begun to be brought up to date, and those that are now.
    pub syncs_started: u64,
    /// See `syncs_started`.
    pub syncs_completed: u64,
    /// Which syncs may begin.
    pub turns: Turns,
    /// Distinguishes what restarts: tokens and sessions are never reused.
    next: usize,
    poll: Registry,
    compressor: Compressor,
    scratch: Vec<u8>,
}

impl Context {
    /// For a worker whose poll is `poll`; tokens below `first` are the worker's own.
    pub fn new(
        me: Identity,
        security: Security,
        disk: Disk,
        poll: Registry,
        first: usize,
        registry: Sender<RegistryRequest>,
        events: Sender<Event>,
    ) -> Self {
        Self {
            me,
            now: super::now(),
            disk,
            peers: HashMap::new(),
            sessions: HashMap::new(),
            addresses: HashMap::new(),
            security,
            plaintext: HashSet::new(),
            unsent: HashSet::new(),
            kicks: HashMap::new(),
            mailbox: None,
            registry,
            reads: HashMap::new(),
            events,
            wire_raw: 0,
            wire_sent: 0,
            promotions: 0,
            ejections: HashMap::new(),
            failover: Histogram::default(),
            syncs_started: 0,
            syncs_completed: 0,
            turns: Turns::default(),
            next: first,
            poll,
            compressor: Compressor::default(),
            scratch: Vec::new(),
        }
    }

    fn number(&mut self) -> usize {
        self.next += 1;
        self.next
    }

    /// A session's number.
    pub fn session(&mut self) -> SessionId {
        SessionId(self.number() as u64)
    }

    // ---- records

    /// Has a record read from now on. One read of a record is under way at a time: a registry that does not answer would
    /// find thousands of them when it is back, and the swaps of all volumes wait behind them (S19).
    pub fn read_record(&mut self, volume: VolumeId) {
        match self.reads.entry(volume) {
            Entry::Occupied(mut again) => _ = again.insert(true),
            Entry::Vacant(read) => {
                read.insert(false);
                let _ = self.registry.send(RegistryRequest::Read(volume));
            }
        }
    }

    /// It was, or could not be.
    pub fn record_was_read(&mut self, volume: VolumeId) {
        if self.reads.remove(&volume) == Some(true) {
            // Who asked meanwhile may know of something that came after.
            self.read_record(volume);
        }
    }

    // ---- kicks

    /// Watches a ring's kick descriptor.
    pub fn watch(
        &mut self,
        kick: BorrowedFd<'_>,
        volume: usize,
        index: u16,
    ) -> Result<usize, String> {
        let token = self.number();
        let fd = kick.as_raw_fd();
        self.poll
            .register(&mut SourceFd(&fd), Token(token), Interest::READABLE)
            .map_err(|e| format!("cannot watch the kick of queue {index}: {e}"))?;
        self.kicks.insert(token, (volume, index));
        Ok(token)
    }

    /// Stops watching, while the descriptor is still open: the front-end holds the same open file description, so
    /// closing ours would leave it in epoll.
    pub fn unwatch(&mut self, kick: BorrowedFd<'_>, token: usize) {
        self.kicks.remove(&token);
        let fd = kick.as_raw_fd();
        if let Err(e) = self.poll.deregister(&mut SourceFd(&fd)) {
            log::debug!("a kick descriptor was not being watched: {e}");
        }
    }

    // ---- connections

    /// Takes a connection in.
    pub fn add(&mut self, mut conn: Conn, role: Role) -> std::io::Result<usize> {
        let token = self.number();
        self.poll.register(
            &mut conn.stream,
            Token(token),
            Interest::READABLE | Interest::WRITABLE,
        )?;
        self.peers.insert(
            token,
            Peer {
                conn,
                role,
                since: self.now,
            },
        );
        Ok(token)
    }

    /// Ends a connection at once and gives back what it was.
    pub fn remove(&mut self, token: usize) -> Option<Peer> {
        let mut peer = self.peers.remove(&token)?;
        self.turns.dialed(token);
        self.unsent.remove(&token);
        if let Role::Attachment { session, .. } = &peer.role {
            self.sessions.remove(session);
        }
        // Fails only for a socket that is not registered, and then there is nothing to undo.
        let _ = self.poll.deregister(&mut peer.conn.stream);
        Some(peer)
    }

    /// Connects to the copy of `volume_id` on `node`, for what `link` is for; the token, or why not.
    pub fn dial(
        &mut self,
        node: &NodeName,
        volume_id: VolumeId,
        copy_id: CopyId,
        volume: usize,
        link: usize,
    ) -> Result<usize, String> {
        let Some(address) = self.addresses.get(node).copied() else {
            return Err(format!(
                "the address of node {node} is not known (has it ever joined this cluster?)"
            ));
        };
        let hello = Hello {
            versions: VERSIONS,
            features: 0,
            cluster: self.me.cluster,
            node: self.me.node.clone(),
            boot_id: self.me.boot_id,
            instance: self.me.instance,
            volume: volume_id,
            copy: copy_id,
            purpose: if link < COPIES_MAX {
                Purpose::Foreground
            } else {
                Purpose::Bulk
            },
        };
        let session = match self.plaintext.contains(node) {
            true => None,
            false => self.security.connect(node)?,
        };
        let stream =
            TcpStream::connect(address).map_err(|e| format!("cannot connect to {address}: {e}"))?;
        self.add(
            Conn::new(stream, Channel::dialed(session)),
            Role::Dialing {
                volume,
                link,
                hello: Box::new(hello),
                node: node.clone(),
            },
        )
        .map_err(|e| format!("cannot watch the connection to {address}: {e}"))
    }

    /// A node was reached and did not greet. While both are allowed it may speak the one of TLS and plaintext that was not
    /// tried.
    pub fn not_greeted(&mut self, node: NodeName) {
        if matches!(self.security, Security::Either(_)) && !self.plaintext.remove(&node) {
            self.plaintext.insert(node);
        }
    }

    /// Queues bytes on a connection.
    pub fn push(&mut self, token: usize, bytes: Vec<u8>) {
        if let Some(peer) = self.peers.get_mut(&token) {
            peer.conn.push(Piece::Head(Rc::new(bytes)));
            self.unsent.insert(token);
        }
    }

    /// Sends a message to one connection.
    pub fn send(&mut self, token: usize, message: &Message, data: Option<&Bytes>, compress: bool) {
        self.send_all(std::iter::once(token), message, data, compress);
    }

    /// Sends a message over a set of links: encoded and compressed once.
    pub fn send_set(
        &mut self,
        to: CopySet,
        links: &[Option<usize>; LINKS_MAX],
        message: &Message,
        data: Option<&Bytes>,
        compress: bool,
    ) {
        let chosen = links.iter().enumerate().filter(|(link, _)| to.has(*link));
        self.send_all(chosen.filter_map(|(_, t)| *t), message, data, compress);
    }

    fn send_all(
        &mut self,
        tokens: impl Iterator<Item = usize>,
        message: &Message,
        data: Option<&Bytes>,
        compress: bool,
    ) {
        let mut tokens = tokens.peekable();
        if tokens.peek().is_none() {
            return;
        }
        let mut head = Vec::with_capacity(frame::HEADER + 64);
        let mut raw = None;
        let (mut raw_bytes, mut sent_bytes) = (0, 0);
        match data {
            Some(Bytes::Buffer(buffer)) => {
                let raw_len = buffer.len() as u32;
                let packed = if compress {
                    self.compressor.compress(buffer, &mut self.scratch)
                } else {
                    None
                };
                let payload = Payload {
                    raw_len,
                    bytes: packed.unwrap_or(buffer),
                    lz4: packed.is_some(),
                };
                frame::encode(message, 0, Some(payload), &mut head);
                (raw_bytes, sent_bytes) = (u64::from(raw_len), payload.bytes.len() as u64);
                match packed {
                    Some(packed) => head.extend_from_slice(packed),
                    None => raw = Some(Piece::Raw(Rc::clone(buffer))),
                }
            }
            // Guest memory travels nowhere: what is written elsewhere too is a snapshot, and a read's destination is
            // only meant for the copy of this process.
            Some(Bytes::Guest(_)) | None => frame::encode(message, 0, None, &mut head),
        }
        let head = Piece::Head(Rc::new(head));
        for token in tokens {
            if let Some(peer) = self.peers.get_mut(&token) {
                self.wire_raw += raw_bytes;
                self.wire_sent += sent_bytes;
                peer.conn.push(head.clone());
                if let Some(raw) = &raw {
                    peer.conn.push(raw.clone());
                }
                self.unsent.insert(token);
            }
        }
    }

    /// Adds an answer to the session's next AckVec.
    pub fn ack(&mut self, session: SessionId, seq: Seq, status: Status) {
        let Some(token) = self.sessions.get(&session) else {
            return;
        };
        if let Some(Peer {
            role: Role::Attachment { acks, .. },
            ..
        }) = self.peers.get_mut(token)
        {
            acks.push((seq, status));
            self.unsent.insert(*token);
        }
    }

    /// Ends a session once its last message is sent. Answers of this turn are dropped: they come after a refusal.
    pub fn close_session(&mut self, session: SessionId) {
        if let Some(token) = self.sessions.remove(&session)
            && let Some(peer) = self.peers.get_mut(&token)
        {
            peer.role = Role::Closing;
            self.unsent.insert(token);
        }
    }

    /// The AckVecs of one connection's turn. `state` tells the copy's epoch and whether its log is nearly full.
    pub fn pack_acks(&mut self, token: usize, state: impl Fn(usize) -> (Epoch, bool)) {
        let Some(peer) = self.peers.get_mut(&token) else {
            return;
        };
        let Role::Attachment { volume, acks, .. } = &mut peer.role else {
            return;
        };
        let (epoch, log_pressure) = state(*volume);
        let mut all = std::mem::take(acks);
        while !all.is_empty() {
            let rest = all.split_off(all.len().min(ACKS));
            let mut bytes = Vec::with_capacity(frame::HEADER + 16 * all.len());
            frame::encode(
                &Message::AckVec {
                    epoch,
                    acks: all,
                    log_pressure,
                },
                0,
                None,
                &mut bytes,
            );
            peer.conn.push(Piece::Head(Rc::new(bytes)));
            all = rest;
        }
    }

    /// Sends what is queued on a connection; why it is to be ended, if so.
    pub fn flush(&mut self, token: usize) -> Result<(), String> {
        let Some(peer) = self.peers.get_mut(&token) else {
            return Ok(());
        };
        if matches!(peer.role, Role::Dialing { .. }) {
            return Ok(());
        }
        peer.conn
            .flush()
            .map_err(|e| format!("sending failed: {e}"))?;
        if peer.conn.queued() > OUT_MAX {
            return Err(format!("the peer leaves more than {OUT_MAX} bytes unread"));
        }
        if !peer.conn.waits() && matches!(peer.role, Role::Closing) {
            self.remove(token);
        }
        Ok(())
    }

    /// Connections that should have greeted, or connected, by now.
    pub fn overdue(&self) -> Vec<usize> {
        let early = |role: &Role| !matches!(role, Role::Copy { .. } | Role::Attachment { .. });
        self.peers
            .iter()
            .filter(|(_, p)| early(&p.role) && self.now.since(p.since) >= GREETING)
            .map(|(token, _)| *token)
            .collect()
    }
}

/// The first whole frame of `input`, its payload in a buffer of ours, and the bytes it took.
///
/// # Errors
///
/// Why the connection cannot go on.
pub fn next_frame(input: &[u8]) -> Result<Option<(Message, Option<Bytes>, usize)>, String> {
    let Some((frame, taken)) = frame::decode(input).map_err(|e| e.to_string())? else {
        return Ok(None);
    };
    let data = match frame.payload {
        None => None,
        Some(payload) => {
            let mut buffer = Buffer::new(payload.raw_len as usize);
            lz4::expand(payload, &mut buffer).map_err(|e| e.to_string())?;
            Some(Bytes::from_buffer(buffer))
        }
    };
    if let (Message::Write(request) | Message::SyncData(request), Some(data)) =
        (&frame.message, &data)
        && request.span.len as usize != crate::replication::attachment::Payload::count(data)
    {
        return Err(format!(
            "a write of {} bytes that brings others",
            request.span.len
        ));
    }
    Ok(Some((frame.message, data, taken)))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::replication::ids::Span;
    use crate::replication::message::Request;

    const VOLUME: VolumeId = VolumeId([1; 16]);
    const COPY: CopyId = CopyId([2; 16]);

    fn context(poll: &mio::Poll) -> Context {
        let me = Identity {
            cluster: ClusterId([3; 16]),
            node: NodeName("n1".into()),
            boot_id: BootId([4; 16]),
            instance: Instance([5; 16]),
        };
        let disk = Disk::new(EventFd::new(0).unwrap().as_raw_fd()).unwrap();
        let registry = poll.registry().try_clone().unwrap();
        Context::new(
            me,
            Security::Plaintext,
            disk,
            registry,
            16,
            channel().0,
            channel().0,
        )
    }

    /// Waits until the connection stands; mio says so once, and this test has no loop.
    fn connected(ctx: &mut Context, poll: &mut mio::Poll, token: usize) {
        let mut events = mio::Events::with_capacity(8);
        let stream = |ctx: &Context| ctx.peers[&token].conn.stream.peer_addr().is_ok();
        while !stream(ctx) {
            poll.poll(&mut events, Some(Duration::from_secs(10)))
                .unwrap();
        }
    }

    #[test]
    fn one_read_of_a_record_is_under_way_at_a_time_and_another_follows_if_it_was_asked_for() {
        let poll = mio::Poll::new().unwrap();
        let mut ctx = context(&poll);
        let (registry, asked) = channel();
        ctx.registry = registry;
        let count = || asked.try_iter().count();
        for _ in 0..1000 {
            ctx.read_record(VOLUME);
        }
        ctx.read_record(VolumeId([2; 16]));
        assert_eq!(count(), 2);
        ctx.record_was_read(VOLUME);
        assert_eq!(count(), 1);
        ctx.record_was_read(VOLUME);
        assert_eq!(count(), 0);
        ctx.read_record(VOLUME);
        assert_eq!(count(), 1);
    }

    /// What is said over link `i + COPIES_MAX` is said to copy `i`, over a connection that says that it is for bulk.
    #[test]
    fn both_links_of_a_copy_are_dialed_for_what_they_are_and_a_message_goes_out_on_those_it_is_for()
    {
        // Given a node n2, and links 1 and 9 to its copy,
        let mut poll = mio::Poll::new().unwrap();
        let mut ctx = context(&poll);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let n2 = NodeName("n2".into());
        let address = listener.local_addr().unwrap();
        ctx.addresses.insert(n2.clone(), address);
        let mut links = [None; LINKS_MAX];
        let mut ends = Vec::new();
        for (link, purpose) in [(1, Purpose::Foreground), (1 + COPIES_MAX, Purpose::Bulk)] {
            let token = ctx.dial(&n2, VOLUME, COPY, 0, link).unwrap();
            let Role::Dialing {
                link: found, hello, ..
            } = &ctx.peers[&token].role
            else {
                panic!("dialing")
            };
            assert_eq!((*found, hello.purpose, hello.copy), (link, purpose, COPY));
            connected(&mut ctx, &mut poll, token);
            ctx.peers.get_mut(&token).unwrap().role = Role::Copy { volume: 0, link };
            links[link] = Some(token);
            ends.push(listener.accept().unwrap().0);
        }
        // when a chunk goes to the bulk link, then a flush to both,
        let (epoch, seq) = (Epoch(1), Seq(2));
        let span = Span {
            offset: 0,
            len: 4096,
        };
        let chunk = Message::SyncData(Request {
            epoch,
            seq,
            span,
            fua: false,
        });
        let flush = Message::Flush { epoch, seq };
        let data = Bytes::from_buffer(Buffer::new(4096));
        let mut both = CopySet::one(1 + COPIES_MAX);
        ctx.send_set(both, &links, &chunk, Some(&data), false);
        both.insert(1);
        ctx.send_set(both, &links, &flush, None, false);
        for token in ctx.unsent.clone() {
            ctx.flush(token).unwrap();
        }
        // then the own link brings the flush alone, the other one both, with the bytes.
        drop(ctx);
        let mut received = ends.into_iter().map(|mut end| {
            let mut bytes = Vec::new();
            end.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let own = received.next().unwrap();
        let (message, _, taken) = next_frame(&own).unwrap().unwrap();
        assert_eq!((message, taken), (flush.clone(), own.len()));
        let bulk = received.next().unwrap();
        let (message, data, taken) = next_frame(&bulk).unwrap().unwrap();
        assert_eq!(message, chunk);
        assert!(matches!(data, Some(Bytes::Buffer(b)) if b.len() == 4096));
        let (message, _, rest) = next_frame(&bulk[taken..]).unwrap().unwrap();
        assert_eq!((message, taken + rest), (flush, bulk.len()));
    }
}
