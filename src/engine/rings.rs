//! The guest's rings of one volume on its worker: taking requests, giving answers.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use super::buffer::{Buffer, Bytes, GuestPart, GuestRequest};
use super::command::{GuestAnswer, ParkAnswer};
use super::zeroes::Zeroes;
use crate::cluster::metrics::Layer;
use crate::guest::{
    BlockSize, GuestMem, Kind, Limits, Parsed, Request, Ring, RingLog, RingStart, Serial, Status,
    Used, copy_from_guest, copy_to_guest,
};
use crate::replication::attachment::{Attachment, Op, Outcome, RequestId};
use crate::replication::ids::{IO_MAX, Nanos, Seq, Span};
use crate::replication::in_flight::{IN_FLIGHT_MAX, InFlight};

/// How long a ring that is stopped may wait for its requests. QEMU's main loop, and with it the virtual machine,
/// waits for the answer; beyond this a suspended volume would look like a dead host.
pub const DRAIN: Nanos = Nanos::from_ms(5_000);
/// A stop that comes this soon after the last one belongs with it: a front-end stops its rings one after another, each when
/// the one before has stopped.
const SERIES: Nanos = Nanos::from_ms(1_000);

/// One started ring.
struct Slot {
    ring: Ring,
    /// Which start of it this is. What was taken in an earlier one is not answered here.
    life: u64,
    /// Parts of its requests that are under way.
    under_way: usize,
    enabled: bool,
    /// It may have requests: look without waiting for a kick.
    ready: bool,
    /// Answers were pushed in this turn.
    pushed: bool,
    stopping: Option<(SyncSender<GuestAnswer>, Nanos)>,
}

/// A part of a guest request that is under way.
struct Part {
    guest: Rc<GuestRequest>,
    kind: Kind,
    start: usize,
    len: usize,
    submitted: Nanos,
}

impl Part {
    fn memory(&self) -> GuestPart {
        GuestPart {
            request: Rc::clone(&self.guest),
            start: self.start,
            len: self.len,
        }
    }
}

/// Stops of several rings that belong together. They have [`DRAIN`] in all: what one waits for in vain, the next one would
/// not see either, and a device may have 256 of them.
#[derive(Clone, Copy)]
struct Stops {
    deadline: Nanos,
    latest: Nanos,
}

/// One queue of the device.
#[derive(Default)]
struct Queue {
    slot: Option<Slot>,
    /// Parts under way of requests that were taken before it was stopped or its connection ended. Nobody waits for
    /// their answers, but a disk may still be reading into the guest's memory for them. Were they submitted again and
    /// answered meanwhile, the guest would have other things in that memory by then: so nothing is taken before the
    /// last of them has ended.
    orphans: usize,
    /// The log of the virtual machine's memory. Also when the ring has stopped: an orphan may still write.
    log: Option<RingLog>,
}

impl Queue {
    /// Stops it.
    fn end(&mut self) -> Option<Slot> {
        let slot = self.slot.take()?;
        self.orphans += slot.under_way;
        Some(slot)
    }

    /// The ring stops in spite of requests that do not end. What becomes of them:
    ///
    /// * Tracked, and the front-end stays (a machine that is paused, or shut down): they are left where they are, in the
    ///   in-flight region. When the ring goes on they are submitted again, and the guest has seen a pause. An error would
    ///   make of a replica's silence, which the suspend deadline allows for, a file system that is read-only.
    /// * Tracked, while the machine is migrated (its writes are logged): no front-end takes the region along, so that nobody
    ///   would answer them at the machine's new place, and its driver does not give up waiting. They fail: a bad answer is
    ///   better than none.
    /// * Not tracked: nobody remembers them. They fail, too.
    ///
    /// A write that failed may still be carried out; the guest knows nothing of such a sector until it writes it again, and
    /// that write is ordered behind this one. But while the kernel works with a request's memory (this node's disk hangs),
    /// the guest must not get that back: such a request stays unanswered.
    fn give_up(&mut self, parts: &InFlight<Part>) -> usize {
        let migrated = self.log.as_ref().is_some_and(|log| log.all);
        let Some(slot) = self.slot.as_mut() else {
            return 0;
        };
        if slot.ring.is_tracked() && !migrated {
            return 0;
        }
        let (ring, life) = (slot.ring.index(), slot.life);
        let given_up = |part: &&Part| {
            let guest = &part.guest;
            (guest.ring, guest.life) == (ring, life) && !guest.is_pinned()
        };
        let given_up = || parts.iter().map(|(_, part)| part).filter(given_up);
        for part in given_up().filter(|part| part.kind == Kind::Out) {
            // Carried out or not, it is this write, and not what the guest does with its memory next.
            part.memory().snapshot();
        }
        let mut failed = 0;
        for part in given_up() {
            // Once, however many parts it has.
            if let Some(used) = part.guest.finish(Status::IoErr) {
                slot.ring.push_used(used);
                failed += 1;
            }
        }
        slot.ring.publish_and_notify();
        failed
    }

    /// How many requests may be taken now. A ring that stops takes what it has to answer before it has stopped: its
    /// former process had taken it already, also if it was not enabled again since.
    fn may_take(&self) -> u16 {
        match &self.slot {
            Some(_) if self.orphans > 0 => 0,
            Some(slot) if slot.stopping.is_some() => slot.ring.to_resubmit(),
            // One ring's length at most: a guest that refills it meanwhile is looked at again after the others.
            Some(slot) if slot.ready && slot.enabled => slot.ring.size(),
            _ => 0,
        }
    }
}

/// Rings that stand still for the program that takes this one's place.
struct Parking {
    /// Until it was answered.
    reply: Option<SyncSender<ParkAnswer>>,
    deadline: Nanos,
}

/// All rings of one volume.
pub struct Rings {
    name: String,
    serial: Serial,
    queues: Vec<Queue>,
    parts: InFlight<Part>,
    zeroes: Zeroes,
    lives: u64,
    stops: Option<Stops>,
    limits: Limits,
    writeback: bool,
    parking: Option<Parking>,
    /// The volume is being detached: nothing new is taken.
    pub paused: bool,
    /// What the guest asked, for `/metrics`.
    pub stats: Layer,
}

impl Rings {
    /// No ring yet. `serial` is the volume's id, `size` its bytes.
    pub fn new(
        name: String,
        serial: Serial,
        size: u64,
        block_size: BlockSize,
        read_only: bool,
    ) -> Self {
        let limits = Limits {
            capacity_sectors: size / 512,
            read_only,
            block_size,
        };
        Self {
            name,
            serial,
            queues: Vec::new(),
            parts: InFlight::default(),
            zeroes: Zeroes::default(),
            lives: 0,
            stops: None,
            limits,
            writeback: true,
            parking: None,
            paused: false,
            stats: Layer::default(),
        }
    }

    /// Takes requests up to `size` bytes from now on; whether that is more than before.
    pub fn grow(&mut self, size: u64) -> bool {
        let sectors = size / 512;
        let more = sectors > self.limits.capacity_sectors;
        self.limits.capacity_sectors = self.limits.capacity_sectors.max(sectors);
        more
    }

    /// Guest requests taken and not answered, or parts of them.
    pub fn in_flight(&self) -> usize {
        self.parts.len() + self.zeroes.waiting()
    }

    /// Whether the machine runs a ring.
    pub fn any_started(&self) -> bool {
        self.queues.iter().any(|q| q.slot.is_some())
    }

    /// Whether a completed write may be in caches (PROTOCOL 3).
    pub fn writeback(&self) -> bool {
        self.writeback
    }

    /// The kick descriptor of a started ring.
    pub fn kick(&self, index: u16) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.slot(index).map(|s| s.ring.kick_fd())
    }

    fn slot(&self, index: u16) -> Option<&Slot> {
        self.queues.get(usize::from(index))?.slot.as_ref()
    }

    fn slot_mut(&mut self, index: u16) -> Option<&mut Slot> {
        self.queues.get_mut(usize::from(index))?.slot.as_mut()
    }

    /// The ring that a request came from, if that did not stop since.
    fn origin(&mut self, guest: &GuestRequest) -> Option<&mut Slot> {
        self.slot_mut(guest.ring)
            .filter(|slot| slot.life == guest.life)
    }

    /// Takes a ring over. The caller watches its kick.
    pub fn start(&mut self, start: RingStart) -> Result<u16, String> {
        let (index, enabled, log) = (start.index, start.enabled, start.log.clone());
        if self.slot(index).is_some() {
            return Err(format!("queue {index} was started twice"));
        }
        let ring = Ring::new(start).map_err(|e| format!("queue {index}: {e}"))?;
        let at = usize::from(index);
        if self.queues.len() <= at {
            self.queues.resize_with(at + 1, Queue::default);
        }
        log::info!(
            "volume {}: queue {at} starts at {}, {} requests that were in flight are submitted again",
            self.name,
            ring.next_avail(),
            ring.to_resubmit()
        );
        if ring.discarded() > 0 {
            log::warn!(
                "volume {}: queue {at}: {} requests in flight were of a ring that is gone",
                self.name,
                ring.discarded()
            );
        }
        self.lives += 1;
        self.queues[at].log = log;
        // A kick may have been consumed by an earlier process: look once without one.
        self.queues[at].slot = Some(Slot {
            ring,
            life: self.lives,
            under_way: 0,
            enabled,
            ready: true,
            pushed: false,
            stopping: None,
        });
        Ok(index)
    }

    /// Replaces the kick descriptor; the caller has stopped watching the old one.
    pub fn set_kick(&mut self, index: u16, kick: std::os::fd::OwnedFd) {
        if let Some(slot) = self.slot_mut(index) {
            drop(slot.ring.set_kick(kick));
            slot.ready = true;
        }
    }

    /// Replaces the call descriptor and signals it: a completion may have been published before it came.
    pub fn set_call(&mut self, index: u16, call: Option<std::os::fd::OwnedFd>) {
        if let Some(slot) = self.slot_mut(index) {
            slot.ring.set_call(call);
        }
    }

    /// Pauses or resumes.
    pub fn set_enabled(&mut self, index: u16, enabled: bool) {
        if let Some(slot) = self.slot_mut(index) {
            slot.enabled = enabled;
            slot.ready |= enabled;
        }
    }

    /// A new memory table. Requests under way keep the one they came with.
    pub fn set_memory(&mut self, mem: &Arc<GuestMem>) -> Result<(), String> {
        for slot in self.queues.iter_mut().filter_map(|q| q.slot.as_mut()) {
            let index = slot.ring.index();
            slot.ring
                .set_memory(Arc::clone(mem))
                .map_err(|e| format!("queue {index}: {e}"))?;
        }
        Ok(())
    }

    /// Starts, changes or ends the log of what a ring writes into guest memory.
    pub fn set_log(&mut self, index: u16, log: Option<RingLog>) {
        if let Some(queue) = self.queues.get_mut(usize::from(index)) {
            queue.log.clone_from(&log);
            if let Some(slot) = &mut queue.slot {
                slot.ring.set_log(log);
            }
        }
    }

    /// Whether a completed write may be in caches (PROTOCOL 3).
    pub fn set_writeback(&mut self, writeback: bool) {
        self.writeback = writeback;
    }

    /// Stops a ring; answered when its requests are done, or the time is over.
    pub fn stop(&mut self, now: Nanos, index: u16, reply: SyncSender<GuestAnswer>) {
        let deadline = match self.stops {
            Some(stops) if now < stops.latest.after(SERIES) => stops.deadline,
            _ => now.after(DRAIN),
        };
        match self.slot_mut(index) {
            Some(slot) => {
                slot.stopping = Some((reply, deadline));
                let latest = now;
                self.stops = Some(Stops { deadline, latest });
            }
            None => drop(reply.try_send(Err(format!("queue {index} was not started")))),
        }
    }

    /// Nothing new is taken.
    fn stand_still(&self) -> bool {
        self.paused || self.parking.is_some()
    }

    /// All rings stand still; `reply` is answered by [`parked`](Rings::parked).
    pub fn park(&mut self, now: Nanos, patience: Nanos, reply: SyncSender<ParkAnswer>) {
        self.parking = Some(Parking {
            reply: Some(reply),
            deadline: now.after(patience),
        });
    }

    /// They go on.
    pub fn unpark(&mut self) {
        self.parking = None;
        for slot in self.queues.iter_mut().filter_map(|q| q.slot.as_mut()) {
            // Kicks that came meanwhile were taken note of, others were not asked for.
            slot.ready = true;
        }
    }

    /// Answers who waits for the rings to stand still, when nothing is in flight or the time is over. What is in flight
    /// then, and written down, is submitted again by whoever takes the rings over; if it is not written down they stay.
    pub fn parked(&mut self, now: Nanos) {
        let Some(Parking { reply, deadline }) = &mut self.parking else {
            return;
        };
        let rings = || {
            self.queues
                .iter()
                .filter_map(|q| Some(&q.slot.as_ref()?.ring))
        };
        let in_flight = rings().any(|ring| ring.in_flight() > 0);
        if reply.is_none() || (in_flight && now < *deadline) {
            return;
        }
        let lost = rings().find(|ring| ring.in_flight() > 0 && !ring.is_tracked());
        let answer = match lost {
            None => rings()
                .map(|ring| ring.park().map_err(|e| e.to_string()))
                .collect(),
            Some(ring) => Err(format!(
                "{} requests of queue {} do not end, and its front-end keeps no in-flight region for them",
                ring.in_flight(),
                ring.index()
            )),
        };
        let failed = answer.is_err();
        // Whoever asked may have given up, and then says so.
        let _ = reply.take().map(|reply| reply.try_send(answer));
        if failed {
            self.unpark();
        }
    }

    /// The connection is gone: its rings are dropped, and what is under way is not answered any more.
    pub fn disconnect(&mut self) {
        self.queues.iter_mut().for_each(|queue| drop(queue.end()));
        self.parking = None;
        self.forget_zeroes();
    }

    /// Of zeros that a ring asked for that is no more, nothing further is started.
    fn forget_zeroes(&mut self) {
        let queues = &self.queues;
        let lives = |guest: &GuestRequest| {
            let slot = queues[usize::from(guest.ring)].slot.as_ref();
            slot.is_some_and(|slot| slot.life == guest.life)
        };
        self.zeroes.retain(lives);
    }

    /// Starts zeros that were asked for, as many as may be under way.
    fn start_zeroes(&mut self, now: Nanos, attachment: &mut Attachment<Bytes>) {
        while self.parts.len() < IN_FLIGHT_MAX
            && let Some(cut) = self.zeroes.next()
        {
            let (span, unmap, fua) = (cut.span, cut.unmap, cut.fua);
            if let Some(slot) = self.origin(&cut.guest) {
                slot.under_way += 1;
            }
            let part = Part {
                guest: cut.guest,
                kind: if unmap {
                    Kind::Discard
                } else {
                    Kind::WriteZeroes
                },
                start: 0,
                len: span.len as usize,
                submitted: cut.taken,
            };
            if let Some(seq) = self.parts.insert(part) {
                let op = Op::Zero { span, unmap, fua };
                attachment.submit(now, RequestId(seq.0), op, None);
            }
        }
    }

    /// A kick came in.
    pub fn kicked(&mut self, index: u16) {
        if let Some(slot) = self.slot_mut(index) {
            slot.ring.drain_kick();
            slot.ready = true;
        }
    }

    /// Takes what the guest made available and submits it. Returns whether anything was taken.
    pub fn take(&mut self, now: Nanos, attachment: &mut Attachment<Bytes>, direct: bool) -> bool {
        let mut any = false;
        if self.stand_still() {
            return any;
        }
        for (at, queue) in self.queues.iter_mut().enumerate() {
            let budget = queue.may_take();
            let Some(slot) = queue.slot.as_mut().filter(|_| budget > 0) else {
                continue;
            };
            slot.ready = false;
            slot.ring.disable_kicks();
            for _ in 0..budget {
                match slot.ring.next_request(&self.limits) {
                    Ok(Some(Parsed::Request(request))) => {
                        any = true;
                        let from = From {
                            ring: at as u16,
                            life: slot.life,
                            now,
                            fua: !self.writeback,
                            direct,
                        };
                        let answered = match request.kind() {
                            Kind::GetId => {
                                request.write_id(&self.serial);
                                Some(request.finish(Status::Ok))
                            }
                            Kind::Discard | Kind::WriteZeroes => {
                                let (ring, life, fua) = (from.ring, from.life, from.fua);
                                let empty = self.zeroes.add(request, ring, life, fua, now);
                                empty.map(|request| request.finish(Status::Ok))
                            }
                            Kind::In | Kind::Out | Kind::Flush => {
                                let (under_way, refused) =
                                    submit(&mut self.parts, attachment, request, &from);
                                slot.under_way += under_way;
                                refused
                            }
                        };
                        if let Some(used) = answered {
                            slot.ring.push_used(used);
                            slot.pushed = true;
                        }
                    }
                    Ok(Some(Parsed::Refused(refused))) => {
                        log::debug!("volume {}: request refused: {}", self.name, refused.reason);
                        slot.ring.push_used(refused.used);
                        slot.pushed = true;
                        any = true;
                    }
                    Ok(None) => break,
                    Err(error) => {
                        log::warn!(
                            "volume {}: queue {at} is broken and not read any more: {error}",
                            self.name
                        );
                        break;
                    }
                }
            }
        }
        self.start_zeroes(now, attachment);
        any
    }

    /// A part is done. The last part answers the request.
    pub fn complete(
        &mut self,
        now: Nanos,
        attachment: &mut Attachment<Bytes>,
        id: RequestId,
        outcome: Outcome,
        data: Option<&Bytes>,
    ) {
        let Some(part) = self.parts.remove(Seq(id.0)) else {
            return;
        };
        if matches!(part.kind, Kind::Discard | Kind::WriteZeroes) {
            self.zeroes.ended();
            self.start_zeroes(now, attachment);
        }
        let guest = &part.guest;
        let alive = match self.origin(guest) {
            Some(slot) => {
                slot.under_way -= 1;
                true
            }
            None => {
                let queue = &mut self.queues[usize::from(guest.ring)];
                queue.orphans -= 1;
                if let Some(log) = queue.log.as_ref().filter(|_| part.kind == Kind::In) {
                    guest.with(|request| request.mark(log));
                }
                false
            }
        };
        if let (Outcome::Ok, Some(Bytes::Buffer(buffer)), Kind::In) = (outcome, data, part.kind)
            && alive
        {
            let pieces = part.memory().pieces();
            // SAFETY: the request is not answered yet, so its pieces are mapped.
            unsafe { copy_to_guest(buffer, &pieces) };
        }
        guest
            .failed
            .set(guest.failed.get() || outcome == Outcome::IoError);
        guest.parts.set(guest.parts.get() - 1);
        self.count(now, &part);
        if guest.parts.get() > 0 || !alive {
            return;
        }
        let status = if guest.failed.get() {
            Status::IoErr
        } else {
            Status::Ok
        };
        let used = guest.finish(status);
        if let (Some(slot), Some(used)) = (self.origin(guest), used) {
            slot.ring.push_used(used);
            slot.pushed = true;
        }
    }

    fn count(&mut self, now: Nanos, part: &Part) {
        let op = match part.kind {
            Kind::In => &mut self.stats.read,
            Kind::Out | Kind::WriteZeroes => &mut self.stats.write,
            Kind::Flush | Kind::GetId => &mut self.stats.flush,
            Kind::Discard => &mut self.stats.discard,
        };
        op.bytes += part.len as u64;
        if part.guest.parts.get() == 0 {
            op.total += 1;
            op.errors += u64::from(part.guest.failed.get());
            op.seconds.observe(now.since(part.submitted).0 as f64 / 1e9);
        }
    }

    /// Ends the turn: publishes answers with one notification a ring, and asks for kicks again. Returns whether a ring
    /// has more to take already.
    pub fn end_turn(&mut self) -> bool {
        let mut more = false;
        let still = self.stand_still();
        for queue in &mut self.queues {
            let Some(slot) = &mut queue.slot else {
                continue;
            };
            if slot.pushed {
                slot.pushed = false;
                slot.ring.publish_and_notify();
            }
            if !slot.ready
                && slot.enabled
                && slot.stopping.is_none()
                && !still
                && !slot.ring.is_broken()
            {
                slot.ready = slot.ring.enable_kicks();
            }
            more |= !still && queue.may_take() > 0;
        }
        more
    }

    /// Answers stops whose rings are empty or whose time is over; names them, so that their kicks are not watched.
    pub fn stopped(&mut self, now: Nanos) -> Vec<(u16, Ring)> {
        let mut out = Vec::new();
        for (at, queue) in self.queues.iter_mut().enumerate() {
            let Some(slot) = &queue.slot else {
                continue;
            };
            let Some((_, deadline)) = &slot.stopping else {
                continue;
            };
            let left = slot.ring.in_flight() + slot.ring.to_resubmit();
            if left > 0 && now < *deadline {
                continue;
            }
            if left > 0 {
                let failed = queue.give_up(&self.parts);
                log::error!(
                    "volume {}: queue {at} stopped with {left} requests unanswered, of which {failed} were failed now",
                    self.name
                );
            }
            if let Some(stops) = &mut self.stops {
                stops.latest = now;
            }
            if let Some(slot) = queue.end() {
                if let Some((reply, _)) = slot.stopping {
                    let _ = reply.try_send(Ok(slot.ring.next_avail()));
                }
                out.push((at as u16, slot.ring));
            }
        }
        if !out.is_empty() {
            self.forget_zeroes();
        }
        out
    }
}

struct From {
    ring: u16,
    life: u64,
    now: Nanos,
    fua: bool,
    direct: bool,
}

/// Hands a request to the attachment, in parts of at most [`IO_MAX`]. Gives how many parts are under way; when there is
/// room for none, the request's answer.
fn submit(
    parts: &mut InFlight<Part>,
    attachment: &mut Attachment<Bytes>,
    request: Request,
    from: &From,
) -> (usize, Option<Used>) {
    let (kind, offset, total) = (
        request.kind(),
        request.offset(),
        request.data_len() as usize,
    );
    let count = total.div_ceil(IO_MAX as usize).max(1);
    let mut under_way = 0;
    let guest = GuestRequest::new(request, from.ring, from.life, count as u32);
    for n in 0..count {
        let start = n * IO_MAX as usize;
        let len = (total - start).min(IO_MAX as usize);
        let part = Part {
            guest: Rc::clone(&guest),
            kind,
            start,
            len,
            submitted: from.now,
        };
        let Some(seq) = parts.insert(part) else {
            // All queues at their largest hold less than this; answered as an error rather than lost.
            guest.failed.set(true);
            guest.parts.set(guest.parts.get() - 1);
            continue;
        };
        let memory = GuestPart {
            request: Rc::clone(&guest),
            start,
            len,
        };
        let span = Span {
            offset: offset + start as u64,
            len: len as u32,
        };
        let (op, data) = match kind {
            Kind::In => (Op::Read(span), Some(Bytes::Guest(memory))),
            Kind::Out if from.direct => (
                Op::Write {
                    span,
                    fua: from.fua,
                },
                Some(Bytes::Guest(memory)),
            ),
            Kind::Out => (
                Op::Write {
                    span,
                    fua: from.fua,
                },
                Some(snapshot(&memory)),
            ),
            // Serials and zeros do not come here.
            Kind::Flush | Kind::GetId | Kind::Discard | Kind::WriteZeroes => (Op::Flush, None),
        };
        attachment.submit(from.now, RequestId(seq.0), op, data);
        under_way += 1;
    }
    let refused = (guest.parts.get() == 0)
        .then(|| guest.finish(Status::IoErr))
        .flatten();
    (under_way, refused)
}

/// The one time that the guest's bytes are read (PROTOCOL 2.1).
fn snapshot(memory: &GuestPart) -> Bytes {
    let mut buffer = Buffer::new(memory.len);
    // SAFETY: the part holds its request, so its pieces are mapped.
    unsafe { copy_from_guest(&memory.pieces(), &mut buffer) };
    Bytes::from_buffer(buffer)
}

#[cfg(test)]
mod tests;
