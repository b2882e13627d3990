//! Sealed sectors: what the activity log and the bitmaps are made of. Each 512-byte sector verifies by itself, so that a
//! torn write (every sector verifies, some are old) is told from rot (a sector does not verify).

use super::layout::{BLOCK, PAYLOAD, SECTOR_HEADER, SECTOR_PAYLOAD};
use crate::replication::ids::{CopyId, SECTOR};

/// What a sector belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Log = 1,
    Bitmap = 2,
}

/// The part of a sector's header that its user defines: bytes 5, 6 and 8–31 (docs/DISK-FORMAT.md).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Label {
    pub small: [u8; 2],
    pub wide: [u8; 24],
}

/// A sector's content, verified.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sector<'a> {
    pub label: Label,
    pub payload: &'a [u8],
}

/// The part of every CRC that depends on whose metadata it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Salt(u32);

impl Salt {
    pub fn of(copy: CopyId) -> Self {
        Self(crc32c::crc32c(&copy.0))
    }

    /// CRC of `sector` (512 bytes) at `offset`: a sector that strayed to another place does not verify there.
    fn crc(self, offset: u64, sector: &[u8]) -> u32 {
        crc32c::crc32c_append(
            crc32c::crc32c_append(self.0, &offset.to_le_bytes()),
            &sector[4..],
        )
    }
}

/// Makes the block at `offset` out of `payload`, all of its sectors labelled alike.
pub(super) fn seal(
    salt: Salt,
    offset: u64,
    kind: Kind,
    label: Label,
    payload: &[u8; PAYLOAD],
    block: &mut [u8],
) {
    assert_eq!(block.len() as u64, BLOCK);
    for (i, (sector, part)) in block
        .chunks_exact_mut(SECTOR as usize)
        .zip(payload.chunks_exact(SECTOR_PAYLOAD))
        .enumerate()
    {
        sector[4] = kind as u8;
        sector[5..7].copy_from_slice(&label.small);
        sector[7] = 0;
        sector[8..SECTOR_HEADER].copy_from_slice(&label.wide);
        sector[SECTOR_HEADER..].copy_from_slice(part);
        let crc = salt.crc(offset + i as u64 * SECTOR, sector);
        sector[..4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// The sector at `offset`, or `None` when it does not verify as one of `kind`.
pub(super) fn open(salt: Salt, offset: u64, kind: Kind, sector: &[u8]) -> Option<Sector<'_>> {
    if sector.len() as u64 != SECTOR || sector[4] != kind as u8 || sector[7] != 0 {
        return None;
    }
    if u32_at(sector, 0) != salt.crc(offset, sector) {
        return None;
    }
    let mut label = Label::default();
    label.small.copy_from_slice(&sector[5..7]);
    label.wide.copy_from_slice(&sector[8..SECTOR_HEADER]);
    Some(Sector {
        label,
        payload: &sector[SECTOR_HEADER..],
    })
}

/// The number at `at`, which the caller knows to be within `bytes`.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// See [`u16_at`].
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

/// See [`u16_at`].
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// See [`u16_at`].
pub(super) fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_verifies_only_unchanged_in_its_place_and_for_its_copy() {
        let salt = Salt::of(CopyId([7; 16]));
        let label = Label {
            small: [1, 2],
            wide: [9; 24],
        };
        let mut block = vec![0; BLOCK as usize];
        seal(salt, 8192, Kind::Log, label, &[0x5a; PAYLOAD], &mut block);
        for i in 0..8 {
            let sector = &block[i * 512..][..512];
            let at = 8192 + i as u64 * 512;
            let read = open(salt, at, Kind::Log, sector).unwrap();
            assert_eq!(
                (read.label, read.payload),
                (label, &[0x5a; SECTOR_PAYLOAD][..])
            );
            assert!(open(salt, at + 512, Kind::Log, sector).is_none());
            assert!(open(salt, at, Kind::Bitmap, sector).is_none());
            assert!(open(Salt::of(CopyId([8; 16])), at, Kind::Log, sector).is_none());
        }
        for bit in 0..512 * 8 {
            let mut rotten = block[..512].to_vec();
            rotten[bit / 8] ^= 1 << (bit % 8);
            assert!(open(salt, 8192, Kind::Log, &rotten).is_none(), "bit {bit}");
        }
    }
}
