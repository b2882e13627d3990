//! The guest's rings of one volume on its worker: taking requests, giving answers.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use super::buffer::{Buffer, Bytes, GuestPart, GuestRequest};
use super::command::GuestAnswer;
use crate::cluster::metrics::Layer;
use crate::guest::{
    GuestMem, Kind, Limits, Parsed, Request, Ring, RingStart, Serial, Status, Used,
    copy_from_guest, copy_to_guest,
};
use crate::replication::attachment::{Attachment, Op, Outcome, RequestId};
use crate::replication::ids::{IO_MAX, Nanos, Seq, Span};
use crate::replication::in_flight::InFlight;

/// How long a ring that is stopped may wait for its requests. QEMU's main loop, and with it the virtual machine,
/// waits for the answer; beyond this a suspended volume would look like a dead host.
pub const DRAIN: Nanos = Nanos::from_ms(5_000);

/// One started ring.
struct Slot {
    ring: Ring,
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

/// All rings of one volume.
pub struct Rings {
    name: String,
    serial: Serial,
    slots: Vec<Option<Slot>>,
    parts: InFlight<Part>,
    connection: u64,
    limits: Limits,
    writeback: bool,
    /// The volume is being detached: nothing new is taken.
    pub paused: bool,
    /// What the guest asked, for `/metrics`.
    pub stats: Layer,
}

impl Rings {
    /// No ring yet. `serial` is the volume's id, `size` its bytes.
    pub fn new(name: String, serial: Serial, size: u64, read_only: bool) -> Self {
        let limits = Limits {
            capacity_sectors: size / 512,
            read_only,
        };
        Self {
            name,
            serial,
            slots: Vec::new(),
            parts: InFlight::default(),
            connection: 0,
            limits,
            writeback: true,
            paused: false,
            stats: Layer::default(),
        }
    }

    /// Guest requests taken and not answered.
    pub fn in_flight(&self) -> usize {
        self.parts.len()
    }

    /// The kick descriptor of a started ring.
    pub fn kick(&self, index: u16) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.slot(index).map(|s| s.ring.kick_fd())
    }

    fn slot(&self, index: u16) -> Option<&Slot> {
        self.slots.get(usize::from(index)).and_then(Option::as_ref)
    }

    fn slot_mut(&mut self, index: u16) -> Option<&mut Slot> {
        self.slots
            .get_mut(usize::from(index))
            .and_then(Option::as_mut)
    }

    /// Takes a ring over. The caller watches its kick.
    pub fn start(&mut self, start: RingStart) -> Result<u16, String> {
        let (index, enabled) = (start.index, start.enabled);
        if self.slot(index).is_some() {
            return Err(format!("queue {index} was started twice"));
        }
        let ring = Ring::new(start).map_err(|e| format!("queue {index}: {e}"))?;
        let at = usize::from(index);
        if self.slots.len() <= at {
            self.slots.resize_with(at + 1, || None);
        }
        // A kick may have been consumed by an earlier process: look once without one.
        self.slots[at] = Some(Slot {
            ring,
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
        for slot in self.slots.iter_mut().flatten() {
            let index = slot.ring.index();
            slot.ring
                .set_memory(Arc::clone(mem))
                .map_err(|e| format!("queue {index}: {e}"))?;
        }
        Ok(())
    }

    /// Whether a completed write may be in caches (PROTOCOL 3).
    pub fn set_writeback(&mut self, writeback: bool) {
        self.writeback = writeback;
    }

    /// Stops a ring; answered when its requests are done, or the time is over.
    pub fn stop(&mut self, now: Nanos, index: u16, reply: SyncSender<GuestAnswer>) {
        match self.slot_mut(index) {
            Some(slot) => slot.stopping = Some((reply, now.after(DRAIN))),
            None => drop(reply.try_send(Err(format!("queue {index} was not started")))),
        }
    }

    /// The connection is gone: its rings are dropped, and what is under way is not answered any more.
    pub fn disconnect(&mut self) {
        self.connection += 1;
        self.slots.clear();
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
        for at in 0..self.slots.len() {
            let Some(slot) = self.slots[at].as_mut() else {
                continue;
            };
            if !slot.ready || !slot.enabled || slot.stopping.is_some() || self.paused {
                continue;
            }
            slot.ready = false;
            slot.ring.disable_kicks();
            // One ring's length at most: a guest that refills it meanwhile is looked at again after the others.
            for _ in 0..slot.ring.size() {
                match slot.ring.next_request(&self.limits) {
                    Ok(Some(Parsed::Request(request))) => {
                        any = true;
                        let from = From {
                            ring: at as u16,
                            connection: self.connection,
                            now,
                            fua: !self.writeback,
                            direct,
                        };
                        if request.kind() == Kind::GetId {
                            request.write_id(&self.serial);
                            slot.ring.push_used(request.finish(Status::Ok));
                            slot.pushed = true;
                        } else {
                            submit(&mut self.parts, attachment, request, &from);
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
        any
    }

    /// A part is done. The last part answers the request.
    pub fn complete(&mut self, now: Nanos, id: RequestId, outcome: Outcome, data: Option<&Bytes>) {
        let Some(part) = self.parts.remove(Seq(id.0)) else {
            return;
        };
        let guest = &part.guest;
        if let (Outcome::Ok, Some(Bytes::Buffer(buffer)), Kind::In) = (outcome, data, part.kind)
            && guest.connection == self.connection
        {
            let pieces = GuestPart {
                request: Rc::clone(guest),
                start: part.start,
                len: part.len,
            }
            .pieces();
            // SAFETY: the request is not answered yet, so its pieces are mapped.
            unsafe { copy_to_guest(buffer, &pieces) };
        }
        guest
            .failed
            .set(guest.failed.get() || outcome == Outcome::IoError);
        guest.parts.set(guest.parts.get() - 1);
        self.count(now, &part, outcome);
        if guest.parts.get() > 0 || guest.connection != self.connection {
            return;
        }
        let (index, status) = (
            guest.ring,
            if guest.failed.get() {
                Status::IoErr
            } else {
                Status::Ok
            },
        );
        let used = guest.finish(status);
        self.answer(index, used);
    }

    fn answer(&mut self, index: u16, used: Option<Used>) {
        if let (Some(slot), Some(used)) = (self.slot_mut(index), used) {
            slot.ring.push_used(used);
            slot.pushed = true;
        }
    }

    fn count(&mut self, now: Nanos, part: &Part, outcome: Outcome) {
        let op = match part.kind {
            Kind::In => &mut self.stats.read,
            Kind::Out => &mut self.stats.write,
            Kind::Flush | Kind::GetId => &mut self.stats.flush,
        };
        op.total += 1;
        op.bytes += part.len as u64;
        op.errors += u64::from(outcome == Outcome::IoError);
        op.seconds.observe(now.since(part.submitted).0 as f64 / 1e9);
    }

    /// Ends the turn: publishes answers with one notification a ring, and asks for kicks again. Returns whether a ring
    /// has more to take already.
    pub fn end_turn(&mut self) -> bool {
        let mut more = false;
        for slot in self.slots.iter_mut().flatten() {
            if slot.pushed {
                slot.pushed = false;
                slot.ring.publish_and_notify();
            }
            if !slot.ready
                && slot.enabled
                && slot.stopping.is_none()
                && !self.paused
                && !slot.ring.is_broken()
            {
                slot.ready = slot.ring.enable_kicks();
            }
            more |= slot.ready && slot.enabled && slot.stopping.is_none() && !self.paused;
        }
        more
    }

    /// Answers stops whose rings are empty or whose time is over; names them, so that their kicks are not watched.
    pub fn stopped(&mut self, now: Nanos) -> Vec<(u16, Ring)> {
        let mut out = Vec::new();
        for at in 0..self.slots.len() {
            let Some(slot) = &self.slots[at] else {
                continue;
            };
            let Some((_, deadline)) = &slot.stopping else {
                continue;
            };
            let left = slot.ring.in_flight();
            if left > 0 && now < *deadline {
                continue;
            }
            if left > 0 {
                log::error!(
                    "volume {}: queue {at} stopped with {left} requests unanswered",
                    self.name
                );
            }
            if let Some(slot) = self.slots[at].take() {
                if let Some((reply, _)) = slot.stopping {
                    let _ = reply.try_send(Ok(slot.ring.next_avail()));
                }
                out.push((at as u16, slot.ring));
            }
        }
        out
    }
}

struct From {
    ring: u16,
    connection: u64,
    now: Nanos,
    fua: bool,
    direct: bool,
}

/// Hands a request to the attachment, in parts of at most [`IO_MAX`].
fn submit(
    parts: &mut InFlight<Part>,
    attachment: &mut Attachment<Bytes>,
    request: Request,
    from: &From,
) {
    let (kind, offset, total) = (
        request.kind(),
        request.offset(),
        request.data_len() as usize,
    );
    let count = total.div_ceil(IO_MAX as usize).max(1);
    let guest = GuestRequest::new(request, from.ring, from.connection, count as u32);
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
            Kind::Flush | Kind::GetId => (Op::Flush, None),
        };
        attachment.submit(from.now, RequestId(seq.0), op, data);
    }
}

/// The one time that the guest's bytes are read (PROTOCOL 2.1).
fn snapshot(memory: &GuestPart) -> Bytes {
    let mut buffer = Buffer::new(memory.len);
    // SAFETY: the part holds its request, so its pieces are mapped.
    unsafe { copy_from_guest(&memory.pieces(), &mut buffer) };
    Bytes::from_buffer(buffer)
}
