//! What the runs have met: counted, reported in the last line, and some of it demanded (PROTOCOL 9, non-vacuity).

use std::collections::BTreeMap;
use std::fmt;

#[derive(Clone, Default)]
pub struct Seen(BTreeMap<&'static str, u64>);

impl Seen {
    pub fn count(&mut self, what: &'static str) {
        self.times(what, 1);
    }

    pub fn times(&mut self, what: &'static str, n: u64) {
        *self.0.entry(what).or_default() += n;
    }

    /// Keeps the largest.
    pub fn most(&mut self, what: &'static str, n: u64) {
        let most = self.0.entry(what).or_default();
        *most = n.max(*most);
    }

    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    pub fn add(&mut self, other: &Self) {
        for (what, n) in &other.0 {
            if what.starts_with("most ") {
                self.most(what, *n);
            } else {
                self.times(what, *n);
            }
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self
            .0
            .iter()
            .map(|(what, n)| format!("{what} {n}"))
            .collect();
        f.write_str(&all.join(", "))
    }
}

/// Each of these so often at least.
pub const OFTEN: &[(&str, u64)] = &[
    ("region left the log", 300),
    ("region left the log while a copy was missing", 100),
];

/// Without each of these the suite has proved little.
pub const DEMANDED: &[&str] = &[
    "promotion",
    "promotion with differing copies",
    "chunks reconciled",
    "ejection",
    "ambiguous CAS",
    "read held back by an expired lease",
    "isolated attachment fenced",
    "second attach refused by a copy",
    "attach with one copy left",
    "suspension",
    "suspension ended",
    "failed",
    "swap asked of a registry that is away",
    "late swap that happened",
    "message on a slow link",
    "disk died of a write",
    "disk died of a flush",
    "disk died while its equal was away",
    "full disk",
    "power cut of one in-sync copy",
    "request while chunks are undecided",
    "power loss of all in-sync copies",
    "failed read answered by another copy",
    "one-way partition",
    "half-open connection",
    "connection reset in the middle",
    "rot of a superblock",
    "rot of a log",
    "unreadable log written anew",
    "rot of a bitmap",
    "delta rejoin",
    "full sync",
    "interrupted sync resumed",
    "in sync under constant writes",
    "disk wiped",
    "copy replaced",
    "copy added",
    "copy removed",
    "sector repaired",
    "volume grown",
    "growth refused",
    "discard completed",
    "write-zeroes completed",
    "chunk given back",
    "zeros under way at a crash",
    "zeros on a copy that is brought up to date",
    "chunk of zeros brought up to date",
    "scrub ended",
    "scrub broke off",
    "scrub stopped",
    "sector mended by a scrub",
    "rot found by a scrub",
    "rot mended by a scrub",
    "rot of the master mended",
];
