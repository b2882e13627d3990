//! What travels between nodes: the greeting that opens a connection, then frames (PROTOCOL 8). Bytes in, meaning out;
//! no socket inside.

pub mod frame;
pub mod hello;
pub mod lz4;

/// Why a connection's bytes cannot be taken: the connection ends with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not one of our frames.
    #[error("not a lockstep frame (begins with {0:02x?})")]
    Magic([u8; 4]),
}
