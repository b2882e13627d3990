//! What travels between nodes: the greeting that opens a connection ([`hello`]), then frames ([`frame`]), whose payload may be
//! compressed ([`lz4`]), all of it perhaps over TLS ([`tls`]). PROTOCOL 8. Bytes in, meaning out, and back; no socket inside.
//!
//! Everything that arrives is a peer's claim. A length is held against its limit before anything is allocated or waited
//! for, and what does not fit is a [`WireError`], after which the connection ends: in a stream of bytes nothing that follows
//! a frame that cannot be read can be found.

mod body;
pub mod frame;
pub mod hello;
pub mod lz4;
#[cfg(test)]
mod tests;
pub mod tls;

/// Why a connection's bytes cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Not one of ours.
    #[error("the peer does not speak lockstep's protocol (its bytes begin {0:02x?})")]
    Magic([u8; 4]),
    /// The greeting's versions do not meet ours; answer it with [`hello::HelloRefusal::no_common_version`].
    #[error("the peer speaks protocol versions {theirs}, this program {ours}")]
    Versions {
        /// The peer's.
        theirs: hello::Versions,
        /// Ours.
        ours: hello::Versions,
    },
    /// A frame of a version that was not agreed on.
    #[error("frame version {found}, but {agreed} was agreed on")]
    FrameVersion {
        /// Of the frame.
        found: u8,
        /// Of the connection.
        agreed: u8,
    },
    /// A message that this version does not have.
    #[error("unknown frame type {0}")]
    Type(u8),
    /// Bytes changed on the way.
    #[error(
        "checksum mismatch in the {0}: the bytes changed on the way, or one of the machines is faulty"
    )]
    Checksum(&'static str),
    /// Beyond a limit.
    #[error("{what} of {found} is beyond the limit of {limit}")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// How much.
        found: u64,
        /// At most.
        limit: u64,
    },
    /// A field has a value that is never sent.
    #[error("malformed {0}")]
    Malformed(&'static str),
}
