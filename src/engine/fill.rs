//! How a range of a file is made zero: by whole blocks where the file system has a call for that, by writing zeros where it
//! has not, and at the edges. One step at a time; [`Disk`](super::disk::Disk) carries them out.
//!
//! The edges are written by ourselves, not left to the call, because it would zero them in the page cache, and buffered and
//! direct I/O on one block are not to be mixed (docs/DISK-FORMAT.md).

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use crate::replication::ids::{IO_MAX, Span};

/// What file systems give back, and the unit in which a call is asked for zeros.
const BLOCK: u64 = 4096;

/// Which calls a file takes. Found out by trying.
#[derive(Debug)]
pub struct Calls {
    punch: Cell<bool>,
    zero_range: Cell<bool>,
}

impl Default for Calls {
    fn default() -> Self {
        Self {
            punch: Cell::new(true),
            zero_range: Cell::new(true),
        }
    }
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// FALLOC_FL_PUNCH_HOLE: zeros that take no space.
    Punch(Span),
    /// FALLOC_FL_ZERO_RANGE: zeros that keep their space.
    ZeroRange(Span),
    /// Zeros written, at most [`IO_MAX`].
    Write(Span),
    /// fdatasync: there is no durable form of the calls.
    Sync,
}

/// A range under way.
#[derive(Debug)]
pub struct Fill {
    at: u64,
    end: u64,
    unmap: bool,
    dsync: bool,
    /// A call failed on this range.
    by_writing: bool,
    calls: Rc<Calls>,
}

impl Fill {
    /// All of `span` is to be done; with `unmap` its space may be given back, with `dsync` the zeros are to be durable.
    pub fn new(span: Span, unmap: bool, dsync: bool, calls: &Rc<Calls>) -> Self {
        Self {
            at: span.offset,
            end: span.end(),
            unmap,
            dsync,
            by_writing: false,
            calls: Rc::clone(calls),
        }
    }

    /// What to do next; `None` when all is done.
    pub fn step(&self) -> Option<Step> {
        let to = |end: u64| Span {
            offset: self.at,
            len: (end - self.at) as u32,
        };
        if self.at == self.end {
            return self.dsync.then_some(Step::Sync);
        }
        if !self.at.is_multiple_of(BLOCK) {
            return Some(Step::Write(to(self
                .end
                .min(self.at.next_multiple_of(BLOCK)))));
        }
        let whole = self.end / BLOCK * BLOCK;
        let may_call = whole > self.at && !self.by_writing;
        if may_call && self.unmap && self.calls.punch.get() {
            Some(Step::Punch(to(whole)))
        } else if may_call && self.calls.zero_range.get() {
            Some(Step::ZeroRange(to(whole)))
        } else {
            Some(Step::Write(to(self.end.min(self.at + u64::from(IO_MAX)))))
        }
    }

    /// How the step ended that [`Fill::step`] gave. A call that failed is no error: whether the range can be zero, writing it
    /// tells. A full file system may refuse to punch a hole, for instance, and still take zeros where there were data.
    ///
    /// # Errors
    ///
    /// The disk's.
    pub fn ended(&mut self, step: Step, result: io::Result<()>) -> io::Result<()> {
        match (step, result) {
            (Step::Sync, result) => {
                self.dsync = false;
                result
            }
            (Step::Punch(span) | Step::ZeroRange(span) | Step::Write(span), Ok(())) => {
                self.at = span.end();
                Ok(())
            }
            (Step::Write(_), Err(e)) => Err(e),
            (Step::Punch(_), Err(e)) => {
                self.refused(&self.calls.clone().punch, "give space back", &e);
                Ok(())
            }
            (Step::ZeroRange(_), Err(e)) => {
                self.refused(&self.calls.clone().zero_range, "zero ranges", &e);
                Ok(())
            }
        }
    }

    fn refused(&mut self, call: &Cell<bool>, what: &str, error: &io::Error) {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL) => {
                if call.replace(false) {
                    log::info!(
                        "the file system of a copy cannot {what} ({error}); it is done another way"
                    );
                }
            }
            _ => self.by_writing = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn error(errno: i32) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(errno))
    }

    /// The steps that make `offset`..`end` zero when the calls answer this, and writing goes well.
    fn steps(
        (offset, end): (u64, u64),
        (unmap, dsync): (bool, bool),
        calls: &Rc<Calls>,
        punch: i32,
        zero_range: i32,
    ) -> Vec<Step> {
        let span = Span {
            offset,
            len: (end - offset) as u32,
        };
        let mut fill = Fill::new(span, unmap, dsync, calls);
        let mut steps = Vec::new();
        while let Some(step) = fill.step() {
            steps.push(step);
            assert!(steps.len() < 100);
            let errno = match step {
                Step::Punch(_) => punch,
                Step::ZeroRange(_) => zero_range,
                Step::Write(_) | Step::Sync => 0,
            };
            let result = if errno == 0 { Ok(()) } else { error(errno) };
            fill.ended(step, result).unwrap();
        }
        steps
    }

    fn at(offset: u64, end: u64) -> Span {
        let len = (end - offset) as u32;
        Span { offset, len }
    }

    #[test]
    fn whole_blocks_are_called_for_and_edges_are_written() {
        use Step::{Punch, Sync, Write, ZeroRange};
        // (offset and length, unmap and dsync, steps)
        type Case<'a> = ((u64, u64), (bool, bool), &'a [Step]);
        let table: &[Case<'_>] = &[
            ((0, 4 * MIB), (true, false), &[Punch(at(0, 4 * MIB))]),
            ((0, 4 * MIB), (false, false), &[ZeroRange(at(0, 4 * MIB))]),
            ((4096, 8192), (true, true), &[Punch(at(4096, 8192)), Sync]),
            ((512, 4096), (true, false), &[Write(at(512, 4096))]),
            ((512, 1024), (true, true), &[Write(at(512, 1024)), Sync]),
            ((0, 512), (true, false), &[Write(at(0, 512))]),
            (
                (3584, 4608),
                (true, false),
                &[Write(at(3584, 4096)), Write(at(4096, 4608))],
            ),
            (
                (512, 3 * 4096 + 512),
                (true, true),
                &[
                    Write(at(512, 4096)),
                    Punch(at(4096, 3 * 4096)),
                    Write(at(3 * 4096, 3 * 4096 + 512)),
                    Sync,
                ],
            ),
        ];
        for (range, how, expected) in table {
            assert_eq!(steps(*range, *how, &Rc::default(), 0, 0), *expected);
        }
    }

    #[test]
    fn what_a_file_system_does_not_know_is_asked_once_and_then_written() {
        use Step::{Punch, Write, ZeroRange};
        let calls = Rc::default();
        let range = (0, 2 * MIB + 512);
        let no = libc::EOPNOTSUPP;
        let written = [
            Write(at(0, MIB)),
            Write(at(MIB, 2 * MIB)),
            Write(at(2 * MIB, 2 * MIB + 512)),
        ];
        let first = steps(range, (true, false), &calls, no, no);
        let whole = at(0, 2 * MIB);
        assert_eq!(first[..2], [Punch(whole), ZeroRange(whole)]);
        assert_eq!(first[2..], written);
        assert_eq!(steps(range, (true, false), &calls, 0, 0), written);
        assert_eq!(steps(range, (false, false), &calls, 0, 0), written);
        // One that knows holes only, as files in memory do.
        let calls = Rc::default();
        steps(range, (false, false), &calls, 0, no);
        assert_eq!(
            steps((0, MIB), (true, false), &calls, 0, 0),
            [Punch(at(0, MIB))]
        );
    }

    #[test]
    fn a_call_that_fails_for_another_reason_is_tried_again_on_the_next_range() {
        use Step::{Punch, Write};
        let calls = Rc::default();
        for errno in [libc::ENOSPC, libc::EINTR, libc::EIO] {
            let found = steps((0, 4096), (true, false), &calls, errno, 0);
            assert_eq!(found, [Punch(at(0, 4096)), Write(at(0, 4096))]);
        }
        assert_eq!(
            steps((0, 4096), (true, false), &calls, 0, 0),
            [Punch(at(0, 4096))]
        );
    }

    #[test]
    fn a_write_or_a_sync_that_fails_is_the_end() {
        let mut fill = Fill::new(at(0, 512), true, true, &Rc::default());
        let write = fill.step().unwrap();
        assert!(fill.ended(write, error(libc::EIO)).is_err());
        fill.ended(write, Ok(())).unwrap();
        assert_eq!(fill.step(), Some(Step::Sync));
        assert!(fill.ended(Step::Sync, error(libc::EIO)).is_err());
    }
}
