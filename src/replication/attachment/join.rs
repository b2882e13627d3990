//! Taking a volume over (PROTOCOL 5.1–5.3), and leaving it cleanly.

use std::collections::BTreeSet;

use super::{Attachment, CopySet, Link, Origin, Outcome, Payload, Phase, Purpose, Vote};
use crate::replication::ids::{Epoch, Nanos, Region, Seq};
use crate::replication::message::{DiskState, Message, Promise, Proof, Refusal};
use crate::replication::record::State;
use crate::replication::takeover;

/// The first step back of an outbid candidate is below twice this.
const BACK_OFF: Nanos = Nanos::from_ms(25);
/// The longest is below 25 ms × 2^6 = 1.6 s: a round of promises on a busy disk.
const BACK_OFF_DOUBLINGS: u32 = 6;

/// Where a takeover stands.
#[derive(Debug, Default)]
pub(super) struct Join {
    /// The epoch asked for.
    target: Epoch,
    /// Only asking whether the old attachment is heard; nobody promises yet.
    probing: bool,
    since: Nanos,
    /// Outbid: ask again only then.
    quiet_until: Nanos,
    /// How often outbid, without a claim in between.
    outbid: u32,
    /// Where the members may differ, by their logs; `None`: anywhere.
    regions: Option<Vec<Region>>,
    /// Detaching: the flush is done, the copies were told.
    leaving_told: bool,
    leaving_flushing: bool,
}

impl<D: Payload> Attachment<D> {
    /// Asks every in-sync copy, from the start.
    pub(super) fn begin_join(&mut self) {
        self.begin_join_at(Nanos(0), self.join.outbid);
    }

    fn begin_join_at(&mut self, quiet_until: Nanos, outbid: u32) {
        if self.phase != Phase::Joining {
            self.set_phase(Phase::Joining, "5.1 join");
        }
        self.join = Join {
            target: self.record.epoch.max(self.outbid).next(),
            // A pre-vote disturbs nobody: without it, an attach in vain would fence a healthy attachment.
            probing: self.proof == Proof::None && self.record.attachment.is_some(),
            since: self.now,
            quiet_until,
            outbid,
            ..Join::default()
        };
        if self.record.attachment.is_none() {
            self.proof = Proof::Released(self.record.epoch);
        }
        self.ask_all();
    }

    fn ask_all(&mut self) {
        for copy in self.in_sync.iter() {
            self.peers[copy].vote = None;
            if matches!(self.peers[copy].link, Link::Up) {
                self.ask_promise(copy);
            }
        }
    }

    pub(super) fn ask_promise(&mut self, copy: usize) {
        if self.phase != Phase::Joining || self.now < self.join.quiet_until {
            return;
        }
        let message = Message::Promise(Promise {
            epoch: self.join.target,
            candidate: self.me.node.clone(),
            instance: self.me.instance,
            proof: self.proof,
            probe: self.join.probing,
        });
        self.send(CopySet::one(copy), message, None);
    }

    pub(super) fn promised(&mut self, copy: usize, disk: DiskState) {
        if self.phase != Phase::Joining
            || disk.probe != self.join.probing
            || disk.promised != self.join.target
        {
            return;
        }
        let vote = match takeover::misfit(&self.record, disk.epoch, disk.tag) {
            Some(why) => {
                let node = self.record.copies[copy].node.clone();
                self.event(
                    "5.2 promise",
                    format!("the copy on {node} cannot be used: {why}"),
                );
                self.peers[copy].why = why;
                match disk.epoch > self.record.epoch {
                    true => {
                        // Most likely the record changed since it was read. If every copy is ahead of ours, nobody else says so.
                        self.actions.push_back(super::Action::ReadRecord);
                        Vote::Ahead
                    }
                    false => Vote::Out,
                }
            }
            None if disk.probe => Vote::Probed,
            None => Vote::Promised(disk),
        };
        self.peers[copy].vote = Some(vote);
        self.tally();
    }

    pub(super) fn vote_refused(&mut self, copy: usize, refusal: Refusal) {
        let node = self.record.copies[copy].node.clone();
        match refusal {
            Refusal::Stale { promised } => {
                // Somebody was promised more. Above that, from what the record says by then.
                self.outbid = self.outbid.max(promised);
                self.peers[copy].why = refusal.to_string();
                self.actions.push_back(super::Action::ReadRecord);
                if self.phase == Phase::Joining {
                    self.step_back();
                }
            }
            Refusal::Attached { .. } => {
                self.fence(format!("{refusal} (so says the copy on {node})"))
            }
            _ => {
                self.peers[copy].why = refusal.to_string();
                self.peers[copy].vote = Some(Vote::Out);
                // It may have been removed since the record was read; if all that the record names refuse, nobody else says so.
                let soon = self.now.after(self.timing.registry_retry);
                self.reread.get_or_insert(soon);
                self.tally();
            }
        }
    }

    /// Two candidates that each ask for more as soon as the other was promised something never let each other have all
    /// copies. So each steps back, for a time by chance that doubles each time; one of them gets through.
    fn step_back(&mut self) {
        let outbid = self.join.outbid + 1;
        let span = BACK_OFF.0 << outbid.min(BACK_OFF_DOUBLINGS);
        let wait = Nanos(self.random() % span);
        self.begin_join_at(self.now.after(wait), outbid);
    }

    pub(super) fn tick_join(&mut self) {
        if self.now < self.join.quiet_until {
            return;
        }
        if self.join.quiet_until > Nanos(0) {
            self.join.quiet_until = Nanos(0);
            self.join.since = self.now;
            self.ask_all();
        }
        // Connected, asked, and its machine lost power: nobody resets the connection, and nothing else is sent on it that
        // could time out. Only a new one finds the copy again.
        for copy in self.in_sync.iter() {
            let peer = &self.peers[copy];
            let silent = self.now.since(peer.heard.max(self.join.since));
            if peer.link == Link::Up && peer.vote.is_none() && silent >= self.timing.join {
                self.actions.push_back(super::Action::Hangup(copy));
                self.unlink(copy, "no answer to the request for its promise");
            }
        }
        self.tally();
    }

    /// Whether enough is known to go on.
    fn tally(&mut self) {
        if self.phase != Phase::Joining {
            return;
        }
        let asked = self.in_sync;
        if asked
            .iter()
            .any(|c| matches!(self.peers[c].vote, Some(Vote::Ahead)))
        {
            // A registry that was restored from an old backup says so until a later one is.
            let soon = self.now.after(self.timing.registry_retry);
            self.reread.get_or_insert(soon);
            return;
        }
        let waited = self.now.since(self.join.since) >= self.timing.join;
        let silent = asked
            .iter()
            .filter(|c| self.peers[*c].vote.is_none())
            .count();
        if silent > 0 && !waited {
            return;
        }
        if self.join.probing {
            // One that hears the old attachment would have said so.
            if asked
                .iter()
                .any(|c| matches!(self.peers[c].vote, Some(Vote::Probed)))
            {
                self.join.probing = false;
                self.join.since = self.now;
                self.ask_all();
            }
            return;
        }
        let promised = self
            .promises()
            .map(|(c, disk)| (c, disk.boot_id, disk.regions.is_some()));
        let Some(members) = takeover::members(&self.record, promised, silent > 0) else {
            return;
        };
        self.claim(members);
    }

    /// The in-sync copies that promised, and what their disks said.
    fn promises(&self) -> impl Iterator<Item = takeover::Promised<'_>> {
        self.in_sync
            .iter()
            .filter_map(|c| match &self.peers[c].vote {
                Some(Vote::Promised(disk)) => Some((c, disk)),
                _ => None,
            })
    }

    fn claim(&mut self, members: CopySet) {
        for copy in self.in_sync.without(members).iter() {
            let why = &self.peers[copy].why;
            let node = &self.record.copies[copy].node;
            let text = match &self.peers[copy].vote {
                Some(Vote::Promised(_)) => {
                    format!(
                        "the copy on {node} may lack writes, or not know where: it is brought up to date"
                    )
                }
                _ => format!("the copy on {node} did not promise in time ({why})"),
            };
            self.event("5.3 claim", text);
        }
        let master = if takeover::keeps_master(members, self.master, self.local) {
            self.master
        } else {
            self.choose_master(members)
        };
        if self.record.state != State::Clean {
            // S5: the former attachment may have left completed writes unflushed. Should their last copy lose power before our first
            // flush, the guest, which may be the former one's, has to know.
            self.newest = self.newest.max(Seq(1));
        }
        let tag = self.tag();
        let claimed = (self.join.target, tag);
        let promised = self.promises();
        let next = takeover::claim(&self.record, &self.me, members, promised, master, claimed);
        let held = self.promises().filter(|(c, _)| members.has(*c));
        let logs: Option<Vec<Vec<Region>>> = held.map(|(_, disk)| disk.regions.clone()).collect();
        let union = |logs: Vec<Vec<Region>>| logs.into_iter().flatten().collect::<BTreeSet<_>>();
        self.join.regions = logs.map(|logs| union(logs).into_iter().collect());
        self.set_phase(Phase::Claiming, "5.3 claim");
        self.propose(Purpose::Claim, next);
    }

    /// The record is ours: have the copies persist it.
    pub(super) fn claimed(&mut self) {
        self.set_phase(Phase::Configuring, "5.3 claim");
        let now = self.now;
        for copy in self.in_sync.iter() {
            let peer = &mut self.peers[copy];
            peer.heard = now;
            if peer.link == Link::Up {
                let message = Message::Attach(self.configuration());
                self.send(CopySet::one(copy), message, None);
            }
        }
    }

    pub(super) fn advance_configuring(&mut self) {
        if self.change.is_some() || !self.in_sync.without(self.ready).is_empty() {
            return;
        }
        if self.record.state == State::Recovering {
            let regions = self.join.regions.take();
            self.begin_reconcile(regions);
        }
        self.set_phase(Phase::Serving, "5 serve");
        self.tick_io();
        self.advance_reconcile();
    }

    // ---- leaving

    pub(super) fn advance_leaving(&mut self) {
        if !self.is_idle() && !self.join.leaving_flushing {
            return;
        }
        if self.change.is_some()
            || !self.in_sync.without(self.ready).is_empty() && !self.join.leaving_told
        {
            return;
        }
        if !self.join.leaving_flushing {
            self.join.leaving_flushing = true;
            self.start_flush(Origin::Leave);
        } else if self.join.leaving_told
            && self
                .in_sync
                .without(self.failing)
                .iter()
                .all(|c| self.peers[c].detached)
            && self.failing.is_empty()
        {
            self.propose_release();
        }
    }

    pub(super) fn left_flushed(&mut self, outcome: Outcome) {
        if outcome == Outcome::IoError {
            // The last copy's disk failed. Left as after a crash: nothing is called clean.
            return self.fence("the last flush failed; detached without a clean mark".into());
        }
        self.join.leaving_told = true;
        self.ready.iter().for_each(|c| self.tell_to_detach(c));
    }

    /// Also after a reconnection: a Detach, or its answer, that the old connection lost is not missed by anyone else.
    pub(super) fn tell_to_detach(&mut self, copy: usize) {
        if self.join.leaving_told {
            let message = Message::Detach {
                epoch: self.record.epoch,
            };
            self.send(CopySet::one(copy), message, None);
        }
    }

    pub(super) fn propose_release(&mut self) {
        let mut next = self.record.clone();
        next.attachment = None;
        next.state = State::Clean;
        let tag = self.tag();
        next.advance(self.record.epoch.max(self.outbid).next(), tag);
        self.propose(Purpose::Release, next);
    }
}
