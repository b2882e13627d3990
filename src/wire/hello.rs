//! The greeting.
use super::WireError;
use crate::replication::ids::{BootId, ClusterId, CopyId, Instance, NodeName, VolumeId};

/// The protocol versions a program speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The guest's requests and everything that decides.
    Foreground,
    /// Resync.
    Bulk,
}

/// → The first bytes of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Spoken.
    pub versions: Versions,
    /// Offered features, one bit each.
    pub features: u64,
    /// The sender's cluster.
    pub cluster: ClusterId,
    /// The sender.
    pub node: NodeName,
    /// Its kernel boot.
    pub boot_id: BootId,
    /// Its process.
    pub instance: Instance,
    /// The volume this connection is about.
    pub volume: VolumeId,
    /// The copy it wants.
    pub copy: CopyId,
    /// What for.
    pub purpose: Purpose,
}

/// ← Welcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelloAck {
    /// Chosen.
    pub version: u16,
    /// Both have them.
    pub features: u64,
    /// The answering node's cluster.
    pub cluster: ClusterId,
    /// The answering node.
    pub node: NodeName,
    /// Its kernel boot.
    pub boot_id: BootId,
    /// Its process.
    pub instance: Instance,
    /// Requests that may be unanswered at once.
    pub credits: u32,
}

/// Why a greeting is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The nodes are of different clusters.
    WrongCluster,
    /// The version ranges do not meet.
    NoCommonVersion,
    /// No such copy here.
    UnknownCopy,
    /// Another node answers at this address.
    NotThisNode,
    /// Try again later.
    Busy,
    /// A reason of a later version.
    Other(u16),
}

/// ← No; the connection ends after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelloRefusal {
    /// The refuser speaks these.
    pub versions: Versions,
    /// Why.
    pub reason: Reason,
    /// For a person.
    pub text: String,
}

/// ← What comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Go on.
    Ack(HelloAck),
    /// Stop.
    Refusal(HelloRefusal),
}

#[allow(unused_variables)]
impl Hello {
    /// Appends the bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        todo!()
    }
    /// `Ok(None)`: more bytes are needed.
    pub fn decode(buf: &[u8]) -> Result<Option<(Hello, usize)>, WireError> {
        todo!()
    }
}

#[allow(unused_variables)]
impl Answer {
    /// Appends the bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        todo!()
    }
    /// `Ok(None)`: more bytes are needed.
    pub fn decode(buf: &[u8]) -> Result<Option<(Answer, usize)>, WireError> {
        todo!()
    }
}
