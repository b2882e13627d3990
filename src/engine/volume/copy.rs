//! The copy on this node: from what its state machine decides to the disk, and back.

use std::collections::HashMap;

use super::{Batch, LocalCopy, Volume, seconds};
use crate::cluster::metrics::Layer;
use crate::copy::layout::WORDS_PER_PAGE;
use crate::copy::{BITS_PER_PAGE, GrowthError, MetaWrite};
use crate::engine::buffer::Bytes;
use crate::engine::command::{Command, Event, Mailbox, OpenCopy};
use crate::engine::context::Context;
use crate::engine::disk::{Completion, DataFile, Output, Token, Work};
use crate::engine::syncs::{End, Held};
use crate::replication::ids::{CHUNK, CopyId, Epoch, Nanos, REGION, Region, VolumeId};
use crate::replication::message::{Message, Refusal};
use crate::replication::replica::{
    Action as CopyDo, DiskOp, DiskResult, Replica, SessionId, Ticket,
};
use crate::replication::timing::Timing;

impl Volume {
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
        let length = store
            .data_bytes()
            .map_err(|e| format!("cannot read the length of the copy's data: {e}"))?;
        let replica = Replica::new(
            state,
            regions.as_deref(),
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
            length,
            measured: 0,
            cut: false,
            place: None,
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
        let Some(copy) = &mut self.copy else {
            return ctx.close_session(session);
        };
        if copy.may_take(ctx, &message) {
            return copy.replica.on_message(ctx.now, session, message, data);
        }
        if let Some(token) = ctx.sessions.get(&session).copied() {
            ctx.send(token, &Message::Nack(Refusal::Busy), None, false);
        }
        ctx.close_session(session);
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
        let relied_on = matches!(done.token.work, Work::Read(_) | Work::Flush);
        if (relied_on || done.result.is_err()) && copy.measured != ctx.disk.round() {
            copy.measure(ctx);
        }
        let mut result = match done.result {
            // What was read from beyond the end, and since then written to, would be zeros.
            Ok(_) if copy.cut && relied_on => DiskResult::Error,
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

    /// The thread that made the copy's files longer has ended.
    pub fn files_grown(&mut self, ctx: &Context, ticket: Ticket, result: Result<(), GrowthError>) {
        let Some(copy) = &mut self.copy else { return };
        let result = match result {
            Ok(()) => {
                copy.length = copy.store.data_bytes().unwrap_or(copy.length);
                DiskResult::Done(None)
            }
            Err(e) => {
                log::error!("volume {}: the copy cannot grow: {e}", self.id);
                match e {
                    GrowthError::NoRoom(_) => DiskResult::NoSpace,
                    GrowthError::Failed(_) => DiskResult::Error,
                }
            }
        };
        copy.replica.on_disk(ctx.now, ticket, result);
    }

    pub(super) fn on_copy_action(&mut self, ctx: &mut Context, action: CopyDo<Bytes>) {
        let local = self.serving.as_ref().and_then(|s| s.local);
        match action {
            CopyDo::Ack {
                session,
                seq,
                status,
            } => match (local, &mut self.serving) {
                (Some((mine, link)), Some(s)) if mine == session => {
                    if let Some(a) = &mut s.attachment {
                        a.on_ack(ctx.now, link, seq, status);
                    }
                }
                _ => ctx.ack(session, seq, status),
            },
            CopyDo::Reply {
                session,
                message,
                data,
            } => match (local, &mut self.serving) {
                (Some((mine, link)), Some(s)) if mine == session => {
                    if let Some(a) = &mut s.attachment {
                        a.on_message(ctx.now, link, message, data);
                    }
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
                    if let Some(a) = &mut s.attachment {
                        a.on_disconnected(ctx.now, link, "the copy on this node ended the session");
                    }
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
            DiskOp::Zero {
                span, unmap: true, ..
            } => Work::Discard(span.len),
            DiskOp::Zero { span, .. } => Work::Zero(span.len),
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
            DiskOp::Zero { span, unmap, dsync } => {
                ctx.disk.zero(token, &copy.data, span, unmap, dsync);
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
                // Cut short before, it would not show any more.
                copy.measure(ctx);
                if copy.cut {
                    copy.replica.on_disk(ctx.now, ticket, DiskResult::Error);
                } else if let Err(e) = copy.lengthen(ctx.mailbox.clone(), self.id, ticket, size) {
                    log::error!("volume {}: {e}", self.id);
                    copy.replica.on_disk(ctx.now, ticket, DiskResult::NoSpace);
                }
            }
            DiskOp::Superblock(state) => {
                // Into both halves, one after the other: were only one to say it and to rot later,
                // the other would bring an older promise back (S2).
                let first = copy.metadata.superblock(&state);
                let second = copy.metadata.superblock(&state);
                copy.write_meta(ctx, token, vec![first], Some(second));
            }
            DiskOp::Log(txn) => {
                let writes = match txn.anew {
                    true => copy.metadata.reset_log(&txn.add),
                    false => copy.metadata.log(&txn.add, &txn.retire),
                };
                copy.write_meta(ctx, token, writes, None);
            }
            DiskOp::Bitmaps(regions) => {
                let writes = copy.bitmap_pages(&regions);
                copy.write_meta(ctx, token, writes, None);
            }
        }
    }
}

impl LocalCopy {
    /// Whether there is a place for the sync that the message begins, if it begins one.
    pub(super) fn may_take(&mut self, ctx: &Context, message: &Message) -> bool {
        if !matches!(message, Message::SyncBegin(_)) {
            return true;
        }
        if let Some(place) = &mut self.place {
            place.renew(ctx.now);
            return true;
        }
        let place = ctx.turns.places.take(End::Target);
        self.place = place.map(|place| Held::new(place, ctx.now));
        self.place.is_some()
    }

    /// Whether the data file is still as long as it was made. Bytes that somebody cut off read as zeros once a write made
    /// the file longer again, so the copy is dead (PROTOCOL 3). No write reaches the file's last block: it stays cut.
    pub(super) fn measure(&mut self, ctx: &Context) {
        self.measured = ctx.disk.round();
        if self.cut {
            return;
        }
        let found = match self.store.data_bytes() {
            Ok(found) if found >= self.length => return,
            Ok(found) => format!("{found} bytes"),
            Err(e) => e.to_string(),
        };
        log::error!(
            "{}: its data file was cut short: {found} instead of {} bytes",
            self.store.dir().display(),
            self.length
        );
        self.cut = true;
        self.replica
            .on_bytes_lost(ctx.now, "its data file was cut short");
    }

    fn count(&mut self, done: &Completion, now: Nanos) {
        let (op, bytes) = match done.token.work {
            Work::Read(len) => (&mut self.stats.read, len),
            Work::Write(len) | Work::Zero(len) => (&mut self.stats.write, len),
            Work::Discard(len) => (&mut self.stats.discard, len),
            Work::Flush => (&mut self.stats.flush, 0),
            Work::Meta => return,
        };
        op.total += 1;
        op.bytes += u64::from(bytes);
        op.errors += u64::from(done.result.is_err());
        op.seconds.observe(seconds(now.since(done.started)));
    }

    /// On a thread of its own, which tells the worker how it went: flushing files takes long, and a worker serves others.
    fn lengthen(
        &self,
        mailbox: Option<Mailbox>,
        volume: VolumeId,
        ticket: Ticket,
        size: u64,
    ) -> Result<(), String> {
        let mailbox = mailbox.ok_or("the engine is only starting")?;
        let growth = self.store.growth(size, false).map_err(|e| e.to_string())?;
        std::thread::Builder::new()
            .name("grow".into())
            .spawn(move || {
                let result = growth.run();
                // Not when the worker has ended: then nobody waits for it.
                mailbox.send(Command::Grown(volume, ticket, result));
            })
            .map(drop)
            .map_err(|e| format!("no thread to make the copy's files longer: {e}"))
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
