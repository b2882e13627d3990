//! Disk operations of one worker: io_uring where a file can wait for a disk, plain system calls
//! where it cannot (files in memory: there a call is a copy, and io_uring would move it to another
//! thread).
//!
//! Operations are prepared by [`Disk::write`] and its siblings, handed to the kernel together by
//! [`Disk::submit`], and reported by [`Disk::completed`] under the token they were given.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::Rc;

use io_uring::{IoUring, opcode, types};
use xxhash_rust::xxh3::xxh3_128;

use super::buffer::{ALIGN, Buffer, Bytes, GuestPart, Pinned};
use super::extents::Walk;
use super::fill::{Calls, Fill, Step};
use crate::guest::{IoVec, copy_to_guest};
use crate::replication::ids::{Chunk, IO_MAX, Nanos, Seq, Span};
use crate::replication::in_flight::InFlight;

/// Entries of the submission queue, and operations that the kernel has at once; more wait here.
const ENTRIES: u32 = 1024;

/// How often an operation that the kernel did not begin is handed to it again, and the pause between two attempts: five
/// seconds in all, after which a copy counts as late anyway.
const ATTEMPTS: u8 = 200;
const ATTEMPT_PAUSE: Nanos = Nanos::from_ms(25);

/// Names an operation to whoever asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// The volume's number within the worker.
    pub volume: usize,
    /// The replica's ticket.
    pub ticket: Seq,
    /// What it is and how many bytes it moves, for the counters.
    pub work: Work,
}

/// Kinds of disk operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Data read, to be sent or to be hashed.
    Read(u32),
    /// Data written.
    Write(u32),
    /// Data made zero, their space kept.
    Zero(u32),
    /// Data made zero, their space given back.
    Discard(u32),
    /// fdatasync of the data.
    Flush,
    /// Superblock, log or bitmaps; the data file's extents.
    Meta,
}

/// What an operation that went well brings.
#[derive(Debug)]
pub enum Output {
    /// Nothing; or the bytes went to guest memory.
    Nothing,
    /// The bytes read.
    Data(Bytes),
    /// XXH3, 128 bits, of the bytes read.
    Hash(u128),
    /// Chunks that hold data: 64 a word, the first lowest.
    Allocated(Vec<u64>),
}

/// One finished operation.
#[derive(Debug)]
pub struct Completion {
    /// Whose.
    pub token: Token,
    /// When it was asked for.
    pub started: Nanos,
    /// `Ok` when all bytes were transferred.
    pub result: io::Result<Output>,
}

/// How a file is to be accessed.
#[derive(Debug)]
pub struct DataFile {
    file: Rc<File>,
    /// O_DIRECT is on: memory and offsets must be aligned to this; otherwise 1.
    align: usize,
    /// On tmpfs.
    memory: bool,
    calls: Rc<Calls>,
}

impl DataFile {
    /// `align` is 1 for a buffered file; `memory` says that it never waits for a disk.
    pub fn new(file: File, align: usize, memory: bool) -> Self {
        Self {
            file: Rc::new(file),
            align,
            memory,
            calls: Rc::default(),
        }
    }

    fn fits(&self, span: Span) -> bool {
        let align = self.align as u64;
        span.offset.is_multiple_of(align) && u64::from(span.len).is_multiple_of(align)
    }
}

/// What the kernel is using until an operation completes.
#[derive(Debug)]
enum Held {
    Nothing,
    /// Written from.
    Buffer {
        _buffer: Rc<Buffer>,
    },
    /// Read into.
    ReadBuffer(Buffer),
    /// Read into, for the hash only.
    HashBuffer(Buffer),
    /// Read into a buffer of ours, then copied to the guest.
    Bounce(Buffer, GuestPart),
    /// The kernel reads `_pieces` while the operation runs; the part keeps the guest's memory.
    Guest {
        part: Pinned,
        _pieces: Vec<IoVec>,
        /// Where, and the flags of a write.
        offset: u64,
        write: Option<i32>,
    },
    /// Written from.
    Meta {
        _bytes: Box<[u8]>,
    },
    /// A step of making a range zero.
    Fill {
        fill: Fill,
        step: Step,
        /// Written from, if the step writes.
        _zeros: Option<Rc<Buffer>>,
    },
}

#[derive(Debug)]
struct Running {
    token: Token,
    held: Held,
    /// Bytes expected; 0 for operations that answer 0.
    expect: usize,
    /// What a transfer of fewer bytes means.
    short: i32,
    started: Nanos,
    file: Rc<File>,
    attempts: u8,
}

/// A walk along a file's extents, under way.
struct Walking {
    token: Token,
    started: Nanos,
    file: Rc<File>,
    walk: Walk,
}

/// The worker's disk queue.
pub struct Disk {
    ring: IoUring,
    running: InFlight<(Running, io_uring::squeue::Entry)>,
    /// What the kernel did not begin, and when it is handed over again.
    refused: Vec<(Running, io_uring::squeue::Entry)>,
    again: Nanos,
    /// Prepared and not yet in the submission queue: any number, since all volumes share `running`.
    backlog: VecDeque<(Running, io_uring::squeue::Entry)>,
    unsubmitted: bool,
    /// Handed over and not completed. Kept at [`ENTRIES`], half of what the completion queue holds:
    /// were that to overflow, completions would wait in the kernel for a call that never comes.
    in_kernel: u32,
    walks: VecDeque<Walking>,
    /// [`IO_MAX`] zeros, once somebody needed them.
    zeros: Option<Rc<Buffer>>,
    done: VecDeque<Completion>,
    round: u64,
    /// The turn's time.
    pub now: Nanos,
}

impl Disk {
    /// Sets the queue up and has the kernel signal completions on `event`.
    pub fn new(event: RawFd) -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        ring.submitter().register_eventfd(event)?;
        Ok(Self {
            ring,
            running: InFlight::default(),
            refused: Vec::new(),
            again: Nanos::default(),
            backlog: VecDeque::new(),
            unsubmitted: false,
            in_kernel: 0,
            walks: VecDeque::new(),
            zeros: None,
            done: VecDeque::new(),
            round: 0,
            now: Nanos::default(),
        })
    }

    /// Writes `data` at `span`; durably when `dsync`.
    pub fn write(&mut self, token: Token, file: &DataFile, span: Span, data: Bytes, dsync: bool) {
        // A write that was failed while it waited is what it was then.
        let data = data.stable(false);
        if file.memory {
            let result = write_now(&file.file, span.offset, &data, dsync);
            let result = result.map(|()| Output::Nothing);
            return self.finished(token, result);
        }
        debug_assert!(file.fits(span), "requests are whole logical blocks");
        let flags = if dsync { libc::RWF_DSYNC } else { 0 };
        match data {
            Bytes::Buffer(buffer) => self.write_buffer(token, file, span, buffer, flags),
            Bytes::Guest(part) => {
                let pieces = part.pieces();
                if !aligned(&pieces, file.align) {
                    let buffer = Rc::new(part.copied());
                    return self.write_buffer(token, file, span, buffer, flags);
                }
                let entry = opcode::Writev::new(
                    fd(&file.file),
                    IoVec::as_raw(&pieces),
                    pieces.len() as u32,
                )
                .offset(span.offset)
                .rw_flags(flags)
                .build();
                let held = Held::Guest {
                    part: part.pin(),
                    _pieces: pieces,
                    offset: span.offset,
                    write: Some(flags),
                };
                self.start(token, &file.file, held, span.len as usize, entry);
            }
        }
    }

    fn write_buffer(
        &mut self,
        token: Token,
        file: &DataFile,
        span: Span,
        buffer: Rc<Buffer>,
        flags: i32,
    ) {
        let entry = opcode::Write::new(fd(&file.file), buffer.as_ptr(), span.len)
            .offset(span.offset)
            .rw_flags(flags)
            .build();
        let held = Held::Buffer { _buffer: buffer };
        self.start(token, &file.file, held, span.len as usize, entry);
    }

    /// Reads `span`, into `into` when it is guest memory, otherwise into a new buffer.
    pub fn read(&mut self, token: Token, file: &DataFile, span: Span, into: Option<Bytes>) {
        let guest = match into {
            Some(Bytes::Guest(part)) => Some(part),
            _ => None,
        };
        if file.memory {
            let result = match guest {
                None => read_now(&file.file, span).map(|b| Output::Data(Bytes::from_buffer(b))),
                Some(part) => read_guest_now(&file.file, span, &part).map(|()| Output::Nothing),
            };
            return self.finished(token, result);
        }
        let (held, entry) = match guest {
            None => {
                let (buffer, entry) = read_entry(file, span);
                (Held::ReadBuffer(buffer), entry)
            }
            Some(part) => {
                let pieces = part.pieces();
                if part.request.straight.get() && aligned(&pieces, file.align) {
                    let entry = opcode::Readv::new(
                        fd(&file.file),
                        IoVec::as_raw(&pieces),
                        pieces.len() as u32,
                    )
                    .offset(span.offset)
                    .build();
                    (
                        Held::Guest {
                            part: part.pin(),
                            _pieces: pieces,
                            offset: span.offset,
                            write: None,
                        },
                        entry,
                    )
                } else {
                    let (buffer, entry) = read_entry(file, span);
                    (Held::Bounce(buffer, part), entry)
                }
            }
        };
        self.start(token, &file.file, held, span.len as usize, entry);
    }

    /// Hashes `span`.
    pub fn hash(&mut self, token: Token, file: &DataFile, span: Span) {
        if file.memory {
            let result = read_now(&file.file, span).map(|b| Output::Hash(xxh3_128(&b)));
            return self.finished(token, result);
        }
        let (buffer, entry) = read_entry(file, span);
        let held = Held::HashBuffer(buffer);
        self.start(token, &file.file, held, span.len as usize, entry);
    }

    /// Finds out which of `count` chunks from `first` on hold data. Nothing waits for this but its own answer: each
    /// [`Disk::walk`] brings it on a little.
    pub fn allocated(&mut self, token: Token, file: &DataFile, first: Chunk, count: u32) {
        self.walks.push_back(Walking {
            token,
            started: self.now,
            file: Rc::clone(&file.file),
            walk: Walk::new(first, count),
        });
    }

    /// Takes one step of one walk. Call it once a turn, and do not sleep while there are [`Disk::walks`].
    pub fn walk(&mut self) {
        let Some(mut walking) = self.walks.pop_front() else {
            return;
        };
        let result = match walking.walk.step(&walking.file) {
            Ok(None) => return self.walks.push_back(walking),
            Ok(Some(words)) => Ok(Output::Allocated(words)),
            Err(e) => Err(e),
        };
        self.done.push_back(Completion {
            token: walking.token,
            started: walking.started,
            result,
        });
    }

    /// How long ago the oldest operation that has not ended was asked for.
    pub fn age(&self) -> Nanos {
        let waiting = self.backlog.iter().chain(&self.refused);
        let all = self.running.iter().map(|(_, running)| running);
        all.chain(waiting)
            .map(|(running, _)| running.started)
            .min()
            .map_or(Nanos::default(), |oldest| self.now.since(oldest))
    }

    /// Whether a walk is under way.
    pub fn walks(&self) -> bool {
        !self.walks.is_empty()
    }

    /// Makes `span` zero; with `unmap` its space may be given back, with `dsync` the zeros are durable.
    pub fn zero(&mut self, token: Token, file: &DataFile, span: Span, unmap: bool, dsync: bool) {
        let fill = Fill::new(span, unmap, dsync, &file.calls);
        let started = self.now;
        self.fill(token, started, Rc::clone(&file.file), fill);
    }

    /// Starts the next step of a range. Also for a file in memory: giving back thousands of pages takes its time.
    fn fill(&mut self, token: Token, started: Nanos, file: Rc<File>, fill: Fill) {
        let fallocate = |span: Span, mode| {
            opcode::Fallocate::new(fd(&file), u64::from(span.len))
                .offset(span.offset)
                .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
                .build()
        };
        let Some(step) = fill.step() else {
            let result = Ok(Output::Nothing);
            return self.done.push_back(Completion {
                token,
                started,
                result,
            });
        };
        let mut zeros = None;
        let entry = match step {
            Step::Punch(span) => fallocate(span, libc::FALLOC_FL_PUNCH_HOLE),
            Step::ZeroRange(span) => fallocate(span, libc::FALLOC_FL_ZERO_RANGE),
            Step::Write(span) => {
                let buffer = zeros.insert(Rc::clone(self.zeros.get_or_insert_with(|| {
                    let mut buffer = Buffer::new(IO_MAX as usize);
                    buffer.fill(0);
                    Rc::new(buffer)
                })));
                opcode::Write::new(fd(&file), buffer.as_ptr(), span.len)
                    .offset(span.offset)
                    .build()
            }
            Step::Sync => opcode::Fsync::new(fd(&file))
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        };
        let expect = match step {
            Step::Write(span) => span.len as usize,
            _ => 0,
        };
        self.run(
            Running {
                token,
                held: Held::Fill {
                    fill,
                    step,
                    _zeros: zeros,
                },
                expect,
                short: libc::ENOSPC,
                started,
                file,
                attempts: 0,
            },
            entry,
        );
    }

    /// fdatasync.
    pub fn sync(&mut self, token: Token, file: &DataFile) {
        if file.memory {
            let result = file.file.sync_data().map(|()| Output::Nothing);
            return self.finished(token, result);
        }
        let entry = opcode::Fsync::new(fd(&file.file))
            .flags(types::FsyncFlags::DATASYNC)
            .build();
        self.start(token, &file.file, Held::Nothing, 0, entry);
    }

    /// Writes metadata, durably.
    pub fn meta(&mut self, token: Token, file: &DataFile, offset: u64, bytes: Box<[u8]>) {
        if file.memory {
            let result = write_all_at(&file.file, &bytes, offset).map(|()| Output::Nothing);
            return self.finished(token, result);
        }
        let len = bytes.len();
        let entry = opcode::Write::new(fd(&file.file), bytes.as_ptr(), len as u32)
            .offset(offset)
            .rw_flags(libc::RWF_DSYNC)
            .build();
        self.start(token, &file.file, Held::Meta { _bytes: bytes }, len, entry);
    }

    fn start(
        &mut self,
        token: Token,
        file: &Rc<File>,
        held: Held,
        expect: usize,
        entry: io_uring::squeue::Entry,
    ) {
        self.start_at(self.now, token, file, held, expect, entry);
    }

    fn start_at(
        &mut self,
        started: Nanos,
        token: Token,
        file: &Rc<File>,
        held: Held,
        expect: usize,
        entry: io_uring::squeue::Entry,
    ) {
        let short = match held {
            Held::ReadBuffer(_) | Held::HashBuffer(_) | Held::Bounce(..) => libc::EIO,
            _ => libc::ENOSPC,
        };
        let running = Running {
            token,
            held,
            expect,
            short,
            started,
            file: Rc::clone(file),
            attempts: 0,
        };
        self.run(running, entry);
    }

    fn run(&mut self, running: Running, entry: io_uring::squeue::Entry) {
        self.backlog.push_back((running, entry));
    }

    fn finished(&mut self, token: Token, result: io::Result<Output>) {
        let started = self.now;
        self.done.push_back(Completion {
            token,
            started,
            result,
        });
    }

    /// Hands everything prepared to the kernel, in as few calls as the queue's size allows.
    pub fn submit(&mut self) -> io::Result<()> {
        if self.now >= self.again {
            self.backlog.extend(self.refused.drain(..));
        }
        while self.unsubmitted || (!self.backlog.is_empty() && self.in_kernel < ENTRIES) {
            {
                let mut queue = self.ring.submission();
                while self.in_kernel < ENTRIES
                    && !queue.is_full()
                    && let Some((running, entry)) = self.backlog.pop_front()
                {
                    let id = self.running.insert((running, entry.clone()));
                    let entry = entry.user_data(id.expect("no more than the kernel has").0);
                    // SAFETY: the memory that the entry names is owned by `running` until its
                    // completion was taken from the ring.
                    unsafe { queue.push(&entry) }.expect("it is not full");
                    self.in_kernel += 1;
                    self.unsubmitted = true;
                }
            }
            match self.ring.submit() {
                Ok(_) => self.unsubmitted = !self.ring.submission().is_empty(),
                // Completions must be taken first; they are, before the next turn's submit.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Makes an operation again with memory of ours: now it can only be the disk's fault.
    fn again(&mut self, running: Running) {
        let Running {
            token,
            held,
            expect,
            started,
            file,
            ..
        } = running;
        let Held::Guest {
            part,
            offset,
            write,
            ..
        } = held
        else {
            return;
        };
        let part = part.part().clone();
        let (held, entry) = match write {
            Some(flags) => {
                let buffer = Rc::new(part.copied());
                let entry = opcode::Write::new(fd(&file), buffer.as_ptr(), part.len as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build();
                (Held::Buffer { _buffer: buffer }, entry)
            }
            None => {
                let buffer = Buffer::new(part.len);
                let entry = opcode::Read::new(fd(&file), buffer.as_ptr(), part.len as u32)
                    .offset(offset)
                    .build();
                (Held::Bounce(buffer, part), entry)
            }
        };
        self.start_at(started, token, &file, held, expect, entry);
    }

    /// Two operations that were completed in one round had both been done when the first of them was reported.
    pub fn round(&self) -> u64 {
        self.round
    }

    /// The next finished operation.
    pub fn completed(&mut self) -> Option<Completion> {
        if let Some(done) = self.done.pop_front() {
            return Some(done);
        }
        self.round += 1;
        let entries: Vec<(u64, i32)> = self
            .ring
            .completion()
            .map(|c| (c.user_data(), c.result()))
            .collect();
        self.in_kernel -= entries.len() as u32;
        for (id, result) in entries {
            self.reaped(id, result);
        }
        self.done.pop_front()
    }

    /// The kernel reported an operation.
    fn reaped(&mut self, id: u64, result: i32) {
        match self.running.remove(Seq(id)) {
            Some((running, entry)) if running.was_not_begun(result) => {
                let attempts = running.attempts + 1;
                self.refused.push((
                    Running {
                        attempts,
                        ..running
                    },
                    entry,
                ));
                self.again = self.now.after(ATTEMPT_PAUSE);
            }
            Some((running, _)) if running.doubts(result) => self.again(running),
            Some((running, _)) => self.ended(running, result),
            None => {}
        }
    }
}

impl Disk {
    fn ended(&mut self, running: Running, result: i32) {
        let result = running.outcome(result);
        let (token, started) = (running.token, running.started);
        let result = match running.held {
            Held::Fill { mut fill, step, .. } => match fill.ended(step, result) {
                Ok(()) => return self.fill(token, started, running.file, fill),
                Err(e) => Err(e),
            },
            held => result.map(|()| held.output()),
        };
        self.done.push_back(Completion {
            token,
            started,
            result,
        });
    }
}

impl Drop for Disk {
    /// The kernel must not write into memory that is given back.
    fn drop(&mut self) {
        loop {
            self.backlog.extend(self.refused.drain(..));
            if self.running.is_empty() && self.backlog.is_empty() {
                return;
            }
            if self.submit().is_err() || self.ring.submit_and_wait(1).is_err() {
                // Nothing is known of the rest: keep its memory for ever.
                std::mem::take(&mut self.running).leak();
                return;
            }
            while self.completed().is_some() {}
        }
    }
}

impl Running {
    /// The kernel had no thread or no memory for it (a limit on processes, say): that is no answer of the disk, and must not
    /// be the end of a copy. It was not begun, so that also a flush can be asked for again.
    fn was_not_begun(&self, result: i32) -> bool {
        matches!(-result, libc::ECANCELED | libc::EAGAIN) && self.attempts < ATTEMPTS
    }

    /// The guest's memory may be to blame, not the disk: the front-end took it away, or it is not of a kind that a disk
    /// can work with. Or the request was failed before it began, and has none.
    fn doubts(&self, result: i32) -> bool {
        let whole = result >= 0 && result as usize == self.expect;
        let memory = result >= 0 || result == -libc::EFAULT;
        matches!(self.held, Held::Guest { .. }) && !whole && memory
    }

    fn outcome(&self, result: i32) -> io::Result<()> {
        if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else if result as usize != self.expect {
            // Requests lie inside the file. A write falls short when the disk fills up, a read when
            // the file was cut behind our back.
            Err(io::Error::from_raw_os_error(self.short))
        } else {
            Ok(())
        }
    }
}

impl Held {
    /// Of an operation that went well.
    fn output(self) -> Output {
        match self {
            Held::ReadBuffer(buffer) => Output::Data(Bytes::from_buffer(buffer)),
            Held::HashBuffer(buffer) => Output::Hash(xxh3_128(&buffer)),
            Held::Bounce(buffer, part) => {
                // SAFETY: the part holds its request, so its pieces are mapped.
                unsafe { copy_to_guest(&buffer, &part.pieces()) };
                Output::Nothing
            }
            Held::Guest { .. }
            | Held::Buffer { .. }
            | Held::Meta { .. }
            | Held::Fill { .. }
            | Held::Nothing => Output::Nothing,
        }
    }
}

fn fd(file: &File) -> types::Fd {
    types::Fd(file.as_raw_fd())
}

fn aligned(pieces: &[IoVec], align: usize) -> bool {
    let align = if align > 1 { align.min(ALIGN) } else { 1 };
    pieces
        .iter()
        .all(|p| (p.ptr as usize).is_multiple_of(align) && p.len.is_multiple_of(align))
}

fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

/// A file in memory: the call copies and returns.
fn write_now(file: &File, offset: u64, data: &Bytes, dsync: bool) -> io::Result<()> {
    match data {
        Bytes::Buffer(buffer) => write_all_at(file, buffer, offset)?,
        Bytes::Guest(part) => {
            let pieces = part.pieces();
            // SAFETY: the part holds its request, so the pieces are mapped; the count is theirs.
            let wrote = unsafe {
                libc::pwritev(
                    file.as_raw_fd(),
                    IoVec::as_raw(&pieces),
                    pieces.len() as i32,
                    offset as i64,
                )
            };
            if usize::try_from(wrote) != Ok(part.len) {
                // As [`Running::doubts`]; and what else it may have been shows again.
                write_all_at(file, &part.copied(), offset)?;
            }
        }
    }
    if dsync { file.sync_data() } else { Ok(()) }
}

/// A buffer for `span`, and the request that fills it.
fn read_entry(file: &DataFile, span: Span) -> (Buffer, io_uring::squeue::Entry) {
    let buffer = Buffer::new(span.len as usize);
    let entry = opcode::Read::new(fd(&file.file), buffer.as_ptr(), span.len)
        .offset(span.offset)
        .build();
    (buffer, entry)
}

fn read_now(file: &File, span: Span) -> io::Result<Buffer> {
    let mut buffer = Buffer::new(span.len as usize);
    std::os::unix::fs::FileExt::read_exact_at(file, &mut buffer, span.offset)?;
    Ok(buffer)
}

fn read_guest_now(file: &File, span: Span, part: &GuestPart) -> io::Result<()> {
    let pieces = part.pieces();
    // SAFETY: the part holds its request, so the pieces are mapped; the count is theirs.
    let read = unsafe {
        libc::preadv(
            file.as_raw_fd(),
            IoVec::as_raw(&pieces),
            pieces.len() as i32,
            span.offset as i64,
        )
    };
    if usize::try_from(read) != Ok(part.len) {
        // As [`Running::doubts`]; and what else it may have been shows again.
        let buffer = read_now(file, span)?;
        // SAFETY: as above.
        unsafe { copy_to_guest(&buffer, &part.pieces()) };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A worker's disk queue whose event one can wait for.
    struct Bench {
        disk: Disk,
        event: vmm_sys_util::eventfd::EventFd,
    }

    impl Bench {
        fn new() -> Self {
            let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
            let disk = Disk::new(event.as_raw_fd()).unwrap();
            Self { disk, event }
        }

        fn one(&mut self, ask: impl FnOnce(&mut Disk, Token)) -> io::Result<Output> {
            let token = Token {
                volume: 3,
                ticket: Seq(9),
                work: Work::Meta,
            };
            ask(&mut self.disk, token);
            self.disk.submit().unwrap();
            loop {
                self.disk.walk();
                if let Some(done) = self.disk.completed() {
                    assert_eq!(done.token, token);
                    return done.result;
                }
                // What has several steps goes on.
                self.disk.submit().unwrap();
                if !self.disk.walks() {
                    self.event.read().unwrap();
                }
            }
        }
    }

    fn file(dir: &Path, memory: bool, bytes: &[u8]) -> DataFile {
        let file = tempfile::tempfile_in(dir).unwrap();
        write_all_at(&file, bytes, 0).unwrap();
        DataFile::new(file, 1, memory)
    }

    fn hash_of(span: Span, file: &DataFile) -> io::Result<Output> {
        Bench::new().one(|disk, token| disk.hash(token, file, span))
    }

    #[test]
    fn a_hash_is_the_same_on_every_way_to_the_file() {
        // Given 256 KiB that are nowhere the same, on a disk and in memory,
        let bytes: Vec<u8> = (0..65_536u32).flat_map(u32::to_le_bytes).collect();
        let (tmp, shm) = (std::env::temp_dir(), Path::new("/dev/shm"));
        let ways = [
            file(&tmp, false, &bytes),
            file(shm, true, &bytes),
            file(shm, false, &bytes),
        ];
        for (offset, len) in [(0, 65_536), (65_536, 65_536), (512, 512), (196_608, 65_536)] {
            let span = Span { offset, len };
            let expected = xxh3_128(&bytes[offset as usize..][..len as usize]);
            for file in &ways {
                // when a span is hashed, by io_uring or by a system call,
                let Ok(Output::Hash(found)) = hash_of(span, file) else {
                    panic!("a hash of {span:?}")
                };
                // then it is the hash of these bytes.
                assert_eq!(found, expected, "{span:?}");
            }
        }
        // It travels between nodes, so that the function itself is part of the protocol: XXH3's own test vector.
        assert_eq!(xxh3_128(b""), 0x99aa_06d3_0147_98d8_6001_c324_468d_497f);
    }

    #[test]
    fn a_hash_of_bytes_that_are_not_there_is_an_error() {
        let span = Span {
            offset: 4096,
            len: 4096,
        };
        for (dir, memory) in [(&std::env::temp_dir(), false), (&"/dev/shm".into(), true)] {
            let short = file(dir, memory, &[1; 6000]);
            assert!(hash_of(span, &short).is_err());
        }
    }

    #[test]
    fn a_range_is_zero_to_the_byte_and_its_space_is_given_back_or_kept() {
        let (tmp, shm) = (std::env::temp_dir(), Path::new("/dev/shm"));
        const LEN: usize = 3 << 20;
        for (dir, memory) in [(tmp.as_path(), false), (shm, true), (shm, false)] {
            for (offset, len) in [
                (0, 2 << 20),
                (4096, (2 << 20) + 512),
                (512, 512),
                (3584, 1 << 20),
            ] {
                for unmap in [true, false] {
                    let before = file(dir, memory, &vec![7; LEN]);
                    before.file.sync_all().unwrap();
                    let blocks = |f: &DataFile| {
                        std::os::unix::fs::MetadataExt::blocks(&f.file.metadata().unwrap()) * 512
                    };
                    let (had, span) = (blocks(&before), Span { offset, len });
                    let done = Bench::new().one(|disk, token| {
                        disk.zero(token, &before, span, unmap, true);
                    });
                    assert!(matches!(done, Ok(Output::Nothing)), "{done:?}");
                    let all = Span {
                        offset: 0,
                        len: 1 << 20,
                    };
                    for third in 0..3u64 {
                        let offset = third << 20;
                        let bytes = read_now(&before.file, Span { offset, ..all }).unwrap();
                        for (i, byte) in bytes.iter().enumerate() {
                            let at = offset + i as u64;
                            let inside = (span.offset..span.end()).contains(&at);
                            assert_eq!(*byte == 0, inside, "byte {at} after {span:?}");
                        }
                    }
                    // What is whole blocks is given back; a file system may keep what it needs for itself.
                    let whole = span.end() / 4096 * 4096;
                    let whole = whole.saturating_sub(span.offset.next_multiple_of(4096));
                    let left = blocks(&before);
                    if unmap && whole >= 1 << 20 {
                        assert!(left + whole / 2 < had, "{had} - {whole} bytes left {left}");
                    } else if !unmap {
                        assert!(left >= LEN as u64, "{left} bytes left of {had}");
                    }
                }
            }
        }
    }

    #[test]
    fn zeros_that_are_to_be_durable_are_synced_and_a_sync_that_fails_is_told() {
        // Given a file that takes zeros, only not by a call, and cannot be synced,
        let null = std::fs::OpenOptions::new().write(true).open("/dev/null");
        let null = DataFile::new(null.unwrap(), 1, false);
        let span = Span {
            offset: 0,
            len: 3 << 20,
        };
        for unmap in [true, false] {
            let zero =
                |dsync| Bench::new().one(|disk, token| disk.zero(token, &null, span, unmap, dsync));
            // when zeros need not be durable, then they are written, and that is all;
            assert!(matches!(zero(false), Ok(Output::Nothing)));
            // when they must be, then the sync is tried, and its failure is theirs.
            assert_eq!(zero(true).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        }
    }

    #[test]
    fn zeros_on_a_file_system_that_is_full_say_so() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full");
        let full = DataFile::new(full.unwrap(), 1, false);
        let span = Span {
            offset: 512,
            len: 8192,
        };
        let done = Bench::new().one(|disk, token| disk.zero(token, &full, span, true, false));
        assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn what_the_kernel_did_not_begin_is_handed_over_again_and_not_for_ever() {
        let null = DataFile::new(File::open("/dev/null").unwrap(), 1, false);
        let mut bench = Bench::new();
        let token = Token {
            volume: 3,
            ticket: Seq(9),
            work: Work::Flush,
        };
        for refusals in [3, usize::from(ATTEMPTS) + 1] {
            // Given a flush that the kernel, out of threads, cancels a number of times,
            bench.disk.sync(token, &null);
            for _ in 0..refusals {
                let prepared = bench.disk.backlog.pop_front().unwrap();
                let id = bench.disk.running.insert(prepared).unwrap();
                bench.disk.reaped(id.0, -libc::ECANCELED);
                bench.disk.submit().unwrap();
                assert!(bench.disk.running.is_empty(), "not before its time");
                bench.disk.now = bench.disk.now.after(ATTEMPT_PAUSE);
                bench.disk.backlog.extend(bench.disk.refused.drain(..));
            }
            let error = |bench: &mut Bench| {
                let done = bench.disk.completed().unwrap();
                done.result.unwrap_err().raw_os_error()
            };
            if refusals > usize::from(ATTEMPTS) {
                // then it has failed at last;
                assert_eq!(error(&mut bench), Some(libc::ECANCELED));
                continue;
            }
            // then it is handed over again, and what the file says counts.
            assert!(bench.disk.completed().is_none());
            bench.disk.submit().unwrap();
            bench.event.read().unwrap();
            assert_eq!(error(&mut bench), Some(libc::EINVAL));
        }
    }

    #[test]
    fn however_much_is_asked_of_a_disk_at_once_is_done() {
        // Given more operations than any table of those under way holds, of many volumes,
        const MANY: usize = 70_000;
        let null = DataFile::new(File::open("/dev/null").unwrap(), 1, false);
        let mut bench = Bench::new();
        for n in 0..MANY {
            let token = Token {
                volume: n,
                ticket: Seq(9),
                work: Work::Flush,
            };
            bench.disk.sync(token, &null);
        }
        // then each is handed to the kernel, whose answer is its own.
        let mut ended = vec![0; MANY];
        while ended.contains(&0) {
            bench.disk.submit().unwrap();
            bench.event.read().unwrap();
            while let Some(done) = bench.disk.completed() {
                let error = done.result.unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
                ended[done.token.volume] += 1;
            }
        }
        assert!(ended.iter().all(|n| *n == 1));
    }

    #[test]
    fn extents_are_reported_under_the_token_of_who_asked() {
        let file = file(&std::env::temp_dir(), false, &[1; 70_000]);
        let found = Bench::new().one(|disk, token| disk.allocated(token, &file, Chunk(0), 65));
        assert!(matches!(found, Ok(Output::Allocated(words)) if words == [3, 0]));
    }
}
