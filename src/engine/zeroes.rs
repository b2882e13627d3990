//! Zeros that a guest asks for, discards and write-zeroes alike: cut where regions of the activity log end, and started a few
//! at a time.
//!
//! One request may ask for GiBs and carries no data that would hold it back, so nothing but this bounds what a guest can pile
//! up on the disks. Cuts that wait have no claim on their span: a write that the guest asked for later may overtake them, as
//! any two requests that are under way at once may.

use std::collections::VecDeque;
use std::rc::Rc;

use super::buffer::GuestRequest;
use crate::guest::{Request, Segment};
use crate::replication::ids::{Nanos, REGION, Span};

/// Cuts of one volume under way at once: 32 MiB at most. A disk that cannot give space back has to write them, and other
/// requests wait for a third of a second there (at 100 MB/s), not for the seconds after which a copy counts as late.
const AT_ONCE: usize = 8;

/// A cut of a request, to be started.
#[derive(Debug)]
pub struct Cut {
    /// Whose.
    pub guest: Rc<GuestRequest>,
    /// Where: within one region.
    pub span: Span,
    /// The space may be given back.
    pub unmap: bool,
    /// Durable before it is reported.
    pub fua: bool,
    /// When the request was taken.
    pub taken: Nanos,
}

#[derive(Debug)]
struct Job {
    guest: Rc<GuestRequest>,
    /// What is not started, none of it empty.
    segments: VecDeque<Segment>,
    fua: bool,
    taken: Nanos,
}

/// The requests for zeros of one volume that have something left to start.
#[derive(Debug, Default)]
pub struct Zeroes {
    jobs: VecDeque<Job>,
    under_way: usize,
}

impl Zeroes {
    /// Takes a request in. Gives it back if it asks for nothing.
    pub fn add(
        &mut self,
        request: Request,
        ring: u16,
        life: u64,
        fua: bool,
        taken: Nanos,
    ) -> Option<Request> {
        let empty = |s: &&Segment| s.len > 0;
        let segments: VecDeque<Segment> =
            request.segments().iter().filter(empty).copied().collect();
        let parts: usize = segments.iter().map(|s| span(s).regions().count()).sum();
        if parts == 0 {
            return Some(request);
        }
        self.jobs.push_back(Job {
            guest: GuestRequest::new(request, ring, life, parts as u32),
            segments,
            fua,
            taken,
        });
        None
    }

    /// The next cut, if one may start: in the order in which they were asked for.
    pub fn next(&mut self) -> Option<Cut> {
        let job = self.jobs.front_mut().filter(|_| self.under_way < AT_ONCE)?;
        let segment = job.segments.front_mut()?;
        let cut = Cut {
            guest: Rc::clone(&job.guest),
            unmap: segment.unmap,
            span: first_of(segment),
            fua: job.fua,
            taken: job.taken,
        };
        if segment.len == 0 {
            job.segments.pop_front();
        }
        if job.segments.is_empty() {
            self.jobs.pop_front();
        }
        self.under_way += 1;
        Some(cut)
    }

    /// A cut ended.
    pub fn ended(&mut self) {
        self.under_way -= 1;
    }

    /// Forgets what is left of requests that nobody waits for.
    pub fn retain(&mut self, wanted: impl Fn(&GuestRequest) -> bool) {
        self.jobs.retain(|job| wanted(&job.guest));
    }

    /// They.
    pub fn guests(&self) -> impl Iterator<Item = &Rc<GuestRequest>> {
        self.jobs.iter().map(|job| &job.guest)
    }

    /// Requests with something left to start.
    pub fn waiting(&self) -> usize {
        self.jobs.len()
    }
}

fn span(segment: &Segment) -> Span {
    Span {
        offset: segment.offset,
        len: segment.len,
    }
}

/// Takes what lies in the first region off a segment that is not empty.
fn first_of(segment: &mut Segment) -> Span {
    let region_end = (segment.offset / REGION + 1) * REGION;
    let len = u64::from(segment.len).min(region_end - segment.offset) as u32;
    let first = Span {
        offset: segment.offset,
        len,
    };
    segment.offset += u64::from(len);
    segment.len -= len;
    first
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest::MAX_ZERO_SECTORS;
    use crate::replication::ids::{SECTOR, ZERO_MAX};

    proptest! {
        #[test]
        fn a_segment_is_cut_into_what_each_region_has_of_it(
            first in 0..3 * REGION / SECTOR,
            sectors in 1..=MAX_ZERO_SECTORS,
        ) {
            let mut segment = Segment {
                offset: first * SECTOR,
                len: sectors * SECTOR as u32,
                unmap: true,
            };
            let whole = span(&segment);
            let mut at = whole.offset;
            for region in whole.regions() {
                let cut = first_of(&mut segment);
                prop_assert_eq!(cut.regions().collect::<Vec<_>>(), [region]);
                prop_assert_eq!(cut.offset, at);
                prop_assert!(cut.len > 0 && cut.len <= ZERO_MAX);
                at = cut.end();
            }
            prop_assert_eq!((at, segment.len), (whole.end(), 0));
        }
    }
}
