//! Attachments: who wants one where, and what the world does for it.

use std::collections::BTreeMap;

use lockstep::replication::attachment::{Action, Attachment, CasOutcome, Phase, Revision};
use lockstep::replication::ids::Nanos;
use lockstep::replication::message::Proof;
use lockstep::replication::record::{self, Record};
use lockstep::replication::timing::Timing;

use super::disk::Stamps;
use super::guest::Asked;
use super::world::{Ev, MS, World};

pub struct Att {
    pub node: usize,
    pub machine: Attachment<Stamps>,
    pub links: Vec<Option<usize>>,
    pub dials: Vec<u64>,
    pub asked: BTreeMap<u64, Asked>,
    pub served: bool,
    pub serving_seen: bool,
    pub over: bool,
    pub leaving: bool,
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
            Timing::DEFAULT,
            seed,
            Nanos(self.now),
        );
        self.atts.push(Att {
            node: n,
            machine,
            links: vec![None; self.copies],
            dials: vec![0; self.copies],
            asked: BTreeMap::new(),
            served: false,
            serving_seen: false,
            over: false,
            leaving: false,
        });
        self.pump(n);
        self.after(MS, Ev::Guest(a));
    }

    pub fn act(&mut self, a: usize, action: Action<Stamps>) {
        match action {
            Action::Send { to, message, data } => {
                for copy in to.iter() {
                    if let Some(s) = self.atts[a].links[copy] {
                        self.tell_copy(s, message.clone(), data.clone());
                    }
                }
            }
            Action::Complete { id, outcome, data } => self.complete(a, id, outcome, data),
            Action::Dial { copy, .. } => {
                self.atts[a].dials[copy] += 1;
                let dial = self.atts[a].dials[copy];
                let wait = if self.atts[a].node == copy {
                    0
                } else {
                    self.rng.between(1, 20) * MS
                };
                self.after(wait, Ev::Dialed(a, copy, dial));
            }
            Action::Hangup(copy) => self.hangup(a, copy),
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
                    self.seen.reconciled_differing += 1;
                }
                if rule == "2.6 ambiguous CAS" {
                    self.seen.ambiguous += 1;
                }
                self.say(|_| format!("att {a}: [{rule}] {text}"));
            }
            Action::Ended => {
                let machine = &self.atts[a].machine;
                // Unless somebody attached since, and this one hears late that it has left.
                if *machine.phase() == Phase::Left
                    && machine.record().epoch == self.registry.record.epoch
                {
                    self.left();
                }
                self.end_att(a);
            }
        }
        if *self.atts[a].machine.phase() == Phase::Serving && !self.atts[a].serving_seen {
            self.atts[a].serving_seen = true;
            self.seen.attaches += 1;
            self.oracle.served_by(a, self.moment);
            self.say(|_| format!("att {a} serves"));
        }
    }

    /// The attachment is no more; what it has not answered it never will.
    pub fn end_att(&mut self, a: usize) {
        self.atts[a].over = true;
        for copy in 0..self.copies {
            self.hangup(a, copy);
        }
        if !self.atts[a].asked.is_empty() && *self.atts[a].machine.phase() == Phase::Left {
            panic!("S19: left with requests under way");
        }
        self.atts[a].asked.clear();
    }
}

pub fn brief(outcome: &CasOutcome) -> String {
    match outcome {
        CasOutcome::Conflict(Some((r, revision))) => {
            format!("conflict with revision {revision}, epoch {}", r.epoch)
        }
        other => format!("{other:?}"),
    }
}
