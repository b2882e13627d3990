//! One virtio-blk request (virtio 1.2, section 5.2.6): parsed, then refused or completed exactly once.
//!
//! A request is a 16-byte header that the device reads, data in one direction, and a status byte that the device
//! writes. How they are cut into descriptors is the driver's choice (2.7.4.3), so the header is the first 16 readable
//! bytes and the status the last writable byte, wherever they lie.

use std::rc::Rc;

use thiserror::Error;

use super::chain::{Chain, ChainFault, MAX_DATA_SEGMENTS, Used, Written};
use super::config::{BlockSize, Serial};
use super::dirty::RingLog;
use super::iovec::{IoVec, copy_from_guest, copy_to_guest, total_len};
use super::memory::MemMap;
use super::ring::RingError;

/// Unit of addresses and of capacity, in bytes, whatever the block size (5.2.6).
pub const SECTOR_SIZE: u64 = 512;

/// `type`, `reserved`, `sector`.
const HEADER_SIZE: usize = 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Longest segment of a discard or a write-zeroes: 64 MiB. A ring that is stopped waits some seconds for its requests,
/// and a ring of 128 such ones (8 GiB) is done within that on disks that can give space back; much less would make a
/// guest that discards a whole disk of a TiB ask tens of thousands of times.
pub const MAX_ZERO_SECTORS: u32 = (64 << 20) / SECTOR_SIZE as u32;
/// Most segments of one request. Twice what Windows' driver uses; each costs 16 bytes to read and no more.
pub const MAX_ZERO_SEGMENTS: u32 = 32;
/// `struct virtio_blk_discard_write_zeroes`: `sector`, `num_sectors`, `flags`.
const SEGMENT_SIZE: usize = 16;
/// The only flag there is.
const FLAG_UNMAP: u32 = 1;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Read from the volume into [`Request::data`].
    In,
    /// Write [`Request::data`] to the volume.
    Out,
    /// Make all completed writes durable.
    Flush,
    /// Put the volume's serial into [`Request::data`]: see [`Request::write_id`].
    GetId,
    /// Make [`Request::segments`] zero and give their space back.
    Discard,
    /// Make [`Request::segments`] zero.
    WriteZeroes,
}

/// A part of the volume that a request wants to be zero; within the volume, and of whole blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub offset: u64,
    /// Bytes, at most [`MAX_ZERO_SECTORS`] sectors. May be none: Windows passes on what a SCSI UNMAP of no blocks says,
    /// and that is no error.
    pub len: u32,
    /// Whether the space may be given back. Always for a discard.
    pub unmap: bool,
}

/// The answer to a request (5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR
    IoErr = 1,
    /// VIRTIO_BLK_S_UNSUPP
    Unsupp = 2,
}

/// What a request is held against.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Size of the volume, in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What the guest was told of logical blocks. Segments to be made zero are held to it.
    pub block_size: BlockSize,
}

/// Why a request was answered at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The chain breaks a rule.
    #[error(transparent)]
    Chain(#[from] ChainFault),
    /// Fewer than 16 readable bytes.
    #[error("a header of {0} bytes")]
    ShortHeader(usize),
    /// No data, or data in the direction that the request does not have.
    #[error("request type {0} with no data, or data in the wrong direction")]
    Direction(u32),
    /// Not a multiple of 512 bytes.
    #[error("{0} bytes of data are not whole sectors")]
    PartSector(u64),
    /// Beyond the end of the volume.
    #[error("sector {sector}+{sectors} is beyond the end of the volume ({capacity} sectors)")]
    Range {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u64,
        /// The volume's size in sectors.
        capacity: u64,
    },
    /// A write to a read-only volume.
    #[error("a write to a read-only volume")]
    ReadOnly,
    /// Not a whole number of segments, or none.
    #[error("{0} bytes of data are not whole segments of a discard or write-zeroes")]
    PartSegment(u64),
    /// More segments than the driver was told.
    #[error("{0} segments; at most {MAX_ZERO_SEGMENTS} are possible")]
    Segments(u64),
    /// A segment longer than the driver was told.
    #[error("a segment of {0} sectors; at most {MAX_ZERO_SECTORS} are possible")]
    LongSegment(u32),
    /// A segment that begins or ends within a logical block.
    #[error("a segment at sector {sector}+{sectors} is not of whole blocks of {block} bytes")]
    PartBlock {
        /// First sector.
        sector: u64,
        /// Number of sectors.
        sectors: u32,
        /// The logical block size.
        block: u32,
    },
    /// A flag that does not exist, or that this type does not have.
    #[error("a segment of request type {kind} with flags {flags:#x}")]
    Flags {
        /// The request's type.
        kind: u32,
        /// All flags of the segment.
        flags: u32,
    },
    /// A type that is not offered or not known. The driver probes with these; it is no fault.
    #[error("request type {0} is not supported")]
    Unsupported(u32),
}

impl Refusal {
    fn status(self) -> Status {
        match self {
            // 5.2.6.2 asks for this status by name. All else that breaks a rule is a "driver error".
            Refusal::Unsupported(_) | Refusal::Flags { .. } => Status::Unsupp,
            _ => Status::IoErr,
        }
    }
}

/// A request that was answered without work; push `used` and it is done.
#[derive(Debug)]
#[must_use = "push `used` to the used ring"]
pub struct Refused {
    /// The answered chain.
    pub used: Used,
    /// Why.
    pub reason: Refusal,
}

/// What became of a chain.
#[derive(Debug)]
#[must_use = "both outcomes must reach the used ring"]
pub enum Parsed {
    /// To be served.
    Request(Request),
    /// Already answered.
    Refused(Refused),
}

/// A valid request in flight. It must end in [`finish`](Request::finish), or in [`abandon`](Request::abandon) when
/// the guest's memory is gone: dropping it is a bug that debug builds stop at.
#[derive(Debug)]
#[must_use = "finish or abandon it"]
pub struct Request {
    head: u16,
    kind: Kind,
    sector: u64,
    data_len: u32,
    /// Which of `iovecs` are data.
    data: (usize, usize),
    segments: Vec<Segment>,
    iovecs: Vec<IoVec>,
    status: *mut u8,
    /// Keeps `iovecs` and `status` mapped.
    mem: Rc<MemMap>,
    ended: bool,
}

impl Request {
    /// Reads a chain as a request. The guest's bytes are read once, so that what was checked is what is served.
    ///
    /// # Errors
    ///
    /// [`RingError::NoStatus`] when there is no byte to write an answer to; the ring is not to be trusted any more.
    #[inline(always)]
    pub fn parse(chain: Chain, limits: &Limits) -> Result<Parsed, RingError> {
        let head = chain.head;
        let Some(status) = status_byte(&chain) else {
            return Err(RingError::NoStatus { head });
        };
        let mut chain = chain;
        let plan = match Plan::of(&mut chain, limits) {
            Ok(plan) => plan,
            Err(reason) => {
                // SAFETY: `chain` is alive, and with it the mapping that `status` points into.
                unsafe { status.write_volatile(reason.status() as u8) };
                let used = chain.refuse(status);
                return Ok(Parsed::Refused(Refused { used, reason }));
            }
        };
        let Chain { iovecs, mem, .. } = chain;
        Ok(Parsed::Request(Request {
            head,
            kind: plan.kind,
            sector: plan.sector,
            data_len: plan.data_len,
            data: plan.data,
            segments: plan.segments,
            iovecs,
            status,
            mem,
            ended: false,
        }))
    }

    /// Index of the chain's first descriptor: the request's name among those in flight in its ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What is asked for.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// First sector (of 512 bytes) of [`Kind::In`] and [`Kind::Out`]; within the volume together with the data.
    pub fn sector(&self) -> u64 {
        self.sector
    }

    /// First byte on the volume. Does not overflow: the sector was checked against the capacity.
    pub fn offset(&self) -> u64 {
        self.sector * SECTOR_SIZE
    }

    /// What [`Kind::Discard`] and [`Kind::WriteZeroes`] make zero; nothing for others. May overlap one another.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Bytes of data: whole sectors for [`Kind::In`] and [`Kind::Out`], none for a flush or for zeros.
    pub fn data_len(&self) -> u32 {
        self.data_len
    }

    /// The data in guest memory: to be read for [`Kind::Out`], to be written for [`Kind::In`] and [`Kind::GetId`].
    /// At most [`MAX_DATA_SEGMENTS`] pieces. Mapped until the request is finished or abandoned, and not longer: a
    /// request must outlive every use that the kernel makes of them.
    pub fn data(&self) -> &[IoVec] {
        &self.iovecs[self.data.0..self.data.1]
    }

    /// Copies the data of a write out of guest memory, once: what is in `dst` afterwards is the write, whatever the
    /// guest does to its buffer. Returns the bytes copied.
    pub fn read_data(&self, dst: &mut [u8]) -> usize {
        // SAFETY: the request is alive, so its pieces are mapped; shared guest memory is always readable.
        unsafe { copy_from_guest(self.data(), dst) }
    }

    /// Copies the data of a read into guest memory. Returns the bytes copied; none for a write, whose buffers are the
    /// guest's own.
    pub fn write_data(&self, src: &[u8]) -> usize {
        if self.kind == Kind::Out {
            return 0;
        }
        // SAFETY: the request is alive, so its pieces are mapped; shared guest memory is mapped writable.
        unsafe { copy_to_guest(src, self.data()) }
    }

    /// Answers [`Kind::GetId`]: the serial, cut to the guest's buffer, which is 20 bytes by the specification.
    pub fn write_id(&self, serial: &Serial) {
        self.write_data(serial.as_bytes());
    }

    /// Writes the status and gives the chain back.
    pub fn finish(mut self, status: Status) -> Used {
        self.ended = true;
        // SAFETY: the request is alive, and with it the mapping that the status byte lies in. Volatile, because the
        // guest reads it behind the compiler's back.
        unsafe { self.status.write_volatile(status as u8) };
        // The used length covers what was written: the data of a good read, and the status byte behind it. The data
        // is at most 4 GiB less the header, so the sum fits.
        let written = match (self.kind, status) {
            (Kind::In, Status::Ok) => self.data_len,
            (Kind::GetId, Status::Ok) => self.data_len.min(Serial::LEN as u32),
            _ => 0,
        };
        Used {
            head: self.head,
            len: written + 1,
            iovecs: std::mem::take(&mut self.iovecs),
            written: self.written(),
        }
    }

    /// What was or may have been written: of a read that failed nobody knows how far it came.
    fn written(&self) -> Written {
        let len = match self.kind {
            Kind::In => self.data_len as usize,
            Kind::GetId => Serial::LEN,
            _ => 0,
        };
        Written {
            data: self.data,
            len,
            status: Some(self.status),
            mem: Rc::clone(&self.mem),
        }
    }

    /// Marks what was written for a request that will not be answered, because its ring has stopped meanwhile.
    pub fn mark(&self, log: &RingLog) {
        if log.all {
            self.written().mark(&self.iovecs, &log.log);
        }
    }

    /// Gives the request up without telling the guest: its memory is gone, or the next process will serve it.
    pub fn abandon(mut self) {
        self.ended = true;
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        debug_assert!(
            self.ended || std::thread::panicking(),
            "request {} of chain {} was dropped without an answer",
            self.sector,
            self.head
        );
    }
}

/// Address of the chain's last writable byte, if it can be known.
fn status_byte(chain: &Chain) -> Option<*mut u8> {
    if !chain.tail_known {
        return None;
    }
    let last = chain.writable().last()?;
    // SAFETY: a piece has at least one byte, and all of them are mapped.
    Some(unsafe { last.ptr.add(last.len - 1) })
}

/// A chain understood.
struct Plan {
    kind: Kind,
    sector: u64,
    data: (usize, usize),
    data_len: u32,
    segments: Vec<Segment>,
}

impl Plan {
    /// Cuts header and status off the chain's pieces, and checks what remains. The chain has a status byte.
    #[inline(always)]
    fn of(chain: &mut Chain, limits: &Limits) -> Result<Plan, Refusal> {
        if let Some(fault) = chain.fault {
            return Err(fault.into());
        }
        let mut header = [0u8; HEADER_SIZE];
        // SAFETY: the chain is alive, so its pieces are mapped.
        let n = unsafe { copy_from_guest(chain.readable(), &mut header) };
        if n < HEADER_SIZE {
            return Err(Refusal::ShortHeader(n));
        }
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let request_type = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes(sector);

        let first_out = cut_front(&mut chain.iovecs[..chain.readable], HEADER_SIZE);
        let end_in = cut_last_byte(&mut chain.iovecs);
        let out = (first_out, chain.readable);
        let into = (chain.readable, end_in);

        let kind = match request_type {
            T_IN => Kind::In,
            T_OUT => Kind::Out,
            T_FLUSH => Kind::Flush,
            T_GET_ID => Kind::GetId,
            T_DISCARD => Kind::Discard,
            T_WRITE_ZEROES => Kind::WriteZeroes,
            other => return Err(Refusal::Unsupported(other)),
        };
        let (data, other) = match kind {
            Kind::Out | Kind::Discard | Kind::WriteZeroes => (out, into),
            Kind::In | Kind::Flush | Kind::GetId => (into, out),
        };
        let has_data = data.0 < data.1;
        if kind == Kind::Flush {
            // A flush has neither sector nor data; what a driver puts there means nothing (5.2.6).
            return Ok(Plan {
                kind,
                sector: 0,
                data: (0, 0),
                data_len: 0,
                segments: Vec::new(),
            });
        }
        if !has_data || other.0 < other.1 {
            return Err(Refusal::Direction(request_type));
        }
        if data.1 - data.0 > MAX_DATA_SEGMENTS {
            return Err(ChainFault::TooManySegments.into());
        }
        if matches!(kind, Kind::Discard | Kind::WriteZeroes) {
            // Like a flush, it has no sector in its header: each segment has its own.
            let segments = segments(request_type, &chain.iovecs[data.0..data.1], limits)?;
            return Ok(Plan {
                kind,
                sector: 0,
                data: (0, 0),
                data_len: 0,
                segments,
            });
        }
        // A chain has at most 4 GiB, so this fits.
        let len = total_len(&chain.iovecs[data.0..data.1]) as u64;
        if matches!(kind, Kind::In | Kind::Out) {
            if kind == Kind::Out && limits.read_only {
                return Err(Refusal::ReadOnly);
            }
            if !len.is_multiple_of(SECTOR_SIZE) {
                return Err(Refusal::PartSector(len));
            }
            let sectors = len / SECTOR_SIZE;
            let end = sector.checked_add(sectors);
            if end.is_none_or(|end| end > limits.capacity_sectors) {
                return Err(Refusal::Range {
                    sector,
                    sectors,
                    capacity: limits.capacity_sectors,
                });
            }
        }
        Ok(Plan {
            kind,
            sector,
            data,
            data_len: len as u32,
            segments: Vec::new(),
        })
    }
}

/// The segments of a discard or a write-zeroes. The pieces are mapped; they are read once.
fn segments(kind: u32, pieces: &[IoVec], limits: &Limits) -> Result<Vec<Segment>, Refusal> {
    if limits.read_only {
        return Err(Refusal::ReadOnly);
    }
    let len = total_len(pieces);
    if len == 0 || !len.is_multiple_of(SEGMENT_SIZE) {
        return Err(Refusal::PartSegment(len as u64));
    }
    let count = len / SEGMENT_SIZE;
    if count > MAX_ZERO_SEGMENTS as usize {
        return Err(Refusal::Segments(count as u64));
    }
    let mut bytes = [0; SEGMENT_SIZE * MAX_ZERO_SEGMENTS as usize];
    let bytes = &mut bytes[..len];
    // SAFETY: the caller's chain is alive, so its pieces are mapped.
    unsafe { copy_from_guest(pieces, bytes) };
    let (raw, _) = bytes.as_chunks::<SEGMENT_SIZE>();
    let raw = raw.iter().map(|segment| {
        let [s @ .., n0, n1, n2, n3, f0, f1, f2, f3] = *segment;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        (u64::from_le_bytes(s), sectors, flags)
    });
    // 5.2.6.2: an unknown flag anywhere decides the status, whatever else is wrong.
    let known = if kind == T_DISCARD { 0 } else { FLAG_UNMAP };
    if let Some((_, _, flags)) = raw.clone().find(|(_, _, flags)| flags & !known != 0) {
        return Err(Refusal::Flags { kind, flags });
    }
    raw.map(|(sector, sectors, flags)| {
        if sectors > MAX_ZERO_SECTORS {
            return Err(Refusal::LongSegment(sectors));
        }
        let end = sector.checked_add(u64::from(sectors));
        if end.is_none_or(|end| end > limits.capacity_sectors) {
            return Err(Refusal::Range {
                sector,
                sectors: u64::from(sectors),
                capacity: limits.capacity_sectors,
            });
        }
        let block = limits.block_size.bytes();
        let per_block = u64::from(block) / SECTOR_SIZE;
        if !sector.is_multiple_of(per_block) || !u64::from(sectors).is_multiple_of(per_block) {
            return Err(Refusal::PartBlock {
                sector,
                sectors,
                block,
            });
        }
        Ok(Segment {
            offset: sector * SECTOR_SIZE,
            len: sectors * SECTOR_SIZE as u32,
            unmap: kind == T_DISCARD || flags & FLAG_UNMAP != 0,
        })
    })
    .collect()
}

/// Takes `n` bytes off the front of the pieces (which have that many); returns the index of the first one left.
fn cut_front(iovecs: &mut [IoVec], mut n: usize) -> usize {
    for (i, piece) in iovecs.iter_mut().enumerate() {
        if piece.len > n {
            // SAFETY: the piece has more than n bytes.
            piece.ptr = unsafe { piece.ptr.add(n) };
            piece.len -= n;
            return i;
        }
        n -= piece.len;
    }
    iovecs.len()
}

/// Takes one byte off the end of the last piece; returns the number of pieces left.
fn cut_last_byte(iovecs: &mut [IoVec]) -> usize {
    match iovecs {
        [.., last] if last.len > 1 => {
            last.len -= 1;
            iovecs.len()
        }
        _ => iovecs.len().saturating_sub(1),
    }
}

#[cfg(test)]
mod tests;
