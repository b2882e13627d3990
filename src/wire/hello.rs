//! The greeting: one [`Hello`] from whoever connects, one [`Answer`]. It settles what version the frames are in, so its own
//! shape must outlive all versions:
//!
//! | offset | length | every greeting, for ever |
//! | --- | --- | --- |
//! | 0 | 8 | `lockstep` |
//! | 8 | 2 | kind: 1 hello, 2 ack, 3 refusal |
//! | 10 | 2 | length of the whole greeting in bytes, 28..=1024 |
//! | 12 | 2 | oldest version spoken; ack: the version chosen |
//! | 14 | 2 | newest version spoken; ack: the version chosen |
//! | 16 | 8 | features |
//! | 24 | … | fields of the kind |
//! | end − 4 | 4 | CRC32C of all before |
//!
//! | offset | length | hello | offset | length | ack | offset | length | refusal |
//! | --- | --- | --- | --- | --- | --- | --- | --- | --- |
//! | 24 | 16 | cluster | 24 | 16 | cluster | 24 | 2 | reason |
//! | 40 | 16 | boot_id | 40 | 16 | boot_id | 26 | 2 | n |
//! | 56 | 16 | instance | 56 | 16 | instance | 28 | n | text |
//! | 72 | 16 | volume | 72 | 4 | credits | | | |
//! | 88 | 16 | copy | 76 | 2 | n | | 2 | n, or nothing |
//! | 104 | 1 | purpose: 0 foreground, 1 bulk | 78 | n | node | | n | node |
//! | 105 | 2 | n | | | | | | |
//! | 107 | n | node | | | | | | |
//!
//! Later versions append fields behind these, and readers pass over what they do not know. A refusal is thus
//! readable by every version. TLS, where there is any, is below all this.

use std::fmt;

use super::WireError;
use super::body::{self, Reader, within};
use crate::replication::ids::{BootId, ClusterId, CopyId, Instance, NodeName, VolumeId};

/// What this program speaks. Each version's changes:
///
/// | version | change |
/// | --- | --- |
/// | 1 | the first |
pub const VERSIONS: Versions = Versions { min: 1, max: 1 };
/// Features this program has, one bit each: none so far.
pub const FEATURES: u64 = 0;
/// The longest greeting, in bytes: room for fields to come, small enough to read before anything is known of the peer.
pub const GREETING_MAX: usize = 1024;

const MAGIC: [u8; 8] = *b"lockstep";
/// The part of every greeting that is before its kind's fields.
const PREFIX: usize = 24;
const CRC_LEN: usize = 4;
const HELLO: u16 = 1;
const ACK: u16 = 2;
const REFUSAL: u16 = 3;

/// Protocol versions that a program speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

impl Versions {
    /// The newest that both speak.
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={}", self.min, self.max)
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The guest's requests, and everything that decides.
    Foreground,
    /// Resync: a connection of its own, so that bulk never delays an answer.
    Bulk,
}

/// → The first bytes of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Spoken by the sender.
    pub versions: Versions,
    /// Offered, one bit each.
    pub features: u64,
    /// The sender's cluster.
    pub cluster: ClusterId,
    /// The sender; a name of at most 256 bytes.
    pub node: NodeName,
    /// Its kernel boot.
    pub boot_id: BootId,
    /// Its process.
    pub instance: Instance,
    /// The volume that the connection is about.
    pub volume: VolumeId,
    /// The copy that it wants.
    pub copy: CopyId,
    /// What for.
    pub purpose: Purpose,
}

/// ← Go on in frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelloAck {
    /// Chosen: one of the hello's.
    pub version: u16,
    /// Those of the hello's that the answering node has too.
    pub features: u64,
    /// The answering node's cluster.
    pub cluster: ClusterId,
    /// The answering node; a name of at most 256 bytes.
    pub node: NodeName,
    /// Its kernel boot.
    pub boot_id: BootId,
    /// Its process.
    pub instance: Instance,
    /// How many requests may be unanswered at once (S19).
    pub credits: u32,
}

/// Why a hello is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The nodes are of different clusters.
    WrongCluster,
    /// The versions do not meet.
    NoCommonVersion,
    /// There is no such copy here.
    UnknownCopy,
    /// Another node than the one meant answers at this address.
    NotThisNode,
    /// Too many connections, or the node is starting or stopping: try again later.
    Busy,
    /// The connection does not prove that it comes from the node that it names.
    Unproven,
    /// One that only later versions know, by its number.
    Other(u16),
}

impl Reason {
    fn code(self) -> u16 {
        match self {
            Reason::WrongCluster => 1,
            Reason::NoCommonVersion => 2,
            Reason::UnknownCopy => 3,
            Reason::NotThisNode => 4,
            Reason::Busy => 5,
            Reason::Unproven => 6,
            Reason::Other(code) => code,
        }
    }

    fn of(code: u16) -> Self {
        match code {
            1 => Reason::WrongCluster,
            2 => Reason::NoCommonVersion,
            3 => Reason::UnknownCopy,
            4 => Reason::NotThisNode,
            5 => Reason::Busy,
            6 => Reason::Unproven,
            other => Reason::Other(other),
        }
    }
}

/// ← No. The connection ends after it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("refused: {text}")]
pub struct HelloRefusal {
    /// Spoken by the refusing node.
    pub versions: Versions,
    /// Why, for a program.
    pub reason: Reason,
    /// Why, for a person; clipped to 256 bytes when sent.
    pub text: String,
    /// The refusing node; `None`: it is of an older version, which did not say.
    pub node: Option<NodeName>,
}

impl HelloRefusal {
    /// A refusal by this program.
    pub fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self {
            versions: VERSIONS,
            reason,
            text: text.into(),
            node: None,
        }
    }

    /// The same by the node of this name.
    #[must_use]
    pub fn by(mut self, node: &NodeName) -> Self {
        self.node = Some(node.clone());
        self
    }

    /// The refusal of a hello with versions `theirs`.
    pub fn no_common_version(theirs: Versions) -> Self {
        let text = format!(
            "you speak protocol versions {theirs}, this node {VERSIONS}: run releases closer to each other"
        );
        Self::new(Reason::NoCommonVersion, text)
    }
}

/// ← What comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Go on.
    Ack(HelloAck),
    /// Stop.
    Refusal(HelloRefusal),
}

impl Hello {
    /// Appends its bytes to `out`.
    ///
    /// Panics when the node's name is too long: own configuration, never a peer's.
    pub fn encode(&self, out: &mut Vec<u8>) {
        greeting(HELLO, self.versions, self.features, out, |out| {
            for id in [
                self.cluster.0,
                self.boot_id.0,
                self.instance.0,
                self.volume.0,
                self.copy.0,
            ] {
                out.extend_from_slice(&id);
            }
            out.push(match self.purpose {
                Purpose::Foreground => 0,
                Purpose::Bulk => 1,
            });
            body::put_text(out, body::name(&self.node));
        });
    }

    /// Takes a hello from the front of `buf`, with the number of bytes it took; `Ok(None)` while it is not all there.
    ///
    /// Errors: [`WireError::Versions`] when none is common to both, whatever else the hello says: it is to be refused with
    /// [`HelloRefusal::no_common_version`]. Any other ends the connection without an answer.
    pub fn decode(buf: &[u8]) -> Result<Option<(Hello, usize)>, WireError> {
        let Some(found) = open(buf)? else {
            return Ok(None);
        };
        if found.kind != HELLO {
            return Err(WireError::Malformed("greeting: not a hello"));
        }
        // First, for the fields of another version may be anything.
        if found.versions.common(VERSIONS).is_none() {
            return Err(WireError::Versions {
                theirs: found.versions,
                ours: VERSIONS,
            });
        }
        let mut r = Reader(found.fields);
        let (cluster, boot_id, instance) = (
            ClusterId(r.array()?),
            BootId(r.array()?),
            Instance(r.array()?),
        );
        let (volume, copy) = (VolumeId(r.array()?), CopyId(r.array()?));
        let purpose = match r.u8()? {
            0 => Purpose::Foreground,
            1 => Purpose::Bulk,
            _ => return Err(WireError::Malformed("greeting: unknown purpose")),
        };
        let node = NodeName(r.text()?);
        let (versions, features) = (found.versions, found.features);
        let hello = Hello {
            versions,
            features,
            cluster,
            node,
            boot_id,
            instance,
            volume,
            copy,
            purpose,
        };
        Ok(Some((hello, found.len)))
    }
}

impl Answer {
    /// Appends its bytes to `out`.
    ///
    /// Panics when the node's name is too long: own configuration, never a peer's.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Answer::Ack(ack) => {
                let chosen = Versions {
                    min: ack.version,
                    max: ack.version,
                };
                greeting(ACK, chosen, ack.features, out, |out| {
                    for id in [ack.cluster.0, ack.boot_id.0, ack.instance.0] {
                        out.extend_from_slice(&id);
                    }
                    out.extend_from_slice(&ack.credits.to_le_bytes());
                    body::put_text(out, body::name(&ack.node));
                });
            }
            Answer::Refusal(refusal) => greeting(REFUSAL, refusal.versions, 0, out, |out| {
                out.extend_from_slice(&refusal.reason.code().to_le_bytes());
                body::put_text(out, body::clip(&refusal.text));
                if let Some(node) = &refusal.node {
                    body::put_text(out, body::name(node));
                }
            }),
        }
    }

    /// Takes an answer from the front of `buf`, with the number of bytes it took; `Ok(None)` while it is not all there.
    ///
    /// Errors: see [`WireError`]; [`WireError::Versions`] when the peer chose a version that this program does not speak.
    pub fn decode(buf: &[u8]) -> Result<Option<(Answer, usize)>, WireError> {
        let Some(found) = open(buf)? else {
            return Ok(None);
        };
        let mut r = Reader(found.fields);
        let answer = match found.kind {
            ACK if found.versions.common(VERSIONS).is_none() => {
                return Err(WireError::Versions {
                    theirs: found.versions,
                    ours: VERSIONS,
                });
            }
            ACK => Answer::Ack(HelloAck {
                version: found.versions.max,
                features: found.features,
                cluster: ClusterId(r.array()?),
                boot_id: BootId(r.array()?),
                instance: Instance(r.array()?),
                credits: r.u32()?,
                node: NodeName(r.text()?),
            }),
            REFUSAL => {
                let reason = Reason::of(r.u16()?);
                Answer::Refusal(HelloRefusal {
                    versions: found.versions,
                    reason,
                    text: r.text()?,
                    // Not there, or something else that a later version says: it refuses all the same.
                    node: r.text().ok().map(NodeName),
                })
            }
            _ => return Err(WireError::Malformed("greeting: not an answer")),
        };
        Ok(Some((answer, found.len)))
    }
}

/// A greeting whose CRC verified.
struct Greeting<'a> {
    kind: u16,
    len: usize,
    versions: Versions,
    features: u64,
    fields: &'a [u8],
}

fn greeting(
    kind: u16,
    versions: Versions,
    features: u64,
    out: &mut Vec<u8>,
    fields: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&kind.to_le_bytes());
    let len_at = out.len();
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&versions.min.to_le_bytes());
    out.extend_from_slice(&versions.max.to_le_bytes());
    out.extend_from_slice(&features.to_le_bytes());
    fields(out);
    let len = (out.len() - start + CRC_LEN) as u16;
    out[len_at..len_at + 2].copy_from_slice(&len.to_le_bytes());
    let crc = crc32c::crc32c(&out[start..]);
    out.extend_from_slice(&crc.to_le_bytes());
}

fn open(buf: &[u8]) -> Result<Option<Greeting<'_>>, WireError> {
    let start = &buf[..buf.len().min(MAGIC.len())];
    if *start != MAGIC[..start.len()] {
        let mut found = [0; 4];
        found[..start.len().min(4)].copy_from_slice(&start[..start.len().min(4)]);
        return Err(WireError::Magic(found));
    }
    let Some(prefix) = buf.get(..PREFIX) else {
        return Ok(None);
    };
    let mut r = Reader(&prefix[MAGIC.len()..]);
    let (kind, len) = (r.u16()?, usize::from(r.u16()?));
    let versions = Versions {
        min: r.u16()?,
        max: r.u16()?,
    };
    let features = r.u64()?;
    within("greeting", len, GREETING_MAX)?;
    if len < PREFIX + CRC_LEN {
        return Err(WireError::Malformed("greeting: too short"));
    }
    let Some(whole) = buf.get(..len) else {
        return Ok(None);
    };
    let (covered, crc) = whole.split_at(len - CRC_LEN);
    if Reader(crc).u32()? != crc32c::crc32c(covered) {
        return Err(WireError::Checksum("greeting"));
    }
    Ok(Some(Greeting {
        kind,
        len,
        versions,
        features,
        fields: &covered[PREFIX..],
    }))
}
