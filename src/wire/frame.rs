//! Frames.
use super::WireError;
use crate::replication::message::Message;

/// Bytes of a frame's header.
pub const HEADER: usize = 64;

/// A payload to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    /// Bytes once expanded.
    pub raw_len: u32,
    /// As sent.
    pub bytes: &'a [u8],
    /// `bytes` is an lz4 block.
    pub lz4: bool,
}

/// A payload received; its CRC was verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadRef<'a> {
    /// Bytes once expanded, at most `IO_MAX`.
    pub raw_len: u32,
    /// As received.
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
    /// The bytes beside it.
    pub payload: Option<PayloadRef<'a>>,
}

/// Appends header and body of `message` to `out`; the payload's bytes are to follow it on the connection.
#[allow(unused_variables)]
pub fn encode(message: &Message, handle: u32, payload: Option<Payload<'_>>, out: &mut Vec<u8>) {
    todo!()
}

/// How many bytes the first frame in `buf` has (header, body and payload); `HEADER` while that is not known.
#[allow(unused_variables)]
pub fn needed(buf: &[u8]) -> Result<usize, WireError> {
    todo!()
}

/// Takes the first frame out of `buf` when it is whole, with the number of bytes it took.
#[allow(unused_variables)]
pub fn decode(buf: &[u8]) -> Result<Option<(Frame<'_>, usize)>, WireError> {
    todo!()
}
