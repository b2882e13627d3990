//! The volume served from here: its links to the copies, and the guest.

use std::collections::HashMap;
use std::sync::mpsc::SyncSender;

use super::turns::Seat;
use super::{Detaching, LocalCopy, QUIESCE, Serving, Volume, seconds};
use crate::cluster::metrics::Layer;
use crate::engine::buffer::Bytes;
use crate::engine::command::{
    AttachVolume, Event, GuestAnswer, GuestCommand, HoldVolume, ParkAnswer, RegistryRequest,
};
use crate::engine::context::Context;
use crate::engine::rings::Rings;
use crate::engine::syncs::{End, Held, waits_here};
use crate::guest::{BlockSize, Serial};
use crate::replication::attachment::{Action as Do, Attachment, Op};
use crate::replication::ids::{COPIES_MAX, CopyId, LINKS_MAX, Nanos, Seq};
use crate::replication::message::{Message, Refusal, Status};

impl Volume {
    /// Takes the rings of a machine that may have waited for this process. Nothing is taken from them: who may serve the volume is
    /// for the registry to say (PROTOCOL 5).
    pub fn hold(&mut self, hold: HoldVolume) -> Result<(), String> {
        if self.serving.is_some() {
            return Err(format!("volume {} is attached here already", hold.name));
        }
        let serial = Serial::new(&self.id.to_string());
        let name = hold.name.clone();
        let rings = Rings::new(name, serial, hold.size, hold.block_size, hold.read_only);
        self.serving = Some(Serving::new(hold.name, rings));
        Ok(())
    }

    /// Serves the volume from here.
    pub fn attach(&mut self, ctx: &Context, attach: AttachVolume) -> Result<(), String> {
        if self.serving.as_ref().is_some_and(|s| s.seat.is_some()) {
            return Err(format!("volume {} is attached here already", attach.name));
        }
        // Its machine submits them again. Answered before the kernel has let go of them, it would have other things in
        // their memory when that comes.
        self.lingering.retain(|guest| guest.is_pinned());
        if !self.lingering.is_empty() {
            return Err(format!(
                "the disk here still works on {} requests of the attachment before: it is tried again",
                self.lingering.len()
            ));
        }
        let serial = Serial::new(&self.id.to_string());
        let (size, read_only) = (attach.record.size, attach.read_only);
        let block_size = BlockSize::of(attach.record.block_size);
        let name = attach.name.clone();
        let seat = Seat::new(attach.me, attach.record, attach.revision, attach.by_turns);
        let attachment = match attach.by_turns {
            true => None,
            false => Some(seat.attach(attach.proof, ctx.now)?),
        };
        let new = || {
            let rings = Rings::new(name.clone(), serial, size, block_size, read_only);
            Serving::new(name, rings)
        };
        // The rings of a machine that was held go on.
        let serving = self.serving.take().unwrap_or_else(new);
        self.serving = Some(Serving {
            attachment,
            seat: Some(seat),
            grown: attach.grown,
            ..serving
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
    pub fn copy_says(
        &mut self,
        ctx: &mut Context,
        link: usize,
        message: Message,
        data: Option<Bytes>,
    ) {
        if let Some(s) = &mut self.serving {
            s.count_answered(ctx.now, &message);
            if let Some(attachment) = &mut s.attachment {
                if message == Message::Nack(Refusal::Busy) {
                    let node = &attachment.record().copies[link % COPIES_MAX].node;
                    ctx.turns.is_busy(node.clone(), ctx.now);
                }
                attachment.on_message(ctx.now, link, message, data);
            }
        }
    }

    /// The connection to a copy was made, or was lost.
    pub fn copy_link(
        &mut self,
        ctx: &mut Context,
        link: usize,
        token: usize,
        state: Result<crate::replication::ids::BootId, &str>,
    ) {
        let Some(s) = &mut self.serving else { return };
        if s.links[link] != Some(token) {
            return;
        }
        ctx.turns.dialed(token);
        if state.is_err() {
            s.links[link] = None;
        }
        let Some(attachment) = &mut s.attachment else {
            return;
        };
        if state.is_ok() && is_for_sync(attachment, link) && !hold(&mut s.places, ctx, link) {
            s.links[link] = None;
            ctx.remove(token);
            return attachment.on_put_off(ctx.now, link, &waits_here());
        }
        match state {
            Ok(boot_id) => attachment.on_connected(ctx.now, link, boot_id),
            Err(why) => attachment.on_disconnected(ctx.now, link, why),
        }
    }

    /// The copy's node has no such copy.
    pub fn copy_unknown(&mut self, ctx: &Context, link: usize, token: usize) {
        if let Some(s) = &mut self.serving
            && s.links[link] == Some(token)
        {
            s.links[link] = None;
            let Some(attachment) = &mut s.attachment else {
                return;
            };
            attachment.on_disconnected(ctx.now, link, &Refusal::UnknownCopy.to_string());
            attachment.on_refused(ctx.now, link, Refusal::UnknownCopy);
        }
    }

    pub(super) fn on_attachment_action(&mut self, ctx: &mut Context, action: Do<Bytes>) {
        let Some(s) = &mut self.serving else { return };
        let Some(attachment) = &mut s.attachment else {
            return;
        };
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
                    if copy.may_take(ctx, &message) {
                        copy.replica
                            .on_message(ctx.now, session, message.clone(), data.clone());
                    } else {
                        let node = ctx.me.node.clone();
                        ctx.turns.is_busy(node, ctx.now);
                        attachment.on_message(ctx.now, own, Message::Nack(Refusal::Busy), None);
                    }
                }
                if !remote.is_empty() {
                    let compress = attachment.record().compress;
                    ctx.send_set(remote, &s.links, &message, data.as_ref(), compress);
                }
            }
            Do::Complete { id, outcome, data } => {
                s.rings
                    .complete(ctx.now, attachment, id, outcome, data.as_ref())
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
            Do::ReadRecord => ctx.read_record(self.id),
            Do::Event { rule, text } => {
                match rule {
                    "5 promote" => ctx.promotions += 1,
                    "6 sync begins" => ctx.syncs_started += 1,
                    "6 in sync" => ctx.syncs_completed += 1,
                    "3 repair" => s.read_repairs += 1,
                    "2.6 eject" => {
                        let reason = text.split(": ").nth(1).unwrap_or("unknown");
                        let label = eject_reason(reason).into();
                        *ctx.ejections.entry(label).or_default() += 1;
                    }
                    _ => {}
                }
                while let Some(span) = attachment.take_failover() {
                    ctx.failover.observe(seconds(span));
                }
                let epoch = attachment.record().epoch;
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
        let Some(attachment) = &mut s.attachment else {
            return;
        };
        let for_sync = is_for_sync(attachment, link);
        if for_sync && let Err(why) = ctx.turns.may_dial(node, ctx.now) {
            return attachment.on_put_off(ctx.now, link, &why);
        }
        if *node == ctx.me.node {
            if here != Some(copy_id) {
                let unknown = Refusal::UnknownCopy;
                attachment.on_disconnected(ctx.now, link, &unknown.to_string());
                attachment.on_refused(ctx.now, link, unknown);
            } else if link >= COPIES_MAX {
                let why = "the copy of this process takes everything over one session";
                attachment.on_disconnected(ctx.now, link, why);
            } else if for_sync && !hold(&mut s.places, ctx, link) {
                attachment.on_put_off(ctx.now, link, &waits_here());
            } else {
                s.local = Some((ctx.session(), link));
                attachment.on_connected(ctx.now, link, ctx.me.boot_id);
            }
            return;
        }
        match ctx.dial(node, self.id, copy_id, self.at, link) {
            Ok(token) => {
                s.links[link] = Some(token);
                if for_sync {
                    ctx.turns.dialing(token, node.clone());
                }
            }
            Err(why) => attachment.on_disconnected(ctx.now, link, &why),
        }
    }

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
            GuestCommand::Log(index, log) => {
                s.rings.set_log(index, log);
                Ok(0)
            }
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

    /// The guest's rings stand still, for the program that takes this one's place.
    pub fn park(&mut self, now: Nanos, patience: Nanos, reply: SyncSender<ParkAnswer>) {
        match &mut self.serving {
            Some(s) => s.rings.park(now, patience, reply),
            // No ring can run.
            None => drop(reply.try_send(Ok(Vec::new()))),
        }
    }

    /// They go on.
    pub fn unpark(&mut self) {
        if let Some(s) = &mut self.serving {
            s.rings.unpark();
        }
    }

    /// A kick came in.
    pub fn kicked(&mut self, index: u16) {
        if let Some(s) = &mut self.serving {
            s.rings.kicked(index);
        }
    }
}

impl Serving {
    /// A machine's rings, and nobody who serves them.
    fn new(name: String, rings: Rings) -> Self {
        Self {
            attachment: None,
            seat: None,
            rings,
            name,
            grown: None,
            links: [None; LINKS_MAX],
            local: None,
            kicks: HashMap::new(),
            detaching: None,
            network: Layer::default(),
            places: HashMap::new(),
            told: Default::default(),
            read_repairs: 0,
        }
    }

    /// A volume whose only copy is here: writes go straight from guest memory (PROTOCOL 2.1).
    pub(super) fn is_direct(&self, copy_here: bool) -> bool {
        let unlogged = |a: &Attachment<Bytes>| !a.record().logged();
        copy_here && self.local.is_some() && self.attachment.as_ref().is_some_and(unlogged)
    }

    /// S20: what the record says, every in-sync copy has. Requests up to there are taken before the guest hears of it.
    pub(super) fn follow_size(&mut self) {
        let record = self.attachment.as_ref().map(Attachment::record);
        let Some(record) = record.or(self.seat.as_ref().map(|seat| &seat.record)) else {
            return;
        };
        let size = record.size;
        if self.rings.grow(size)
            && let Some(grown) = &self.grown
        {
            grown(size);
        }
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

    /// Ends all sessions with copies.
    pub(super) fn end_links(&mut self, ctx: &mut Context, copy: &mut Option<LocalCopy>) {
        for token in self.links.iter_mut().filter_map(Option::take) {
            ctx.remove(token);
        }
        if let (Some((session, _)), Some(copy)) = (self.local.take(), copy) {
            copy.replica.on_close(ctx.now, session);
        }
    }

    pub(super) fn drop_rings(&mut self, ctx: &mut Context) {
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
        let asked = self.attachment.as_mut().and_then(|a| a.under_way(seq));
        let Some((op, submitted)) = asked else {
            return;
        };
        let (counter, bytes) = match op {
            Op::Read(span) => (&mut self.network.read, span.len),
            Op::Zero {
                span, unmap: true, ..
            } => (&mut self.network.discard, span.len),
            Op::Write { span, .. } | Op::Zero { span, .. } => (&mut self.network.write, span.len),
            Op::Flush => (&mut self.network.flush, 0),
        };
        counter.total += 1;
        counter.bytes += u64::from(bytes);
        counter.errors += u64::from(status != Status::Ok);
        counter.seconds.observe(seconds(now.since(submitted)));
    }
}

/// Whether the link is the one over which a sync begins.
fn is_for_sync(attachment: &Attachment<Bytes>, link: usize) -> bool {
    link < COPIES_MAX && attachment.is_absent(link)
}

/// Takes a place for the sync of `copy`, unless there is none.
fn hold(places: &mut HashMap<usize, Held>, ctx: &Context, copy: usize) -> bool {
    if let Some(place) = ctx.turns.places.take(End::Source) {
        places.insert(copy, Held::new(place, ctx.now));
        return true;
    }
    false
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
