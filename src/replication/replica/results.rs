//! What follows when the disk has done something: answers, and the next log transaction (PROTOCOL 2.3, 3).

use super::*;

impl<D> Replica<D> {
    pub(super) fn data_done(
        &mut self,
        session: SessionId,
        request: Request,
        logged: bool,
        result: &DiskResult<D>,
    ) {
        self.data_in_flight -= 1;
        if logged {
            request.span.regions().for_each(|r| self.log.done(r));
        }
        match result {
            DiskResult::Done(_) | DiskResult::Hash(_) | DiskResult::Allocated(_) => {
                self.ack(session, request.seq, Status::Ok)
            }
            DiskResult::NoSpace => self.ack(session, request.seq, Status::NoSpace),
            DiskResult::Error => {
                self.ack(session, request.seq, Status::Io);
                self.fail("a write failed");
            }
        }
    }

    pub(super) fn synced(&mut self) {
        for (session, seq) in self.flushing.take().unwrap_or_default() {
            self.ack(session, seq, Status::Ok);
        }
        if !self.flush_next.is_empty() {
            self.flushing = Some(std::mem::take(&mut self.flush_next));
            self.start(Op::Sync, DiskOp::Sync);
        }
    }

    pub(super) fn start_transaction(&mut self) {
        let idle = std::mem::take(&mut self.look_for_idle);
        if !self.logged && self.queue.is_empty() && !idle {
            return;
        }
        // S11: two writes of one bitmap page may land in either order; were the older last, bits marked meanwhile would be
        // gone from the disk, and their region from the log.
        let retires = !self.bitmaps_running;
        if let Some(txn) = self.log.transaction(self.now, idle, retires) {
            self.write_transaction(txn);
        }
    }

    /// A region leaves the log only after the bits it protected are durable (PROTOCOL 5.5).
    pub(super) fn write_transaction(&mut self, txn: Transaction) {
        let forgotten = match txn.anew {
            true => self.all_regions(),
            false => txn.retire.clone(),
        };
        if forgotten.is_empty() || self.maps.iter().all(Option::is_none) {
            let op = DiskOp::Log(txn.clone());
            self.start(Op::Log(txn), op);
        } else {
            self.start(Op::BitmapsThenLog(txn), DiskOp::Bitmaps(forgotten));
        }
    }

    pub(super) fn log_committed(&mut self, txn: &Transaction) {
        self.log.committed(txn);
        let mut still = VecDeque::with_capacity(self.queue.len());
        while let Some(mut w) = self.queue.pop_front() {
            w.touched = w.touched || self.touch(&w.request);
            if w.touched && self.log.covers(w.request.span) {
                self.issue(w.session, w.request, w.change, true);
            } else {
                still.push_back(w);
            }
        }
        self.queue = still;
    }

    /// Forgets writes that have not reached the disk queue. They were never acknowledged.
    pub(super) fn drop_queue(&mut self) {
        for w in std::mem::take(&mut self.queue) {
            if w.touched {
                w.request.span.regions().for_each(|r| self.log.done(r));
            }
        }
    }
}
