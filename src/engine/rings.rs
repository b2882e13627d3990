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
    copy_from_guest, copy_to_guest,
};
use crate::replication::attachment::{Attachment, Op, Outcome, RequestId};
use crate::replication::ids::{IO_MAX, Nanos, Seq, Span};
use crate::replication::in_flight::{IN_FLIGHT_MAX, InFlight};

/// How long a ring that is stopped may wait for its requests. QEMU's main loop, and with it the virtual machine,
/// waits for the answer; beyond this a suspended volume would look like a dead host.
pub const DRAIN: Nanos = Nanos::from_ms(5_000);
/// Bytes of a volume's reads and writes under way at once: what its guest can have this process hold in buffers, and have
/// queued on each connection (far below [`OUT_MAX`](super::conn::OUT_MAX), beyond which a peer counts as stuck: a guest may
/// offer GiBs at once, faster than any network takes them). More is no faster on any disk or network.
const BYTES_MAX: usize = 64 << 20;
/// Parts of requests of a volume under way at once. What the copies have to look through grows with them.
const PARTS_MAX: usize = 4096;
/// Bytes of one volume that a turn begins with, 1 MiB more at most: they may all be copied and compressed in it, and the
/// worker's other volumes wait.
const TURN_BYTES: usize = 8 << 20;
/// The same in descriptors looked at. A chain can have tens of thousands, which cost its guest nothing.
const TURN_WORK: u64 = 16 << 10;
/// What each request counts as at least.
const REQUEST_WORK: u64 = 16;
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

/// A request whose parts wait for others to end.
struct Long {
    guest: Rc<GuestRequest>,
    kind: Kind,
    /// Its first byte on the volume, and how many it has.
    offset: u64,
    total: usize,
    /// The next part, and how many there are.
    next: usize,
    parts: usize,
    fua: bool,
    taken: Nanos,
}

/// What a volume may begin still: of a turn, and beside what is under way.
struct Budget {
    turn_bytes: usize,
    turn_work: u64,
    /// Bytes of the parts under way.
    bytes: usize,
}

impl Budget {
    fn new_turn(&mut self) {
        (self.turn_bytes, self.turn_work) = (TURN_BYTES, TURN_WORK);
    }

    fn has_room(&self, parts: &InFlight<Part>) -> bool {
        self.bytes < BYTES_MAX && parts.len() < PARTS_MAX
    }

    fn allows(&self, parts: &InFlight<Part>) -> bool {
        self.turn_bytes > 0 && self.turn_work > 0 && self.has_room(parts)
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
    /// * Tracked: they are left where they are, in the in-flight region. When the ring goes on they are submitted again, and the
    ///   guest has seen a pause. An error would make of a replica's silence, which the suspend deadline allows for, a file
    ///   system that is read-only. A machine that leaves without its region takes them along in its ring ([`Ring::stop`]).
    /// * Not tracked: nobody remembers them. They fail: a bad answer is better than none, for which a driver waits for ever.
    ///
    /// A write that failed may still be carried out; the guest knows nothing of such a sector until it writes it again, and
    /// that write is ordered behind this one. But while the kernel works with a request's memory (this node's disk hangs),
    /// the guest must not get that back: such a request stays unanswered.
    fn give_up(&mut self, parts: &InFlight<Part>, waiting: &[Rc<GuestRequest>]) -> usize {
        let Some(slot) = self.slot.as_mut().filter(|s| !s.ring.is_tracked()) else {
            return 0;
        };
        let (ring, life) = (slot.ring.index(), slot.life);
        let given_up =
            |guest: &GuestRequest| (guest.ring, guest.life) == (ring, life) && !guest.is_pinned();
        let under_way = || {
            let all = parts.iter().map(|(_, part)| part);
            all.filter(|part| given_up(&part.guest))
        };
        for part in under_way().filter(|part| part.kind == Kind::Out) {
            // Carried out or not, it is this write, and not what the guest does with its memory next.
            part.memory().snapshot();
        }
        let mut failed = 0;
        let begun = under_way().map(|part| &part.guest);
        for guest in begun.chain(waiting.iter().filter(|guest| given_up(guest))) {
            // Once, however many parts it has.
            if let Some(used) = guest.finish(Status::IoErr) {
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
    /// The last request that was taken, if it did not fit whole.
    long: Option<Long>,
    budget: Budget,
    /// The queue that is looked at first, so that none takes all of each turn.
    first: usize,
    lives: u64,
    stops: Option<Stops>,
    /// Answers of requests whose memory the kernel uses still.
    pinned: Vec<(RequestId, Outcome, Option<Bytes>)>,
    /// A read was answered, and the guest has not seen it yet.
    read: bool,
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
            long: None,
            budget: Budget {
                turn_bytes: TURN_BYTES,
                turn_work: TURN_WORK,
                bytes: 0,
            },
            first: 0,
            lives: 0,
            stops: None,
            pinned: Vec::new(),
            read: false,
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
        self.parts.len() + self.zeroes.waiting() + usize::from(self.long.is_some())
    }

    /// Requests whose memory the kernel works with.
    pub fn pinned(&self) -> Vec<Rc<GuestRequest>> {
        let all = self.parts.iter().map(|(_, part)| &part.guest);
        all.filter(|guest| guest.is_pinned()).cloned().collect()
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
        let slots = || self.queues.iter().filter_map(|q| q.slot.as_ref());
        let rings = || slots().map(|slot| &slot.ring);
        // An answer that is held back is not the guest's yet.
        let busy = |slot: &&Slot| slot.pushed || slot.ring.in_flight() > 0;
        if reply.is_none() || (slots().any(|slot| busy(&slot)) && now < *deadline) {
            return;
        }
        let mut open = slots().filter(busy).map(|slot| &slot.ring);
        let lost = open.find(|ring| !ring.is_tracked());
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
        self.forget_waiting();
    }

    /// Of what a ring asked for that is no more, nothing further is started.
    fn forget_waiting(&mut self) {
        let queues = &self.queues;
        let lives = |guest: &GuestRequest| {
            let slot = queues[usize::from(guest.ring)].slot.as_ref();
            slot.is_some_and(|slot| slot.life == guest.life)
        };
        self.zeroes.retain(lives);
        self.long = self.long.take().filter(|long| lives(&long.guest));
    }

    /// Goes on with the request that did not fit.
    fn go_on(&mut self, now: Nanos, attachment: &mut Attachment<Bytes>, direct: bool) {
        let Some(mut long) = self.long.take() else {
            return;
        };
        let begun = submit(
            &mut self.parts,
            &mut self.budget,
            attachment,
            &mut long,
            (now, direct),
        );
        if let Some(slot) = self.origin(&long.guest) {
            slot.under_way += begun;
        }
        self.long = (long.next < long.parts).then_some(long);
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

    /// Takes what the guest made available and submits it, as much as a turn may begin. Returns whether anything was taken.
    pub fn take(&mut self, now: Nanos, attachment: &mut Attachment<Bytes>, direct: bool) -> bool {
        let mut any = false;
        self.go_on(now, attachment, direct);
        if self.stand_still() {
            return any;
        }
        let count = self.queues.len();
        'queues: for n in 0..count {
            let at = (self.first + n) % count;
            let queue = &mut self.queues[at];
            let budget = queue.may_take();
            let Some(slot) = queue.slot.as_mut().filter(|_| budget > 0) else {
                continue;
            };
            slot.ready = false;
            slot.ring.disable_kicks();
            for taken in 0..budget {
                if self.long.is_some() || !self.budget.allows(&self.parts) {
                    // Later, and the others first.
                    slot.ready = true;
                    self.first = at + usize::from(taken > 0);
                    break 'queues;
                }
                let walked = slot.ring.walked();
                let next = slot.ring.next_request(&self.limits);
                let work = slot.ring.walked().wrapping_sub(walked);
                let left = &mut self.budget.turn_work;
                *left = left.saturating_sub(work.max(REQUEST_WORK));
                match next {
                    Ok(Some(Parsed::Request(request))) => {
                        any = true;
                        let (ring, life, fua) = (at as u16, slot.life, !self.writeback);
                        let answered = match request.kind() {
                            Kind::GetId => {
                                request.write_id(&self.serial);
                                Some(request.finish(Status::Ok))
                            }
                            Kind::Discard | Kind::WriteZeroes => {
                                let empty = self.zeroes.add(request, ring, life, fua, now);
                                empty.map(|request| request.finish(Status::Ok))
                            }
                            Kind::In | Kind::Out | Kind::Flush => {
                                let mut long = Long::new(request, ring, life, fua, now);
                                slot.under_way += submit(
                                    &mut self.parts,
                                    &mut self.budget,
                                    attachment,
                                    &mut long,
                                    (now, direct),
                                );
                                self.long = (long.next < long.parts).then_some(long);
                                None
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
        // This node's disk hangs with a read of the guest's memory, its copy is late, and is asked again or another one instead.
        // Were the request answered now, the first read would end in what the guest has in that memory by then.
        let pinned = |p: &mut Part| p.guest.parts.get() == 1 && p.guest.is_pinned();
        if self.parts.get_mut(Seq(id.0)).is_some_and(pinned) {
            return self.pinned.push((id, outcome, data.cloned()));
        }
        let zeroes = |p: &mut Part| matches!(p.kind, Kind::Discard | Kind::WriteZeroes);
        if self.parts.get_mut(Seq(id.0)).is_some_and(zeroes) {
            self.zeroes.ended();
            self.start_zeroes(now, attachment);
        }
        self.part_done(now, id, outcome, data);
    }

    /// Answers what waited for the kernel to let go of its memory.
    pub fn answer_unpinned(&mut self, now: Nanos) {
        for (id, outcome, data) in std::mem::take(&mut self.pinned) {
            let pinned = |p: &mut Part| p.guest.is_pinned();
            match self.parts.get_mut(Seq(id.0)).is_some_and(pinned) {
                true => self.pinned.push((id, outcome, data)),
                false => self.part_done(now, id, outcome, data.as_ref()),
            }
        }
    }

    fn part_done(&mut self, now: Nanos, id: RequestId, outcome: Outcome, data: Option<&Bytes>) {
        let Some(part) = self.parts.remove(Seq(id.0)) else {
            return;
        };
        if matches!(part.kind, Kind::In | Kind::Out) {
            self.budget.bytes -= part.len;
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
                if part.kind == Kind::In {
                    if let Some(log) = &queue.log {
                        guest.with(|request| request.mark(log));
                    }
                    // Another copy answered, or nobody: a disk that is late still has it, and would bring its bytes when
                    // the request was submitted again and answered, and the guest has other things in that memory.
                    guest.abandon();
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
            // A failed one shows nothing. Held back with all other answers until the lease holds, the errors of a volume that is
            // suspended for too long would never reach its guest (S17).
            self.read |= part.kind == Kind::In && status == Status::Ok;
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

    /// Whether a read is among the answers that the end of the turn publishes.
    pub fn shows_reads(&self) -> bool {
        self.read
    }

    /// Ends the turn: publishes answers with one notification a ring, unless they are to be held back, and asks for kicks
    /// again. Returns whether a ring has more to take already.
    pub fn end_turn(&mut self, hold: bool) -> bool {
        self.read &= hold;
        self.budget.new_turn();
        // Room comes with an answer, and with that the next turn.
        let room = self.budget.has_room(&self.parts);
        let mut more = room && self.long.is_some();
        let still = self.stand_still();
        for queue in &mut self.queues {
            let Some(slot) = &mut queue.slot else {
                continue;
            };
            if slot.pushed && !hold {
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
            more |= room && !still && queue.may_take() > 0;
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
            if (left > 0 || slot.pushed) && now < *deadline {
                continue;
            }
            if left > 0 {
                let long = self.long.iter().map(|long| &long.guest);
                let waiting: Vec<_> = long.chain(self.zeroes.guests()).cloned().collect();
                let failed = queue.give_up(&self.parts, &waiting);
                log::error!(
                    "volume {}: queue {at} stopped with {left} requests unanswered, of which {failed} were failed now",
                    self.name
                );
            }
            if let Some(stops) = &mut self.stops {
                stops.latest = now;
            }
            if let Some(mut slot) = queue.end() {
                let base = slot.ring.stop();
                if let Some((reply, _)) = slot.stopping {
                    let _ = reply.try_send(Ok(base));
                }
                out.push((at as u16, slot.ring));
            }
        }
        if !out.is_empty() {
            self.forget_waiting();
        }
        out
    }
}

impl Long {
    /// In parts of at most [`IO_MAX`], none of them begun.
    fn new(request: Request, ring: u16, life: u64, fua: bool, taken: Nanos) -> Self {
        let (kind, offset, total) = (
            request.kind(),
            request.offset(),
            request.data_len() as usize,
        );
        // A flush is one part without bytes.
        let parts = total.div_ceil(IO_MAX as usize).max(1);
        Self {
            guest: GuestRequest::new(request, ring, life, parts as u32),
            kind,
            offset,
            total,
            next: 0,
            parts,
            fua,
            taken,
        }
    }
}

/// Hands parts of a request to the attachment, as many as the budget allows. Gives how many.
fn submit(
    parts: &mut InFlight<Part>,
    budget: &mut Budget,
    attachment: &mut Attachment<Bytes>,
    long: &mut Long,
    (now, direct): (Nanos, bool),
) -> usize {
    let mut begun = 0;
    long.guest.straight.set(direct);
    while long.next < long.parts && budget.allows(parts) {
        let start = long.next * IO_MAX as usize;
        let len = (long.total - start).min(IO_MAX as usize);
        let part = Part {
            guest: Rc::clone(&long.guest),
            kind: long.kind,
            start,
            len,
            submitted: long.taken,
        };
        let memory = part.memory();
        let Some(seq) = parts.insert(part) else {
            break;
        };
        (long.next, begun) = (long.next + 1, begun + 1);
        budget.bytes += len;
        budget.turn_bytes = budget.turn_bytes.saturating_sub(len);
        let span = Span {
            offset: long.offset + start as u64,
            len: len as u32,
        };
        let fua = long.fua;
        let (op, data) = match long.kind {
            Kind::In if direct => (Op::Read(span), Some(Bytes::Guest(memory))),
            // Another copy may be asked when the disk here hangs; it would go on using the guest's memory meanwhile.
            Kind::In => (Op::Read(span), None),
            Kind::Out if direct => (Op::Write { span, fua }, Some(Bytes::Guest(memory))),
            Kind::Out => (Op::Write { span, fua }, Some(snapshot(&memory))),
            // Serials and zeros do not come here.
            Kind::Flush | Kind::GetId | Kind::Discard | Kind::WriteZeroes => (Op::Flush, None),
        };
        attachment.submit(now, RequestId(seq.0), op, data);
    }
    begun
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
