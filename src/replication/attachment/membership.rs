//! Links to the copies, and who of them counts: ejection before completion (PROTOCOL 2.6), promotion of another
//! master (5), every change of the record.

use super::{
    Action, Attachment, CasOutcome, Change, CopySet, Kind, Link, Payload, Peer, Phase, Purpose,
    Revision,
};
use crate::replication::ids::{BootId, Epoch, Nanos};
use crate::replication::message::{Message, Refusal};
use crate::replication::record::{CopyStatus, Record};

impl Peer {
    fn new(now: Nanos) -> Self {
        Self {
            link: Link::Down {
                since: now,
                tried: Nanos(0),
            },
            heard: now,
            beat: Nanos(0),
            lease: None,
            gap: false,
            accepted: None,
            refused: false,
            vote: None,
            detached: false,
            why: String::new(),
        }
    }
}

impl<D: Payload> Attachment<D> {
    /// Takes the sets that follow from the record. The order of its copies never changes, so indices stay.
    pub(super) fn adopt(&mut self) {
        let record = &self.record;
        while self.peers.len() < record.copies.len() {
            self.peers.push(Peer::new(self.now));
        }
        self.in_sync = CopySet::EMPTY;
        for (i, copy) in record.copies.iter().enumerate() {
            if copy.status == CopyStatus::InSync {
                self.in_sync.insert(i);
            }
            if copy.copy_id == record.master {
                self.master = i;
            }
        }
        self.local = record.copies.iter().position(|c| c.node == self.me.node);
        self.ready = self.ready.and(self.in_sync);
        self.failing = self.failing.and(self.in_sync);
    }

    // ---- links

    /// The connection to `copy` stands; `boot_id` is its node's kernel boot.
    pub fn on_connected(&mut self, now: Nanos, copy: usize, boot_id: BootId) {
        self.now = now;
        if self.ended() {
            return;
        }
        // S6: disconnect, dial, eject, connected, in this order: the copy is out by now. Configured, it would persist an
        // epoch in which it misses writes, and a detach would call it clean.
        if !self.in_sync.has(copy) {
            self.actions.push_back(Action::Hangup(copy));
            return self.unlink(copy, "it is not in the in-sync set");
        }
        let peer = &mut self.peers[copy];
        peer.link = Link::Up;
        peer.heard = now;
        peer.lease = None;
        if self.peers[copy].detached {
            // It has flushed and let go: nothing is left to be said to it.
        } else if self.owns() {
            self.configure_again(copy, boot_id);
        } else {
            self.ask_promise(copy);
        }
        self.advance();
    }

    fn configure_again(&mut self, copy: usize, boot_id: BootId) {
        let known = self.peers[copy]
            .accepted
            .or(self.record.copies[copy].boot_id);
        let gap = known.is_some_and(|b| b != boot_id);
        self.peers[copy].gap = gap;
        // One whose disk failed is no better, it never comes back: waited for, it would keep the last copy out for ever.
        let whole = |c: usize| c != copy && !self.peers[c].gap && !self.peers[c].refused;
        if gap && self.in_sync.iter().any(whole) {
            // What no flush covered may be gone from its page cache (PROTOCOL 5): it comes back by a delta.
            return self.lose(copy, "its machine was restarted");
        }
        if gap {
            self.accept_gap(copy, boot_id);
        }
        let message = Message::Attach(self.configuration());
        self.send(CopySet::one(copy), message, None);
    }

    /// No in-sync copy without a gap is left (PROTOCOL 5): the first one back serves on, the others, which may have lost
    /// other writes than it, are ejected in its favour. Were all of them waited for, none would ever be taken.
    fn accept_gap(&mut self, copy: usize, boot_id: BootId) {
        self.peers[copy].gap = false;
        self.peers[copy].accepted = Some(boot_id);
        // S3: what it acknowledged before the power cut says nothing now.
        for seq in self.pending.in_order() {
            if let Some(p) = self.pending.get_mut(seq)
                && p.kind != Kind::Read
            {
                p.waiting.insert(copy);
            }
        }
        self.lost_unflushed |= self.newest > self.stable;
        let node = self.record.copies[copy].node.clone();
        self.event(
            "5 power cut",
            format!("the copy on {node} serves on without what no flush had covered"),
        );
    }

    /// The connection to `copy` broke, or could not be made.
    pub fn on_disconnected(&mut self, now: Nanos, copy: usize, why: &str) {
        self.now = now;
        if self.ended() {
            return;
        }
        self.unlink(copy, why);
        self.advance();
    }

    pub(super) fn unlink(&mut self, copy: usize, why: &str) {
        let now = self.now;
        self.ready.remove(copy);
        let peer = &mut self.peers[copy];
        let since = match peer.link {
            Link::Down { since, .. } | Link::Dialing { since } => since,
            Link::Up => now,
        };
        peer.link = Link::Down { since, tried: now };
        peer.lease = None;
        peer.why = why.to_string();
        if matches!(peer.vote, Some(super::Vote::Probed)) {
            peer.vote = None;
        }
    }

    pub(super) fn tick_links(&mut self) {
        for copy in self.in_sync.iter() {
            let Link::Down { since, tried } = self.peers[copy].link else {
                continue;
            };
            if self.now.since(tried) < self.timing.redial && tried != Nanos(0) {
                continue;
            }
            self.peers[copy].link = Link::Dialing { since };
            let entry = &self.record.copies[copy];
            let (copy_id, node) = (entry.copy_id, entry.node.clone());
            self.actions.push_back(Action::Dial {
                copy,
                copy_id,
                node,
            });
        }
    }

    pub(super) fn tick_heartbeats(&mut self) {
        let mut due = CopySet::EMPTY;
        for copy in self.ready.iter() {
            // One that detached has let go of this session: it would refuse the heartbeat, be configured again, and not
            // be clean when the record says so (PROTOCOL 5, clean detach).
            if self.peers[copy].detached {
                continue;
            }
            if self.now.since(self.peers[copy].beat) >= self.timing.heartbeat {
                self.peers[copy].beat = self.now;
                due.insert(copy);
            }
        }
        let beat = Message::Heartbeat {
            epoch: self.record.epoch,
            sent: self.now,
            stable: self.stable,
        };
        self.send(due, beat, None);
    }

    /// Who is gone for too long, silent, or late.
    pub(super) fn tick_failing(&mut self) {
        let oldest = |copy: usize| {
            let waits = self
                .pending
                .iter()
                .filter(|(_, p)| p.waiting.has(copy))
                .map(|(_, p)| p.submitted)
                .min();
            waits.map_or(Nanos(0), |submitted| self.now.since(submitted))
        };
        let mut lost: Vec<(usize, String)> = Vec::new();
        for copy in self.in_sync.without(self.failing).iter() {
            let peer = &self.peers[copy];
            if peer.detached {
                continue;
            }
            match peer.link {
                Link::Down { since, .. } | Link::Dialing { since } => {
                    let gone = self.now.since(since);
                    if gone >= self.timing.hold {
                        lost.push((
                            copy,
                            format!("not reachable for {} ms: {}", gone.as_ms(), peer.why),
                        ));
                    }
                }
                Link::Up => {
                    let silent = self.now.since(peer.heard);
                    if silent >= self.timing.silence {
                        lost.push((copy, format!("silent for {} ms", silent.as_ms())));
                    } else if self.ready.has(copy) && oldest(copy) >= self.timing.late {
                        lost.push((
                            copy,
                            format!("a request unanswered for {} ms", oldest(copy).as_ms()),
                        ));
                    }
                }
            }
        }
        for (copy, why) in lost {
            self.lose(copy, &why);
        }
    }

    /// `copy` is to be ejected. What it has not acknowledged stays pending until the record says so (S4).
    pub(super) fn lose(&mut self, copy: usize, why: &str) {
        if matches!(self.peers[copy].link, Link::Up) {
            self.actions.push_back(Action::Hangup(copy));
        }
        self.unlink(copy, why);
        if self.in_sync.has(copy) && !self.failing.has(copy) {
            self.failing.insert(copy);
            let node = self.record.copies[copy].node.clone();
            self.event("2.6 copy lost", format!("copy on {node}: {why}"));
        }
    }

    /// `copy` persisted our configuration.
    pub(super) fn attached(&mut self, copy: usize, epoch: Epoch) {
        if epoch != self.record.epoch {
            // The configuration changed while this answer was on its way: the newer one follows it on the session.
            let message = Message::Attach(self.configuration());
            return self.send(CopySet::one(copy), message, None);
        }
        self.ready.insert(copy);
        let ejecting = self
            .change
            .as_ref()
            .is_some_and(|c| c.proposed.copies[copy].status != CopyStatus::InSync);
        if !ejecting {
            // Back in time: nothing was decided against it yet.
            self.failing.remove(copy);
        }
        self.peers[copy].why.clear();
        self.peers[copy].refused = false;
        self.peers[copy].beat = Nanos(0);
        self.resend(copy);
        self.tick_heartbeats();
        self.tell_to_detach(copy);
    }

    /// `copy` takes nothing from us.
    pub(super) fn refused(&mut self, copy: usize, refusal: Refusal) {
        if !self.owns() {
            return self.vote_refused(copy, refusal);
        }
        match refusal {
            Refusal::Stale { promised } => {
                self.outbid = self.outbid.max(promised);
                self.outbid_by(copy);
            }
            other => {
                self.peers[copy].refused = other == Refusal::Failed;
                self.lose(copy, &other.to_string())
            }
        }
    }

    /// `copy` promised a higher epoch to somebody. The record says whether that one took the volume (PROTOCOL 5).
    pub(super) fn outbid_by(&mut self, copy: usize) {
        self.actions.push_back(Action::Hangup(copy));
        self.unlink(copy, "it promised a higher epoch to another attachment");
        self.actions.push_back(Action::ReadRecord);
    }

    // ---- the record

    /// Copies to be ejected, and somebody left: propose it. One change at a time.
    pub(super) fn propose_ejection(&mut self) {
        let out = self.failing;
        let left = self.in_sync.without(out);
        // Not in favour of a copy that is not there either: then nobody knows yet who stays.
        if !self.owns()
            || self.change.is_some()
            || out.is_empty()
            || left.and(self.ready).is_empty()
        {
            return;
        }
        let mut next = self.record.clone();
        for copy in out.iter() {
            next.copies[copy].status = CopyStatus::Missing;
            next.copies[copy].base.last = Some(self.record.epoch);
        }
        for copy in left.iter() {
            if let Some(accepted) = self.peers[copy].accepted {
                next.copies[copy].boot_id = Some(accepted);
            }
        }
        if out.has(self.master) {
            let master = self.choose_master(left.and(self.ready));
            next.master = next.copies[master].copy_id;
        }
        let tag = self.tag();
        next.advance(self.record.epoch.max(self.outbid).next(), tag);
        self.propose(Purpose::Eject, next);
    }

    /// The attachment's node first, otherwise at random (PROTOCOL 5).
    pub(super) fn choose_master(&mut self, among: CopySet) -> usize {
        match self.local {
            Some(local) if among.has(local) => local,
            _ => {
                let all: Vec<usize> = among.iter().collect();
                all[self.random() as usize % all.len()]
            }
        }
    }

    pub(super) fn propose(&mut self, purpose: Purpose, proposed: Record) {
        let since = self.now;
        self.actions.push_back(Action::Cas {
            expected: self.revision,
            record: Box::new(proposed.clone()),
        });
        self.change = Some(Change {
            purpose,
            proposed,
            since,
            asked: true,
            unknown: false,
            in_doubt: false,
            retry: since,
        });
    }

    pub(super) fn tick_change(&mut self) {
        let Some(change) = &mut self.change else {
            // S19: however many reads failed, one is tried again.
            if self.reread.is_some_and(|at| self.now >= at) {
                self.reread = None;
                self.actions.push_back(Action::ReadRecord);
            }
            return;
        };
        if change.asked || self.now < change.retry {
            return;
        }
        // Not swapped, for certain, and decided on what held then: the copy to be ejected may be back, the one it was to
        // be ejected in favour of may have failed. Decided anew, or the last good copy is put out.
        if change.purpose == Purpose::Eject && !change.in_doubt {
            let since = change.since;
            self.change = None;
            self.propose_again(Purpose::Eject);
            self.propose_ejection();
            match &mut self.change {
                Some(change) => change.since = since,
                None => self.weigh_serving(),
            }
            return;
        }
        change.asked = true;
        let again = if change.unknown {
            Action::ReadRecord
        } else {
            Action::Cas {
                expected: self.revision,
                record: Box::new(change.proposed.clone()),
            }
        };
        self.actions.push_back(again);
    }

    /// The registry answered a CAS.
    pub fn on_cas(&mut self, now: Nanos, outcome: CasOutcome) {
        self.now = now;
        // Fenced while the claim was on its way: were its Done taken, the ended attachment would configure the copies.
        if self.ended() {
            return;
        }
        let Some(change) = &mut self.change else {
            return;
        };
        change.asked = false;
        change.retry = now.after(self.timing.registry_retry);
        match outcome {
            CasOutcome::Done(revision) => self.commit(revision),
            CasOutcome::Conflict(found) => self.compare(found),
            // Never assume: read it back until it is known (PROTOCOL 2.6).
            CasOutcome::Ambiguous => (change.unknown, change.in_doubt) = (true, true),
            CasOutcome::Unavailable => {}
        }
        self.advance();
    }

    /// The record as the registry has it now: asked for, or changed by somebody (`None`: the volume was removed).
    pub fn on_record(&mut self, now: Nanos, found: Option<(Record, Revision)>) {
        self.now = now;
        if self.ended() {
            return;
        }
        if let Some(change) = &mut self.change {
            if change.asked && !change.unknown {
                // A CAS is under way and will say more. Unless it was swapped before this change and answers after it:
                // then nobody says it again, and an operator's policy would not be taken.
                self.reread = Some(now);
                return;
            }
            change.asked = false;
            change.retry = now;
        }
        self.compare(found);
        self.advance();
    }

    /// The record could not be read.
    pub fn on_record_unavailable(&mut self, now: Nanos) {
        self.now = now;
        let retry = now.after(self.timing.registry_retry);
        match &mut self.change {
            // A CAS is under way and will say more. Asking it again beside the first one would bring two answers, the
            // second of which would be taken for that of a later change.
            Some(change) if !change.unknown => {}
            Some(change) => {
                change.asked = false;
                change.retry = retry;
            }
            None => self.reread = Some(retry),
        }
    }

    /// What the registry has, against what we hold and what we proposed.
    fn compare(&mut self, found: Option<(Record, Revision)>) {
        let Some((found, revision)) = found else {
            return self.fence("the volume was removed".into());
        };
        // Asked for before our last swap and answered after it, this is not news: taken for somebody else's change it
        // fenced the attachment that had made the newer one.
        if revision < self.revision {
            return;
        }
        let same = |a: &Record, b: &Record| {
            (a.epoch, a.epoch_tag, a.state, &a.attachment)
                == (b.epoch, b.epoch_tag, b.state, &b.attachment)
        };
        if self
            .change
            .as_ref()
            .is_some_and(|c| same(&found, &c.proposed))
        {
            // Ours, although nobody had told us.
            self.event("2.6 ambiguous CAS", "read back: it had been swapped".into());
            self.take_policy(&found);
            return self.commit(revision);
        }
        if !same(&found, &self.record) {
            return self.superseded(found, revision);
        }
        // Nobody took the volume. Either nothing changed, or the operator changed what is not ours to decide.
        if revision != self.revision {
            self.revision = revision;
            self.take_policy(&found);
            // The proposal was made from the old value; it cannot have been swapped, the revision is another.
            if let Some(change) = self.change.take() {
                self.propose_again(change.purpose);
            }
            self.weigh_serving();
        } else if let Some(change) = &mut self.change {
            change.unknown = false;
        }
        if self.change.is_none() && self.owns() && self.outbid > self.record.epoch {
            let mut next = self.record.clone();
            let tag = self.tag();
            next.advance(self.outbid.next(), tag);
            self.propose(Purpose::Raise, next);
        }
    }

    fn propose_again(&mut self, purpose: Purpose) {
        match purpose {
            Purpose::Claim => self.begin_join(),
            Purpose::Activate => self.propose_activation(),
            Purpose::Release => self.propose_release(),
            // Decided anew from what holds now: one that takes requests again is back in time.
            Purpose::Eject | Purpose::Raise => self.failing = self.failing.without(self.ready),
        }
    }

    /// What the operator may change in a record at any time.
    fn take_policy(&mut self, from: &Record) {
        let to = |r: &mut Record| {
            r.failure_mode = from.failure_mode;
            r.suspend_deadline_ms = from.suspend_deadline_ms;
            r.replicas_wanted = from.replicas_wanted;
            r.compress = from.compress;
        };
        to(&mut self.record);
        if let Some(change) = &mut self.change {
            to(&mut change.proposed);
        }
    }

    /// Somebody else changed who serves the volume.
    fn superseded(&mut self, found: Record, revision: Revision) {
        match &found.attachment {
            Some(other) if *other != self.me => {
                self.fence(format!(
                    "the volume is attached on {} in epoch {}",
                    other.node, found.epoch
                ));
            }
            _ if self.owns() => {
                let (held, is) = (self.record.epoch, found.epoch);
                self.fence(format!("the record is in epoch {is}, which this attachment of epoch {held} did not make"));
            }
            _ => {
                // Joining: start again from what the record says now.
                self.change = None;
                self.record = found;
                self.revision = revision;
                self.adopt();
                self.begin_join();
            }
        }
    }

    /// The proposal is the record now.
    fn commit(&mut self, revision: Revision) {
        let Some(Change {
            purpose, proposed, ..
        }) = self.change.take()
        else {
            return;
        };
        self.revision = revision;
        let (before, old_master, old_epoch) = (self.in_sync, self.master, self.record.epoch);
        self.record = proposed;
        self.adopt();
        let out = before.without(self.in_sync);
        for copy in out.iter() {
            if matches!(self.peers[copy].link, Link::Up) {
                self.actions.push_back(Action::Hangup(copy));
                let why = self.peers[copy].why.clone();
                self.unlink(copy, &why);
            }
            if purpose == Purpose::Eject {
                let text = format!(
                    "copy on {}: {}",
                    self.record.copies[copy].node, self.peers[copy].why
                );
                self.event("2.6 eject", format!("{text}; epoch {}", self.record.epoch));
            }
        }
        if purpose != Purpose::Claim && self.master != old_master {
            let node = self.record.copies[self.master].node.clone();
            self.event(
                "5 promote",
                format!(
                    "the copy on {node} is the master; epoch {}",
                    self.record.epoch
                ),
            );
        }
        match purpose {
            Purpose::Claim => self.claimed(),
            Purpose::Eject | Purpose::Raise => {
                assert!(
                    self.record.epoch > old_epoch,
                    "S1: a change of membership has its own epoch"
                );
                let message = Message::EpochChange(self.configuration());
                self.send(self.ready, message, None);
                // One that detached already refuses it, is configured on a new session and told to detach again: it
                // must know who is missing.
                self.peers.iter_mut().for_each(|p| p.detached = false);
                // S4: the ejection is in the record; only now may its writes complete without it.
                self.compare_again();
                self.forget_copies(out);
                self.release_done();
            }
            Purpose::Activate => self.activated(),
            Purpose::Release => {
                self.set_phase(Phase::Left, "5 clean detach");
                for copy in 0..self.peers.len() {
                    self.actions.push_back(Action::Hangup(copy));
                }
                self.actions.push_back(Action::Ended);
            }
        }
        self.weigh_serving();
    }
}
