//! Attachments: who wants one where, and what the world does for it.

use std::collections::BTreeMap;

use lockstep::replication::attachment::{Action, Attachment, CasOutcome, Phase, Revision};
use lockstep::replication::ids::{COPIES_MAX, Epoch, LINKS_MAX, Nanos, Seq};
use lockstep::replication::message::{Message, Proof, Status};
use lockstep::replication::record::{self, CopyEntry, CopyStatus, Record};

use super::disk::Stamps;
use super::guest::Asked;
use super::world::{Ev, MS, World};

pub struct Att {
    pub node: usize,
    pub machine: Attachment<Stamps>,
    /// The session of each link.
    pub links: [Option<usize>; LINKS_MAX],
    /// Counts attempts, so that a late connection is known as such.
    pub dials: [u64; LINKS_MAX],
    pub asked: BTreeMap<u64, Asked>,
    pub served: bool,
    /// The epoch in which it began to serve.
    pub serves: Option<Epoch>,
    pub over: bool,
    pub leaving: bool,
    /// It was cut off, or slept, for so long that another one could take over.
    pub isolated: bool,
    /// It served and does not now.
    pub suspended: bool,
    /// Every in-sync copy lost power while it ran: its guest may be told that a flush failed.
    pub lost_power: bool,
    /// Since when requests have waited for space.
    pub full: Option<Nanos>,
}

impl World {
    /// Wants the volume attached somewhere, for ever.
    pub fn operator(&mut self) {
        self.after(400 * MS, Ev::Operator);
        if self.live().is_some() {
            return;
        }
        let before = self
            .registry
            .record
            .attachment
            .as_ref()
            .and_then(|a| self.nodes.iter().position(|n| n.name == a.node));
        let up: Vec<usize> = (0..self.nodes.len())
            .filter(|n| self.nodes[*n].up)
            .collect();
        if up.is_empty() {
            return;
        }
        let n = match before {
            Some(n) if self.nodes[n].up && !self.rng.one_in(4) => n,
            _ => self.rng.pick(&up),
        };
        self.ask_attach(n);
    }

    pub fn ask_attach(&mut self, n: usize) {
        let busy = self.atts.iter().any(|a| a.node == n && !a.over);
        let alive = self.atts.iter().filter(|a| !a.over).count();
        if busy || alive > 1 || !self.nodes[n].up || self.registry_down_until > self.now {
            return;
        }
        let found = (self.registry.record.clone(), self.registry.revision);
        let (wait, process) = (self.registry_delay(), self.nodes[n].process);
        self.after(wait, Ev::Attach(n, process, Box::new(found)));
    }

    pub fn attach(&mut self, n: usize, (record, revision): (Record, Revision)) {
        if self.atts.iter().any(|a| a.node == n && !a.over) {
            return;
        }
        let node = &self.nodes[n];
        let me = record::Attachment {
            node: node.name.clone(),
            boot_id: node.boot,
            instance: node.instance,
        };
        // One attachment a node, and the one before is over: its lock is free.
        let mine = record
            .attachment
            .as_ref()
            .is_some_and(|a| a.node == me.node);
        let proof = if mine {
            Proof::PredecessorDead
        } else {
            Proof::None
        };
        let a = self.atts.len();
        self.say(|_| format!("att {a} on node {n}, epoch {}, {proof:?}", record.epoch));
        let seed = self.rng.next();
        let machine = Attachment::new(
            me,
            record,
            revision,
            proof,
            self.timing,
            seed,
            self.clock(n),
        );
        self.atts.push(Att {
            node: n,
            machine,
            links: [None; LINKS_MAX],
            dials: [0; LINKS_MAX],
            asked: BTreeMap::new(),
            served: false,
            serves: None,
            over: false,
            leaving: false,
            isolated: false,
            suspended: false,
            lost_power: false,
            full: None,
        });
        self.pump(n);
        self.after(MS, Ev::Guest(a));
    }

    /// Whether an attachment that serves in a later epoch has completed something.
    pub fn newer_served(&self, a: usize) -> bool {
        let mine = self.atts[a].serves;
        self.atts.iter().any(|o| o.served && o.serves > mine)
    }

    pub fn act(&mut self, a: usize, action: Action<Stamps>) {
        match action {
            Action::Send { to, message, data } => {
                let zeros = matches!(message, Message::WriteZeroes { .. });
                for link in to.iter() {
                    let copies = &self.atts[a].machine.record().copies;
                    let target = copies[link % COPIES_MAX].status != CopyStatus::InSync;
                    if zeros && link >= COPIES_MAX {
                        self.seen.count("chunk of zeros brought up to date");
                    } else if zeros && target {
                        self.seen
                            .count("zeros on a copy that is brought up to date");
                    }
                    if let Some(s) = self.atts[a].links[link] {
                        self.tell_copy(s, message.clone(), data.clone());
                    }
                }
            }
            Action::Complete { id, outcome, data } => self.complete(a, id, outcome, data),
            Action::Dial {
                copy: link,
                copy_id,
                node,
            } => {
                self.atts[a].dials[link] += 1;
                let dial = self.atts[a].dials[link];
                let there = self.node_named(&node).expect("records name only nodes");
                let wait = if self.atts[a].node == there {
                    0
                } else {
                    self.rng.between(1, 20) * MS
                };
                self.after(wait, Ev::Dialed(a, link, dial, copy_id, there));
            }
            Action::Hangup(link) => self.hangup(a, link),
            Action::Cas { expected, record } => {
                self.say(|_| {
                    let in_sync: Vec<_> = record.in_sync().map(|c| &c.node).collect();
                    format!(
                        "att {a}: CAS at {expected} to epoch {} {:?} {in_sync:?}",
                        record.epoch, record.state
                    )
                });
                let wait = self.registry_delay();
                self.after(wait, Ev::Cas(a, expected, record));
            }
            Action::ReadRecord => {
                let wait = self.registry_delay();
                self.after(wait, Ev::Read(a));
            }
            Action::Event { rule, text } => {
                if rule == "5.5 reconciled" && !text.contains(" 0 chunks") {
                    self.seen.count("chunks reconciled");
                }
                if rule == "2.6 ambiguous CAS" {
                    self.seen.count("ambiguous CAS");
                }
                self.note_service(a, rule, &text);
                self.note_sync(a, rule, &text);
                self.note_scrub(a, rule);
                self.say(|_| format!("att {a}: [{rule}] {text}"));
            }
            Action::Ended => {
                let machine = &self.atts[a].machine;
                // Unless somebody attached since, and this one hears late that it has left.
                if *machine.phase() == Phase::Left
                    && machine.record().epoch == self.registry.record.epoch
                {
                    self.check_left();
                }
                self.end_att(a);
            }
        }
        if *self.atts[a].machine.phase() == Phase::Serving && self.atts[a].serves.is_none() {
            self.atts[a].serves = Some(self.atts[a].machine.record().epoch);
            self.seen.count("attach");
            let before = |by: usize| by != a && self.atts[by].serves.is_some();
            self.oracle.served_after(before, self.moment);
            self.say(|_| format!("att {a} serves"));
        }
    }

    /// The attachment is no more; what it has not answered it never will.
    pub fn end_att(&mut self, a: usize) {
        self.atts[a].over = true;
        for link in 0..LINKS_MAX {
            self.hangup(a, link);
        }
        if !self.atts[a].asked.is_empty() && *self.atts[a].machine.phase() == Phase::Left {
            panic!("S19: left with requests under way");
        }
        self.atts[a].asked.clear();
    }
}

pub fn brief(outcome: &CasOutcome) -> String {
    match outcome {
        CasOutcome::Conflict(Some(found)) => {
            format!(
                "conflict with revision {}, epoch {}",
                found.1, found.0.epoch
            )
        }
        other => format!("{other:?}"),
    }
}

impl World {
    /// What is counted of a message to an attachment: a read that no copy's disk answered, or whose answer may not be given.
    pub fn note_message(&mut self, a: usize, message: &Message) {
        let now = self.clock(self.atts[a].node);
        let answers: &[(Seq, Status)] = match message {
            Message::ReadReply { seq, status } => &[(*seq, *status)],
            Message::AckVec { acks, .. } => acks,
            _ => return,
        };
        let att = &mut self.atts[a];
        for (seq, status) in answers.iter().filter(|(_, status)| *status != Status::Ok) {
            let Some((op, _)) = att.machine.under_way(*seq) else {
                continue;
            };
            for asked in att.asked.values_mut().filter(|q| q.op == op) {
                asked.unreadable |= *status == Status::Io;
                if *status == Status::NoSpace {
                    asked.full = true;
                    // It may have been suspended for something else before, without a moment in between.
                    let for_long = att.machine.status().suspended_for.unwrap_or(Nanos(0));
                    att.full.get_or_insert(Nanos(now.0 - for_long.0));
                }
            }
        }
        if let Message::ReadReply {
            seq,
            status: Status::Ok,
        } = message
            && let Some((op, _)) = att.machine.under_way(*seq)
        {
            let first = att.asked.iter().find(|(_, q)| q.op == op);
            self.answered = first.map(|(id, _)| (a, *id));
        }
    }

    /// So many regions left a log. At a detach all do: that is no risk.
    pub fn note_left_log(&mut self, regions: u64) {
        let serves = |a: &Att| !a.over && *a.machine.phase() == Phase::Serving;
        if regions == 0 || !self.atts.iter().any(serves) {
            return;
        }
        self.seen.times("region left the log", regions);
        let mut copies = self.registry.record.present();
        if copies.any(|c| c.status != CopyStatus::InSync) {
            self.seen
                .times("region left the log while a copy was missing", regions);
        }
    }

    /// Counts suspensions, and how attachments ended.
    fn note_service(&mut self, a: usize, rule: &str, text: &str) {
        let att = &mut self.atts[a];
        match rule {
            "7 suspend" => {
                att.suspended = true;
                self.seen.count("suspension");
            }
            "7 serve" if std::mem::take(&mut att.suspended) => {
                self.seen.count("suspension ended");
            }
            "4 fence" if text.contains("so says the copy") => {
                self.seen.count("second attach refused by a copy");
            }
            "4 fence" if text.contains("is attached on") && att.isolated => {
                self.seen.count("isolated attachment fenced");
            }
            _ => {}
        }
    }

    /// Counts how copies came back, from what the attachment tells people.
    fn note_sync(&mut self, a: usize, rule: &str, text: &str) {
        let record = self.atts[a].machine.record();
        let of = |c: &&CopyEntry| text.contains(&format!("copy on {}", c.node));
        let Some(node) = record.copies.iter().find(of).map(|c| c.node.clone()) else {
            return;
        };
        let sync = self.syncs.entry(node.clone()).or_default();
        match rule {
            "6 sync begins" => sync.0 = text.contains("what it missed"),
            "6 sync broke off" => sync.1 += 1,
            "6 in sync" => {
                let (delta, broken) = self.syncs.remove(&node).unwrap_or_default();
                self.seen
                    .count(if delta { "delta rejoin" } else { "full sync" });
                if broken > 0 {
                    self.seen.count("interrupted sync resumed");
                }
            }
            _ => {}
        }
    }

    /// A read that was answered and not completed is held back: by the failure mode, or for want of a lease (S8). That matters
    /// most where another attachment has served since.
    pub fn note_held_back(&mut self) {
        let Some((a, id)) = self.answered.take() else {
            return;
        };
        let att = &self.atts[a];
        if att.asked.contains_key(&id) && !att.over && att.machine.mode_serves() {
            self.seen.count("read held back by an expired lease");
            if self.newer_served(a) {
                self.seen.count("read held back after a newer one served");
            }
        }
    }
}
