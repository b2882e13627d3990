//! Connections: in order and reliable until they break. A break cuts each direction in the middle of what is under way:
//! the messages before the cut arrive, then the end; or the end is never told.

use lockstep::replication::ids::CopyId;
use lockstep::replication::message::{Message, Refusal};

use super::disk::Stamps;
use super::world::{Ev, MS, World};

/// Messages under way in one direction of one connection (S19). Far above what one attachment's requests come to (the
/// guest asks for a few dozen at once); a machine that repeats itself without being asked passes it soon.
const UNDER_WAY_MAX: u64 = 2_000;

/// One direction of a connection.
#[derive(Clone, Copy)]
pub struct Way {
    /// The reader still reads.
    pub open: bool,
    /// When the last message arrives: the next one does not overtake it.
    pub last: u64,
    pub sent: u64,
    pub arrived: u64,
    /// Messages from this number on are lost.
    pub cut: u64,
}

impl Way {
    fn new(now: u64) -> Self {
        Self {
            open: true,
            last: now,
            sent: 0,
            arrived: 0,
            cut: u64::MAX,
        }
    }

    /// The message `number` is there; whether it is read.
    pub fn arrive(&mut self, number: u64) -> bool {
        self.arrived = number + 1;
        self.open && number < self.cut
    }

    pub fn is_whole(&self) -> bool {
        self.open && self.cut == u64::MAX
    }
}

/// One connection between an attachment and a copy.
pub struct Session {
    pub att: usize,
    pub link: usize,
    pub node: usize,
    pub to_copy: Way,
    pub to_att: Way,
}

/// Which node cannot send to which, and until when. What is sent meanwhile arrives afterwards, as TCP's does.
#[derive(Default)]
pub struct Partitions(Vec<(usize, usize, u64)>);

impl Partitions {
    pub fn cut(&mut self, a: usize, b: usize, until: u64) {
        self.cut_one_way(a, b, until);
        self.cut_one_way(b, a, until);
    }

    pub fn cut_one_way(&mut self, from: usize, to: usize, until: u64) {
        self.0.push((from, to, until));
    }

    /// When what `from` sends arrives at `to` again; 0 if it does now.
    pub fn until(&self, from: usize, to: usize, now: u64) -> u64 {
        self.0
            .iter()
            .filter(|(x, y, until)| (*x, *y) == (from, to) && *until > now)
            .map(|(.., until)| *until)
            .max()
            .unwrap_or(0)
    }

    pub fn heal(&mut self) {
        self.0.clear();
    }
}

impl World {
    fn delay(&mut self, a: usize, b: usize) -> u64 {
        if a == b {
            return 0;
        }
        let base = self.rng.between(50, 1_500) * 1_000;
        let slow = self.slow_net_until > self.now
            && self.slow_node.is_none_or(|slow| slow == a || slow == b);
        if self.faults && slow {
            self.seen.count("message on a slow link");
            return base + self.rng.below(800) * MS;
        }
        if self.faults && self.rng.one_in(300) {
            return base + self.rng.below(400) * MS;
        }
        base
    }

    pub fn tell_copy(&mut self, s: usize, message: Message, data: Option<Stamps>) {
        self.check_message(&message, data.as_ref());
        let (from, to) = (self.atts[self.sessions[s].att].node, self.sessions[s].node);
        let at = self.now + self.delay(from, to);
        let at = at.max(self.partitions.until(from, to, self.now));
        let (at, number) = on_its_way(&mut self.sessions[s].to_copy, at);
        self.seen.most(
            "most messages under way",
            self.sessions[s].to_copy.sent - self.sessions[s].to_copy.arrived,
        );
        self.at(at, Ev::ToCopy(s, number, message, data));
    }

    pub fn tell_att(&mut self, s: usize, message: Message, data: Option<Stamps>) {
        self.check_message(&message, data.as_ref());
        let (from, to) = (self.sessions[s].node, self.atts[self.sessions[s].att].node);
        let at = self.now + self.delay(from, to);
        let at = at.max(self.partitions.until(from, to, self.now));
        let (at, number) = on_its_way(&mut self.sessions[s].to_att, at);
        self.at(at, Ev::ToAtt(s, number, message, data));
    }

    /// Breaks a connection; each end that learns of it does so in its own time.
    pub fn reset(&mut self, s: usize, att_learns: bool, copy_learns: bool) {
        let copy_at = self.cut(s, true);
        let att_at = self.cut(s, false);
        if let Some(at) = copy_at
            && copy_learns
        {
            self.at(at, Ev::CopyClosed(s));
        }
        if let Some(at) = att_at
            && att_learns
        {
            self.at(at, Ev::AttClosed(s, "reset"));
        }
    }

    /// Cuts one direction somewhere in what is under way; when its reader can know. `None` if it was cut before.
    fn cut(&mut self, s: usize, to_copy: bool) -> Option<u64> {
        let soon = self.now + self.rng.below(20) * MS;
        let session = &mut self.sessions[s];
        let way = if to_copy {
            &mut session.to_copy
        } else {
            &mut session.to_att
        };
        if !way.is_whole() {
            return None;
        }
        let survive = self.rng.below(way.sent - way.arrived + 1);
        way.cut = way.arrived + survive;
        if survive > 0 && way.cut < way.sent {
            self.seen.count("connection reset in the middle");
        }
        Some(if survive > 0 {
            soon.max(way.last)
        } else {
            soon
        })
    }

    pub fn dialed(&mut self, a: usize, link: usize, dial: u64, copy_id: CopyId, node: usize) {
        let att = &self.atts[a];
        if att.over || att.dials[link] != dial {
            return;
        }
        let (from, now) = (att.node, self.clock(att.node));
        let reachable = self.nodes[node].up
            && self.nodes[node].paused_until <= self.now
            && self.partitions.until(from, node, self.now) == 0
            && self.partitions.until(node, from, self.now) == 0;
        if !reachable {
            return self.atts[a].machine.on_disconnected(now, link, "no answer");
        }
        if self.nodes[node].disk.as_ref().map(|d| d.copy_id()) != Some(copy_id) {
            return self.atts[a]
                .machine
                .on_refused(now, link, Refusal::UnknownCopy);
        }
        let s = self.sessions.len();
        self.sessions.push(Session {
            att: a,
            link,
            node,
            to_copy: Way::new(self.now),
            to_att: Way::new(self.now),
        });
        self.atts[a].links[link] = Some(s);
        self.seen.count("connection");
        let boot = self.nodes[node].boot;
        self.say(|_| format!("att {a}: link {link} connected to node {node} by session {s}"));
        self.atts[a].machine.on_connected(now, link, boot);
    }

    /// The attachment ends a connection. What it sent before may still arrive, or the first part of it.
    pub fn hangup(&mut self, a: usize, link: usize) {
        self.atts[a].dials[link] += 1;
        let Some(s) = self.atts[a].links[link].take() else {
            return;
        };
        self.sessions[s].to_att.open = false;
        let (from, to) = (self.atts[a].node, self.sessions[s].node);
        if from == to {
            return self.at(self.now, Ev::CopyClosed(s));
        }
        if let Some(at) = self.cut(s, true) {
            let at = at.max(self.partitions.until(from, to, self.now));
            self.at(at, Ev::CopyClosed(s));
        }
    }
}

/// Puts a message on its way: when it arrives, and its number.
fn on_its_way(way: &mut Way, at: u64) -> (u64, u64) {
    way.last = at.max(way.last);
    way.sent += 1;
    assert!(
        way.sent - way.arrived <= UNDER_WAY_MAX,
        "S19: {} messages under way in one direction of a connection",
        way.sent - way.arrived
    );
    (way.last, way.sent - 1)
}
