//! Links to the copies, and who of them counts: ejection before completion (PROTOCOL 2.6), promotion of another
//! master (5), every change of the record.

use super::{
    Action, Attachment, CasOutcome, Change, CopySet, Kind, Link, Origin, Payload, Peer, Phase,
    Purpose, Revision,
};
use crate::replication::ids::{BootId, COPIES_MAX, CopyId, Epoch, Nanos, Seq};
use crate::replication::membership::{self, Facts};
use crate::replication::message::{Message, Refusal};
use crate::replication::mutants::{self, Mutant};
use crate::replication::record::{CopyStatus, Record};
use crate::replication::registry_answer::{Answer, answer};

use super::sync::Sync;

impl Peer {
    fn new(copy_id: CopyId, now: Nanos) -> Self {
        Self {
            copy_id,
            link: Link::Down {
                since: now,
                tried: Nanos(0),
            },
            heard: now,
            beat: Nanos(0),
            taken_up: now,
            begun_at: Seq(0),
            lease: None,
            gap: false,
            accepted: None,
            died: false,
            refused: false,
            unknown: false,
            vote: None,
            detached: false,
            broke_off: 0,
            sync_after: Nanos(0),
            in_sync_since: now,
            room: 0,
            why: String::new(),
        }
    }
}

impl<D: Payload> Attachment<D> {
    /// Takes the sets that follow from the record. Places never move, so indices stay; another copy may be in one.
    pub(super) fn adopt(&mut self) {
        for i in 0..self.record.copies.len() {
            let copy_id = self.record.copies[i].copy_id;
            match self.peers.get(i) {
                None => self.peers.push(Peer::new(copy_id, self.now)),
                Some(peer) if peer.copy_id != copy_id => {
                    self.break_off(i, "another copy took its place");
                    self.actions.push_back(Action::Hangup(i));
                    self.peers[i] = Peer::new(copy_id, self.now);
                }
                Some(_) => {}
            }
        }
        let record = &self.record;
        self.in_sync = membership::with_status(record, CopyStatus::InSync);
        if let Some(at) = record
            .copies
            .iter()
            .position(|c| c.copy_id == record.master)
        {
            self.master = at;
        }
        self.local = record
            .copies
            .iter()
            .position(|c| c.node == self.me.node && c.status != CopyStatus::Removed);
        self.ready = self.ready.and(self.in_sync);
        self.failing = self.failing.and(self.in_sync);
    }

    // ---- links

    /// The link stands; `boot_id` is the kernel boot of the copy's node.
    pub fn on_connected(&mut self, now: Nanos, link: usize, boot_id: BootId) {
        self.now = now;
        if self.ended() {
            return;
        }
        let copy = link % COPIES_MAX;
        if link != copy {
            self.bulk_connected(copy);
            return self.advance();
        }
        // S6: disconnect, dial, eject, connected, in this order: the copy is out by now. Configured, it would persist an
        // epoch in which it misses writes, and a detach would call it clean.
        if !self.in_sync.has(copy) {
            if !self.begin_session(copy, boot_id) {
                self.actions.push_back(Action::Hangup(copy));
                self.unlink(copy, "it is not in the in-sync set");
            }
            return;
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
        if gap && self.has_whole_other(copy) {
            // What no flush covered may be gone from its page cache (PROTOCOL 5): it comes back by a delta.
            return self.lose(copy, "its machine was restarted");
        }
        // S9: a write is on the last copy and, mirrored, on a target; the last copy's machine loses power and the write, and
        // comes back; were the target taken in as it is, the two would differ for good. Its session ends, and what the
        // log of the last copy names is marked for it. Unless a swap may have made a member of it already: then it is whole,
        // and this copy is to be put out in its favour. The swap's outcome is waited for.
        if gap && !self.break_off_all("the copy it is brought up to date from lost power") {
            self.actions.push_back(Action::Hangup(copy));
            return self.unlink(copy, "its machine was restarted");
        }
        if gap {
            self.accept_gap(copy, boot_id);
        }
        let message = Message::Attach(self.configuration());
        self.send(CopySet::one(copy), message, None);
    }

    /// Whether another member lacks nothing, as far as is known. One whose disk failed or was wiped is no better than one with a
    /// gap, it never comes back: waited for, it would keep the last copy out for ever.
    fn has_whole_other(&self, copy: usize) -> bool {
        let whole = |c: usize| {
            let p = &self.peers[c];
            c != copy && !p.gap && !p.died && !p.refused && !p.unknown
        };
        self.in_sync.iter().any(whole)
    }

    /// No in-sync copy without a gap is left (PROTOCOL 5): the first one back serves on, the others, which may have lost
    /// other writes than it, are ejected in its favour. Were all of them waited for, none would ever be taken.
    fn accept_gap(&mut self, copy: usize, boot_id: BootId) {
        self.peers[copy].accepted = Some(boot_id);
        self.forgets(copy);
        let node = self.record.copies[copy].node.clone();
        self.event(
            "5 power cut",
            format!("the copy on {node} serves on without what no flush had covered"),
        );
    }

    /// `copy` is used on, and may have lost what no flush covered.
    fn forgets(&mut self, copy: usize) {
        (self.peers[copy].gap, self.peers[copy].died) = (false, false);
        // S3: what it acknowledged before says nothing now.
        for seq in self.pending.in_order() {
            if let Some(p) = self.pending.get_mut(seq)
                && (p.kind.is_write() || matches!(p.kind, Kind::Flush { .. }))
                && !matches!(p.origin, Origin::Sync { .. } | Origin::Repair { .. })
            {
                p.waiting.insert(copy);
            }
        }
        self.lost_unflushed |= self.newest > self.stable;
    }

    /// The link broke, or could not be made.
    pub fn on_disconnected(&mut self, now: Nanos, link: usize, why: &str) {
        self.now = now;
        if self.ended() {
            return;
        }
        let copy = link % COPIES_MAX;
        if self.syncs.contains_key(&copy) {
            self.break_off(copy, why);
        } else if link == copy {
            self.unlink(copy, why);
            if !self.in_sync.has(copy) {
                self.damp(copy);
            }
        }
        self.advance();
    }

    pub(super) fn unlink(&mut self, copy: usize, why: &str) {
        let now = self.now;
        self.ready.remove(copy);
        if self.in_sync.has(copy) {
            self.outdate_scrub();
        }
        let peer = &mut self.peers[copy];
        let since = match peer.link {
            Link::Down { since, .. } | Link::Dialing { since } => since,
            Link::Up => now,
        };
        peer.link = Link::Down { since, tried: now };
        peer.lease = None;
        // That a copy with a full disk hangs up is no news.
        if !self.failing.has(copy) {
            peer.why = why.to_string();
        }
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
            self.dial(copy);
        }
    }

    pub(super) fn tick_heartbeats(&mut self) {
        let mut due = CopySet::EMPTY;
        for copy in self.ready.or(self.beating_targets()).iter() {
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
        // S11: A acknowledges W, B does not; A's process is restarted and finds the region in its log; W is newer than what was
        // stable, but A knows the region without a number. Were it to leave the log for that, nobody would know, once B is
        // ejected, that it lacks W.
        let knows = |c: &usize| self.stable >= self.peers[*c].begun_at;
        let told: CopySet = due.iter().filter(knows).collect();
        for (to, stable) in [(told, self.stable), (due.without(told), Seq(0))] {
            let beat = Message::Heartbeat {
                epoch: self.record.epoch,
                sent: self.now,
                stable,
            };
            self.send(to, beat, None);
        }
    }

    /// Who is gone for too long, silent, or late.
    pub(super) fn tick_failing(&mut self) {
        let oldest = |copy: usize| self.longest_wait(copy);
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
        // The last copy, lost, comes back, is sent the configuration, and its machine loses power: it is lost already, and
        // nothing but its answer would be sent on this connection. Only a new one finds it again.
        for copy in self.failing.without(self.ready).iter() {
            let silent = self.now.since(self.peers[copy].heard);
            if self.peers[copy].link == Link::Up && silent >= self.timing.silence {
                self.actions.push_back(Action::Hangup(copy));
                self.unlink(copy, "no answer to the configuration");
            }
        }
    }

    /// `copy` is to be ejected. What it has not acknowledged stays pending until the record says so (S4).
    pub(super) fn lose(&mut self, copy: usize, why: &str) {
        if self.syncs.contains_key(&copy) {
            return self.break_off(copy, why);
        }
        if matches!(self.peers[copy].link, Link::Up) {
            self.actions.push_back(Action::Hangup(copy));
        }
        self.unlink(copy, why);
        if self.in_sync.has(copy) && !self.failing.has(copy) {
            self.failing.insert(copy);
            self.forgive(copy);
            self.damp(copy);
            let node = self.record.copies[copy].node.clone();
            self.event("2.6 copy lost", format!("copy on {node}: {why}"));
            if mutants::on(Mutant::CompleteBeforeCas) {
                self.forget_copies(CopySet::one(copy));
            }
        }
        if !self.in_sync.has(copy) {
            self.damp(copy);
        }
    }

    /// `copy` persisted our configuration.
    pub(super) fn attached(&mut self, copy: usize, epoch: Epoch) {
        if epoch != self.record.epoch {
            // The configuration changed while this answer was on its way: the newer one follows it on the session.
            let message = Message::Attach(self.configuration());
            return self.send(CopySet::one(copy), message, None);
        }
        if self.peers[copy].died {
            // S5: its disk failed a flush, and then the note of that; its process was restarted and knows nothing of it. What the
            // flush was to cover may be gone from its page cache, as after a power cut.
            if self.has_whole_other(copy) {
                return self.lose(copy, "its disk has failed, and does not say so");
            }
            self.forgets(copy);
            let node = self.record.copies[copy].node.clone();
            let text =
                format!("the copy on {node} serves on without what its disk failed to flush");
            self.event("3 failed disk", text);
        }
        self.ready.insert(copy);
        self.has_room(copy);
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
        self.peers[copy].unknown = false;
        self.peers[copy].beat = Nanos(0);
        self.peers[copy].taken_up = self.now;
        self.peers[copy].begun_at = self.pending.newest();
        if self.phase == Phase::Serving {
            // Its log may be full.
            (self.unflushed, self.pressure) = (true, true);
        }
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
            Refusal::Busy if self.syncs.get(&copy).is_some_and(Sync::is_opening) => {
                self.put_off(copy, &Refusal::Busy.to_string());
            }
            other => {
                self.peers[copy].refused = other == Refusal::Failed;
                self.peers[copy].unknown = other == Refusal::UnknownCopy;
                self.lose(copy, &other.to_string())
            }
        }
    }

    /// `copy` promised a higher epoch to somebody. The record says whether that one took the volume (PROTOCOL 5).
    pub(super) fn outbid_by(&mut self, copy: usize) {
        let why = "it promised a higher epoch to another attachment";
        self.actions.push_back(Action::Hangup(copy));
        self.unlink(copy, why);
        self.break_off(copy, why);
        self.actions.push_back(Action::ReadRecord);
    }

    // ---- the record

    /// What the membership rules ask for now, one change at a time.
    pub(super) fn propose_members(&mut self) {
        if !self.owns() || self.change.is_some() {
            return;
        }
        let synced = |(copy, s): (&usize, &Sync)| s.is_synced().then_some(*copy);
        let synced: CopySet = self.syncs.iter().filter_map(synced).collect();
        let facts = Facts {
            failing: self.failing,
            synced,
            surplus: self.surplus(),
            ready: self.ready.or(synced),
            local: self.local,
            settled: self.settled(),
            random: self.random(),
        };
        let members = membership::next(&self.record, &facts);
        let Some(next) = self.with_size(members) else {
            return;
        };
        let tag = self.tag();
        let epoch = self.record.epoch.max(self.outbid).next();
        let boot = |copy| match self.syncs.get(&copy) {
            Some(sync) => Some(sync.boot),
            None => self.peers[copy].accepted,
        };
        let next = membership::enter(&self.record, next, (epoch, tag), boot);
        self.propose(Purpose::Members, next);
    }

    /// The attachment's node first, otherwise at random (PROTOCOL 5).
    pub(super) fn choose_master(&mut self, among: CopySet) -> usize {
        let random = self.random();
        membership::choose_master(&self.record, among, self.local, random).unwrap_or(self.master)
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
        if change.purpose == Purpose::Members && !change.in_doubt {
            let since = change.since;
            self.change = None;
            self.propose_again(Purpose::Members);
            self.end_lost_sessions();
            self.propose_members();
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
            CasOutcome::Conflict(found) => self.compare(found.map(|found| *found)),
            // Never assume: read it back until it is known (PROTOCOL 2.6).
            CasOutcome::Ambiguous if mutants::on(Mutant::AmbiguousIsFailed) => {
                let purpose = change.purpose;
                self.change = None;
                self.propose_again(purpose);
            }
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
        let proposed = self.change.as_ref().map(|c| &c.proposed);
        match answer((&self.record, self.revision), proposed, (&found, revision)) {
            Answer::Old => return,
            Answer::Proposed => {
                self.event("2.6 ambiguous CAS", "read back: it had been swapped".into());
                self.take_policy(&found);
                return self.commit(revision);
            }
            Answer::Superseded => return self.superseded(found, revision),
            Answer::Held => {}
        }
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
            Purpose::Members | Purpose::Raise => self.failing = self.failing.without(self.ready),
        }
    }

    /// What others may change in a record at any time.
    fn take_policy(&mut self, from: &Record) {
        let before = self.configuration();
        self.record.take_edits(from);
        if let Some(change) = &mut self.change {
            change.proposed.take_edits(from);
        }
        self.adopt();
        let now = self.configuration();
        if now.logged && !before.logged {
            self.unlogged = self.pending.newest();
        }
        if now != before && self.owns() {
            // Before the first sync of a new copy: each in-sync copy keeps a bitmap for it.
            let to = self.ready.or(self.targets());
            self.send(to, Message::EpochChange(now), None);
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
                let before = self.in_sync;
                self.adopt();
                // One that was to vote and is absent now is to be brought up to date: on a connection of its own.
                for copy in before.without(self.in_sync).iter() {
                    self.actions.push_back(Action::Hangup(copy));
                    self.unlink(copy, "it is not in the in-sync set");
                }
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
        let (before, old) = (self.in_sync, std::mem::replace(&mut self.record, proposed));
        let (old_master, old_epoch) = (self.master, old.epoch);
        self.adopt();
        self.grown(&old);
        let out = before.without(self.in_sync);
        for copy in out.iter() {
            if matches!(self.peers[copy].link, Link::Up) {
                self.actions.push_back(Action::Hangup(copy));
                let why = self.peers[copy].why.clone();
                self.unlink(copy, &why);
            }
        }
        for copy in 0..self.record.copies.len() {
            let (was, entry) = (old.copies[copy].status, &self.record.copies[copy]);
            let (is, node, epoch) = (entry.status, entry.node.clone(), self.record.epoch);
            if was == is || purpose != Purpose::Members {
                continue;
            }
            match is {
                CopyStatus::Missing | CopyStatus::Syncing => {
                    let lost = self.lost_since(copy);
                    self.lost_since = Some(self.lost_since.map_or(lost, |at| at.min(lost)));
                    let why = &self.peers[copy].why;
                    let text = format!("copy on {node}: {why}; epoch {epoch}");
                    self.event("2.6 eject", text);
                }
                CopyStatus::InSync => {
                    self.taken_in(copy);
                    self.event("6 in sync", format!("copy on {node}; epoch {epoch}"));
                }
                CopyStatus::Removed => {
                    self.break_off(copy, "the copy is removed");
                    self.event("6 removed", format!("copy on {node}; epoch {epoch}"));
                }
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
            Purpose::Members | Purpose::Raise => {
                assert!(
                    self.record.epoch > old_epoch,
                    "S1: a change of membership has its own epoch"
                );
                let message = Message::EpochChange(self.configuration());
                self.send(self.ready.or(self.targets()), message, None);
                self.tick_heartbeats();
                // One that detached already refuses it, is configured on a new session and told to detach again: it
                // must know who is missing.
                self.peers.iter_mut().for_each(|p| p.detached = false);
                // S4: the ejection is in the record; only now may its writes complete without it.
                self.compare_again();
                self.outdate_scrub();
                self.forget_copies(out);
                self.end_lost_sessions();
                self.release_done();
            }
            Purpose::Activate => self.activated(),
            Purpose::Release => {
                self.set_phase(Phase::Left, "5 clean detach");
                self.hang_up_all();
                self.actions.push_back(Action::Ended);
            }
        }
        self.weigh_serving();
    }

    /// Since when an ejected copy did not do its part: it was heard last, or was asked what it has not answered.
    fn lost_since(&self, copy: usize) -> Nanos {
        let waits = Nanos(self.now.0.saturating_sub(self.longest_wait(copy).0));
        self.peers[copy].heard.min(waits)
    }

    /// A synced copy is a member now.
    fn taken_in(&mut self, copy: usize) {
        self.actions.push_back(Action::Hangup(copy + COPIES_MAX));
        self.mirrors.remove(copy);
        let lost = self.syncs.remove(&copy).and_then(|s| s.lost);
        let peer = &mut self.peers[copy];
        peer.in_sync_since = self.now;
        (peer.gap, peer.accepted, peer.died) = (false, None, false);
        (peer.refused, peer.unknown) = (false, false);
        // Reads wait for its first answer in this epoch: it is asked at once.
        (peer.lease, peer.beat) = (None, Nanos(0));
        if lost.is_none() {
            self.ready.insert(copy);
            self.peers[copy].why.clear();
        }
    }

    pub(super) fn hang_up_all(&mut self) {
        for copy in 0..self.peers.len() {
            self.actions.push_back(Action::Hangup(copy));
            if self.syncs.contains_key(&copy) {
                self.actions.push_back(Action::Hangup(copy + COPIES_MAX));
            }
        }
    }
}
