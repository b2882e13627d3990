//! The operator's scrubs: at any moment of the rough weather, when nothing may be found that is not there (S21), and at the end on
//! copies that have rotted, when it must be found, and mended as reads say.

use std::collections::BTreeSet;

use lockstep::replication::ids::{NodeName, SECTOR};
use lockstep::replication::scrub::{BLOCK, Outcome, Place, Progress, View};

use super::world::{Ev, MS, World};

/// Sectors of a block, the finest that a scrub tells.
const PER_BLOCK: usize = BLOCK as usize / SECTOR as usize;
/// What rot makes of a sector's stamp: none that a guest writes.
const ROT: u64 = 1 << 60;

/// What the world remembers of scrubs.
#[derive(Default)]
pub struct Scrubs {
    last: u64,
    /// Sectors that ever rotted, on any copy, and those that could not be read.
    pub rotted: BTreeSet<usize>,
    pub spoiled: BTreeSet<usize>,
}

impl World {
    /// One more, unless the weather has none.
    pub fn scrub_now_and_then(&mut self) {
        if !self.faults || !self.weather.scrub {
            return;
        }
        let wait = self.rng.between(200, 4_000) * MS;
        self.after(wait, Ev::Scrub);
        if let Some(a) = self.live() {
            // Now and then somebody has enough of the one that is under way.
            if self.rng.one_in(8)
                && let Some(view) = self.view(a)
                && view.progress == Progress::Running
            {
                let node = self.atts[a].node;
                let now = self.clock(node);
                self.atts[a].machine.stop_scrub(now, view.id);
                self.seen.count("scrub stopped");
            }
            let repair = self.rng.one_in(2);
            self.ask_scrub(a, repair);
        }
    }

    /// Asks for a scrub; its id, if the attachment takes it.
    fn ask_scrub(&mut self, a: usize, repair: bool) -> Option<u64> {
        self.scrubs.last += 1;
        let (id, node) = (self.scrubs.last, self.atts[a].node);
        let now = self.clock(node);
        let taken = self.atts[a].machine.scrub(now, id, repair).is_ok();
        if self.nodes[node].paused_until <= self.now {
            self.pump(node);
        }
        taken.then_some(id)
    }

    fn view(&self, a: usize) -> Option<View> {
        self.atts[a].machine.status().scrub
    }

    /// The attachment says something about its scrub.
    pub fn note_scrub(&mut self, a: usize, rule: &str) {
        let Some(view) = self.view(a).filter(|_| rule.starts_with("11.6")) else {
            return;
        };
        match rule {
            "11.6 difference" => self.check_places(&view),
            "11.6 scrub ends" => {
                self.check_places(&view);
                self.seen.count("scrub ended");
                self.seen.times(
                    "sector mended by a scrub",
                    view.report.mended_bytes / SECTOR,
                );
                if view.report.misread_chunks > 0 {
                    self.seen.count("scrub that looked twice");
                }
            }
            "11.6 scrub broke off" => self.seen.count("scrub broke off"),
            _ => {}
        }
    }

    /// S21: each block that is said to differ did: it rotted somewhere. Nothing else makes copies differ for good. And what is
    /// said to be unreadable was, on some copy.
    fn check_places(&self, view: &View) {
        for place in view.report.places() {
            let (what, known) = match place.outcome {
                Outcome::Differs => ("that copies differ", &self.scrubs.rotted),
                _ => ("that a disk cannot read", &self.scrubs.spoiled),
            };
            for block in blocks(place) {
                assert!(
                    known.range(block.clone()).next().is_some(),
                    "S21: a scrub says {what} in sectors {block:?}, where nothing ever was: {place:?}"
                );
            }
        }
    }

    /// Runs until that scrub is over.
    fn await_scrub(&mut self, a: usize, id: u64) -> View {
        let patience = self.now + 60_000 * MS;
        loop {
            let view = self.view(a).filter(|v| v.id == id);
            let view = view.expect("the attachment knows its scrub");
            if view.progress != Progress::Running {
                return view;
            }
            assert!(
                self.now < patience,
                "liveness: faults have stopped, and a scrub is at {} of {} bytes after 60 s",
                view.done_bytes,
                view.total_bytes
            );
            let next = self.now + 100 * MS;
            self.run_until(next);
        }
    }

    /// The last scrub, to its end; with load or without.
    fn scrubbed(&mut self, repair: bool, load: bool) -> View {
        let a = self.live().unwrap();
        self.guest_stopped = !load;
        if load {
            self.budget = 300;
            self.after(0, Ev::Guest(a));
        }
        if let Some(before) = self.view(a) {
            self.await_scrub(a, before.id);
        }
        let id = self.ask_scrub(a, repair).expect("it serves");
        let view = self.await_scrub(a, id);
        self.guest_stopped = true;
        let patience = self.now + 60_000 * MS;
        while self.now < patience && !self.settled() {
            let next = self.now + 500 * MS;
            self.run_until(next);
        }
        assert!(self.settled(), "liveness: the volume stays busy");
        view
    }

    /// After everything else, with all copies the same: one rots, is found out, and is mended.
    pub fn scrub_at_the_end(&mut self) {
        let a = self.live().unwrap();
        let in_sync = self.in_sync();
        let failed = in_sync.iter().any(|c| self.disk(*c).failed);
        if !self.weather.scrub || failed || !self.atts[a].machine.mode_serves() {
            return;
        }
        let load = self.rng.one_in(2);
        let view = self.scrubbed(self.weather.scrub_repairs, load);
        assert_eq!(view.progress, Progress::Done, "liveness: a calm scrub ends");
        assert_eq!(view.report.left_bytes(), 0, "S21: {view:?}");
        let record = &self.registry.record;
        let master = record.copy(record.master).unwrap().node.clone();
        let master = self.node_named(&master).unwrap();
        let replicas: Vec<usize> = in_sync.into_iter().filter(|n| *n != master).collect();
        if replicas.is_empty() {
            return;
        }
        // What rots at the master is what its guest reads: nothing can be compared with what it wrote any more.
        let at_master = self.rng.one_in(4);
        let victim = match at_master {
            true => master,
            false => self.rng.pick(&replicas),
        };
        if !self.let_rot(victim) {
            return;
        }
        let load = !at_master && self.rng.one_in(2);
        let view = self.scrubbed(false, load);
        self.check_found(victim, &view);
        let load = !at_master && self.rng.one_in(2);
        let view = self.scrubbed(true, load);
        let differed = differing(&view).count();
        assert!(
            view.progress == Progress::Done && view.report.left_bytes() == 0,
            "S21: not all is mended: {view:?}"
        );
        for c in self.in_sync() {
            let left = &self.disk(c).decayed;
            assert!(left.is_empty(), "S21: {left:?} still rot on copy {c}");
        }
        match at_master {
            // As the master has it, everywhere.
            true => self.check_identical(),
            false => self.verify(),
        }
        self.seen.times("rot mended by a scrub", differed as u64);
        if at_master {
            self.seen.times("rot of the master mended", differed as u64);
        }
    }

    /// Some sectors of the copy on `n` read as other than they were written, and no error.
    fn let_rot(&mut self, n: usize) -> bool {
        let touched = self.oracle.touched();
        if touched.is_empty() {
            return false;
        }
        for _ in 0..self.rng.between(1, 4) {
            let s = self.rng.pick(&touched);
            for s in s..s + self.rng.between(1, 10) as usize {
                let disk = self.nodes[n].disk.as_mut().unwrap();
                if disk.rots(s, ROT) {
                    self.scrubs.rotted.insert(s);
                }
            }
        }
        let rotten: Vec<usize> = self.disk(n).decayed.keys().copied().collect();
        self.say(|_| format!("copy {n} rots in {rotten:?}"));
        !rotten.is_empty()
    }

    /// What still rots was found, and who is alone with it.
    fn check_found(&mut self, victim: usize, view: &View) {
        assert_eq!(view.progress, Progress::Done, "liveness: a calm scrub ends");
        let alone: Vec<NodeName> = vec![self.nodes[victim].name.clone()];
        for s in self.disk(victim).decayed.keys() {
            let found = differing(view).find(|p| blocks(p).any(|b| b.contains(s)));
            let found = found.unwrap_or_else(|| {
                panic!(
                    "S21: copy {victim} rots in sector {s}, and a scrub did not see it: {view:?}"
                )
            });
            assert!(
                found.agree.contains(&alone) && !found.mended,
                "S21: copy {victim} alone rots, and a scrub says {found:?}"
            );
        }
        self.seen
            .times("rot found by a scrub", differing(view).count() as u64);
    }
}

fn differing(view: &View) -> impl Iterator<Item = &Place> {
    view.report
        .places()
        .filter(|p| p.outcome == Outcome::Differs)
}

/// The blocks of a place, as sectors.
fn blocks(place: &Place) -> impl Iterator<Item = std::ops::Range<usize>> {
    let (first, end) = (place.offset / SECTOR, (place.offset + place.len) / SECTOR);
    (first as usize..end as usize)
        .step_by(PER_BLOCK)
        .map(move |s| s..(s + PER_BLOCK).min(end as usize))
}
