//! Compression of payloads.
use super::WireError;
use super::frame::PayloadRef;

/// Compresses payloads; one a worker, reused.
#[derive(Default)]
pub struct Compressor {}

#[allow(unused_variables)]
impl Compressor {
    /// `raw` as an lz4 block in `out` (a scratch buffer whose content and length mean nothing afterwards), or `None`
    /// when that is not worth sending.
    pub fn compress<'o>(&mut self, raw: &[u8], out: &'o mut Vec<u8>) -> Option<&'o [u8]> {
        todo!()
    }
}

/// Puts the payload's `raw_len` bytes into `raw`, which must be that long.
#[allow(unused_variables)]
pub fn expand(payload: PayloadRef<'_>, raw: &mut [u8]) -> Result<(), WireError> {
    todo!()
}
