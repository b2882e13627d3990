//! One volume on its worker: the copy on this node's disk, the attachment if the volume is served from here, and the
//! guest's rings. Carries out what the state machines of `replication` decide.

use std::collections::HashMap;
use std::sync::mpsc::SyncSender;

use super::buffer::Bytes;
use super::command::{
    AttachVolume, CopyStatus, Event, GuestAnswer, GuestCommand, OpenCopy, RegistryRequest,
    VolumeStatus,
};
use super::context::Context;
use super::disk::{Completion, DataFile, Output, Token, Work};
use super::rings::Rings;
use crate::cluster::metrics::{Layer, VolumeMetrics};
use crate::copy::layout::WORDS_PER_PAGE;
use crate::copy::{BITS_PER_PAGE, MetaWrite, Metadata, Store};
use crate::guest::Serial;
use crate::replication::attachment::{Action as Do, Attachment, Op, Phase};
use crate::replication::ids::{
    CHUNK, COPIES_MAX, CopyId, Epoch, LINKS_MAX, Nanos, REGION, Region, Seq, VolumeId,
};
use crate::replication::message::{Message, Refusal, Status};
use crate::replication::replica::{
    Action as CopyDo, DiskOp, DiskResult, Replica, SessionId, Ticket,
};
use crate::replication::timing::Timing;

/// How often a copy looks for regions that can leave its log.
const IDLE_LOOK: Nanos = Nanos::from_ms(1_000);
/// A guest's requests are waited for this long when the volume is detached.
const QUIESCE: Nanos = Nanos::from_ms(10_000);

/// The copy on this node.
pub struct LocalCopy {
    /// Its state machine.
    pub replica: Replica<Bytes>,
    metadata: Metadata,
    store: Store,
    data: DataFile,
    meta: DataFile,
    /// Metadata operations under way, of one or several writes each.
    batches: HashMap<Ticket, Batch>,
    looked: Nanos,
    stats: Layer,
}

/// Writes that make one metadata operation.
struct Batch {
    left: usize,
    failed: bool,
    /// To be written when the others are durable.
    then: Option<MetaWrite>,
}

/// The volume served from here.
pub struct Serving {
    /// Its state machine.
    pub attachment: Attachment<Bytes>,
    /// The guest's rings.
    pub rings: Rings,
    name: String,
    /// Tokens of the connections to the copies, by link.
    links: [Option<usize>; LINKS_MAX],
    /// The session with the copy of this process, and that copy's link; it has none for bulk.
    local: Option<(SessionId, usize)>,
    /// Tokens of the watched kicks.
    kicks: HashMap<u16, usize>,
    detaching: Option<Detaching>,
    network: Layer,
}

struct Detaching {
    reply: SyncSender<Result<(), String>>,
    deadline: Nanos,
    told: bool,
}

/// A volume that this worker has to do with.
pub struct Volume {
    /// Which.
    pub id: VolumeId,
    /// Its place in the worker.
    pub at: usize,
    /// The copy here.
    pub copy: Option<LocalCopy>,
    /// The attachment here.
    pub serving: Option<Serving>,
}

impl Volume {
    /// Nothing yet.
    pub fn new(id: VolumeId, at: usize) -> Self {
        Self {
            id,
            at,
            copy: None,
            serving: None,
        }
    }

    /// Neither a copy nor an attachment.
    pub fn is_unused(&self) -> bool {
        self.copy.is_none() && self.serving.is_none()
    }

    // ---- the copy

    /// Serves a copy.
    pub fn open(&mut self, ctx: &Context, open: OpenCopy) -> Result<(), String> {
        if let Some(have) = self.copy_id() {
            return Err(format!("copy {have} is open here: close it first"));
        }
        let OpenCopy {
            store,
            metadata,
            state,
            regions,
            maps,
        } = open;
        let duplicate = |e| format!("cannot use the copy's files: {e}");
        let align = if store.direct {
            store.memory_align.max(512) as usize
        } else {
            1
        };
        let data = DataFile::new(
            store.data.try_clone().map_err(duplicate)?,
            align,
            store.memory,
        );
        let meta = DataFile::new(store.meta.try_clone().map_err(duplicate)?, 1, store.memory);
        let replica = Replica::new(
            state,
            &regions,
            maps,
            ctx.me.boot_id,
            Timing::DEFAULT,
            ctx.now,
        );
        self.copy = Some(LocalCopy {
            replica,
            metadata,
            store,
            data,
            meta,
            batches: HashMap::new(),
            looked: ctx.now,
            stats: Layer::default(),
        });
        Ok(())
    }

    /// Gives the copy up. An attachment here that has let go of it, because the record did, goes on with the others.
    pub fn close(&mut self) -> Result<(), String> {
        if self.serving.as_ref().is_some_and(|s| s.local.is_some()) {
            return Err("the volume is attached here and uses this copy: detach it first".into());
        }
        if self.copy.as_ref().is_some_and(|c| !c.replica.is_idle()) {
            return Err("the copy has requests under way: try again".into());
        }
        self.copy = None;
        Ok(())
    }

    /// The id of the copy here.
    pub fn copy_id(&self) -> Option<CopyId> {
        self.copy.as_ref().map(|c| c.replica.state().copy_id)
    }

    /// Epoch and log pressure of the copy here, for an AckVec.
    pub fn ack_state(&self) -> (Epoch, bool) {
        self.copy.as_ref().map_or((Epoch(0), false), |c| {
            (c.replica.state().epoch, c.replica.log_pressure())
        })
    }

    /// A message from an attachment on another node.
    pub fn attachment_says(
        &mut self,
        ctx: &mut Context,
        session: SessionId,
        message: Message,
        data: Option<Bytes>,
    ) {
        match &mut self.copy {
            Some(copy) => copy.replica.on_message(ctx.now, session, message, data),
            None => ctx.close_session(session),
        }
    }

    /// An attachment's connection is gone.
    pub fn attachment_gone(&mut self, ctx: &Context, session: SessionId) {
        if let Some(copy) = &mut self.copy {
            copy.replica.on_close(ctx.now, session);
        }
    }

    /// A disk operation ended.
    pub fn on_disk(&mut self, ctx: &mut Context, done: Completion) {
        let Some(copy) = &mut self.copy else { return };
        let ticket = done.token.ticket;
        copy.count(&done, ctx.now);
        let mut result = match done.result {
            Ok(Output::Nothing) => DiskResult::Done(None),
            Ok(Output::Data(data)) => DiskResult::Done(Some(data)),
            Ok(Output::Hash(hash)) => DiskResult::Hash(hash),
            Ok(Output::Allocated(words)) => DiskResult::Allocated(words),
            Err(error) => {
                log::error!("volume {}: the copy's disk answered: {error}", self.id);
                match error.raw_os_error() {
                    Some(libc::ENOSPC | libc::EDQUOT) => DiskResult::NoSpace,
                    _ => DiskResult::Error,
                }
            }
        };
        if let Some(batch) = copy.batches.get_mut(&ticket) {
            batch.left -= 1;
            batch.failed |= !matches!(result, DiskResult::Done(_));
            if batch.left > 0 {
                return;
            }
            if let (Some(write), false) = (batch.then.take(), batch.failed) {
                batch.left = 1;
                return ctx
                    .disk
                    .meta(done.token, &copy.meta, write.offset, write.bytes);
            }
            if batch.failed {
                // Metadata that may or may not be on the disk: whatever the reason, the copy is
                // dead.
                result = DiskResult::Error;
            }
            copy.batches.remove(&ticket);
        }
        copy.replica.on_disk(ctx.now, ticket, result);
    }

    fn on_copy_action(&mut self, ctx: &mut Context, action: CopyDo<Bytes>) {
        let local = self.serving.as_ref().and_then(|s| s.local);
        match action {
            CopyDo::Ack {
                session,
                seq,
                status,
            } => match (local, &mut self.serving) {
                (Some((mine, link)), Some(s)) if mine == session => {
                    s.attachment.on_ack(ctx.now, link, seq, status)
                }
                _ => ctx.ack(session, seq, status),
            },
            CopyDo::Reply {
                session,
                message,
                data,
            } => match (local, &mut self.serving) {
                (Some((mine, link)), Some(s)) if mine == session => {
                    s.attachment.on_message(ctx.now, link, message, data);
                }
                _ => {
                    if let Some(token) = ctx.sessions.get(&session).copied() {
                        ctx.send(token, &message, data.as_ref(), true);
                    }
                }
            },
            CopyDo::Close(session) => match (local, &mut self.serving) {
                (Some((mine, link)), Some(s)) if mine == session => {
                    s.local = None;
                    s.attachment.on_disconnected(
                        ctx.now,
                        link,
                        "the copy on this node ended the session",
                    );
                }
                _ => ctx.close_session(session),
            },
            CopyDo::Disk(ticket, op) => self.start_disk(ctx, ticket, op),
            CopyDo::Event { rule, text } => {
                let epoch = self
                    .copy
                    .as_ref()
                    .map_or(Epoch(0), |c| c.replica.state().epoch);
                log::info!("volume {}: copy: [{rule}] {text}", self.id);
                let _ = ctx.events.send(Event {
                    volume: self.id,
                    rule,
                    epoch,
                    text: format!("copy here: {text}"),
                });
            }
        }
    }

    fn start_disk(&mut self, ctx: &mut Context, ticket: Ticket, op: DiskOp<Bytes>) {
        let work = match &op {
            DiskOp::Write { span, .. } => Work::Write(span.len),
            DiskOp::Read { span, .. } | DiskOp::Hash { span } => Work::Read(span.len),
            DiskOp::Zero { span, .. } => Work::Discard(span.len),
            DiskOp::Sync => Work::Flush,
            _ => Work::Meta,
        };
        let token = Token {
            volume: self.at,
            ticket,
            work,
        };
        let Some(copy) = &mut self.copy else { return };
        match op {
            DiskOp::Write { span, data, dsync } => {
                ctx.disk.write(token, &copy.data, span, data, dsync);
            }
            DiskOp::Read { span, into } => {
                ctx.disk.read(token, &copy.data, span, into);
            }
            DiskOp::Zero { span, .. } => {
                ctx.disk.zero(token, &copy.data, span);
            }
            DiskOp::Sync => {
                ctx.disk.sync(token, &copy.data);
            }
            DiskOp::Hash { span } => {
                ctx.disk.hash(token, &copy.data, span);
            }
            DiskOp::Allocated { first, count } => {
                ctx.disk.allocated(token, &copy.data, first, count);
            }
            DiskOp::Grow { size } => {
                let done = copy.store.grow(size, false);
                if let Err(e) = &done {
                    log::error!("volume {}: {e}", self.id);
                }
                let result = if done.is_ok() {
                    DiskResult::Done(None)
                } else {
                    DiskResult::Error
                };
                copy.replica.on_disk(ctx.now, ticket, result);
            }
            DiskOp::Superblock(state) => {
                // Into both halves, one after the other: were only one to say it and to rot later,
                // the other would bring an older promise back (S2).
                let first = copy.metadata.superblock(&state);
                let second = copy.metadata.superblock(&state);
                copy.write_meta(ctx, token, vec![first], Some(second));
            }
            DiskOp::Log(txn) => {
                let writes = copy.metadata.log(&txn.add, &txn.retire);
                copy.write_meta(ctx, token, writes, None);
            }
            DiskOp::Bitmaps(regions) => {
                let writes = copy.bitmap_pages(&regions);
                copy.write_meta(ctx, token, writes, None);
            }
        }
    }

    // ---- the attachment

    /// Serves the volume from here.
    pub fn attach(&mut self, ctx: &Context, attach: AttachVolume) -> Result<(), String> {
        if self.serving.is_some() {
            return Err(format!("volume {} is attached here already", attach.name));
        }
        let mut seed = [0; 8];
        getrandom::fill(&mut seed)
            .map_err(|e| format!("no random numbers from the kernel: {e}"))?;
        let serial = Serial::new(&self.id.to_string());
        let rings = Rings::new(
            attach.name.clone(),
            serial,
            attach.record.size,
            attach.read_only,
        );
        let attachment = Attachment::new(
            attach.me,
            attach.record,
            attach.revision,
            attach.proof,
            Timing::DEFAULT,
            u64::from_le_bytes(seed),
            ctx.now,
        );
        self.serving = Some(Serving {
            attachment,
            rings,
            name: attach.name,
            links: [None; LINKS_MAX],
            local: None,
            kicks: HashMap::new(),
            detaching: None,
            network: Layer::default(),
        });
        Ok(())
    }

    /// Leaves cleanly; `reply` is answered when that ended.
    pub fn detach(&mut self, ctx: &Context, reply: SyncSender<Result<(), String>>) {
        match &mut self.serving {
            None => drop(reply.try_send(Ok(()))),
            Some(s) => {
                s.rings.paused = true;
                let deadline = ctx.now.after(QUIESCE);
                s.detaching = Some(Detaching {
                    reply,
                    deadline,
                    told: false,
                });
            }
        }
    }

    /// A message from a copy on another node.
    pub fn copy_says(&mut self, ctx: &Context, link: usize, message: Message, data: Option<Bytes>) {
        if let Some(s) = &mut self.serving {
            s.count_answered(ctx.now, &message);
            s.attachment.on_message(ctx.now, link, message, data);
        }
    }

    /// The connection to a copy was made, or was lost.
    pub fn copy_link(
        &mut self,
        ctx: &Context,
        link: usize,
        token: usize,
        state: Result<crate::replication::ids::BootId, &str>,
    ) {
        let Some(s) = &mut self.serving else { return };
        if s.links[link] != Some(token) {
            return;
        }
        match state {
            Ok(boot_id) => s.attachment.on_connected(ctx.now, link, boot_id),
            Err(why) => {
                s.links[link] = None;
                s.attachment.on_disconnected(ctx.now, link, why);
            }
        }
    }

    /// The copy's node has no such copy.
    pub fn copy_unknown(&mut self, ctx: &Context, link: usize, token: usize) {
        if let Some(s) = &mut self.serving
            && s.links[link] == Some(token)
        {
            s.links[link] = None;
            s.attachment
                .on_disconnected(ctx.now, link, &Refusal::UnknownCopy.to_string());
            s.attachment.on_refused(ctx.now, link, Refusal::UnknownCopy);
        }
    }

    fn on_attachment_action(&mut self, ctx: &mut Context, action: Do<Bytes>) {
        let Some(s) = &mut self.serving else { return };
        match action {
            Do::Send { to, message, data } => {
                let mut remote = to;
                if let Some((_, own)) = s.local {
                    remote.remove(own);
                }
                let data = match (&message, data) {
                    (Message::Write(_), Some(data)) => Some(data.stable(!remote.is_empty())),
                    (_, data) => data,
                };
                if let (Some((session, own)), Some(copy)) = (s.local, &mut self.copy)
                    && to.has(own)
                {
                    copy.replica
                        .on_message(ctx.now, session, message.clone(), data.clone());
                }
                if !remote.is_empty() {
                    let compress = s.attachment.record().compress;
                    ctx.send_set(remote, &s.links, &message, data.as_ref(), compress);
                }
            }
            Do::Complete { id, outcome, data } => {
                s.rings.complete(ctx.now, id, outcome, data.as_ref())
            }
            Do::Dial {
                copy,
                copy_id,
                node,
            } => self.dial(ctx, copy, copy_id, &node),
            Do::Hangup(link) => {
                if let Some((session, own)) = s.local
                    && own == link
                {
                    s.local = None;
                    if let Some(local) = &mut self.copy {
                        local.replica.on_close(ctx.now, session);
                    }
                } else if let Some(token) = s.links[link].take() {
                    ctx.remove(token);
                }
            }
            Do::Cas { expected, record } => {
                let _ = ctx
                    .registry
                    .send(RegistryRequest::Cas(self.id, expected, record));
            }
            Do::ReadRecord => drop(ctx.registry.send(RegistryRequest::Read(self.id))),
            Do::Event { rule, text } => {
                match rule {
                    "5 promote" => ctx.promotions += 1,
                    "6 sync begins" => ctx.syncs_started += 1,
                    "6 in sync" => ctx.syncs_completed += 1,
                    "2.6 eject" => {
                        let reason = text.split(": ").nth(1).unwrap_or("unknown");
                        let label = eject_reason(reason).into();
                        *ctx.ejections.entry(label).or_default() += 1;
                    }
                    _ => {}
                }
                let epoch = s.attachment.record().epoch;
                log::info!("volume {}: [{rule}] {text}", s.name);
                let _ = ctx.events.send(Event {
                    volume: self.id,
                    rule,
                    epoch,
                    text,
                });
            }
            // Seen by `housekeeping`.
            Do::Ended => {}
        }
    }

    fn dial(
        &mut self,
        ctx: &mut Context,
        link: usize,
        copy_id: CopyId,
        node: &crate::replication::ids::NodeName,
    ) {
        let here = self.copy_id();
        let Some(s) = &mut self.serving else { return };
        // The attachment gave an attempt up before it came to anything, and so may not have hung up.
        if let Some(former) = s.links[link].take() {
            ctx.remove(former);
        }
        if *node == ctx.me.node {
            if here != Some(copy_id) {
                let unknown = Refusal::UnknownCopy;
                s.attachment
                    .on_disconnected(ctx.now, link, &unknown.to_string());
                s.attachment.on_refused(ctx.now, link, unknown);
            } else if link >= COPIES_MAX {
                let why = "the copy of this process takes everything over one session";
                s.attachment.on_disconnected(ctx.now, link, why);
            } else {
                s.local = Some((ctx.session(), link));
                s.attachment.on_connected(ctx.now, link, ctx.me.boot_id);
            }
            return;
        }
        match ctx.dial(node, self.id, copy_id, self.at, link) {
            Ok(token) => s.links[link] = Some(token),
            Err(why) => s.attachment.on_disconnected(ctx.now, link, &why),
        }
    }

    // ---- the guest

    /// A vhost-user control thread's call.
    pub fn on_guest(
        &mut self,
        ctx: &mut Context,
        command: GuestCommand,
        reply: SyncSender<GuestAnswer>,
    ) {
        let Some(s) = &mut self.serving else {
            let _ = reply.try_send(Err("the volume is not attached here any more".into()));
            return;
        };
        let answer = match command {
            GuestCommand::Start(start) => s
                .rings
                .start(start)
                .and_then(|index| s.watch(ctx, self.at, index)),
            GuestCommand::Kick(index, kick) => {
                s.unwatch(ctx, index);
                s.rings.set_kick(index, kick);
                s.watch(ctx, self.at, index)
            }
            GuestCommand::Call(index, call) => {
                s.rings.set_call(index, call);
                Ok(0)
            }
            GuestCommand::Stop(index) => return s.rings.stop(ctx.now, index, reply),
            GuestCommand::Enabled(index, enabled) => {
                s.rings.set_enabled(index, enabled);
                Ok(0)
            }
            GuestCommand::Memory(mem) => s.rings.set_memory(&mem).map(|()| 0),
            GuestCommand::Features { writeback } => {
                s.rings.set_writeback(writeback);
                Ok(0)
            }
            GuestCommand::Disconnected => {
                s.drop_rings(ctx);
                Ok(0)
            }
        };
        let _ = reply.try_send(answer);
    }

    /// A kick came in.
    pub fn kicked(&mut self, index: u16) {
        if let Some(s) = &mut self.serving {
            s.rings.kicked(index);
        }
    }

    // ---- the turn

    /// Time passed.
    pub fn on_tick(&mut self, ctx: &mut Context) {
        if let Some(s) = &mut self.serving {
            s.attachment.on_tick(ctx.now);
        }
        if let Some(copy) = &mut self.copy
            && ctx.now.since(copy.looked) >= IDLE_LOOK
        {
            copy.looked = ctx.now;
            copy.replica.on_tick(ctx.now);
        }
    }

    /// Takes the guest's requests, and carries out decisions until there are none.
    pub fn settle(&mut self, ctx: &mut Context) {
        if let Some(s) = &mut self.serving {
            let direct = s.is_direct(self.copy.is_some());
            s.rings.take(ctx.now, &mut s.attachment, direct);
        }
        loop {
            let mut any = false;
            while let Some(action) = self.serving.as_mut().and_then(|s| s.attachment.poll()) {
                any = true;
                self.on_attachment_action(ctx, action);
            }
            while let Some(action) = self.copy.as_mut().and_then(|c| c.replica.poll()) {
                any = true;
                self.on_copy_action(ctx, action);
            }
            if any {
                continue;
            }
            // Everything of this turn has arrived: one log transaction for all of it.
            let Some(copy) = &mut self.copy else { break };
            copy.replica.end_turn();
            match copy.replica.poll() {
                Some(action) => self.on_copy_action(ctx, action),
                None => break,
            }
        }
    }

    /// After the last `settle` of a turn: answers to the guest, stopped rings, the end of a detach. Returns whether
    /// a ring has more to take at once.
    pub fn finish_turn(&mut self, ctx: &mut Context) -> bool {
        let Some(s) = &mut self.serving else {
            return false;
        };
        let more = s.rings.end_turn();
        for (index, ring) in s.rings.stopped(ctx.now) {
            if let Some(token) = s.kicks.remove(&index) {
                ctx.unwatch(ring.kick_fd(), token);
            }
        }
        self.housekeeping(ctx);
        more
    }

    fn housekeeping(&mut self, ctx: &mut Context) {
        let Some(s) = &mut self.serving else { return };
        let Some(detaching) = &mut s.detaching else {
            return;
        };
        let quiet = s.rings.in_flight() == 0 || ctx.now >= detaching.deadline;
        if !detaching.told && quiet {
            detaching.told = true;
            s.attachment.detach(ctx.now);
            return;
        }
        let end = match s.attachment.phase() {
            Phase::Left => Ok(()),
            Phase::Fenced(why) => Err(why.clone()),
            _ if ctx.now < detaching.deadline.after(QUIESCE) => return,
            phase => Err(format!(
                "it could not be left cleanly in time (it is {phase:?}); the next attach reconciles"
            )),
        };
        let reply = detaching.reply.clone();
        self.drop_serving(ctx);
        let _ = reply.try_send(end);
    }

    /// Ends the attachment here, whatever its state.
    pub fn drop_serving(&mut self, ctx: &mut Context) {
        let Some(mut s) = self.serving.take() else {
            return;
        };
        s.drop_rings(ctx);
        for token in s.links.iter().flatten() {
            ctx.remove(*token);
        }
        if let (Some((session, _)), Some(copy)) = (s.local, &mut self.copy) {
            copy.replica.on_close(ctx.now, session);
        }
    }

    /// Something waits for time to pass.
    pub fn is_busy(&self) -> bool {
        self.serving.is_some()
            || self
                .copy
                .as_ref()
                .is_some_and(|c| !c.replica.is_idle() || c.replica.bound().is_some())
    }

    // ---- for people

    /// The attachment here.
    pub fn status(&self) -> Option<VolumeStatus> {
        let s = self.serving.as_ref()?;
        let status = s.attachment.status();
        Some(VolumeStatus {
            volume: self.id,
            phase: status.phase,
            why: s.attachment.why_not_serving(),
            epoch: s.attachment.record().epoch,
            record: s.attachment.record().clone(),
            copies: status.copies,
            in_flight: status.in_flight,
            undecided: status.undecided,
        })
    }

    /// The copy here.
    pub fn copy_status(&self) -> Option<CopyStatus> {
        let copy = self.copy.as_ref()?;
        Some(CopyStatus {
            volume: self.id,
            state: copy.replica.state().clone(),
            allocated: copy.store.allocated_bytes().unwrap_or_default(),
            active_regions: copy.replica.active_regions(),
        })
    }

    /// Counters, of attached volumes.
    pub fn metrics(&self) -> Option<VolumeMetrics> {
        let s = self.serving.as_ref()?;
        Some(VolumeMetrics {
            volume: self.id,
            name: s.name.clone(),
            frontend: s.rings.stats.clone(),
            network: s.network.clone(),
            backend: self
                .copy
                .as_ref()
                .map(|c| c.stats.clone())
                .unwrap_or_default(),
            inflight: s.rings.in_flight() as u64,
            sync_remaining: 0,
        })
    }
}

impl Serving {
    /// A volume whose only copy is here: writes go straight from guest memory (PROTOCOL 2.1).
    fn is_direct(&self, copy_here: bool) -> bool {
        copy_here && self.local.is_some() && !self.attachment.record().logged()
    }

    fn watch(&mut self, ctx: &mut Context, volume: usize, index: u16) -> GuestAnswer {
        let Some(kick) = self.rings.kick(index) else {
            return Err(format!("queue {index} is not started"));
        };
        let token = ctx.watch(kick, volume, index)?;
        self.kicks.insert(index, token);
        Ok(0)
    }

    fn unwatch(&mut self, ctx: &mut Context, index: u16) {
        if let (Some(token), Some(kick)) = (self.kicks.remove(&index), self.rings.kick(index)) {
            ctx.unwatch(kick, token);
        }
    }

    fn drop_rings(&mut self, ctx: &mut Context) {
        let watched: Vec<u16> = self.kicks.keys().copied().collect();
        for index in watched {
            self.unwatch(ctx, index);
        }
        self.rings.disconnect();
    }

    /// Answers of a copy on another node, for the counters.
    fn count_answered(&mut self, now: Nanos, message: &Message) {
        match message {
            Message::AckVec { acks, .. } => {
                acks.iter()
                    .for_each(|(seq, status)| self.count_answer(now, *seq, *status));
            }
            Message::ReadReply { seq, status } => self.count_answer(now, *seq, *status),
            _ => {}
        }
    }

    fn count_answer(&mut self, now: Nanos, seq: Seq, status: Status) {
        let Some((op, submitted)) = self.attachment.under_way(seq) else {
            return;
        };
        let (counter, bytes) = match op {
            Op::Read(span) => (&mut self.network.read, span.len),
            Op::Write { span, .. } => (&mut self.network.write, span.len),
            Op::Zero { span, .. } => (&mut self.network.discard, span.len),
            Op::Flush => (&mut self.network.flush, 0),
        };
        counter.total += 1;
        counter.bytes += u64::from(bytes);
        counter.errors += u64::from(status != Status::Ok);
        counter.seconds.observe(seconds(now.since(submitted)));
    }
}

impl LocalCopy {
    fn count(&mut self, done: &Completion, now: Nanos) {
        let (op, bytes) = match done.token.work {
            Work::Read(len) => (&mut self.stats.read, len),
            Work::Write(len) => (&mut self.stats.write, len),
            Work::Discard(len) => (&mut self.stats.discard, len),
            Work::Flush => (&mut self.stats.flush, 0),
            Work::Meta => return,
        };
        op.total += 1;
        op.bytes += u64::from(bytes);
        op.errors += u64::from(done.result.is_err());
        op.seconds.observe(seconds(now.since(done.started)));
    }

    fn write_meta(
        &mut self,
        ctx: &mut Context,
        token: Token,
        writes: Vec<MetaWrite>,
        then: Option<MetaWrite>,
    ) {
        if writes.is_empty() {
            return self
                .replica
                .on_disk(ctx.now, token.ticket, DiskResult::Done(None));
        }
        let (left, failed) = (writes.len(), false);
        self.batches
            .insert(token.ticket, Batch { left, failed, then });
        for write in writes {
            ctx.disk.meta(token, &self.meta, write.offset, write.bytes);
        }
    }

    /// The pages that hold the bits of `regions`, of every bitmap in use.
    fn bitmap_pages(&self, regions: &[Region]) -> Vec<MetaWrite> {
        let per_region = REGION / CHUNK;
        let mut pages: Vec<u32> = regions
            .iter()
            .flat_map(|r| {
                let first = u64::from(r.0) * per_region / u64::from(BITS_PER_PAGE);
                let last =
                    (u64::from(r.0) * per_region + per_region - 1) / u64::from(BITS_PER_PAGE);
                first as u32..=last as u32
            })
            .collect();
        pages.sort_unstable();
        pages.dedup();
        let mut writes = Vec::new();
        for slot in 0..crate::replication::copy_state::BITMAPS_MAX {
            let Some(map) = self.replica.map(slot) else {
                continue;
            };
            for &page in &pages {
                let words = map.words();
                let start = (page as usize * WORDS_PER_PAGE).min(words.len());
                let end = (start + WORDS_PER_PAGE).min(words.len());
                if start < end {
                    writes.push(self.metadata.bitmap_page(slot, page, &words[start..end]));
                }
            }
        }
        writes
    }
}

fn seconds(span: Nanos) -> f64 {
    span.0 as f64 / 1e9
}

/// The metric's label for why a copy was ejected.
fn eject_reason(text: &str) -> &'static str {
    const KNOWN: &[(&str, &str)] = &[
        ("not reachable", "disconnected"),
        ("silent", "silent"),
        ("a request unanswered", "late"),
        ("its disk is full", "disk_full"),
        ("its disk failed", "io_error"),
        ("its machine was restarted", "restarted"),
        ("no copy of that identity", "unknown_copy"),
    ];
    KNOWN
        .iter()
        .find(|(start, _)| text.starts_with(start))
        .map_or("other", |(_, label)| label)
}
