//! What happens to a cluster: faults by chance, the same ones for the same seed.

use std::time::Duration;

use super::net::{Cut, How};
use super::oracle::Random;

/// Something bad. Nodes 1 … R + 1 hold the copies, higher ones hold none.
#[derive(Clone, Debug)]
pub enum Fault {
    /// SIGKILL, and a new process after a time; with `wipe` on a new disk, if nobody counts on the old one by then.
    Kill {
        node: usize,
        down: Duration,
        wipe: bool,
    },
    /// SIGTERM, and a new process some time after the old one has ended.
    Term { node: usize, down: Duration },
    /// SIGSTOP, and SIGCONT after a time.
    Freeze { node: usize, span: Duration },
    /// Ways are cut for a time.
    Cut { cuts: Vec<Cut>, span: Duration },
    /// Nobody can change anything in the registry for a time.
    Registry { span: Duration },
    /// Somebody asks for something just now.
    Ask(Order),
}

/// What people ask of a volume.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// Another master.
    Promote { node: usize },
    /// A copy elsewhere.
    Move { from: usize, to: usize },
    /// More replicas, or fewer.
    Replicas(usize),
}

impl Fault {
    /// The node whose process it hits.
    pub fn hits(&self) -> Option<usize> {
        match self {
            Fault::Kill { node, .. } | Fault::Term { node, .. } | Fault::Freeze { node, .. } => {
                Some(*node)
            }
            Fault::Cut { .. } | Fault::Registry { .. } | Fault::Ask(_) => None,
        }
    }

    /// Its process will be another one.
    pub fn ends(&self, node: usize) -> bool {
        matches!(self, Fault::Kill { node: n, .. } | Fault::Term { node: n, .. } if *n == node)
    }
}

/// Faults at one time, and what follows.
#[derive(Clone, Debug)]
pub struct Step {
    pub faults: Vec<Fault>,
    /// The volume is to be served from this node next.
    pub to: Option<usize>,
    /// All is to be well again before the next step.
    pub settle: bool,
    pub pause: Duration,
}

/// A cluster and what happens to it.
#[derive(Clone, Debug)]
pub struct Schedule {
    pub nodes: usize,
    pub replicas: usize,
    /// Where the volume is served at first.
    pub first: usize,
    /// A missing copy gets a successor after this time instead of the default, a minute.
    pub replace_after: Option<Duration>,
    pub steps: Vec<Step>,
}

/// Draws a schedule.
struct Draw {
    random: Random,
    nodes: usize,
    replicas: usize,
    attached: usize,
    /// Pauses between steps are this part of what they could be.
    haste: u32,
}

impl Schedule {
    /// For a volume that moves about.
    pub fn new(seed: u64, steps: usize) -> Schedule {
        let mut draw = Draw::new(seed);
        let first = draw.attached;
        let replace_after = draw.replace_after();
        let steps = (0..steps).map(|_| draw.step()).collect();
        Schedule {
            nodes: draw.nodes,
            replicas: draw.replicas,
            first,
            replace_after,
            steps,
        }
    }

    /// For a volume that a guest uses on a node without a copy: nothing happens to that node's process.
    pub fn around_a_guest(seed: u64, steps: usize) -> Schedule {
        let mut draw = Draw::new(seed);
        (draw.nodes, draw.replicas, draw.attached) = (4, 2, 4);
        Schedule {
            nodes: 4,
            replicas: 2,
            first: 4,
            replace_after: None,
            steps: (0..steps).map(|_| draw.step_elsewhere()).collect(),
        }
    }
}

impl Draw {
    fn new(seed: u64) -> Draw {
        let mut random = Random::new(seed);
        // Seeds that are neighbours begin alike.
        for _ in 0..16 {
            random.next();
        }
        let replicas = 1 + random.below(3) as usize;
        let nodes = (replicas + 1 + random.below(2) as usize).clamp(3, 5);
        let attached = 1 + random.below(nodes as u64) as usize;
        let haste = [1, 1, 1, 6][random.below(4) as usize];
        Draw {
            random,
            nodes,
            replicas,
            attached,
            haste,
        }
    }

    /// Sooner than most faults end.
    fn replace_after(&mut self) -> Option<Duration> {
        self.chance(30).then_some(Duration::from_secs(1))
    }

    fn span(&mut self, from_ms: u64, to_ms: u64) -> Duration {
        Duration::from_millis(from_ms + self.random.below(to_ms - from_ms))
    }

    fn chance(&mut self, of_100: u64) -> bool {
        self.random.below(100) < of_100
    }

    /// A node that is not in the list.
    fn other(&mut self, than: &[usize]) -> usize {
        let left: Vec<usize> = (1..=self.nodes).filter(|n| !than.contains(n)).collect();
        left[self.random.below(left.len() as u64) as usize]
    }

    fn step(&mut self) -> Step {
        if self.chance(35) {
            self.step_here()
        } else {
            self.step_elsewhere()
        }
    }

    fn done(&mut self, faults: Vec<Fault>, to: Option<usize>) -> Step {
        self.attached = to.unwrap_or(self.attached);
        Step {
            faults,
            to,
            settle: self.chance(40),
            pause: self.span(100, 2_500) / self.haste,
        }
    }

    /// Nothing that ends the attachment.
    fn step_elsewhere(&mut self) -> Step {
        let here = self.attached;
        let node = self.other(&[here]);
        let faults = match self.random.below(100) {
            0..25 => vec![self.kill(node)],
            25..45 => vec![self.freeze(node)],
            45..65 => vec![self.cut()],
            65..72 => vec![self.term(node)],
            72..76 => vec![self.registry()],
            76..80 => vec![self.registry(), self.kill(node)],
            80..86 => vec![self.order()],
            86..89 => vec![self.order(), self.kill(node)],
            _ => {
                let second = self.other(&[here, node]);
                let mut one = |node| match self.random.below(3) {
                    0 => self.freeze(node),
                    1 => self.isolate(node),
                    _ => self.kill(node),
                };
                vec![one(node), one(second)]
            }
        };
        self.done(faults, None)
    }

    /// Something happens to the node that serves, or the volume leaves it.
    fn step_here(&mut self) -> Step {
        let here = self.attached;
        let elsewhere = self.other(&[here]);
        let (fault, to) = match self.random.below(100) {
            0..20 => (self.kill(here), None),
            20..40 => (self.kill(here), Some(elsewhere)),
            40..47 => (self.term(here), None),
            47..52 => (self.term(here), Some(elsewhere)),
            52..60 => (self.freeze(here), None),
            60..73 => {
                let span = self.span(4_500, 8_000);
                let fault = Fault::Freeze { node: here, span };
                (fault, Some(elsewhere))
            }
            73..81 => (self.isolate(here), None),
            81..95 => {
                let Fault::Cut { cuts, .. } = self.isolate(here) else {
                    unreachable!("isolation is a cut")
                };
                let span = self.span(4_500, 9_000);
                (Fault::Cut { cuts, span }, Some(elsewhere))
            }
            _ => return self.done(Vec::new(), Some(elsewhere)),
        };
        let mut faults = vec![fault];
        if self.chance(15) {
            let third = self.other(&[here, elsewhere]);
            faults.push(self.kill(third));
        }
        self.done(faults, to)
    }

    fn kill(&mut self, node: usize) -> Fault {
        let down = self.span(50, 4_000);
        let wipe = self.chance(20);
        Fault::Kill { node, down, wipe }
    }

    fn order(&mut self) -> Fault {
        let node = 1 + self.random.below(self.nodes as u64) as usize;
        Fault::Ask(match self.random.below(4) {
            0 | 1 => Order::Promote { node },
            2 => {
                let to = self.other(&[node]);
                Order::Move { from: node, to }
            }
            _ => Order::Replicas(1 + self.random.below(self.nodes as u64 - 1) as usize),
        })
    }

    fn term(&mut self, node: usize) -> Fault {
        let down = self.span(50, 2_000);
        Fault::Term { node, down }
    }

    fn freeze(&mut self, node: usize) -> Fault {
        let span = self.span(100, 6_000);
        Fault::Freeze { node, span }
    }

    fn registry(&mut self) -> Fault {
        let span = self.span(300, 4_000);
        Fault::Registry { span }
    }

    fn how(&mut self) -> How {
        match self.random.below(10) {
            0..5 => How::Drop,
            5..8 => How::Reset,
            _ => How::Lossy,
        }
    }

    fn cut(&mut self) -> Fault {
        if self.chance(50) {
            let node = 1 + self.random.below(self.nodes as u64) as usize;
            return self.isolate(node);
        }
        let a = 1 + self.random.below(self.nodes as u64) as usize;
        let b = self.other(&[a]);
        let how = self.how();
        let both = self.chance(50);
        let mut cuts = vec![Cut {
            from: a,
            to: b,
            how,
        }];
        if both {
            cuts.push(Cut {
                from: b,
                to: a,
                how,
            });
        }
        let span = self.span(200, 5_000);
        Fault::Cut { cuts, span }
    }

    /// From all others: both ways, or one.
    fn isolate(&mut self, node: usize) -> Fault {
        let how = self.how();
        let (out, back) = match self.random.below(4) {
            0 => (true, false),
            1 => (false, true),
            _ => (true, true),
        };
        let mut cuts = Vec::new();
        for other in (1..=self.nodes).filter(|n| *n != node) {
            let (there, home) = ((node, other), (other, node));
            for (from, to) in [(out, there), (back, home)]
                .into_iter()
                .filter_map(|(yes, way)| yes.then_some(way))
            {
                cuts.push(Cut { from, to, how });
            }
        }
        let span = self.span(200, 5_000);
        Fault::Cut { cuts, span }
    }
}
