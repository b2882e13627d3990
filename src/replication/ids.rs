//! Names and units of the protocol. A newtype for each, so that a sequence number is never taken for an
//! offset, nor a chunk for a region.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// 512 bytes: what virtio-blk counts in, and the unit in which two copies may differ after a crash.
pub const SECTOR: u64 = 512;
/// The unit of the dirty bitmaps and of resync, in bytes (PROTOCOL 1).
pub const CHUNK: u64 = 64 << 10;
/// The unit of the activity log, in bytes (PROTOCOL 1: 1–4 MiB). 4 MiB: a random-write load over 16 GiB then fits
/// the log's [`REGIONS_MAX`] slots and costs one log write for each region ever, not one a write.
pub const REGION: u64 = 4 << 20;
/// How many regions one copy's activity log holds at once.
pub const REGIONS_MAX: usize = 4096;
/// Copies of one volume: the master and five replicas, and one being made to replace each of two of them.
pub const COPIES_MAX: usize = 8;
/// Connections of one attachment: link *i* below [`COPIES_MAX`] is the copy *i*'s own, link *i* + [`COPIES_MAX`] the one
/// for bulk while that copy is brought up to date, so that bulk never delays an answer (PROTOCOL 8).
pub const LINKS_MAX: usize = 2 * COPIES_MAX;
/// Replicas of one volume (R).
pub const REPLICAS_MAX: u8 = 5;
/// The largest volume, in bytes. A copy keeps two bytes of memory for each region, whatever an attachment asks for.
pub const VOLUME_MAX: u64 = 64 << 40;
/// The longest single write or read the protocol carries, in bytes. Larger guest requests are split.
pub const IO_MAX: u32 = 1 << 20;
/// The longest single span that is made zero, in bytes: one [`REGION`]. Larger guest requests are cut where regions end, so that
/// no request ever needs more than a slot or two of an activity log, and all copies have done one soon.
pub const ZERO_MAX: u32 = REGION as u32;

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let h: String = self.0.iter().map(|b| format!("{b:02x}")).collect();
                write!(f, "{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..])
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = BadId;

            fn from_str(s: &str) -> Result<Self, BadId> {
                let hex: Vec<u8> = s.bytes().filter(|b| *b != b'-').collect();
                if hex.len() != 32 {
                    return Err(BadId(s.into()));
                }
                let mut out = [0; 16];
                for (o, pair) in out.iter_mut().zip(hex.chunks(2)) {
                    let digit = |b: u8| (b as char).to_digit(16).ok_or_else(|| BadId(s.into()));
                    *o = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
                }
                Ok(Self(out))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// Text that should have been 32 hexadecimal digits, hyphens anywhere.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not an identifier of 32 hexadecimal digits")]
pub struct BadId(String);

id128!(
    /// One volume, for ever; its name may be given again after it was removed, its id never.
    VolumeId
);
id128!(
    /// One copy on one disk. A new or wiped disk never reuses one (S18).
    CopyId
);
id128!(
    /// One boot of a node's kernel: while it stands, what the OS took into its page cache is still there.
    BootId
);
id128!(
    /// One run of a node's process.
    Instance
);
id128!(
    /// One cluster: nodes of different clusters refuse each other.
    ClusterId
);

/// A node's name: the operator's, unique in the cluster.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeName(pub String);

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number!(
    /// +1 at every change of attachment, master or in-sync set; never falls on a disk (S2).
    Epoch(u64)
);
number!(
    /// Random companion of an epoch: tells two histories apart that reached the same number.
    Tag(u64)
);
number!(
    /// Identifies one request between an attachment and its copies; starts at 1, never reused by one attachment.
    Seq(u64)
);
number!(
    /// Index of a [`CHUNK`] in the volume.
    Chunk(u32)
);
number!(
    /// Index of a [`REGION`] in the volume.
    Region(u32)
);
number!(
    /// CLOCK_BOOTTIME in nanoseconds (it counts suspended time, which a lease must).
    Nanos(u64)
);

impl Epoch {
    /// The epoch after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Nanos {
    /// A span of `ms` milliseconds.
    pub const fn from_ms(ms: u64) -> Self {
        Self(ms * 1_000_000)
    }

    /// Time from `earlier` to `self`; zero when `earlier` is later.
    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }

    /// The instant `span` after this one.
    pub fn after(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }

    /// Whole milliseconds.
    pub fn as_ms(self) -> u64 {
        self.0 / 1_000_000
    }
}

/// A byte range of the volume, `len` > 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

impl Chunk {
    /// Its bytes; the last chunk's reach beyond a volume that ends within it.
    pub fn span(self) -> Span {
        Span {
            offset: u64::from(self.0) * CHUNK,
            len: CHUNK as u32,
        }
    }
}

impl Span {
    /// First byte after the span.
    pub fn end(self) -> u64 {
        self.offset + u64::from(self.len)
    }

    /// Whether the two share a byte.
    pub fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// The activity-log regions the span touches.
    pub fn regions(self) -> impl Iterator<Item = Region> + Clone {
        let last = (self.end() - 1) / REGION;
        (self.offset / REGION..=last).map(|r| Region(r as u32))
    }

    /// The chunks the span touches.
    pub fn chunks(self) -> impl Iterator<Item = Chunk> + Clone {
        let last = (self.end() - 1) / CHUNK;
        (self.offset / CHUNK..=last).map(|c| Chunk(c as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_from_its_text() {
        let id = VolumeId(*b"0123456789abcdef");
        assert_eq!(id.to_string(), "30313233-3435-3637-3839-616263646566");
        assert_eq!(id.to_string().parse::<VolumeId>().unwrap(), id);
        assert!("30313233".parse::<VolumeId>().is_err());
        assert!(
            "zz313233-3435-3637-3839-616263646566"
                .parse::<VolumeId>()
                .is_err()
        );
    }

    #[test]
    fn a_span_names_each_region_and_chunk_it_touches() {
        let s = Span {
            offset: REGION - 512,
            len: 1024,
        };
        assert_eq!(s.regions().collect::<Vec<_>>(), [Region(0), Region(1)]);
        assert_eq!(s.chunks().count(), 2);
        let one = Span {
            offset: CHUNK,
            len: CHUNK as u32,
        };
        assert_eq!(one.chunks().collect::<Vec<_>>(), [Chunk(1)]);
        assert!(!one.overlaps(Span {
            offset: 0,
            len: CHUNK as u32
        }));
        assert!(one.overlaps(Span {
            offset: CHUNK - 1,
            len: 2
        }));
    }
}
