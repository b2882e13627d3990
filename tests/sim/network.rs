//! Connections: in order and reliable until they break.

use super::disk::Stamps;
use super::world::{Ev, MS, World};
use lockstep::replication::ids::Nanos;
use lockstep::replication::message::Message;

/// One connection between an attachment and a copy.
pub struct Session {
    pub att: usize,
    pub copy: usize,
    /// Messages still arrive at the copy.
    pub to_copy: bool,
    /// Messages still arrive at the attachment.
    pub to_att: bool,
    /// When the last message of each direction arrives: the next one does not overtake it.
    pub last_to_copy: u64,
    pub last_to_att: u64,
}

/// Which pairs of nodes cannot talk, and until when.
#[derive(Default)]
pub struct Partitions(Vec<(usize, usize, u64)>);

impl Partitions {
    pub fn cut(&mut self, a: usize, b: usize, until: u64) {
        self.0.push((a.min(b), a.max(b), until));
    }

    /// When `a` and `b` can talk again; 0 if they can.
    pub fn until(&self, a: usize, b: usize, now: u64) -> u64 {
        let pair = (a.min(b), a.max(b));
        self.0
            .iter()
            .filter(|(x, y, until)| (*x, *y) == pair && *until > now)
            .map(|(.., until)| *until)
            .max()
            .unwrap_or(0)
    }

    pub fn heal(&mut self) {
        self.0.clear();
    }
}

impl World {
    pub fn delay(&mut self, a: usize, b: usize) -> u64 {
        if a == b {
            return 0;
        }
        let base = self.rng.between(50, 1_500) * 1_000;
        if self.faults && self.slow_net_until > self.now {
            return base + self.rng.below(800) * MS;
        }
        if self.faults && self.rng.one_in(300) {
            return base + self.rng.below(400) * MS;
        }
        base
    }

    pub fn tell_copy(&mut self, s: usize, message: Message, data: Option<Stamps>) {
        let (a, c) = (self.atts[self.sessions[s].att].node, self.sessions[s].copy);
        let at = (self.now + self.delay(a, c))
            .max(self.sessions[s].last_to_copy)
            .max(self.partitions.until(a, c, self.now));
        self.sessions[s].last_to_copy = at;
        self.at(at, Ev::ToCopy(s, message, data));
    }

    pub fn tell_att(&mut self, s: usize, message: Message, data: Option<Stamps>) {
        let (a, c) = (self.atts[self.sessions[s].att].node, self.sessions[s].copy);
        let at = (self.now + self.delay(a, c))
            .max(self.sessions[s].last_to_att)
            .max(self.partitions.until(a, c, self.now));
        self.sessions[s].last_to_att = at;
        self.at(at, Ev::ToAtt(s, message, data));
    }

    /// Breaks a connection; each end learns of it in its own time.
    pub fn reset(&mut self, s: usize, att_learns: bool, copy_learns: bool) {
        let (was_copy, was_att) = (self.sessions[s].to_copy, self.sessions[s].to_att);
        self.sessions[s].to_copy = false;
        self.sessions[s].to_att = false;
        if copy_learns && was_copy {
            let wait = self.rng.below(20) * MS;
            self.after(wait, Ev::CopyClosed(s));
        }
        if att_learns && was_att {
            let wait = self.rng.below(20) * MS;
            self.after(wait, Ev::AttClosed(s, "reset"));
        }
    }

    pub fn dialed(&mut self, a: usize, copy: usize, dial: u64) {
        let att = &self.atts[a];
        if att.over || att.dials[copy] != dial {
            return;
        }
        let (from, now) = (att.node, Nanos(self.now));
        let reachable = self.nodes[copy].up
            && self.nodes[copy].paused_until <= self.now
            && self.partitions.until(from, copy, self.now) == 0;
        if !reachable {
            return self.atts[a].machine.on_disconnected(now, copy, "no answer");
        }
        let s = self.sessions.len();
        self.sessions.push(Session {
            att: a,
            copy,
            to_copy: true,
            to_att: true,
            last_to_copy: self.now,
            last_to_att: self.now,
        });
        self.atts[a].links[copy] = Some(s);
        self.seen.connections += 1;
        let boot = self.nodes[copy].boot;
        self.say(|_| format!("att {a}: connected to copy {copy} by session {s}"));
        self.atts[a].machine.on_connected(now, copy, boot);
    }

    pub fn hangup(&mut self, a: usize, copy: usize) {
        self.atts[a].dials[copy] += 1;
        if let Some(s) = self.atts[a].links[copy].take() {
            self.sessions[s].to_att = false;
            // What was sent before the end may still arrive, or not.
            let (from, at) = (self.atts[a].node, self.sessions[s].last_to_copy);
            let at = if from == copy || self.rng.one_in(2) {
                self.now
            } else {
                at.max(self.now)
            };
            self.at(at, Ev::CopyClosed(s));
        }
    }
}
