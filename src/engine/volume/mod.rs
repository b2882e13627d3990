//! One volume on its worker: the copy on this node's disk, the attachment if the volume is served from here, and the
//! guest's rings. Carries out what the state machines of `replication` decide.

mod copy;
mod progress;
mod serving;
mod turns;

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::mpsc::SyncSender;

use super::buffer::{Bytes, GuestRequest};
use super::command::{CopyStatus, Grown, VolumeStatus};
use super::context::Context;
use super::disk::DataFile;
use super::rings::Rings;
use super::syncs::Held;
use crate::cluster::metrics::{Layer, VolumeMetrics};
use crate::copy::{MetaWrite, Metadata, Store};
use crate::replication::attachment::{Action, Attachment, Phase};
use crate::replication::ids::{LINKS_MAX, Nanos, VolumeId};
use crate::replication::replica::{Replica, SessionId, Ticket};

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
    /// How long the data file is.
    length: u64,
    /// The disk's round in which it was that long last.
    measured: u64,
    /// Somebody cut it short.
    cut: bool,
    /// Its place among the copies on this node that are brought up to date.
    place: Option<Held>,
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
    /// Its state machine; `None` while the machine runs, or may run, on another node, and while the volume is held.
    pub attachment: Option<Attachment<Bytes>>,
    /// `None`: it is held. Its machine may have waited for this process, and nobody has said yet that it is to be served here.
    seat: Option<turns::Seat>,
    /// The guest's rings.
    pub rings: Rings,
    name: String,
    /// Told when the volume is larger than what the guest is shown.
    grown: Option<Grown>,
    /// Tokens of the connections to the copies, by link.
    links: [Option<usize>; LINKS_MAX],
    /// The session with the copy of this process, and that copy's link; it has none for bulk.
    local: Option<(SessionId, usize)>,
    /// Tokens of the watched kicks.
    kicks: HashMap<u16, usize>,
    detaching: Option<Detaching>,
    network: Layer,
    /// Places of the copies that are brought up to date from here.
    places: HashMap<usize, Held>,
    /// What was said of their syncs.
    told: progress::Told,
    /// What one copy's disk could not read, and another copy brought back.
    read_repairs: u64,
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
    /// Requests of a former attachment here whose memory the kernel worked with when it ended.
    lingering: Vec<Rc<GuestRequest>>,
}

impl Volume {
    /// Nothing yet.
    pub fn new(id: VolumeId, at: usize) -> Self {
        Self {
            id,
            at,
            copy: None,
            serving: None,
            lingering: Vec::new(),
        }
    }

    /// Whether it is to be told the time now. A node has hundreds of copies that nothing happens to: those look up once in a
    /// second.
    pub fn wants_time(&self, now: Nanos) -> bool {
        let copy_does = |c: &LocalCopy| !c.replica.is_idle() || now.since(c.looked) >= IDLE_LOOK;
        self.serving.is_some() || self.copy.as_ref().is_some_and(copy_does)
    }

    // ---- the turn

    /// Time passed.
    pub fn on_tick(&mut self, ctx: &mut Context) {
        if let Some(attachment) = self.serving.as_mut().and_then(|s| s.attachment.as_mut()) {
            attachment.on_tick(ctx.now);
            self.tell_progress(ctx);
        }
        if let Some(copy) = &mut self.copy
            && ctx.now.since(copy.looked) >= IDLE_LOOK
        {
            copy.looked = ctx.now;
            copy.replica.on_tick(ctx.now);
            copy.measure(ctx);
        }
    }

    /// Takes the guest's requests, and carries out decisions until there are none.
    pub fn settle(&mut self, ctx: &mut Context) {
        if let Some(s) = &mut self.serving {
            // A machine that comes from another node may have seen the volume grow there: before its first request.
            s.follow_size();
            let direct = s.is_direct(self.copy.is_some());
            if let Some(attachment) = &mut s.attachment {
                s.rings.take(ctx.now, attachment, direct);
            }
        }
        loop {
            let mut any = false;
            while let Some(action) = self.decision() {
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
        self.give_places_back(ctx.now);
        let Some(s) = &mut self.serving else {
            return false;
        };
        s.follow_size();
        s.rings.answer_unpinned(ctx.now);
        // PROTOCOL 4: once more before the guest sees it. The next heartbeat's answer, or the end of the attachment, decides.
        let hold = s.rings.shows_reads()
            && (s.attachment.as_ref()).is_none_or(|a| !a.may_show_reads(super::now()));
        let more = s.rings.end_turn(hold);
        for (index, ring) in s.rings.stopped(ctx.now) {
            if let Some(token) = s.kicks.remove(&index) {
                ctx.unwatch(ring.kick_fd(), token);
            }
        }
        s.rings.parked(ctx.now);
        self.housekeeping(ctx) || more
    }

    /// What the attachment decided next.
    fn decision(&mut self) -> Option<Action<Bytes>> {
        self.serving.as_mut()?.attachment.as_mut()?.poll()
    }

    fn give_places_back(&mut self, now: Nanos) {
        if let Some(copy) = &mut self.copy
            && let Some(place) = &mut copy.place
            && !place.is_needed(copy.replica.is_target(), now)
        {
            copy.place = None;
        }
        if let Some(s) = &mut self.serving {
            let attachment = s.attachment.as_ref();
            let runs = |copy| attachment.is_some_and(|a| a.is_syncing(copy));
            s.places
                .retain(|copy, place| place.is_needed(runs(*copy), now));
        }
    }

    /// Whether there is something to do at once.
    fn housekeeping(&mut self, ctx: &mut Context) -> bool {
        let turned = self.take_turns(ctx);
        let Some(s) = &mut self.serving else {
            return false;
        };
        let Some(detaching) = &mut s.detaching else {
            return turned;
        };
        let quiet = s.rings.in_flight() == 0 || ctx.now >= detaching.deadline;
        if !detaching.told && quiet {
            detaching.told = true;
            if let Some(attachment) = &mut s.attachment {
                attachment.detach(ctx.now);
                return true;
            }
        }
        let end = match s.attachment.as_ref().map(Attachment::phase) {
            None | Some(Phase::Left) => Ok(()),
            Some(Phase::Fenced(why)) => Err(why.clone()),
            _ if ctx.now < detaching.deadline.after(QUIESCE) => return false,
            Some(phase) => Err(format!(
                "it could not be left cleanly in time (it is {phase:?}); the next attach reconciles"
            )),
        };
        let reply = detaching.reply.clone();
        self.drop_serving(ctx);
        let _ = reply.try_send(end);
        true
    }

    /// Ends the attachment here, whatever its state.
    pub fn drop_serving(&mut self, ctx: &mut Context) {
        let Some(mut s) = self.serving.take() else {
            return;
        };
        s.drop_rings(ctx);
        s.end_links(ctx, &mut self.copy);
        self.lingering.extend(s.rings.pinned());
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

    /// The attachment here; not what is held.
    pub fn status(&self) -> Option<VolumeStatus> {
        let s = self.serving.as_ref()?;
        let writeback = s.rings.writeback();
        let Some(attachment) = &s.attachment else {
            let seat = s.seat.as_ref()?;
            return Some(VolumeStatus {
                volume: self.id,
                phase: None,
                why: Some("it waits for the machine to run here".into()),
                epoch: seat.record.epoch,
                record: seat.record.clone(),
                copies: seat.copies(),
                in_flight: 0,
                undecided: 0,
                writeback,
                scrub: None,
            });
        };
        let status = attachment.status();
        Some(VolumeStatus {
            volume: self.id,
            phase: Some(status.phase),
            why: attachment.why_not_serving(),
            epoch: attachment.record().epoch,
            record: attachment.record().clone(),
            copies: status.copies,
            in_flight: status.in_flight,
            undecided: status.undecided,
            writeback,
            scrub: status.scrub,
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
            cut: copy.cut,
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
            sync: progress::in_all(s.attachment.as_ref()),
            scrub: (s.attachment.as_ref())
                .map(Attachment::scrub_counters)
                .unwrap_or_default(),
            read_repairs: s.read_repairs,
        })
    }
}

fn seconds(span: Nanos) -> f64 {
    span.0 as f64 / 1e9
}
