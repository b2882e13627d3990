//! A machine that moves between nodes while it runs: each of the two nodes is attached only while the machine's rings
//! run there. The one it leaves drains and releases the volume as soon as its rings have stopped; the one it comes to
//! takes the volume over when its first ring starts, and has its requests wait until then. Both go by the same rule, so
//! a machine whose move failed and that goes on where it was takes the volume back by it.

use super::{Serving, Volume};
use crate::engine::context::Context;
use crate::replication::attachment::{Attachment, CopyView, Phase, Revision};
use crate::replication::ids::Nanos;
use crate::replication::message::Proof;
use crate::replication::record::{self, Record};
use crate::replication::timing::Timing;

/// How often the record is read while the other node has not released the volume.
const LOOK: Nanos = Nanos::from_ms(25);
/// The other node is taken for dead when it has not released the volume for this long: then a takeover is tried, which
/// the copies refuse while they hear it (PROTOCOL 5.1).
const PATIENCE: Nanos = Nanos::from_ms(5_000);

/// What an attachment of this volume begins from.
pub(super) struct Seat {
    pub(super) me: record::Attachment,
    pub(super) record: Record,
    pub(super) revision: Revision,
    /// Attached only while the machine's rings run here.
    pub(super) by_turns: bool,
    /// The machine runs here, and nobody is attached here.
    called: Option<Called>,
}

#[derive(Clone, Copy)]
struct Called {
    since: Nanos,
    read: Nanos,
}

impl Seat {
    pub(super) fn new(
        me: record::Attachment,
        record: Record,
        revision: Revision,
        by_turns: bool,
    ) -> Self {
        Self {
            me,
            record,
            revision,
            by_turns,
            called: None,
        }
    }

    /// The copies, as far as the record says.
    pub(super) fn copies(&self) -> Vec<CopyView> {
        let copies = self.record.copies.iter();
        let view = |c: &record::CopyEntry| CopyView {
            copy_id: c.copy_id,
            node: c.node.clone(),
            status: c.status,
            master: c.copy_id == self.record.master,
            connected: false,
            why: String::new(),
            sync: None,
        };
        copies.map(view).collect()
    }

    /// Takes the volume over from what the record says.
    pub(super) fn attach(
        &self,
        proof: Proof,
        now: Nanos,
    ) -> Result<Attachment<crate::engine::buffer::Bytes>, String> {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed)
            .map_err(|e| format!("no random numbers from the kernel: {e}"))?;
        Ok(Attachment::new(
            self.me.clone(),
            self.record.clone(),
            self.revision,
            proof,
            Timing::DEFAULT,
            u64::from_le_bytes(seed),
            now,
        ))
    }
}

impl Volume {
    /// The machine may move to another node, or not any more.
    pub fn by_turns(&mut self, on: bool) {
        if let Some(seat) = self.serving.as_mut().and_then(|s| s.seat.as_mut()) {
            seat.by_turns = on;
        }
    }

    /// The record as it was read or watched.
    pub fn on_record(&mut self, ctx: &Context, found: Option<(Record, Revision)>) {
        let Some(s) = &mut self.serving else { return };
        if let Some(attachment) = &mut s.attachment {
            return attachment.on_record(ctx.now, found);
        }
        let Some(seat) = &mut s.seat else { return };
        let Some((record, revision)) = found else {
            log::warn!("volume {}: it was removed", s.name);
            return;
        };
        // Watched and read ones may overtake each other.
        if revision >= seat.revision {
            (seat.record, seat.revision) = (record, revision);
        }
        s.take_over(ctx);
    }

    /// Leaves when the machine has stopped here, calls for the volume when it has started. Whether there is something to do
    /// at once: the machine stands still meanwhile.
    pub(super) fn take_turns(&mut self, ctx: &mut Context) -> bool {
        let Some(s) = &mut self.serving else {
            return false;
        };
        // What is held asks nobody: it is told.
        let Some(seat) = &mut s.seat else {
            return false;
        };
        if s.detaching.is_some() {
            return false;
        }
        let mut turned = false;
        let by_turns = seat.by_turns;
        let wanted = !by_turns || s.rings.any_started();
        if let Some(attachment) = &mut s.attachment {
            match attachment.phase() {
                Phase::Serving if !wanted => {
                    attachment.detach(ctx.now);
                    // Not before the copies are known to be the same: it is asked again then.
                    turned = *attachment.phase() != Phase::Serving;
                }
                Phase::Left => {
                    self.stand_up(ctx);
                    turned = true;
                }
                // It was not our turn yet. With requests under way the machine had been served already: that is for the
                // control loop, as any loss of an attachment.
                Phase::Fenced(_) if by_turns && s.rings.in_flight() == 0 => {
                    self.stand_up(ctx);
                    turned = true;
                }
                _ => {}
            }
        } else if !wanted {
            seat.called = None;
        } else {
            let now = ctx.now;
            let fresh = Called {
                since: now,
                read: Nanos(0),
            };
            let called = seat.called.get_or_insert(fresh);
            if now.since(called.read) >= LOOK {
                called.read = now;
                ctx.read_record(self.id);
            }
        }
        if let Some(s) = &mut self.serving {
            // Nothing is taken that an attachment which is about to end, or to be refused, would take along.
            let paused = match &s.attachment {
                None => true,
                Some(a) => by_turns && (!wanted || *a.phase() != Phase::Serving),
            };
            turned |= s.rings.paused && !paused;
            s.rings.paused = paused;
        }
        turned
    }

    /// Goes on without an attachment; the machine's connection stays.
    fn stand_up(&mut self, ctx: &mut Context) {
        let Some(s) = &mut self.serving else { return };
        let Some(ended) = s.attachment.take() else {
            return;
        };
        if let Some(seat) = &mut s.seat {
            seat.record = ended.record().clone();
            seat.revision = seat.revision.max(ended.revision());
        }
        s.end_links(ctx, &mut self.copy);
    }
}

impl Serving {
    /// Begins a takeover, if it is our turn by the record.
    fn take_over(&mut self, ctx: &Context) {
        let Some(seat) = &mut self.seat else { return };
        let Some(called) = seat.called else { return };
        let waited = ctx.now.since(called.since);
        if seat.record.attachment.is_some() && waited < PATIENCE {
            return;
        }
        match seat.attach(Proof::None, ctx.now) {
            Ok(attachment) => {
                log::info!(
                    "volume {}: the machine runs here now: taking over after {} ms",
                    self.name,
                    waited.as_ms()
                );
                self.attachment = Some(attachment);
                // Should it be refused, the wait begins anew.
                seat.called = None;
            }
            Err(e) => log::error!("volume {}: {e}", self.name),
        }
    }
}
