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

use super::buffer::{ALIGN, Buffer, Bytes, GuestPart};
use crate::guest::{IoVec, copy_from_guest, copy_to_guest};
use crate::replication::ids::{Nanos, Seq, Span};
use crate::replication::in_flight::InFlight;

/// Entries of the submission queue, and operations that the kernel has at once; more wait here.
const ENTRIES: u32 = 1024;

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
    /// Data read.
    Read(u32),
    /// Data written.
    Write(u32),
    /// Data made zero.
    Discard(u32),
    /// fdatasync of the data.
    Flush,
    /// Superblock, log or bitmaps.
    Meta,
}

/// One finished operation.
#[derive(Debug)]
pub struct Completion {
    /// Whose.
    pub token: Token,
    /// When it was asked for.
    pub started: Nanos,
    /// `Ok` when all bytes were transferred; reads bring them unless they went to guest memory.
    pub result: io::Result<Option<Bytes>>,
}

/// How a file is to be accessed.
#[derive(Debug)]
pub struct DataFile {
    file: Rc<File>,
    /// O_DIRECT is on: memory and offsets must be aligned to this; otherwise 1.
    align: usize,
    /// On tmpfs.
    memory: bool,
}

impl DataFile {
    /// `align` is 1 for a buffered file; `memory` says that it never waits for a disk.
    pub fn new(file: File, align: usize, memory: bool) -> Self {
        Self {
            file: Rc::new(file),
            align,
            memory,
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
    /// Read into a buffer of ours, then copied to the guest.
    Bounce(Buffer, GuestPart),
    /// The kernel reads `_pieces` while the operation runs; the part keeps the guest's memory.
    Guest {
        _part: GuestPart,
        _pieces: Vec<IoVec>,
    },
    /// Written from.
    Meta {
        _bytes: Box<[u8]>,
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
    _file: Rc<File>,
}

/// The worker's disk queue.
pub struct Disk {
    ring: IoUring,
    running: InFlight<Running>,
    /// Prepared and not yet in the submission queue.
    backlog: VecDeque<io_uring::squeue::Entry>,
    unsubmitted: bool,
    /// Handed over and not completed. Kept at [`ENTRIES`], half of what the completion queue holds:
    /// were that to overflow, completions would wait in the kernel for a call that never comes.
    in_kernel: u32,
    done: VecDeque<Completion>,
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
            backlog: VecDeque::new(),
            unsubmitted: false,
            in_kernel: 0,
            done: VecDeque::new(),
            now: Nanos::default(),
        })
    }

    /// Writes `data` at `span`; durably when `dsync`.
    pub fn write(&mut self, token: Token, file: &DataFile, span: Span, data: Bytes, dsync: bool) {
        if file.memory {
            let result = write_now(&file.file, span.offset, &data, dsync).map(|()| None);
            return self.finished(token, result);
        }
        debug_assert!(file.fits(span), "requests are whole logical blocks");
        let flags = if dsync { libc::RWF_DSYNC } else { 0 };
        match data {
            Bytes::Buffer(buffer) => self.write_buffer(token, file, span, buffer, flags),
            Bytes::Guest(part) => {
                let pieces = part.pieces();
                if !aligned(&pieces, file.align) {
                    let mut buffer = Buffer::new(part.len);
                    // SAFETY: the part holds its request, so its pieces are mapped.
                    unsafe { copy_from_guest(&pieces, &mut buffer) };
                    return self.write_buffer(token, file, span, Rc::new(buffer), flags);
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
                    _part: part,
                    _pieces: pieces,
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
            let result = read_now(&file.file, span, guest);
            return self.finished(token, result);
        }
        let entry = |ptr: *mut u8| {
            opcode::Read::new(fd(&file.file), ptr, span.len)
                .offset(span.offset)
                .build()
        };
        let (held, entry) = match guest {
            None => {
                let buffer = Buffer::new(span.len as usize);
                let entry = entry(buffer.as_ptr());
                (Held::ReadBuffer(buffer), entry)
            }
            Some(part) => {
                let pieces = part.pieces();
                if aligned(&pieces, file.align) {
                    let entry = opcode::Readv::new(
                        fd(&file.file),
                        IoVec::as_raw(&pieces),
                        pieces.len() as u32,
                    )
                    .offset(span.offset)
                    .build();
                    (
                        Held::Guest {
                            _part: part,
                            _pieces: pieces,
                        },
                        entry,
                    )
                } else {
                    let buffer = Buffer::new(span.len as usize);
                    let entry = entry(buffer.as_ptr());
                    (Held::Bounce(buffer, part), entry)
                }
            }
        };
        self.start(token, &file.file, held, span.len as usize, entry);
    }

    /// Makes `span` zero. A hole reads as zeros on every file system that has holes; not every one
    /// can write zeros without them.
    pub fn zero(&mut self, token: Token, file: &DataFile, span: Span) {
        let mode = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
        let entry = opcode::Fallocate::new(fd(&file.file), u64::from(span.len))
            .offset(span.offset)
            .mode(mode)
            .build();
        self.start(token, &file.file, Held::Nothing, 0, entry);
    }

    /// fdatasync.
    pub fn sync(&mut self, token: Token, file: &DataFile) {
        if file.memory {
            let result = file.file.sync_data().map(|()| None);
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
            let result = write_all_at(&file.file, &bytes, offset).map(|()| None);
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
        let short = match held {
            Held::ReadBuffer(_) | Held::Bounce(..) => libc::EIO,
            _ => libc::ENOSPC,
        };
        let started = self.now;
        let running = Running {
            token,
            held,
            expect,
            short,
            started,
            _file: Rc::clone(file),
        };
        let Some(id) = self.running.insert(running) else {
            let result = Err(io::Error::from_raw_os_error(libc::EAGAIN));
            return self.finished(token, result);
        };
        self.backlog.push_back(entry.user_data(id.0));
    }

    fn finished(&mut self, token: Token, result: io::Result<Option<Bytes>>) {
        let started = self.now;
        self.done.push_back(Completion {
            token,
            started,
            result,
        });
    }

    /// Hands everything prepared to the kernel, in as few calls as the queue's size allows.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.unsubmitted || (!self.backlog.is_empty() && self.in_kernel < ENTRIES) {
            {
                let mut queue = self.ring.submission();
                while let Some(entry) = self.backlog.front().filter(|_| self.in_kernel < ENTRIES) {
                    // SAFETY: the memory that the entry names is owned by `running` until its
                    // completion was taken from the ring.
                    if unsafe { queue.push(entry) }.is_err() {
                        break;
                    }
                    self.backlog.pop_front();
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

    /// The next finished operation.
    pub fn completed(&mut self) -> Option<Completion> {
        if let Some(done) = self.done.pop_front() {
            return Some(done);
        }
        let entries: Vec<(u64, i32)> = self
            .ring
            .completion()
            .map(|c| (c.user_data(), c.result()))
            .collect();
        self.in_kernel -= entries.len() as u32;
        for (id, result) in entries {
            if let Some(running) = self.running.remove(Seq(id)) {
                let completion = running.complete(result);
                self.done.push_back(completion);
            }
        }
        self.done.pop_front()
    }
}

impl Drop for Disk {
    /// The kernel must not write into memory that is given back.
    fn drop(&mut self) {
        while !self.running.is_empty() {
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
    fn complete(self, result: i32) -> Completion {
        let token = self.token;
        let result = if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else if result as usize != self.expect {
            // Requests lie inside the file. A write falls short when the disk fills up, a read when
            // the file was cut behind our back.
            Err(io::Error::from_raw_os_error(self.short))
        } else {
            Ok(match self.held {
                Held::ReadBuffer(buffer) => Some(Bytes::from_buffer(buffer)),
                Held::Bounce(buffer, part) => {
                    // SAFETY: the part holds its request, so its pieces are mapped.
                    unsafe { copy_to_guest(&buffer, &part.pieces()) };
                    None
                }
                Held::Guest { .. } | Held::Buffer { .. } | Held::Meta { .. } | Held::Nothing => {
                    None
                }
            })
        };
        Completion {
            token,
            started: self.started,
            result,
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
            whole(wrote, part.len, libc::ENOSPC)?;
        }
    }
    if dsync { file.sync_data() } else { Ok(()) }
}

fn read_now(file: &File, span: Span, guest: Option<GuestPart>) -> io::Result<Option<Bytes>> {
    match guest {
        None => {
            let mut buffer = Buffer::new(span.len as usize);
            std::os::unix::fs::FileExt::read_exact_at(file, &mut buffer, span.offset)?;
            Ok(Some(Bytes::from_buffer(buffer)))
        }
        Some(part) => {
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
            whole(read, part.len, libc::EIO).map(|()| None)
        }
    }
}

fn whole(done: isize, want: usize, short: i32) -> io::Result<()> {
    match usize::try_from(done) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(n) if n == want => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(short)),
    }
}
