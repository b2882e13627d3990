//! How much happens at most in each run of the checker.

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::failure_mode::FailureMode;
use lockstep::replication::mutants::Mutant;

use super::state::COPIES;

/// See the module.
#[derive(Clone, Debug)]
pub struct Bound {
    pub name: &'static str,
    pub writes: u8,
    pub flushes: u8,
    pub crashes: u8,
    pub power_cuts: u8,
    /// Machines that lose power together.
    pub circuits: Vec<CopySet>,
    pub partitions: u8,
    /// The nodes that a partition may cut off, one at a time.
    pub cuts: CopySet,
    /// Connections that break, and copies that are late, for no reason.
    pub breaks: u8,
    /// Disks that fail.
    pub disks: u8,
    /// Swaps that nobody answers.
    pub ambiguous: u8,
    /// Of all these faults together.
    pub faults: u8,
    pub attachments: usize,
    /// Syncs at a time.
    pub sessions: usize,
    pub epochs: u64,
    /// Where the first attachment is; `COPIES` is a node without a copy.
    pub home: usize,
    /// Where others may start.
    pub starts: CopySet,
    /// Copies that are new.
    pub blank: CopySet,
    pub mode: FailureMode,
    /// A deliberate mistake.
    pub mistake: Option<Mutant>,
}

/// One power supply for all copies.
pub const ALL_COPIES: u16 = 0b111;

impl Bound {
    /// One write, no fault.
    pub fn quiet(name: &'static str) -> Self {
        Self {
            name,
            writes: 1,
            flushes: 0,
            crashes: 0,
            power_cuts: 0,
            circuits: [0b001, 0b010, 0b100, ALL_COPIES].map(CopySet).into(),
            partitions: 0,
            cuts: [0, 1, 2].into_iter().collect(),
            breaks: 0,
            disks: 0,
            ambiguous: 0,
            faults: 2,
            attachments: 2,
            sessions: 1,
            epochs: 6,
            home: 0,
            starts: [0, 1].into_iter().collect(),
            blank: CopySet::EMPTY,
            mode: FailureMode::AlwaysOn,
            mistake: None,
        }
    }

    /// From `writes=2,crashes=1,…`; sets of nodes as digits (`starts=01`), several circuits apart by `+`.
    pub fn described(text: &str) -> Self {
        let mut b = Self::quiet("as described");
        let digits = |v: &str| -> CopySet {
            let digit = |c: char| c.to_digit(10).expect("a set of nodes is a row of digits");
            v.chars().map(|c| digit(c) as usize).collect()
        };
        for part in text.split(',') {
            let (name, value) = part
                .split_once('=')
                .expect("NAME=VALUE, separated by commas");
            let number = || value.parse::<u8>().expect("a small number");
            match name {
                "writes" => b.writes = number(),
                "flushes" => b.flushes = number(),
                "crashes" => b.crashes = number(),
                "power_cuts" => b.power_cuts = number(),
                "circuits" => b.circuits = value.split('+').map(digits).collect(),
                "partitions" => b.partitions = number(),
                "cuts" => b.cuts = digits(value),
                "breaks" => b.breaks = number(),
                "disks" => b.disks = number(),
                "ambiguous" => b.ambiguous = number(),
                "faults" => b.faults = number(),
                "attachments" => b.attachments = number().into(),
                "sessions" => b.sessions = number().into(),
                "epochs" => b.epochs = number().into(),
                "home" => b.home = number().into(),
                "starts" => b.starts = digits(value),
                "blank" => b.blank = digits(value),
                other => panic!("a bound has no {other} (see tests/model/bounds.rs)"),
            }
        }
        b
    }

    pub fn makes(&self, mistake: Mutant) -> bool {
        self.mistake == Some(mistake)
    }

    /// Whether the model has to make a mistake that sits in one of the product's pure functions: there it is compiled in only
    /// with the feature `mutants`.
    pub fn shims(&self, mistake: Mutant) -> bool {
        self.makes(mistake) && !cfg!(feature = "mutants")
    }
}

fn set(nodes: &[usize]) -> CopySet {
    nodes.iter().copied().collect()
}

/// Those of the test: one fault of each kind, or the two that go together, each around one write or a flush.
pub fn small() -> Vec<Bound> {
    let quiet = Bound::quiet;
    vec![
        Bound {
            blank: set(&[2]),
            ..quiet("a new copy")
        },
        Bound {
            crashes: 1,
            starts: set(&[1]),
            epochs: 4,
            ..quiet("a crash")
        },
        Bound {
            disks: 1,
            ..quiet("a disk that fails")
        },
        Bound {
            breaks: 1,
            ambiguous: 1,
            attachments: 1,
            ..quiet("a late copy, and a swap that nobody answers")
        },
        Bound {
            partitions: 1,
            cuts: set(&[2]),
            attachments: 1,
            ..quiet("a copy cut off")
        },
        Bound {
            writes: 0,
            partitions: 1,
            cuts: set(&[0]),
            starts: set(&[1]),
            epochs: 2,
            ..quiet("an attachment cut off, and another one")
        },
        Bound {
            power_cuts: 1,
            circuits: vec![set(&[0])],
            starts: set(&[0]),
            epochs: 3,
            ..quiet("a power cut")
        },
        Bound {
            power_cuts: 1,
            circuits: vec![CopySet(ALL_COPIES)],
            starts: set(&[0]),
            epochs: 2,
            ..quiet("a power cut of all copies")
        },
        Bound {
            writes: 0,
            power_cuts: 1,
            circuits: vec![CopySet(ALL_COPIES)],
            home: COPIES,
            attachments: 1,
            epochs: 3,
            ..quiet("a power cut of all copies, not of the attachment")
        },
    ]
}

/// Those of `scripts/model`: two or three faults, or two writes. The one that takes longest needs 5 GB.
pub fn large() -> Vec<Bound> {
    let quiet = Bound::quiet;
    let crash_and_power_cut = Bound {
        crashes: 1,
        power_cuts: 1,
        epochs: 4,
        ..quiet("a crash and a power cut of the attachment's machine")
    };
    let cut_off = Bound {
        partitions: 1,
        cuts: set(&[0]),
        starts: set(&[1]),
        ..quiet("an attachment cut off, and another one, around a write")
    };
    vec![
        Bound {
            crashes: 1,
            flushes: 1,
            ..quiet("crash")
        },
        Bound {
            crashes: 2,
            ..quiet("crashes")
        },
        Bound {
            circuits: vec![set(&[0])],
            ..crash_and_power_cut.clone()
        },
        Bound {
            name: "a crash and a power cut of a replica's machine",
            circuits: vec![set(&[1])],
            ..crash_and_power_cut.clone()
        },
        Bound {
            name: "a crash and a power cut of all copies",
            circuits: vec![CopySet(ALL_COPIES)],
            epochs: 3,
            ..crash_and_power_cut.clone()
        },
        Bound {
            name: "two writes, a crash and a power cut of the attachment's machine",
            writes: 2,
            circuits: vec![set(&[0])],
            starts: set(&[1]),
            epochs: 3,
            ..crash_and_power_cut
        },
        Bound {
            writes: 2,
            crashes: 1,
            faults: 1,
            starts: set(&[1]),
            epochs: 4,
            ..quiet("two writes and a crash")
        },
        Bound {
            writes: 2,
            partitions: 1,
            cuts: set(&[2]),
            attachments: 1,
            ..quiet("two writes and a copy cut off")
        },
        Bound {
            disks: 1,
            partitions: 1,
            cuts: set(&[2]),
            attachments: 1,
            ..quiet("a disk that fails and a copy cut off")
        },
        Bound {
            partitions: 1,
            cuts: set(&[2]),
            ambiguous: 1,
            attachments: 1,
            ..quiet("a copy cut off and a swap that nobody answers")
        },
        Bound {
            epochs: 3,
            ..cut_off.clone()
        },
        Bound {
            name: "the same, and a swap that nobody answers",
            ambiguous: 1,
            epochs: 2,
            ..cut_off
        },
    ]
}
