//! Frames: a header of fixed shape, a body if the message has more to say than the header holds, and the payload.
//!
//! | offset | length | header field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `LSF` and a zero byte |
//! | 4 | 1 | version |
//! | 5 | 1 | type |
//! | 6 | 2 | flags |
//! | 8 | 4 | handle of the volume on this connection |
//! | 12 | 4 | length of the body |
//! | 16 | 8 | epoch |
//! | 24 | 8 | sequence number; heartbeats: `stable`; `SyncReady`, `SyncBulk`: the ticket |
//! | 32 | 8 | first byte of the range; heartbeats: `sent` |
//! | 40 | 4 | length of the range, which is that of the payload once expanded |
//! | 44 | 4 | length of the payload as sent; 0 = none |
//! | 48 | 4 | CRC32C of the payload as sent; 0 without one |
//! | 52 | 4 | CRC32C of the body; 0 without one |
//! | 56 | 4 | status of the answer to a read, a hash or a map |
//! | 60 | 4 | CRC32C of bytes 0–59 |
//!
//! Numbers are little-endian; fields that a type does not use are zero. The header verifies by itself, so that a length that
//! changed on the way is an error at once, and not a wait for bytes that never come.

mod message;

use super::WireError;
use super::body::{self, Reader, within};
pub use super::body::{ACKS_MAX, BODY_MAX, TEXT_MAX, WORDS_MAX};
use crate::replication::ids::{Epoch, IO_MAX, SECTOR, Seq, Span};
use crate::replication::message::{Message, Request, Status};

/// Bytes of a frame's header.
pub const HEADER: usize = 64;
/// The longest frame, in bytes: what a receive buffer must be able to hold.
pub const FRAME_MAX: usize = HEADER + BODY_MAX + IO_MAX as usize;
/// The version of the frames below; agreed on in the greeting.
pub const FRAME_VERSION: u8 = 1;

const MAGIC: [u8; 4] = *b"LSF\0";
const HEADER_CRC_AT: usize = 60;

const FLAG_LZ4: u16 = 1;
const FLAG_FUA: u16 = 1 << 1;
const FLAG_UNMAP: u16 = 1 << 2;
const FLAG_PROBE: u16 = 1 << 3;
const FLAG_CLEAN: u16 = 1 << 4;
const FLAG_LOGGED: u16 = 1 << 5;
const FLAG_LOG_PRESSURE: u16 = 1 << 6;
const FLAG_ALL: u16 = 1 << 7;

/// The messages' numbers: never reused, never renumbered.
mod kind {
    pub const PROMISE: u8 = 1;
    pub const PROMISE_ACK: u8 = 2;
    pub const ATTACH: u8 = 3;
    pub const ATTACH_ACK: u8 = 4;
    pub const EPOCH_CHANGE: u8 = 5;
    pub const EPOCH_ACK: u8 = 6;
    pub const WRITE: u8 = 7;
    pub const WRITE_ZEROES: u8 = 8;
    pub const DISCARD: u8 = 9;
    pub const FLUSH: u8 = 10;
    pub const ACK_VEC: u8 = 11;
    pub const READ: u8 = 12;
    pub const READ_REPLY: u8 = 13;
    pub const HEARTBEAT: u8 = 14;
    pub const HEARTBEAT_ACK: u8 = 15;
    pub const DETACH: u8 = 16;
    pub const DETACH_ACK: u8 = 17;
    pub const NACK: u8 = 18;
    pub const SYNC_BEGIN: u8 = 19;
    pub const SYNC_READY: u8 = 20;
    pub const SYNC_BULK: u8 = 21;
    pub const MAP_READ: u8 = 22;
    pub const MAP_REPLY: u8 = 23;
    pub const MARK: u8 = 24;
    pub const CLEAR: u8 = 25;
    pub const SYNC_HASH: u8 = 26;
    pub const SYNC_HASH_REPLY: u8 = 27;
    pub const SYNC_DATA: u8 = 28;
    pub const SYNC_DONE: u8 = 29;
    pub const SYNC_DONE_ACK: u8 = 30;
    pub const GROW: u8 = 31;
}

/// A payload to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    /// Bytes once expanded, 1..=`IO_MAX`.
    pub raw_len: u32,
    /// As sent: `raw_len` bytes, or fewer when `lz4`.
    pub bytes: &'a [u8],
    /// `bytes` is an lz4 block.
    pub lz4: bool,
}

/// A payload received. Its CRC was verified; whether an lz4 block expands to `raw_len` bytes is seen when it is
/// [expanded](super::lz4::expand).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadRef<'a> {
    /// Bytes once expanded, 1..=`IO_MAX`.
    pub raw_len: u32,
    /// As received: `raw_len` bytes, or fewer when `lz4`.
    pub bytes: &'a [u8],
    /// `bytes` is an lz4 block.
    pub lz4: bool,
}

/// A frame received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// The volume's handle on this connection.
    pub handle: u32,
    /// What is said.
    pub message: Message,
    /// The bytes beside it: always with a `Write`, a `SyncData` and a `ReadReply` that is `Ok`, never otherwise.
    pub payload: Option<PayloadRef<'a>>,
}

/// The header's fields, all lengths within their limits and fitting each other.
#[derive(Clone, Copy, Debug, Default)]
struct Header {
    kind: u8,
    flags: u16,
    handle: u32,
    body_len: u32,
    epoch: u64,
    seq: u64,
    offset: u64,
    raw_len: u32,
    wire_len: u32,
    payload_crc: u32,
    body_crc: u32,
    status: u32,
}

impl Header {
    fn write(&self, out: &mut [u8]) {
        out[..4].copy_from_slice(&MAGIC);
        out[4] = FRAME_VERSION;
        out[5] = self.kind;
        out[6..8].copy_from_slice(&self.flags.to_le_bytes());
        out[8..12].copy_from_slice(&self.handle.to_le_bytes());
        out[12..16].copy_from_slice(&self.body_len.to_le_bytes());
        out[16..24].copy_from_slice(&self.epoch.to_le_bytes());
        out[24..32].copy_from_slice(&self.seq.to_le_bytes());
        out[32..40].copy_from_slice(&self.offset.to_le_bytes());
        out[40..44].copy_from_slice(&self.raw_len.to_le_bytes());
        out[44..48].copy_from_slice(&self.wire_len.to_le_bytes());
        out[48..52].copy_from_slice(&self.payload_crc.to_le_bytes());
        out[52..56].copy_from_slice(&self.body_crc.to_le_bytes());
        out[56..60].copy_from_slice(&self.status.to_le_bytes());
        let crc = crc32c::crc32c(&out[..HEADER_CRC_AT]);
        out[HEADER_CRC_AT..HEADER].copy_from_slice(&crc.to_le_bytes());
    }

    /// The header at the front of `buf`; `None` while it is not all there.
    fn read(buf: &[u8]) -> Result<Option<Self>, WireError> {
        // A peer that speaks something else is told from its first bytes: it may never send 64.
        let start = &buf[..buf.len().min(MAGIC.len())];
        if *start != MAGIC[..start.len()] {
            let mut found = [0; 4];
            found[..start.len()].copy_from_slice(start);
            return Err(WireError::Magic(found));
        }
        let Some(bytes) = buf.get(..HEADER) else {
            return Ok(None);
        };
        let mut r = Reader(&bytes[4..]);
        let (version, kind) = (r.u8()?, r.u8()?);
        let header = Self {
            kind,
            flags: r.u16()?,
            handle: r.u32()?,
            body_len: r.u32()?,
            epoch: r.u64()?,
            seq: r.u64()?,
            offset: r.u64()?,
            raw_len: r.u32()?,
            wire_len: r.u32()?,
            payload_crc: r.u32()?,
            body_crc: r.u32()?,
            status: r.u32()?,
        };
        if r.u32()? != crc32c::crc32c(&bytes[..HEADER_CRC_AT]) {
            return Err(WireError::Checksum("header"));
        }
        if version != FRAME_VERSION {
            return Err(WireError::FrameVersion {
                found: version,
                agreed: FRAME_VERSION,
            });
        }
        header.check()?;
        Ok(Some(header))
    }

    /// Everything that can be refused before the rest of the frame is waited for.
    fn check(&self) -> Result<(), WireError> {
        within("body", self.body_len as usize, BODY_MAX)?;
        let lz4 = self.flags & FLAG_LZ4 != 0;
        if self.has_payload() {
            within("payload", self.raw_len as usize, IO_MAX as usize)?;
            // What does not shrink is sent raw, so that `raw_len` bounds both lengths.
            let fits = if lz4 {
                self.wire_len < self.raw_len
            } else {
                self.wire_len == self.raw_len
            };
            if self.wire_len == 0 || !fits {
                return Err(WireError::Malformed(
                    "payload: its lengths do not fit each other",
                ));
            }
        } else if self.wire_len != 0 || lz4 {
            return Err(WireError::Malformed("payload: this message has none"));
        }
        Ok(())
    }

    fn has_payload(&self) -> bool {
        self.fills_range() || (self.kind == kind::READ_REPLY && self.status == 0)
    }

    /// Its payload is what is to be applied to its range.
    fn fills_range(&self) -> bool {
        matches!(self.kind, kind::WRITE | kind::SYNC_DATA)
    }

    fn total(&self) -> usize {
        HEADER + self.body_len as usize + self.wire_len as usize
    }

    fn flag(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    fn range(&mut self, request: &Request) {
        self.epoch = request.epoch.0;
        self.seq = request.seq.0;
        self.offset = request.span.offset;
        self.raw_len = request.span.len;
        self.set(FLAG_FUA, request.fua);
    }

    fn answer(&mut self, seq: Seq, status: Status) {
        self.seq = seq.0;
        self.status = u32::from(body::status_code(status));
    }

    fn answered(&self) -> Result<Status, WireError> {
        body::status(u8::try_from(self.status).map_err(|_| WireError::Malformed("status"))?)
    }

    fn set(&mut self, flag: u16, on: bool) {
        self.flags |= if on { flag } else { 0 };
    }

    fn request(&self, len_max: u32) -> Result<Request, WireError> {
        let span = Span {
            offset: self.offset,
            len: self.raw_len,
        };
        within("length of the range", span.len as usize, len_max as usize)?;
        let end = span
            .offset
            .checked_add(u64::from(span.len))
            .ok_or(WireError::Malformed("range: its end overflows"))?;
        if span.len == 0 || !span.offset.is_multiple_of(SECTOR) || !end.is_multiple_of(SECTOR) {
            return Err(WireError::Malformed("range: not of whole sectors"));
        }
        Ok(Request {
            epoch: Epoch(self.epoch),
            seq: Seq(self.seq),
            span,
            fua: self.flag(FLAG_FUA),
        })
    }
}

/// Appends header and body of `message` to `out`; `payload.bytes` must follow them on the connection, and may be sent from
/// where they are. A refusal's text is clipped to [`TEXT_MAX`] bytes.
///
/// Panics on what is the caller's mistake, never a peer's: a payload with a message that has none, or none with one that has;
/// a payload whose lengths do not fit each other or the range; a list or a node's name beyond its limit; a run of no chunks.
pub fn encode(message: &Message, handle: u32, payload: Option<Payload<'_>>, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + HEADER, 0);
    let mut header = Header {
        handle,
        ..Header::default()
    };
    message::put_message(message, &mut header, out);
    if let Some(p) = payload {
        if header.fills_range() {
            assert_eq!(
                header.raw_len, p.raw_len,
                "a write's payload fills its range"
            );
        }
        header.raw_len = p.raw_len;
        header.wire_len = u32::try_from(p.bytes.len()).expect("a payload of at most IO_MAX bytes");
        header.set(FLAG_LZ4, p.lz4);
        header.payload_crc = crc32c::crc32c(p.bytes);
    }
    let body = &out[start + HEADER..];
    header.body_len = body.len() as u32;
    if !body.is_empty() {
        header.body_crc = crc32c::crc32c(body);
    }
    // The same checks as on the other side: what it would refuse is never sent.
    header.check().expect("a frame within its limits");
    header.write(&mut out[start..start + HEADER]);
}

/// How many bytes the first frame in `buf` has, payload included, at most [`FRAME_MAX`]; [`HEADER`] while that is not known.
///
/// Errors: whatever of the header [`decode`] would refuse.
pub fn needed(buf: &[u8]) -> Result<usize, WireError> {
    Ok(Header::read(buf)?.map_or(HEADER, |h| h.total()))
}

/// Takes the first frame out of `buf`, with the number of bytes it took; `Ok(None)` while it is not all there. Of what is
/// not all there only the header is looked at, so that calling this again as bytes arrive costs little.
///
/// Errors: see [`WireError`]; the connection ends.
pub fn decode(buf: &[u8]) -> Result<Option<(Frame<'_>, usize)>, WireError> {
    let Some(header) = Header::read(buf)? else {
        return Ok(None);
    };
    let Some(frame) = buf.get(..header.total()) else {
        return Ok(None);
    };
    let (body, bytes) = frame[HEADER..].split_at(header.body_len as usize);
    let crc_of = |bytes: &[u8]| {
        if bytes.is_empty() {
            0
        } else {
            crc32c::crc32c(bytes)
        }
    };
    if crc_of(body) != header.body_crc {
        return Err(WireError::Checksum("body"));
    }
    if crc_of(bytes) != header.payload_crc {
        return Err(WireError::Checksum("payload"));
    }
    let mut body = Reader(body);
    let message = message::read_message(&header, &mut body)?;
    body.end()?;
    let payload = header.has_payload().then_some(PayloadRef {
        raw_len: header.raw_len,
        bytes,
        lz4: header.flag(FLAG_LZ4),
    });
    Ok(Some((
        Frame {
            handle: header.handle,
            message,
            payload,
        },
        header.total(),
    )))
}
