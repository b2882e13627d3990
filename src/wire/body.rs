//! Reading and writing the fields of variable bodies. A reader never allocates more than the bytes it holds can fill.

use super::WireError;
use crate::replication::ids::{
    COPIES_MAX, Chunk, CopyId, Epoch, NodeName, REGIONS_MAX, Region, Seq,
};
use crate::replication::message::{Absent, MAP_CHUNKS, RUNS_MAX, Status};

/// The longest text (a node's name, a refusal's words), in bytes.
pub const TEXT_MAX: usize = 256;
/// Answers in one `AckVec`: more than a loop turn collects at any queue depth the credits allow.
pub const ACKS_MAX: usize = 1024;
/// Bytes of one answer: sequence number and status.
const ACK_LEN: usize = 9;
/// Bytes of one absent copy: its id, its last epoch, whether writes are mirrored to it.
const ABSENT_LEN: usize = 25;
/// Bytes of one run of chunks: the first, how many.
const RUN_LEN: usize = 8;
/// Words of one map: a bit for each chunk that a `MapRead` may ask about.
pub const WORDS_MAX: usize = MAP_CHUNKS.div_ceil(64) as usize;
/// The longest body, in bytes: a disk's state with every region its log can hold.
pub const BODY_MAX: usize = 64 + 4 * REGIONS_MAX;

const _: () = {
    assert!(4 + ACKS_MAX * ACK_LEN <= BODY_MAX);
    assert!(64 + COPIES_MAX * ABSENT_LEN <= BODY_MAX);
    assert!(64 + TEXT_MAX <= BODY_MAX);
    assert!(64 + RUNS_MAX * RUN_LEN <= BODY_MAX);
    assert!(2 * (4 + WORDS_MAX * 8) <= BODY_MAX);
};

/// The longest start of `text` that fits [`TEXT_MAX`].
pub(super) fn clip(text: &str) -> &str {
    let mut end = text.len().min(TEXT_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A node's name is an identity, which must not be clipped.
pub(super) fn name(name: &NodeName) -> &str {
    assert!(
        name.0.len() <= TEXT_MAX,
        "a node's name has at most {TEXT_MAX} bytes"
    );
    &name.0
}

pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u16).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

pub(super) fn put_regions(out: &mut Vec<u8>, regions: &[Region]) {
    assert!(
        regions.len() <= REGIONS_MAX,
        "an activity log has at most {REGIONS_MAX} regions"
    );
    out.extend_from_slice(&(regions.len() as u32).to_le_bytes());
    for region in regions {
        out.extend_from_slice(&region.0.to_le_bytes());
    }
}

pub(super) fn put_absent(out: &mut Vec<u8>, absent: &[Absent]) {
    assert!(
        absent.len() <= COPIES_MAX,
        "a volume has at most {COPIES_MAX} copies"
    );
    out.extend_from_slice(&(absent.len() as u32).to_le_bytes());
    for a in absent {
        out.extend_from_slice(&a.copy_id.0);
        out.extend_from_slice(&a.last.0.to_le_bytes());
        out.push(u8::from(a.mirrored));
    }
}

pub(super) fn put_acks(out: &mut Vec<u8>, acks: &[(Seq, Status)]) {
    assert!(
        acks.len() <= ACKS_MAX,
        "one AckVec has at most {ACKS_MAX} answers"
    );
    out.extend_from_slice(&(acks.len() as u32).to_le_bytes());
    for (seq, status) in acks {
        out.extend_from_slice(&seq.0.to_le_bytes());
        out.push(status_code(*status));
    }
}

/// One map of a `MapReply`.
pub(super) fn put_words(out: &mut Vec<u8>, words: &[u64]) {
    assert!(
        words.len() <= WORDS_MAX,
        "a map has at most {WORDS_MAX} words"
    );
    out.extend_from_slice(&(words.len() as u32).to_le_bytes());
    for word in words {
        out.extend_from_slice(&word.to_le_bytes());
    }
}

pub(super) fn put_runs(out: &mut Vec<u8>, runs: &[(Chunk, u32)]) {
    assert!(
        runs.len() <= RUNS_MAX,
        "one Clear has at most {RUNS_MAX} runs"
    );
    out.extend_from_slice(&(runs.len() as u32).to_le_bytes());
    for &(first, count) in runs {
        put_run(out, first, count);
    }
}

pub(super) fn put_run(out: &mut Vec<u8>, first: Chunk, count: u32) {
    assert!(
        run_is_sound(first, count),
        "a run has chunks, and they have numbers"
    );
    out.extend_from_slice(&first.0.to_le_bytes());
    out.extend_from_slice(&count.to_le_bytes());
}

/// Not empty, and the chunk behind its last one still has a number: nobody who goes along it overflows.
fn run_is_sound(first: Chunk, count: u32) -> bool {
    count > 0 && first.0.checked_add(count).is_some()
}

pub(super) fn status_code(status: Status) -> u8 {
    match status {
        Status::Ok => 0,
        Status::Io => 1,
        Status::NoSpace => 2,
        Status::Stale => 3,
    }
}

pub(super) fn status(code: u8) -> Result<Status, WireError> {
    match code {
        0 => Ok(Status::Ok),
        1 => Ok(Status::Io),
        2 => Ok(Status::NoSpace),
        3 => Ok(Status::Stale),
        _ => Err(WireError::Malformed("status")),
    }
}

/// Reads a body from front to back.
pub(super) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self
            .0
            .split_at_checked(len)
            .ok_or(WireError::Malformed("body: it ends too early"))?;
        self.0 = tail;
        Ok(head)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn u128(&mut self) -> Result<u128, WireError> {
        Ok(u128::from_le_bytes(self.array()?))
    }

    pub fn text(&mut self) -> Result<String, WireError> {
        let len = usize::from(self.u16()?);
        within("text", len, TEXT_MAX)?;
        let text = std::str::from_utf8(self.take(len)?);
        text.map(String::from)
            .map_err(|_| WireError::Malformed("text: not UTF-8"))
    }

    /// A count of at most `max`, and that many entries of `len` bytes each.
    fn list<T>(
        &mut self,
        what: &'static str,
        max: usize,
        len: usize,
        entry: impl Fn(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.u32()? as usize;
        within(what, count, max)?;
        let mut entries = Reader(self.take(count * len)?);
        let mut out = Vec::with_capacity(count);
        for _ in 0..count {
            out.push(entry(&mut entries)?);
        }
        Ok(out)
    }

    pub fn regions(&mut self) -> Result<Vec<Region>, WireError> {
        self.list("number of regions", REGIONS_MAX, 4, |r| {
            Ok(Region(r.u32()?))
        })
    }

    pub fn absent(&mut self) -> Result<Vec<Absent>, WireError> {
        self.list("number of absent copies", COPIES_MAX, ABSENT_LEN, |r| {
            Ok(Absent {
                copy_id: CopyId(r.array()?),
                last: Epoch(r.u64()?),
                mirrored: match r.u8()? {
                    0 => false,
                    1 => true,
                    _ => return Err(WireError::Malformed("absent copy")),
                },
            })
        })
    }

    pub fn acks(&mut self) -> Result<Vec<(Seq, Status)>, WireError> {
        self.list("number of answers", ACKS_MAX, ACK_LEN, |r| {
            Ok((Seq(r.u64()?), status(r.u8()?)?))
        })
    }

    /// One map of a `MapReply`.
    pub fn words(&mut self) -> Result<Vec<u64>, WireError> {
        self.list("number of words", WORDS_MAX, 8, Self::u64)
    }

    pub fn runs(&mut self) -> Result<Vec<(Chunk, u32)>, WireError> {
        self.list("number of runs", RUNS_MAX, RUN_LEN, Self::run)
    }

    pub fn run(&mut self) -> Result<(Chunk, u32), WireError> {
        let (first, count) = (Chunk(self.u32()?), self.u32()?);
        if !run_is_sound(first, count) {
            return Err(WireError::Malformed("run of chunks"));
        }
        Ok((first, count))
    }

    /// Nothing may be left over.
    pub fn end(self) -> Result<(), WireError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(WireError::Malformed("body: it is too long"))
        }
    }
}

/// Holds a length against its limit.
pub(super) fn within(what: &'static str, found: usize, limit: usize) -> Result<(), WireError> {
    if found > limit {
        return Err(WireError::TooLong {
            what,
            found: found as u64,
            limit: limit as u64,
        });
    }
    Ok(())
}
