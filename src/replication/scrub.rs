//! What copies answered when they were asked what they hold (PROTOCOL 11.6): who agrees with whom, where, and what is to
//! be done about it. Pure functions.

use std::collections::BTreeMap;

use super::copy_set::CopySet;
use super::ids::{NodeName, Span};

/// A difference is located this finely, in bytes: what a disk loses or damages is no smaller.
pub const BLOCK: u32 = 4096;
/// Places that a report names (S19); it counts the bytes of all. Whoever has more has lost a disk.
pub const PLACES_MAX: usize = 128;

/// How the copies compare in a range.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Copies that hold the same, the master's set first, then the largest.
    pub agree: Vec<CopySet>,
    /// Copies whose disk could not read it.
    pub unreadable: CopySet,
}

/// A [`Verdict`] in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All hold the same.
    Same,
    /// Some disks could not read it, the others hold the same.
    Unreadable,
    /// Copies hold different bytes.
    Differs,
    /// No disk could read it.
    Lost,
}

/// Weighs the answers, one of each copy: a hash, or nothing where its disk could not read.
pub fn judge(answers: impl Iterator<Item = (usize, Option<u128>)>, master: usize) -> Verdict {
    let mut groups: Vec<(u128, CopySet)> = Vec::new();
    let mut unreadable = CopySet::EMPTY;
    for (copy, hash) in answers {
        let Some(hash) = hash else {
            unreadable.insert(copy);
            continue;
        };
        match groups.iter_mut().find(|(of, _)| *of == hash) {
            Some((_, set)) => set.insert(copy),
            None => groups.push((hash, CopySet::one(copy))),
        }
    }
    let mut agree: Vec<CopySet> = groups.into_iter().map(|(_, set)| set).collect();
    agree.sort_by_key(|set| (!set.has(master), usize::MAX - set.len(), set.iter().next()));
    Verdict { agree, unreadable }
}

impl Verdict {
    /// In a word.
    pub fn outcome(&self) -> Outcome {
        match (self.agree.len(), self.unreadable.is_empty()) {
            (0, _) => Outcome::Lost,
            (1, true) => Outcome::Same,
            (1, false) => Outcome::Unreadable,
            _ => Outcome::Differs,
        }
    }

    /// Whether it is written anew: what a disk could not read always, as after a read of the guest; what differs when the
    /// operator asked for it.
    pub fn is_mended(&self, repair: bool) -> bool {
        match self.outcome() {
            Outcome::Same | Outcome::Lost => false,
            Outcome::Unreadable => true,
            Outcome::Differs => repair,
        }
    }
}

/// Blocks that are not well, all in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Where: whole blocks, but for the volume's end.
    pub span: Span,
    /// How copies compare there.
    pub verdict: Verdict,
    /// It was written anew, and all copies hold the same now.
    pub mended: bool,
}

/// The same, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// In a word.
    pub outcome: Outcome,
    /// The nodes of copies that hold the same, the master's set first.
    pub agree: Vec<Vec<NodeName>>,
    /// The nodes whose disk could not read it.
    pub unreadable: Vec<NodeName>,
    /// All copies hold the same now.
    pub mended: bool,
}

impl Place {
    /// Whether `next` is the same thing, and begins where this ends.
    fn precedes(&self, next: &Self) -> bool {
        let is_next = Self {
            offset: next.offset,
            len: next.len,
            ..self.clone()
        };
        self.offset + self.len == next.offset && is_next == *next
    }
}

/// What was found so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Bytes that were read on every in-sync copy and compared; what is a hole on all of them is not.
    pub compared_bytes: u64,
    /// Bytes of blocks in which copies differed.
    pub differing_bytes: u64,
    /// Bytes of blocks that some disks could not read, and the others agreed on.
    pub unreadable_bytes: u64,
    /// Bytes of blocks that no disk could read.
    pub lost_bytes: u64,
    /// Bytes of all these that are the same on every copy now.
    pub mended_bytes: u64,
    /// Chunks that seemed to differ and, looked at again, did not.
    pub misread_chunks: u64,
    places: BTreeMap<u64, Place>,
}

impl Report {
    /// Takes in a place. Chunks end in any order; what adjoins is one place.
    pub fn note(&mut self, place: Place) {
        let bytes = match place.outcome {
            Outcome::Same => return,
            Outcome::Differs => &mut self.differing_bytes,
            Outcome::Unreadable => &mut self.unreadable_bytes,
            Outcome::Lost => &mut self.lost_bytes,
        };
        *bytes += place.len;
        if place.mended {
            self.mended_bytes += place.len;
        }
        let mut place = place;
        let end = place.offset + place.len;
        if let Some(next) = self.places.get(&end)
            && place.precedes(next)
        {
            place.len += next.len;
            self.places.remove(&end);
        }
        let room = self.places.len() < PLACES_MAX;
        match self.places.range_mut(..place.offset).next_back() {
            Some((_, before)) if before.precedes(&place) => before.len += place.len,
            _ if room => {
                self.places.insert(place.offset, place);
            }
            _ => {}
        }
    }

    /// The places, in their order, at most [`PLACES_MAX`].
    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.places.values()
    }

    /// Bytes of blocks that are not well, as far as this scrub knows.
    pub fn left_bytes(&self) -> u64 {
        self.differing_bytes + self.unreadable_bytes + self.lost_bytes - self.mended_bytes
    }
}

/// How far a scrub is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// It goes on.
    Running,
    /// It has seen the whole volume.
    Done,
    /// It ended before that.
    BrokeOff(String),
}

/// A scrub for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Which.
    pub id: u64,
    /// What differs is written anew.
    pub repair: bool,
    /// How far it is.
    pub progress: Progress,
    /// Bytes of the volume that it is done with, from its beginning, holes counted.
    pub done_bytes: u64,
    /// Bytes of the volume.
    pub total_bytes: u64,
    /// Bytes of the volume in a second, lately.
    pub bytes_per_second: u64,
    /// What was found.
    pub report: Report,
    /// The nodes of copies that were not in sync all the time, and so not or not wholly compared.
    pub left_out: Vec<NodeName>,
}

/// All scrubs of an attachment, for the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Chunks compared.
    pub chunks: u64,
    /// Blocks in which copies differed.
    pub differences: u64,
    /// Blocks that a disk could not read.
    pub unreadable: u64,
    /// Blocks of both kinds that are the same on every copy now.
    pub repaired: u64,
}

/// The places in `span` where not all is well, from one verdict for each of its blocks; neighbours of one kind are one place.
pub fn places(span: Span, blocks: &[Verdict]) -> Vec<Finding> {
    let mut found: Vec<Finding> = Vec::new();
    for (i, verdict) in blocks.iter().enumerate() {
        if verdict.outcome() == Outcome::Same {
            continue;
        }
        let next = Finding {
            span: block(span, i),
            verdict: verdict.clone(),
            mended: false,
        };
        match found.last_mut() {
            Some(last) if last.span.end() == next.span.offset && last.verdict == next.verdict => {
                last.span.len += next.span.len;
            }
            _ => found.push(next),
        }
    }
    found
}

/// How many blocks `span` has.
pub fn blocks(span: Span) -> usize {
    span.len.div_ceil(BLOCK) as usize
}

/// The block `i` of `span`.
pub fn block(span: Span, i: usize) -> Span {
    let from = i as u32 * BLOCK;
    Span {
        offset: span.offset + u64::from(from),
        len: BLOCK.min(span.len - from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(copies: &[usize]) -> CopySet {
        copies.iter().copied().collect()
    }

    /// `a a b` is what copies 0, 1, 2 hold; `-` is what a disk could not read.
    fn verdict(held: &str, master: usize) -> Verdict {
        let answers = held.split(' ').enumerate();
        let hash = |text: &str| (text != "-").then(|| u128::from(text.as_bytes()[0]));
        judge(answers.map(|(copy, text)| (copy, hash(text))), master)
    }

    #[test]
    fn answers_say_who_agrees_with_whom_and_what_is_written_anew() {
        use Outcome::{Differs, Lost, Same, Unreadable};
        // (held by copies 0.., master, who agrees, unreadable, outcome, written anew without and with repair)
        type Row<'a> = (
            &'a str,
            usize,
            &'a [&'a [usize]],
            &'a [usize],
            Outcome,
            [bool; 2],
        );
        let table: &[Row<'_>] = &[
            ("a", 0, &[&[0]], &[], Same, [false, false]),
            ("-", 0, &[], &[0], Lost, [false, false]),
            ("a a", 0, &[&[0, 1]], &[], Same, [false, false]),
            ("a a a", 2, &[&[0, 1, 2]], &[], Same, [false, false]),
            ("a -", 0, &[&[0]], &[1], Unreadable, [true, true]),
            ("- a", 0, &[&[1]], &[0], Unreadable, [true, true]),
            ("- -", 0, &[], &[0, 1], Lost, [false, false]),
            ("a b", 0, &[&[0], &[1]], &[], Differs, [false, true]),
            ("a b", 1, &[&[1], &[0]], &[], Differs, [false, true]),
            // The master's first, though two are against it.
            ("a b b", 0, &[&[0], &[1, 2]], &[], Differs, [false, true]),
            ("a b b", 1, &[&[1, 2], &[0]], &[], Differs, [false, true]),
            ("a b c", 2, &[&[2], &[0], &[1]], &[], Differs, [false, true]),
            // The larger set first where the master says nothing.
            ("- a b b", 0, &[&[2, 3], &[1]], &[0], Differs, [false, true]),
            ("a - a b", 0, &[&[0, 2], &[3]], &[1], Differs, [false, true]),
            ("- - a", 0, &[&[2]], &[0, 1], Unreadable, [true, true]),
        ];
        for (held, master, agree, unreadable, outcome, mended) in table {
            let v = verdict(held, *master);
            let groups: Vec<CopySet> = agree.iter().map(|copies| set(copies)).collect();
            assert_eq!(v.agree, groups, "{held}, master {master}");
            assert_eq!(v.unreadable, set(unreadable), "{held}, master {master}");
            assert_eq!(v.outcome(), *outcome, "{held}, master {master}");
            assert_eq!([v.is_mended(false), v.is_mended(true)], *mended, "{held}");
        }
    }

    #[test]
    fn neighbouring_blocks_of_one_kind_are_one_place() {
        // A chunk that ends in half a block.
        let span = Span {
            offset: 1 << 20,
            len: 5 * BLOCK + BLOCK / 2,
        };
        assert_eq!(blocks(span), 6);
        let held = ["a a", "a b", "c d", "a -", "a a", "a b"];
        let verdicts: Vec<Verdict> = held.iter().map(|h| verdict(h, 0)).collect();
        let found = places(span, &verdicts);
        let spans: Vec<(u64, u32)> = found
            .iter()
            .map(|f| (f.span.offset - span.offset, f.span.len))
            .collect();
        let b = u64::from(BLOCK);
        assert_eq!(spans, [(b, 2 * BLOCK), (3 * b, BLOCK), (5 * b, BLOCK / 2)]);
        assert_eq!(found[1].verdict.unreadable, set(&[1]));
        assert!(places(span, &vec![verdict("a a", 0); 6]).is_empty());
    }

    #[test]
    fn a_report_joins_what_adjoins_in_whatever_order_and_counts_what_it_does_not_name() {
        let place = |offset: u64, mended: bool| Place {
            offset: offset * 4096,
            len: 4096,
            outcome: Outcome::Differs,
            agree: vec![vec![NodeName("n1".into())], vec![NodeName("n2".into())]],
            unreadable: Vec::new(),
            mended,
        };
        let mut report = Report::default();
        for (offset, mended) in [(5, false), (3, false), (4, false), (6, true), (9, false)] {
            report.note(place(offset, mended));
        }
        let found: Vec<(u64, u64)> = report
            .places()
            .map(|p| (p.offset / 4096, p.len / 4096))
            .collect();
        assert_eq!(found, [(3, 3), (6, 1), (9, 1)]);
        assert_eq!(
            (report.differing_bytes, report.left_bytes()),
            (5 * 4096, 4 * 4096)
        );
        (0..2 * PLACES_MAX as u64).for_each(|i| report.note(place(100 + 2 * i, false)));
        assert_eq!(report.places().count(), PLACES_MAX);
        assert_eq!(report.differing_bytes, (5 + 2 * PLACES_MAX as u64) * 4096);
    }
}
